"""RunPod's event -> a Request and its faults, in a client's words.

`read_request` does not give up at the first fault: it gives back what is right and what is wrong, so that the plan,
which knows the model, can add its own findings and answer with all of them at once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from src.errors import Fault, InvalidRequest, UnknownField
from src.request.aliases import NAMES, other_program, own_names
from src.request.schema import MAX_UNKNOWN, OWNERS, Request
from src.wording import MAX_SHOWN, did_you_mean, show

_MAX_FAULTS = 50  # an answer must stay small whatever was sent
_KNOWN = NAMES | Request.model_fields.keys()
# pydantic's words -> a client's
_WORDS = {
    "^Value error, ": "",
    r"^String should match pattern .*": "is not written as it must be",
    "^(Input|String|Tuple) should": "must",
    "be a valid tuple": "be a list",
    r"be a valid dictionary or instance of \w+": "be an object",
}
_NESTED = {"missing": "is required", "extra_forbidden": "is unknown here"}


class Reading(NamedTuple):
    """What was read of an event: each faulty field of `request` holds its default instead."""

    request: Request
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]  # of what other services' clients send and what has no effect here


def read_request(event: object) -> Reading:
    """Read RunPod's event, `{"input": {...}}`.

    Raises InvalidRequest where there is no input to read at all.
    """
    if not isinstance(event, Mapping):
        raise InvalidRequest([Fault("", f'the event must be an object {{"input": {{...}}}}, got {show(event)}')])
    if "input" not in event:
        raise InvalidRequest(
            [Fault("input", f"is missing; the event holds {show(list(itertools.islice(event, MAX_UNKNOWN)))}")]
        )
    received = event["input"]
    if not isinstance(received, Mapping):
        raise InvalidRequest([Fault("input", f"must be an object of request fields, got {show(received)}")])

    # 1. Other services' names, and names that nobody knows
    received, more = _without_flood(received)
    if isinstance(nested := received.get("parameters"), Mapping):
        received["parameters"], more_nested = _without_flood(nested)
        more += more_nested
    if fault := other_program(received):
        raise InvalidRequest([fault])
    received, faults, warnings, came_as, foreign = own_names(received)
    fields = {name: value for name, value in received.items() if name in Request.model_fields}
    if fields.get("describe") is True:
        fields.setdefault("prompt", "?")  # nobody will draw it
    strange = [name for name, value in received.items() if name not in Request.model_fields and value is not None]
    faults += [_unknown(name) for name in strange[:MAX_UNKNOWN]]
    if more := more + len(strange[MAX_UNKNOWN:]):
        faults.append(Fault("input", f"holds {more:,} more unknown fields"))

    # 2. Values, each by itself
    request, wrong = _values(fields)
    faults += wrong
    request.came_as(came_as, foreign=foreign)

    # 3. Options of what is not there
    if not request.describe:  # which asks for nothing else
        orphans = _orphans(request, {fault.field.partition(".")[0] for fault in faults})
        if not foreign:
            faults += [Fault(name, why) for name, why in orphans.items()]
        else:
            warnings += [f"{request.client_name(name)} {why}" for name, why in orphans.items()]
            request = request.model_copy(update={name: Request.model_fields[name].default for name in orphans})
    return Reading(request.as_lists(), tuple(faults), tuple(warnings))


def _without_flood(received: Mapping[Any, Any]) -> tuple[dict[Any, Any], int]:
    """What means something, the first of the names that nobody knows and that hold something, and how many more."""
    unknown = [name for name, value in received.items() if name not in _KNOWN and value is not None]
    kept = {*_KNOWN, *unknown[:MAX_UNKNOWN]}
    return {name: value for name, value in received.items() if name in kept}, len(unknown[MAX_UNKNOWN:])


def _values(fields: dict[str, Any]) -> tuple[Request, list[Fault]]:
    """A Request of what is right, and what is wrong of the rest."""
    found: list[ErrorDetails] = []
    uncounted: list[int] = []  # names in an object that nobody knows, above those that were looked at
    try:
        request = Request.model_validate(fields, context=uncounted)
    except ValidationError as error:
        found = error.errors(include_url=False)
        wrong = {details["loc"][0] for details in found}
        sound = {name: value for name, value in fields.items() if name not in wrong}
        if "prompt" in wrong:
            sound["prompt"] = "?"  # stands in until the plan refuses the request
        request = Request.model_validate(sound)
    worded = list({_path(details): _fault(details) for details in reversed(found)}.values())[::-1]
    worded.sort(key=lambda fault: fault.field in Request.model_fields, reverse=True)  # a flood hides no other field
    faults = worded[:_MAX_FAULTS]
    if more := len(worded[_MAX_FAULTS:]) + sum(uncounted):
        faults.append(Fault("input", f"has {more:,} more faults"))
    return request, faults


def _orphans(request: Request, wrong: set[str]) -> dict[str, str]:
    """Fields that say how something is to be used which the request does not hold."""
    return {
        name: f"has no effect without {owner}{more}"
        for name, (owner, more) in OWNERS.items()
        if name in request.said and getattr(request, owner) is None and owner not in wrong
    }


def _unknown(name: object) -> Fault:
    hint = did_you_mean(name, Request.model_fields) if isinstance(name, str) else ""
    return UnknownField(
        name if isinstance(name, str) and _is_plain(name) else show(name),
        f"is not a field of a request{hint or '; allowed: ' + ', '.join(Request.model_fields)}",
    )


def _fault(details: ErrorDetails) -> Fault:
    name, *within = details["loc"]
    allowed = Request.model_fields[str(name)].description
    if details["type"] == "missing" and not within:
        return Fault(str(name), f"is required; allowed: {allowed}")
    wrong = details["msg"]
    for theirs, ours in _WORDS.items():
        wrong = re.sub(theirs, ours, wrong)
    if details["type"] in _NESTED:
        kind = UnknownField if details["type"] == "extra_forbidden" else Fault
        return kind(_path(details), f"{_NESTED[details['type']]}; allowed: {allowed}")
    return Fault(_path(details), f"{wrong}, got {show(details['input'])}; allowed: {allowed}")


def _path(details: ErrorDetails) -> str:
    """The field; where it holds objects also where within it, as in loras.0.scale."""
    name, *within = details["loc"]
    parts = [name, *within] if any(isinstance(part, str) for part in within) else [name]
    return ".".join(part if _is_plain(part) else show(part) for part in map(str, parts))


def _is_plain(name: str) -> bool:
    return len(name) <= MAX_SHOWN and (name.isidentifier() or name.isdecimal())

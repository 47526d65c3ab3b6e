"""What holds for every request and every text: tried on generated ones, the same in every run."""

from __future__ import annotations

import base64
import json
import time
from typing import Any
from urllib.parse import quote

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from handler import respond
from src.catalog import get_model
from src.engine import Engine
from src.errors import InvalidRequest
from src.job import Job
from src.redaction import MAX_REDACTED, keep_secret, redact
from src.request.aliases import LORA_KEYS, NAMES, VALUES
from src.request.reading import read_request
from src.request.schema import Request
from src.settings import Settings
from src.wording import show
from tests.fakes import FakePipeline

SCHEMA = Request.model_json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
ENGINE = Engine(FakePipeline(), get_model("flux-shapes"), None)
TRIES = settings(
    derandomize=False, deadline=None, database=None, max_examples=2500, suppress_health_check=list(HealthCheck)
)

# Any JSON, and what Python makes of it: numbers without bounds, no numbers, halves of characters.
TEXTS = st.text(st.characters(), max_size=30) | st.text(
    st.sampled_from("\0\n \"'\\{}[]:/?#@&=%;,.-_0aA\ud800é東🔴"), max_size=30
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**20, 10**400), st.floats(), TEXTS,
    st.sampled_from(["", " ", "x" * 6_000, "1" * 400, "https:///?" + "sig" * 500, "data:,", "auto", "16:9", "512x512"]),
)  # fmt: skip
OWN = st.sampled_from([*Request.model_fields, *sorted(NAMES)])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(OWN | TEXTS, inner, max_size=4),
    max_leaves=20,
)


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a part of the JSON Schema takes."""
    if "$ref" in schema:
        return values_of(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from([schema["const"]] if "const" in schema else schema["enum"])
    if "type" not in schema:
        return st.one_of(*map(values_of, schema["anyOf"]))
    least, most = schema.get("minimum", schema.get("exclusiveMinimum", -9)), schema.get("maximum", 2**62)
    match schema["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            step = schema.get("multipleOf", 1)
            numbers = st.integers(-(-least // step), most // step).map(lambda number: number * step)
            return numbers | numbers.filter(lambda number: abs(number) < 2**50).map(float)
        case "number":
            return st.floats(least, most, exclude_min="exclusiveMinimum" in schema) | st.sampled_from([most])
        case "string":
            if "pattern" in schema and schema["pattern"].startswith("^"):
                return st.from_regex(schema["pattern"], fullmatch=True)
            letters = st.characters(exclude_categories=["Cs"])
            texts = st.text(letters, min_size=schema.get("minLength", 0), max_size=12)
            return texts.filter(jsonschema.Draft202012Validator(schema).is_valid)
        case "array":
            return st.lists(
                values_of(schema["items"]), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 3)
            )
    required = {name: values_of(schema["properties"][name]) for name in schema.get("required", ())}
    others = {name: values_of(part) for name, part in schema["properties"].items() if name not in required}
    return st.fixed_dictionaries(required, optional=others).filter(jsonschema.Draft202012Validator(schema).is_valid)


FIELDS = {name: values_of(part) for name, part in SCHEMA["properties"].items()}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request that the schema takes."""
    names = draw(st.sets(st.sampled_from(list(FIELDS)), max_size=6)) | {"prompt"}
    request = {name: draw(FIELDS[name]) for name in sorted(names)}
    assume(VALIDATOR.is_valid(request))  # also of fields that need each other
    return request


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A request that the schema takes, but for one or two places."""
    request: Any = draw(requests())
    for _ in range(draw(st.integers(1, 2))):
        place, value = request, draw(JSON)
        for _ in range(2):
            parts = place.values() if isinstance(place, dict) else place
            within: list[Any] = [part for part in parts if part and isinstance(part, (dict, list))]
            if draw(st.booleans()) and within:
                place = draw(st.sampled_from(within))
        if isinstance(place, list):
            place[draw(st.integers(0, len(place) - 1))] = value
        elif draw(st.booleans()):
            place[draw(st.sampled_from(sorted(place)) if place else TEXTS)] = value
        else:
            place[draw(TEXTS | st.sampled_from([*FIELDS, "widht", "scale", "path", "left"]))] = value
    return dict(request)


def written_for_others(request: dict[str, Any]) -> bool:
    """Whether it holds other services' names, values or shapes, or names that hold nothing."""
    entries = request.get("loras")
    return bool(
        NAMES & request.keys()
        or any(value is None for name, value in request.items() if name not in FIELDS)
        or any(str(request.get(name)).lower() in words for name, words in VALUES.items())
        or (isinstance(request.get("output_format"), str) and request["output_format"] not in ("PNG", "JPEG"))
        or isinstance(entries, str)
        or (
            isinstance(entries, list)
            and any(
                isinstance(entry, str)
                or (
                    isinstance(entry, dict)
                    and (set(LORA_KEYS) - {"path", "scale", "weight_name"} & set(entry) or None in entry.values())
                )
                for entry in entries
            )
        )
    )


def is_json(value: Any) -> bool:
    """Whether a client can send it."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, UnicodeEncodeError):
        return False
    return True


@TRIES
@given(JSON | st.builds(lambda fields: {"input": fields}, JSON | mutated()))
def test_any_event_is_read_in_a_moment(event: Any) -> None:
    begun = time.process_time()
    try:
        read_request(event)
    except InvalidRequest as error:
        error.to_response(include_traceback=True)
    assert time.process_time() - begun < 3


@TRIES
@given(
    st.builds(lambda id, fields: {"id": id, "input": fields}, JSON, mutated() | JSON),
    st.sampled_from(["describe", "dry_run"]),
)
def test_every_answer_is_small_and_json_and_no_fault_of_ours(event: dict[str, Any], instead: str) -> None:
    if isinstance(event["input"], dict):
        event["input"][instead] = True  # and nothing is drawn
    response = respond(event, Job.of(event), Settings, lambda: ENGINE)
    assert len(json.dumps(response, allow_nan=False, ensure_ascii=False).encode()) < 300_000
    assert response["status"] == "success" or response["error_code"] in ("invalid_request", "adapter_unavailable")


@TRIES
@given(mutated())
def test_what_the_schema_refuses_the_reader_refuses(request: dict[str, Any]) -> None:
    if not is_json(request) or written_for_others(request) or VALIDATOR.is_valid(request):
        return
    assert read_request({"input": request}).faults != ()


@TRIES
@given(requests())
def test_what_the_schema_takes_the_reader_takes(request: dict[str, Any]) -> None:
    assert VALIDATOR.is_valid(request)
    if not written_for_others(request):
        assert read_request({"input": request}).faults == ()


@TRIES
@given(requests() | mutated())
def test_what_the_reader_takes_the_schema_takes_in_its_own_words(request: dict[str, Any]) -> None:
    try:
        taken = Request.model_validate(request)
    except ValueError:
        return
    VALIDATOR.validate(taken.model_dump(mode="json", exclude_unset=True))
    VALIDATOR.validate(taken.model_dump(mode="json"))


@TRIES
@given(JSON)
def test_what_is_shown_is_short(value: Any) -> None:
    shown = show(value)
    assert len(shown) < 300
    shown.encode()


BY_VALUE = "Planted:by/value@0&1"
BY_SHAPE = [
    "hf_{}", "ghp_{}", "Bearer {}", "Authorization: Basic {}", "https://user:{}@host/", "https://a.test/?token={}",
    "https://a.test/?x=1&X-Goog-Signature={}", "https://a.test/c?sv=1&sig={}&se=2", "aws_secret_access_key={}",
    "'password': '{}'",
]  # fmt: skip


@TRIES
@given(TEXTS, st.sampled_from([BY_VALUE, quote(BY_VALUE), quote(BY_VALUE, safe=""), json.dumps(BY_VALUE)[1:-1]]), TEXTS)
def test_no_secret_that_is_known_is_left_in_any_text(before: str, secret: str, after: str) -> None:
    keep_secret(BY_VALUE)
    assert secret not in redact(before + secret + after)
    assert secret not in show(before + secret + after)
    coded = base64.b64encode((before + BY_VALUE + after).encode(errors="replace")).decode()
    assert base64.b64encode(BY_VALUE.encode()).decode()[3:-4] not in redact(coded)


@TRIES
@given(TEXTS, st.sampled_from(BY_SHAPE), st.from_regex("[A-Za-z][A-Za-z0-9]{18}Z", fullmatch=True), TEXTS)
def test_no_secret_of_a_known_shape_is_left_in_any_text(before: str, shape: str, secret: str, after: str) -> None:
    clean = redact(f"{before} {shape.format(secret)} {after}")
    assert secret not in clean
    assert redact(clean) == clean


@TRIES
@given(
    st.lists(
        TEXTS | st.sampled_from(["token", "sig", "://", "?", "&", "=", "hf_", "eyJ", "@", ":", "aws "]), min_size=1
    ),
    st.integers(1, 5_000),
)
def test_redact_takes_a_moment(parts: list[str], times: int) -> None:
    begun = time.process_time()
    clean = redact("".join(parts) * times)
    assert time.process_time() - begun < 4
    assert len(clean) < 6 * MAX_REDACTED + 100


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for wrong in (
        {"prompt": "x", "width": 65},
        {"prompt": "x", "seed": -2},
        {"width": 64},
        {"prompt": "\0"},
        {"prompt": " "},
    ):
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(wrong)
    for right in ({"describe": True}, {"prompt": "x", "seed": -1, "width": 64.0}, {"prompt": ["x"], "strength": ""}):
        VALIDATOR.validate(right)

"""A call of OpenAI's API, as RunPod hands it to a worker, -> the request of our own that it asks for.

`{"input": {"openai_route": "/v1/images/generations", "openai_input": {...}}}`; a GET has no openai_input. Names and
values that OpenAI's clients and others share are in aliases.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from src.catalog import Model
from src.errors import Fault, InvalidRequest
from src.wording import show

GENERATIONS, EDITS, MODELS = "/v1/images/generations", "/v1/images/edits", "/v1/models"
_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {"/v1/images/variations": f"is not answered by this worker; send the picture to {EDITS} with a prompt"}
)
# Another word for a row of a model's qualities; None is what the model does by itself.
_QUALITIES: Mapping[str, str | None] = MappingProxyType(
    {"auto": None, "standard": None, "hd": "high", "xhigh": "high", "max": "high"}
)
MOST_PARTIAL = 3  # pictures on their way
BEST = "high"  # what a model does by itself
_FORMATS = ("b64_json", "url")
# A field of ours, and OpenAI's that it may have come as.
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "num_images": ("n",),
        "width": ("size",),
        "height": ("size",),
        "output_quality": ("output_compression",),
        "speed": ("quality",),
        "num_inference_steps": ("quality",),
        "init_image": ("image", "images"),
        "init_images": ("image", "images"),
        "mask_image": ("mask",),
    }
)
_WORDS = re.compile(r"[-._\s]+")


class _Bucket(Protocol):
    """What is asked of response/storage.py's."""

    no_links: str  # why its files cannot be fetched; empty where they can


T = TypeVar("T", bound=_Bucket)


class OpenAICall(NamedTuple):
    """What an event asks for; of one that is no call of OpenAI's API, the event as it is."""

    event: object
    faults: tuple[Fault, ...] = ()
    response_format: str | None = None  # b64_json or url, where the client says which

    def destination(self, bucket: T | None) -> T | None:
        """`bucket`, where the pictures are not to come in base64; raises InvalidRequest where they must go to one."""
        if self.response_format == "url" and (bucket is None or bucket.no_links):
            message = "can only be b64_json here, got 'url': this worker has no bucket whose files have addresses"
            raise InvalidRequest([Fault("response_format", message)])
        return None if self.response_format == "b64_json" else bucket


def openai_route(event: object) -> str | None:
    """The route that is called; None where `event` is no call of OpenAI's API."""
    received = event.get("input") if isinstance(event, Mapping) else None
    route = received.get("openai_route") if isinstance(received, Mapping) else None
    return None if route is None else route.rstrip("/") if isinstance(route, str) else show(route)


def openai_input(event: Any) -> dict[str, Any]:
    """The fields of a call; none where there are none to read."""
    received = event["input"].get("openai_input")
    return dict(received) if isinstance(received, Mapping) else {}


def openai_name(event: Any, field: str) -> str:
    """The name that `field`, of ours, has in a call."""
    first, *_ = field.split(".")
    given = openai_input(event)
    return next((name for name in _NAMES.get(first, ()) if given.get(name) is not None), field)


def asked_quality(event: Any, model: Model) -> str:
    """The row of `model`'s qualities that a call asks for."""
    quality = str(openai_input(event).get("quality"))
    name = _QUALITIES.get(quality, quality) or BEST
    return name if name in model.qualities else BEST


def own_call(event: object, model: Callable[[], Model]) -> OpenAICall:
    """The request of our own that `event` asks for, and what is wrong of it beyond what that shows."""
    route = openai_route(event)
    if route is None or not isinstance(event, Mapping):
        return OpenAICall(event)
    if route == MODELS or route.startswith(f"{MODELS}/"):
        return _models(event, route, model())
    if route not in (GENERATIONS, EDITS):
        known = ", ".join((GENERATIONS, EDITS, MODELS))
        why = _ELSEWHERE.get(route, f"is not a route of this worker, got {show(route)}; allowed: {known}")
        return _refused(event, Fault("openai_route", why))
    received = event["input"].get("openai_input")
    if not isinstance(received, Mapping):
        return _refused(event, Fault("openai_input", f"must be an object of fields, got {show(received)}"))
    return _pictures(event, route, model())


def _described(event: Mapping[Any, Any]) -> dict[Any, Any]:
    return {**event, "input": {"describe": True}}


def _refused(event: Mapping[Any, Any], fault: Fault) -> OpenAICall:
    return OpenAICall(_described(event), (fault,))


def _models(event: Mapping[Any, Any], route: str, model: Model) -> OpenAICall:
    name = route.removeprefix(MODELS).removeprefix("/")
    faults = [*_other_model(name, model)] if name else []
    return OpenAICall(_described(event), tuple(faults))


def _pictures(event: Mapping[Any, Any], route: str, model: Model) -> OpenAICall:
    fields = {name: value for name, value in openai_input(event).items() if value is not None}
    faults = _other_model(fields.pop("model", None), model)

    # 1. How the answer is to come
    response_format = fields.pop("response_format", None)
    if response_format not in (None, *_FORMATS):
        faults.append(Fault("response_format", f"must be {' or '.join(_FORMATS)}, got {show(response_format)}"))
    if fields.pop("stream", False) not in (False, 0):
        message = "is not possible through RunPod's queue, which gives answers whole; leave it out here, or ask web.py"
        faults.append(Fault("stream", message))
    partial = fields.pop("partial_images", 0)
    if type(partial) is not int or not 0 <= partial <= MOST_PARTIAL:
        faults.append(Fault("partial_images", f"must be an integer from 0 to {MOST_PARTIAL}, got {show(partial)}"))
    elif partial and all("preview" in spec.takes for spec in model.modes.values()):
        fields.setdefault("preview", True)
    if (background := fields.pop("background", "auto")) not in ("auto", "opaque"):
        faults.append(Fault("background", f"must be opaque or auto, as FLUX draws no transparency: {show(background)}"))

    # 2. How much work is to go into it
    quality = fields.pop("quality", "auto")
    name = _QUALITIES.get(quality, quality) if isinstance(quality, str) else quality
    if name is not None and (not isinstance(name, str) or name not in model.qualities):
        allowed = ", ".join((*model.qualities, *_QUALITIES))
        faults.append(Fault("quality", f"is not one of those that there are, got {show(quality)}; allowed: {allowed}"))
    elif name is not None:
        row = model.qualities[name]
        for field, value in (("speed", row.speed), ("num_inference_steps", row.num_inference_steps)):
            if value is not None:
                fields.setdefault(field, value)

    # 3. The pictures that it starts from
    if isinstance(fields.get("images"), (list, tuple)):
        fields["images"] = [_source(entry) for entry in fields["images"]]
    if route == EDITS and not any(fields.get(name) for name in ("image", "images", "init_image", "init_images")):
        faults.append(Fault("image", f"is required by {EDITS}; {GENERATIONS} starts from none"))
    asked = response_format if isinstance(response_format, str) else None
    return OpenAICall({**event, "input": fields}, tuple(faults), asked)


def _source(entry: object) -> object:
    """A picture of `images`, which is {"image_url": ...} in OpenAI's JSON."""
    return entry["image_url"] if isinstance(entry, Mapping) and set(entry) == {"image_url"} else entry


def _other_model(name: object, model: Model) -> list[Fault]:
    """What to say where `name` is another model's than this worker's."""
    if name is None or name == "" or (isinstance(name, str) and is_name_of(name, model)):
        return []
    message = f"is not served here, got {show(name)}; allowed: {model.name}, or leave it out"
    return [Fault("model", message)]


def is_name_of(name: str, model: Model) -> bool:
    """Whether `name` is the model's, its repo's, or the beginning of it in whole words: flux of FLUX.1-dev."""
    wanted = _words(name)
    return bool(wanted) and any(_words(own)[: len(wanted)] == wanted for own in (model.name, model.repo))


def _words(name: str) -> list[str]:
    return [word for word in _WORDS.split(name[:1_000].strip().rstrip("/").rpartition("/")[2].lower()) if word]

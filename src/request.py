"""What a client may write, and how it is told what is wrong.

`read_request` does not give up at the first fault: it gives back what is right and what is wrong, so that the
plan, which knows the model, can add its own findings and answer with all of them at once.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails

from src.aliases import own_names
from src.errors import Fault, InvalidRequest
from src.images import FORMATS
from src.wording import MAX_SHOWN, did_you_mean, show

MAX_PROMPT_CHARACTERS = 5_000  # ten times what T5's 512 tokens hold
MAX_SEED = 2**63 - 1
MIN_SIDE, MAX_SIDE = 64, 2048
# What a request's pictures are for, and how they are read: in colour, or as a mask.
PICTURES: Mapping[str, str] = MappingProxyType(
    {"init_image": "RGB", "mask_image": "L", "control_image": "RGB", "image_prompt": "RGB"}
)
MAX_PICTURES = 10  # of one kind: what FLUX.2 takes
_MAX_UNKNOWN, _MAX_FAULTS = 20, 50  # an answer must stay small whatever was sent
# pydantic's words -> a client's
_WORDS = {
    "^Value error, ": "",
    "^(Input|String|Tuple) should": "must",
    "be a valid tuple": "be a list",
    r"be a valid dictionary or instance of \w+": "be an object",
}
_NESTED = {"missing": "is required", "extra_forbidden": "is unknown here"}
_ALLOWED_PROMPT = f"text of 1 to {MAX_PROMPT_CHARACTERS:,} characters, not blank, without control characters"


def _whole(value: object) -> object:
    """JSON has one kind of number: 512.0 is 512."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _clean(text: str) -> str:
    if any(unicodedata.category(character) == "Cc" and character not in "\n\r\t" for character in text):
        raise ValueError("must not hold control characters")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def _at_most(most: int) -> BeforeValidator:
    """Refuses longer lists before their items are looked at."""

    def check(value: object) -> object:
        if isinstance(value, (list, tuple)) and len(value) > most:
            raise ValueError(f"must hold {most} at most, not {len(value):,}")
        return value

    return BeforeValidator(check)


def _one_or_several(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


def _picked(value: object) -> object:
    return None if value == -1 and not isinstance(value, bool) else value


def _number(value: object) -> object:
    """Replicate's megapixels come as text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d{1,2}(\.\d{1,6})?", value) else value


def _ratio(value: object) -> object:
    """Replicate's words for what is meant where nothing is said: the picture's, or width's and height's."""
    return None if value in ("match_input_image", "custom") else value


def _format(value: object) -> object:
    name = value.strip().upper() if isinstance(value, str) else value
    return "JPEG" if name == "JPG" else name


Whole = Annotated[StrictInt, BeforeValidator(_whole)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Text = Annotated[StrictStr, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_clean)]
Side = Annotated[Whole, Field(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=8)]
Picture = StrictStr | None
_PICTURE = "a picture as base64, data URI or https URL"
_SIDE = f"an integer, a multiple of 8 from {MIN_SIDE} to {MAX_SIDE}"


class Lora(BaseModel):
    """One adapter of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[StrictStr, Field(min_length=1, max_length=2_000)]
    scale: Annotated[Number, Field(ge=-4, le=4)] = 0.7
    weight_name: StrictStr | None = None
    revision: StrictStr | None = None


_PROMPT_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_PROMPT_CHARACTERS}


class Control(BaseModel):
    """One picture that says where things are; None means what the ControlNet's row says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: StrictStr
    type: StrictStr | None = None
    scale: Annotated[Number, Field(ge=0, le=2)] | None = None
    start: Annotated[Number, Field(ge=0, le=1)] = 0.0
    end: Annotated[Number, Field(ge=0, le=1)] | None = None
    preprocess: StrictBool = False


Border = Annotated[Whole, Field(ge=0, le=MAX_SIDE)]


class Borders(BaseModel):
    """Pixels to draw anew on each side of a picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    left: Border = 0
    right: Border = 0
    top: Border = 0
    bottom: Border = 0

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not (self.left or self.right or self.top or self.bottom):
            raise ValueError("must be above 0 on one side at least")
        return self


_LORA = "a hub id (owner/name), an https URL or a file in LORA_DIR"


class Request(BaseModel):
    """One valid request; None means the model's own default. Descriptions say what is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[
        tuple[Annotated[Text, AfterValidator(_not_blank)], ...],
        BeforeValidator(_one_or_several),
        _at_most(4),
        Field(min_length=1),
        WithJsonSchema({"anyOf": [_PROMPT_SCHEMA, {"type": "array", "items": _PROMPT_SCHEMA, "maxItems": 4}]}),
    ] = Field(description=f"{_ALLOWED_PROMPT}; or a list of 2 to 4, one a picture")
    prompt_2: Text | None = Field(
        None, description=f"text of at most {MAX_PROMPT_CHARACTERS:,} characters for T5, where prompt is for CLIP alone"
    )
    negative_prompt: Text | None = Field(
        None, description=f"text of at most {MAX_PROMPT_CHARACTERS:,} characters, with true_cfg_scale above 1"
    )
    true_cfg_scale: Annotated[Number, Field(ge=1, le=20)] = Field(1.0, description="a number from 1 to 20")
    width: Side | None = Field(None, description=_SIDE)
    height: Side | None = Field(None, description=_SIDE)
    aspect_ratio: Annotated[
        Annotated[StrictStr, Field(pattern=r"^[1-9]\d{0,3}:[1-9]\d{0,3}$")] | None, BeforeValidator(_ratio)
    ] = Field(None, description="width to height, as 16:9; instead of width and height")
    megapixels: Annotated[Annotated[Number, Field(ge=0.01, le=4.2)] | None, BeforeValidator(_number)] = Field(
        None, description="a number from 0.01 to 4.2, in millions of pixels; with aspect_ratio or alone"
    )
    num_inference_steps: Annotated[Whole, Field(ge=1, le=100)] | None = Field(
        None, description="an integer from 1 to 100"
    )
    guidance_scale: Annotated[Number, Field(ge=0, le=100)] | None = Field(
        None, description="a number from 0 to the model's limit (20; Fill, Canny and Depth 100)"
    )
    num_images: Annotated[Whole, Field(ge=1, le=4)] = Field(1, description="an integer from 1 to 4")
    seed: Annotated[Annotated[Whole, Field(ge=0, le=MAX_SEED)] | None, BeforeValidator(_picked)] = Field(
        None, description="an integer from 0 to 2^63-1; null or -1 picks one"
    )
    output_format: Annotated[Literal["PNG", "JPEG", "WEBP"], BeforeValidator(_format)] = Field(
        "PNG", description=" or ".join(FORMATS)
    )
    output_quality: Annotated[Whole, Field(ge=1, le=100)] = Field(95, description="an integer from 1 to 100")
    max_sequence_length: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="an integer from 1 to the model's limit"
    )
    init_image: Picture = Field(None, description=_PICTURE)
    init_images: Annotated[tuple[StrictStr, ...], _at_most(MAX_PICTURES)] = Field(
        (), description=f"a list of such pictures, for models that take several: at most {MAX_PICTURES}"
    )
    mask_image: Picture = Field(None, description=f"{_PICTURE}; white is drawn anew, black is kept")
    strength: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1: how much of init_image may change"
    )
    preserve_unmasked: StrictBool = Field(
        True, description="true or false: outside mask_image the very pixels of init_image come back"
    )
    outpaint: Borders | None = Field(
        None,
        description=f"{{left, right, top, bottom}}, integers from 0 to {MAX_SIDE}: pixels to draw around init_image",
    )
    control_image: Picture = Field(None, description=f"{_PICTURE}, which says where things are")
    control_type: StrictStr | None = Field(None, description="what control_image is: canny, depth, pose ...")
    controlnet_conditioning_scale: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="a number from 0 to 2: how much control_image is heard"
    )
    control_guidance_start: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.0, description="a number from 0 to 1: the share of the steps before control_image is heard"
    )
    control_guidance_end: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1: the share of the steps after which control_image is not heard any more"
    )
    preprocess: StrictBool = Field(
        False, description="true or false: true makes canny edges from control_image, which is then a plain picture"
    )
    controls: Annotated[tuple[Control, ...], _at_most(4)] = Field(
        (), description="at most 4 of {image, type, scale, start, end, preprocess}, each as control_image"
    )
    image_prompt: Picture = Field(None, description=f"{_PICTURE}: what the model reads beside the prompt (Redux)")
    image_prompt_scale: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="a number from 0 to 2: how much image_prompt is heard"
    )
    lora_path: Annotated[StrictStr, Field(min_length=1, max_length=2_000)] | None = Field(None, description=_LORA)
    lora_scale: Annotated[Number, Field(ge=-4, le=4)] = Field(0.7, description="a number from -4 to 4, with lora_path")
    loras: Annotated[tuple[Lora, ...], _at_most(4)] = Field(
        (), description=f"at most 4 of {{path, scale, weight_name, revision}}; path is {_LORA}"
    )
    scheduler: StrictStr | None = Field(None, description="the name of a scheduler")
    speed: Literal["exact", "balanced", "fast"] = Field(
        "exact", description="exact, balanced or fast: the last two guess some steps from others"
    )
    sigmas: Annotated[tuple[Annotated[Number, Field(gt=0, le=1)], ...], _at_most(100), Field(min_length=1)] | None = (
        Field(None, description="1 to 100 falling numbers from 1 to above 0, one a step; for experts")
    )
    shift: Annotated[Number, Field(ge=0.1, le=20)] | None = Field(
        None, description="a number from 0.1 to 20: above 1 more steps go to much noise; for experts"
    )
    describe: StrictBool = Field(False, description="true or false; true tells what this worker can do")
    dry_run: StrictBool = Field(False, description="true or false; true tells what would be done")
    preview: StrictBool = Field(
        False, description="true or false; true adds a small JPEG of the picture so far to the progress"
    )

    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def said(self) -> frozenset[str]:
        """The fields that say something else than their default does; null and nothing ("", []) say nothing."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return frozenset(name for name, value in values.items() if value not in (fields[name].default, None, "", ()))

    @property
    def ignored(self) -> tuple[str, ...]:
        """What other services' clients send and what has no effect here, each with the reason."""
        return self._ignored

    def all_controls(self) -> tuple[tuple[str, Control], ...]:
        """The fields' own control and those of `controls`, each with the field that a fault names."""
        controls = [(f"controls.{i}", control) for i, control in enumerate(self.controls)]
        if self.control_image is not None:
            own = Control(
                image=self.control_image,
                type=self.control_type,
                scale=self.controlnet_conditioning_scale,
                start=self.control_guidance_start,
                end=self.control_guidance_end,
                preprocess=self.preprocess,
            )
            controls.insert(0, ("control_image", own))
        return tuple(controls)

    def sources(self) -> tuple[tuple[str, str, str], ...]:
        """Every picture as (what it is for, a key of PICTURES; the field that holds it; base64, data URI or URL)."""
        own = [(kind, kind, getattr(self, kind)) for kind in PICTURES if kind != "control_image"]
        init_images = [("init_image", f"init_images.{i}", source) for i, source in enumerate(self.init_images)]
        controls = [("control_image", field, control.image) for field, control in self.all_controls()]
        return tuple(found for found in (*own, *init_images, *controls) if found[2] is not None)


def reference(source: str) -> str:
    """A plain URL as it is; anything else, also a URL that may hold a signature, as the digest of what was sent."""
    if source.lower().startswith("https://") and not {"?", "@", "#"} & set(source):
        return source
    return f"sha256:{hashlib.sha256(source.encode()).hexdigest()}"


def read_request(event: object) -> tuple[Request, tuple[Fault, ...]]:
    """RunPod's event, `{"input": {...}}`: the request, and its faults, each in a field that holds its default instead.

    Raises InvalidRequest where there is no input to read at all.
    """
    if not isinstance(event, Mapping):
        raise InvalidRequest([Fault("", f'the event must be an object {{"input": {{...}}}}, got {show(event)}')])
    if "input" not in event:
        raise InvalidRequest([Fault("input", f"is missing; the event holds {show(list(event))}")])
    received = event["input"]
    if not isinstance(received, Mapping):
        raise InvalidRequest([Fault("input", f"must be an object of request fields, got {show(received)}")])

    received, faults, ignored = own_names(received)
    fields = {name: value for name, value in received.items() if name in Request.model_fields}
    if fields.get("describe") is True:
        fields.setdefault("prompt", "?")  # nobody will draw it
    strange = [name for name in received if name not in Request.model_fields]
    faults += [_unknown(name) for name in strange[:_MAX_UNKNOWN]]
    if len(strange) > _MAX_UNKNOWN:
        faults.append(Fault("input", f"holds {len(strange) - _MAX_UNKNOWN:,} more unknown fields"))
    found: list[ErrorDetails] = []
    try:
        request = Request.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False)
        wrong = {details["loc"][0] for details in found}
        sound = {name: value for name, value in fields.items() if name not in wrong}
        if "prompt" in wrong:
            sound["prompt"] = "?"  # stands in until the plan refuses the request
        request = Request.model_validate(sound)
    told = list({_path(details): _fault(details) for details in reversed(found)}.values())[::-1]
    told.sort(key=lambda fault: fault.field in Request.model_fields, reverse=True)  # a flood hides no other field
    faults += told[:_MAX_FAULTS]
    if len(told) > _MAX_FAULTS:
        faults.append(Fault("input", f"has {len(told) - _MAX_FAULTS:,} more faults"))
    request._ignored = ignored
    return request, tuple(faults)


def _unknown(name: object) -> Fault:
    hint = did_you_mean(name, Request.model_fields) if isinstance(name, str) else ""
    return Fault(
        name if isinstance(name, str) and _is_plain(name) else show(name),
        f"is no field of a request{hint or '; allowed: ' + ', '.join(Request.model_fields)}",
    )


def _fault(details: ErrorDetails) -> Fault:
    name, *within = details["loc"]
    allowed = Request.model_fields[str(name)].description
    if details["type"] == "missing" and not within:
        return Fault(str(name), f"is required; allowed: {allowed}")
    wrong = details["msg"]
    for theirs, ours in _WORDS.items():
        wrong = re.sub(theirs, ours, wrong)
    if details["type"] in ("missing", "extra_forbidden"):
        return Fault(_path(details), f"{_NESTED[details['type']]}; allowed: {allowed}")
    return Fault(_path(details), f"{wrong}, got {show(details['input'])}; allowed: {allowed}")


def _path(details: ErrorDetails) -> str:
    """The field; where it holds objects also where within it, as in loras.0.scale."""
    name, *within = details["loc"]
    parts = [name, *within] if any(isinstance(part, str) for part in within) else [name]
    return ".".join(part if _is_plain(part) else show(part) for part in map(str, parts))


def _is_plain(name: str) -> bool:
    return (name.isidentifier() or name.isdecimal()) and len(name) <= MAX_SHOWN

"""What a client may write: the fields of a request, their ranges and what is allowed, in a client's words."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self

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
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from src.catalog import FORMATS, SPEEDS

# What a prompt upsampler may write (3,584 tokens, a little over five each): a file repeats it as its prompt.
MAX_PROMPT_CHARACTERS = 20_000
MAX_SEED = 2**63 - 1
MIN_SIDE, MAX_SIDE = 64, 4096  # of any model; each row says its own
_MOST_DRAW = 2048  # pixels of a side at most
# What a request's pictures are for, and how they are read: in colour, or as a mask.
PICTURES: Mapping[str, str] = MappingProxyType(
    {"init_image": "RGB", "mask_image": "L", "control_image": "RGB", "image_prompt": "RGB"}
)
MAX_PICTURES = 10  # of one kind: what FLUX.2 takes
MAX_ADDRESS = 8_192  # characters: more than servers take
MAX_UNKNOWN = 20  # names of an object that nobody knows and that are looked at
# A field that holds one entry, by the list of such entries that `Request.as_lists` puts it into.
SINGLES: Mapping[str, str] = MappingProxyType(
    {"init_images": "init_image", "controls": "control_image", "loras": "lora_path"}
)
# An option of an entry of `controls`, and the field that says it of control_image.
CONTROL_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "type": "control_type",
        "scale": "controlnet_conditioning_scale",
        "start": "control_guidance_start",
        "end": "control_guidance_end",
        "preprocess": "preprocess",
    }
)
_MEGAPIXELS = r"([0-9]{1,2}(?:\.[0-9]{1,6})?)(?: ?MP)?"
# A field that says how another is to be used, that other, and what to add where it is missing.
OWNERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(CONTROL_OPTIONS.values(), ("control_image", "; each of controls has its own")),
        "lora_scale": ("lora_path", "; each of loras has a scale of its own"),
        "image_prompt_scale": ("image_prompt", ""),
    }
)
_NOTHING = (None, "")  # as values that say nothing
_MOST_AROUND = 10_000  # characters of it, on each side
_AROUND = " \t\r\n\f\v\u00a0\u200b\ufeff\\\"'`\u2018\u2019\u201c\u201d"


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


def why_no_prompt(text: str) -> str:
    """What keeps `text` from being a prompt; empty where nothing does."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        return f"must have at most {MAX_PROMPT_CHARACTERS:,} characters, not {len(text):,}"
    try:
        _not_blank(_clean(text))
    except ValueError as error:
        return str(error)
    return ""


def _at_most(most: int) -> BeforeValidator:
    """Refuses longer lists before their items are looked at."""

    def check(value: object) -> object:
        if isinstance(value, (list, tuple)) and len(value) > most:
            raise ValueError(f"must hold at most {most} entries, not {len(value):,}")
        return value

    return BeforeValidator(check)


class _Also:
    """Says in the JSON Schema what else is taken."""

    def __init__(self, schema: JsonSchemaValue) -> None:
        self._schema = schema

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [*_kinds(handler(core_schema)), self._schema]}


def _one_or_several(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


def unquoted(text: str) -> str:
    """`text` without the blanks and quotes that shells, spreadsheets and Python's repr leave around it."""
    text = _stripped(text)
    return _stripped(text[1:]) if text[:2] in ("b'", 'b"') else text


def _stripped(text: str) -> str:
    begin, end = text[:_MOST_AROUND], text[-_MOST_AROUND:]
    return text[len(begin) - len(begin.lstrip(_AROUND)) : len(text) - len(end) + len(end.rstrip(_AROUND))]


def _short_address(text: str) -> str:
    if "://" in text[:20] and len(text) > MAX_ADDRESS:
        raise ValueError(f"must have at most {MAX_ADDRESS:,} characters where it is an address")
    return text


def _picked(value: object) -> object:
    return None if value == -1 and not isinstance(value, bool) else value


def _number(value: object) -> object:
    """Replicate's megapixels come as text: 0.25, or 1 MP."""
    number = re.fullmatch(_MEGAPIXELS, value) if isinstance(value, str) else None
    return float(number[1]) if number else value


def _format(value: object) -> object:
    name = value.strip().upper() if isinstance(value, str) else value
    return "JPEG" if name == "JPG" else name


def _row_of(table: Iterable[str]) -> tuple[Callable[[object], object], WithJsonSchema]:
    """What takes the names of `table` alone, and how the JSON Schema says it."""
    names = tuple(table)

    def check(value: object) -> object:
        if value not in names:
            raise ValueError(f"must be {_either(names)}")
        return value

    return check, WithJsonSchema({"type": "string", "enum": list(names)})


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


_check_format, _FORMAT_SCHEMA = _row_of(FORMATS)
_check_speed, _SPEED_SCHEMA = _row_of(SPEEDS)

Whole = Annotated[StrictInt, BeforeValidator(_whole)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
# As JSON Schema says what `_clean` and `_not_blank` say.
_TEXT_SCHEMA: dict[str, Any] = {
    "type": "string",
    "maxLength": MAX_PROMPT_CHARACTERS,
    "not": {"pattern": r"[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]"},
}
_PROMPT_SCHEMA = _TEXT_SCHEMA | {"minLength": 1, "pattern": r"\S|\ufeff"}  # which is blank to JavaScript alone
Text = Annotated[
    StrictStr, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_clean), WithJsonSchema(_TEXT_SCHEMA)
]
Name = Annotated[StrictStr, Field(max_length=1_000)]
Side = Annotated[Whole, Field(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=8)]
Source = Annotated[StrictStr, AfterValidator(unquoted), AfterValidator(_short_address)]
Picture = Source | None
_PICTURE = "a picture as base64, data URI or https URL"
_SIDE = f"an integer, a multiple of 8 from {MIN_SIDE} to {_MOST_DRAW}, on FLUX.3 to {MAX_SIDE}"
_TEXT = f"text of at most {MAX_PROMPT_CHARACTERS:,} characters"
ADAPTER = "a hub id (owner/name), an https URL or a file in LORA_DIR"
_PROMPT = f"text of 1 to {MAX_PROMPT_CHARACTERS:,} characters, not blank, without control characters"


def _kinds(schema: JsonSchemaValue) -> list[JsonSchemaValue]:
    return list(schema.get("anyOf", [schema]))


def _takes_empty(schema: JsonSchemaValue) -> bool:
    return schema.get("type") == "string" and not {"minLength", "pattern", "enum"} & set(schema)


# pydantic's words for limits that stand around a validator of ours, and JSON Schema's
_LIMITS = {"ge": "minimum", "le": "maximum", "multiple_of": "multipleOf"}


class _Fields(BaseModel):
    @classmethod
    def _optional(cls) -> set[str]:
        return {name for name, field in cls.model_fields.items() if field.default in (None, ())}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, received: Any, info: ValidationInfo) -> Any:
        """What says something: forms send what was not filled in as empty text, where a field may be left open.

        Of names that nobody knows the first few are looked at, and the others counted, in the list that is the context.
        """
        if not isinstance(received, Mapping):
            return received
        optional = cls._optional()
        known = [name for name in cls.model_fields if name in received]
        unknown = itertools.islice((name for name in received if name not in cls.model_fields), MAX_UNKNOWN)
        if info.context is not None:
            info.context.append(max(0, len(received) - len(known) - MAX_UNKNOWN))
        said = {name: received[name] for name in known if name not in optional or received[name] != ""}
        return said | {name: received[name] for name in unknown}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With the limits under JSON Schema's names, and the empty text where it says nothing."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, whole in schema["properties"].items():
            about = {word: whole.pop(word) for word in ("title", "description", "default") if word in whole}
            kinds = [{_LIMITS.get(word, word): limit for word, limit in kind.items()} for kind in _kinds(whole)]
            if name in cls._optional() and not any(_takes_empty(kind) for kind in kinds):
                kinds.append({"const": ""})
            schema["properties"][name] = {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), **about}
        return schema


class Lora(_Fields):
    """One adapter of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[StrictStr, Field(min_length=1, max_length=2_000)]
    scale: Annotated[Number, Field(ge=-4, le=4)] = 0.7
    weight_name: Name | None = None
    revision: Name | None = None


class Control(_Fields):
    """One picture that says where things are; None means what the ControlNet's row says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Source
    type: Name | None = None
    scale: Annotated[Number, Field(ge=0, le=2)] | None = None
    start: Annotated[Number, Field(ge=0, le=1)] = 0.0
    end: Annotated[Number, Field(ge=0, le=1)] | None = None
    preprocess: StrictBool = False


Border = Annotated[Whole, Field(ge=0, le=_MOST_DRAW)]


class Borders(_Fields):
    """Pixels to draw anew on each side of a picture."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "anyOf": [
                {"properties": {side: {"minimum": 1}}, "required": [side]}
                for side in ("left", "right", "top", "bottom")
            ]
        },
    )

    left: Border = 0
    right: Border = 0
    top: Border = 0
    bottom: Border = 0

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not (self.left or self.right or self.top or self.bottom):
            raise ValueError("must be above 0 on one side at least")
        return self


def _together(schema: JsonSchemaValue) -> None:
    """What fields need each other; who asks for a description alone needs none."""
    needs = [
        {
            "if": {
                "required": [name],
                "properties": {name: {"not": {"enum": [schema["properties"][name]["default"], *_NOTHING]}}},
            },
            "then": {"required": [owner], "properties": {owner: {"not": {"enum": [*_NOTHING]}}}},
        }
        for name, (owner, _) in OWNERS.items()
    ]
    drawn = {"required": schema.pop("required"), "allOf": needs}
    described = {"required": ["describe"], "properties": {"describe": {"const": True}}}
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": [drawn, described]}


class Request(_Fields):
    """One valid request; None means the model's own default. Descriptions say what is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_together)

    # In the order in which a picture's file repeats them.
    prompt: Annotated[
        tuple[Annotated[Text, AfterValidator(_not_blank)], ...],
        BeforeValidator(_one_or_several),
        _at_most(4),
        Field(min_length=1),
        WithJsonSchema(
            {"anyOf": [_PROMPT_SCHEMA, {"type": "array", "items": _PROMPT_SCHEMA, "minItems": 1, "maxItems": 4}]}
        ),
    ] = Field(description=f"{_PROMPT}; or a list of 1 to 4, one per picture")
    width: Side | None = Field(None, description=_SIDE)
    height: Side | None = Field(None, description=_SIDE)
    aspect_ratio: Annotated[StrictStr, Field(pattern=r"^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$")] | None = Field(
        None, description="width to height as two whole numbers, 16:9 say; instead of width and height"
    )
    megapixels: Annotated[
        Annotated[Number, Field(ge=0.01, le=16.8)] | None,
        BeforeValidator(_number),
    ] = Field(None, description="a number from 0.01 to 16.8, in millions of pixels; with aspect_ratio or alone")
    num_inference_steps: Annotated[Whole, Field(ge=1, le=100)] | None = Field(
        None, description="an integer from 1 to 100"
    )
    guidance_scale: Annotated[Number, Field(ge=0, le=100)] | None = Field(
        None, description="a number from 0 to the model's limit (20; Fill, Canny and Depth 100)"
    )
    max_sequence_length: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="an integer from 1 to the model's limit"
    )
    num_images: Annotated[Whole, Field(ge=1, le=4)] = Field(1, description="an integer from 1 to 4")
    seed: Annotated[
        Annotated[Whole, Field(ge=0, le=MAX_SEED)] | None, BeforeValidator(_picked), _Also({"const": -1})
    ] = Field(None, description="an integer from 0 to 2^63-1; null or -1 picks one")
    output_format: Annotated[StrictStr, BeforeValidator(_format), AfterValidator(_check_format), _FORMAT_SCHEMA] = (
        Field("PNG", description=_either(FORMATS))
    )
    output_quality: Annotated[Whole, Field(ge=1, le=100)] = Field(95, description="an integer from 1 to 100")

    negative_prompt: Text | None = Field(None, description=f"{_TEXT}, with true_cfg_scale above 1")
    true_cfg_scale: Annotated[Number, Field(ge=1, le=20)] = Field(
        1.0, description="a number from 1 to 20; OpenFLUX.1 and its like have a default of their own"
    )
    prompt_2: Text | None = Field(None, description=f"{_TEXT} for T5, where prompt is for CLIP alone")
    prompt_upsampling: StrictBool = Field(
        False,
        description="true or false: true draws what the worker's prompt upsampler makes of prompt, a long caption",
    )
    scheduler: Name | None = Field(None, description="the name of a scheduler")
    sigmas: (
        Annotated[tuple[Annotated[Number, Field(gt=0, le=1)], ...], Field(min_length=1, max_length=100), _at_most(100)]
        | None
    ) = Field(None, description="1 to 100 falling numbers, each above 0 and at most 1, one per step; for experts")
    shift: Annotated[Number, Field(ge=0.1, le=20)] | None = Field(
        None,
        description="a number from 0.1 to 20: above 1, more steps are spent at high noise; for experts",
    )
    strength: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1: how much of init_image may change"
    )
    speed: Annotated[StrictStr, AfterValidator(_check_speed), _SPEED_SCHEMA] = Field(
        "exact", description=f"{_either(SPEEDS)}: all but exact guess some steps from others"
    )

    lora_path: Annotated[StrictStr, Field(min_length=1, max_length=2_000)] | None = Field(None, description=ADAPTER)
    lora_scale: Annotated[Number, Field(ge=-4, le=4)] = Field(0.7, description="a number from -4 to 4, with lora_path")
    loras: Annotated[tuple[Lora, ...], Field(max_length=4), _at_most(4)] = Field(
        (), description=f"a list of at most 4 objects {{path, scale, weight_name, revision}}; path is {ADAPTER}"
    )

    preserve_unmasked: StrictBool = Field(
        True, description="true or false: outside mask_image the very pixels of init_image come back"
    )
    image_prompt_scale: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="a number from 0 to 2: how much image_prompt counts"
    )
    init_image: Picture = Field(None, description=_PICTURE)
    mask_image: Picture = Field(None, description=f"{_PICTURE}; white is drawn anew, black is kept")
    image_prompt: Picture = Field(None, description=f"{_PICTURE}: what the model reads beside the prompt (Redux)")
    init_images: Annotated[tuple[Source, ...], Field(max_length=MAX_PICTURES), _at_most(MAX_PICTURES)] = Field(
        (),
        description=f"a list of at most {MAX_PICTURES} pictures, each as init_image, for models that take several",
    )
    control_image: Picture = Field(None, description=f"{_PICTURE}, which says where things are")
    control_type: Name | None = Field(None, description="what control_image is: canny, depth, pose ...")
    controlnet_conditioning_scale: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="a number from 0 to 2: how much control_image counts"
    )
    control_guidance_start: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.0, description="a number from 0 to 1: the share of the steps before control_image counts"
    )
    control_guidance_end: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1: the share of the steps after which control_image counts no more"
    )
    preprocess: StrictBool = Field(
        False, description="true or false: true makes canny edges from control_image, which is then a plain picture"
    )
    controls: Annotated[tuple[Control, ...], Field(max_length=4), _at_most(4)] = Field(
        (),
        description="a list of at most 4 objects {image, type, scale, start, end, preprocess}, image as control_image",
    )
    outpaint: Borders | None = Field(
        None,
        description=f"{{left, right, top, bottom}}, integers from 0 to {_MOST_DRAW}: pixels to draw around init_image",
    )

    describe: StrictBool = Field(False, description="true or false; true tells what this worker can do")
    dry_run: StrictBool = Field(False, description="true or false; true tells what would be done")
    preview: StrictBool = Field(
        False, description="true or false; true adds a small JPEG of the picture so far to the progress"
    )

    _said: frozenset[str] | None = PrivateAttr(None)
    _foreign: bool = PrivateAttr(False)
    _came_as: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def came_as(self, names: Mapping[str, str], *, foreign: bool) -> None:
        """Remember under which of another service's `names` fields came, and whether it was written for one."""
        self._came_as, self._foreign = names, foreign

    @property
    def foreign(self) -> bool:
        """Whether it was written for another service: options without effect in it are no faults."""
        return self._foreign

    def client_name(self, name: str) -> str:
        """The name that the client gave to the field `name`."""
        return self._came_as.get(name, name)

    @property
    def mask_by_alpha(self) -> bool:
        """Whether mask_image came under OpenAI's name, where what is transparent is drawn anew."""
        return self.client_name("mask_image") == "mask"

    @property
    def said(self) -> frozenset[str]:
        """The fields that say something else than their default does; null and nothing ("", []) say nothing."""
        if self._said is not None:
            return self._said
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return frozenset(name for name, value in values.items() if value not in (fields[name].default, None, "", ()))

    def as_lists(self) -> Request:
        """The same with init_image, control_image and lora_path as the first entries of their lists, and not beside
        them; `entry_field` knows where an entry came from.
        """
        lists: dict[str, tuple[Any, ...]] = {}
        if self.init_image is not None:
            lists["init_images"] = (self.init_image, *self.init_images)
        if self.control_image is not None:
            options = {option: getattr(self, field) for option, field in CONTROL_OPTIONS.items()}
            lists["controls"] = (Control(image=self.control_image, **options), *self.controls)
        if self.lora_path is not None:
            lists["loras"] = (Lora(path=self.lora_path, scale=self.lora_scale), *self.loras)
        request = self.model_copy(update=lists | {SINGLES[name]: None for name in lists})
        request._said = self.said | {SINGLES[name] for name in lists}
        return request

    def entry_field(self, name: str, i: int) -> str:
        """The field that a client knows entry `i` of the list `name` by: loras.1, or lora_path."""
        single = SINGLES[name] in self.said
        return SINGLES[name] if single and i == 0 else f"{name}.{i - single}"

    def sources(self) -> tuple[tuple[str, str, str], ...]:
        """Every picture as (what it is for, a key of PICTURES; the field that holds it; base64, data URI or URL)."""
        images = [
            ("init_image", self.entry_field("init_images", i), source) for i, source in enumerate(self.init_images)
        ]
        others = [(kind, kind, getattr(self, kind)) for kind in ("mask_image", "image_prompt")]
        controls = [("control_image", self.entry_field("controls", i), c.image) for i, c in enumerate(self.controls)]
        return tuple(found for found in (*images, *others, *controls) if found[2] is not None)


def reference(source: str) -> str:
    """A plain URL as it is; anything else, also a URL that may hold a signature, as the digest of what was sent."""
    if source.lower().startswith("https://") and not {"?", "@", "#"} & set(source):
        return source
    return f"sha256:{hashlib.sha256(source.encode()).hexdigest()}"

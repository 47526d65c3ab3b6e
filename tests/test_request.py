"""What a client may write, and over 150 ways to write it wrongly: each gets the contract's error and nothing else."""

from __future__ import annotations

import json
import math
import random
import re
import time
import tracemalloc
from typing import Any

import pytest

from handler import get_engine, handler
from src.request.reading import read_request
from src.request.schema import MAX_PROMPT_CHARACTERS, Request
from src.settings import ROOT
from src.wording import show

NESTED: list[Any] = []
for _ in range(2_000):
    NESTED = [NESTED]

# A wrong kind of value for a field of each kind.
NOT_A_NUMBER: list[Any] = [
    "8",
    True,
    False,
    [],
    [8],
    {},
    {"value": 8},
    math.nan,
    math.inf,
    -math.inf,
    NESTED,
    "∞",
    "🔴",
]
NOT_WHOLE: list[Any] = [*NOT_A_NUMBER, 8.5, 1e-9]
NOT_TEXT: list[Any] = [5, 5.5, True, ["a"], {"a": "b"}, NESTED, math.nan, b"a cat"]
HUGE: list[Any] = [10**30, 10**400, 10**5_000, -(10**400), 1e308]

WRONG: dict[str, list[Any]] = {
    "prompt": [
        None,
        "",
        "   ",
        "\n\t",
        "\0",
        "a\0cat",
        "\x01\x02",
        "a\x7fcat",
        "\ud800",
        "a" * 100_000,
        "🔴" * 20_001,
        [],
        ["a cat", ""],
        ["a cat", 5],
        ["a cat"] * 5,
        [["a cat"]],
        *(value for value in NOT_TEXT if value != ["a"]),
    ],
    "negative_prompt": ["a\0cat", "\udfff", "a" * 100_000, *NOT_TEXT],
    "true_cfg_scale": [None, "", 0, 0.99, 20.1, -1, *NOT_A_NUMBER, *HUGE],
    "width": [0, -8, 56, 63, 65, 513, 2056, *NOT_WHOLE, *HUGE],
    "height": [0, -8, 56, 1001, 4096, *NOT_WHOLE, *HUGE],
    "num_inference_steps": [0, -1, 101, *NOT_WHOLE, *HUGE],
    "guidance_scale": [-0.1, 20.5, *NOT_A_NUMBER, *HUGE],
    "num_images": [None, "", 0, -1, 5, *NOT_WHOLE, *HUGE],
    "seed": [-2, 2**63, *NOT_WHOLE, *HUGE],
    "output_format": [None, "", "GIF", "png;", "🖼", "JPEG2000", *NOT_TEXT],
    "output_quality": [None, "", 0, 101, *NOT_WHOLE, *HUGE],
    "max_sequence_length": [0, -1, 33, 513, *NOT_WHOLE, *HUGE],
    "scheduler": ["EULER ", "ddim", "eulr", "🌀", "a" * 5_000, *NOT_TEXT],
}
UNKNOWN = [
    "widht",
    "Prompt",
    "num_image",
    "sed",
    "init_img",
    "__class__",
    "_faults",
    "model_config",
    "",
    " ",
    "🔴",
    "a" * 5_000,
    "\ud800",
    "x\nERROR worker: forged",
    10**5_000,
    None,
]
EVENTS: list[Any] = [
    None, 5, "prompt", [], [{"input": {}}], True, NESTED, b"{}",
    {}, {"prompt": "a cat"}, {"id": "x"}, {"Input": {"prompt": "a cat"}}, {1: 2},
    {"input": None}, {"input": "a cat"}, {"input": []}, {"input": 5}, {"input": NESTED}, {"input": {}},
]  # fmt: skip

BAD_INPUTS = [
    *({"prompt": "a cat", field: value} for field, values in WRONG.items() for value in values),
    *({"prompt": "a cat", name: 1} for name in UNKNOWN),
]


def refused(event: Any) -> dict[str, Any]:
    """The whole answer to a bad event, after looking at everything that the contract says of it."""
    response: dict[str, Any] = handler(event)
    assert set(response) == {"status", "error", "error_code", "errors", "traceback"}
    assert response["status"] == "error"
    assert response["error_code"] == "invalid_request"
    assert response["error"].startswith("invalid_request: ")
    assert len(response["error"]) < 20_000
    json.dumps(response, allow_nan=False, ensure_ascii=False).encode()  # as the SDK sends it
    return response


def test_there_are_enough_of_them() -> None:
    assert len(BAD_INPUTS) + len(EVENTS) >= 150


@pytest.mark.parametrize("fields", BAD_INPUTS, ids=range(len(BAD_INPUTS)))
def test_a_bad_field_is_named_with_what_is_allowed(fields: dict[str, Any]) -> None:
    *_, wrong = fields
    (fault,) = refused({"input": fields})["errors"]
    assert fault["field"] in (wrong, show(wrong))
    assert any(word in fault["message"] for word in ("allowed: ", "did you mean", "must be an integer from 1 to 32"))


@pytest.mark.parametrize("event", EVENTS, ids=range(len(EVENTS)))
def test_a_bad_event_is_refused(event: Any) -> None:
    refused(event)


def test_random_mixtures_name_every_wrong_field_at_once() -> None:
    rng = random.Random(0)
    for _ in range(200):
        fields: dict[str, Any] = {"prompt": "a cat"}
        for name in rng.sample(list(WRONG), rng.randint(2, 6)):
            fields[name] = rng.choice(WRONG[name])
        if rng.random() < 0.5:
            fields["widht"] = 512
        wrong = set(fields) - {"prompt"} if fields["prompt"] == "a cat" else set(fields)
        assert {fault["field"] for fault in refused({"input": fields})["errors"]} == wrong


def test_an_error_says_what_was_wrong_what_was_received_and_what_is_allowed() -> None:
    (fault,) = refused({"input": {"prompt": "a cat", "width": 513}})["errors"]
    assert fault == {
        "field": "width",
        "message": "must be a multiple of 8, got 513; allowed: an integer, a multiple of 8 from 64 to 2048, "
        "on FLUX.3 to 4096",
    }


def test_a_long_value_is_not_sent_back() -> None:
    assert "(100,000 characters)" in refused({"input": {"prompt": "cat " * 25_000}})["error"]


def test_the_log_names_the_fields_and_holds_nothing_that_the_client_wrote(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    refused({"id": "job-7", "input": {"prompt": "my secret\0", "width": "my secret"}})
    (message,) = caplog.messages
    assert message.startswith("job job-7: invalid_request: prompt, width | prepare ")


def test_a_job_id_cannot_break_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for id_ in (NESTED, "x\nERROR worker: forged", "a" * 10_000):
        refused({"id": id_, "input": {}})
    assert len(caplog.messages) == 3
    assert all("\n" not in message and len(message) < 200 for message in caplog.messages)


def test_a_flood_of_unknown_fields_gets_a_short_answer() -> None:
    errors = refused({"input": {"prompt": "a cat", **{f"{n:04}" * 15: n for n in range(20_000)}}})["errors"]
    assert errors[-1]["message"] == "holds 19,980 more unknown fields"


def test_a_secret_in_the_wrong_place_is_not_sent_back(caplog: pytest.LogCaptureFixture) -> None:
    response = refused({"input": {"prompt": "a cat", "width": "hf_abcdefghijklmnop", "hf_abcdefghijklmnop": 1}})
    assert "abcdefghijklmnop" not in json.dumps(response)
    assert "abcdefghijklmnop" not in caplog.text


def test_a_misspelt_field_gets_a_suggestion() -> None:
    assert "did you mean width?" in refused({"input": {"prompt": "a cat", "widht": 512}})["error"]
    assert "did you mean num_images?" in refused({"input": {"prompt": "a cat", "num_image": 1}})["error"]


GOOD: list[dict[str, Any]] = [
    {"width": 512.0, "height": 64},
    {"seed": -1},
    {"seed": None, "width": None, "guidance_scale": None, "scheduler": None, "negative_prompt": None},
    {"seed": 2**63 - 1},
    {"guidance_scale": 3, "true_cfg_scale": 1},
    {"output_format": "jpg"},
    {"output_format": " webp "},
    {"prompt": "a cat 🐈 in Zürich\n東京"},
    {"prompt": "a" * MAX_PROMPT_CHARACTERS},
]


@pytest.mark.parametrize("fields", GOOD, ids=range(len(GOOD)))
def test_good_values_are_taken(fields: dict[str, Any]) -> None:
    _, faults, _ = read_request({"input": {"prompt": "a cat", **fields}})
    assert faults == ()


def test_empty_text_says_nothing_where_a_field_may_be_left_open() -> None:
    optional = [name for name, field in Request.model_fields.items() if field.default in (None, ())]
    assert {"init_image", "lora_path", "scheduler", "width", "loras", "outpaint"} <= set(optional)
    names = [*optional, "image", "mask", "steps", "size", "hf_lora", "parameters"]
    request, faults, warnings = read_request({"input": {"prompt": "a cat", **dict.fromkeys(names, "")}})
    assert request.said == {"prompt"}
    assert (faults, warnings) == ((), ())


def test_names_are_normalised() -> None:
    request, *_ = read_request({"input": {"prompt": "a cat", "output_format": "Jpg", "seed": -1, "width": 512.0}})
    assert (request.output_format, request.seed, request.width) == ("JPEG", None, 512)
    assert isinstance(request.width, int)


def test_the_fields_are_the_contracts() -> None:
    assert set(Request.model_fields) >= {
        "prompt", "negative_prompt", "true_cfg_scale", "width", "height", "num_inference_steps", "guidance_scale",
        "num_images", "seed", "output_format", "output_quality", "max_sequence_length", "scheduler", "init_image",
        "mask_image", "strength",
    }  # fmt: skip


def test_the_docs_show_every_field() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in Request.model_fields if f"`{name}`" not in text] == []


def test_the_schema_allows_a_prompt_and_a_list_of_them() -> None:
    kinds = {kind["type"] for kind in Request.model_json_schema()["properties"]["prompt"]["anyOf"]}
    assert kinds == {"string", "array"}


def test_an_option_of_nothing_is_refused_but_where_only_a_description_is_asked_for() -> None:
    for field, owner in (
        ("lora_scale", "lora_path"),
        ("control_type", "control_image"),
        ("image_prompt_scale", "image_prompt"),
    ):
        value = "canny" if field == "control_type" else 0.5
        (fault,) = read_request({"input": {"prompt": "x", field: value}}).faults
        assert (fault.field, f"has no effect without {owner}" in fault.message) == (field, True)
        assert read_request({"input": {"describe": True, field: value}}).faults == ()


def test_what_is_wrong_within_a_field_is_named_where_it_is() -> None:
    fields = {
        "controls": [{"image": 5, "bogus": 1}, {"type": "canny"}],
        "loras": [{"path": "a", "scale": 9}],
        "outpaint": {"left": -1},
        "🔴": 1,
    }
    errors = {fault["field"]: fault["message"] for fault in refused({"input": {"prompt": "a cat", **fields}})["errors"]}
    assert set(errors) >= {"controls.0.image", "controls.0.bogus", "controls.1.image", "loras.0.scale", "outpaint.left"}
    assert errors["controls.1.image"].startswith("is required; allowed: a list of at most 4 objects {image")


def test_a_flood_within_a_field_gets_a_short_answer_and_hides_nothing() -> None:
    flood = {
        "controls": [{"image": "x", **{f"{n:04}" * 15: n for n in range(5_000)}}] * 4,
        "loras": [{"path": [["x" * 60] * 6] * 6, "scale": [["x" * 60] * 6] * 6}] * 4,
        "prompt": [1] * 100_000,
        "init_images": [1] * 1_000_000,
        "scheduler": "x" * 5_000_000,
        "width": 63,
    }
    errors = refused({"input": flood})["errors"]
    named = {fault["field"]: fault["message"] for fault in errors}
    assert set(named) >= {"prompt", "init_images", "width", "scheduler", "input"}
    assert "must hold at most 4 entries, not 100,000" in named["prompt"]
    assert "more faults" in named["input"]


def nested(levels: int, kind: type) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


MANY = {f"k{n}": n for n in range(200_000)}
LONG = "x" * 5_000_000
DEEP, DEEPER = nested(100_000, list), nested(100_000, dict)
TEXTS = ("scheduler", "lora_path", "control_type", "aspect_ratio", "size", "speed", "output_format", "megapixels",
         "quality", "image_size", "style", "prompt", "seed", "width", "init_image", "sampler", "hf_lora")  # fmt: skip
# What a request may hold to keep a worker busy or to fill its memory, before any picture is drawn.
HOSTILE: dict[str, dict[str, Any]] = {
    "names in outpaint": {"outpaint": MANY},
    "names in controls": {"controls": [{"image": "x", **MANY}] * 4},
    "names in loras": {"loras": [{"path": "x", **MANY}] * 4},
    "long names within": {"outpaint": {f"{'x' * 50}{n}": n for n in range(50_000)}, "loras": [{LONG: 1}]},
    "names": {f"k{n}": n for n in range(500_000)},
    "names that hold nothing": {"width": "x", **{f"k{n}": None for n in range(500_000)}},
    "names in parameters": {"parameters": {f"k{n}": n for n in range(500_000)}},
    "a long name": {LONG: LONG, "parameters": {LONG: LONG}},
    "a long address": {"init_image": f"https://{LONG}", "lora_path": f"https://{LONG}"},
    "a long address of words": {"init_image": "https:///?" + "sig" * 64_000},
    "a long host": {"init_image": "https://" + "a." * 500_000},
    "another scheme": {"init_image": f"http://{LONG}", "mask_image": f"ftp://{LONG}"},
    "long texts": dict.fromkeys(TEXTS, LONG),
    "blanks": {**dict.fromkeys(TEXTS, " " * 5_000_000), "size": f"1{' ' * 5_000_000}x"},
    "quotes": dict.fromkeys(TEXTS, '"' * 5_000_000),
    "digits": dict.fromkeys(TEXTS, "1" * 5_000_000),
    "adapters": {"loras": ["https://hf.co/a/b"] * 500_000, "lora_scales": [1] * 500_000},
    "long names of adapters": {"loras": [{"path": LONG, "weight_name": LONG, "revision": LONG}] * 4},
    "prompts": {"prompt": ["a"] * 500_000, "negative_prompt": ["a"] * 500_000},
    "pictures": {"init_images": [LONG] * 500_000, "images": ["x"] * 500_000, "controls": [{}] * 500_000},
    "numbers": {"sigmas": [0.5] * 500_000, "seed": 10**4_000, "width": -(10**400_000), "steps": 10**400},
    "no numbers": dict.fromkeys(("width", "seed", "steps", "guidance_scale", "strength", "prompt"), math.nan),
    "lists in lists": dict.fromkeys(Request.model_fields, DEEP),
    "objects in objects": dict.fromkeys((*Request.model_fields, "parameters", "image_size", "size"), DEEPER),
    "twins in depth": {"image": nested(100_000, list), "input_image": nested(100_000, list)},
    "lone surrogates": {**dict.fromkeys(TEXTS, "\ud800"), "\udfff": "\udfff", "outpaint": {"\ud800": 1}},
    "control characters": {**dict.fromkeys(TEXTS, "\0\x1b[31m\n"), "\0": 1, "a\nb": 1, "outpaint": {"\x1b": 1}},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("where", ["input", "describe", "event", "id", "s3Config"])
def test_no_request_takes_long_or_much_or_gets_a_long_answer(where: str, fields: dict[str, Any]) -> None:
    events: dict[str, Any] = {
        "input": {"input": {"prompt": "a cat", **fields}},
        "describe": {"input": {"width": 5, **fields, "describe": True}},
        "event": fields,
        "id": {"id": list(fields.items()), "input": {}},
        "s3Config": {"input": {}, "s3Config": {**fields, **dict.fromkeys(("endpointUrl", "accessId"), LONG)}},
    }
    get_engine()  # the model takes its time once
    tracemalloc.start()
    begun = time.process_time()
    try:
        response = refused(events[where])
        seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 5  # tracing makes it several times slower
    assert peak < 300e6
    assert len(json.dumps(response)) < 200_000


def test_names_are_counted_before_they_are_looked_at() -> None:
    named = {
        fault["field"]: fault["message"] for fault in refused({"input": {"prompt": "a", "outpaint": MANY}})["errors"]
    }
    assert named["outpaint.k0"].startswith("is unknown here")
    assert named["input"] == "has 199,980 more faults"
    both = refused({"input": {"prompt": "a", "x": 1, "parameters": MANY}})["errors"]
    assert both[-1]["message"] == "holds 199,981 more unknown fields"


def test_the_schema_says_every_limit() -> None:
    schema = Request.model_json_schema()
    fields = schema["properties"]
    assert fields["width"]["anyOf"][0] == {"type": "integer", "minimum": 64, "maximum": 4096, "multipleOf": 8}
    assert fields["num_images"]["maximum"] == 4
    assert fields["sigmas"]["anyOf"][0] == {
        "type": "array", "minItems": 1, "maxItems": 100,
        "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    }  # fmt: skip
    assert fields["loras"]["anyOf"][0]["maxItems"] == fields["controls"]["anyOf"][0]["maxItems"] == 4
    assert fields["init_images"]["anyOf"][0]["maxItems"] == 10
    assert fields["speed"]["enum"] == ["exact", "balanced", "fast"]
    assert fields["aspect_ratio"]["anyOf"][0]["pattern"] == "^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$"
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    assert not {"ge", "le", "gt", "lt", "multiple_of"} & set(re.findall(r'"(\w+)":', json.dumps(schema)))

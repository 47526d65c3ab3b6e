"""Requests as other services' documentation and clients send them: taken, or refused in a sentence that says more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src.catalog import FAMILIES, get_model
from src.errors import InvalidRequest
from src.job import Job
from src.plan.plan import Plan, make_plan
from src.request.adapters import Adapter
from src.request.aliases import INSTEAD, LORA_KEYS, OTHER_PROGRAMS, VALUES, WITHOUT_EFFECT
from src.request.images import load_pictures
from src.request.openai import own_call
from src.request.reading import read_request
from src.request.schema import Lora, Request
from tests.conftest import base64_of

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "requests.json").read_text())
PICTURE, MASK = base64_of(Image.new("RGB", (256, 256))), base64_of(Image.new("L", (256, 256), 255))
VALUES_OF = {
    "PICTURE as a data URI": f"data:image/png;base64,{PICTURE}",
    "PICTURE in base64": PICTURE,
    "MASK as a data URI": f"data:image/png;base64,{MASK}",
    "a token": "hf_abcdefghij0123456789",
}


def filled(value: Any) -> Any:
    """`value` with a real value for each placeholder."""
    if isinstance(value, dict):
        return {name: filled(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner) for inner in value]
    return VALUES_OF.get(value, value) if isinstance(value, str) else value


def plan(fields: dict[str, Any], family: str = "dev") -> Plan:
    request, faults, warnings = read_request({"input": filled(fields), "s3Config": {}, "webhook": "x", "policy": {}})
    pictures, more, _ = load_pictures(request, Job())
    row = get_model(FAMILIES[family].model)
    adapters = adapters_of(request.loras)
    return make_plan(request, (*faults, *more), row, pictures, adapters, warnings=warnings, max_pixels=2048 * 2048)


def adapters_of(loras: Sequence[Lora]) -> tuple[Adapter, ...]:
    return tuple(Adapter(f"lora_{i}", Path(f"{i}.safetensors"), lora, "loras") for i, lora in enumerate(loras))


def refusal(fields: dict[str, Any], family: str = "dev") -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        plan(fields, family)
    return caught.value


def asked(**fields: Any) -> Request:
    request, faults, _ = read_request({"input": {"prompt": "x", **fields}})
    assert faults == ()
    return request


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["service"])
def test_a_request_as_a_service_documents_it(case: dict[str, Any]) -> None:
    if case["expect"] == "either":
        try:
            plan(case["input"], case["model"])
        except InvalidRequest as error:
            refused = error
        else:
            return
    elif case["expect"] == "openai":
        call = own_call({"input": filled(case["input"])}, lambda: get_model("flux-shapes"))
        assert call.faults == ()
        assert read_request(call.event).faults == ()
        return
    elif case["expect"] == "taken":
        decided = plan(case["input"], case["model"])
        assert VALUES_OF["a token"] not in str(decided.warnings)
        assert len(set(decided.warnings)) == len(decided.warnings)
        for name in WITHOUT_EFFECT.keys() & case["input"].keys():
            assert [warning.split()[0] for warning in decided.warnings].count(name) == 1
        return
    else:
        refused = refusal(case["input"], case["model"])
    (fault,) = refused.faults
    assert "; send " in fault.message or "; leave " in fault.message or "; allowed: " in fault.message
    assert "not a field" not in fault.message


def test_every_row_is_for_a_name_of_others_alone() -> None:
    own = set(Request.model_fields)
    assert not own & {*WITHOUT_EFFECT, *INSTEAD, *OTHER_PROGRAMS}
    assert set(VALUES) <= own
    assert set(LORA_KEYS.values()) <= set(Lora.model_fields)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_gets_one_warning_and_its_value_is_not_repeated(name: str) -> None:
    (warning,) = plan({"prompt": "x", name: "a token"}).warnings
    assert warning.startswith(f"{name} has no effect: ")
    assert "hf_abcdefghij" not in warning


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_strength": 0.8},
        {"negative_prompt": "a square", "image_format": "png"},
        {"negative_prompt": "a square", "num_outputs": 1},
        {"strength": 0.8, "guidance": 3},
        {"lora_scale": 1, "go_fast": True},
        {"control_type": "canny", "image_prompt_strength": 0.1},
    ],
)
def test_an_option_without_effect_is_warned_of_where_another_services_words_came_along(fields: dict[str, Any]) -> None:
    warnings = " ".join(plan({"prompt": "x", **fields}).warnings)
    assert next(iter(fields)) in warnings
    own = {"strength": 0.8, "negative_prompt": "a square", "lora_scale": 1.0}
    for name in own.keys() & fields.keys():
        assert [fault.field for fault in refusal({"prompt": "x", name: own[name]}).faults] == [name]


def test_a_picture_that_cannot_be_used_is_refused_whoever_sends_it() -> None:
    (fault,) = refusal({"prompt": "x", "steps": 4, "redux_image": "PICTURE in base64"}, "klein").faults
    assert fault.field == "image_prompt"


def test_adapters_under_other_names() -> None:
    for fields in (
        {"lora_weights": "a/b", "lora_scale": 1, "extra_lora": "c/d", "extra_lora_scale": 0.5},
        {"image_loras": [{"path": "https://huggingface.co/a/b", "scale": 1}, {"url": "c/d", "weight": 0.5}]},
        {"hf_loras": ["a/b", "huggingface.co/c/d"], "lora_scales": [1, 0.5]},
    ):
        assert [(lora.path, lora.scale) for lora in asked(**fields).loras] == [("a/b", 1), ("c/d", 0.5)]
    file = "https://huggingface.co/a/b/resolve/main/x.safetensors"
    assert asked(lora_url=file).loras[0].path == file
    assert "extra_lora_scale has no effect without extra_lora" in plan({"prompt": "x", "extra_lora_scale": 1}).warnings
    for key in ("path", "lora"):
        (fault,) = read_request({"input": {"prompt": "x", "loras": [{key: "a/b", "url": "c/d"}]}}).faults
        assert fault.field == "loras.0.url"


def test_sides_are_rounded_where_another_service_would_and_refused_elsewhere() -> None:
    decided = plan({"prompt": "x", "width": 1001, "height": 1020, "aspect_ratio": "custom"})
    assert (decided.sampling.width, decided.sampling.height) == (1000, 1024)
    assert [warning.split()[0] for warning in decided.warnings] == ["width", "height"]
    assert {fault.field for fault in refusal({"prompt": "x", "width": 1001}).faults} == {"width"}
    assert {fault.field for fault in refusal({"prompt": "x", "width": 33, "steps": 4}).faults} == {"width"}


def test_sizes_without_effect_on_replicate_have_none_here() -> None:
    ratio = plan({"prompt": "x", "aspect_ratio": "2:1", "width": 512, "height": 768, "steps": 4})
    assert ratio.sampling.width > 1.9 * ratio.sampling.height
    assert [warning.split()[0] for warning in ratio.warnings] == ["width", "height"]
    custom = plan({"prompt": "x", "aspect_ratio": "custom", "width": 512, "height": 768, "resolution": "1 MP"})
    assert (custom.sampling.width, custom.sampling.height) == (512, 768)
    assert [warning.split()[0] for warning in custom.warnings] == ["resolution"]


@pytest.mark.parametrize(
    "fields",
    [{"size": "auto"}, {"image_size": "auto"}, {"aspect_ratio": "match_input_image"}, {"megapixels": "match_input"},
     {"resolution_mode": "match_input"}, {"aspect_ratio": "auto"}, {"who_knows": None}, {"lora_weights": ""}],
)  # fmt: skip
def test_words_for_nothing_say_nothing(fields: dict[str, Any]) -> None:
    decided = plan({"prompt": "x", "seed": 1, **fields})
    assert (decided.sampling, decided.warnings) == (plan({"prompt": "x", "seed": 1}).sampling, ())


def test_values_under_other_names() -> None:
    assert asked(scheduler="K_EULER").scheduler == "euler"
    assert asked(sampler_name="DPM++ 2M").scheduler == "dpmpp_2m"
    assert (asked(size="1024*768").width, asked(resolution="1 MP").megapixels) == (1024, 1.0)
    assert "quality has no effect as 'hd'" in plan({"prompt": "x", "quality": "hd"}).warnings[0]
    openai = {"quality": "auto", "output_compression": 90, "output_format": "jpeg"}
    assert plan({"prompt": "x", **openai}).sampling.output_quality == 90
    assert asked(image=["a", "b"]).init_images == ("a", "b")
    assert asked(images="a").init_images == ("a",)


def test_hugging_faces_image_to_image() -> None:
    fields = {"inputs": PICTURE, "parameters": {"prompt": "a fox", "negative_prompt": "a dog", "strength": 0.6}}
    decided = plan(fields)
    assert (decided.mode, decided.prompts, decided.sampling.strength) == ("image-to-image", ("a fox",), 0.6)


def test_what_lies_around_a_picture_by_black_forest_labs_names() -> None:
    decided = plan({"prompt": "x", "image": "PICTURE in base64", "top": 64, "bottom": 0, "left": 32}, "fill")
    assert (decided.mode, decided.sampling.width, decided.sampling.height) == ("inpainting", 288, 320)


@pytest.mark.parametrize("name", [*OTHER_PROGRAMS, *INSTEAD])
def test_what_is_not_for_this_worker_is_refused_in_one_sentence(name: str) -> None:
    fields: dict[str, Any] = {name: {"x": 1}} if name in INSTEAD else {name: {"x": 1}, "unknown": 1, "width": 7}
    (fault,) = refusal({"prompt": "x", **fields}).faults
    assert (fault.field, fault.message) == (name, {**OTHER_PROGRAMS, **INSTEAD}[name])


def test_a_hint_is_close_or_not_given_and_fields_are_named_in_full() -> None:
    (fault,) = refusal({"prompt": "x", "enhance_prompts_please": True}).faults
    assert "did you mean" not in fault.message
    answered = refusal({"prompt": "x", "hf_other_api_setting": 1}).to_response(include_traceback=False)
    assert answered["errors"][0]["field"] == "hf_other_api_setting"


def test_runwares_names_in_their_own_case() -> None:
    fields = {
        "taskType": "imageInference", "taskUUID": "u", "positivePrompt": "a fox", "negativePrompt": "", "steps": 20,
        "CFGScale": 3.5, "numberResults": 2, "outputType": "URL", "outputFormat": "PNG", "outputQuality": 80,
    }  # fmt: skip
    request, faults, warnings = read_request({"input": fields})
    assert not faults
    assert (request.prompt, request.guidance_scale, request.num_images) == (("a fox",), 3.5, 2)
    assert [warning.split()[0] for warning in warnings] == ["outputType", "taskType", "taskUUID"]


def test_fals_defaults_that_mean_nothing_here_are_warned_of() -> None:
    fields = {"prompt": "x", "nag_scale": 3, "nag_end": 0.25, "nag_tau": 2.5, "nag_alpha": 0.25, "reference_end": 1}
    _, faults, warnings = read_request({"input": fields})
    assert not faults
    assert len(warnings) == 5

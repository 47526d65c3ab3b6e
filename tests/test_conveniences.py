"""Other names, sizes in words, sigmas and shift, describe, dry_run, and pictures that are repeated from their files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import local_test
from handler import handler, respond
from src.catalog import FORMATS, get_model
from src.engine import Engine, load_engine
from src.errors import InvalidRequest
from src.job import Job
from src.outputs import Loaded
from src.plan.plan import Plan, make_plan
from src.request.aliases import ALIASES, NAMED_SIZES
from src.request.reading import read_request
from src.request.schema import Request
from src.response.describe import describe
from src.response.encode import encode_image
from src.settings import ROOT, Settings
from tests.conftest import base64_of, opened
from tests.fakes import FakePipeline
from training import judge

MODEL = get_model("flux-shapes")


def plan(**fields: Any) -> Plan:
    request, faults, warnings = read_request({"input": {"prompt": "x", **fields}})
    return make_plan(request, faults, MODEL, warnings=warnings, max_pixels=2048 * 2048)


def faults(**fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        plan(**fields)
    return {fault.field: fault.message for fault in caught.value.faults}


def test_every_alias_names_a_field_and_hides_none() -> None:
    assert set(ALIASES.values()) <= set(Request.model_fields)
    assert not set(ALIASES) & set(Request.model_fields)


def test_other_names_are_understood() -> None:
    decided = plan(num_outputs=2, steps=3, guidance=2, image_format="jpg", quality=80, sampler="lcm")
    assert (len(decided.seeds), decided.sampling.num_inference_steps, decided.sampling.guidance_scale) == (2, 3, 2)
    assert (decided.sampling.output_format, decided.sampling.output_quality, decided.sampling.scheduler) == (
        "JPEG",
        80,
        "lcm",
    )


def test_two_names_that_agree_are_fine_and_a_conflict_is_refused() -> None:
    assert len(plan(num_outputs=2, num_images=2).seeds) == 2
    assert "another name of num_images" in faults(num_outputs=2, num_images=3)["num_outputs"]
    assert set(faults(steps=0)) == {"num_inference_steps"}


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ({"image_size": "landscape_4_3"}, (1024, 768)),
        ({"image_size": {"width": 512, "height": 256}}, (512, 256)),
        ({"size": "1024x512"}, (1024, 512)),
        ({"aspect_ratio": "1:1"}, (128, 128)),
        ({"aspect_ratio": "16:9"}, (168, 96)),
        ({"aspect_ratio": "16:9", "megapixels": 1}, (1336, 752)),
        ({"aspect_ratio": "9:16", "megapixels": 0.25}, (376, 664)),
        ({"megapixels": 1}, (1000, 1000)),
        ({"aspect_ratio": "32:1"}, (2048, 64)),
        ({"aspect_ratio": "custom", "width": 256, "height": 64}, (256, 64)),
        ({"aspect_ratio": "match_input_image", "megapixels": "0.25"}, (496, 496)),
        ({"image_size": None, "target_size": {"width": 256, "height": 64}}, (256, 64)),
    ],
)
def test_sizes_in_words(size: dict[str, Any], pixels: tuple[int, int]) -> None:
    decided = plan(**size)
    assert (decided.sampling.width, decided.sampling.height) == pixels


def test_sizes_that_are_none_or_say_two_things_are_refused() -> None:
    assert all(name in faults(image_size="huge")["image_size"] for name in NAMED_SIZES)
    assert "width" in faults(size="512x512", width=256)["size"]
    assert "combined with aspect_ratio" in faults(aspect_ratio="1:1", width=256)["width"]
    assert "aspect_ratio" in faults(aspect_ratio="wide")
    assert "width" in faults(size="100x100")
    assert "a picture of 2664x1504; allowed: sides of 64" in faults(aspect_ratio="16:9", megapixels=4)["aspect_ratio"]
    assert "aspect_ratio" in faults(aspect_ratio="9999:1")


def test_a_call_of_hugging_face_is_understood() -> None:
    request, faults, _ = read_request(
        {"input": {"inputs": "a fox", "parameters": {"steps": 3, "guidance_scale": None}}}
    )
    assert (request.prompt, request.num_inference_steps, faults) == (("a fox",), 3, ())
    twice = {"prompt": "a fox", "seed": 1, "parameters": {"seed": 2}}
    assert [fault.field for fault in read_request({"input": twice})[1]] == ["parameters"]
    nested: dict[str, Any] = {}
    for _ in range(2_000):
        nested = {"parameters": nested}
    assert "must be an object of fields, got 5" in faults_of({"parameters": 5})["parameters"]
    assert "is not a field" in faults_of(nested)["parameters"]
    assert faults_of({"parameters": None, "seed": None}) == faults_of({"seed": 1, "parameters": {"seed": 1}}) == {}
    assert faults_of({"seed": None, "parameters": {"seed": 5}}) == {}


def faults_of(fields: dict[str, Any]) -> dict[str, str]:
    return {fault.field: fault.message for fault in read_request({"input": {"prompt": "x", **fields}})[1]}


def test_several_pictures_under_other_names() -> None:
    request, faults, _ = read_request(
        {"input": {"prompt": "x", "input_image": "a", "input_image_2": "b", "input_image_3": "c"}}
    )
    assert (request.init_images, faults) == (("a", "b", "c"), ())
    assert [request.entry_field("init_images", i) for i in range(3)] == ["init_image", "init_images.0", "init_images.1"]
    assert read_request({"input": {"prompt": "x", "image_urls": ["a", "b"]}})[0].init_images == ("a", "b")


def test_what_has_no_effect_here_is_taken_with_a_warning() -> None:
    decided = plan(enable_safety_checker=True, go_fast=False, safety_tolerance=None)
    assert decided.warnings == (
        "enable_safety_checker has no effect: this worker has no safety checker",
        "go_fast has no effect: use the field speed (balanced or fast) instead",
    )


def test_null_and_what_is_the_default_anyway_say_nothing() -> None:
    nothing: dict[str, Any] = {"strength": None, "control_type": None, "image_prompt_scale": None, "preprocess": False,
               "preserve_unmasked": True, "image": None, "size": None, "loras": [], "outpaint": None}  # fmt: skip
    assert plan(**nothing, seed=1) == plan(seed=1)
    for name in ("FLUX.2-dev", "FLUX.2-klein-4B"):
        row = get_model(name)
        fields = {"negative_prompt": "", "preview": False, "true_cfg_scale": 1, "prompt_2": None}
        assert (
            make_plan(*read_request({"input": {"prompt": "x", **fields}})[:2], row, max_pixels=2**22).mode
            == "text-to-image"
        )


def answer(**fields: Any) -> dict[str, Any]:
    fields = {"prompt": "a red circle on a blue background", "seed": 1, **fields}
    response: dict[str, Any] = handler({"id": "test", "input": fields})
    return response


def pixels(response: dict[str, Any]) -> bytes:
    return opened(response)[0].tobytes()


def test_sigmas_and_shift_count_and_the_next_request_is_as_before() -> None:
    plain = pixels(answer())
    shifted, chosen = answer(shift=4), answer(sigmas=[1, 0.9, 0.75, 0.5, 0.25])
    assert pixels(shifted) != plain
    assert pixels(chosen) != plain
    assert (chosen["metadata"]["num_inference_steps"], shifted["metadata"]["shift"]) == (5, 4)
    assert judge.centre_colour(opened(chosen)[0]) == "red"
    assert pixels(answer(shift=2)) == plain, "the model's own shift"
    assert pixels(answer()) == plain


def test_sigmas_that_cannot_be_are_refused() -> None:
    assert "must fall" in faults(sigmas=[0.5, 0.5])["sigmas"]
    assert "one per step, got 2 for 8" in faults(sigmas=[1, 0.5], num_inference_steps=8)["sigmas"]
    assert "cannot be used by unipc; allowed: euler, heun, lcm" in faults(sigmas=[1, 0.5], scheduler="unipc")["sigmas"]
    assert "sigmas" in faults(sigmas=[2.0])


def test_a_prompt_for_t5_alone() -> None:
    plain, other = pixels(answer()), answer(prompt_2="a green star on a white background")
    assert pixels(other) != plain
    assert pixels(answer(prompt_2="a red circle on a blue background")) == plain
    assert other["metadata"]["prompt_2"] == "a green star on a white background"


def test_describe_tells_without_the_device() -> None:
    pipeline = FakePipeline()
    engine = Engine(pipeline, MODEL, "rev")
    response = respond({"input": {"describe": True}}, Job(), Settings, lambda: engine)
    shown = response["describe"]
    assert pipeline.calls == []
    assert (shown["model"], shown["model_revision"]) == ("flux-shapes", "rev")
    assert shown["modes"]["inpainting"]["needs"] == ["init_image", "mask_image"]
    assert shown["modes"]["inpainting"]["references"] == 0
    assert {"prompt", "seed", "loras"} < set(shown["takes"])
    assert "strength" not in shown["takes"]
    assert shown["defaults"]["num_inference_steps"] == 8
    assert shown["schema"]["properties"]["seed"]["description"].startswith("an integer from 0")
    assert shown["schedulers"]["unipc"] == {"starts_from_a_picture": False}
    json.dumps(response)


def test_describe_tells_what_is_held_and_what_could_be() -> None:
    settings = Settings(model_name="flux-shapes", lora_dir=ROOT / "models")
    engine = load_engine(settings)
    outline = "flux-shapes-outline/pytorch_lora_weights.safetensors"

    def shown(**fields: Any) -> dict[str, Any]:
        return respond({"input": fields}, Job(), lambda: settings, lambda: engine)

    before = shown(describe=True)["describe"]
    assert outline in before["adapters"]["lora_dir"]
    assert before["adapters"]["in_memory"] == []
    assert before["controlnets"]["flux-shapes-canny"]["types"] == {
        "canny": {"conditioning_scale": 1.0, "guidance_end": 1.0}
    }
    assert (before["limits"]["max_side"], before["limits"]["max_guidance_scale"]) == (2048, 20)
    assert before["controlnets"]["flux-shapes-canny"]["loaded"] is False
    assert before["placement"]["mode"] == "full"
    assert before["placement"]["device"] == "the CPU"
    assert shown(prompt="a red circle", lora_path=outline, num_inference_steps=1)["status"] == "success"
    assert shown(describe=True)["describe"]["adapters"]["in_memory"] == [outline]


def test_describe_tells_no_client_what_others_sent(tmp_path: Path) -> None:
    (tmp_path / "styles").mkdir()
    (tmp_path / "styles" / "own.safetensors").write_bytes(b"")
    settings = Settings(model_name="flux-shapes", lora_dir=tmp_path)
    asked_for = (
        "someone/private-style", "sha256:0123", "https://a.test/b.safetensors", "x/../styles/own.safetensors",
        "../outside.safetensors", "styles", "", "y" * 5_000, "\0",
    )  # fmt: skip
    loaded = Loaded(asked_for, (), {})
    shown = describe(MODEL, None, settings, loaded)["describe"]["adapters"]
    assert shown == {
        "lora_dir": ["styles/own.safetensors"],
        "in_memory": ["styles/own.safetensors"],
        "others_in_memory": 8,
    }


def test_a_dry_run_tells_the_plan() -> None:
    pipeline = FakePipeline()
    event = {"input": {"prompt": "x", "seed": 3, "num_images": 2, "dry_run": True, "width": 72}}
    response = respond(event, Job(), Settings, lambda: Engine(pipeline, MODEL, None))
    assert pipeline.calls == []
    assert response["plan"]["seeds"] == [3, 4]
    assert (response["plan"]["width"], response["plan"]["canvas"]) == (72, [80, 128])
    assert response["plan"]["pipeline"] == "FluxPipeline"
    json.dumps(response)
    picture = base64_of(Image.new("RGB", (128, 128)))
    control = {"image": picture, "type": "canny", "preprocess": True}
    lora = {"path": "flux-shapes-outline/pytorch_lora_weights.safetensors"}
    fields = {"init_image": picture, "mask_image": picture, "controls": [control], "loras": [lora], "sigmas": [1, 0.5]}
    settings = Settings(model_name="flux-shapes", lora_dir=ROOT / "models")
    engine = load_engine(settings)
    shown = respond({"input": {"prompt": "x", "dry_run": True, **fields}}, Job(), lambda: settings, lambda: engine)[
        "plan"
    ]
    assert shown["adapters"] == [{**lora, "scale": 0.7}]
    assert [control["controlnet"] for control in shown["controls"]] == ["flux-shapes-canny"]
    assert shown["pictures"]["init_image"].startswith("sha256:")
    json.dumps(shown)
    alone = respond({"input": {"prompt": "x", "dry_run": True}}, Job(), Settings, lambda: engine)["plan"]
    assert (alone["preserve_unmasked"], alone["image_prompt_scale"], alone["controls"]) == (False, None, [])
    bad = respond({"input": {"dry_run": True}}, Job(), Settings, lambda: Engine(pipeline, MODEL, None))
    assert bad["error_code"] == "invalid_request"


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_is_repeated_from_its_file(format: str, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    fields = ["--seed", "7", "--shift", "3", "--output-format", format, "--output-quality", "90"]
    assert local_test.main(["--prompt", "a red circle", *fields, "--quiet", "--output", str(first)]) == 0
    (picture,) = first.iterdir()
    assert local_test.main(["--from", str(picture), "--quiet", "--output", str(again)]) == 0
    assert (again / picture.name).read_bytes() == picture.read_bytes()


def test_a_picture_made_from_another_is_repeated_with_it(tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    start.write_bytes(base64.b64decode(answer()["images"][0]))
    options = ["--init-image", str(start), "--quiet"]
    assert local_test.main(["--prompt", "a star", "--seed", "7", *options, "--output", str(tmp_path / "a")]) == 0
    (picture,) = (tmp_path / "a").iterdir()
    assert local_test.main(["--from", str(picture), *options, "--output", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / picture.name).read_bytes() == picture.read_bytes()
    assert local_test.main(["--from", str(picture), "--quiet", "--output", str(tmp_path / "c")]) == 1


def test_a_picture_of_others_cannot_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    assert local_test.main(["--from", str(tmp_path / "x.png")]) == 1
    assert "carries no request" in capsys.readouterr().err


def test_a_picture_of_another_model_is_not_repeated_as_if_it_were_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by = {"input": {"prompt": "x"}, "model": "FLUX.1-dev", "model_revision": "abc"}
    (tmp_path / "x.png").write_bytes(encode_image(Image.new("RGB", (64, 64)), parameters=made_by))
    assert local_test.main(["--from", str(tmp_path / "x.png"), "--quiet"]) == 1
    assert "was made by FLUX.1-dev, and this is flux-shapes; set MODEL_NAME" in capsys.readouterr().err


def test_describe_and_dry_run_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local_test.main(["--prompt", "x", "--dry-run", "true", "--output", str(tmp_path)]) == 0
    assert '"canvas"' in capsys.readouterr().out

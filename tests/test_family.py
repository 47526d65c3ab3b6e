"""Every family's row, end to end, on a small random model of its own class."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from handler import respond
from src.catalog import CONTROLNETS, FAMILIES, MODELS, SCHEDULERS, schedulers_for
from src.engine import Engine, load_engine
from src.engine.placed_pipeline import PlacedPipeline
from src.job import Job
from src.request.schema import PICTURES
from src.response.encode import read_parameters
from src.serving.loop import Worker
from src.settings import Settings
from tests.conftest import base64_of, opened
from tests.fakes import never
from tests.hub import Hub, Repo, download_into
from tests.small_models import all_placements, controlnet, head, redux, small, weights_of

# De-distilled models have dev's pipelines and schnell's transformer; what is their own is in test_fine_tunes.py.
DRAWN = [family for family in FAMILIES if family != "de-distilled"]


@pytest.fixture(scope="module", params=DRAWN)
def engine(request: pytest.FixtureRequest, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Engine]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    modes = {"Union-Pro": 7, "Union-Pro-2.0": None}
    for net in CONTROLNETS:
        if net.name in modes:
            shallow = {"num_layers": 2, "num_single_layers": 0} if modes[net.name] is None else {}
            hub.repos[net.repo] = Repo(controlnet(folder / net.name, modes[net.name], **shallow))
    settings = Settings(model_name=str(small(family, folder / "tune")), redux_model=str(redux(folder / "redux")))
    return family, load_engine(settings, download_into(folder / "home"))


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (104, 136, 3), dtype=np.uint8))
MASK = Image.new("L", PICTURE.size)
ImageDraw.Draw(MASK).rectangle((40, 30, 90, 80), fill=255)
SENT = {"init_image": base64_of(PICTURE), "mask_image": base64_of(MASK), "control_image": base64_of(PICTURE)}


SMALL = {"width": 136, "height": 104, "num_inference_steps": 2, "max_sequence_length": 16}
WORDY = 512  # FLUX.2 says much around a prompt


def small_for(held: Engine) -> dict[str, Any]:
    return SMALL | ({"max_sequence_length": WORDY} if held.model.architecture.startswith("FLUX.2") else {})


def sent_to(held: Engine, mode: str) -> dict[str, Any]:
    """The pictures that `mode` needs, and what has to be said of them."""
    needs = held.model.modes[mode].needs
    said = {"control_type": held.model.control_type or "canny"} if "control_image" in needs else {}
    return {name: SENT[name] for name in sorted(needs)} | said


def ask(engine: Engine, **fields: Any) -> dict[str, Any]:
    fields = {"prompt": "a red circle", "seed": 1, **small_for(engine), **fields}
    return respond({"input": fields}, Job(), Settings, lambda: engine)


def drawn(engine: Engine, **fields: Any) -> list[bytes]:
    """The pixels; a file also holds its request."""
    response = ask(engine, **fields)
    assert response["status"] == "success", response
    assert {picture.size for picture in opened(response)} == {PICTURE.size}
    return [picture.convert("RGB").tobytes() for picture in opened(response)]


def everywhere(held: Engine, mode: str) -> dict[str, Any]:
    """What `mode` needs, where all that it draws is to be seen."""
    row = held.model.modes[mode]
    return sent_to(held, mode) | ({"preserve_unmasked": False} if "mask_image" in row.needs else {})


def test_the_family_is_read_from_the_files(engine: tuple[str, Engine]) -> None:
    family, held = engine
    assert held.model.family == family
    assert held.model.modes == head(family).modes


def test_every_mode_draws_what_was_sent_in_its_exact_size_and_the_same_again(engine: tuple[str, Engine]) -> None:
    _, held = engine
    first: dict[str, list[str]] = {}
    for _ in range(2):
        for mode in held.model.modes:
            sent = sent_to(held, mode)
            response = ask(held, **sent, width=None, height=None) if sent else ask(held)
            assert response["status"] == "success", response
            (picture,) = opened(response)
            assert picture.size == PICTURE.size
            assert response["metadata"]["mode"] == mode
            assert first.setdefault(mode, response["images"]) == response["images"]
            if "mask_image" in sent:
                outside = np.asarray(MASK) < 128
                assert np.array_equal(np.asarray(picture)[outside], np.asarray(PICTURE)[outside])
    assert len({tuple(drawn(held, **everywhere(held, mode))) for mode in first}) == len(first)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DRAWN)
def test_the_same_bytes_with_everything_away_that_can_be(
    family: str, dtype: torch.dtype, hub: Hub, tmp_path: Path
) -> None:
    """Adaptive norms ahead and every block streamed: in every mode, and in bfloat16 with every scheduler."""
    folder = small(family, tmp_path / "tune")
    hub.repos["Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro"] = Repo(controlnet(tmp_path / "net", 7))
    plain, thrifty = (load_engine(Settings(model_name=str(folder)), download_into(tmp_path / "home")) for _ in "12")
    for held in (plain, thrifty):
        held._pipeline.to(dtype)
    least = min(all_placements(weights_of(folder)), key=lambda found: found.resident)
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, torch.device("cpu"))
    if dtype is torch.float32:
        for mode in plain.model.modes:
            fields = everywhere(plain, mode)
            if {"negative_prompt", "true_cfg_scale"} <= plain.model.modes[mode].takes:
                fields |= {"negative_prompt": "a blue square", "true_cfg_scale": 2}
            assert drawn(thrifty, **fields) == drawn(plain, **fields), mode
    else:  # the type in which timesteps are rounded
        fields = everywhere(plain, next(iter(plain.model.modes))) | {"num_inference_steps": 3}
        for name, row in schedulers_for(plain.model).items():
            if row.starts_midway or "strength" not in plain.model.base.takes:
                assert drawn(thrifty, **fields, scheduler=name) == drawn(plain, **fields, scheduler=name), name


def test_every_model_can_be_warmed_up(engine: tuple[str, Engine]) -> None:
    _, held = engine
    worker = Worker(never, Settings(warmup_sizes=((64, 64),)))
    worker.warm_up(held)
    worker.close()


def test_a_list_of_prompts_is_a_picture_each_as_if_asked_for_alone(engine: tuple[str, Engine]) -> None:
    _, held = engine
    fields = everywhere(held, next(iter(held.model.modes)))
    several = drawn(held, **{**fields, "prompt": ["a red circle", "a blue square"]})
    assert several == [*drawn(held, **fields), *drawn(held, **{**fields, "prompt": "a blue square", "seed": 2})]
    assert several[1] != drawn(held, **{**fields, "seed": 2})[0]


def test_a_picture_as_prompt_counts_in_every_mode_that_takes_one(engine: tuple[str, Engine]) -> None:
    _, held = engine
    for mode, row in held.model.modes.items():
        fields = everywhere(held, mode)
        if "image_prompt" not in row.takes:
            refused = ask(held, **fields, image_prompt=SENT["init_image"])
            assert refused["errors"][0]["message"] == f"cannot be used by {mode} on {held.model.name}"
            continue
        response = ask(held, **fields, image_prompt=SENT["init_image"])
        assert response["metadata"]["mode"] == mode
        whole = drawn(held, **fields, image_prompt=SENT["init_image"])
        half = drawn(held, **fields, image_prompt=SENT["init_image"], image_prompt_scale=0.5)
        assert len({*whole, *half, *drawn(held, **fields)}) == 3


def test_a_picture_as_prompt_goes_with_what_is_steered_away_from(engine: tuple[str, Engine]) -> None:
    _, held = engine
    for mode, row in held.model.modes.items():
        if {"image_prompt", "true_cfg_scale"} <= row.takes:
            fields = everywhere(held, mode) | {"image_prompt": SENT["init_image"], "true_cfg_scale": 3}
            assert drawn(held, **fields) != drawn(held, **fields, negative_prompt="a blue square")


def test_each_picture_of_a_batch_is_the_one_of_its_seed(engine: tuple[str, Engine]) -> None:
    _, held = engine
    settings = Settings(batch_size=2)
    for mode in held.model.modes:
        asked = everywhere(held, mode) | small_for(held) | {"prompt": "a red circle", "seed": 1, "num_images": 2}
        both = respond({"input": asked}, Job(), lambda: settings, lambda: held)
        (alone,) = opened(ask(held, **everywhere(held, mode), seed=2))
        difference = np.abs(np.asarray(opened(both)[1], float) - np.asarray(alone, float))
        assert difference.max() <= 3, (mode, difference.mean())


def test_every_picture_can_be_repeated_from_its_file(engine: tuple[str, Engine]) -> None:
    """The file names pictures by digests; with the pictures themselves in their places it is the same request."""
    _, held = engine
    digests = {f"sha256:{hashlib.sha256(text.encode()).hexdigest()}": text for text in SENT.values()}
    for mode, row in held.model.modes.items():
        fields = everywhere(held, mode)
        if "image_prompt" in row.takes:
            fields["image_prompt"] = SENT["init_image"]
        (picture,) = opened(ask(held, **fields))
        event = read_parameters(picture)
        assert event is not None
        asked = {name: digests.get(value, value) if isinstance(value, str) else value
                 for name, value in event["input"].items()}  # fmt: skip
        if "init_images" in asked:
            asked["init_images"] = [digests[name] for name in asked["init_images"]]
        (again,) = opened(respond({"input": asked}, Job(), Settings, lambda: held))
        assert again.tobytes() == picture.tobytes()
        nets = ["Union-Pro"] if row.controlnet else []
        assert event.get("controlnets", []) == nets


@pytest.mark.slow
def test_shift_counts_with_every_scheduler(engine: tuple[str, Engine]) -> None:
    _, held = engine
    fields = everywhere(held, next(iter(held.model.modes))) | {"num_inference_steps": 3}
    for name, row in schedulers_for(held.model).items():
        if row.starts_midway or "strength" not in held.model.base.takes:
            low, high = (drawn(held, **fields, scheduler=name, shift=shift) for shift in (0.5, 10))
            assert low != high, name


def test_a_prompt_that_is_cut_is_warned_of(engine: tuple[str, Engine]) -> None:
    _, held = engine
    fields = everywhere(held, next(iter(held.model.modes)))
    long, longer = ("red " * count + "blue" for count in (200, 201))
    warned = ask(held, **{**fields, "prompt": long})["metadata"]["warnings"]
    assert any("prompt has" in warning for warning in warned)
    assert drawn(held, **{**fields, "prompt": long}) == drawn(held, **{**fields, "prompt": longer})
    short = ask(held, **{**fields, "prompt": "red", "max_sequence_length": held.model.max_sequence_length})
    assert not any("prompt has" in warning for warning in short["metadata"]["warnings"])


def test_what_a_text_encoder_does_not_know_is_warned_of(engine: tuple[str, Engine]) -> None:
    _, held = engine
    if "prompt_2" not in held.model.base.takes:
        return  # FLUX.2's small tokenizer spells every byte
    fields = everywhere(held, next(iter(held.model.modes)))
    (warning,) = ask(held, **{**fields, "prompt": "a red circle 一只猫"})["metadata"]["warnings"]
    assert warning.startswith("prompt holds text that T5 does not know: ")


def test_what_each_encoder_leaves_out_is_warned_of(engine: tuple[str, Engine]) -> None:
    _, held = engine
    if "prompt_2" not in held.model.base.takes:
        return
    fields = everywhere(held, next(iter(held.model.modes)))
    long = "a red circle " * 40
    warnings = ask(held, **{**fields, "prompt": long, "prompt_2": "a star"})["metadata"]["warnings"]
    assert [warning.partition(" tokens for ")[2] for warning in warnings] == ["CLIP, which reads the first 77"]
    warnings = ask(held, **{**fields, "prompt": "a star", "prompt_2": long})["metadata"]["warnings"]
    assert [warning.partition(" has ")[0] for warning in warnings] == ["prompt_2"]
    assert "tokens for T5, which reads the first 16" in warnings[0]


def test_what_a_model_cannot_use_is_refused_with_its_name(engine: tuple[str, Engine]) -> None:
    _, held = engine
    modes = {row.needs for row in held.model.modes.values()}
    kinds = sorted(set(PICTURES) - {"image_prompt"})
    for chosen in range(2 ** len(kinds)):
        names = [name for i, name in enumerate(kinds) if chosen >> i & 1]
        if frozenset(names) not in modes:
            refused = ask(held, **{name: SENT[name] for name in names})
            assert refused["error_code"] == "invalid_request"
            assert f"{held.model.name} has no mode for" in refused["errors"][0]["message"]
    every = {name for model in MODELS for row in model.modes.values() for name in row.takes}
    base, row = next(iter(held.model.modes.items()))
    for name in every - row.takes:
        value = {
            "preserve_unmasked": False,
            "preprocess": True,
            "preview": True,
            "prompt_2": "red",
            "true_cfg_scale": 2,
            "outpaint": {"left": 8},
        }.get(name, 1)
        refused = ask(held, **sent_to(held, base), **{name: value})
        assert name in {fault["field"] for fault in refused["errors"]}, refused
    if held.model.max_guidance_scale > 20:
        assert ask(held, **sent_to(held, base), guidance_scale=60)["status"] == "success"
    else:
        assert (
            "must be less than or equal to 20, got 60" in ask(held, **sent_to(held, base), guidance_scale=60)["error"]
        )


def test_guidance_counts_where_the_row_says_so(engine: tuple[str, Engine]) -> None:
    family, held = engine
    fields = everywhere(held, next(iter(held.model.modes)))
    changes = drawn(held, **fields, guidance_scale=2) != drawn(held, **fields, guidance_scale=9)
    assert changes == FAMILIES[family].guided
    warnings = ask(held, **fields, guidance_scale=2)["metadata"]["warnings"]
    assert any("guidance_scale has no effect" in warning for warning in warnings) != FAMILIES[family].guided


def test_several_references_are_read_and_odd_ones_refused(engine: tuple[str, Engine]) -> None:
    _, held = engine
    if "editing" not in held.model.modes:
        return
    row = held.model.modes["editing"]
    pair = [SENT["init_image"], base64_of(PICTURE.rotate(90))]
    if row.references < 2:
        assert (
            ask(held, init_images=pair)["errors"][0]["message"]
            == f"must hold at most 1 picture(s) on {held.model.name} in this mode, got 2"
        )
        return
    one = drawn(held, init_images=pair[:1])
    assert one == drawn(held, init_image=pair[0])
    assert len({*one, *drawn(held, init_images=pair), *drawn(held, init_images=pair[::-1])}) == 3
    flat = ask(held, init_images=[SENT["init_image"], base64_of(PICTURE.resize((1000, 70)))])
    assert flat["errors"][0]["field"] == "init_images.1"
    assert "at most 8 times as long" in flat["error"]
    many = ask(held, init_images=[SENT["init_image"]] * (row.references + 1))
    assert many["error_code"] == "invalid_request"


@pytest.mark.parametrize("size", [(96, 64), (103, 77), (333, 70), (65, 200)])
def test_an_edit_is_read_on_the_grid_that_it_is_drawn_on(
    size: tuple[int, int], engine: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, held = engine
    if "editing" not in held.model.modes:
        return
    read: list[torch.Size] = []
    encode = held._pipeline.vae.encode

    def spying(image: torch.Tensor, *rest: Any, **more: Any) -> Any:
        read.append(image.shape)
        return encode(image, *rest, **more)

    monkeypatch.setattr(held._pipeline.vae, "encode", spying)
    sent = base64_of(PICTURE.resize(size))
    answer = ask(held, init_image=sent, num_inference_steps=1, width=None, height=None)
    held_canvas = tuple(-(-round(side / 8) * 8 // 16) * 16 for side in size)
    assert read[0][:-3:-1] == held_canvas
    (picture,) = opened(answer)
    event = read_parameters(picture)
    assert event is not None
    asked = {name: value for name, value in event["input"].items() if name not in ("init_image", "init_images")}
    assert asked["width"], "a file says in numbers what the picture said"
    (again,) = opened(respond({"input": {**asked, "init_image": sent}}, Job(), Settings, lambda: held))
    assert again.tobytes() == picture.tobytes()


def test_outpainting_works_wherever_inpainting_does(engine: tuple[str, Engine]) -> None:
    _, held = engine
    for mode, row in held.model.modes.items():
        if "init_image" not in row.needs:
            continue
        fields = sent_to(held, mode) | {"outpaint": {"right": 24, "bottom": 8}, "width": None, "height": None}
        if "mask_image" not in row.needs:
            wider = {other.needs for other in held.model.modes.values()}
            assert (ask(held, **fields)["status"] == "success") == (row.needs | {"mask_image"} in wider)
            continue
        del fields["mask_image"]
        response = ask(held, **fields)
        assert response["status"] == "success", response
        (picture,) = opened(response)
        assert (response["metadata"]["mode"], picture.size) == (mode, (160, 112))
        assert np.array_equal(np.asarray(picture)[:104, :136], np.asarray(PICTURE))


def test_a_negative_prompt_counts_where_the_row_says_so(engine: tuple[str, Engine]) -> None:
    _, held = engine
    for mode, row in held.model.modes.items():
        if "negative_prompt" in row.takes:
            scale = {"true_cfg_scale": 3} if "true_cfg_scale" in row.takes else {"guidance_scale": 3}
            fields = everywhere(held, mode) | scale
            assert drawn(held, **fields) != drawn(held, **fields, negative_prompt="a blue square")


@pytest.mark.slow
def test_every_controlnet_type_counts_as_itself(engine: tuple[str, Engine]) -> None:
    """Union-Pro has a number for each type; two at once count both, and each at its share of the steps."""
    _, held = engine
    types = ("canny", "tile", "depth", "blur", "pose", "gray", "low_quality", "soft edge")
    for mode, row in held.model.modes.items():
        if not row.controlnet:
            continue
        fields = everywhere(held, mode)
        del fields["control_type"]
        each = [drawn(held, **fields, control_type=kind)[0] for kind in types]
        assert len(set(each)) == len(types)
        fields["controls"] = [{"image": fields.pop("control_image"), "type": "canny"}]
        assert drawn(held, **fields)[0] == each[0]
        fields["controls"].append({"image": base64_of(PICTURE.rotate(180)), "type": "depth", "scale": 0.3})
        both = drawn(held, **fields)
        assert both[0] not in each
        fields["controls"][1]["start"] = 0.5
        assert drawn(held, **fields) != both
        fields["controls"][1] |= {"type": "soft edge", "start": 0, "end": 1}
        mixed = drawn(held, **fields)
        assert mixed != both


def test_every_family_takes_an_adapter_of_its_own_and_refuses_anothers(
    engine: tuple[str, Engine], tmp_path: Path
) -> None:
    family, held = engine
    layers = held._pipeline.transformer.named_modules()
    layer, query = next((name, each) for name, each in layers if name.endswith("blocks.0.attn.to_q"))
    for name, width in (("fits", query.in_features), ("other", query.in_features + 8)):
        generator = torch.Generator().manual_seed(1)
        halves = {
            f"transformer.{layer}.lora_A.weight": torch.randn(2, width, generator=generator),
            f"transformer.{layer}.lora_B.weight": torch.randn(query.out_features, 2, generator=generator),
        }
        save_file(halves, tmp_path / f"{name}.safetensors")

    def ask_with(mode: str, **fields: Any) -> dict[str, Any]:
        asked = everywhere(held, mode) | small_for(held) | {"prompt": "a red circle", "seed": 1}
        settings = Settings(lora_dir=tmp_path)
        return respond({"input": asked | fields}, Job(), lambda: settings, lambda: held)

    for mode in held.model.modes:
        adapted, plain = ask_with(mode, lora_path="fits.safetensors", lora_scale=1), ask_with(mode)
        assert adapted["status"] == "success", (family, mode, adapted)
        assert opened(adapted)[0].tobytes() != opened(plain)[0].tobytes()
        assert "was made for another model" in ask_with(mode, lora_path="other.safetensors")["error"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_runs_on_every_family(engine: tuple[str, Engine], scheduler: str) -> None:
    _, held = engine
    if scheduler not in schedulers_for(held.model):
        refused = ask(held, scheduler=scheduler)
        assert f"cannot be {scheduler} on {held.model.name}" in refused["error"]
        assert refused["error"].endswith("allowed: " + ", ".join(schedulers_for(held.model)))
        return
    for mode, row in held.model.modes.items():
        if SCHEDULERS[scheduler].starts_midway or "strength" not in row.takes:
            assert len(drawn(held, **everywhere(held, mode), scheduler=scheduler)) == 1

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from src.catalog import get_model
from src.errors import Fault, InvalidRequest
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.request.schema import MAX_SEED


def plan(model: str = "FLUX.1-dev", max_pixels: int = 2048 * 2048, **fields: Any) -> Plan:
    row = get_model(model)
    return make_plan(*read_request({"input": {"prompt": "a fox", **fields}})[:2], row, max_pixels=max_pixels)


def faults(**fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        plan(**fields)
    return {fault.field: fault.message for fault in caught.value.faults}


def test_the_models_defaults_fill_what_is_open() -> None:
    dev, schnell = plan(), plan("FLUX.1-schnell")
    assert (dev.sampling.width, dev.sampling.height, dev.sampling.num_inference_steps, dev.sampling.guidance_scale) == (
        1024,
        1024,
        50,
        7.5,
    )
    assert (
        schnell.sampling.num_inference_steps,
        schnell.sampling.guidance_scale,
        schnell.sampling.max_sequence_length,
    ) == (4, 3.5, 256)
    assert (dev.mode, dev.sampling.scheduler) == ("text-to-image", None)


def test_what_is_asked_wins_over_the_defaults() -> None:
    asked = plan(width=640, height=480, num_inference_steps=7, guidance_scale=0, max_sequence_length=64)
    assert (
        asked.sampling.width,
        asked.sampling.height,
        asked.sampling.num_inference_steps,
        asked.sampling.guidance_scale,
    ) == (640, 480, 7, 0)
    assert asked.sampling.max_sequence_length == 64


def test_a_canvas_is_a_size_that_the_model_can_draw() -> None:
    assert plan(width=1000, height=1016).canvas == (1008, 1024)
    assert plan(width=1024, height=64).canvas == (1024, 64)


def test_seeds_count_up_and_never_leave_their_range() -> None:
    assert plan(seed=7, num_images=3).seeds == (7, 8, 9)
    assert plan(seed=MAX_SEED, num_images=2).seeds == (MAX_SEED, 0)


def test_a_seed_is_picked_when_none_is_given() -> None:
    for nothing in ({}, {"seed": None}, {"seed": -1}):
        assert len({plan(**nothing).seeds for _ in range(5)}) == 5


def test_the_parameters_of_a_picture_ask_for_that_picture_alone() -> None:
    first = plan(seed=7, num_images=2, negative_prompt="a dog", true_cfg_scale=4, scheduler="unipc", width=520)
    again = plan(**first.parameters(1))
    assert again.seeds == (8,)
    assert again.parameters(0) == first.parameters(1)
    assert (again.sampling.negative_prompt, again.sampling.true_cfg_scale, again.sampling.scheduler) == (
        "a dog",
        4,
        "unipc",
    )


def test_true_cfg_without_a_negative_prompt_steers_away_from_the_empty_one() -> None:
    assert plan(true_cfg_scale=3).sampling.negative_prompt == ""
    assert plan(negative_prompt="").sampling.negative_prompt is None


def test_a_field_without_effect_is_refused_or_warned_of() -> None:
    assert "set true_cfg_scale above 1" in faults(negative_prompt="a dog")["negative_prompt"]
    assert "no effect on FLUX.1-schnell" in plan("FLUX.1-schnell", guidance_scale=3).warnings[0]
    assert plan(guidance_scale=3).warnings == ()
    assert plan(output_quality=80).warnings == ("output_quality has no effect on PNG",)
    assert plan(output_quality=80, output_format="webp").warnings == ()


def test_the_models_limits_are_named_with_the_requests_own() -> None:
    found = faults(num_images=9, max_sequence_length=513, scheduler="unipcc", negative_prompt="x")
    assert set(found) == {"num_images", "max_sequence_length", "scheduler", "negative_prompt"}
    assert "from 1 to 512 for FLUX.1-dev, got 513" in found["max_sequence_length"]
    assert "did you mean unipc?" in found["scheduler"]


def test_a_picture_that_is_broken_and_of_no_use_gets_both_faults() -> None:
    request, *_ = read_request({"input": {"prompt": "a fox", "image_prompt": "http://x"}})
    broken = Fault("image_prompt", "is broken")
    with pytest.raises(InvalidRequest) as caught:
        make_plan(request, [broken], get_model("FLUX.2-klein-4B"), max_pixels=2**22)
    assert [fault.message for fault in caught.value.faults] == [
        "is broken",
        "cannot be used by text-to-image on FLUX.2-klein-4B",
    ]


def test_what_no_mode_can_use_is_named_where_there_is_no_mode_too() -> None:
    request, *_ = read_request({"input": {"prompt": "a fox", "mask_image": "x", "prompt_2": "y", "strength": 0.5}})
    with pytest.raises(InvalidRequest) as caught:
        make_plan(request, [], get_model("FLUX.2-klein-4B"), max_pixels=2**22)
    found = {fault.field: fault.message for fault in caught.value.faults}
    assert found["prompt_2"] == "cannot be used by any mode on FLUX.2-klein-4B"
    assert set(found) == {"mask_image", "prompt_2"}, "strength goes with klein's inpainting"


def test_pixels_are_limited_and_a_faulty_side_is_named_once() -> None:
    assert "got 1024x1032" in faults(max_pixels=1024 * 1024, height=1032)["height"]
    assert set(faults(max_pixels=1024 * 1024, width=2048, height=7)) == {"height"}


def test_batches_share_out_the_seeds() -> None:
    row = get_model("FLUX.1-dev")
    for prompt, shares in (
        ("a fox", [("a fox", (1, 2, 3)), ("a fox", (4,))]),
        (["a fox", "a fox", "an owl", "a fox"], [("a fox", (1, 2)), ("an owl", (3,)), ("a fox", (4,))]),
    ):
        request = read_request({"input": {"prompt": prompt, "seed": 1, "num_images": 4}})
        assert list(make_plan(*request[:2], row, max_pixels=2**22, batch_size=3).batches()) == shares


def test_a_list_of_prompts_says_how_many_pictures() -> None:
    assert plan(prompt=["a fox", "an owl"]).prompts == ("a fox", "an owl")
    assert plan(prompt=["a fox"], num_images=2).prompts == ("a fox", "a fox")
    assert faults(prompt=["a fox", "an owl"], num_images=3)["num_images"] == "must be 2, one per prompt, got 3"


def klein_inpainting(picture: tuple[int, int], **fields: Any) -> Plan:
    row = get_model("FLUX.2-klein-4B")
    request, faults, _ = read_request({"input": {"prompt": "x", "init_image": "x", "mask_image": "x", **fields}})
    given = {"init_image": (Image.new("RGB", picture),), "mask_image": (Image.new("L", picture),)}
    return make_plan(request, faults, row, given, max_pixels=2**22)


@pytest.mark.parametrize("picture", [(1920, 1080), (1080, 1920), (4000, 3000), (1023, 1025), (999, 77), (5000, 300)])
def test_a_size_that_comes_from_a_picture_is_one_that_the_model_draws_whole(picture: tuple[int, int]) -> None:
    decided = klein_inpainting(picture)
    assert decided.canvas[0] * decided.canvas[1] <= 1024 * 1024
    assert (
        decided.sampling.width * decided.sampling.height > 0.9 * min(picture[0] * picture[1], 1024 * 1024)
        or picture[0] > 4000
    )


def test_a_size_whose_canvas_is_too_large_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"at most 1,048,576 pixels, got 1016x1032 \(drawn as 1024x1040\) = 1,064,960"
    ):
        klein_inpainting((100, 100), width=1016, height=1032)


def from_picture(model: str, picture: tuple[int, int], max_pixels: int = 2**22, **fields: Any) -> Plan:
    row = get_model(model)
    request, faults, _ = read_request({"input": {"prompt": "x", "init_image": "x", **fields}})
    return make_plan(request, faults, row, {"init_image": (Image.new("RGB", picture),)}, max_pixels=max_pixels)


@pytest.mark.parametrize(
    ("picture", "most", "size"),
    [
        ((1920, 1080), 2**22, (1368, 768)),
        ((1920, 1080), 2**20, (1360, 768)),
        ((5000, 300), 2**22, (2048, 120)),
        ((32, 32), 2**22, (64, 64)),
    ],
)
def test_a_size_that_comes_from_a_picture_keeps_its_shape(
    picture: tuple[int, int], most: int, size: tuple[int, int]
) -> None:
    decided = from_picture("FLUX.1-dev", picture, most)
    assert (decided.sampling.width, decided.sampling.height) == size


def test_a_shape_that_cannot_be_drawn_is_refused() -> None:
    for picture, fields, name in (((512, 2048), {"width": 1024}, "width"), ((50, 3000), {}, "init_image")):
        with pytest.raises(InvalidRequest, match="allowed: sides of 64 to 2048") as caught:
            from_picture("FLUX.1-dev", picture, **fields)
        assert [fault.field for fault in caught.value.faults] == [name]
    with pytest.raises(InvalidRequest, match=r"megapixels: .*at most 1,048,576 pixels"):
        klein_inpainting((100, 100), megapixels=2)


def test_a_picture_to_be_edited_is_read_whole_whatever_shape_is_asked_for() -> None:
    (read,) = from_picture("FLUX.1-Kontext-dev", (800, 800), width=1024, height=576).pictures["init_image"]
    assert read.size == (800, 800)


@pytest.mark.parametrize("picture", [(1920, 1080), (4000, 3000), (3000, 400), (1001, 777), (900, 120), (64, 65)])
@pytest.mark.parametrize("model", ["FLUX.1-Kontext-dev", "FLUX.2-klein-4B"])
def test_the_picture_that_gives_the_size_lies_on_the_canvas_and_so_it_does_in_numbers(
    picture: tuple[int, int], model: str
) -> None:
    plan = from_picture(model, picture)
    width, height = plan.sampling.width, plan.sampling.height
    assert plan.reference_on_canvas
    assert plan.canvas[0] * plan.canvas[1] <= 1024 * 1024
    assert from_picture(model, picture, width=width, height=height).reference_on_canvas
    assert not from_picture(model, picture, width=512, height=1024).reference_on_canvas


def test_a_small_or_long_picture_may_be_edited() -> None:
    for size in ((50, 50), (900, 100)):
        assert from_picture("FLUX.1-Kontext-dev", size).pictures["init_image"][0].size == size

"""Image-to-image and inpainting on the shipped model, measured on pixels."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from handler import get_engine, handler
from src.catalog import get_model
from src.errors import InvalidRequest
from src.job import Job
from src.plan.plan import Plan, make_plan
from src.request.images import load_pictures
from src.request.reading import read_request
from src.response.encode import read_parameters
from tests.conftest import base64_of, opened
from training import judge
from training.scenes import COLOURS, draw, every_prompt, lone

MODEL = get_model("flux-shapes")


def ask(**fields: Any) -> dict[str, Any]:
    response: dict[str, Any] = handler({"id": "test", "input": {"seed": 1, **fields}})
    return response


def answer(**fields: Any) -> Image.Image:
    response = ask(**fields)
    assert response["status"] == "success", response
    return opened(response)[0].convert("RGB")


def plan(**fields: Any) -> Plan:
    request, faults, _ = read_request({"input": {"prompt": "a red circle", **fields}})
    pictures, more, odd = load_pictures(request, Job())
    return make_plan(request, (*faults, *more), MODEL, pictures, warnings=odd, max_pixels=2048 * 2048)


def faults(**fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        plan(**fields)
    return {fault.field: fault.message for fault in caught.value.faults}


SCENE = draw(lone("blue", "square", "yellow"), 128, 128)
MASK = Image.new("L", (128, 128))
ImageDraw.Draw(MASK).rectangle((32, 32, 95, 95), fill=255)


def far(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.slow
def test_image_to_image_keeps_more_the_lower_the_strength() -> None:
    prompts = [prompt for prompt, _ in every_prompt()][::14]
    assert len(prompts) == 20
    start = base64_of(SCENE)
    means = [
        np.mean([far(answer(prompt=p, init_image=start, strength=s, seed=i), SCENE) for i, p in enumerate(prompts)])
        for s in (0.2, 0.4, 0.6, 0.8)
    ]
    assert means == sorted(means)
    assert means[0] < 0.5 * means[-1]


def test_full_strength_draws_the_prompt() -> None:
    picture = answer(prompt="a red circle on a white background", init_image=base64_of(SCENE), strength=1)
    assert (judge.centre_colour(picture), judge.background_colour(picture)) == ("red", "white")


@pytest.mark.slow
def test_inpainting_changes_nothing_outside_the_mask_and_puts_the_colour_inside() -> None:
    scene, mask = base64_of(SCENE), base64_of(MASK)
    outside = np.asarray(MASK) < 128
    right = 0
    for i in range(50):
        colour = [name for name in COLOURS if name not in ("yellow", "blue")][i % 6]
        prompt = f"a {colour} {('circle', 'square', 'diamond')[i % 3]} on a yellow background"
        picture = answer(prompt=prompt, init_image=scene, mask_image=mask, strength=1, seed=i)
        assert np.array_equal(np.asarray(picture)[outside], np.asarray(SCENE)[outside])
        right += judge.centre_colour(picture) == colour
    assert right >= 45


def test_outpainting_goes_on_beyond_the_edges_and_keeps_the_picture() -> None:
    right = 0
    for seed, colour in enumerate(("red", "green", "purple", "white", "orange", "black")):
        scene = draw(lone("blue", "square", colour), 96, 96)
        asked = {"outpaint": {"left": 32, "top": 32}, "init_image": base64_of(scene), "seed": seed}
        response = ask(prompt=f"a blue square on a {colour} background", **asked, strength=1)
        (picture,) = opened(response)
        assert (response["metadata"]["mode"], picture.size) == ("inpainting", (128, 128))
        assert np.array_equal(np.asarray(picture)[32:, 32:], np.asarray(scene))
        around = judge.name_colours(picture)[:28]
        right += bool((around == list(COLOURS).index(colour)).mean() > 0.9)
        again = read_parameters(picture)
        assert again is not None
        assert again["input"]["outpaint"] == {"left": 32, "right": 0, "top": 32, "bottom": 0}
        repeated = ask(**{**again["input"], "init_image": base64_of(scene)})
        assert opened(repeated)[0].tobytes() == picture.tobytes()
    assert right >= 5
    assert "cannot be used by text-to-image" in faults(outpaint={"left": 8})["outpaint"]


def test_without_preserving_the_model_redraws_the_rest() -> None:
    fields = {"prompt": "a red circle", "init_image": base64_of(SCENE), "mask_image": base64_of(MASK)}
    kept, drawn = answer(**fields), answer(**fields, preserve_unmasked=False)
    outside = np.asarray(MASK) < 128
    assert np.array_equal(np.asarray(kept)[~outside], np.asarray(drawn)[~outside])
    assert not np.array_equal(np.asarray(kept)[outside], np.asarray(drawn)[outside])


def test_the_same_request_gives_the_same_bytes_in_any_order() -> None:
    fields = {"prompt": "a red circle", "init_image": base64_of(SCENE), "strength": 0.6}
    first, plain = ask(**fields)["images"], ask(prompt="a red circle")["images"]
    assert ask(**fields, num_images=2)["images"][:1] == first
    ask(prompt="a star", init_image=base64_of(SCENE), mask_image=base64_of(MASK))
    assert ask(prompt="a red circle")["images"] == plain
    assert ask(**fields)["images"] == first


@pytest.mark.parametrize(
    ("picture", "given", "size"),
    [
        ((128, 128), {}, (128, 128)),
        ((100, 60), {}, (104, 64)),
        ((1000, 500), {}, (184, 88)),
        ((300, 300), {"width": 96}, (96, 96)),
        ((300, 150), {"height": 96}, (192, 96)),
        ((300, 150), {"width": 72, "height": 136}, (72, 136)),
    ],
)
def test_the_size_comes_from_the_picture_where_none_is_given(
    picture: tuple[int, int], given: dict[str, int], size: tuple[int, int]
) -> None:
    drawn = answer(prompt="a red circle", init_image=base64_of(SCENE.resize(picture)), num_inference_steps=2, **given)
    assert drawn.size == size


def test_fewer_steps_are_taken_and_reported() -> None:
    decided = plan(init_image=base64_of(SCENE), strength=0.5)
    assert (decided.sampling.num_inference_steps, decided.steps) == (8, 4)
    metadata = ask(prompt="a red circle", init_image=base64_of(SCENE))["metadata"]
    assert (metadata["mode"], metadata["strength"]) == ("image-to-image", 0.8)


def test_a_field_that_the_mode_cannot_use_is_named_with_the_mode() -> None:
    assert faults(strength=0.5) == {"strength": "cannot be used by text-to-image on flux-shapes"}
    response = faults(mask_image=base64_of(MASK))["mask_image"]
    assert response.startswith(
        "flux-shapes has no mode for mask_image; allowed: text-to-image: no picture; image-to-image"
    )
    assert (
        "cannot be used by image-to-image"
        in faults(init_image=base64_of(SCENE), preserve_unmasked=False)["preserve_unmasked"]
    )
    assert "1 at least, got 0.0 x 8" in faults(init_image=base64_of(SCENE), strength=0.0)["strength"]
    assert (
        "cannot be unipc, which cannot start from a picture"
        in faults(init_image=base64_of(SCENE), scheduler="unipc")["scheduler"]
    )


def test_a_file_carries_what_it_was_made_with() -> None:
    response = ask(prompt="a red circle", init_image=base64_of(SCENE), mask_image=base64_of(MASK))
    event = read_parameters(opened(response)[0])
    assert event is not None
    assert event["input"]["strength"] == 0.8
    assert event["input"]["preserve_unmasked"] is True
    assert event["input"]["init_image"].startswith("sha256:")
    assert len(event["input"]["init_image"]) == 7 + 64


def test_a_bad_picture_is_refused_before_the_device_is_used_and_the_worker_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = ask(prompt="a red circle")["images"]
    draw = get_engine().draw
    monkeypatch.setattr(get_engine(), "draw", lambda *_: pytest.fail("the device was used"))
    failed = ask(prompt="a red circle", init_image="file:///etc/passwd", width=63)
    assert [fault["field"] for fault in failed["errors"]] == ["width", "init_image"]
    animated = io.BytesIO()
    SCENE.save(animated, "GIF", save_all=True, append_images=[MASK.convert("RGB")])
    whole = base64_of(SCENE)
    for bad in (
        whole[:200], base64_of(SCENE.resize((1, 1))), base64.b64encode(animated.getvalue()).decode(), "not base64!",
        base64.b64encode(b"<html>").decode(), "https://169.254.169.254/latest/meta-data/", "https://[::1",
    ):  # fmt: skip
        for fields in ({"init_image": bad}, {"init_image": whole, "mask_image": bad}, {"control_image": bad}):
            failed = ask(prompt="a red circle", **fields)
            assert failed["error_code"] == "invalid_request", (bad[:40], failed)
            assert next(name for name, value in fields.items() if value == bad) in {
                f["field"] for f in failed["errors"]
            }
    monkeypatch.setattr(get_engine(), "draw", draw)
    assert ask(prompt="a red circle")["images"] == before

"""Control pictures: who reads them, what is refused, and on the shipped ControlNet whether they count."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import measure_edges
from handler import handler, respond
from src.catalog import get_model
from src.engine import load_engine
from src.engine.controlnets import MultiControlNet
from src.errors import InvalidRequest, InvalidSettings
from src.job import Job
from src.plan.plan import Plan, make_plan
from src.request.images import load_pictures
from src.request.reading import read_request
from src.response.encode import read_parameters
from src.settings import Settings
from tests.conftest import base64_of, opened
from tests.hub import Hub, Repo, download_into
from tests.small_models import controlnet, redux, small
from training.scenes import draw, lone

SCENE = draw(lone("blue", "square", "yellow"), 128, 128)
PLAIN = base64_of(SCENE)


def plan(model: str = "FLUX.1-dev", controlnets: tuple[str, ...] = (), **fields: Any) -> Plan:
    row = get_model(model)
    request, faults, _ = read_request({"input": {"prompt": "a fox", **fields}})
    pictures, more, odd = load_pictures(request, Job())
    return make_plan(request, (*faults, *more), row, pictures, warnings=odd, max_pixels=2**22, controlnets=controlnets)


def faults(model: str = "FLUX.1-dev", **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        plan(model, **fields)
    return {fault.field: fault.message for fault in caught.value.faults}


def test_a_type_is_read_by_the_first_network_that_knows_it_unless_another_is_preferred() -> None:
    (control,) = plan(control_image=PLAIN, control_type="Depth").controls
    assert control.net is not None
    assert (control.net.name, control.control_mode, control.scale, control.start, control.end) == (
        "Union-Pro",
        2,
        0.5,
        0,
        1,
    )
    (control,) = plan(control_image=PLAIN, control_type="depth", controlnets=("union-pro-2.0",)).controls
    assert control.net is not None
    assert (control.net.name, control.control_mode, control.scale, control.end) == ("Union-Pro-2.0", None, 0.8, 0.8)
    (control,) = plan(control_image=PLAIN, control_type=" Pose", controlnets=("union-pro-2.0",)).controls
    assert (control.scale, control.end) == (0.9, 0.65)
    (control,) = plan("FLUX.1-Canny-dev", control_image=PLAIN).controls
    assert (control.net, control.type) == (None, "canny")
    (control,) = plan("flux-shapes", control_image=PLAIN).controls
    assert control.type == "canny"


def test_several_keep_their_order_and_their_own_options() -> None:
    decided = plan(
        control_image=PLAIN,
        control_type="canny",
        controlnet_conditioning_scale=0.4,
        control_guidance_end=0.5,
        controls=[{"image": PLAIN, "type": "low-quality", "scale": 1, "start": 0.2}],
    )
    response = [
        (control.type, control.control_mode, control.scale, control.start, control.end) for control in decided.controls
    ]
    assert response == [("canny", 0, 0.4, 0, 0.5), ("low quality", 6, 1, 0.2, 1)]
    assert decided.mode == "controlnet"
    assert len(decided.pictures["control_image"]) == 2


def test_what_is_wrong_of_controls_is_named_with_what_is_allowed() -> None:
    assert (
        "is required with control_image; FLUX.1-dev allows: canny, tile" in faults(control_image=PLAIN)["control_type"]
    )
    assert "did you mean canny?" in faults(control_image=PLAIN, control_type="cany")["control_type"]
    wrong = faults(
        controls=[
            {"image": PLAIN, "type": "depth", "preprocess": True},
            {"image": PLAIN, "type": "pose", "start": 0.6, "end": 0.61},
            {"image": PLAIN, "type": "scribble"},
        ]
    )
    assert set(wrong) == {"controls.0.preprocess", "controls.1.start", "controls.2.type"}
    assert "can make canny pictures; send a depth picture as it is" in wrong["controls.0.preprocess"]
    assert "FLUX.1-dev has no mode for control_image and mask_image" in next(
        iter(faults(control_image=PLAIN, mask_image=PLAIN).values())
    )
    assert "must hold one control picture" in faults("FLUX.1-Canny-dev", controls=[{"image": PLAIN}] * 2)["controls"]
    assert "canny" in faults("FLUX.1-Canny-dev", control_image=PLAIN, control_type="depth")["control_type"]
    assert (
        "has no effect without control_image"
        in faults(controls=[{"image": PLAIN, "type": "canny"}], control_type="depth")["control_type"]
    )
    assert (
        "cannot be used by control on FLUX.1-Canny-dev"
        in (
            faults("FLUX.1-Canny-dev", control_image=PLAIN, controlnet_conditioning_scale=1)[
                "controlnet_conditioning_scale"
            ]
        )
    )
    assert "controls.0.scale" in faults("FLUX.1-Canny-dev", controls=[{"image": PLAIN, "scale": 1}])
    assert set(faults(controls=[{"image": PLAIN, "type": "canny", "scale": 3}])) == {"controls.0.scale"}
    assert set(faults(controls=[{"type": "canny"}])) == {"controls.0.image"}
    assert set(faults(controls=[{"image": "file:///etc/passwd", "type": "canny"}])) == {"controls.0"}
    assert (
        "must leave one of 2 steps before the end, got a start of 0 and an end of 0.3"
        in faults(control_image=PLAIN, control_type="canny", control_guidance_end=0.3, num_inference_steps=2)[
            "control_guidance_start"
        ]
    )
    assert set(faults(control_image=5, control_type="canny")) == {"control_image"}
    assert "no effect without image_prompt" in faults(image_prompt_scale=1)["image_prompt_scale"]


def test_edges_are_made_of_a_plain_picture_where_asked_for() -> None:
    made = plan(control_image=PLAIN, control_type="canny", preprocess=True).pictures["control_image"][0]
    assert made.size == (128, 128)
    assert set(np.unique(np.asarray(made))) == {0, 255}
    assert 100 < (np.asarray(made.convert("L")) > 0).sum() < 600, "the outline of a square, and nothing else"
    kept = plan(control_image=PLAIN, control_type="canny").pictures["control_image"][0]
    assert np.array_equal(np.asarray(kept), np.asarray(SCENE))


def test_a_network_that_cannot_be_had_says_so_and_the_worker_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.repos["Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro"] = Repo(
        controlnet(tmp_path / "wide", 7, joint_attention_dim=64)
    )
    folder = small("dev", tmp_path / "tune")
    engine = load_engine(
        Settings(model_name=str(folder), redux_model=str(redux(tmp_path / "redux", words=64))),
        download_into(tmp_path / "home"),
    )

    def ask(**fields: Any) -> dict[str, Any]:
        small_one = {"width": 64, "height": 64, "num_inference_steps": 1, "max_sequence_length": 16}
        return respond({"input": {"prompt": "a red circle", **small_one, **fields}}, Job(), Settings, lambda: engine)

    refused = ask(control_image=PLAIN, control_type="canny")
    assert refused["error_code"] == "model_unavailable"
    assert "Union-Pro (Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro): is made for another model" in refused["error"]
    assert "joint_attention_dim is 64 and 128 here" in refused["error"]
    missing = ask(control_image=PLAIN, control_type="normals")
    assert "Normals (jasperai/Flux.1-dev-Controlnet-Surface-Normals): there is no such repo" in missing["error"]
    assert "its embeddings have 64 values and this model's 128" in ask(image_prompt=PLAIN)["error"]
    assert ask()["status"] == "success"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_weights_that_are_not_whole_are_named(hub: Hub, tmp_path: Path, damage: str) -> None:
    net, prior = controlnet(tmp_path / "net", 7), redux(tmp_path / "redux")
    for folder in (net, prior):
        for file in folder.rglob("*.safetensors"):
            if damage == "cut":
                file.write_bytes(file.read_bytes()[:-100])
            else:
                file.unlink()
    hub.repos["Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro"] = Repo(net)
    settings = Settings(model_name=str(small("dev", tmp_path / "tune")), redux_model=str(prior))
    engine = load_engine(settings, download_into(tmp_path / "home"))
    for fields in ({"control_image": PLAIN, "control_type": "canny"}, {"image_prompt": PLAIN}):
        response = respond({"input": {"prompt": "x", **fields}}, Job(), Settings, lambda: engine)
        assert response["error_code"] == "model_unavailable", response
        assert ("is damaged" if damage == "cut" else "holds no weights") in response["error"]


def test_what_makes_room_for_another_network_is_gone(hub: Hub, tmp_path: Path) -> None:
    hub.repos["Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro"] = Repo(controlnet(tmp_path / "u", 7))
    hub.repos["Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"] = Repo(controlnet(tmp_path / "v"))
    settings = Settings(model_name=str(small("dev", tmp_path / "tune")))
    engine = load_engine(settings, download_into(tmp_path / "home"))

    def ask(**fields: Any) -> None:
        options = {"prompt": "x", "num_inference_steps": 1, "width": 64, "height": 64, "max_sequence_length": 16}
        event = {"input": {**options, "control_image": PLAIN, **fields}}
        response = respond(event, Job(), lambda: settings, lambda: engine)
        assert response["status"] == "success", response

    ask(control_type="canny")
    first = weakref.ref(engine._controlnets._loaded["Union-Pro"])
    ask(control_type="soft edge", init_image=PLAIN, strength=1, control_guidance_end=1)
    gc.collect()
    assert engine.loaded().controlnets == ("Union-Pro-2.0",)
    assert first() is None


def test_a_network_that_leaves_takes_its_memory_with_it_though_its_blocks_are_compiled() -> None:
    engine = load_engine(Settings(model_name="flux-shapes", compile=True, controlnets=("flux-shapes-canny",)))
    (name,) = engine.loaded().controlnets
    block = weakref.ref(engine._controlnets._loaded[name].transformer_blocks[0])
    gc.disable()
    try:
        engine._controlnets._leave(name)
        assert block() is None
    finally:
        gc.enable()
        torch.compiler.set_stance("default")


def test_networks_that_differ_in_guidance_are_not_mixed(hub: Hub, tmp_path: Path) -> None:
    hub.repos["Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro"] = Repo(
        controlnet(tmp_path / "u", 7, guidance_embeds=True)
    )
    hub.repos["jasperai/Flux.1-dev-Controlnet-Upscaler"] = Repo(controlnet(tmp_path / "s", guidance_embeds=False))
    engine = load_engine(Settings(model_name=str(small("dev", tmp_path / "tune"))), download_into(tmp_path / "home"))
    controls = [{"image": PLAIN, "type": "canny"}, {"image": PLAIN, "type": "low resolution"}]
    fields = {"prompt": "a red circle", "num_inference_steps": 1, "max_sequence_length": 16, "controls": controls}
    response = respond({"input": fields}, Job(), Settings, lambda: engine)
    assert "Union-Pro and Upscaler cannot be used together" in response["error"]


def test_networks_of_any_depth_are_added_up_where_the_transformer_takes_them(tmp_path: Path) -> None:
    def load(name: str, num_mode: int | None, **changes: Any) -> Any:
        folder = controlnet(tmp_path / name, num_mode, **changes)
        return diffusers.FluxControlNetModel.from_pretrained(folder, dtype=torch.float32)

    deep, shallow = load("deep", 7, num_layers=2, num_single_layers=3), load("shallow", None, num_single_layers=0)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 128, generator=generator),
        "pooled_projections": torch.randn(1, 128, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    pictures = torch.randn(2, 1, 16, 64, generator=generator)

    @torch.inference_mode()
    def run(*order: int) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        nets = [(deep, shallow)[i] for i in order]
        several = MultiControlNet(nets, {"num_layers": 2, "num_single_layers": 5})
        double, single = several(
            controlnet_cond=[pictures[i] for i in order],
            controlnet_mode=[torch.tensor([(2, -1)[i]]) for i in order],
            conditioning_scale=[(1.0, 0.5)[i] for i in order],
            **inputs,
            return_dict=False,
        )
        return double, single

    (one, one_single), (other, other_single), both, swapped = run(0), run(1), run(0, 1), run(1, 0)
    assert other_single is None
    assert (len(one), len(one_single or ())) == (2, 5)
    assert one_single is not None
    assert one_single[0] is one_single[1], "three samples for five blocks: two, two and one"
    for i in range(2):
        assert torch.allclose(both[0][i], one[i] + other[i], atol=1e-6)
        assert torch.allclose(both[0][i], swapped[0][i], atol=1e-6)
    assert both[1] is not None
    assert all(torch.equal(a, b) for a, b in zip(both[1], one_single, strict=True))


def test_a_model_without_a_controlnet_mode_names_none_of_them(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"CONTROLNETS=Union-Pro: .* has none"):
        load_engine(Settings(model_name=str(small("kontext", tmp_path / "tune")), controlnets=("Union-Pro",)))


def test_networks_are_loaded_at_the_start_where_controlnets_names_them() -> None:
    with pytest.raises(InvalidSettings, match="CONTROLNETS=Union-Pro: flux-shapes has flux-shapes-canny"):
        load_engine(Settings(model_name="flux-shapes", controlnets=("Union-Pro",)))
    engine = load_engine(Settings(model_name="flux-shapes", controlnets=("flux-shapes-canny",)))
    before = engine._controlnets._loaded["flux-shapes-canny"]
    fields = {"prompt": "a red circle", "control_image": PLAIN, "preprocess": True}
    response = respond({"input": fields}, Job(), Settings, lambda: engine)
    assert "load_controlnets" in response["metadata"]["timings"]
    assert engine._controlnets._loaded["flux-shapes-canny"] is before


def answer(**fields: Any) -> Image.Image:
    response = handler({"id": "test", "input": {"seed": 1, **fields}})
    assert response["status"] == "success", response
    return opened(response)[0]


@pytest.mark.slow
def test_the_shapes_lie_within_their_edges() -> None:
    measured = measure_edges()
    assert measured["prompts"] == 50
    assert measured["iou_at_1"] >= 0.7
    assert measured["iou_at_0"] < 0.5, "without the edges a shape lies in the middle"


def test_at_scale_0_the_picture_is_the_plain_one() -> None:
    for seed in range(5):
        plain = answer(prompt="a red star on a blue background", seed=seed)
        silent = answer(
            prompt="a red star on a blue background", seed=seed, control_image=PLAIN, controlnet_conditioning_scale=0
        )
        assert silent.convert("RGB").tobytes() == plain.convert("RGB").tobytes()


def test_a_file_carries_its_controls() -> None:
    event = read_parameters(answer(prompt="a red star", control_image=PLAIN, preprocess=True))
    assert event is not None
    asked = event["input"]
    response = [asked[name] for name in ("control_type", "controlnet_conditioning_scale", "preprocess")]
    assert response == ["canny", 1.0, True]
    assert asked["control_image"].startswith("sha256:")
    assert event["controlnets"] == ["flux-shapes-canny"]

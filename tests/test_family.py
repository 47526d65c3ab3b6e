"""Every family's row, end to end, on a small random model of its own class."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from handler import respond
from src.catalog import FAMILIES, Model, find_model
from src.engine import Engine, load_engine
from src.job import Job
from src.serving import Worker
from src.settings import ROOT, Settings
from tests.conftest import opened


def small(family: str, folder: Path) -> Path:
    """flux-shapes' parts around a small random transformer of the family's shape, in the family's pipeline."""
    head = find_model(FAMILIES[family].model)
    assert head is not None
    shapes = diffusers.FluxPipeline.from_pretrained(ROOT / "models" / "flux-shapes", dtype=torch.float32)
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel.from_config(
        {
            **shapes.transformer.config,
            "num_layers": 1,
            "num_single_layers": 1,
            "in_channels": 384 if family == "fill" else 64,  # Fill reads the masked picture and the mask too
            "out_channels": 64,
            "guidance_embeds": FAMILIES[family].guidance_embeds,
        }
    )
    class_name = head.base.class_name
    parts = {
        name: getattr(shapes, name)
        for name in ("scheduler", "vae", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    }
    getattr(diffusers, class_name)(transformer=transformer, **parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Engine]:
    folder = small(request.param, tmp_path_factory.mktemp(request.param) / "tune")
    return request.param, load_engine(Settings(model_name=str(folder)))


def base64_of(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (104, 136, 3), dtype=np.uint8))
MASK = Image.new("L", PICTURE.size)
ImageDraw.Draw(MASK).rectangle((40, 30, 90, 80), fill=255)
SENT = {"init_image": base64_of(PICTURE), "mask_image": base64_of(MASK)}


def ask(engine: Engine, **fields: Any) -> dict[str, Any]:
    fields = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "max_sequence_length": 16, **fields}
    return respond({"input": fields}, Job(), Settings, lambda: engine)


def test_the_family_is_read_from_the_files(engine: tuple[str, Engine]) -> None:
    family, held = engine
    assert held.model.family == family
    assert held.model.pipelines == head(family).pipelines


def head(family: str) -> Model:
    found = find_model(FAMILIES[family].model)
    assert found is not None
    return found


def test_every_mode_draws_what_was_sent_in_its_exact_size_and_the_same_again(engine: tuple[str, Engine]) -> None:
    _, held = engine
    first = {}
    for _ in range(2):
        for mode, row in held.model.pipelines.items():
            sent = {name: SENT[name] for name in row.needs}
            size = {} if sent else {"width": 136, "height": 104}
            response = ask(held, **sent, **size)
            assert response["status"] == "success", response
            (picture,) = opened(response)
            assert picture.size == (136, 104)
            assert response["metadata"]["mode"] == mode
            assert first.setdefault(mode, response["images"]) == response["images"]
            if "mask_image" in sent:
                outside = np.asarray(MASK) < 128
                assert np.array_equal(np.asarray(picture)[outside], np.asarray(PICTURE)[outside])
    assert len({images[0] for images in first.values()}) == len(first)


def test_every_model_can_be_warmed_up(engine: tuple[str, Engine]) -> None:
    _, held = engine
    worker = Worker(pytest.fail, Settings(warmup_sizes=((64, 64),)))
    worker.warm_up(held)
    worker.close()


def test_what_a_model_cannot_use_is_refused_with_its_name(engine: tuple[str, Engine]) -> None:
    family, held = engine
    modes = {row.needs for row in held.model.pipelines.values()}
    for names in ((), ("init_image",), ("mask_image",), ("init_image", "mask_image")):
        if frozenset(names) not in modes:
            refused = ask(held, **{name: SENT[name] for name in names})
            assert refused["error_code"] == "invalid_request"
            assert f"{held.model.name} has no mode for" in refused["errors"][0]["message"]
    if family == "fill":
        assert "cannot be used by inpainting" in ask(held, **SENT, true_cfg_scale=2)["error"]
        assert ask(held, **SENT, guidance_scale=60)["status"] == "success"
    else:
        assert "must be less than or equal to 20, got 60" in ask(held, guidance_scale=60)["error"]

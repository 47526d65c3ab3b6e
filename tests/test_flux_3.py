"""FLUX.3, which diffusers has as blocks, held against diffusers' own modular pipelines on a small random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from src.catalog import SCHEDULERS
from src.engine import Engine, load_engine
from src.engine.placed_pipeline import PlacedPipeline
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.settings import Settings
from tests.small_models import all_placements, head, small, weights_of

REFERENCES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))
    for seed, size in enumerate([(104, 136, 3), (75, 203, 3)])
]
SMALL: dict[str, Any] = {"width": 128, "height": 96, "num_inference_steps": 3}
FAMILIES = ("flux.3", "flux.3-base")


@pytest.fixture(scope="module", params=FAMILIES)
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine]:
    folder = small(request.param, tmp_path_factory.mktemp("flux_3") / "tune")
    return folder, load_engine(Settings(model_name=str(folder)))


class WholeProcessor:
    """What Qwen3-VL's processor is to diffusers' blocks; the real one wants torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template


def diffusers_own(folder: Path, family: str, engine: Engine) -> Any:
    pipeline = getattr(diffusers, head(family).base.class_name)(pretrained_model_name_or_path=str(folder))
    for name in ("vae", "text_encoder", "transformer"):
        setattr(pipeline, name, getattr(engine._pipeline, name))
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    pipeline.tokenizer = WholeProcessor(engine._pipeline.tokenizer)
    pipeline._blocks.sub_blocks.pop("prompt_upsampler")
    return pipeline


@pytest.mark.parametrize("references", [0, 1, 2])
def test_pictures_are_those_of_diffusers_own_blocks(held: tuple[Path, Engine], references: int) -> None:
    folder, engine = held
    family = engine.model.family
    pictures = REFERENCES[:references]
    fields = {"prompt": "a red circle", "seed": 5, **SMALL}
    if pictures:  # of the very size, so that nothing is fitted before
        fields["init_images"] = ["picture"] * references
        pictures[0] = pictures[0].resize((128, 96))
    request, faults, _ = read_request({"input": fields})
    plan = make_plan(
        request, faults, engine.model, {"init_image": tuple(pictures)} if pictures else {}, max_pixels=2**20
    )
    (ours,) = engine.run(plan).pictures
    pipeline = diffusers_own(folder, family, engine)
    if engine.model.family == "flux.3-base":
        pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    with torch.inference_mode():
        (theirs,) = pipeline(
            prompt="a red circle", generator=torch.Generator().manual_seed(5), output="images",
            **SMALL, **({"image": pictures} if pictures else {}),
        )  # fmt: skip
    assert ours.tobytes() == theirs.tobytes()


def test_the_same_bytes_with_everything_away_that_can_be(held: tuple[Path, Engine]) -> None:
    """Adaptive norms ahead and every block streamed: with every scheduler, references, in batches."""
    folder, plain = held
    thrifty = load_engine(Settings(model_name=str(folder)))
    least = min(all_placements(weights_of(folder)), key=lambda found: found.resident)
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, torch.device("cpu"))
    assert least.modulation_cache
    assert least.streamed["transformer"]
    for scheduler in SCHEDULERS:
        for count in (1, 2):
            fields = {"prompt": "a red circle", "seed": 5, **SMALL, "scheduler": scheduler, "num_images": count}
            request, faults, _ = read_request({"input": fields})
            plan = make_plan(request, faults, plain.model, max_pixels=2**20, batch_size=2)
            ours, theirs = ([picture.tobytes() for picture in held.run(plan).pictures] for held in (thrifty, plain))
            assert ours == theirs, (scheduler, count)

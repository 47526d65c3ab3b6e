"""FLUX.3, which diffusers has as blocks, held against diffusers' own modular pipelines on a small random model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from src.catalog import get_model, schedulers_for
from src.engine import Engine, load_engine, load_engines
from src.engine.placed_pipeline import PlacedPipeline
from src.errors import Cancelled, InvalidRequest, InvalidSettings, ModelUnavailable
from src.job import Progress
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.settings import Settings
from src.weights.files import Files, read_index
from tests.hub import Hub, Repo, download_into
from tests.small_models import all_placements, head, small, weights_of

REFERENCES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))
    for seed, size in enumerate([(96, 128, 3), (75, 203, 3)])
]
SMALL: dict[str, Any] = {"width": 128, "height": 96, "num_inference_steps": 2}
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


def planned(engine: Engine, references: int = 0, pictures: Sequence[Image.Image] = REFERENCES, **fields: Any) -> Plan:
    """A small picture of the first `references`."""
    sent = {"init_images": ["picture"] * references} if references else {}
    request, faults, _ = read_request({"input": {"prompt": "a red circle", "seed": 5, **SMALL, **sent, **fields}})
    given = {"init_image": tuple(pictures[:references])} if references else {}
    return make_plan(request, faults, engine.model, given, max_pixels=2**24, batch_size=2)


def test_a_window_without_room_for_the_prompt_is_refused_in_words(held: tuple[Path, Engine]) -> None:
    _, engine = held
    said = "prompt has 12 tokens for the model, which reads none of them"
    assert engine.run(planned(engine, max_sequence_length=4)).warnings == (said,)


def test_guidance_is_off_up_to_one(held: tuple[Path, Engine]) -> None:
    _, engine = held
    for _ in range(2):  # the first request leaves a guider to the next
        pictures = [engine.run(planned(engine, guidance_scale=scale)).pictures[0].tobytes() for scale in (1, 0, 0.5)]
        assert len(set(pictures)) == 1


@pytest.mark.parametrize("references", [0, 1, 2])
def test_pictures_are_those_of_diffusers_own_blocks(held: tuple[Path, Engine], references: int) -> None:
    folder, engine = held
    family = engine.model.family
    plan = planned(engine, references)
    (ours,) = engine.run(plan).pictures
    pipeline = diffusers_own(folder, family, engine)
    if engine.model.family == "flux.3-base":
        pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    with torch.inference_mode():
        (theirs,) = pipeline(
            prompt="a red circle", generator=torch.Generator().manual_seed(5), output="images",
            **SMALL, **({"image": list(plan.pictures["init_image"])} if references else {}),
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
    for scheduler in schedulers_for(plain.model):
        for references, count in ((0, 2), (2, 1)):
            plan = planned(plain, references, scheduler=scheduler, num_images=count)
            ours, theirs = ([picture.tobytes() for picture in held.run(plan).pictures] for held in (thrifty, plain))
            assert ours == theirs, (scheduler, references)


def test_a_reference_alone_is_read_whole_and_several_at_a_megapixel(
    held: tuple[Path, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = held
    if engine.model.family != "flux.3":
        return  # both read by the same blocks
    read: list[tuple[int, ...]] = []
    monkeypatch.setattr(engine._pipeline.vae, "encode", noting(read, engine._pipeline.vae.encode))
    large = Image.new("RGB", (1250, 900), "teal")
    for references in (1, 2):
        plan = planned(engine, references, (large, large), num_inference_steps=1)
        engine.run(plan)
    assert read == [(912, 1264), (864, 1200), (864, 1200)]
    assert planned(engine, 1, (large,), width=None, height=None).canvas == (1248, 896), "as large as the picture"
    assert planned(engine, 2, (large, large), width=None, height=None).canvas == (1200, 864)


def noting(read: list[tuple[int, ...]], encode: Any) -> Any:
    def noted(image: torch.Tensor, *rest: Any, **more: Any) -> Any:
        read.append(tuple(image.shape[-2:]))
        return encode(image, *rest, **more)

    return noted


def test_sizes_go_to_4096_where_max_pixels_allows_them() -> None:
    def sized(model: str, max_pixels: int = 4096**2, **fields: Any) -> Any:
        request, faults, _ = read_request({"input": {"prompt": "x", **fields}})
        try:
            return make_plan(request, faults, get_model(model), max_pixels=max_pixels).canvas
        except InvalidRequest as error:
            return [(fault.field, fault.message) for fault in error.faults]

    assert sized("FLUX.3-klein", width=4096, height=4096) == (4096, 4096)
    assert sized("FLUX.3-klein", aspect_ratio="16:9", megapixels=8) == (3776, 2128)
    assert sized("FLUX.3-klein") == (1024, 1024)
    assert sized("FLUX.3-klein", Settings().max_pixels, width=4096, height=4096) == [
        (
            "width",
            (
                "makes too many pixels: at most 4,194,304 pixels on this worker, which MAX_PIXELS sets (FLUX.3-klein "
                "draws sides of up to 4096), got 4096x4096 = 16,777,216"
            ),
        )
    ]
    assert sized("FLUX.1-dev", width=4096, height=64) == [
        (
            "width",
            (
                "must be less than or equal to 2048, got 4096; allowed: an integer, a multiple of 8 from 64 to 2048 on "
                "FLUX.1-dev"
            ),
        )
    ]


def test_previews_look_like_the_picture_and_do_not_change_it(
    held: tuple[Path, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = held
    monkeypatch.setattr("src.engine.preview.SECONDS_BETWEEN", 0)
    seen: list[Progress] = []
    (shown,) = engine.run(planned(engine, preview=True, num_inference_steps=4), seen.append).pictures
    previews = [progress.preview for progress in seen if progress.preview]
    assert len(previews) == 3, "the first step has nothing to compare with"
    assert {preview.size for preview in previews} == {shown.size}
    off = [np.abs(np.asarray(preview, float) - np.asarray(shown, float)).mean() for preview in previews]
    assert off[-1] < off[0]
    assert off[-1] < 1
    (plain,) = engine.run(planned(engine, num_inference_steps=4)).pictures
    assert plain.tobytes() == shown.tobytes()


def test_a_job_that_is_cancelled_ends_within_a_step_and_says_nothing_in_the_log(
    held: tuple[Path, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    _, engine = held
    before = [picture.tobytes() for picture in engine.run(planned(engine)).pictures]
    steps: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step:
            steps.append(progress.step)
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        engine.run(planned(engine), stop)
    assert steps == [1]
    assert not caplog.messages
    assert [picture.tobytes() for picture in engine.run(planned(engine)).pictures] == before


def test_files_without_a_scheduler_and_a_guider_have_the_models_own(tmp_path: Path) -> None:
    folder = small("flux.3-base", tmp_path / "tune")
    shutil.rmtree(folder / "scheduler")
    bare = load_engine(Settings(model_name=str(folder)))._pipeline
    assert (bare.scheduler.config.shift, bare.guider.config.guidance_scale) == (6.93, 3.5)
    diffusers.ClassifierFreeGuidance(guidance_scale=4, guidance_rescale=0.7).save_pretrained(folder / "guider")
    own = load_engine(Settings(model_name=str(folder)))
    own.run(planned(own, guidance_scale=6))
    assert (own._pipeline.guider.guidance_scale, own._pipeline.guider.guidance_rescale) == (6, 0.7)
    diffusers.AdaptiveProjectedGuidance().save_pretrained(folder / "guider")
    with pytest.raises(ModelUnavailable, match="its guider is a AdaptiveProjectedGuidance; this worker runs"):
        load_engine(Settings(model_name=str(folder)))


def test_either_index_is_read_and_what_is_elsewhere_is_named(tmp_path: Path) -> None:
    folder = small("flux.3", tmp_path / "tune")
    modular = json.loads((folder / "modular_model_index.json").read_text())
    upsampler = ["transformers", "Qwen3_5ForConditionalGeneration", {"pretrained_model_name_or_path": "someone/writer"}]
    (folder / "modular_model_index.json").write_text(json.dumps(modular | {"prompt_upsampler": upsampler}))
    index = read_index(folder)
    assert index is not None
    assert index["tokenizer"] == ["transformers", "Qwen3VLProcessor"]
    assert "prompt_upsampler" not in index, "a setting asks for it"
    (folder / "modular_model_index.json").rename(folder / "gone.json")
    index["tokenizer"] = ["transformers", "Qwen2TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_engine(Settings(model_name=str(folder))).model.family == "flux.3"
    (folder / "model_index.json").rename(folder / "modular_model_index.json")
    modular["text_encoder"][2]["pretrained_model_name_or_path"] = "Qwen/Qwen3-VL-4B-Instruct"
    (folder / "modular_model_index.json").write_text(json.dumps(modular))
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ModelUnavailable, match=r"takes it from Qwen/Qwen3-VL-4B-Instruct, and this worker reads"):
        load_engine(Settings(model_name=str(folder)))


def test_a_text_encoder_that_was_cut_is_refused(tmp_path: Path) -> None:
    folder = small("flux.3", tmp_path / "tune", text_layers=32)
    with pytest.raises(ModelUnavailable, match=r"text_encoder has 32 layers, and FLUX.3 reads what layer 32 hands on"):
        load_engine(Settings(model_name=str(folder)))


def test_from_the_hub_comes_what_is_the_models_alone_and_once(hub: Hub, tmp_path: Path) -> None:
    folder = small("flux.3", tmp_path / "repo")
    (folder / "prompt_upsampler").mkdir()
    (folder / "prompt_upsampler" / "model.safetensors").write_bytes(b"gigabytes")
    hub.repos["someone/flux-3"] = Repo(folder)
    files = Files(Settings(), download_into(tmp_path / "home"))
    source = files.find("someone/flux-3", "someone/flux-3")
    assert not (source.folder / "prompt_upsampler").exists()
    for tree in (tmp_path / "home").rglob("trees/*.json"):
        tree.unlink()  # as older libraries leave it: then the index says what there must be
    requests = hub.requests
    assert files.here("someone/flux-3", "someone/flux-3") == source
    assert hub.requests == requests
    next(source.folder.glob("transformer/*.safetensors")).unlink()
    assert files.here("someone/flux-3", "someone/flux-3") is None


def test_cards_that_would_share_a_picture_are_refused_in_one_sentence(held: tuple[Path, Engine]) -> None:
    folder, engine = held
    with pytest.raises(InvalidSettings) as refused:
        load_engines(Settings(model_name=str(folder), parallel="picture"), on=(torch.device("cpu"),) * 2)
    assert str(refused.value) == (
        f"PARALLEL=picture: cards cannot share the transformer of {engine.model.name}; allowed: PARALLEL=jobs"
    )

"""Prompts written out by a small random prompt upsampler, from the request to the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from handler import respond
from src.engine import Engine, load_engine
from src.engine.placed_pipeline import PlacedPipeline
from src.engine.upsampling import check_upsampler
from src.errors import InvalidSettings, ModelUnavailable
from src.job import Job, Progress
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.response.encode import read_parameters
from src.response.openai import in_openai_form
from src.serving.startup import check_start
from src.settings import Settings
from src.weights import bake
from src.weights.files import Files
from src.weights.ledger import PlacementChoice
from src.weights.placement import GB, Machine, Network, Weights, Work, placements
from tests.conftest import base64_of, opened
from tests.hub import Hub, Repo, download_into
from tests.small_models import small, upsampler, weights_of
from tests.test_family import PICTURE

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("upsampling")
    names = {"model_name": small("flux.3", folder / "tune"), "prompt_upsampler": upsampler(folder / "upsampler")}
    return Settings(**{name: str(path) for name, path in names.items()})


@pytest.fixture(scope="module")
def engine(settings: Settings) -> Engine:
    return load_engine(settings)


def ask(settings: Settings, engine: Engine, job: Job | None = None, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": "a red circle", "prompt_upsampling": True, **SMALL, **fields}
    return respond({"input": asked}, job or Job(), lambda: settings, lambda: engine)


def weights_of_both(settings: Settings) -> Weights:
    """The model's sizes and the upsampler's, in float32."""
    alone = weights_of(Path(settings.model_name))
    sizes = check_upsampler(Path(str(settings.prompt_upsampler)))
    return replace(alone, networks={**alone.networks, "prompt_upsampler": Network.of(sizes, 4)})


def caption(response: dict[str, Any]) -> str:
    assert response["status"] == "success", response
    found: str = response["metadata"]["upsampled_prompt"]
    return found


def pixels(response: dict[str, Any]) -> list[bytes]:
    return [picture.tobytes() for picture in opened(response)]


def test_a_picture_is_that_of_its_caption_and_says_both(settings: Settings, engine: Engine) -> None:
    response = ask(settings, engine)
    text = caption(response)
    assert text != "a red circle" == response["metadata"]["prompt"]
    assert response["metadata"]["prompt_upsampling"] is True
    assert response["metadata"]["timings"]["upsample_prompt"] > 0
    plain = ask(settings, engine, prompt=text, prompt_upsampling=False)
    assert pixels(plain) == pixels(response) != pixels(ask(settings, engine, prompt_upsampling=False))
    assert plain["metadata"]["upsampled_prompt"] is None


def test_a_file_repeats_the_caption_so_that_its_picture_needs_no_upsampler(settings: Settings, engine: Engine) -> None:
    response = ask(settings, engine)
    (picture,) = opened(response)
    event = read_parameters(picture)
    assert event is not None
    assert event["original_prompt"] == "a red circle"
    assert event["input"]["prompt"] == caption(response)
    assert "prompt_upsampling" not in event["input"]
    again = respond(event, Job(), lambda: settings.model_copy(update={"prompt_upsampler": None}), lambda: engine)
    assert pixels(again) == pixels(response)


def test_a_caption_is_written_once_and_is_the_same_again(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    generate = engine._pipeline.prompt_upsampler.generate

    def noting(**inputs: Any) -> Any:
        written.append(1)
        return generate(**inputs)

    monkeypatch.setattr(engine._pipeline.prompt_upsampler, "generate", noting)
    engine._upsampler._remembered.clear()
    first = caption(ask(settings, engine))
    assert caption(ask(settings, engine, seed=2)) == first
    assert len(written) == 1
    engine._upsampler._remembered.clear()
    assert caption(ask(settings, engine)) == first
    assert len(written) == 2


def test_each_prompt_of_a_list_has_a_caption_of_its_own(settings: Settings, engine: Engine) -> None:
    response = ask(settings, engine, prompt=["a red circle", "a blue square"])
    alone = [caption(ask(settings, engine, prompt=prompt)) for prompt in ("a red circle", "a blue square")]
    assert response["metadata"]["upsampled_prompt"] == alone
    assert alone[0] != alone[1]
    first, second = opened(response)
    assert [read_parameters(each)["input"]["prompt"] for each in (first, second)] == alone  # type: ignore[index]


def test_references_are_seen(settings: Settings, engine: Engine) -> None:
    texts = [
        caption(ask(settings, engine, init_image=picture))
        for picture in (None, base64_of(PICTURE), base64_of(PICTURE.rotate(90)))
    ]
    assert len(set(texts)) == 3


def test_the_openai_api_tells_what_was_drawn(settings: Settings, engine: Engine) -> None:
    fields = {"prompt": "a red circle", "prompt_upsampling": True, "seed": 1, "num_inference_steps": 1, "size": "64x64"}
    event = {"input": {"openai_route": "/v1/images/generations", "openai_input": fields}}
    answered = respond(event, Job(), lambda: settings, lambda: engine)
    body = in_openai_form(event, answered, lambda: engine.model)[0]
    assert body["data"][0]["revised_prompt"] == caption(answered)
    text = body["usage"]["input_tokens_details"]["text_tokens"]
    assert text > 0
    assert text % 80 == 0, "padded as far as FLUX.3 pads, not to the longest that it reads"


@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_captions_and_pictures_are_the_same_wherever_weights_live(
    settings: Settings, engine: Engine, offload: str | None
) -> None:
    weights = weights_of_both(settings)
    mode = f"{offload}_offload" if offload else "stream"
    found = placements(weights, Machine("a small card", GB, GB, 1e11, 1e10), Work(64, 64, 1, 32, 64 * 64), mode)
    least = min(found, key=lambda each: each.resident)
    assert offload or len(least.streamed["prompt_upsampler"]) == 5  # three layers that write, two that see
    thrifty = load_engine(settings)
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, torch.device("cpu"))
    for picture in (None, base64_of(PICTURE)):
        here, there = (ask(settings, each, init_image=picture) for each in (engine, thrifty))
        assert caption(here) == caption(there)
        assert pixels(here) == pixels(there)


def test_it_is_whole_on_the_device_while_it_writes_and_the_rest_comes_back(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, weights = load_engine(settings), weights_of_both(settings)
    machine, work = Machine("a small card", GB, GB, 1e11, 1e10), Work(64, 64, 1, 32, 64 * 64)
    start = next(
        found
        for found in placements(weights, machine, work, "stream")
        if len(found.streamed.get("prompt_upsampler", ())) == 5 and not found.streamed["transformer"]
    )
    choice = PlacementChoice(weights, replace(machine, memory=int(start.needs) + 1), work, "stream")
    placed_pipeline = PlacedPipeline(held._pipeline, start, torch.device("cpu"))
    alone = replace(start, streamed={"prompt_upsampler": start.streamed["prompt_upsampler"]})
    placed_pipeline.arrange(alone)
    assert placed_pipeline.text_encoders_stay, "the upsampler reads no prompt"
    placed_pipeline.arrange(start)
    tight = Engine(held._pipeline, held.model, None, placed_pipeline=placed_pipeline, choice=choice)
    arranged: list[Any] = []
    arrange = tight._placed_pipeline.arrange

    def noting(placement: Any) -> bool:
        arranged.append(placement)
        return arrange(placement)

    monkeypatch.setattr(tight._placed_pipeline, "arrange", noting)
    for _ in range(2):
        assert pixels(ask(settings, tight)) == pixels(ask(settings, engine))
    while_it_wrote, after = arranged  # the second caption was remembered
    assert not while_it_wrote.streamed.get("prompt_upsampler")
    assert any(while_it_wrote.streamed.values())
    assert after is start
    assert tight._placed_pipeline.placement is start


def test_a_job_is_stopped_between_two_tokens(settings: Settings, engine: Engine) -> None:
    seen: list[str] = []

    def stop(progress: Progress) -> None:
        seen.append(progress.phase)
        if seen.count("upsample_prompt") == 3:
            job.cancelled = True

    job = Job(on_progress=stop)
    engine._upsampler._remembered.clear()
    assert ask(settings, engine, job)["error_code"] == "cancelled"
    assert seen[-1] == "upsample_prompt"
    assert seen.count("upsample_prompt") == 3
    assert not engine._upsampler._remembered
    assert caption(ask(settings, engine))


def test_other_jobs_are_made_ready_while_a_caption_is_written(settings: Settings, engine: Engine) -> None:
    ahead = Engine(
        engine._pipeline, engine.model, None, placed_pipeline=engine._placed_pipeline, settings=settings,
        reads_ahead=True,
    )  # fmt: skip
    request, faults, _ = read_request({"input": {"prompt": "another one", **SMALL}})
    waiting, ready = make_plan(request, faults, engine.model, max_pixels=2**20), list[bool]()

    def meanwhile(progress: Progress) -> None:
        if progress.phase == "upsample_prompt" and not ready:
            made = other.submit(ahead.prepare, waiting)
            ready.append(not wait([made], timeout=10).not_done)

    with ThreadPoolExecutor(1) as other:
        assert ask(settings, ahead, Job(on_progress=meanwhile))["status"] == "success"
    assert ready == [True]
    assert len(ahead._prompts._remembered) == 2


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "wrote nothing for this prompt"),
        ("a\0b", "wrote what is no prompt, which must not hold control characters"),
    ],
)
def test_what_is_no_caption_fails_the_picture(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch, written: str, said: str
) -> None:
    monkeypatch.setattr(engine._pipeline.prompt_upsampler_processor, "decode", lambda *_, **__: written)
    engine._upsampler._remembered.clear()
    failed = ask(settings, engine)
    assert failed["error_code"] == "generation_failed"
    assert said in failed["error"]
    assert "without prompt_upsampling" in failed["error"]
    assert "a red circle" not in failed["error"]


def test_a_caption_of_no_numbers_fails_the_picture(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine._upsampler._remembered.clear()
    with monkeypatch.context() as patch:
        head = engine._pipeline.prompt_upsampler.lm_head
        patch.setattr(head, "forward", lambda hidden: torch.full((*hidden.shape[:-1], head.out_features), torch.nan))
        failed = ask(settings, engine)
    assert failed["error_code"] == "generation_failed"
    assert "values are not finite: prompt_upsampler; send the request again" in failed["error"]
    assert caption(ask(settings, engine))


def test_a_caption_that_does_not_end_is_a_warning(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._pipeline.prompt_upsampler.generation_config, "eos_token_id", [10**6])
    network = engine._pipeline.prompt_upsampler
    generate, nothing = network.generate, network.config.image_token_id  # which is no word

    def briefly(*, max_new_tokens: int, **inputs: Any) -> Any:
        assert max_new_tokens > 3_000
        return torch.nn.functional.pad(generate(max_new_tokens=4, **inputs), (0, max_new_tokens - 4), value=nothing)

    monkeypatch.setattr(engine._pipeline.prompt_upsampler, "generate", briefly)
    for _ in range(2):  # also of one that is remembered
        warnings = ask(settings, engine, prompt="a long story")["metadata"]["warnings"]
        assert any("stopped after 3,584 tokens" in each for each in warnings)


def test_who_cannot_upsample_says_so(settings: Settings, engine: Engine, generate: Callable[..., Any]) -> None:
    bare = settings.model_copy(update={"prompt_upsampler": None})
    refused = ask(bare, engine)
    assert refused["errors"] == [
        {
            "field": "prompt_upsampling",
            "message": "cannot be true, as this worker has no prompt upsampler (PROMPT_UPSAMPLER); allowed: false, or "
            "true on a worker that has one",
        }
    ]
    foreign = ask(bare, engine, prompt_upsampling=None, enhance_prompt=True)
    assert foreign["status"] == "success"
    said = "enhance_prompt has no effect: this worker has no prompt upsampler (PROMPT_UPSAMPLER)"
    assert foreign["metadata"]["warnings"] == [said]
    assert foreign["metadata"]["prompt_upsampling"] is False
    assert ask(bare, engine, prompt_upsampling=False)["status"] == "success"

    other = generate("a red circle", expand_prompt=True, num_inference_steps=1)
    assert other["metadata"]["warnings"][0] == "expand_prompt has no effect in text-to-image on flux-shapes"


def test_describe_names_it(settings: Settings, engine: Engine) -> None:
    described = respond({"input": {"describe": True}}, Job(), lambda: settings, lambda: engine)["describe"]
    assert described["prompt_upsampler"] == settings.prompt_upsampler
    assert all("prompt_upsampling" in row["takes"] for row in described["modes"].values())


def test_a_model_without_one_refuses_it_at_the_start(settings: Settings, tmp_path: Path) -> None:
    wanted = {"prompt_upsampler": settings.prompt_upsampler}
    said = "flux-shapes reads prompts as they are; allowed: none, or MODEL_NAME one of FLUX.3-klein"
    with pytest.raises(InvalidSettings, match=said):
        check_start(Settings(model_name="flux-shapes", **wanted))
    with pytest.raises(InvalidSettings, match=said):
        load_engine(Settings(model_name="flux-shapes", **wanted))


def test_it_comes_from_the_hub_with_what_it_reads_with(settings: Settings, hub: Hub, tmp_path: Path) -> None:
    assert settings.prompt_upsampler
    name = "black-forest-labs/flux-3-image-klein-pup"
    hub.repos[name] = Repo(Path(settings.prompt_upsampler))
    loaded = load_engine(settings.model_copy(update={"prompt_upsampler": name}), download_into(tmp_path))
    assert caption(ask(settings, loaded))
    del hub.repos[name]
    with pytest.raises(ModelUnavailable, match="no such repo on the hub"):
        check_start(Settings(model_name=settings.model_name, prompt_upsampler=name))


def test_it_is_baked_with_its_model(
    settings: Settings, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, folder in (("MODEL_NAME", settings.model_name), ("PROMPT_UPSAMPLER", settings.prompt_upsampler)):
        hub.repos[f"someone/{variable}"] = Repo(Path(str(folder)))
        monkeypatch.setenv(variable, f"someone/{variable}")
    assert bake.main("true", tmp_path / "weights", tmp_path / "downloads") is None
    asked = hub.requests
    files = Files(Settings(), baked=tmp_path / "weights")
    found = files.find("someone/PROMPT_UPSAMPLER", "someone/PROMPT_UPSAMPLER", part=True)
    assert check_upsampler(found.folder)
    assert hub.requests == asked


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def with_a_tensor_less(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_another_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3VLForConditionalGeneration"]}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("config.json"), "holds no config.json"),
        (without("model.safetensors"), "has no weights"),
        (without("tokenizer.json"), "has no tokenizer.json"),
        (without("preprocessor_config.json"), "has no preprocessor_config.json"),
        (without("chat_template.jinja"), "has no chat template"),
        (with_a_tensor_less, "the weights of prompt_upsampler lack lm_head.weight"),
        (of_another_class, "is a Qwen3VLForConditionalGeneration; a prompt upsampler is a Qwen3_5"),
    ],
)
def test_one_that_is_not_whole_ends_the_start(
    settings: Settings, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    assert settings.prompt_upsampler
    folder = Path(shutil.copytree(settings.prompt_upsampler, tmp_path / "upsampler"))
    spoil(folder)
    with pytest.raises(ModelUnavailable, match=f"PROMPT_UPSAMPLER={folder}: .*{said}"):
        load_engine(settings.model_copy(update={"prompt_upsampler": str(folder)}))


def test_weights_that_its_class_does_not_read_are_not_counted(settings: Settings, tmp_path: Path) -> None:
    """Qwen3.5's repos hold layers for guesses of several words at once."""
    assert settings.prompt_upsampler
    folder = Path(shutil.copytree(settings.prompt_upsampler, tmp_path / "upsampler"))
    weights = load_file(folder / "model.safetensors")
    weights["mtp.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loaded = load_engine(settings.model_copy(update={"prompt_upsampler": str(folder), "memory_mode": "stream"}))
    assert caption(ask(settings, loaded))

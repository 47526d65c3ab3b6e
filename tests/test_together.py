"""Several processes on one picture, over gloo on the CPU: what they draw is the plain picture, whatever one meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from handler import respond
from src.engine import Engine, Engines, load_engine, load_engines
from src.engine.followers import Followers
from src.engine.ulysses import can_share
from src.errors import Cancelled, InvalidSettings
from src.job import Job, Progress
from src.settings import ROOT, Settings
from tests.conftest import base64_of, opened
from tests.test_engine import OOM, plan

OUTLINE = ROOT / "models" / "flux-shapes-outline"
FIELDS: dict[str, Any] = {
    "model_name": "flux-shapes", "lora_dir": OUTLINE, "controlnets": ("flux-shapes-canny",), "batch_size": 2,
}  # fmt: skip
ALONE, TOGETHER = Settings(**FIELDS), Settings(**FIELDS, parallel="picture")
CPU = torch.device("cpu")
# Shares of the tokens are multiplied in products of fewer rows, which may round the last bit of a value otherwise: a
# level of 256 where that tips a pixel over.
ROUNDING = 1


@pytest.fixture(scope="module")
def alone() -> Engine:
    return load_engine(ALONE)


def load() -> tuple[Engine, Followers]:
    engines = load_engines(TOGETHER, on=(CPU, CPU))
    assert engines.at_once == 1
    (engine,) = engines._engines
    assert isinstance(engine._together, Followers)
    return engine, engine._together


@pytest.fixture(scope="module")
def both() -> Iterator[Engine]:
    engine, followers = load()
    yield engine
    followers.close()


def ask(engine: Engine, settings: Settings = TOGETHER, **fields: Any) -> dict[str, Any]:
    event = {"input": {"prompt": "a red circle on a blue background", "seed": 1, **fields}}
    response: dict[str, Any] = respond(event, Job(), lambda: settings, lambda: engine)
    assert response["status"] == "success", response
    return response


def same(engine: Engine, alone: Engine, **fields: Any) -> None:
    drawn, plain = opened(ask(engine, **fields)), opened(ask(alone, ALONE, **fields))
    assert len(drawn) == len(plain)
    for one, other in zip(drawn, plain, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= ROUNDING


def raising(error: BaseException, at: int = 3) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.phase == "denoise" and progress.step == at:
            raise error

    return on_progress


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"seed": 2, "scheduler": "lcm"},
        {"width": 144, "height": 112},
        {"width": 80, "height": 208, "max_sequence_length": 31},
        {"prompt": ["a green square", "a white diamond on red"]},
        {"lora_path": "pytorch_lora_weights.safetensors", "lora_scale": 1},
        {"lora_path": "pytorch_lora_weights.safetensors", "lora_scale": 0.4},
        {"negative_prompt": "blue", "true_cfg_scale": 2},
    ],
    ids=str,
)
def test_the_picture_is_the_plain_one(both: Engine, alone: Engine, fields: dict[str, Any]) -> None:
    same(both, alone, **fields)


@pytest.mark.slow
def test_pictures_to_start_from_and_to_follow(both: Engine, alone: Engine) -> None:
    picture = base64_of(opened(ask(alone, ALONE, seed=3))[0])
    same(both, alone, init_image=picture, strength=0.6)
    same(both, alone, control_image=picture, control_type="canny")
    same(both, alone, control_image=picture, control_type="canny", width=112, height=144)


@pytest.mark.slow
def test_steps_are_not_guessed_and_a_warning_says_so(both: Engine, alone: Engine) -> None:
    response = ask(both, speed="fast")
    assert "speed fast has no effect where several cards draw one picture" in response["metadata"]["warnings"]
    assert opened(response)[0].tobytes() == opened(ask(both))[0].tobytes()
    assert ask(both, describe=True)["describe"]["placement"]["mode"] == "full"
    assert response["metadata"]["device"] == "cpu cpu"


@pytest.mark.slow
def test_a_cancelled_picture_keeps_nobody_waiting(both: Engine, alone: Engine) -> None:
    for at in (1, 5):
        with pytest.raises(Cancelled):
            both.run(plan(), raising(Cancelled("now"), at))
        same(both, alone, seed=at)


@pytest.mark.slow
def test_memory_that_was_short_on_one_of_them_is_freed_and_the_picture_drawn_again(
    both: Engine, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, failures = both._pipeline.vae, [OOM]
    decode = vae.decode

    def short(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", short)
    same(both, alone)
    assert not failures


@pytest.mark.slow
def test_what_all_of_them_refuse_alike_leaves_them_in_step(both: Engine, alone: Engine) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        both.transformer(
            hidden_states=torch.zeros(1, 64, 3),
            encoder_hidden_states=torch.zeros(1, 32, 128),
            img_ids=torch.zeros(64, 3),
            txt_ids=torch.zeros(32, 3),
        )
    same(both, alone)


def test_how_many_cards_can_share_the_heads() -> None:
    assert [count for count in range(2, 9) if can_share(24, count)] == [2, 3, 4, 5, 6, 8]
    assert [count for count in range(2, 9) if can_share(5, count)] == [2, 3, 5]


def test_heads_that_cannot_be_shared_are_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidSettings) as refused:
        load_engines(TOGETHER, on=(CPU,) * 4)
    assert str(refused.value) == (
        "PARALLEL=picture: flux-shapes has 5 attention heads, which 4 cards cannot share; allowed: 2, 3, 5 of them "
        "(CUDA_VISIBLE_DEVICES), or PARALLEL=jobs"
    )


def test_a_device_that_is_alone_draws_alone_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engines = load_engines(Settings(model_name="flux-shapes", parallel="picture"))
    assert isinstance(engines, Engines)
    assert engines.loaded().placement["devices"] == ["cpu"]
    assert "PARALLEL=picture has no effect: there is one device, cpu" in caplog.messages


@pytest.mark.parametrize("variable", ["MEMORY_MODE=stream", "MEMORY_MODE=model_offload", "COMPILE=true"])
def test_what_contradicts_it_is_refused_at_the_start(variable: str) -> None:
    name, _, value = variable.partition("=")
    with pytest.raises(InvalidSettings, match=f"^{variable} and PARALLEL=picture contradict each other"):
        Settings.from_environment({"PARALLEL": "picture", name: value})
    for fine in ("full", "fp8", "nf4", "auto"):
        assert Settings.from_environment({"PARALLEL": "PICTURE", "MEMORY_MODE": fine}).parallel == "picture"

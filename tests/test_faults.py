"""Faults at every seam of the road: what the client is told, and that the next request gets the right bytes."""

from __future__ import annotations

import copy
import errno
import gc
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft.tuners.tuners_utils import BaseTunerLayer

import handler
from src.catalog import FORMATS
from src.engine import Engine, load_engine
from src.engine.finite import finite_decoding
from src.engine.offload import Home, Offloader
from src.job import Job
from src.job_queue import JobQueue
from src.request.adapters import AdapterStore
from src.response import delivery
from src.response.storage import Bucket
from src.settings import ROOT, Settings
from tests.conftest import base64_of
from tests.small_models import SHAPES, redux, small
from training.scenes import draw, lone

SMALL = {"seed": 1, "width": 64, "height": 64, "num_inference_steps": 3}
PLAIN = {"prompt": "a red circle", **SMALL}
SCENE = base64_of(draw(lone("blue", "square", "yellow"), 64, 64))
ADAPTER = {"lora_path": "flux-shapes-outline/pytorch_lora_weights.safetensors"}


@dataclass
class Held:
    """A worker in one process: its engine, the line in front of it, and the job that is on its way."""

    engine: Engine
    queue: JobQueue
    bucket: Any = None
    job: Job = field(default_factory=Job)

    def ask(self, **fields: Any) -> dict[str, Any]:
        self.job = Job("job", queue_up=self.queue.ticket)
        event = {"id": "job", "input": {"prompt": "a red circle", **SMALL, **fields}}
        settings = Settings(lora_dir=ROOT / "models")
        return handler.respond(event, self.job, lambda: settings, lambda: self.engine, lambda: self.bucket)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    prior = redux(tmp_path_factory.mktemp("redux"))
    worker = Held(load_engine(Settings(model_name="flux-shapes", redux_model=str(prior))), JobQueue())
    for fields in ({"control_image": SCENE}, {"image_prompt": SCENE}, ADAPTER):  # what loads late is here
        assert worker.ask(**fields)["status"] == "success"
    yield worker
    worker.queue.close()


# ---- the table

Strike = Callable[[Any], Any]  # takes what a seam gives back, and gives back another or raises


def raising(make: Callable[[], Exception]) -> Callable[[Held], Strike]:
    def strike(_: Any) -> Any:
        raise make()

    return lambda _: strike


def poisoned(value: float) -> Callable[[Held], Strike]:
    def strike(made: Any) -> Any:
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            return torch.full_like(made, value)
        if isinstance(made, (tuple, list)):
            return type(made)(map(strike, made))
        if isinstance(made, Mapping):  # the libraries' named outputs
            return type(made)(**{name: strike(each) for name, each in made.items()})
        if isinstance(made, DiagonalGaussianDistribution):
            made.mean, made.std = strike(made.mean), strike(made.std)
        return made

    return lambda _: strike


def cancelling(worker: Held) -> Strike:
    def strike(made: Any) -> Any:
        worker.job.cancel()
        return made

    return strike


KINDS: dict[str, Callable[[Held], Strike]] = {
    "the card's memory": raising(lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "the host's memory": raising(MemoryError),
    "a device that failed": raising(lambda: RuntimeError("CUDA error: an illegal memory access was encountered\nmore")),
    "tensors that do not fit": raising(lambda: RuntimeError("Expected tensor for argument #1")),
    "a full disk": raising(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "too many files": raising(lambda: OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
    "no more threads": raising(lambda: RuntimeError("can't start new thread")),
    "no number": poisoned(float("nan")),
    "infinity": poisoned(float("inf")),
    "a cancel": cancelling,
}
CODES = {
    "the card's memory": "out_of_memory",
    "the host's memory": "out_of_memory",
    "a device that failed": "device_failed",
    "tensors that do not fit": "generation_failed",
    "a full disk": "worker_unavailable",
    "too many files": "worker_unavailable",
    "no more threads": "worker_unavailable",
    "no number": "generation_failed",
    "infinity": "generation_failed",
    "a cancel": "cancelled",
}


@dataclass(frozen=True)
class Seam:
    """Where a fault strikes: `where` says of a worker which object and which of its attributes, at which call.

    `differs` is what is answered otherwise than CODES has it; None is a success.
    """

    where: Callable[[Held], tuple[Any, str]]
    call: int = 1
    fields: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, str | None] = field(default_factory=dict)
    without: tuple[str, ...] = ()


NUMBERS = ("no number", "infinity")
ON_THE_CPU: dict[str, str | None] = {"tensors that do not fit": "internal_error"}
NO_ADAPTER: dict[str, str | None] = dict.fromkeys(("a full disk", "too many files"), "adapter_unavailable")
LOST_UPLOAD: dict[str, str | None] = {kind: None for kind in KINDS if kind not in ("a cancel", *NUMBERS)}


def pipeline(worker: Held) -> Any:
    return worker.engine._pipeline


def controlnet(worker: Held) -> Any:
    """Loaded again where memory was short before."""
    loaded = worker.engine._controlnets._loaded
    return loaded.get("flux-shapes-canny") or (worker.ask(control_image=SCENE), loaded["flux-shapes-canny"])[1]


SEAMS = {
    "reading": Seam(lambda _: (handler, "read_request"), differs=ON_THE_CPU, without=NUMBERS),
    "pictures": Seam(
        lambda _: (handler, "load_pictures"), fields={"init_image": SCENE}, differs=ON_THE_CPU, without=NUMBERS
    ),
    "the store of adapters": Seam(
        lambda _: (AdapterStore, "load"), fields=ADAPTER, differs=ON_THE_CPU, without=NUMBERS
    ),
    "files": Seam(
        lambda worker: (worker.engine, "fetch"), fields={"control_image": SCENE}, differs=ON_THE_CPU, without=NUMBERS
    ),
    "adapter": Seam(
        lambda worker: (pipeline(worker), "load_lora_weights"), fields=ADAPTER, differs=NO_ADAPTER, without=NUMBERS
    ),
    "CLIP": Seam(lambda worker: (pipeline(worker).text_encoder, "forward")),
    "encoder": Seam(lambda worker: (pipeline(worker), "encode_prompt")),
    "Redux": Seam(lambda worker: (worker.engine._redux, "read"), fields={"image_prompt": SCENE}),
    "the picture's latents": Seam(lambda worker: (pipeline(worker).vae, "encode"), fields={"init_image": SCENE}),
    "ControlNet": Seam(lambda worker: (controlnet(worker), "forward"), fields={"control_image": SCENE}),
    "step 1": Seam(lambda worker: (pipeline(worker).transformer, "forward")),
    "step 2": Seam(lambda worker: (pipeline(worker).transformer, "forward"), call=2),
    "the last step": Seam(lambda worker: (pipeline(worker).transformer, "forward"), call=3),
    "guessed steps": Seam(
        lambda worker: (pipeline(worker).transformer, "forward"), call=7,
        fields={"speed": "fast", "num_inference_steps": 12, "scheduler": "dpmpp_2m"},
    ),
    "an adapted step": Seam(lambda worker: (pipeline(worker).transformer, "forward"), call=2, fields=ADAPTER),
    "decoder": Seam(lambda worker: (pipeline(worker).vae, "decode")),
    "encoding": Seam(
        lambda _: (delivery, "encode_image"), fields={"num_images": 2, "output_format": "JPEG"}, differs=ON_THE_CPU,
        without=NUMBERS,
    ),
    "upload": Seam(lambda worker: (worker.bucket, "upload"), differs=LOST_UPLOAD, without=NUMBERS),
}  # fmt: skip
# Each like another row that is not.
SLOW = {"too many files", "step 1", "the last step", "guessed steps", "an adapted step"}
ROWS = [
    pytest.param(seam, kind, marks=[pytest.mark.slow] if {seam, kind} & SLOW else [], id=f"{seam}: {kind}")
    for seam, row in SEAMS.items()
    for kind in KINDS
    if kind not in row.without
]


class Shelf(Bucket):
    """Takes files, and is no server."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(close=lambda: None), "shelf", url_expiry=60)

    def upload(self, file: bytes, name: str, mime: str) -> str:
        return f"https://shelf.test/{name}"


def left_over(worker: Held) -> dict[str, Any]:
    """All that a plan sets up for itself, as it is now."""
    held = pipeline(worker)
    networks = [part for part in held.components.values() if isinstance(part, torch.nn.Module)]
    layers = [layer for network in networks for layer in network.modules()]
    return {
        "scheduler": type(held.scheduler).__name__,
        "hooks": sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers),
        "adapters": sum(isinstance(layer, BaseTunerLayer) for layer in layers),
        "tiling": held.vae.use_tiling or held.vae.use_slicing,
        "step cache": any(
            getattr(part, "_diffusers_hook", None) and part._diffusers_hook.hooks for part in held.transformer.modules()
        ),
        "types": {parameter.dtype for network in networks for parameter in network.parameters()},
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name in ("encode", "upload")),
    }


@pytest.mark.parametrize(("seam", "kind"), ROWS)
def test_a_fault_has_its_code_and_the_next_picture_is_right(
    seam: str, kind: str, held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = SEAMS[seam]
    held.bucket = Shelf() if seam == "upload" else None
    held.engine._adapters._make_room(0, keep=set())  # or it would not be loaded again
    held.engine._prompts._remembered.clear()
    expected, before = pictures(held.ask()), left_over(held)
    held.engine._prompts._remembered.clear()

    thing, name = row.where(held)
    as_it_was, strike, calls = getattr(thing, name), KINDS[kind](held), 0

    def struck(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        made = as_it_was(*arguments, **options)
        return strike(made) if calls >= row.call else made

    with monkeypatch.context() as patch:
        patch.setattr(thing, name, struck)
        answer = held.ask(**row.fields)
    assert calls >= row.call, "or nothing was struck"

    code = {**CODES, **row.differs}[kind]
    assert answer.get("error_code") == code, answer.get("error")
    assert answer.get("refresh_worker", False) == (code == "device_failed")
    assert answer["status"] == ("success" if code is None else "error")
    if code is None:
        assert "its upload failed" in answer["metadata"]["warnings"][0]
    elif code != "cancelled":
        assert any(record.levelno == logging.ERROR for record in caplog.records)
    else:
        assert "job job: success" not in caplog.text
    assert pictures(held.ask()) == expected
    assert left_over(held) == before


def pictures(answer: dict[str, Any]) -> Any:
    assert answer["status"] == "success", answer
    return answer.get("images") or [url.rpartition("/")[2] for url in answer["image_urls"]]


def test_faults_leave_no_file_open_and_no_tensor(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return len(os.listdir("/proc/self/fd")), tensors

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    held.bucket = None
    held.ask(init_image=SCENE)
    held.ask()
    before = now()
    for thing, name in ((delivery, "encode_image"), (pipeline(held).vae, "decode"), (handler, "make_plan")):
        with monkeypatch.context() as patch:
            patch.setattr(thing, name, fail)
            assert held.ask(init_image=SCENE)["error_code"] == "out_of_memory"
    held.ask()
    files, tensors = now()
    assert files <= before[0]
    assert tensors <= before[1]


# ---- what does not fail, and what is nearly no number


@pytest.mark.parametrize("kind", NUMBERS)
def test_what_a_decoder_gets_wrong_once_it_gets_right_in_float32(
    kind: str, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.bucket = None
    expected, strike, calls = pictures(held.ask()), KINDS[kind](held), 0
    decode = pipeline(held).vae.decode

    def once(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        made = decode(*arguments, **options)
        return strike(made) if calls == 1 else made

    with monkeypatch.context() as patch:
        patch.setattr(pipeline(held).vae, "decode", once)
        answer = held.ask()
    assert pictures(answer) == expected
    assert answer["metadata"]["warnings"] == [
        "the decoder's values were not finite: the picture was decoded once more, in float32"
    ]
    assert held.ask()["metadata"]["warnings"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("kind", ["FLUX.1", "FLUX.2"])
def test_a_decoder_in_float32_is_the_decoder_in_float32(
    kind: str, tiled: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """And its weights stay what and where they are, also where they come from elsewhere for each layer."""
    folder = SHAPES if kind == "FLUX.1" else small("klein", tmp_path)
    of = diffusers.AutoencoderKL if kind == "FLUX.1" else diffusers.AutoencoderKLFlux2
    vae = of.from_pretrained(folder / "vae", dtype=dtype)
    exact = copy.deepcopy(vae).float()
    for each in (vae, exact):
        if tiled:
            each.enable_tiling()
    weights = [(parameter, parameter.data_ptr(), parameter.dtype) for parameter in vae.parameters()]
    latents = torch.randn(1, vae.config.latent_channels, 24, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    warnings = list[str]()
    decode = vae.decode

    def overflowing(latents: torch.Tensor, **options: Any) -> Any:
        made = decode(latents, **options)
        return made if latents.dtype == torch.float32 else (torch.full_like(made[0], float("inf")),)

    with torch.inference_mode():
        vae.decode = overflowing
        with finite_decoding(vae, lambda: True, warnings.append):
            found = vae.decode(latents, return_dict=False)[0]
        assert vae.decode is overflowing
        assert torch.equal(found, exact.decode(latents.float(), return_dict=False)[0])
    assert len(warnings) == 1
    assert [(parameter, parameter.data_ptr(), parameter.dtype) for parameter in vae.parameters()] == weights


def test_a_decoder_that_was_offloaded_layer_by_layer_decodes_in_float32_too() -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(SHAPES / "vae", dtype=torch.bfloat16)
    exact = copy.deepcopy(vae).float()
    offloader = Offloader(torch.device("cpu"))
    for layer in vae.decoder.modules():
        if list(layer.parameters(recurse=False)):
            offloader.stream(layer, Home(layer.parameters(recurse=False), torch.device("cpu")))
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    latents[0, 0, 0, 0] = 3e38  # too much for bfloat16 somewhere on its way
    with torch.inference_mode():
        decode = vae.decode
        vae.decode = lambda latents, **options: tuple(
            made if latents.dtype == torch.float32 else made / 0 for made in decode(latents, **options)
        )
        with finite_decoding(vae, lambda: True, lambda _: None):
            found = vae.decode(latents.clamp(-4, 4), return_dict=False)[0]
        assert torch.equal(found, exact.decode(latents.clamp(-4, 4).float(), return_dict=False)[0])
    assert all(parameter.untyped_storage().nbytes() <= 2 for parameter in vae.decoder.parameters())


def test_a_preview_without_memory_or_numbers_is_not_shown(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.engine.preview.SECONDS_BETWEEN", 0)
    expected, decode = pictures(held.ask()), pipeline(held).vae.decode
    for kind in ("the card's memory", *NUMBERS):
        strike, calls = KINDS[kind](held), 0

        def struck(*arguments: Any, strike: Strike = strike, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            made = decode(*arguments, **options)
            return strike(made) if calls < 3 else made  # two previews, then the picture

        with monkeypatch.context() as patch:
            patch.setattr(pipeline(held).vae, "decode", struck)
            answer = held.ask(preview=True)
        assert calls == 3
        assert pictures(answer) == expected
        assert answer["metadata"]["warnings"] == []
    assert pictures(held.ask()) == expected


@pytest.mark.parametrize("kind", NUMBERS)
def test_adaptive_norms_that_are_no_numbers_are_not_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Held(load_engine(Settings(model_name="flux-shapes", memory_mode="modulation_cache")), JobQueue())
    cache = worker.engine._placed_pipeline._modulation_cache
    assert cache is not None
    expected = pictures(worker.ask())
    cache._tables.clear()
    linear, strike = cache._norms[0].linear, KINDS[kind](worker)
    forward = linear.forward
    with monkeypatch.context() as patch:
        patch.setattr(linear, "forward", lambda *arguments: strike(forward(*arguments)))
        answer = worker.ask()
    assert answer["error_code"] == "generation_failed"
    assert "adaptive norms" in answer["error"]
    assert cache._tables == []
    assert pictures(worker.ask()) == expected
    worker.queue.close()


def test_weights_that_came_half_are_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    offloader = Offloader(torch.device("cpu"))
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    x = torch.ones(4)
    expected = [layer(x) for layer in layers]
    for layer in layers:
        offloader.stream(layer, Home(layer.parameters(), torch.device("cpu")))
    copy_ = torch.Tensor.copy_

    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    for layer in layers:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", fail)
            with suppress(MemoryError):
                layer(x)
        assert torch.Tensor.copy_ is copy_
        assert all(torch.equal(each(x), right) for each, right in zip(layers, expected, strict=True))


def test_nothing_depends_on_the_clock_on_the_wall(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"num_images": 2, "preview": True, **ADAPTER}
    expected, now = pictures(held.ask(**fields)), time.time
    jumps = itertools.cycle((0.0, 1e8, -1e8, 3600.0, -3600.0))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + next(jumps))
        held.job = job = Job("job", queue_up=held.queue.ticket, timeout=60)
        event = {"input": {"prompt": "a red circle", **SMALL, **fields}}
        answer = handler.respond(event, job, lambda: Settings(lora_dir=ROOT / "models"), lambda: held.engine)
    assert pictures(answer) == expected
    assert all(0 <= seconds < 60 for seconds in answer["metadata"]["timings"].values())


def test_a_device_that_fails_while_memory_is_freed_is_named(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    expected = pictures(held.ask())
    strike = KINDS["the card's memory"](held)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline(held).vae, "decode", lambda *_, **__: strike(None))
        patch.setattr(torch.cuda, "empty_cache", fail)
        answer = held.ask()
    assert (answer["error_code"], answer["refresh_worker"]) == ("device_failed", True)
    assert pictures(held.ask()) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_half_a_character_in_a_prompt_is_answered_in_utf_8(format: str, held: Held) -> None:
    half = "a red circle \ud800"
    job = Job.of({"id": half})
    for more in ({}, {"dry_run": True}):
        event = {"id": half, "input": {**PLAIN, "prompt": half, "output_format": format, **more}}
        answer = handler.respond(event, job, Settings, lambda: held.engine)
        json.dumps(answer, ensure_ascii=False).encode()
        assert answer.get("error_code") in (None, "invalid_request"), answer

"""Faults at every seam of the road: what the client is told, and that the next request gets the right bytes."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft.tuners.tuners_utils import BaseTunerLayer

import handler
from src.engine import Engine, load_engine
from src.job import Job
from src.job_queue import JobQueue
from src.request.adapters import AdapterStore
from src.response import delivery
from src.response.storage import Bucket
from src.settings import ROOT, Settings
from tests.conftest import base64_of
from tests.small_models import redux
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
LOST_UPLOAD: dict[str, str | None] = {kind: None for kind in KINDS if kind not in ("a cancel", *NUMBERS)}


def pipeline(worker: Held) -> Any:
    return worker.engine._pipeline


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
    "adapter": Seam(lambda worker: (pipeline(worker), "load_lora_weights"), fields=ADAPTER, without=NUMBERS),
    "CLIP": Seam(lambda worker: (pipeline(worker).text_encoder, "forward")),
    "encoder": Seam(lambda worker: (pipeline(worker), "encode_prompt")),
    "Redux": Seam(lambda worker: (worker.engine._redux, "read"), fields={"image_prompt": SCENE}),
    "the picture's latents": Seam(lambda worker: (pipeline(worker).vae, "encode"), fields={"init_image": SCENE}),
    "ControlNet": Seam(
        lambda worker: (worker.engine._controlnets._loaded["flux-shapes-canny"], "forward"),
        fields={"control_image": SCENE},
    ),
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
ROWS = [(seam, kind) for seam, row in SEAMS.items() for kind in KINDS if kind not in row.without]


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
        "step cache": held.transformer.is_cache_enabled,
        "types": {parameter.dtype for network in networks for parameter in network.parameters()},
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name in ("encode", "upload")),
    }


@pytest.mark.parametrize(("seam", "kind"), ROWS)
def test_a_fault_is_told_by_its_code_and_the_next_picture_is_right(
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

"""What makes the same weights faster: the attention kernel, the VAE's memory format, compiled blocks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from src.errors import DeviceFailed, InvalidSettings
from src.settings import Settings
from src.weights.disk import keep

log = logging.getLogger("worker")

_HOPPER = 9  # major compute capability: there cuDNN's attention is the fastest that needs no further package
_AMPERE = 8  # the first with bfloat16


def accelerate(pipeline: Any, settings: Settings, device: torch.device) -> Compiled | None:
    """Set up `pipeline` for `device`; what compiles its blocks, where COMPILE asks for that.

    Raises InvalidSettings where ATTENTION_BACKEND cannot be had.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    backend = settings.attention_backend
    if backend == "auto":
        backend = "_native_cudnn" if major >= _HOPPER else "native"
    try:
        pipeline.transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise InvalidSettings(f"ATTENTION_BACKEND={backend}: {error}") from error
    if device.type == "cuda":
        pipeline.vae.to(memory_format=torch.channels_last)
    wanted = major >= _AMPERE if settings.compile is None else settings.compile
    wanted = wanted and settings.placement_mode != "sequential_offload"  # whose hooks no graph can hold
    return Compiled(pipeline.transformer, _kept(settings, device)) if wanted else None


def _kept(settings: Settings, device: torch.device) -> Path:
    """A file for what was compiled for this model, this card and these versions."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kind = f"{torch.__version__} {diffusers.__version__} {card} {settings.model_name}"
    kind += f" {settings.placement_mode} {settings.attention_backend}"
    return settings.compile_cache_dir / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.bin"


class Compiled:
    """The blocks of a transformer, compiled while it is warmed up: at any other time nobody waits for a compiler.

    All blocks of a kind share one graph, for pictures of any size. What no graph fits, adapters say, runs as it is.
    `kept` is where the next process finds what this one compiled; nothing is kept where its folder cannot be made.
    """

    def __init__(self, transformer: Any, kept: Path, backend: str | Callable[..., Any] = "inductor") -> None:
        self._kept = kept
        self._failed = False
        transformer.requires_grad_(False)  # as adapters leave it, or what was compiled before them would not fit after
        for kind in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(transformer, kind):
                # Its forward and no more: the hooks that bring weights stay outside of the graph.
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)
        torch.compiler.set_stance("eager_on_recompile")
        if kept.is_file():
            torch.compiler.load_cache_artifacts(kept.read_bytes())  # of a broken file it says so, and goes on

    def warm_up(self, draw: Callable[[], object]) -> None:
        """Compile what `draw` needs; where that fails the blocks stay as they are, with a warning."""
        if self._failed:
            draw()
            return
        try:
            with torch.compiler.set_stance("default"):
                draw()
        except DeviceFailed:
            raise
        except Exception as error:  # noqa: BLE001 - compilers raise anything, and compiling takes more than drawing
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            log.warning("torch.compile failed, and blocks run as they are (COMPILE=false is silent): %s", reason)
            torch.compiler.set_stance("force_eager")
            self._failed = True
            draw()
        else:
            self._keep()

    def _keep(self) -> None:
        artifacts = torch.compiler.save_cache_artifacts()
        if artifacts and not self._kept.exists():
            keep(self._kept, "COMPILE_CACHE_DIR", lambda unfinished: unfinished.write_bytes(artifacts[0]))

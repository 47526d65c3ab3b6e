"""What makes the same weights faster: the attention kernel, the VAE's memory format, compiled blocks."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.fx.experimental._config as shapes_config
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from src.catalog import PROFILES
from src.engine.block_timing import lists_of_blocks
from src.engine.lora_slots import LoraSlots
from src.errors import DeviceFailed, InvalidSettings, first_line
from src.settings import Settings
from src.weights.disk import keep

log = logging.getLogger("worker")

_AMPERE = (8, 0)  # compute capability: the first with bfloat16
# Where torch does not choose the fastest attention by itself. On Hopper it does: cuDNN's, and another where that fails.
_ATTENTION = {(12, 0): "_native_cudnn"}  # RTX 5090
COMPILED = "compiled"
_GRAPHS = 256  # of one kind of block, at most: by cards, norms, slots, sizes; torch's own limit of 8 is for surprises


def accelerate(
    pipeline: Any, settings: Settings, device: torch.device, *, modulation_cache: bool = False
) -> Compiled | None:
    """Set up `pipeline` for `device`; what compiles its blocks, where COMPILE asks for that.

    With a `modulation_cache` adaptive norms are asked outside of the blocks. Raises InvalidSettings where
    ATTENTION_BACKEND cannot be had.
    """
    on_card = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_card else (0, 0)
    _set_attention(pipeline.transformer, settings, capability)
    if on_card:
        pipeline.vae.to(memory_format=torch.channels_last)
    wanted = capability >= _AMPERE if settings.compile is None else settings.compile
    if not wanted or settings.placement_mode == "sequential_offload":  # whose hooks no graph can hold
        return None
    slots = LoraSlots(pipeline.transformer, settings.lora_target_ranks, device, modulation=not modulation_cache)
    static_shapes = PROFILES[settings.profile].static_shapes
    return Compiled(pipeline, _kept(settings, device), slots, static_shapes=static_shapes)


def accelerate_controlnet(network: Any, pipeline: Any, compiled: Compiled | None) -> None:
    """Let a ControlNet's blocks run as the transformer's do."""
    network.set_attention_backend(attention_of(pipeline.transformer))
    if compiled:
        compiled.add(network)


def attention_of(transformer: Any) -> str:
    """The attention backend that its blocks use, by diffusers' name."""
    processors = (getattr(module, "processor", None) for module in transformer.modules())
    backends = (getattr(processor, "_attention_backend", None) for processor in processors)
    return str(getattr(found := next(filter(None, backends), "native"), "value", found))


def _set_attention(transformer: Any, settings: Settings, capability: tuple[int, int]) -> None:
    asked, own = settings.attention_backend, _ATTENTION.get(capability, "native")
    device = "cuda" if capability > (0, 0) else "cpu"
    if asked != "auto":
        try:
            _attend_with(transformer, asked, device)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            raise InvalidSettings(f"ATTENTION_BACKEND={asked}: {error}") from error
        return
    for name in PROFILES[settings.profile].attention if device == "cuda" else ():
        try:
            _attend_with(transformer, name, device)
        except Exception as error:  # noqa: BLE001 - kernels of others, which raise anything
            log.info("PROFILE=%s: no %s attention here: %s", settings.profile, name, first_line(error))
        else:
            return
    transformer.set_attention_backend(own)


def _attend_with(transformer: Any, backend: str, device: str) -> None:
    """Set an attention backend; raises what it raises where it cannot be had, or not with masks where those are due."""
    transformer.set_attention_backend(backend)
    if "attention_mask" in inspect.signature(transformer.forward).parameters:
        query = torch.zeros(1, 128, 1, 128, dtype=transformer.dtype, device=device)  # [pictures, tokens, heads, values]
        mask = torch.ones(1, 1, 128, 128, dtype=transformer.dtype, device=device)
        dispatch_attention_fn(query, query, query, attn_mask=mask, backend=AttentionBackendName(backend))


def _kept(settings: Settings, device: torch.device) -> Path:
    """A file for what was compiled for this model, this card and these versions."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kind = f"{torch.__version__} {diffusers.__version__} {card} {settings.model_name}"
    kind += f" {settings.placement_mode} {settings.attention_backend} {settings.profile}"
    kind += f" {device.index}" if device.index else ""
    return settings.compile_cache_dir / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.bin"


class Compiled:
    """A transformer's blocks and the decoder, compiled while they are warmed up: at other times nobody waits for that.

    All blocks of a kind share their graphs, for pictures of any size, ControlNets' blocks among them, and for adapters
    that fit the slots. What no graph fits runs as it is. `kept` is where the next process finds what this one compiled;
    nothing is kept where its folder cannot be made.
    """

    def __init__(
        self,
        pipeline: Any,
        kept: Path,
        lora_slots: LoraSlots,
        backend: str | Callable[..., Any] = "inductor",
        *,
        static_shapes: bool = False,
    ) -> None:
        self._failure: str | None = None
        self._is_warm = False
        self.lora_slots = lora_slots
        self._kept = kept
        self._backend = backend
        self._wants_static = static_shapes
        self._static: set[tuple[Any, ...]] = set()  # shapes that there are graphs for which fit nothing else
        self._making_static = False
        self.add(pipeline.transformer)
        self._compile(pipeline.vae.decoder)
        torch.compiler.set_stance("eager_on_recompile")
        self._in_file = set[tuple[str, str]]()
        if kept.is_file():  # of a broken file torch says so, and goes on
            self._in_file = _keys(torch.compiler.load_cache_artifacts(kept.read_bytes()))

    @property
    def state(self) -> str:
        """COMPILED, or why not."""
        return f"failed: {self._failure}" if self._failure else COMPILED if self._is_warm else "not warmed up"

    def add(self, network: Any) -> None:
        """Let the blocks of a transformer or a ControlNet be compiled, or run graphs that fit them."""
        network.requires_grad_(False)  # as adapters leave it, or what was compiled before them would not fit after
        for blocks in lists_of_blocks(network).values():
            for block in blocks:
                self._compile(block)

    def _compile(self, module: Any) -> None:
        """Its forward and no more: the hooks that bring weights stay outside of the graph."""
        forward = module.forward
        of_attention = "joint_attention_kwargs" in inspect.signature(forward).parameters
        compiled = partial(torch.compile, fullgraph=True, backend=self._backend)
        for_any, for_one = compiled(forward, dynamic=True), compiled(_twin(module), dynamic=False)

        @functools.wraps(forward)
        def run(*inputs: Any, **named: Any) -> Any:
            if self._failure:  # not by torch's stance, which is that of all cards' blocks
                return forward(*inputs, **named)
            if of_attention and named.get("joint_attention_kwargs") is None:  # of some networks None, of others {}
                named["joint_attention_kwargs"] = {}
            if self._wants_static:
                given = (*inputs, *named.values())
                shapes = (type(module), *(each.shape for each in given if isinstance(each, torch.Tensor)))
                if self._making_static:
                    self._static.add(shapes)
                if shapes in self._static:
                    return for_one(*inputs, **named)
            return for_any(*inputs, **named)

        module.forward = run

    def warm_up(self, draw: Callable[[], object]) -> None:
        """Compile what `draw` needs, without adapters and with slots for them; where that fails it runs as it is."""
        if self._failure:
            draw()
            return
        if reason := self._fails(draw):
            log.warning("torch.compile failed, and blocks run as they are (COMPILE=false is silent): %s", reason)
            self._failure = reason
            self.lora_slots.give_up()
            draw()
            return
        self._is_warm = True
        for rank in self.lora_slots.ranks:
            with self.lora_slots.empty(rank):
                reason = self._fails(draw)
            if reason:
                log.warning("torch.compile failed, and adapters run uncompiled: LORA_TARGET_RANKS=%s: %s", rank, reason)
                self.lora_slots.give_up()
                break
            self.lora_slots.compiled.add(rank)

    def _fails(self, draw: Callable[[], object]) -> str | None:
        """Why what `draw` needs cannot be compiled; None where it was."""
        try:
            with _compiling():
                draw()
                if self._wants_static:
                    self._making_static = True
                    draw()
        except DeviceFailed:
            raise
        except Exception as error:  # noqa: BLE001 - compilers raise anything, and compiling takes more than drawing
            return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        finally:
            self._making_static = False
        return None

    def keep(self) -> None:
        """Write what was compiled, where the file lacks some of it; once, after all is warmed up.

        What torch 2.13 serializes a second time loads without what it serialized the first time.
        """
        artifacts = torch.compiler.save_cache_artifacts() if self.state == COMPILED else None
        if artifacts and not _keys(artifacts[1]) <= self._in_file:
            keep(self._kept, "COMPILE_CACHE_DIR", lambda unfinished: unfinished.write_bytes(artifacts[0]))


@contextmanager
def _compiling() -> Iterator[None]:
    """Within it what is called is compiled. Settings of torch's compiler are each thread's own (torch 2.13)."""
    with (
        torch.compiler.set_stance("default"),
        torch._dynamo.config.patch(recompile_limit=max(_GRAPHS, torch._dynamo.config.recompile_limit)),
        # Or a picture whose tokens are as many as a layer is wide would be compiled for that one size.
        shapes_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        yield


def _twin(module: Any) -> Any:
    """`module.forward` once more: torch keeps graphs by code, and would run dynamic ones where static ones are due."""
    return types.MethodType(_twin_of(type(module).forward), module)


@functools.cache
def _twin_of(function: Any) -> Any:
    code = function.__code__.replace(co_name=f"{function.__name__}_of_one_shape")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def _keys(info: Any) -> set[tuple[str, str]]:
    """Of what torch's caches hold: kinds and keys."""
    return {(kind, key) for kind, keys in info.artifacts.items() for key in keys} if info else set()

"""Runs a Plan on a loaded pipeline: prompts encoded once, pictures denoised one after another.

Knows nothing of what a client wrote, of how a model is found, or of how pictures travel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch

from src.catalog import EXACT, SCHEDULERS, SPEEDS, Model, Scheduler
from src.engine.acceleration import COMPILED, Compiled, accelerate_controlnet, attention_of
from src.engine.adapters import Adapters
from src.engine.block_timing import BlockSeconds, compared, of_a_step, time_blocks
from src.engine.controlnets import ControlNets
from src.engine.denoise import Decoded, Denoiser, Noise, finish, noise_ahead
from src.engine.failures import as_worker_errors
from src.engine.loading_lock import LOADING
from src.engine.lora_slots import SLOTS
from src.engine.machine import on_device
from src.engine.memory import free_memory, is_out_of_memory
from src.engine.phases import Phases
from src.engine.pipelines import pipeline_class
from src.engine.placed_pipeline import PlacedPipeline
from src.engine.prompts import Prompts
from src.engine.quantization import has_products
from src.engine.redux import REDUX, Redux
from src.engine.schedulers import make_scheduler
from src.engine.upsampling import UPSAMPLER, PromptUpsampler
from src.errors import Cancelled, Fault, TimedOut, let_go
from src.job import OnProgress
from src.outputs import Generation, Loaded
from src.plan.plan import Plan
from src.request.adapters import Adapter
from src.settings import Settings
from src.weights.files import Files
from src.weights.ledger import Ledger, PlacementChoice
from src.weights.placement import Placement

log = logging.getLogger("worker")
T = TypeVar("T")


class Together(Protocol):
    """Other processes that take their share of each picture."""

    @property
    def devices(self) -> tuple[str, ...]:
        """All that draw, this process's first."""

    def drawing(self) -> AbstractContextManager[None]:
        """Within it a plan is drawn; raises DeviceFailed where one of them was lost."""

    def use_adapters(self, adapters: Sequence[Adapter]) -> None:
        """As Engine.use_adapters."""

    def forget_adapters(self) -> None:
        """As Engine.forget_adapters."""


class Engine:
    """A pipeline of the family in `model`'s row, and the only one who calls it; one plan at a time."""

    def __init__(
        self,
        pipeline: Any,
        model: Model,
        revision: str | None,
        *,
        settings: Settings | None = None,
        files: Files | None = None,
        placed_pipeline: PlacedPipeline | None = None,
        compiled: Compiled | None = None,
        choice: PlacementChoice | None = None,
        reads_ahead: bool | None = None,
    ) -> None:
        """`reads_ahead` is whether prompts are read while another picture is drawn: by default on a card."""
        settings = settings or Settings()
        files = files or Files(settings)
        self.model = model
        self.revision = revision
        self._pipeline = pipeline
        self._views = {model.base.class_name: pipeline}
        self._placed_pipeline = placed_pipeline or PlacedPipeline(pipeline, None, pipeline.device)
        self._compiled = compiled
        self._profile = settings.profile
        self._blocks: Mapping[str, BlockSeconds] = {}  # of each kind, once warmed up
        self._alone = threading.Lock()
        self._text_encoders = threading.RLock()  # their weights stay as they are for whoever holds it
        self._side: Any = None  # the stream of what is read ahead
        if reads_ahead is None:
            reads_ahead = self._placed_pipeline.device.type == "cuda"
        # One thread, as on the device: CUDA keeps handles and workspaces for each that ever used it.
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="prompts") if reads_ahead else None
        self._together: Together | None = None
        ledger = self._ledger = Ledger(self._placed_pipeline.placement, choice, self._arrange)
        slots = compiled.lora_slots if compiled else None
        self._adapters = Adapters(pipeline, settings, ledger, slots)
        device = self._placed_pipeline.device
        as_fast = partial(accelerate_controlnet, pipeline=pipeline, compiled=compiled)
        self._controlnets = ControlNets(pipeline, model, files, device, ledger=ledger, on_load=as_fast)
        self._redux = Redux(pipeline, settings.redux_model, files, device, ledger)
        self._prompts = Prompts(pipeline, self._redux, device)
        self._upsampler = PromptUpsampler(pipeline, device)
        self._attention = attention_of(pipeline.transformer)  # now: others ask while the transformer's layers change
        self._own_scheduler = pipeline.scheduler
        own = type(pipeline.scheduler).__name__
        rows = (name for name, row in SCHEDULERS.items() if row.class_name == own and not row.config)
        self._own_scheduler_name = next(rows, own)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.enable_attention_slicing()  # the specification's; nothing of FLUX can be sliced (diffusers 0.42)

    def prepare(self, plan: Plan) -> Noise:
        """What of `plan` needs no turn on the device: its noise, and its prompts while another picture is drawn.

        Nothing of it fails: what cannot be had now is had in the turn.
        """
        if self._ahead:
            self._ahead.submit(self._read_ahead, plan).result()
        return self.draw_noise(plan)

    def draw_noise(self, plan: Plan) -> Noise:
        """What the seeds of `plan` mean, on the CPU, where that can be said ahead."""
        return noise_ahead(self._pipeline, plan)

    def draw(self, plan: Plan, on_progress: OnProgress | None = None, noise: Noise = MappingProxyType({})) -> Drawn:
        """The plan's turn on the device; `on_progress` gets every step, and what it raises stops the plan there.

        Where memory is short it is freed and what is idle leaves, then more of the model streams, then pictures are
        drawn one by one, then decoded in tiles; warnings say so of the last two.

        Raises OutOfMemory, GenerationFailed, ModelUnavailable, WorkerUnavailable, DeviceFailed or what `on_progress`
        raised; the engine is then as before, but for DeviceFailed.
        """
        with (
            self._alone,
            on_device(self.device),
            as_worker_errors(plan),
            self._left_clean(),
            self._together.drawing() if self._together else nullcontext(),
            torch.inference_mode(),
        ):
            return self._draw(plan, on_progress or (lambda _: None), noise)

    def run(self, plan: Plan, on_progress: OnProgress | None = None) -> Generation:
        """The plan's pictures, all at a stroke; raises as `draw` does."""
        return self.draw(plan, on_progress).generation()

    def _draw(self, plan: Plan, on_progress: OnProgress, noise: Noise) -> Drawn:
        warnings: list[str] = []
        if self._together and SPEEDS[plan.sampling.speed]:  # what is guessed is kept in each process of its own
            warnings.append(f"speed {plan.sampling.speed} has no effect where several cards draw one picture")
            plan = replace(plan, sampling=plan.sampling.model_copy(update={"speed": EXACT}))

        # 1. The pipeline of the plan's mode, set anew
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        phases = Phases(plan.steps * len(plan.seeds), on_progress, self._synchronize)
        view = self._view(plan)
        scheduler = plan.sampling.scheduler or self._own_scheduler_name
        row = SCHEDULERS.get(scheduler) or Scheduler(scheduler)
        view.scheduler = make_scheduler(self._own_scheduler, row, plan.sampling.shift)

        # 2. Adapters, ControlNets and prompts
        arguments: dict[str, Any] = {}
        for other in self._views.values():
            other.controlnet = None  # or it would hold networks that make room now
        with self._text_encoders:
            if plan.adapters:
                phases.begin("load_adapters")
            self.use_adapters(plan.adapters, _extras(plan))
            if plan.spec.controlnet:
                phases.begin("load_controlnets")
                view.controlnet, arguments = self._controlnets.use(plan.controls)
        if plan.sampling.prompt_upsampling:  # which takes long: meanwhile the next job's prompts may be read
            phases.begin("upsample_prompt")
            captions, cut = self._upsample(plan, phases)
            warnings += cut
            plan = plan.upsampled(captions)
        with self._text_encoders:
            phases.begin("encode_prompt")
            if "image_prompt" in plan.pictures:
                self._redux.load()
            with LOADING.drawing():
                prompts = {
                    prompt: self._with_room(partial(self._prompts.read, plan, prompt))
                    for prompt in dict.fromkeys(plan.prompts)
                }
            unread = self._prompts.warnings(plan)  # a tokenizer is not for two threads at once
            self._ledger.done_with(REDUX)

        # 3. Pictures
        with LOADING.drawing():
            self._placed_pipeline.prepare(view)
            denoiser = Denoiser(view, plan, arguments, phases, self._placed_pipeline, noise=noise, ledger=self._ledger)
            drawn = [denoiser.draw(seeds, prompts[prompt]) for prompt, seeds in plan.batches()]
        phases.end()
        return Drawn(
            plan,
            tuple(decoded for batch in drawn for decoded in batch),
            Generation(
                pictures=(),
                scheduler=scheduler,
                timings=phases.seconds,
                warnings=(*warnings, *unread, *self._adapters.warnings, *denoiser.warnings),
                peak_memory=torch.cuda.max_memory_allocated() if self._on_cuda else None,
                quantization=self._placed_pipeline.quantization,
                profile=self._profile,
                device=" ".join(self.devices),
                prompts=plan.prompts,
                prompt_tokens=sum(prompts[prompt]["prompt_embeds"].shape[1] for prompt in plan.prompts),
            ),
        )

    def _read_ahead(self, plan: Plan) -> None:
        """Read the plan's prompts, where text encoders are on the device to stay and no adapter changes them."""
        with (
            self._text_encoders,
            LOADING.drawing(),
            on_device(self.device),
            torch.inference_mode(),
            self._on_the_side(),
        ):
            if "image_prompt" in plan.pictures or plan.adapters or self._adapters.change_text_encoders:
                return
            if plan.sampling.prompt_upsampling:  # what will be read is not written yet
                return
            if not self._placed_pipeline.text_encoders_stay:
                return
            try:
                for prompt in dict.fromkeys(plan.prompts):
                    self._prompts.remember(plan, prompt)
            except Exception as error:  # noqa: BLE001 - the plan's own turn meets it, and knows what to do
                let_go(error)

    def _on_the_side(self) -> AbstractContextManager[object]:
        """Within it a card does what it is asked for beside what other threads asked it for."""
        if not self._on_cuda:
            return nullcontext()
        self._side = self._side or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._side)

    def _arrange(self, placement: Placement) -> bool:
        """Bring the model's weights to another placement, while nobody reads prompts with them."""
        with self._text_encoders:
            return self._placed_pipeline.arrange(placement)

    @property
    def device(self) -> torch.device:
        """Of this process, where it draws."""
        return self._placed_pipeline.device

    @property
    def devices(self) -> tuple[str, ...]:
        """All that draw, as torch names them."""
        return self._together.devices if self._together else (str(self.device),)

    @property
    def at_once(self) -> int:
        """How many plans it draws at once."""
        return 1

    @property
    def transformer(self) -> Any:
        """What denoises."""
        return self._pipeline.transformer

    def draw_together(self, others: Together) -> None:
        """Let `others`, which call the transformer with this engine, have its adapters too."""
        self._together = others

    def use_adapters(self, adapters: Sequence[Adapter], extras: Collection[str] = ()) -> None:
        """A job begins: let exactly these count for its pictures. It wants `extras` too, by the ledger's names."""
        slots = {SLOTS} if adapters else set()
        self._ledger.begin({adapter.name for adapter in adapters}.union(slots, extras))
        self._adapters.use(adapters)
        if self._together:
            self._together.use_adapters(adapters)

    def forget_adapters(self) -> None:
        """The picture failed: its adapters are read anew where they are asked for again."""
        with self._text_encoders:
            self._adapters.forget_used()
        if self._together:
            self._together.forget_adapters()

    def share_adapters(self, other: Engine) -> None:
        """Check and read adapters' files together with `other`: a job may come to either."""
        self._adapters.share(other._adapters)

    def check_adapters(self, adapters: Sequence[Adapter]) -> tuple[list[Fault], list[str]]:
        """Why adapters do not fit this model, and warnings of what is not applied; takes no time of the device."""
        return self._adapters.check(adapters)

    def loaded(self) -> Loaded:
        """What is in memory, and where."""
        placement, device = self._placed_pipeline.placement, self._placed_pipeline.device
        return Loaded(
            self._adapters.in_memory,
            self._controlnets.in_memory,
            placement.summary() if placement else {},
            {
                "profile": self._profile,
                "products_in_8_bits": self._placed_pipeline.quantization == "fp8" and has_products(device),
                "attention": self._attention,
                "compiled": self._compiled.state if self._compiled else "off",
            },
        )

    def load_controlnets(self, names: Sequence[str]) -> None:
        """Load these at the start, and keep them; raises InvalidSettings, ModelUnavailable or OutOfMemory."""
        with on_device(self.device):
            self._controlnets.load(names)

    def fetch(self, plan: Plan, before_download: Callable[[], None] = lambda: None) -> None:
        """See that all that only this plan needs is on this machine and made for this model; takes no device time.

        Raises ModelUnavailable with the reason where it is not.
        """
        self._controlnets.fetch(plan.controls, before_download)
        if "image_prompt" in plan.pictures:
            self._redux.fetch(before_download)

    def warm_up(self, plan: Plan, steps: int) -> float:
        """Draw `plan` and throw it away; the seconds that it takes, once warm, with `steps` steps."""
        if self._compiled:
            self._compiled.warm_up(lambda: self.run(plan))
        else:
            self.run(plan)
        warm = self.run(plan)
        step = warm.timings["denoise"] / plan.steps
        placement, own_size = self._placed_pipeline.placement, (self.model.width, self.model.height)
        is_modelled = plan.spec == self.model.base and plan.canvas == own_size and len(plan.seeds) == 1
        if placement and is_modelled and not self._blocks:
            compiled = self._compiled is not None and self._compiled.state == COMPILED
            transformer = self._pipeline.transformer
            self._blocks = time_blocks(transformer, lambda: self.run(plan), self._synchronize, compiled=compiled)
            log.info("%s", compared(placement, step, warm.peak_memory, self._blocks, transformer))
            self._ledger.learn(of_a_step(transformer, self._blocks))
        return sum(warm.timings.values()) + step * (steps - plan.steps)

    def keep_compiled(self) -> None:
        """Let the next process find what the warm-up compiled."""
        if self._compiled:
            self._compiled.keep()

    @contextmanager
    def _left_clean(self) -> Iterator[None]:
        """However a plan ends, nothing of it stays: no tensors in dead frames, no weights that hooks brought in.

        A card tells of what went wrong when it is next waited for: that is now, and not in another's picture.
        """
        try:
            yield
        except BaseException as error:
            let_go(error)
            if not isinstance(error, (Cancelled, TimedOut)):
                self.forget_adapters()
            self._pipeline.maybe_free_model_hooks()
            self._synchronize()
            raise

    def _upsample(self, plan: Plan, phases: Phases) -> tuple[Sequence[str], Sequence[str]]:
        """The plan's captions, and warnings. What writes them is whole on the device meanwhile, where that can be."""
        new = not self._upsampler.remembers(plan)
        with LOADING.drawing(), self._ledger.onloaded(UPSAMPLER) if new else nullcontext():
            return self._with_room(lambda: self._upsampler.write(plan, phases.go_on))

    def _with_room(self, read: Callable[[], T]) -> T:
        """What text encoders `read`; memory that is short is freed, and what is idle leaves, once."""
        try:
            return read()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_memory(error)
            self._ledger.give()
        return read()

    def _view(self, plan: Plan) -> Any:
        """The pipeline of the plan's mode, which shares every weight with the one that was loaded."""
        name = plan.spec.class_name
        if name not in self._views:
            networks = {"controlnet": None} if plan.spec.controlnet else {}  # set for each plan
            with torch.inference_mode(False), torch.no_grad():  # fp8 weights cannot be looked at within it
                view = pipeline_class(name).from_pipe(self._pipeline, dtype=self._pipeline.dtype, **networks)
            view.set_progress_bar_config(disable=True)
            self._views[name] = view
        return self._views[name]

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"


def _extras(plan: Plan) -> set[str]:
    """What the plan wants on the card with the model and its adapters, by the ledger's names."""
    nets = {control.net.name for control in plan.controls if control.net}
    return nets | ({REDUX} if "image_prompt" in plan.pictures else set())


@dataclass(frozen=True)
class Drawn:
    """What a plan became on the device; the rest needs no turn there."""

    plan: Plan
    decoded: tuple[Decoded, ...]
    facts: Generation  # but for its pictures

    def generation(self) -> Generation:
        """With its pictures, once they have come from the device; raises DeviceFailed where they do not."""
        with as_worker_errors(self.plan):
            pictures = [picture for decoded in self.decoded for picture in decoded.pictures()]
        return replace(self.facts, pictures=tuple(finish(picture, self.plan) for picture in pictures))

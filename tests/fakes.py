"""A pipeline that draws nothing, for what the shipped model cannot be made to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from src.job import Job


def never(event: object, job: Job) -> dict[str, Any]:
    """The answer of a worker that is asked for none."""
    raise AssertionError(f"nobody should ask for {event}, {job.id}")


class FakeVae:
    """Remembers how it was told to decode."""

    def __init__(self) -> None:
        self.tiling = self.slicing = False

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (latents,)

    def enable_tiling(self) -> None:
        self.tiling = True

    def disable_tiling(self) -> None:
        self.tiling = False

    def enable_slicing(self) -> None:
        self.slicing = True

    def disable_slicing(self) -> None:
        self.slicing = False


class FakePipeline:
    """Takes what FluxPipeline takes; the next calls raise `failures`, each step ends with `latents`."""

    def __init__(self, *failures: Exception, latents: float = 0.0) -> None:
        self.device = torch.device("cpu")
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.failures = list(failures)
        self.decode_failures: list[Exception] = []
        self.latents = latents
        self.calls: list[dict[str, Any]] = []
        self.sliced = False
        self.vae = FakeVae()
        self.transformer = torch.nn.Identity()
        self.hooks_freed = 0
        self.read: list[str] = []
        self.components: dict[str, Any] = {}

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def enable_attention_slicing(self) -> None:
        self.sliced = True

    def maybe_free_model_hooks(self) -> None:
        self.hooks_freed += 1

    def tokenizer_2(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.split())

    def encode_prompt(self, prompt: str, prompt_2: str | None, max_sequence_length: int) -> tuple[torch.Tensor, ...]:
        self.read.append(prompt)
        return torch.zeros(1, max_sequence_length, 4), torch.zeros(1, 4), torch.zeros(max_sequence_length, 3)

    def __call__(
        self, *, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor, **others: Any
    ) -> SimpleNamespace:
        arguments = {**others, "prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        self.calls.append(arguments)
        if self.failures:
            raise self.failures.pop(0)
        for step in range(arguments["num_inference_steps"]):
            arguments["callback_on_step_end"](self, step, 0, {"latents": torch.tensor(self.latents)})
        if self.decode_failures:
            raise self.decode_failures.pop(0)
        return SimpleNamespace(
            images=torch.zeros(arguments["num_images_per_prompt"], 3, arguments["height"], arguments["width"])
        )

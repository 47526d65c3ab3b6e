"""A plan's scheduler, and those of diffusers that need a word to work with FLUX's pipelines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import diffusers
import torch

from src.catalog import Scheduler


class _OwnSigmas(diffusers.SchedulerMixin):  # type: ignore[misc]
    """Spaces its steps by itself: some of FLUX's pipelines hand over the model's sigmas without asking for that."""

    last_sigma: float | None = None  # instead of diffusers' own

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As diffusers' own with as many steps; of `sigmas` only the number counts."""
        steps = num_inference_steps if sigmas is None else len(sigmas)
        config = self.config
        if config.get("base_shift") == config.get("max_shift"):  # a fixed shift, which FLUX.2's pipelines do not read
            mu = config.get("base_shift", mu)
        super().set_timesteps(steps, device=device, mu=mu)
        if self.last_sigma is not None:
            self.sigmas[-1] = self.last_sigma


class FlowDPMSolverScheduler(_OwnSigmas, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM++ 2M."""


class FlowUniPCScheduler(_OwnSigmas, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC."""


class FlowDEISScheduler(_OwnSigmas, diffusers.DEISMultistepScheduler):  # type: ignore[misc]
    """DEIS whose last step takes the noise away.

    diffusers 0.42 repeats the last sigma, so that the last step goes nowhere; at 0 its logarithm has no value, so the
    picture keeps a thousandth of noise, less than one of 256 levels.
    """

    last_sigma = 1e-3


class FlowHeunScheduler(diffusers.FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """Heun that takes the sigmas and the shift that FLUX's pipelines hand over; two calls of the model a step."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """`sigmas` fall from 1, one per step; `mu` is the logarithm of the shift where that depends on the size.

        A shift s makes s * sigma / (1 + (s - 1) * sigma) of sigma (arXiv 2403.03206, equation 23).
        """
        if sigmas is None:
            sigmas = torch.linspace(1, 1 / (num_inference_steps or 1), num_inference_steps or 1).tolist()
        super().set_timesteps(len(sigmas), device=device)
        shift = math.exp(mu) if self.config.get("use_dynamic_shifting") and mu is not None else self.config.shift
        steps = torch.tensor([shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas], dtype=torch.float32)
        twice = torch.cat([steps[:1], steps[1:].repeat_interleave(2)])
        self.sigmas = torch.cat([twice, torch.zeros(1)])
        self.timesteps = (twice * self.config.num_train_timesteps).to(device)


def make_scheduler(own: Any, row: Scheduler, shift: float | None) -> Any:
    """A new scheduler of `row` with the configuration of the model's `own` one, and the request's `shift`."""
    configuration = dict(own.config)
    if shift is not None:
        configuration |= {"shift": shift, "use_dynamic_shifting": False}
    found = globals().get(row.class_name) or getattr(diffusers, row.class_name)
    scheduler = found.from_config({**configuration, **row.config})
    scheduler.register_to_config(use_dynamic_shifting=configuration["use_dynamic_shifting"])  # Heun's own drops it
    if not row.flow_match:
        # These take a shift from FLUX's pipelines only as exp(mu), where mu lies between base_shift and max_shift;
        # from_config drops both.
        mu = math.log(configuration["shift"])
        dynamic = configuration["use_dynamic_shifting"]
        shifts = (configuration["base_shift"], configuration["max_shift"]) if dynamic else (mu, mu)
        scheduler.register_to_config(
            use_dynamic_shifting=True, time_shift_type="exponential", base_shift=shifts[0], max_shift=shifts[1]
        )
    return scheduler

"""The loop that every stage shares: AdamW on one cycle, an average of the weights, resumable, logged."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT_EVERY = 100
LOG_EVERY = 20


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[int, random.Random], Tensor],
    *,
    run: Path,
    steps: int,
    learning_rate: float | dict[str, float],
    average: float,
) -> nn.Module:
    """Train `network` in place until `loss(step, rng)` has been lowered `steps` times; load the averaged weights.

    `learning_rate` is the peak of the cycle, for the whole network or for each of its children by name.

    Every step's randomness comes from its number, so a run that was cut off goes on from its last
    checkpoint (`run/<name>.pt`) as if it never stopped. Losses go to `run/<name>.jsonl`.
    """
    network.train().requires_grad_(True)
    rates = learning_rate if isinstance(learning_rate, dict) else {"": learning_rate}
    groups = [{"params": network.get_submodule(child).parameters(), "lr": rate} for child, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates.values()), total_steps=steps, pct_start=0.05)
    averaged = torch.optim.swa_utils.AveragedModel(
        network,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(average),  # type: ignore[no-untyped-call]
    )
    checkpoint, log = run / f"{name}.pt", run / f"{name}.jsonl"
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule, "averaged": averaged}
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("step")
        for key, state in saved.items():
            parts[key].load_state_dict(state)

    recent: list[float] = []
    started = time.perf_counter()
    for step in range(first, steps):
        torch.manual_seed(step)
        value = loss(step, random.Random(step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
        recent.append(value.item())
        if (step + 1) % LOG_EVERY == 0:
            seconds = (time.perf_counter() - started) / LOG_EVERY
            row = {"step": step + 1, "loss": sum(recent) / len(recent), "seconds_per_step": round(seconds, 3)}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, row, flush=True)
            recent, started = [], time.perf_counter()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            save({"step": step + 1, **{key: part.state_dict() for key, part in parts.items()}}, checkpoint)
    network.load_state_dict(averaged.module.state_dict())
    return network.eval().requires_grad_(False)


def save(state: object, path: Path) -> None:
    """torch.save, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)

"""`python -m benchmarks.adapters`: how exact an adapter in a slot of compiled blocks is, in bfloat16, without a card.

One linear of FLUX.1's width (3072 to 12288) gets random adapters of several ranks in three ways: PEFT's layer, a slot
(src/engine/lora_slots.py) and merged into the weights. Each is held against the merged truth in float64, as the norm of
the difference in norms of what the adapter adds. Then the shipped adapter's pictures on flux-shapes in bfloat16. Writes
results/adapters.json.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from benchmarks.machine import machine
from src.engine import Engine, load_engine
from src.engine.lora_slots import LoraSlots
from src.job import Job
from src.plan.plan import make_plan
from src.request.adapters import AdapterStore
from src.request.reading import read_request
from src.settings import ROOT, Settings

RESULTS = ROOT / "benchmarks" / "results"
INTO, OUT, TOKENS = 3072, 12288, 256
SLOT = 128
RANKS = (4, 16, 32, 64, 128)
SCALE = 0.8
SHARE = 0.1  # of the answer's norm, about what an adapter adds


def main() -> None:
    results = {"machine": machine(), "slot": SLOT, "linear": {rank: one_linear(rank) for rank in RANKS}}
    results["pictures"] = pictures()
    (RESULTS / "adapters.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def one_linear(rank: int) -> dict[str, float]:
    """Of each way, how far its answers are from the truth; the layer's own is without the adapter's rounding."""
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    linear = nn.Linear(INTO, OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(normal(OUT, INTO) / INTO**0.5)
    x, down, up = normal(TOKENS, INTO), normal(rank, INTO) / INTO**0.5, normal(OUT, rank) * SHARE / rank**0.5
    layer = Linear(linear, "one", LoraConfig(r=rank, lora_alpha=rank), r=rank, lora_alpha=rank)
    layer.lora_A["one"].weight.data, layer.lora_B["one"].weight.data = down, up
    layer.scaling["one"] = SCALE

    block = nn.Module()
    block.linear = layer
    network: Any = nn.Module()
    network.transformer_blocks, network.dtype = nn.ModuleList([block]), torch.bfloat16
    block.linear = linear
    slots = LoraSlots(network, (SLOT,), torch.device("cpu"))
    block.linear = layer
    slots.compiled.add(SLOT)

    weight = linear.weight.double()
    truth = x.double() @ (weight + SCALE * up.double() @ down.double()).T
    added = truth - x.double() @ weight.T
    merged = (weight + SCALE * up.double() @ down.double()).bfloat16()
    answers = {"the layer's own": linear(x) + added, "PEFT": layer(x), "merged": nn.functional.linear(x, merged)}
    slots.put_in()
    answers["slot"] = block.linear(x)
    return {way: round(float((answer.double() - truth).norm() / added.norm()), 5) for way, answer in answers.items()}


def pictures() -> dict[str, float | None]:
    """Decibels between the shipped adapter's pictures in bfloat16, by PEFT's layers and slots, and those in float32."""
    exact = load_engine(Settings(model_name="flux-shapes"))
    found: dict[str, float | None] = {}
    for way in ("PEFT", "slot"):
        engine = load_engine(Settings(model_name="flux-shapes"))
        engine._pipeline.to(torch.bfloat16)
        if way == "slot":
            slots = LoraSlots(engine.transformer, (SLOT,), torch.device("cpu"))
            slots.compiled.add(SLOT)
            engine._adapters._slots = slots
        errors = []
        for seed in range(8):
            one, other = (draw(each, seed) for each in (engine, exact))
            errors.append(float(((one - other) ** 2).mean()))
        error = float(np.mean(errors))
        found[way] = round(10 * np.log10(255**2 / error), 1) if error else None
    return found


def draw(engine: Engine, seed: int) -> np.ndarray[Any, Any]:
    """One picture with the shipped adapter."""
    settings = Settings(lora_dir=ROOT / "models")
    fields = {"prompt": "a large red circle on a blue background", "seed": seed, "lora_scale": SCALE}
    request, faults, _ = read_request(
        {"input": {**fields, "lora_path": "flux-shapes-outline/pytorch_lora_weights.safetensors"}}
    )
    adapters, _, _ = AdapterStore(settings).load(request, Job())
    engine.check_adapters(adapters)
    plan = make_plan(request, faults, engine.model, adapters=adapters, max_pixels=128 * 128)
    return np.asarray(engine.run(plan).pictures[0], float)


if __name__ == "__main__":
    main()

"""The cards that RunPod rents to serverless workers. A new row is a new `--gpu`."""

from __future__ import annotations

from dataclasses import dataclass

from src.weights.placement import GB, Machine

# At which share of a card's peak FLUX runs: compiled FLUX.1-dev takes 4.21 s on an H100 for 28 steps of 1024x1024 in
# bfloat16 (published for diffusers), which at 989 TFLOP/s would be 2.1 s.
SHARE_OF_PEAK = 0.5


@dataclass(frozen=True)
class Card:
    """One kind of card; figures are those of the first of `types`.

    Pools and types: https://docs.runpod.io/references/gpu-types. Dollars: flex workers of
    https://docs.runpod.io/serverless/pricing. TFLOP/s: NVIDIA's data sheets, bfloat16 without sparsity. The host's
    memory is what https://www.runpod.io/pricing gives a pod with one card; of serverless workers RunPod says nothing.
    """

    name: str
    pool: str
    types: tuple[str, ...]  # RunPod's ids, the one to rent first in front
    memory_gb: int
    host_memory_gb: int
    tflops: float
    bandwidth_gb: int  # a second from the host's memory: PCIe 4 or 5 as it is reached
    dollars: float  # a second

    @property
    def machine(self) -> Machine:
        """The card as the placement sees it."""
        flops = self.tflops * 1e12 * SHARE_OF_PEAK
        return Machine(self.name, self.memory_gb * GB, self.host_memory_gb * GB, flops, self.bandwidth_gb * GB)


CARDS: tuple[Card, ...] = (
    Card("RTX 4090", "ADA_24", ("NVIDIA GeForce RTX 4090",), 24, 41, 165, 25, 0.00031),
    Card("A40", "AMPERE_48", ("NVIDIA A40", "NVIDIA RTX A6000"), 48, 50, 150, 25, 0.00034),
    Card("L40S", "ADA_48_PRO", ("NVIDIA L40S",), 48, 94, 362, 25, 0.00053),
    Card("A100", "AMPERE_80", ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"), 80, 117, 312, 25, 0.00076),
    Card("H100", "ADA_80_PRO", ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"), 80, 125, 989, 50, 0.00116),
    Card("H200", "HOPPER_141", ("NVIDIA H200",), 141, 276, 989, 50, 0.00155),
)


def find_card(name: str) -> Card | None:
    """The row with this name, pool or type, in any case and with or without the maker's words."""
    wanted = _plain(name)
    return next((card for card in CARDS if wanted in map(_plain, (card.name, card.pool, *card.types))), None)


def _plain(name: str) -> str:
    words = name.lower().replace("-", " ").split()
    return " ".join(word for word in words if word not in ("nvidia", "geforce", "rtx"))

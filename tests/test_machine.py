"""What a card has free, with fakes at the card's seams."""

from __future__ import annotations

import pytest
import torch

from src.engine import machine
from src.weights.placement import GB

CARD = torch.device("cuda", 0)


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A card of 80 GB of which CUDA's context has half a gigabyte and torch's allocator two; its fractions as set."""
    found: list[float] = []
    monkeypatch.setattr(machine, "_flops", lambda *_: 7e14)
    monkeypatch.setattr(machine, "_bandwidth", lambda *_: 5e10)
    for name, value in {
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (int(77.5 * GB), 80 * GB),
        "memory_reserved": lambda *_: 2 * GB,
        "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
        "set_per_process_memory_fraction": found.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_the_context_counts_towards_a_card_s_limit(fractions: list[float]) -> None:
    found = machine.measure(CARD, torch.bfloat16, 24)
    assert found.memory == 23.5 * GB
    assert fractions == [pytest.approx(23.5 / 80)]


def test_without_a_limit_all_that_is_free_may_be_used(fractions: list[float]) -> None:
    assert machine.measure(CARD, torch.bfloat16).memory == 77.5 * GB
    assert fractions == []


def test_a_limit_below_the_context_leaves_nothing_and_is_no_error_of_torch_s(fractions: list[float]) -> None:
    assert machine.measure(CARD, torch.bfloat16, 0.1).memory == 0
    assert fractions == [0.0]


def test_a_limit_above_the_card_is_the_card(fractions: list[float]) -> None:
    assert machine.measure(CARD, torch.bfloat16, 100).memory == 77.5 * GB
    assert fractions == [1.0]

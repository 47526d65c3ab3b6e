"""What benchmarks/encoding.py compares is the same picture, however it is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.encoding import ASSEMBLIES, WAYS, assembly, files, plot, response, shapes
from benchmarks.photographs import photographs
from benchmarks.readme import encoding


def test_small_pictures_go_through_every_way() -> None:
    pictures = {"photographs": photographs(2, 64), "shapes": [shapes(64)]}
    ways = files(pictures, rounds=1)  # asserts that exact ways are exact
    assert [row["way"] for row in ways] == list(map(str, WAYS))
    assert {row["way"] for row in ways if not row["exact"]} == {
        f"{name}, quality 95 (not exact)" for name in ("JPEG", "AVIF")
    }
    for way, row in zip(WAYS, ways, strict=True):
        assert (row["photographs"] is None) == way.missing
    assert plot(ways).axes
    results: dict[str, Any] = {
        "ways": ways,
        "assembly": assembly(64, 1),
        "response": response(pictures["photographs"], 1),
    }
    missing = [row | {"photographs": None, "shapes": None} if "fpng" in row["library"] else row for row in ways]
    results |= {"side": 64, "machine": {"cores": 1}}
    assert "| fpng | not measured yet |" in encoding(results | {"ways": missing})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_value_of_a_decoder_becomes_the_same_byte(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    decoded = values / 2**14 if dtype == torch.float32 else values.view(dtype)
    decoded = decoded.masked_fill(decoded.isnan(), 0).reshape(1, 1, 256, 256).expand(1, 3, 256, 256)
    first, *others = (np.asarray(way(decoded)[0]) for way in ASSEMBLIES.values())
    assert len(np.unique(first)) == 256
    assert all(np.array_equal(first, other) for other in others)

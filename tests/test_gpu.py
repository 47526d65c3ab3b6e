"""What only a card can show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import opened
from training import judge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]


def test_the_shipped_model_draws_in_bfloat16_and_tells_its_peak_memory(generate: Callable[..., dict[str, Any]]) -> None:
    response = generate("a red circle on a blue background", seed=1)
    (picture,) = opened(response)
    assert (judge.centre_colour(picture), judge.background_colour(picture)) == ("red", "blue")
    assert 0 < response["metadata"]["peak_memory"] < 1e9
    assert generate("a red circle on a blue background", seed=1)["images"] == response["images"]

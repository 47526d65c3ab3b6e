"""What only a card can show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from src.engine import load_engine
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.settings import Settings
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


@pytest.mark.parametrize("mode", ["modulation_cache", "stream", "auto"])
def test_a_limited_card_gives_the_same_picture(mode: str) -> None:
    """Blocks pass through on a stream of their own, beside the computing."""
    plain = load_engine(Settings(model_name="flux-shapes", compile=False))
    limit = None if mode == "modulation_cache" else 0.02
    narrow = load_engine(
        Settings(model_name="flux-shapes", compile=False, memory_mode=mode, memory_limit_gb=limit, max_pixels=128 * 128)
    )
    for held in (plain, narrow):
        assert held.loaded().placement["device"] == torch.cuda.get_device_name()
    for prompt in ("a red circle on blue", "a green star on white"):
        request, faults, _ = read_request({"input": {"prompt": prompt, "seed": 1, "num_images": 2}})
        plan = make_plan(request, faults, plain.model, max_pixels=128 * 128)
        ours, theirs = (held.run(plan).pictures for held in (narrow, plain))
        assert [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in theirs]

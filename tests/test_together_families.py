"""Every family by two processes. A process has one group of them at a time, so not together with the other tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.engine import load_engine, load_engines
from src.engine.followers import Followers
from src.settings import Settings
from tests.small_models import small
from tests.test_family import sent_to, small_for
from tests.test_together import CPU, same


@pytest.mark.slow
@pytest.mark.parametrize("family", ["kontext", "fill", "control", "flux.2-dev", "klein-base"])
def test_every_family_can_be_shared(family: str, tmp_path: Path) -> None:
    settings = Settings(model_name=str(small(family, tmp_path / "tune")), parallel="picture")
    plain = load_engine(settings)
    engines = load_engines(settings, on=(CPU, CPU))
    try:
        for mode in plain.model.modes:
            if not plain.model.modes[mode].controlnet:
                same(engines._engines[0], plain, prompt="x", **small_for(plain), **sent_to(plain, mode))
    finally:
        (together,) = [engine._together for engine in engines._engines]
        assert isinstance(together, Followers)
        together.close()

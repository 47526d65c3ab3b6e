"""Processes of one picture that are lost: the worker is told within seconds, and nothing of it stays."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from src.engine import Engine
from src.engine.followers import Followers
from src.errors import DeviceFailed, ModelUnavailable
from src.job import Progress
from src.settings import ROOT, Settings
from tests.test_engine import OOM, plan
from tests.test_together import CPU, load


@pytest.fixture
def own() -> Iterator[tuple[Engine, Followers]]:
    engine, followers = load()
    yield engine, followers
    followers.close()


@pytest.mark.slow
def test_a_model_that_another_card_has_no_room_for_is_a_start_that_fails() -> None:
    followers = Followers((CPU, CPU))
    with pytest.raises(ModelUnavailable, match=r"^the model cannot be loaded on cpu too: /no/such: is"):
        followers.lead(None, Settings(model_name="/no/such"))
    followers.close()


@pytest.mark.slow
def test_who_fails_alone_ends_the_worker_and_not_the_clock(
    own: tuple[Engine, Followers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.engine.followers._IN_STEP", 1.0)
    engine, _ = own
    block = engine.transformer.transformer_blocks[1]
    monkeypatch.setattr(block, "forward", lambda **_: (_ for _ in ()).throw(OOM))
    with pytest.raises(DeviceFailed, match="this worker must be replaced: they are out of step"):
        engine.run(plan())
    with pytest.raises(DeviceFailed):
        engine.run(plan())


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, 3])
def test_a_follower_that_is_killed_is_a_failed_device(own: tuple[Engine, Followers], at: int | None) -> None:
    engine, followers = own
    (process,) = followers._processes

    def kill(progress: Progress) -> None:
        if progress.phase == "denoise" and progress.step == at:
            psutil.Process(process.pid).kill()

    if at is None:
        process.kill()
        process.join()
    with pytest.raises(DeviceFailed, match="the process of cpu ended"):
        engine.run(plan(), kill)


@pytest.mark.slow
def test_a_follower_that_is_killed_in_a_call_lets_the_others_go(own: tuple[Engine, Followers]) -> None:
    engine, followers = own
    (process,) = followers._processes
    psutil.Process(process.pid).suspend()  # so that this process is within a call when it is killed
    threading.Timer(2.0, process.kill).start()
    with pytest.raises(DeviceFailed, match="this worker must be replaced"):
        engine.run(plan())


@pytest.mark.slow
def test_followers_end_with_their_worker_however_that_ends() -> None:
    script = (
        "import torch\n"
        "from src.engine import load_engines\n"
        "from src.settings import Settings\n"
        "if __name__ == '__main__':\n"
        "    cpu = torch.device('cpu')\n"
        "    engines = load_engines(Settings(model_name='flux-shapes', parallel='picture'), on=(cpu, cpu))\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout
    assert worker.stdout.readline() == "ready\n"
    children = psutil.Process(worker.pid).children(recursive=True)
    assert children
    worker.kill()
    worker.wait()
    _, alive = psutil.wait_procs(children, 30)
    assert not alive

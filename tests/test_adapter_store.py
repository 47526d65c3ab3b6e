"""The adapters' cache: only whole files enter it, what changed is fetched anew, and whose trouble is whose."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from src.errors import AdapterUnavailable, Cancelled, Fault, InvalidRequest, WorkerFault, refusal
from src.job import Job
from src.job_queue import Ticket
from src.request import adapter_cache, adapters
from src.request.adapters import AdapterStore, LoadedAdapters
from src.request.schema import Lora, Request
from src.settings import ROOT, Settings
from tests.hub import REVISION, Hub, Repo
from tests.web import Page, Web, open_web

ADDRESS = "files.test/style.safetensors"
PAGE = Page(b"<!DOCTYPE html><html>please log in</html>", headers={"Content-Type": "text/html"})
CIVITAI = "civitai.com/api/download/models/456"
TOKEN = "a0secret1of2civitai3"


def adapter(number: int, size: int = 10) -> bytes:
    return save({"transformer.x.lora_A.weight": np.full(size, number, np.float32)})


ONE, OTHER = adapter(1), adapter(2)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with open_web(tmp_path, monkeypatch, "files.test", "cdn.test", "civitai.com", "civitai.red") as web:
        yield web


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "style.safetensors").write_bytes(ONE)
    hub.repos["someone/style"] = Repo(folder)
    yield folder
    hub.down = False
    del hub.repos["someone/style"]


def store(tmp_path: Path, **settings: Any) -> AdapterStore:
    return AdapterStore(Settings(**{"lora_cache_dir": tmp_path / "cache", "lora_dir": tmp_path / "loras", **settings}))


def load(tmp_path: Path, *paths: str | Lora, job: Job | None = None, **settings: Any) -> LoadedAdapters:
    loras = tuple(path if isinstance(path, Lora) else Lora(path=path) for path in paths)
    return store(tmp_path, **settings).load(Request(prompt=("x",), loras=loras), job or Job())


def content(loaded: LoadedAdapters) -> bytes:
    assert loaded.faults == ()
    return loaded.adapters[0].file.read_bytes()


def a_minute_passes(tmp_path: Path) -> None:
    for file in (tmp_path / "cache").rglob("origin.json"):
        os.utime(file, (time.time() - 61, time.time() - 61))


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (PAGE, "an HTML page: give the address of the file itself"), (b"", "an empty file"), (b'{"error": 1}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"), (ONE[:-4], "is not a complete"),
        (ONE + b"more", "is not a complete"), (b"\x80\x02}q\x00.", "a pickle of PyTorch"), (Page(status=404), "404"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_never_enters_the_cache(web: Web, tmp_path: Path, bad: Page | bytes, reason: str) -> None:
    url = web.put(ADDRESS, bad, ONE)
    (fault,) = load(tmp_path, url).faults
    assert not isinstance(fault, WorkerFault)
    assert reason in fault.message
    assert kept(tmp_path) == []
    assert content(load(tmp_path, url)) == ONE


def test_a_page_is_known_before_all_of_it_has_come(web: Web, tmp_path: Path) -> None:
    url = web.put(ADDRESS, Page(b"<html>" + bytes(10_000), headers={"Content-Length": "900000000"}))
    (fault,) = load(tmp_path, url).faults
    assert "an HTML page" in fault.message


def test_a_cache_with_a_page_in_it_heals_itself(web: Web, repo: Path, tmp_path: Path) -> None:
    for path in (web.put(ADDRESS, ONE), "someone/style"):
        (made,) = load(tmp_path, path).adapters
        made.file.write_bytes(PAGE.body)
        assert content(load(tmp_path, path)) == ONE
        (again,) = load(tmp_path, path).adapters
        old = again.file.parent.with_name(again.file.parent.name[:32])  # as workers before this one named it
        again.file.parent.rename(old)
        (old / again.file.name).write_bytes(ONE[:20])
        assert content(load(tmp_path, path)) == ONE
        assert not old.exists()


@pytest.mark.parametrize("validators", [{"ETag": '"%s"'}, {"Last-Modified": "Tue, 0%s Nov 2026 10:00:00 GMT"}, {}])
def test_what_changed_at_its_address_is_fetched_anew_under_a_new_name(
    web: Web, tmp_path: Path, validators: dict[str, str]
) -> None:
    def page(body: bytes, number: int) -> Page:
        return Page(body, headers={name: value % number for name, value in validators.items()})

    url = web.put(ADDRESS, page(ONE, 1))
    first = load(tmp_path, url)
    assert load(tmp_path, url).adapters[0].name == first.adapters[0].name
    assert len(web.asked) == 1, "once in a minute"
    a_minute_passes(tmp_path)
    assert load(tmp_path, url).adapters[0].name == first.adapters[0].name
    web.put(ADDRESS, page(OTHER, 2))
    assert content(load(tmp_path, url)) == ONE
    assert len(web.asked) == 2
    a_minute_passes(tmp_path)
    second = load(tmp_path, url)
    assert content(second) == OTHER
    assert second.adapters[0].name != first.adapters[0].name
    assert content(first) == ONE, "whoever holds it may go on reading"
    assert len(web.asked) == 3
    sent = {name for name in ("If-None-Match", "If-Modified-Since") if name in web.asked[-1][1]}
    assert len(sent) == len(validators)


def test_a_repo_whose_branch_moved_is_fetched_anew_and_a_commit_is_never_asked_again(
    hub: Hub, repo: Path, tmp_path: Path
) -> None:
    at_commit = f"someone/style@{REVISION}"
    first, fixed = load(tmp_path, "someone/style"), load(tmp_path, at_commit)
    asked = hub.requests
    a_minute_passes(tmp_path)
    assert load(tmp_path, at_commit).adapters[0].name == fixed.adapters[0].name
    assert hub.requests == asked
    assert load(tmp_path, "someone/style").adapters[0].name == first.adapters[0].name
    assert hub.requests == asked + 2, "the list and the file's metadata, and not the file"
    (repo / "style.safetensors").write_bytes(OTHER)
    assert content(load(tmp_path, "someone/style")) == ONE
    a_minute_passes(tmp_path)
    second = load(tmp_path, "someone/style")
    assert content(second) == OTHER
    assert second.adapters[0].name != first.adapters[0].name


def test_what_cannot_be_looked_at_anew_is_used_with_a_warning(hub: Hub, web: Web, repo: Path, tmp_path: Path) -> None:
    url = web.put(ADDRESS, ONE)
    load(tmp_path, url, "someone/style")
    a_minute_passes(tmp_path)
    web.put(ADDRESS, Page(status=503))
    hub.down = True
    for _ in range(2):
        loaded = load(tmp_path, url, "someone/style")
        assert loaded.faults == ()
        assert [warning.partition(":")[0] for warning in loaded.warnings] == [
            "loras.0 may be old",
            "loras.1 may be old",
        ]
        assert all("answered HTTP 503" in warning for warning in loaded.warnings)
    assert len(web.asked) == 3, "no slow question at each job"
    a_minute_passes(tmp_path)
    web.put(ADDRESS, OTHER)
    hub.down = False
    assert load(tmp_path, url, "someone/style").warnings == ()
    (fault,) = load(tmp_path, web.put("files.test/new", Page(status=503))).faults
    assert type(fault) is Fault, "a client's server"


def test_jobs_that_want_the_same_at_once_fetch_it_once(web: Web, tmp_path: Path) -> None:
    url = web.put(ADDRESS, adapter(1, 500_000))
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(content(load(tmp_path, url)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(set(found)), len(found), len(web.asked)) == (1, 8, 1)
    assert len(kept(tmp_path)) == 1


def test_a_job_that_waits_for_anothers_file_can_be_cancelled(tmp_path: Path) -> None:
    job = Job()
    job.cancel()
    with adapter_cache._turn("x", Job()), pytest.raises(Cancelled):
        adapter_cache._turn("x", job).__enter__()


# Whose trouble it is


@pytest.mark.parametrize("path", ["someone/style", "someone/style/style.safetensors"])
def test_a_hub_that_is_down_is_the_workers_trouble(hub: Hub, repo: Path, tmp_path: Path, path: str) -> None:
    hub.down = True
    (fault,) = load(tmp_path, path).faults
    assert isinstance(fault, WorkerFault)
    assert "could not be downloaded: the hub answered HTTP 503" in fault.message
    assert kept(tmp_path) == []


def test_other_troubles_on_the_way_to_the_hub(
    hub: Hub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fault,) = load(tmp_path, "someone/style", hf_token="hf_expired").faults
    assert isinstance(fault, WorkerFault)
    assert "the hub refuses the worker's HF_TOKEN" in fault.message
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        (fault,) = load(tmp_path, "someone/style").faults
        assert isinstance(fault, WorkerFault)
        assert "HF_HUB_OFFLINE forbids to ask the hub" in fault.message

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(adapters, "model_info", unreachable)
    (fault,) = load(tmp_path, "someone/style").faults
    assert isinstance(fault, WorkerFault)
    assert "cannot be reached (ConnectionRefusedError)" in fault.message


def test_what_the_client_can_help_is_the_clients(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.repos["someone/gated"] = Repo(repo, {None: (401, "GatedRepo")})
    paths = (
        "someone/gated/style.safetensors", "someone/nothing", "someone/forbidden", "someone/style@x", "ü/🔴",
        "someone/style/x.safetensors", "huggingface.co/datasets/a/b", "https://files.test.invalid/x.safetensors",
    )  # fmt: skip
    for path in paths:
        (fault,) = load(tmp_path, path).faults
        assert type(fault) is Fault, path
    del hub.repos["someone/gated"]


def test_a_clients_faults_come_before_the_workers(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.down = True
    faults = load(tmp_path, "someone/style", "huggingface.co/datasets/a/b", "../x").faults
    assert len(faults) == 3
    error = refusal(faults)
    assert isinstance(error, InvalidRequest)
    assert [fault.field for fault in error.faults] == ["loras.1", "loras.2"]
    assert isinstance(refusal(faults[:1]), AdapterUnavailable)


def test_a_cache_that_cannot_be_written_is_the_workers_trouble(web: Web, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/self/nothing")):
        for path in (web.put(ADDRESS, ONE), "someone/style"):
            (fault,) = load(tmp_path, path, lora_cache_dir=folder).faults
            assert isinstance(fault, WorkerFault)
            assert fault.message.startswith(f"could not be kept: LORA_CACHE_DIR={folder}: ")
            assert "set it to a folder that this worker may write to" in fault.message


def test_what_a_read_only_volume_holds_is_used(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = web.put(ADDRESS, Page(ONE, headers={"ETag": '"1"'}))
    load(tmp_path, url)
    a_minute_passes(tmp_path)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in ((os, "utime"), (Path, "mkdir"), (Path, "write_text"), (os, "rename")):
        monkeypatch.setattr(owner, name, read_only)
    loaded = load(tmp_path, url)
    assert content(loaded) == ONE
    assert f"LORA_CACHE_DIR={tmp_path / 'cache'}: read-only file system" in loaded.warnings[0]
    (fault,) = load(tmp_path, web.put("files.test/new", OTHER)).faults
    assert isinstance(fault, WorkerFault)


class FullDisk:
    """A disk with room for `room` bytes of adapters below `folder`, which shows once a file is there."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room

    def __call__(self, file: Path) -> None:
        if sum(f.stat().st_size for f in self.folder.rglob("*.safetensors")) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        check_whole(file)


check_whole = adapter_cache.check_whole


def test_on_a_full_disk_what_was_used_least_makes_room(
    web: Web, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(adapter(1, 10_000))
    urls = [web.put(f"files.test/{i}.safetensors", adapter(i, 10_000)) for i in range(4)]
    (repo / "style.safetensors").write_bytes(adapter(9, 10_000))
    for url in urls[:3]:
        load(tmp_path, url)
    held = load(tmp_path, urls[0])
    monkeypatch.setattr(adapter_cache, "check_whole", FullDisk(tmp_path / "cache", 3 * size))
    assert load(tmp_path, urls[3]).faults == ()
    assert len(kept(tmp_path)) == 3
    assert content(held)
    asked = len(web.asked)
    load(tmp_path, urls[2])
    assert len(web.asked) == asked, "the second was the one that went"
    assert content(load(tmp_path, "someone/style")) == adapter(9, 10_000)
    assert content(held)


def test_a_disk_that_is_full_of_other_things_is_the_workers_trouble(
    web: Web, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "check_whole", FullDisk(tmp_path / "cache", 0))
    for path in (web.put(ADDRESS, ONE), "someone/style"):
        (fault,) = load(tmp_path, path).faults
        assert isinstance(fault, WorkerFault)
        assert f"LORA_CACHE_DIR={tmp_path / 'cache'}: no space left on device; give it more room" in fault.message
        assert kept(tmp_path) == [], "nothing half done stays"


# The cache is within its size at any time


def bytes_of(folder: Path) -> int:
    """As they are now, while others change them."""
    size = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                size += os.stat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return size


class Watched:
    """The most bytes that a folder had."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ends.is_set():
            with adapter_cache._changing:  # or what is moved meanwhile would count twice
                self.most = max(self.most, bytes_of(self.folder))

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.most = max(self.most, bytes_of(self.folder))


@pytest.mark.parametrize("announced", [True, False])
def test_many_downloads_at_once_stay_within_the_cache_and_wait_for_each_other(
    web: Web, repo: Path, tmp_path: Path, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, size = 2_500_000, len(adapter(0, 250_000))
    if not announced:
        monkeypatch.setattr(adapters, "length_of", lambda _: None)
        monkeypatch.setattr(adapter_cache, "_PIECE", 100_000)
        monkeypatch.setattr(adapter_cache, "_PATIENCE", 1)  # they may be in each other's way
    urls = [web.put(f"files.test/{i}.safetensors", adapter(i, 250_000)) for i in range(8)]
    (repo / "style.safetensors").write_bytes(adapter(9, 250_000))
    found: list[bytes] = []

    def job(path: str) -> None:
        loaded = load(tmp_path, path, lora_cache_gb=limit / 1e9)
        if loaded.faults:
            assert not announced
            assert "running jobs use all of LORA_CACHE_GB" in loaded.faults[0].message
        else:
            found.append(content(loaded))

    with Watched(tmp_path / "cache") as watched:
        threads = [threading.Thread(target=job, args=(path,)) for path in (*urls, "someone/style")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    whole = {adapter(i, 250_000) for i in (*range(8), 9)}
    assert set(found) == whole if announced else set(found) <= whole
    assert size < watched.most <= limit


def test_who_announces_much_and_sends_little_takes_no_room_from_others(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "_AHEAD", 100_000)
    urls = [web.put(f"files.test/{i}.safetensors", adapter(i, 250_000)) for i in range(2)]
    load(tmp_path, urls[0], lora_cache_gb=0.005)
    large = Page(adapter(2, 250_000)[:1_000], headers={"Content-Length": "4900000"}, hangs_up=False)
    assert load(tmp_path, web.put("files.test/large", large), lora_cache_gb=0.005).faults
    asked = len(web.asked)
    assert content(load(tmp_path, urls[0], lora_cache_gb=0.005)) == adapter(0, 250_000)
    assert len(web.asked) == asked, "it was not dropped"
    with Watched(tmp_path / "cache") as watched:
        assert content(load(tmp_path, urls[1], lora_cache_gb=0.0015)) == adapter(1, 250_000), "piece by piece"
    assert watched.most <= 2_100_000


def test_what_running_jobs_use_stays_and_a_newcomer_waits_or_is_refused(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (web.put(f"files.test/{i}.safetensors", adapter(i, 250_000)) for i in range(2))
    monkeypatch.setattr(adapter_cache, "_PATIENCE", 0.3)
    held = load(tmp_path, first, lora_cache_gb=0.0015)
    (fault,) = load(tmp_path, second, lora_cache_gb=0.0015).faults
    assert isinstance(fault, WorkerFault)
    assert f"LORA_CACHE_DIR={tmp_path / 'cache'}: running jobs use all of LORA_CACHE_GB=0.0015" in fault.message
    assert content(held) == adapter(0, 250_000)
    monkeypatch.setattr(adapter_cache, "_PATIENCE", 60)
    began, cancelled = time.monotonic(), Job()
    threading.Timer(0.5, cancelled.cancel).start()
    with pytest.raises(Cancelled):
        load(tmp_path, second, job=cancelled, lora_cache_gb=0.0015)
    loaded = load(tmp_path, first, second, lora_cache_gb=0.0015)
    assert len(loaded.faults) == 1, "its own other adapter is in the way, and nobody waits for that"
    assert time.monotonic() - began < 30
    del held, loaded
    assert content(load(tmp_path, second, lora_cache_gb=0.0015)) == adapter(1, 250_000)


def test_a_cache_that_was_larger_once_is_trimmed_when_it_is_first_used(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [web.put(f"files.test/{i}.safetensors", adapter(i, 250_000)) for i in range(4)]
    for url in urls:
        load(tmp_path, url)
    monkeypatch.setattr(adapter_cache, "_swept", set[Path]())
    load(tmp_path, urls[3], lora_cache_gb=0.0022)
    assert bytes_of(tmp_path / "cache") <= 2_200_000
    assert len(web.asked) == 4


@pytest.mark.parametrize("setting", ["lora_cache_gb", "max_lora_gb"])
def test_a_file_that_is_too_large_is_refused_before_it_comes(
    web: Web, repo: Path, tmp_path: Path, setting: str
) -> None:
    (repo / "style.safetensors").write_bytes(adapter(1, 250_000))
    limit: dict[str, Any] = {setting: 0.0005}
    for path in (web.put(ADDRESS, adapter(1, 250_000)), "someone/style"):
        (fault,) = load(tmp_path, path, **limit).faults
        assert type(fault) is Fault
        assert f"bytes, more than the 0.0005 GB of {setting.upper()}" in fault.message or "size cap" in fault.message
        assert kept(tmp_path) == []


def test_a_file_that_is_larger_than_announced_stops(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.repos["someone/style"] = Repo(repo, more=50_000_000)
    with Watched(tmp_path / "cache") as watched:
        (fault,) = load(tmp_path, "someone/style").faults
    assert isinstance(fault, WorkerFault)
    assert "more came than the" in fault.message
    assert watched.most < 100_000
    assert kept(tmp_path) == []


FETCHES = """
import sys, time
from pathlib import Path
from src.job import Job
from src.request.adapter_cache import Cache, Room
from src.settings import Settings
with Room(Cache(Settings(lora_cache_dir=Path(sys.argv[1]))), Job(), "0" * 32, None, set()) as room:
    room.file.write_bytes(bytes(1000))
    print("it comes", flush=True)
    time.sleep(600)
"""


def test_what_a_dead_process_left_goes_at_once_and_what_a_live_one_fetches_stays(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = web.put(ADDRESS, ONE)
    load(tmp_path, url)
    of_another_host = tmp_path / "cache" / f"{'1' * 32}.0123abcd-1.partial"
    of_an_old_worker = tmp_path / "cache" / f"{'2' * 32}.123.partial"
    for folder in (of_another_host, of_an_old_worker):
        folder.mkdir()
    command = [sys.executable, "-c", FETCHES, str(tmp_path / "cache")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "it comes\n"

        def left() -> int:
            monkeypatch.setattr(adapter_cache, "_swept", set[Path]())  # as in a process that begins
            load(tmp_path, url)
            return len(list((tmp_path / "cache").glob("*.partial")))

        assert left() == 3
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert left() == 2, "nobody knows of processes elsewhere"
    hours_ago = time.time() - 3600
    os.utime(of_another_host, (hours_ago, hours_ago))
    assert left() == 1

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert left() == 1
    os.utime(of_an_old_worker, (hours_ago, hours_ago))
    assert left() == 0
    assert content(load(tmp_path, web.put("files.test/new", OTHER))) == OTHER


def test_whoever_reads_files_has_left_the_line(
    web: Web, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = web.put(ADDRESS, ONE)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "x.safetensors").write_bytes(ONE)
    seen = []
    read = Path.open

    def slow(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            seen.append(ticket.wait())  # the device waits for nobody here
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", slow)
    for path in ("x.safetensors", url, "someone/style", url, "someone/style"):
        ticket = Ticket()
        content(load(tmp_path, path, job=Job(queue_up=lambda ticket=ticket: ticket)))  # type: ignore[misc]
    assert len(seen) >= 5
    assert set(seen) == {None}


# Which repos


def test_private_repos_are_as_if_they_were_not_there(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.repos["company/secret"] = Repo(repo, private=True)
    hub.repos["company/open"] = Repo(repo)
    spellings = (
        "{}", "{}/style.safetensors", "{}@main", f"{{}}@{REVISION}", "{}@no-such-branch", "hf://{}",
        "https://huggingface.co/{}", "hf.co/{}/resolve/main/style.safetensors",
        f"{hub.url}/{{}}/blob/main/style.safetensors",
        "HTTPS://HuggingFace.co:443/{}/tree/main",
    )  # fmt: skip
    for spelling in spellings:
        says = []
        for name in ("company/secret", "company/absent"):
            for weight_name in (None, "style.safetensors", "absent.safetensors"):
                lora = Lora(path=spelling.format(name), weight_name=None if "style" in spelling else weight_name)
                loaded = load(tmp_path, lora, hf_token="hf_sees_private_ones")
                (fault,) = loaded.faults
                assert type(fault) is Fault
                says.append(fault.message.replace(name, "?"))
        assert len(set(says)) == 1, says
        assert "which is not on the hub, or which the worker may not see" in says[0]
    assert not any("/resolve/" in path for path, _ in hub.asked if "company/secret" in path)
    assert content(load(tmp_path, "company/open", hf_token="hf_sees_private_ones")) == ONE
    del hub.repos["company/secret"], hub.repos["company/open"]


def test_other_spellings_of_the_hubs_host_carry_no_token(web: Web, tmp_path: Path) -> None:
    for address in (
        "https://huggingface.co@files.test/company/secret/resolve/main/x.safetensors",
        "https://user:word@files.test/huggingface.co/company/secret/resolve/main/x.safetensors",
    ):
        load(tmp_path, f"{address}", hf_token="hf_sees_private_ones", civitai_token=TOKEN)
    load(tmp_path, web.put("files.test/huggingface.co/x", ONE), hf_token="hf_sees_private_ones", civitai_token=TOKEN)
    assert [headers.get("Authorization") for _, headers in web.asked if "hf_" in str(headers)] == []


@pytest.mark.parametrize(
    ("allow", "private", "public"),
    [((), False, True), (("public",), False, True), (("*",), True, True), (("company/*",), True, False),
     (("company/secret", "public"), True, True), (("someone/else",), False, False)],
)  # fmt: skip
def test_lora_hub_allow_says_which_repos(
    allow: tuple[str, ...], *, private: bool, public: bool, hub: Hub, repo: Path, tmp_path: Path
) -> None:
    hub.repos["company/secret"] = Repo(repo, private=True)
    for name, allowed in (("company/secret", private), ("someone/style", public)):
        for _ in range(2):
            asked = hub.requests
            loaded = load(tmp_path, f"{name}@{REVISION}", hf_token="hf_sees_private_ones", lora_hub_allow=allow)
            assert (not loaded.faults) == allowed
            if allow == ("someone/else",):
                assert hub.requests == asked, "and nobody is asked"
        # What was fetched where it was allowed is for nobody else.
        (fault,) = load(tmp_path, f"company/secret@{REVISION}", hf_token="hf_sees_private_ones").faults
        assert "which is not on the hub" in fault.message
    del hub.repos["company/secret"]


def test_a_repo_that_became_private_is_not_used_any_more(hub: Hub, repo: Path, tmp_path: Path) -> None:
    load(tmp_path, "someone/style", hf_token="hf_sees_private_ones")
    hub.repos["someone/style"] = Repo(repo, private=True)
    a_minute_passes(tmp_path)
    (fault,) = load(tmp_path, "someone/style", hf_token="hf_sees_private_ones").faults
    assert "which is not on the hub" in fault.message


def test_the_token_stays_behind_where_the_hub_leads_elsewhere(hub: Hub, repo: Path, tmp_path: Path) -> None:
    other = Hub()
    try:
        other.repos["someone/style"] = Repo(repo)
        hub.repos["someone/style"] = Repo(repo, elsewhere=other.url)
        hub.asked.clear()
        assert content(load(tmp_path, "someone/style", hf_token="hf_sees_private_ones")) == ONE
        assert {token for _, token in hub.asked} == {"Bearer hf_sees_private_ones"}
        assert {token for _, token in other.asked} == {None}
    finally:
        other.close()


# What a client may write


def test_odd_names_are_the_clients_and_a_folder_that_cannot_be_read_is_the_workers(
    hub: Hub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "loras"
    (folder / "folder.safetensors").mkdir(parents=True)
    (folder / "empty.safetensors").write_bytes(b"")
    for name in ("loop.safetensors", "loop"):
        (folder / name).symlink_to(folder / name)
    os.mkfifo(folder / "pipe.safetensors")
    (repo / "x.safetensors").mkdir()
    (repo / "x.safetensors" / "y.safetensors").write_bytes(ONE)
    half = "\udc80"
    odd = (
        "folder.safetensors", "empty.safetensors", "loop.safetensors", "loop/x.safetensors", "pipe.safetensors", "x\0y",
        "a/b\0.safetensors", "a/" + "b" * 300, "someone/style@..", "someone/style@.", "someone/style@../../x",
        "someone/style/x.safetensors", "a\nb/c", "https://files.test/\0", "https://\0/x", "//", "a/b@", "hf://",
        Lora.model_construct(path=f"a/{half}", scale=1.0, weight_name=None, revision=None),
        Lora.model_construct(path=f"{half}.safetensors", scale=1.0, weight_name=None, revision=None),
        Lora.model_construct(path=f"https://files.test/{half}", scale=1.0, weight_name=None, revision=None),
        Lora.model_construct(path="someone/style", scale=1.0, weight_name=f"{half}.safetensors", revision=None),
        Lora.model_construct(path="someone/style", scale=1.0, weight_name=None, revision=half),
        Lora.model_construct(path="someone/style", scale=1.0, weight_name="a" * 10**6 + ".safetensors", revision=None),
        Lora.model_construct(
            path="someone/style", scale=1.0, weight_name=None, revision="https:///?" + "sig" * 100_000
        ),
        Lora(path="someone/style", revision="a/../../../x"),
        Lora(path="someone/style", weight_name="\0.safetensors"),
    )  # fmt: skip
    for path in odd:
        (fault,) = load(tmp_path, path).faults
        assert type(fault) is Fault, (path, fault)
        assert len(fault.message) < 500
        fault.message.encode()
    for _ in range(2):
        assert content(load(tmp_path, "someone/style/x.safetensors/y.safetensors")) == ONE

    def unreadable(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (folder / "good.safetensors").write_bytes(ONE)
    for name in ("is_file", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, unreadable)
            (fault,) = load(tmp_path, "good.safetensors").faults
            assert isinstance(fault, WorkerFault)
            assert fault.message == f"could not be read: LORA_DIR={folder}: permission denied"


def test_a_file_that_was_written_anew_has_another_name(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    file = tmp_path / "loras" / "x.safetensors"
    file.write_bytes(ONE)
    before = file.stat()
    (first,) = load(tmp_path, "x.safetensors").adapters
    assert load(tmp_path, "x.safetensors").adapters[0].name == first.name
    file.write_bytes(OTHER)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(tmp_path, "x.safetensors").adapters[0].name != first.name


# Civitai


def test_the_workers_token_opens_civitai_and_goes_nowhere_else(web: Web, tmp_path: Path) -> None:
    elsewhere = web.put("cdn.test/file", ONE)
    for host in ("civitai.com", "civitai.red"):
        url = web.put(f"{host}/api/download/models/456", Page(status=307, headers={"Location": elsewhere}))
        loaded = load(tmp_path, url, civitai_token=TOKEN)
        assert content(loaded) == ONE
        assert loaded.adapters[0].summary()["path"] == url
    assert [(path.partition("/")[0], headers.get("Authorization")) for path, headers in web.asked] == [
        ("civitai.com", f"Bearer {TOKEN}"), ("cdn.test", None), ("civitai.red", f"Bearer {TOKEN}"), ("cdn.test", None)
    ]  # fmt: skip
    web.asked.clear()
    load(tmp_path, web.put("files.test/x", ONE), civitai_token=TOKEN)
    load(tmp_path, f"{web.put(CIVITAI, ONE)}?token=mine", civitai_token=TOKEN)
    assert [headers.get("Authorization") for _, headers in web.asked] == [None, None]
    assert TOKEN not in json.dumps([file.read_text() for file in (tmp_path / "cache").rglob("*.json")])


@pytest.mark.parametrize("answer", [Page(status=401), Page(status=403), PAGE])
def test_civitai_says_which_token_it_wants(web: Web, tmp_path: Path, answer: Page) -> None:
    url = web.put(CIVITAI, answer)
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        (url, {}, "Civitai wants to know who asks: set CIVITAI_TOKEN on the worker"),
        (url, {"civitai_token": TOKEN}, "Civitai refuses the worker's CIVITAI_TOKEN"),
        (f"{url}?token=my-own-one", {}, "Civitai refuses the token in the address"),
    )
    for path, settings, wanted in cases:
        (fault,) = load(tmp_path, path, **settings).faults
        assert type(fault) is Fault
        assert wanted in fault.message
        assert TOKEN not in fault.message
        assert "my-own-one" not in fault.message


def test_the_cache_may_vanish_between_two_jobs(web: Web, tmp_path: Path) -> None:
    url = web.put(ADDRESS, ONE)
    load(tmp_path, url)
    shutil.rmtree(tmp_path / "cache")
    assert content(load(tmp_path, url)) == ONE

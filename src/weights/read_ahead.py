"""A model's weights on their way into memory while torch is still being imported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from threading import Thread

from huggingface_hub import snapshot_download

from src.settings import Settings
from src.stages import START
from src.weights.file_parts import drop
from src.weights.files import Source
from src.weights.host import HostMemory, host_memory
from src.weights.model_files import ModelFiles

_THREADS, _CHUNK = 4, 16 << 20
SHARE = 0.7  # of the memory that is free: what takes more of it cannot be counted on to stay in the system's cache


def read(file: Path, opened: Callable[[Path], FileIO] = lambda file: file.open("rb", buffering=0)) -> None:
    """To its end, and forget it: the system has it in its cache then."""
    memory = bytearray(_CHUNK)
    with opened(file) as stream:
        while stream.readinto(memory):
            pass


def weight_files(folder: Path, *, part: bool = False) -> list[Path]:
    """Of a model in diffusers' layout, or of a network that is a folder by itself, the largest first."""
    return sorted(folder.glob("*.safetensors" if part else "*/*.safetensors"), key=lambda file: -file.stat().st_size)


def files_of(source: Source) -> list[Path]:
    """All files that weights of a model are read from: of a single file's base those of networks that it lacks."""
    file, whole = source.single_file, weight_files(source.folder)
    if file is None:
        return whole
    return [file.path, *(each for each in whole if each.parent.name not in file.parts)]


def _holds_transformer(file: Path, source: Source) -> bool:
    """And nothing else that would be missed."""
    single = source.single_file
    return file.parent.name == "transformer" or (single is not None and file == single.path and len(single.parts) == 1)


def size_of(files: Iterable[Path]) -> int:
    """Bytes of `files` together."""
    return sum(file.stat().st_size for file in files)


def stays_in_memory(files: Iterable[Path], memory: Callable[[], HostMemory] = host_memory) -> bool:
    """Whether `files` can all be in the system's cache until they are used."""
    return size_of(files) < SHARE * memory().free


def read_ahead(
    settings: Settings,
    download: Callable[..., str] = snapshot_download,
    *,
    read: Callable[[Path], None] = read,
    memory: Callable[[], HostMemory] = host_memory,
) -> Thread:
    """Start to read the weights of MODEL_NAME; load_engine then finds them in memory.

    Only what is on this machine, and only what stays in memory: what cannot is read in vain, and load_engine streams
    it. Several files side by side, which is what network volumes are fast at. Whatever goes wrong is for load_engine to
    say.
    """
    arguments = (settings, download, read, memory)
    thread = Thread(target=_read_ahead, args=arguments, name="read ahead", daemon=True)
    thread.start()
    return thread


def _read_ahead(
    settings: Settings,
    download: Callable[..., str],
    read: Callable[[Path], None],
    memory: Callable[[], HostMemory],
) -> None:
    begun = time.perf_counter()
    try:
        models = ModelFiles(settings, download)
        source = models.here()
        if source is None:
            return
        weights = files_of(source)
        if quantized := list(settings.quantized_dir.glob(f"*-{settings.placement_mode}-*.pt")):  # likely this model's
            newest = max(quantized, key=lambda file: file.stat().st_mtime_ns)
            weights = [newest, *(file for file in weights if not _holds_transformer(file, source))]
        upsampler = settings.prompt_upsampler
        if upsampler and (found := models.files.here(upsampler, upsampler, part=True)):
            weights += weight_files(found.folder, part=True)
        if not stays_in_memory(weights, memory):
            return
        waiting = iter(weights)

        def work() -> None:
            for file in waiting:
                read(file)

        # No pool: its threads would keep a start alive that was refused.
        threads = [Thread(target=work, daemon=True) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        START.say("read-ahead", time.perf_counter() - begun, bytes=size_of(weights))
    except Exception:  # noqa: BLE001 - nobody waits for it, and load_engine will meet the same
        return


def one_ahead(
    groups: Sequence[Sequence[Path]], read: Callable[[Path], None] = read, drop: Callable[[Path], None] = drop
) -> Iterator[None]:
    """For each group of files in turn: they are in the system's cache, and leave it when the next is asked for.

    Meanwhile the next group is being read, and never more than that one.
    """

    def bring(files: Sequence[Path]) -> None:
        for file in files:
            read(file)

    with ThreadPoolExecutor(1, thread_name_prefix="one ahead") as thread:
        coming = [thread.submit(bring, files) for files in groups[:1]]
        for number, files in enumerate(groups, 1):
            coming.pop().result()
            coming += [thread.submit(bring, following) for following in groups[number : number + 1]]
            yield
            for file in files:
                drop(file)

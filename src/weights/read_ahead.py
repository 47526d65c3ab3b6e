"""A model's weights on their way into memory while torch is still being imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread

from huggingface_hub import snapshot_download

from src.catalog import repo_of
from src.settings import Settings
from src.weights.files import Files
from src.weights.host import host_memory

_THREADS, _CHUNK = 4, 16 << 20


def read(file: Path) -> None:
    """To its end, and forget it: the system has it in its cache then."""
    memory = bytearray(_CHUNK)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(memory):
            pass


def read_ahead(
    settings: Settings,
    download: Callable[..., str] = snapshot_download,
    *,
    read: Callable[[Path], None] = read,
    share: float = 0.7,
) -> Thread:
    """Start to read the weights of MODEL_NAME; load_engine then finds them in memory.

    Only what is on this machine, and only what takes less than a `share` of the memory that is free: what cannot stay
    is read in vain. Several files side by side, which is what network volumes are fast at. Whatever goes wrong is for
    load_engine to say.
    """
    thread = Thread(target=_read_ahead, args=(settings, download, read, share), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read_ahead(settings: Settings, download: Callable[..., str], read: Callable[[Path], None], share: float) -> None:
    name = settings.model_name
    try:
        source = Files(settings, download).here(name, repo_of(name), settings.model_revision)
        if source is None:
            return
        weights = sorted(source.folder.glob("*/*.safetensors"), key=lambda file: -file.stat().st_size)
        if any(settings.quantized_dir.glob(f"*-{settings.placement_mode}-*.pt")):  # likely this model's: smaller ones
            weights = [file for file in weights if file.parent.name != "transformer"]
        if sum(file.stat().st_size for file in weights) < share * host_memory().free:
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
    except Exception:  # noqa: BLE001 - nobody waits for it, and load_engine will meet the same
        return

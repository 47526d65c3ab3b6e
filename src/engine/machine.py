"""The machine as it is now: which cards there are, whether they work, what is free, and how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from src.errors import DeviceFailed
from src.weights.host import host_memory
from src.weights.placement import GB, Machine

_SIDE = {"cpu": 1024, "cuda": 4096}  # of the matrices whose product is timed
_COPIED = {"cpu": 64 << 20, "cuda": 256 << 20}  # bytes
_TIMES = 3


def measure(device: torch.device, dtype: torch.dtype, memory_limit_gb: float | None = None) -> Machine:
    """`device` and its host; it takes milliseconds on a card and a tenth of a second on the CPU.

    `memory_limit_gb` is the most that may be used of the device, in gigabytes; on a card torch holds us to it. What
    CUDA's context and its libraries take counts towards it: torch's allocator gets what they leave.
    """
    host, most = host_memory(), int(memory_limit_gb * GB) if memory_limit_gb else None
    speed = _flops(device, dtype), _bandwidth(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was just measured with
        free, total = torch.cuda.mem_get_info(device)
        if most:
            most = max(most - context_memory(device), 0)
            torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0))
        return Machine(torch.cuda.get_device_name(device), min(free, free if most is None else most), host.free, *speed)
    everything = host.total
    if most and most < everything:  # as if there were a card of that size
        return Machine("the CPU", most, everything - most, *speed)
    return Machine("the CPU", everything, everything, *speed, shared=True)


def context_memory(device: torch.device) -> int:
    """Bytes of a card that are in use and not of torch's allocator: CUDA's context, its libraries and their kernels.

    Whoever else uses the card is among them; a worker has its card to itself.
    """
    free, total = torch.cuda.mem_get_info(device)
    return max(total - free - torch.cuda.memory_reserved(device), 0)


def devices() -> tuple[torch.device, ...]:
    """The cards that are visible, or else the CPU; a card that is alone has no number."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards > 1:
        return tuple(torch.device("cuda", number) for number in range(cards))
    return (torch.device("cuda" if cards else "cpu"),)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within it `device` is the one that this thread's calls mean where they name none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_device() -> None:
    """Raise DeviceFailed, saying why, where there is a card that cannot be used: on the CPU a picture takes hours."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            raise DeviceFailed(
                f"there is an NVIDIA card, and torch {torch.__version__} cannot use it: it is built for the CPU (the "
                "image with TORCH=cpu), or the container was started without the card (--gpus all)"
            )
        return
    for device in devices():
        with on_device(device):
            _check_card()


def _check_card() -> None:
    """Of the current card; where there are several, it is told by its number."""
    name = torch.cuda.get_device_name()
    if torch.cuda.device_count() > 1:
        name = f"{name} (cuda:{torch.cuda.current_device()})"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceFailed(f"{name} has no bfloat16, which FLUX needs: choose a card of the year 2020 or later")
    try:
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
        wrong = not bool((ones @ ones == 64).all())
    except RuntimeError as error:
        raise DeviceFailed(f"{name} does not compute: {str(error).strip().partition(chr(10))[0]}") from error
    if wrong:
        raise DeviceFailed(f"{name} computes wrongly")


def shortest(work: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """The seconds of `work`, the shortest of some times: whatever disturbs makes it longer.

    `synchronize` waits until the device has done what it was asked for.
    """
    times = []
    for _ in range(_TIMES):
        synchronize()
        begun = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE[device.type]
    matrix = torch.randn(side, side, dtype=dtype, device=device)  # zeros are multiplied faster
    return 2 * side**3 / _seconds(lambda: matrix @ matrix, device)


def _bandwidth(device: torch.device) -> float:
    size = _COPIED[device.type]
    home = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _seconds(lambda: there.copy_(home, non_blocking=True), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    return shortest(work, torch.cuda.synchronize if device.type == "cuda" else lambda: None)

"""What can be said of a start before torch is imported and before a byte is downloaded; then the download.

Knows nothing of RunPod, and of torch only what its wheel says of itself.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from src.catalog import FAMILIES, controlnets_for, families_like, find_model, no_use_for_upsampler
from src.errors import DeviceFailed, InvalidSettings, ModelUnavailable, WorkerFault, refusal
from src.response.storage import Bucket
from src.settings import Settings
from src.stages import START
from src.weights.disk import free_bytes, why_not_writable
from src.weights.files import CACHE, INSTEAD, Files, Source, cache_name
from src.weights.model_files import ModelFiles, OneFile, Repo, Wanted, quantized_again

log = logging.getLogger("worker")

_DRIVER = "libcuda.so.1"


def check_start(settings: Settings) -> None:
    """Raise one error with all that would end this start later; what only hinders is a warning.

    It takes seconds at most, and nothing of the network where the model's files are here.
    """
    with START.stage("checks"):
        if faults := [fault for check in CHECKS for fault in check(settings)]:
            raise refusal(faults)


def check_bucket(bucket: Bucket | None) -> None:
    """Store a file and fetch it, where there is a bucket; raises InvalidSettings where it takes none."""
    if bucket is None:
        return
    with START.stage("bucket"):
        bucket.check()
    if bucket.no_links:
        log.warning(
            "the bucket takes files, and nobody can fetch them (%s): pictures go out in base64, within "
            "MAX_RESPONSE_MB; BUCKET_PUBLIC_URL is for buckets that have a public address",
            bucket.no_links,
        )


def find_files(settings: Settings) -> int:
    """See that the files of all that a start wants are on this machine; the bytes of what was downloaded.

    Raises ModelUnavailable with the reason where they cannot be had.
    """
    files, downloaded = Files(settings), 0
    with START.stage("files") as facts:
        for wanted in _wanted(settings, files):
            try:
                source = wanted.here()
                if source is None:
                    log.info("%s is being downloaded, below %s", wanted.name, cache_name())
                    held = wanted.held_bytes()
                    source = wanted.find()
                    downloaded += wanted.held_bytes() - held
                elif source.revision not in (None, wanted.revision):
                    used = "%s is used as it is, at revision %s: for another name it in MODEL_REVISION, or remove %s"
                    log.info(used, wanted.name, source.revision, source.folder)
            except Exception as error:
                raise ModelUnavailable(f"{wanted.name}: {files.explain(error, INSTEAD)}") from error
            facts.update(_found(wanted, source, settings))
        facts["downloaded_bytes"] = downloaded
    return downloaded


def _found(wanted: Wanted, source: Source, settings: Settings) -> dict[str, Any]:
    """What the line of the start says of what was found; a single file is said by itself, as soon as all is there."""
    file = source.single_file
    if file is None:
        return {} if wanted.is_part else {"folder": str(source.folder), "revision": source.revision}
    if source.base is None:
        return {"file": str(file.path), "revision": source.revision}
    why = "as BASE_MODEL says" if settings.base_model else "whose family and widths it has; BASE_MODEL names another"
    held = ", ".join(f"{part} in {kind}" for part, kind in file.weights.items())
    log.info("%s is %s, %s names, with %s", file.path.name, file.family, file.layout, held)
    log.info("what %s lacks comes from %s, %s", file.path.name, source.base, why)
    alike = [FAMILIES[family].model for family in families_like(file.configuration) if family != file.family]
    if alike and not settings.base_model:
        log.info(
            "it may as well be of the kind of %s, whose tensors look the same: BASE_MODEL says so", ", ".join(alike)
        )
    return {"base_model": source.base, "family": file.family}


def _wanted(settings: Settings, files: Files) -> Iterator[Wanted]:
    yield from ModelFiles(settings).wanted()
    row = find_model(settings.base_model or settings.model_name)
    kept = {net.lower() for net in settings.controlnets}
    for net in controlnets_for(row) if row else ():
        if {net.name.lower(), net.repo.lower()} & kept:
            yield Repo(files, net.repo, net.repo, part=True)
    if upsampler := settings.prompt_upsampler:
        yield Repo(files, upsampler, upsampler, part=True)


def check_files(settings: Settings, free: Callable[[Path], int] = free_bytes) -> Iterator[WorkerFault]:
    """Whether what is wanted is here or can be downloaded: by this token, to this disk."""
    files, code, missing = Files(settings), ModelUnavailable.code, list[int]()
    for wanted in _wanted(settings, files):
        try:
            if wanted.here() is None:
                missing.append(0)
                missing[-1] = wanted.ask()
        except Exception as error:  # noqa: BLE001 - all faults at once
            why = files.explain(error, INSTEAD)
            if wanted.is_gated and settings.hf_token is None and "HF_TOKEN" not in why:
                why += "; it is gated, so HF_TOKEN must be set too"
            yield WorkerFault(wanted.name, why, code)
        file = wanted.single_file if isinstance(wanted, OneFile) else None
        if file and (again := quantized_again(settings, file)):
            yield WorkerFault("QUANTIZATION", again, InvalidSettings.code)
    if (unwritable := why_not_writable(CACHE)) and missing:
        yield WorkerFault(cache_name(), f"{unwritable}, or set HF_HOME to one that it may write", code)
    elif unwritable:
        log.warning("%s %s; what requests want of the hub beyond the model cannot be kept", cache_name(), unwritable)
    if (room := free(CACHE)) < sum(missing):
        yield WorkerFault(
            cache_name(),
            f"has {_gb(room)} free, and {_gb(sum(missing))} are still to be downloaded: give the container more disk "
            "(containerDiskInGb), or set HF_HOME to a folder of a volume that has room",
            code,
        )


def check_driver(_: Settings) -> Iterator[WorkerFault]:
    """Whether the card's driver is new enough for this torch: of CUDA's major version, or a later one.

    https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
    """
    torch, wanted = torch_build()
    if wanted is None:  # built for the CPU
        return
    driver = driver_cuda()
    if driver is None:
        log.warning(
            "there is no NVIDIA driver (%s), and torch %s is built for CUDA %s: pictures are made by the CPU, which "
            "takes hours for a large model",
            _DRIVER,
            torch,
            wanted,
        )
    elif driver[0] < int(wanted.partition(".")[0]):
        yield WorkerFault(
            "the NVIDIA driver",
            f"knows CUDA {driver[0]}.{driver[1]}, and torch {torch} is built for CUDA {wanted}: start this worker on "
            f"hosts of CUDA {wanted} or later (on RunPod the endpoint's allowedCudaVersions)",
            DeviceFailed.code,
        )


def check_upsampler(settings: Settings) -> Iterator[WorkerFault]:
    """Whether the model that is wanted has a use for the prompt upsampler; of one without a row nobody knows yet."""
    row = find_model(settings.model_name)
    if settings.prompt_upsampler and row and not row.upsamples:
        message = no_use_for_upsampler(settings.prompt_upsampler, row)
        yield WorkerFault("PROMPT_UPSAMPLER", message, InvalidSettings.code)


# Each gives what is wrong.
CHECKS: tuple[Callable[[Settings], Iterator[WorkerFault]], ...] = (check_upsampler, check_files, check_driver)


def torch_build() -> tuple[str, str | None]:
    """The version of the torch that would be imported, and of the CUDA that it is built for; None for the CPU's."""
    spec = find_spec("torch")
    written = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = written.read_text() if written and written.is_file() else ""
    found = {name: re.search(rf"^{name}\b[^=\n]*= *'([^']+)'", text, re.MULTILINE) for name in ("__version__", "cuda")}
    version, cuda = found["__version__"], found["cuda"]
    return version[1] if version else "of an unknown version", cuda[1] if cuda else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the card's driver knows, major and minor; None where there is no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(_DRIVER).cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if version.value else None


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"

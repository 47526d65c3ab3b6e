"""Finds a model's files, loads them, and says in one line why it cannot."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import psutil
import torch
import transformers
from huggingface_hub import constants, errors, snapshot_download
from safetensors import SafetensorError, safe_open

from src.catalog import MODELS, find_model, settle_model
from src.engine.run import Engine
from src.errors import DeviceFailed, ModelUnavailable
from src.settings import ROOT, Settings

# diffusers' own layout; a repo of FLUX also holds the same weights in one file at its root, which nobody needs.
_PATTERNS = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]


@dataclass(frozen=True)
class Source:
    """A folder in diffusers' layout, and the commit that it holds where that is known."""

    folder: Path
    revision: str | None


def load_engine(settings: Settings, download: Callable[..., str] = snapshot_download) -> Engine:
    """The model of MODEL_NAME, ready to run: bfloat16 on CUDA, float32 on the CPU.

    `download` is huggingface_hub's snapshot_download or takes its arguments.

    Raises ModelUnavailable with one line that says why not and what to do.
    """
    # The libraries' warnings quote prompts and their bars flood a worker's log.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = settings.model_name
    try:
        source = _find(settings, download)
        class_name, parameters = _check(source.folder)
        _check_memory(parameters * dtype.itemsize, device)
        pipeline = (
            getattr(diffusers, class_name)
            .from_pretrained(source.folder, dtype=dtype, use_safetensors=True, local_files_only=True)
            .to(device)
        )
    except Exception as error:
        raise ModelUnavailable(f"{name}: {_why(error, settings)}") from error
    model = settle_model(name, class_name=class_name, guidance_embeds=pipeline.transformer.config.guidance_embeds)
    return Engine(pipeline, model, source.revision, settings.max_loras)


def check_device() -> None:
    """Raise DeviceFailed, saying why, where there is a card that cannot be used: on the CPU a picture takes hours."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            raise DeviceFailed(
                f"there is an NVIDIA card, and torch {torch.__version__} cannot use it: its CUDA {torch.version.cuda} "
                "wants a newer driver (on RunPod: the endpoint's allowed CUDA versions), or the image holds torch for "
                "the CPU"
            )
        return
    name = torch.cuda.get_device_name()
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceFailed(f"{name} has no bfloat16, which FLUX needs: choose a card of the year 2020 or later")
    try:
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
        wrong = not bool((ones @ ones == 64).all())
    except RuntimeError as error:
        raise DeviceFailed(f"{name} does not compute: {str(error).strip().partition(chr(10))[0]}") from error
    if wrong:
        raise DeviceFailed(f"{name} computes wrongly")


def _find(settings: Settings, download: Callable[..., str]) -> Source:
    """The folder of the model: local, then RunPod's cache (no network is asked), then the hub."""
    name, row = settings.model_name, find_model(settings.model_name)
    repo = row.repo if row else name
    for folder in (Path(name).expanduser(), ROOT / repo):
        if folder.is_dir():
            if settings.model_revision:
                raise _Refused(f"is a folder: it has no other revision, unset MODEL_REVISION={settings.model_revision}")
            return _source(folder.resolve())
    if name.startswith(("/", ".", "~")) or not _is_hub_id(repo):
        known = ", ".join(model.name for model in MODELS)
        raise _Refused(f"is neither a folder, a hub id (owner/name) nor one of {known}")

    wanted = {"repo_id": repo, "revision": settings.model_revision, "allow_patterns": _PATTERNS}
    try:
        return _source(Path(download(**wanted, cache_dir=settings.runpod_model_cache, local_files_only=True)))
    except errors.LocalEntryNotFoundError:
        token = settings.hf_token.get_secret_value() if settings.hf_token else None
        return _source(Path(download(**wanted, token=token)))


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and all(name.split("/"))


def _source(folder: Path) -> Source:
    return Source(folder, folder.name if folder.parent.name == "snapshots" else None)


class _Refused(Exception):
    """A reason that is ours and needs no explanation."""


def _check(folder: Path) -> tuple[str, int]:
    """Its class and number of parameters; _Refused unless `folder` holds a whole FLUX pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise _Refused(f"{folder} holds no model_index.json: it is no model in diffusers' layout")
    class_name = json.loads(index.read_text()).get("_class_name")
    known = sorted({model.base.class_name for model in MODELS})
    if class_name not in known:
        raise _Refused(f"is a {class_name}; this worker runs {', '.join(known)}")
    missing = [
        shard.relative_to(folder)
        for shards in folder.glob("*/*.index.json")
        for shard in {shards.parent / name for name in json.loads(shards.read_text())["weight_map"].values()}
        if not shard.exists()
    ]
    if missing:
        names = ", ".join(sorted(map(str, missing)))
        raise _Refused(f"the download is not whole, shards are missing: {names}; load it again")
    parameters = 0
    for file in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:  # reads the header and compares the length
                parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - a handle, no mapping
        except SafetensorError as error:
            raise _Refused(f"{file.relative_to(folder)} is damaged ({error}): delete it and load it again") from error
    return class_name, parameters


def _check_memory(needed: int, device: torch.device) -> None:
    """Raise _Refused where the weights, in bytes, cannot fit: Linux kills a process that tries, without a word."""
    if device.type == "cuda":
        room, where = torch.cuda.mem_get_info()[0], f"{torch.cuda.get_device_name()} has {{}} GB free"
    else:
        memory = psutil.virtual_memory().total + psutil.swap_memory().total
        room, where = memory, "this machine has {} GB of memory"
    if needed > room:
        raise _Refused(
            f"its weights take {needed / 1e9:.1f} GB and {where.format(f'{room / 1e9:.1f}')}: choose a larger one or a "
            "smaller MODEL_NAME"
        )


def _why(error: Exception, settings: Settings) -> str:
    """The reason in one line, and what to do."""
    hint = "MODEL_NAME=flux-shapes runs the small model that ships with this worker"
    match error:
        case _Refused():
            return str(error)
        case errors.GatedRepoError() if settings.hf_token is None:
            return f"is gated: accept its licence on its hub page and set HF_TOKEN ({hint})"
        case errors.GatedRepoError():
            return "is gated and the account of HF_TOKEN has no access: accept its licence on its hub page"
        case errors.RepositoryNotFoundError():
            seen = "that can be seen without HF_TOKEN" if settings.hf_token is None else "that HF_TOKEN can see"
            return f"there is no such repo on the hub {seen}"
        case errors.RevisionNotFoundError():
            return f"the repo has no revision {settings.model_revision!r} (MODEL_REVISION)"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return "the hub refuses HF_TOKEN: it is wrong or has expired"
        case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError(response=answer)) if (
            answer.status_code == 403
        ):
            return "the hub forbids it: HF_TOKEN has no access to this repo"
        case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError(response=answer)):
            return f"the hub answered {answer.status_code}: try again later"
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return f"is not on this machine and the hub cannot be reached ({hint})"
        case OSError(errno=errno.ENOSPC):
            return f"the disk is full: {_free(constants.HF_HOME)} free below HF_HOME={constants.HF_HOME}"
        case MemoryError() | torch.OutOfMemoryError():
            return "there is not enough memory for its weights: choose a larger card or a smaller model"
        case RuntimeError() if "allocate memory" in str(error):
            return "there is not enough memory for its weights: choose a larger machine or a smaller model"
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _free(folder: str) -> str:
    path = Path(folder).resolve()
    return f"{shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free / 1e9:.1f} GB"

"""Loads a model where there is room for it, and says in one line why it cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
from huggingface_hub import snapshot_download

from src.catalog import MODELS, find_model, settle_model
from src.engine.files import Files, Refused, check_whole, why
from src.engine.run import Engine
from src.errors import DeviceFailed, ModelUnavailable
from src.settings import Settings


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
    name, files = settings.model_name, Files(settings, download)
    try:
        row = find_model(name)
        source = files.find(name, row.repo if row else name, settings.model_revision)
        class_name, parameters = _check(source.folder)
        _check_memory(parameters * dtype.itemsize, device)
        pipeline = _load(class_name, source.folder, dtype).to(device)
    except Exception as error:
        raise ModelUnavailable(f"{name}: {why(error, settings)}") from error
    model = settle_model(name, class_name=class_name, guided=_is_guided(pipeline))
    engine = Engine(pipeline, model, source.revision, files)
    engine.load_controlnets(settings.controlnets)
    return engine


def _load(class_name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline with all its parts.

    FLUX.2-dev names a processor of words and pictures, which wants torchvision; its tokenizer is all that is needed.
    """
    index = json.loads((folder / "model_index.json").read_text())
    processors = [
        name for name, value in index.items() if isinstance(value, list) and str(value[1]).endswith("Processor")
    ]
    pipeline = getattr(diffusers, class_name).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, **dict.fromkeys(processors)
    )
    for name in processors:
        pipeline.register_modules(**{name: transformers.AutoTokenizer.from_pretrained(folder / name)})
    return pipeline


def _is_guided(pipeline: Any) -> bool:
    """Whether guidance_scale has an effect: FLUX.2-klein's pipeline says it, of others the transformer."""
    if "is_distilled" in pipeline.config:
        return not pipeline.config.is_distilled
    return bool(pipeline.transformer.config.guidance_embeds)


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


def _check(folder: Path) -> tuple[str, int]:
    """Its class and number of parameters; Refused unless `folder` holds a whole FLUX pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise Refused(f"{folder} holds no model_index.json: it is no model in diffusers' layout")
    class_name = json.loads(index.read_text()).get("_class_name")
    known = sorted({model.base.class_name for model in MODELS})
    if class_name not in known:
        raise Refused(f"is a {class_name}; this worker runs {', '.join(known)}")
    return class_name, check_whole(folder)


def _check_memory(needed: int, device: torch.device) -> None:
    """Raise Refused where the weights, in bytes, cannot fit: Linux kills a process that tries, without a word."""
    if device.type == "cuda":
        room, where = torch.cuda.mem_get_info()[0], f"{torch.cuda.get_device_name()} has {{}} GB free"
    else:
        memory = psutil.virtual_memory().total + psutil.swap_memory().total
        room, where = memory, "this machine has {} GB of memory"
    if needed > room:
        raise Refused(
            f"its weights take {needed / 1e9:.1f} GB and {where.format(f'{room / 1e9:.1f}')}: choose a larger one or a "
            "smaller MODEL_NAME"
        )

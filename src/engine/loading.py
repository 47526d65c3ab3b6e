"""Loads a model where there is room for it, and says in one line why it cannot."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download

from src.catalog import (
    FAMILIES,
    MEMORY_MODES,
    Model,
    controlnets_for,
    no_use_for_upsampler,
    settle_model,
)
from src.engine.acceleration import accelerate
from src.engine.components import FolderNetworks, check_vocabularies, load_tokenizer
from src.engine.controlnets import find_values
from src.engine.engine import Engine
from src.engine.machine import devices, measure, on_device
from src.engine.pipelines import pipeline_class
from src.engine.placed_pipeline import PlacedPipeline, networks_of, place
from src.engine.quantization import Quantizer
from src.engine.single_file import SingleFileNetworks
from src.engine.staging import Staging, mapped
from src.engine.upsampling import UPSAMPLER, check_upsampler, load_upsampler
from src.errors import InvalidSettings, ModelUnavailable, Refused, WorkerError, WorkerFault, refusal
from src.settings import Settings
from src.stages import START
from src.weights.file_parts import FileReader
from src.weights.files import (
    INSTEAD,
    Files,
    Source,
    check_class,
    check_folders,
    is_guided,
    read_index,
    shifts_dynamically,
)
from src.weights.host import host_memory
from src.weights.ledger import PlacementChoice
from src.weights.licences import licence_of
from src.weights.model_files import ModelFiles, quantized_again
from src.weights.placement import Weights, Work, choose_placement
from src.weights.read_ahead import one_ahead, size_of, stays_in_memory, weight_files
from src.weights.single_file import SingleFile

log = logging.getLogger("worker")


def load_engine(
    settings: Settings,
    download: Callable[..., str] = snapshot_download,
    device: torch.device | None = None,
    *,
    sharing: int = 1,
) -> Engine:
    """The model of MODEL_NAME, ready to run: bfloat16 on CUDA, float32 on the CPU.

    `download` is huggingface_hub's snapshot_download or takes its arguments, `device` the first one by default. The
    host's memory that is free is for so many engines `sharing` it, this one among them.

    Raises ModelUnavailable with one line that says why not and what to do, InvalidSettings where a setting asks for
    what cannot be had here.
    """
    # The libraries' warnings quote prompts and their bars flood a worker's log.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()

    device = device or devices()[0]
    with on_device(device):
        return _load_engine(settings, download, device, sharing)


def _load_engine(settings: Settings, download: Callable[..., str], device: torch.device, sharing: int) -> Engine:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = ModelFiles(settings, download)
    name, files = models.shown_name, models.files
    try:
        # 1. Where its files are, and whether they are whole
        with START.stage("inspect"):
            source = models.find()
            networks = _check(source)
            settings = _as_packed(settings, source.single_file)

        # 2. What it is, and where each of its weights is to live
        with START.stage("placement") as facts:
            model = _model_of(name, source, networks)
            sizes, upsampler_files = networks.sizes, list[Path]()
            if upsampler := _find_upsampler(settings, files, model):
                sizes[UPSAMPLER] = upsampler.sizes
                upsampler_files = weight_files(upsampler.folder, part=True)
            machine = measure(device, dtype, settings.memory_limit_gb)
            choice = PlacementChoice(
                Weights.of(
                    sizes,
                    networks.configuration("transformer"),
                    networks.configuration("vae"),
                    dtype.itemsize,
                    packed=networks.packed,
                    stored=networks.stored,
                ),
                replace(machine, host_memory=machine.host_memory // sharing),
                _work(model, settings, files, dtype.itemsize),
                settings.placement_mode,
            )
            placement = choose_placement(choice.weights, choice.machine, choice.work, choice.mode)
            facts.update(placement.summary())

        # 3. Its weights, read and put there
        with START.stage("read") as facts:
            short = not stays_in_memory([*networks.files(), *upsampler_files], host_memory)
            staging = Staging(device, FileReader(drop_behind=short))
            kind = placement.quantization
            quantizer = Quantizer(kind, device, settings.quantized_dir, staging) if kind else None
            settle = partial(place, placement=placement, staging=staging)
            pipeline, read = _load(networks, dtype, staging, quantizer, settle, short=short)
            if upsampler:
                with _upsampler_named(settings, files):
                    parts = load_upsampler(upsampler.folder, dtype)
                    settle(UPSAMPLER, parts[UPSAMPLER])
                pipeline.register_modules(**parts)
                read += upsampler_files
            left = mapped(weight for network in networks_of(pipeline).values() for weight in network.parameters())
            facts |= {"bytes": size_of(read) - sum(weight.nbytes for weight in left), "streamed": short}
        with START.stage("load") as facts:
            brought = staging.bytes
            placed_pipeline = PlacedPipeline(pipeline, placement, device, staging)
            facts["bytes"] = staging.bytes - brought
            compiled = accelerate(pipeline, settings, device, modulation_cache=placement.modulation_cache)
    except WorkerError:
        raise
    except Exception as error:
        raise ModelUnavailable(f"{name}: {files.explain(error, INSTEAD)}") from error
    engine = Engine(
        pipeline,
        model,
        source.revision,
        settings=settings,
        files=files,
        placed_pipeline=placed_pipeline,
        compiled=compiled,
        choice=choice,
    )
    if settings.controlnets:
        with START.stage("controlnets"):
            engine.load_controlnets(settings.controlnets)
    return engine


class _Upsampler(NamedTuple):
    folder: Path
    sizes: dict[str, int]  # the number of values in each tensor


def _find_upsampler(settings: Settings, files: Files, model: Model) -> _Upsampler | None:
    """What PROMPT_UPSAMPLER names; raises InvalidSettings where `model` has no use for it, or ModelUnavailable."""
    if (name := settings.prompt_upsampler) is None:
        return None
    if not model.upsamples:
        fault = WorkerFault("PROMPT_UPSAMPLER", no_use_for_upsampler(name, model), InvalidSettings.code)
        raise refusal([fault])
    with _upsampler_named(settings, files):
        folder = files.find(name, name, part=True).folder
        return _Upsampler(folder, check_upsampler(folder))


@contextmanager
def _upsampler_named(settings: Settings, files: Files) -> Iterator[None]:
    """What goes wrong within it is told of PROMPT_UPSAMPLER, in one line."""
    try:
        yield
    except Exception as error:
        raise ModelUnavailable(f"PROMPT_UPSAMPLER={settings.prompt_upsampler}: {files.explain(error)}") from error


def _as_packed(settings: Settings, file: SingleFile | None) -> Settings:
    """`settings` for weights that stay packed as GGUF has them: what PROFILE alone would make smaller stays so too.

    Raises InvalidSettings where they are asked for in another kind.
    """
    asked = MEMORY_MODES[settings.placement_mode].quantization
    if asked is None or file is None or not file.is_packed:
        return settings
    if fault := quantized_again(settings, file):
        raise InvalidSettings(fault)
    kept = "PROFILE=%s asks for %s, and the weights of %s stay as GGUF has them"
    log.warning(kept, settings.profile, asked, file.path.name)
    return settings.model_copy(update={"quantization": "none"})


def _work(model: Model, settings: Settings, files: Files, itemsize: int) -> Work:
    """The picture that must fit, and the ControlNets that are to stay in memory."""
    wanted = {name.lower() for name in settings.controlnets}
    nets = [net for net in controlnets_for(model) if {net.name.lower(), net.repo.lower()} & wanted]
    return Work(
        model.width,
        model.height,
        model.num_inference_steps,
        model.max_sequence_length,
        settings.max_pixels,
        settings.batch_size,
        extra=itemsize * sum(find_values(net, files) for net in nets),
        usual_tokens=model.usual_tokens,
    )


def _load(
    networks: FolderNetworks,
    dtype: torch.dtype,
    staging: Staging,
    quantizer: Quantizer | None,
    settle: Callable[[str, Any], None],
    *,
    short: bool,
) -> tuple[Any, list[Path]]:
    """The pipeline with all its parts, and the files that its weights are in.

    Each network goes through `settle` as soon as it is there; `short` is whether the files cannot all stay in memory.

    FLUX.2-dev and FLUX.3 name a processor of words and pictures, which wants torchvision; its tokenizer is all that is
    needed.
    """
    index, folder, files = networks.index, networks.folder, networks.files()
    processors = [
        name for name, value in index.items() if isinstance(value, list) and str(value[1]).endswith("Processor")
    ]
    parts: dict[str, Any] = dict.fromkeys(processors)
    kept = quantizer.file(_fingerprint(networks)) if quantizer else None
    if quantizer and kept and kept.is_file():
        for _ in one_ahead([[kept] if short else []]):
            if (restored := _restored(networks, dtype, quantizer, kept)) is not None:
                parts["transformer"] = restored
                settle("transformer", restored)
                files = [kept, *networks.files(but_for={"transformer"})]
    for name, network in networks.load(dtype, staging, but_for=tuple(parts), short=short):
        if name == "transformer" and quantizer and kept:
            quantizer.keep(network, quantizer.quantize(network), kept)
        settle(name, network)
        parts[name] = network
    pipeline = pipeline_class(index["_class_name"]).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, **parts
    )
    if "guidance_embeds" not in pipeline.transformer.config:  # ChromaInpaintPipeline asks (diffusers 0.42)
        pipeline.transformer.register_to_config(guidance_embeds=False)
    for name in processors:
        pipeline.register_modules(**{name: load_tokenizer(folder / name)})
    check_vocabularies(pipeline)
    return pipeline, files


def _restored(networks: FolderNetworks, dtype: torch.dtype, quantizer: Quantizer, kept: Path) -> Any:
    """The transformer with the weights that an earlier worker `kept`; None where there are none that are right."""
    transformer = networks.empty("transformer", dtype)
    return transformer if quantizer.restore(transformer, kept) else None


def _fingerprint(networks: FolderNetworks) -> str:
    """Of the transformer's weights."""
    return hashlib.sha256(str(networks.fingerprint).encode()).hexdigest()[:16]


def _model_of(name: str, source: Source, networks: FolderNetworks) -> Model:
    """The row of what is called `name`, with its licence.

    Raises Refused where its transformer is made for another pipeline: it reads more than this one has to say, or less.
    """
    index, file = networks.index, source.single_file
    transformer, vae = (networks.configuration(part) for part in ("transformer", "vae"))
    model = settle_model(
        name,
        class_name=index["_class_name"],
        guided=is_guided(index, transformer),
        dynamic_shift=shifts_dynamically(source.folder),
        base=source.base,
        single_file=file.summary() if file else None,
    )
    reads, given = transformer["in_channels"], FAMILIES[model.family].in_channels(vae["latent_channels"])
    if reads != given:
        raise Refused(
            f"its transformer reads {reads} channels and {model.base.class_name} gives it {given}: it is made for "
            "another pipeline"
        )
    licence = licence_of(model, file.path.parent, file.metadata) if file else licence_of(model, source.folder)
    return replace(model, licence=licence)


def _check(source: Source) -> FolderNetworks:
    """Its networks; Refused unless `source` holds a whole FLUX pipeline."""
    folder = source.folder
    index = read_index(folder)
    if index is None:
        raise Refused(f"{folder} holds no model_index.json, so it is not a model in diffusers' layout")
    check_class(index)
    check_folders(index, folder)
    of_file = source.single_file
    networks = SingleFileNetworks(index, source, of_file) if of_file else FolderNetworks(index, source)
    if missing := {"transformer", "vae"} - networks.sizes.keys():
        raise Refused(f"has no weights in {' and '.join(sorted(missing))}: no *.safetensors; download it again")
    return networks

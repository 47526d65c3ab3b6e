"""A model in one file: what is in it, by its header alone; or what it is instead."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from src.catalog import families_like
from src.errors import Refused
from src.request.addresses import format_of
from src.request.tensor_file import TensorFile, TensorInfo
from src.weights.gguf_header import MAGIC, GgufHeader
from src.weights.layouts import TRANSFORMERS, configuration_of
from src.weights.other_files import ADAPTED, ALIKE, OTHERS, UNREADABLE, Other
from src.wording import show

SUFFIXES = (".safetensors", ".sft", ".gguf")
GGUF_READ = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "Q4_K",
    "Q4_1",
    "Q4_0",
    "Q3_K",
    "Q2_K",
    "IQ4_XS",
    "IQ4_NL",
)  # fmt: skip - diffusers' SUPPORTED_GGUF_QUANT_TYPES, and what torch has
_READ = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # of weights in a safetensors file
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|sft|gguf)\Z", re.IGNORECASE)
# How a pipeline's networks lie in one file: what each is known by.
_NETWORKS = MappingProxyType(
    {
        "vae": "decoder.conv_in.weight",
        "clip": "embeddings.token_embedding.weight",  # behind text_model. before transformers 5
        "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
        "llm": "model.layers.0.self_attn.q_proj.weight",
    }
)


@dataclass(frozen=True)
class SingleFile:
    """A FLUX in one file.

    `parts` says which of a pipeline's networks are in it and what their tensors' names begin with there;
    `layout` whose names those are: "diffusers" or "original" (BFL's, which Comfy and Civitai keep);
    `configuration` what the tensors' shapes say of the transformer, in the names of diffusers' configuration.
    A GGUF file's tensors have GGML's types, "Q4_K" say, the others safetensors'.
    """

    path: Path
    family: str  # a row of FAMILIES
    layout: str
    parts: Mapping[str, str]  # "transformer", "vae", "text_encoder", "text_encoder_2" -> prefix
    tensors: Mapping[str, TensorInfo]  # of the whole file; shapes in torch's order, [out, in] of a linear
    configuration: Mapping[str, Any]
    is_gguf: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what else the header says

    def of(self, part: str) -> dict[str, TensorInfo]:
        """The tensors of one part, by their names within it."""
        prefix = self.parts[part]
        longer = [other for other in self.parts.values() if len(other) > len(prefix) and other.startswith(prefix)]
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and not name.startswith(tuple(longer))
        }

    @property
    def weights(self) -> dict[str, str]:
        """The type that most values of each part have."""
        return {part: _type_of(self.of(part)) for part in self.parts}

    @property
    def is_packed(self) -> bool:
        """Whether weights of the transformer are in GGUF's blocks, which stay as they are."""
        return self.is_gguf and any(tensor.dtype not in _READ for tensor in self.of("transformer").values())

    def summary(self) -> dict[str, Any]:
        """For whoever asks what this worker draws with."""
        return {"file": self.path.name, "family": self.family, "layout": self.layout, "weights": self.weights}


# Of a transformer's class: which text encoder is which part.
_ENCODERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "FluxTransformer2DModel": {"clip": "text_encoder", "t5": "text_encoder_2"},
        "ChromaTransformer2DModel": {"t5": "text_encoder"},
        "Flux2Transformer2DModel": {"llm": "text_encoder"},
        "Flux3Transformer2DModel": {"llm": "text_encoder"},
    }
)


def read_single_file(path: Path) -> SingleFile:
    """What the file at `path` is, by its header: no value of a tensor is read.

    Raises Refused with what it is instead of a FLUX, and OSError where it cannot be read.
    """
    _check_kind(path)
    with path.open("rb") as opened:
        begins = opened.read(512)
    if begins.startswith(MAGIC):
        header = GgufHeader(path)
        if not header.tensors:
            raise Refused("holds no tensors")
        return _recognized(path, header.tensors, header.metadata, is_gguf=True)
    _check_bytes(begins, path.stat().st_size)
    file = TensorFile(path)
    if not file.tensors:
        raise Refused("holds no tensors")
    return _recognized(path, file.tensors, file.metadata, is_gguf=False)


def explain_folder(folder: Path) -> str:
    """Why a folder without an index of a pipeline is no model, and which file in it may be one."""
    why = f"{folder} holds no model_index.json, so it is not a model in diffusers' layout"
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(SUFFIXES))
    whole = [name for name in files if not _SHARD.search(name)]
    if len(whole) == 1 == len(files):
        try:
            read_single_file(folder / whole[0])
        except Refused as error:
            return f"{why}; the one file in it, {whole[0]}, {error}"
        return f"{why}; for the one file in it set MODEL_NAME={folder / whole[0]}"
    if whole:
        return f"{why}; for a model in one file name it, one of {', '.join(whole[:8])}"
    if files:
        return f"{why}; what it holds is one network in {len(files)} parts: give the folder that holds all of a model"
    return why


def _check_kind(path: Path) -> None:
    """Raise Refused unless a plain file is there, and one by itself."""
    if path.is_symlink() and not path.exists():
        raise Refused(f"is a link to {path.readlink()}, and there is no such file")
    if not path.exists():
        raise Refused("is not there: no such file")
    if not path.is_file():
        raise Refused("is no plain file")
    if (shard := _SHARD.search(path.name)) and int(shard[2]) > 1:
        raise Refused(
            f"is part {int(shard[1])} of {int(shard[2])} of a network: give the folder of the whole model in "
            "diffusers' layout, or one file that holds all of it"
        )


def _check_bytes(begins: bytes, whole: int) -> None:
    """Raise Refused where a file's beginning says that it is no safetensors file."""
    if begins[8:9] == b"{" and int.from_bytes(begins[:8], "little") <= whole:
        return
    if row := format_of(begins):
        raise Refused(f"is {row.name} and no {' or '.join(SUFFIXES[::2])} file: {row.advice}")
    if begins[8:9] != b"{":
        raise Refused(
            f"begins with bytes that no {' or '.join(SUFFIXES[::2])} file begins with: it may be encrypted or damaged"
        )


def _recognized(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any], *, is_gguf: bool
) -> SingleFile:
    names = "\n".join(tensors)
    _refuse(names, UNREADABLE)
    found = [(shapes, prefix) for shapes in TRANSFORMERS for prefix in _prefixes(shapes.mark, tensors)]
    if found:
        _refuse(names, (*ADAPTED, *ALIKE))
    else:
        _refuse(names, (*ADAPTED, *OTHERS))
        raise Refused(_unknown(tensors, metadata))
    shapes, prefix = min(found, key=lambda each: each[1].startswith("model_ema"))
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    configuration = configuration_of(shapes, own)
    families = families_like(configuration)
    if not families:
        raise Refused(_no_family(configuration))
    encoders = _ENCODERS[shapes.class_name]
    parts = {"transformer": prefix}
    for network, mark in _NETWORKS.items():
        for where in _prefixes(mark, tensors):
            if where != prefix and (part := {"vae": "vae", **encoders}.get(network)):
                parts[part] = where
    file = SingleFile(path, families[0], shapes.layout, parts, tensors, configuration, is_gguf, metadata)
    _check_types(file)
    return file


def _prefixes(mark: str, tensors: Iterable[str]) -> list[str]:
    """What stands before `mark` in the names of tensors that end with it, as whole words."""
    ends = (name[: -len(mark)] for name in tensors if name.endswith(mark))
    return [prefix for prefix in ends if not prefix or prefix.endswith(".")]


def _refuse(names: str, rows: Iterable[Other]) -> None:
    for row in rows:
        if row.pattern.search(names):
            raise Refused(f"is {row.name}{f': {row.advice}' if row.advice else ', and this worker draws with FLUX'}")


def _unknown(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> str:
    if architecture := metadata.get("general.architecture"):
        return f"is GGUF of the architecture {show(architecture)}, and this worker draws with FLUX"
    first = ", ".join(map(show, list(tensors)[:3]))
    return f"is no FLUX: its {len(tensors):,} tensors ({first} ...) are those of no model that is known here"


def _no_family(configuration: Mapping[str, Any]) -> str:
    read, drawn = configuration["in_channels"], configuration["out_channels"]
    kind = configuration["_class_name"].removesuffix("Transformer2DModel").upper()
    return (
        f"is a {kind} that reads {read} channels and draws {drawn}, "
        f"{'with' if configuration.get('guidance_embeds') else 'without'} an embedding of the guidance: "
        "no family that this worker knows does"
    )


def _check_types(file: SingleFile) -> None:
    """Raise Refused where weights are in numbers that are not read here."""
    allowed = GGUF_READ if file.is_gguf else _READ
    for part in file.parts:
        for name, tensor in file.of(part).items():
            if tensor.dtype not in allowed and name.endswith(("weight", "bias", "scale")) and len(tensor.shape) > 1:
                raise Refused(
                    f"holds weights in {tensor.dtype} ({show(name)}), and what is read is {', '.join(allowed)}"
                )


def _type_of(tensors: Mapping[str, TensorInfo]) -> str:
    bytes_of: Counter[str] = Counter()
    for tensor in tensors.values():
        bytes_of[tensor.dtype] += tensor.size
    scaled = any(name.endswith((".scale_weight", ".weight_scale")) for name in tensors)
    kind = bytes_of.most_common(1)[0][0]
    return f"scaled {kind}" if scaled else kind

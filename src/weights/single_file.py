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
from src.request.addresses import OTHER_FORMATS
from src.request.tensor_file import TensorFile, TensorInfo
from src.weights.gguf_header import MAGIC, GgufHeader
from src.weights.other_files import ADAPTED, OTHERS, UNREADABLE, Other
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
        "clip": "text_model.embeddings.token_embedding.weight",
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

    def summary(self) -> dict[str, Any]:
        """For whoever asks what this worker draws with."""
        return {"file": self.path.name, "family": self.family, "layout": self.layout, "weights": self.weights}


@dataclass(frozen=True)
class _Shapes:
    """One layout of a transformer: what it is known by, and where its shapes say what."""

    class_name: str
    layout: str
    mark: str  # a tensor that no other transformer has; its name begins where the others' do
    sizes: Mapping[str, tuple[str, int]]  # tensor, and which of its lengths
    blocks: Mapping[str, str]  # what their names begin with
    has: Mapping[str, str]  # whether it has such a tensor


def _same(names: Mapping[str, str]) -> Mapping[str, tuple[str, int]]:
    """Lengths that all have: of each linear of `names` one."""
    lengths = {
        "in_channels": 1, "out_channels": 0, "joint_attention_dim": 1, "pooled_projection_dim": 1,
        "timestep_guidance_channels": 1, "timestep_channels": 1, "cond_in_channels": 1, "attention_head_dim": 0,
        "approximator_num_channels": 1, "approximator_hidden_dim": 0, "inner": 0, "mlp": 0,
    }  # fmt: skip
    return {name: (tensor, lengths[name]) for name, tensor in names.items()}


_BFL = {
    "inner": "img_in.weight",
    "in_channels": "img_in.weight",
    "out_channels": "final_layer.linear.weight",
    "joint_attention_dim": "txt_in.weight",
    "attention_head_dim": "double_blocks.0.img_attn.norm.query_norm.scale",
    "mlp": "double_blocks.0.img_mlp.0.weight",
}
_DIFFUSERS = {
    "inner": "x_embedder.weight",
    "in_channels": "x_embedder.weight",
    "out_channels": "proj_out.weight",
    "joint_attention_dim": "context_embedder.weight",
    "attention_head_dim": "transformer_blocks.0.attn.norm_q.weight",
}
_BFL_BLOCKS = {"num_layers": "double_blocks.", "num_single_layers": "single_blocks."}
_DIFFUSERS_BLOCKS = {"num_layers": "transformer_blocks.", "num_single_layers": "single_transformer_blocks."}
_TRANSFORMERS: tuple[_Shapes, ...] = (
    _Shapes(
        "ChromaTransformer2DModel", "original", "distilled_guidance_layer.layers.0.in_layer.weight",
        _same(_BFL | {
            "approximator_num_channels": "distilled_guidance_layer.in_proj.weight",
            "approximator_hidden_dim": "distilled_guidance_layer.in_proj.weight",
        }),
        _BFL_BLOCKS | {"approximator_layers": "distilled_guidance_layer.layers."}, {},
    ),
    _Shapes(
        "ChromaTransformer2DModel", "diffusers", "distilled_guidance_layer.layers.0.linear_1.weight",
        _same(_DIFFUSERS | {
            "mlp": "transformer_blocks.0.ff.net.0.proj.weight",
            "approximator_num_channels": "distilled_guidance_layer.in_proj.weight",
            "approximator_hidden_dim": "distilled_guidance_layer.in_proj.weight",
        }),
        _DIFFUSERS_BLOCKS | {"approximator_layers": "distilled_guidance_layer.layers."}, {},
    ),
    _Shapes(
        "Flux2Transformer2DModel", "original", "double_stream_modulation_img.lin.weight",
        _same(_BFL | {"timestep_guidance_channels": "time_in.in_layer.weight"}),
        _BFL_BLOCKS, {"guidance_embeds": "guidance_in.in_layer.weight"},
    ),
    _Shapes(
        "Flux2Transformer2DModel", "diffusers", "double_stream_modulation_img.linear.weight",
        _same(_DIFFUSERS | {
            "mlp": "transformer_blocks.0.ff.linear_in.weight",
            "timestep_guidance_channels": "time_guidance_embed.timestep_embedder.linear_1.weight",
        }),
        _DIFFUSERS_BLOCKS, {"guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight"},
    ),
    _Shapes(
        "Flux3Transformer2DModel", "original", "early_stream_modulations.image.lin.weight",
        _same({
            "inner": "emb_in.image.weight", "in_channels": "emb_in.image.weight",
            "cond_in_channels": "emb_in.image_cond.weight", "out_channels": "final_layer.image.linear.weight",
            "joint_attention_dim": "txt_in.weight", "timestep_channels": "time_in.in_layer.weight",
            "attention_head_dim": "single_blocks.0.norm.query_norm.scale", "mlp": "single_blocks.0.mlp_in.weight",
        }),
        {"num_layers": "content_mode_blocks.image.", "num_single_layers": "single_blocks."},
        {"flow_map": "ref_time_in.in_layer.weight"},
    ),
    _Shapes(
        "Flux3Transformer2DModel", "diffusers", "early_stream_modulations.image.linear.weight",
        _same({
            "inner": "x_embedders.image.weight", "in_channels": "x_embedders.image.weight",
            "cond_in_channels": "x_embedders.image_cond.weight", "out_channels": "proj_out.weight",
            "joint_attention_dim": "context_embedder.weight", "timestep_channels": "timestep_embedder.linear_1.weight",
            "attention_head_dim": "single_transformer_blocks.0.attn.norm_q.weight",
            "mlp": "single_transformer_blocks.0.ff.linear_in.weight",
        }),
        {"num_layers": "mode_blocks.image.", "num_single_layers": "single_transformer_blocks."},
        {"flow_map": "target_timestep_embedder.linear_1.weight"},
    ),
    _Shapes(
        "FluxTransformer2DModel", "original", "double_blocks.0.img_mod.lin.weight",
        _same(_BFL | {"pooled_projection_dim": "vector_in.in_layer.weight"}),
        _BFL_BLOCKS, {"guidance_embeds": "guidance_in.in_layer.weight"},
    ),
    _Shapes(
        "FluxTransformer2DModel", "diffusers", "single_transformer_blocks.0.norm.linear.weight",
        _same(_DIFFUSERS | {
            "mlp": "transformer_blocks.0.ff.net.0.proj.weight",
            "pooled_projection_dim": "time_text_embed.text_embedder.linear_1.weight",
        }),
        _DIFFUSERS_BLOCKS, {"guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight"},
    ),
)  # fmt: skip
# Of a transformer's class: which text encoder is which part, and how wide its blocks' inner layers are: the ratio that
# its configuration has no word for, or None where mlp_ratio says it of a gated layer, whose two halves lie in one.
_ENCODERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "FluxTransformer2DModel": {"clip": "text_encoder", "t5": "text_encoder_2"},
        "ChromaTransformer2DModel": {"t5": "text_encoder"},
        "Flux2Transformer2DModel": {"llm": "text_encoder"},
        "Flux3Transformer2DModel": {"llm": "text_encoder"},
    }
)
_MLP_RATIO = MappingProxyType({"FluxTransformer2DModel": 4, "ChromaTransformer2DModel": 4})


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
    for row in OTHER_FORMATS:
        if re.match(row.begins, begins, re.DOTALL | re.IGNORECASE):
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
    found = [(shapes, prefix) for shapes in _TRANSFORMERS for prefix in _prefixes(shapes.mark, tensors)]
    if found:
        _refuse(names, ADAPTED)
    else:
        _refuse(names, (*ADAPTED, *OTHERS))
        raise Refused(_unknown(tensors, metadata))
    shapes, prefix = min(found, key=lambda each: each[1].startswith("model_ema"))
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    configuration = _configuration(shapes, own)
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


def _configuration(shapes: _Shapes, own: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What the tensors of a transformer say of it. Raises Refused where they do not fit together."""
    sizes = {name: _length(own, tensor, axis) for name, (tensor, axis) in shapes.sizes.items()}
    inner, mlp, dim = sizes.pop("inner"), sizes.pop("mlp"), sizes["attention_head_dim"]
    if not all((inner, dim, sizes["out_channels"])) or inner % dim:
        raise Refused(f"does not fit together: {inner:,} numbers a token, and attention heads of {dim:,}")
    ratio = mlp / inner
    configuration: dict[str, Any] = {"_class_name": shapes.class_name, **sizes, "num_attention_heads": inner // dim}
    if (expected := _MLP_RATIO.get(shapes.class_name)) is None:
        configuration["mlp_ratio"] = ratio / 2
    elif ratio != expected:
        raise Refused(f"has layers of {mlp:,} in blocks of {inner:,}, and FLUX.1 is {expected} times as wide there")
    configuration |= {name: _blocks(prefix, own) for name, prefix in shapes.blocks.items()}
    configuration |= {name: tensor in own for name, tensor in shapes.has.items()}
    return configuration


def _length(own: Mapping[str, TensorInfo], name: str, axis: int) -> int:
    if name not in own and name.endswith("_norm.scale"):
        name = f"{name.removesuffix('scale')}weight"  # as newer programs call it
    if name not in own:
        raise Refused(f"is not whole: a FLUX has a tensor {name}, and this file has none")
    shape = own[name].shape
    if len(shape) <= axis:
        raise Refused(f"is no FLUX: {name} has the shape {list(shape)}")
    return shape[axis]


def _blocks(prefix: str, own: Mapping[str, TensorInfo]) -> int:
    """How many blocks there are, all of them alike. Raises Refused where one is missing or lacks what others have."""
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in own.items():
        if name.startswith(prefix) and name.count(".") > prefix.count("."):
            number, _, rest = name[len(prefix) :].partition(".")
            blocks.setdefault(number, {})[rest] = tensor.shape
    weights = [rest for rest in blocks.get("0", {}) if rest.endswith((".weight", ".scale", ".bias"))]
    first = blocks.get("0", {})
    for number in map(str, range(len(blocks))):
        has = blocks.get(number, {})
        lacks = [rest for rest in weights if has.get(rest) != first[rest]]
        if lacks or not has:
            missing = f"{prefix}{number}.{'.'.join(lacks[:1])}"
            raise Refused(f"is not whole: {missing} is not there, or of another shape than in block 0")
    return len(blocks)


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

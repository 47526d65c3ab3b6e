"""A transformer's layouts in one file: what each is known by, and what the shapes of its tensors say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from src.errors import Refused
from src.request.tensor_file import TensorInfo


@dataclass(frozen=True)
class Shapes:
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
TRANSFORMERS: tuple[Shapes, ...] = (
    Shapes(
        "ChromaTransformer2DModel", "original", "distilled_guidance_layer.layers.0.in_layer.weight",
        _same(_BFL | {
            "approximator_num_channels": "distilled_guidance_layer.in_proj.weight",
            "approximator_hidden_dim": "distilled_guidance_layer.in_proj.weight",
        }),
        _BFL_BLOCKS | {"approximator_layers": "distilled_guidance_layer.layers."}, {},
    ),
    Shapes(
        "ChromaTransformer2DModel", "diffusers", "distilled_guidance_layer.layers.0.linear_1.weight",
        _same(_DIFFUSERS | {
            "mlp": "transformer_blocks.0.ff.net.0.proj.weight",
            "approximator_num_channels": "distilled_guidance_layer.in_proj.weight",
            "approximator_hidden_dim": "distilled_guidance_layer.in_proj.weight",
        }),
        _DIFFUSERS_BLOCKS | {"approximator_layers": "distilled_guidance_layer.layers."}, {},
    ),
    Shapes(
        "Flux2Transformer2DModel", "original", "double_stream_modulation_img.lin.weight",
        _same(_BFL | {"timestep_guidance_channels": "time_in.in_layer.weight"}),
        _BFL_BLOCKS, {"guidance_embeds": "guidance_in.in_layer.weight"},
    ),
    Shapes(
        "Flux2Transformer2DModel", "diffusers", "double_stream_modulation_img.linear.weight",
        _same(_DIFFUSERS | {
            "mlp": "transformer_blocks.0.ff.linear_in.weight",
            "timestep_guidance_channels": "time_guidance_embed.timestep_embedder.linear_1.weight",
        }),
        _DIFFUSERS_BLOCKS, {"guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight"},
    ),
    Shapes(
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
    Shapes(
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
    Shapes(
        "FluxTransformer2DModel", "original", "double_blocks.0.img_mod.lin.weight",
        _same(_BFL | {"pooled_projection_dim": "vector_in.in_layer.weight"}),
        _BFL_BLOCKS, {"guidance_embeds": "guidance_in.in_layer.weight"},
    ),
    Shapes(
        "FluxTransformer2DModel", "diffusers", "single_transformer_blocks.0.norm.linear.weight",
        _same(_DIFFUSERS | {
            "mlp": "transformer_blocks.0.ff.net.0.proj.weight",
            "pooled_projection_dim": "time_text_embed.text_embedder.linear_1.weight",
        }),
        _DIFFUSERS_BLOCKS, {"guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight"},
    ),
)  # fmt: skip
# How many times a token's width its blocks' inner layers have, where the configuration has no word for it; elsewhere
# mlp_ratio says it of a gated layer, whose two halves lie in one.
_MLP_RATIO = MappingProxyType({"FluxTransformer2DModel": 4, "ChromaTransformer2DModel": 4})


def configuration_of(shapes: Shapes, own: Mapping[str, TensorInfo]) -> dict[str, Any]:
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

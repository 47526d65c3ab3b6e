"""How trainers call the layers of a model -> the model's own names, which are diffusers' and transformers'.

Names are compared with underscores for dots: kohya, OneTrainer and LyCORIS write them so, the others write dots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Before a layer's name, and the network that is meant; "" leaves that open. They may follow each other.
_PREFIXES = {
    "lora_unet_": "transformer",  # kohya, musubi
    "lora_transformer_": "transformer",  # OneTrainer
    "lycoris_": "",  # LyCORIS, SimpleTuner
    "base_model.model.": "",  # PEFT
    "model.diffusion_model.": "transformer",  # ComfyUI
    "model.": "",
    "diffusion_model.": "transformer",  # ComfyUI, ai-toolkit
    "transformer.": "transformer",  # diffusers
    "unet.": "transformer",
    "module.": "",  # torch's DistributedDataParallel
    "_orig_mod.": "",  # torch.compile
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",  # OneTrainer
    "lora_te3_": "text_encoder_2",  # kohya counts it as SD3's third
    "lora_te_": "text_encoder",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_2",
    "text_encoders.": "",  # ComfyUI
    "clip_l.": "text_encoder",
    "lora_clip_l_": "text_encoder",
    "t5xxl.": "text_encoder_2",
    "lora_t5xxl_": "text_encoder_2",
}
_MOST_PREFIXES = 8

_QKV = ("transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.to_k", "transformer_blocks.{}.attn.to_v")
_ADDED_QKV = tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv")
_SINGLE_QKV = tuple(f"single_{name}" for name in _QKV)

_FLUX_3_BLOCKS = (
    ("content_mode_blocks.image", "mode_blocks.image"),
    ("content_mode_blocks.image_cond", "mode_blocks.image_cond"),
    ("txt_mode_blocks", "txt_mode_blocks"),
    ("single_blocks", "single_transformer_blocks"),
)
_FLUX_3_LAYERS = (
    ("q_proj", "attn.to_q"),
    ("k_proj", "attn.to_k"),
    ("v_proj", "attn.to_v"),
    ("attn_out", "attn.to_out.0"),
    ("mlp_in", "ff.linear_in"),
    ("mlp_out", "ff.linear_out"),
)

# Black Forest Labs' names of FLUX.1's and FLUX.2's layers, and whose rows their outputs are in diffusers, in order.
# https://github.com/black-forest-labs/flux/blob/main/src/flux/model.py and modules/layers.py; flux2 likewise.
_OTHER_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("double_blocks.{}.img_attn.qkv", _QKV),
    ("double_blocks.{}.txt_attn.qkv", _ADDED_QKV),
    ("double_blocks.{}.img_attn.proj", ("transformer_blocks.{}.attn.to_out.0",)),
    ("double_blocks.{}.txt_attn.proj", ("transformer_blocks.{}.attn.to_add_out",)),
    ("double_blocks.{}.img_mod.lin", ("transformer_blocks.{}.norm1.linear",)),
    ("double_blocks.{}.txt_mod.lin", ("transformer_blocks.{}.norm1_context.linear",)),
    ("double_blocks.{}.img_mlp.0", ("transformer_blocks.{}.ff.net.0.proj",)),
    ("double_blocks.{}.img_mlp.2", ("transformer_blocks.{}.ff.net.2",)),
    ("double_blocks.{}.txt_mlp.0", ("transformer_blocks.{}.ff_context.net.0.proj",)),
    ("double_blocks.{}.txt_mlp.2", ("transformer_blocks.{}.ff_context.net.2",)),
    ("single_blocks.{}.linear1", (*_SINGLE_QKV, "single_transformer_blocks.{}.proj_mlp")),
    ("single_blocks.{}.linear2", ("single_transformer_blocks.{}.proj_out",)),
    ("single_blocks.{}.modulation.lin", ("single_transformer_blocks.{}.norm.linear",)),
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    # FLUX.2's
    ("double_blocks.{}.img_mlp.0", ("transformer_blocks.{}.ff.linear_in",)),
    ("double_blocks.{}.img_mlp.2", ("transformer_blocks.{}.ff.linear_out",)),
    ("double_blocks.{}.txt_mlp.0", ("transformer_blocks.{}.ff_context.linear_in",)),
    ("double_blocks.{}.txt_mlp.2", ("transformer_blocks.{}.ff_context.linear_out",)),
    ("single_blocks.{}.linear1", ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",)),
    ("single_blocks.{}.linear2", ("single_transformer_blocks.{}.attn.to_out",)),
    ("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
    ("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
    ("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
    ("time_in.in_layer", ("time_guidance_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_guidance_embed.timestep_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_guidance_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_guidance_embed.guidance_embedder.linear_2",)),
    # Chroma's: https://github.com/lodestone-rock/flow/blob/master/src/models/chroma/module/layers.py
    ("distilled_guidance_layer.layers.{}.in_layer", ("distilled_guidance_layer.layers.{}.linear_1",)),
    ("distilled_guidance_layer.layers.{}.out_layer", ("distilled_guidance_layer.layers.{}.linear_2",)),
    # XLabs' attention processors: https://github.com/XLabs-AI/x-flux/blob/main/src/flux/modules/layers.py
    ("double_blocks.{}.processor.qkv_lora1", _QKV),
    ("double_blocks.{}.processor.qkv_lora2", _ADDED_QKV),
    ("double_blocks.{}.processor.proj_lora1", ("transformer_blocks.{}.attn.to_out.0",)),
    ("double_blocks.{}.processor.proj_lora2", ("transformer_blocks.{}.attn.to_add_out",)),
    ("single_blocks.{}.processor.qkv_lora", _SINGLE_QKV),
    ("single_blocks.{}.processor.proj_lora", ("single_transformer_blocks.{}.proj_out",)),
    # FLUX.3's, by https://github.com/black-forest-labs/flux-3-image-klein as diffusers converts it
    *(
        (f"{blocks}.{{}}.{theirs}", (f"{own_blocks}.{{}}.{ours}",))
        for blocks, own_blocks in _FLUX_3_BLOCKS
        for theirs, ours in _FLUX_3_LAYERS
    ),
    *(
        (f"{name}.{{}}.attn.to_qkv", tuple(f"{name}.{{}}.attn.to_{x}" for x in "qkv"))
        for name in ("mode_blocks.image", "mode_blocks.image_cond", "txt_mode_blocks")
    ),
    ("emb_in.image", ("x_embedders.image",)),
    ("emb_in.image_cond", ("x_embedders.image_cond",)),
    *(
        (f"{stream}_stream_modulations.{mode}.lin", (f"{stream}_stream_modulations.{mode}.linear",))
        for stream in ("early", "single")
        for mode in ("image", "image_cond", "txt")
    ),
    ("time_in.in_layer", ("timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("timestep_embedder.linear_2",)),
    ("ref_time_in.in_layer", ("target_timestep_embedder.linear_1",)),
    ("ref_time_in.out_layer", ("target_timestep_embedder.linear_2",)),
    ("final_layer.image.linear", ("proj_out",)),
    # diffusers' own, of projections that are fused
    ("transformer_blocks.{}.attn.to_qkv", _QKV),
    ("transformer_blocks.{}.attn.to_added_qkv", _ADDED_QKV),
    ("single_transformer_blocks.{}.attn.to_qkv", _SINGLE_QKV),
)
# Their output is shift and scale there, and scale and shift in diffusers: FLUX.1's and FLUX.2's, and FLUX.3's.
_SWAPPED = ("final_layer.adaLN_modulation.1", "final_layer.image.adaLN_modulation.1"), "norm_out.linear"


@dataclass(frozen=True)
class Target:
    """A layer of the model, and which rows of an adapted layer's output are its own, in this order."""

    layer: str
    rows: tuple[slice, ...]

    @property
    def out_features(self) -> int:
        """How many rows they are."""
        return sum(rows.stop - rows.start for rows in self.rows)

    def select(self, tensor: torch.Tensor) -> torch.Tensor:
        """Those rows of `tensor` [rows, ...]."""
        return torch.cat([tensor[rows] for rows in self.rows])


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer as a trainer sees it; it stands for one of the model's, or for several that were one."""

    targets: tuple[Target, ...]
    out_features: int
    in_features: int


def split_prefix(name: str) -> tuple[str, str]:
    """The network that `name` begins with, "" where it names none, and the rest."""
    network = ""
    for _ in range(_MOST_PREFIXES):
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        if not prefix:
            break
        network = network or _PREFIXES[prefix]
        name = name.removeprefix(prefix)
    return network, name


def flat(name: str) -> str:
    """`name` as it is compared."""
    return name.replace(".", "_")


def layers_by_name(shapes: Mapping[str, tuple[int, int]]) -> dict[str, AdaptedLayer]:
    """All layers of a network under every name that a trainer may give them, flat.

    `shapes` are the network's linear layers: their names, and how many features go out and in.
    """
    found: dict[str, AdaptedLayer] = {}
    for name, (out, into) in shapes.items():
        found[flat(name)] = AdaptedLayer((Target(name, (slice(0, out),)),), out, into)
        # transformers 5 has CLIP's layers without what older ones, and so all trainers, begin them with
        found.setdefault(flat(f"text_model.{name}"), found[flat(name)])
    blocks = {word for name in shapes for word in name.split(".") if word.isdigit()}
    for theirs, ours in _OTHER_NAMES:
        for block in sorted(blocks) if "{}" in theirs else [""]:
            names = [name.format(block) for name in ours]
            if all(name in shapes for name in names):
                _add(found, flat(theirs.format(block)), names, shapes)
    every, name = _SWAPPED
    if name in shapes:
        out, into = shapes[name]
        swapped = AdaptedLayer((Target(name, (slice(out // 2, out), slice(0, out // 2))),), out, into)
        found |= {flat(theirs): swapped for theirs in every}
    return found


def _add(
    found: dict[str, AdaptedLayer], theirs: str, names: Sequence[str], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """The layers `names` as one; of several each also by its number, as OneTrainer writes them."""
    targets, start = [], 0
    for i, name in enumerate(names):
        out, into = shapes[name]
        targets.append(Target(name, (slice(start, start + out),)))
        start += out
        if len(names) > 1:
            found.setdefault(f"{theirs}_{i}", found[flat(name)])
    found.setdefault(theirs, AdaptedLayer(tuple(targets), start, into))

"""Models in one file, made of folders: BFL's names and ComfyUI's, every type of weights, GGUF."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from src.weights.files import read_index
from src.weights.single_file import SingleFile, read_single_file

Tensors = dict[str, torch.Tensor]

# What a tensor of BFL's is joined of, in diffusers' names; N is the number of a block.
_NORMS = {
    "double_blocks.N.img_attn.norm.query_norm": ["transformer_blocks.N.attn.norm_q"],
    "double_blocks.N.img_attn.norm.key_norm": ["transformer_blocks.N.attn.norm_k"],
    "double_blocks.N.txt_attn.norm.query_norm": ["transformer_blocks.N.attn.norm_added_q"],
    "double_blocks.N.txt_attn.norm.key_norm": ["transformer_blocks.N.attn.norm_added_k"],
    "single_blocks.N.norm.query_norm": ["single_transformer_blocks.N.attn.norm_q"],
    "single_blocks.N.norm.key_norm": ["single_transformer_blocks.N.attn.norm_k"],
}
_FLUX_1 = {
    **_NORMS,
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "double_blocks.N.img_mod.lin": ["transformer_blocks.N.norm1.linear"],
    "double_blocks.N.txt_mod.lin": ["transformer_blocks.N.norm1_context.linear"],
    "double_blocks.N.img_attn.qkv": [f"transformer_blocks.N.attn.to_{each}" for each in "qkv"],
    "double_blocks.N.txt_attn.qkv": [f"transformer_blocks.N.attn.add_{each}_proj" for each in "qkv"],
    "double_blocks.N.img_attn.proj": ["transformer_blocks.N.attn.to_out.0"],
    "double_blocks.N.txt_attn.proj": ["transformer_blocks.N.attn.to_add_out"],
    "double_blocks.N.img_mlp.0": ["transformer_blocks.N.ff.net.0.proj"],
    "double_blocks.N.img_mlp.2": ["transformer_blocks.N.ff.net.2"],
    "double_blocks.N.txt_mlp.0": ["transformer_blocks.N.ff_context.net.0.proj"],
    "double_blocks.N.txt_mlp.2": ["transformer_blocks.N.ff_context.net.2"],
    "single_blocks.N.modulation.lin": ["single_transformer_blocks.N.norm.linear"],
    "single_blocks.N.linear1": [
        *(f"single_transformer_blocks.N.attn.to_{each}" for each in "qkv"),
        "single_transformer_blocks.N.proj_mlp",
    ],
    "single_blocks.N.linear2": ["single_transformer_blocks.N.proj_out"],
    "final_layer.linear": ["proj_out"],
}
_FLUX_2 = {
    **_NORMS,
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "double_blocks.N.img_attn.qkv": _FLUX_1["double_blocks.N.img_attn.qkv"],
    "double_blocks.N.txt_attn.qkv": _FLUX_1["double_blocks.N.txt_attn.qkv"],
    "double_blocks.N.img_attn.proj": ["transformer_blocks.N.attn.to_out.0"],
    "double_blocks.N.txt_attn.proj": ["transformer_blocks.N.attn.to_add_out"],
    "double_blocks.N.img_mlp.0": ["transformer_blocks.N.ff.linear_in"],
    "double_blocks.N.img_mlp.2": ["transformer_blocks.N.ff.linear_out"],
    "double_blocks.N.txt_mlp.0": ["transformer_blocks.N.ff_context.linear_in"],
    "double_blocks.N.txt_mlp.2": ["transformer_blocks.N.ff_context.linear_out"],
    "single_blocks.N.linear1": ["single_transformer_blocks.N.attn.to_qkv_mlp_proj"],
    "single_blocks.N.linear2": ["single_transformer_blocks.N.attn.to_out"],
    "final_layer.linear": ["proj_out"],
}
_CHROMA = {
    **{name: parts for name, parts in _FLUX_1.items() if "linear_" not in parts[0] and ".norm" not in parts[0]},
    **_NORMS,
    "distilled_guidance_layer.in_proj": ["distilled_guidance_layer.in_proj"],
    "distilled_guidance_layer.out_proj": ["distilled_guidance_layer.out_proj"],
    "distilled_guidance_layer.layers.N.in_layer": ["distilled_guidance_layer.layers.N.linear_1"],
    "distilled_guidance_layer.layers.N.out_layer": ["distilled_guidance_layer.layers.N.linear_2"],
    "distilled_guidance_layer.norms.N": ["distilled_guidance_layer.norms.N"],
}
_TABLES = {
    "FluxTransformer2DModel": _FLUX_1,
    "Flux2Transformer2DModel": _FLUX_2,
    "ChromaTransformer2DModel": _CHROMA,
}
_FLUX_3 = [
    (r"^x_embedders\.", "emb_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^mode_blocks\.", "content_mode_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^timestep_embedder\.linear_1\.", "time_in.in_layer."),
    (r"^timestep_embedder\.linear_2\.", "time_in.out_layer."),
    (r"^target_timestep_embedder\.linear_1\.", "ref_time_in.in_layer."),
    (r"^target_timestep_embedder\.linear_2\.", "ref_time_in.out_layer."),
    (r"^proj_out\.", "final_layer.image.linear."),
    (r"^norm_out\.linear\.", "final_layer.image.adaLN_modulation.1."),
    (r"\.attn\.to_([qkv])\.", r".\1_proj."),
    (r"\.attn\.to_out\.0\.", ".attn_out."),
    (r"\.attn\.norm_q\.weight", ".norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".norm.key_norm.scale"),
    (r"\.ff\.linear_in\.", ".mlp_in."),
    (r"\.ff\.linear_out\.", ".mlp_out."),
    (r"(?<=modulation|odulations)(.*)\.linear\.", r"\1.lin."),
]
_VAE = [
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"^quant_conv", "encoder.quant_conv"),
    (r"^post_quant_conv", "decoder.post_quant_conv"),
]


def _renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, instead in table:
        name = re.sub(pattern, instead, name)
    return name


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Scale and shift, as diffusers has them, in BFL's order."""
    return torch.cat(tensor.chunk(2)[::-1])


def transformer_of_bfl(class_name: str, tensors: Tensors) -> Tensors:
    """A transformer of diffusers' in BFL's names."""
    if class_name == "Flux3Transformer2DModel":
        return {
            _renamed(name, _FLUX_3): _swapped(tensor) if name.startswith("norm_out") else tensor
            for name, tensor in tensors.items()
        }
    of_bfl: Tensors = {}
    left = dict(tensors)
    for kind in ("weight", "bias"):
        if f"norm_out.linear.{kind}" in left:
            of_bfl[f"final_layer.adaLN_modulation.1.{kind}"] = _swapped(left.pop(f"norm_out.linear.{kind}"))
        for name, parts in _TABLES[class_name].items():
            for number in range(100) if "N" in name.split(".") else [0]:
                own = [f"{part}.{kind}".replace("N", str(number)) for part in parts]
                if own[0] in left:
                    suffix = "scale" if "norm" in name else kind
                    of_bfl[f"{name}.{suffix}".replace("N", str(number))] = torch.cat([left.pop(each) for each in own])
    assert not left, f"{list(left)} are of no table"
    return of_bfl


def vae_of_bfl(tensors: Tensors) -> Tensors:
    """An autoencoder of diffusers' in BFL's names."""
    of_bfl: Tensors = {}
    last = max(int(found[1]) for name in tensors if (found := re.search(r"up_blocks\.(\d)", name)))
    for name, tensor in tensors.items():
        new = _renamed(name, _VAE)
        if found := re.search(r"up_blocks\.(\d)\.", new):
            new = new.replace(found[0], f"up.{last - int(found[1])}.")
            new = new.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
        conv = ".attn_1." in new and tensor.ndim == 2  # a convolution of one pixel, in BFL's
        of_bfl[new] = tensor[:, :, None, None] if conv else tensor
    return of_bfl


def tensors_of(folder: Path) -> Tensors:
    """All of one network."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def single_file(
    folder: Path,
    path: Path,
    *,
    layout: str = "original",
    prefix: str = "",
    dtype: torch.dtype | None = None,
    all_in_one: bool = False,
    change: Callable[[Tensors], Tensors] = dict,
) -> SingleFile:
    """`path`, made of the model in `folder`: `change` gets the tensors of its transformer as they are written."""
    index = read_index(folder) or {}
    transformer = tensors_of(folder / "transformer")
    if layout == "original":
        transformer = transformer_of_bfl(index["transformer"][1], transformer)
    if dtype:
        transformer = {name: tensor.to(dtype) for name, tensor in transformer.items()}
    parts = {"transformer": prefix}
    tensors = {prefix + name: tensor for name, tensor in change(transformer).items()}
    if all_in_one:
        parts |= {"vae": "vae.", **_TEXT_ENCODERS.get(index["text_encoder"][1], {})}
        for part in parts.keys() - {"transformer"}:
            own = tensors_of(folder / part)
            own = vae_of_bfl(own) if part == "vae" and layout == "original" else own
            is_older = index[part][1] == "CLIPTextModel" and layout == "original"  # than transformers 5
            level = "text_model." if is_older else ""
            tensors |= {parts[part] + level + name: tensor for name, tensor in own.items()}
        tensors |= {name: tensor for name, tensor in _UNASKED.items() if name.startswith(tuple(parts.values()))}
    if path.suffix == ".gguf":
        write_gguf(path, tensors)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return read_single_file(path)


# What ComfyUI writes with FLUX.1's text encoders, and nothing of FLUX asks for.
_UNASKED = {
    "text_encoders.clip_l.transformer.text_projection.weight": torch.eye(4),
    "text_encoders.clip_l.transformer.logit_scale": torch.ones(()),
    "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
}
_TEXT_ENCODERS = {
    "CLIPTextModel": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
    "Qwen3ForCausalLM": {"text_encoder": "text_encoders.qwen3_4b.transformer."},
}


class Packed(torch.Tensor):
    """Values that a GGUF file is to have in blocks of `kind`."""

    kind: GGMLQuantizationType


def packed(tensor: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """To be written in blocks of `kind`."""
    found = tensor.as_subclass(Packed)
    found.kind = kind
    return found


def write_gguf(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """As quantizers of FLUX write it."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors.items():
        values = tensor.float().contiguous().numpy()
        kind = getattr(tensor, "kind", None) or _KINDS[tensor.dtype]
        if values.ndim == 2 and values.shape[1] % (block := gguf.GGML_QUANT_SIZES[kind][0]):  # as ComfyUI-GGUF does
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(-1, block)
        writer.add_tensor(name, blocks_of(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_KINDS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
# Where a block has its scales, float16: the gguf package takes these kinds apart, and puts none together.
_SCALES_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def blocks_of(values: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The blocks of `values`; of kinds that nobody here can make, random ones of about their size."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        count, size = gguf.GGML_QUANT_SIZES[kind]
        generator = np.random.default_rng(values.shape)
        blocks = generator.integers(0, 256, (*values.shape[:-1], values.shape[-1] // count, size), dtype=np.uint8)
        for start in _SCALES_AT[kind.name]:
            scale = generator.uniform(0.5, 1.0, blocks.shape[:-1]) * values.std() / (500 if size > 100 else 30)
            blocks[..., start : start + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
        return blocks.reshape(*values.shape[:-1], -1)

"""Every layout in which trainers write adapters: the picture is that of the merged weights, or a refusal says why.

The truth is made by hand: what the adapter adds to a weight is added to the weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from handler import respond
from src.engine import Engine, load_engine
from src.engine.lora import AdapterFile, Networks
from src.errors import Refused
from src.job import Job
from src.settings import Settings
from tests.conftest import base64_of, opened
from tests.small_models import small

Tensors = dict[str, torch.Tensor]
SHAPES, RANK = "flux-shapes", 4
RANDOM = torch.Generator().manual_seed(0)


def total(tensor: torch.Tensor) -> float:
    return tensor.double().sum().item()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM)


@dataclass
class Layout:
    """A file, and what it adds to which layer's weight or bias; `says` is in the warning, or in the refusal."""

    tensors: Tensors
    deltas: Tensors = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    says: str = ""
    without_meaning: str = ""  # the end of a tensor's name that is read, and changes nothing by its definition


# Small models' families, by the beginnings of their layouts' names.
FAMILIES = {"klein": "klein", "fill": "fill", "control": "control", "flux_3": "flux.3"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Engine]:
    """flux-shapes, and small models of other families."""
    folder = tmp_path_factory.mktemp("models")
    models = {"shapes": SHAPES}
    for name, family in FAMILIES.items():
        models[name] = str(small(family, folder / name))
    return {name: load_engine(Settings(model_name=model)) for name, model in models.items()}


class Shape:
    """The layers of a model: a random LoRA for each of them, that can be seen in the picture."""

    def __init__(self, engine: Engine) -> None:
        self._pipeline = engine._pipeline
        self._strength = 1 if engine.model.base.class_name == "FluxPipeline" else 8  # small models show less

    def weight(self, layer: str) -> torch.Tensor:
        network, _, name = layer.partition(".")
        weight: torch.Tensor = getattr(self._pipeline, network).get_submodule(name).weight
        return weight

    def std(self, layer: str) -> float:
        return self._strength * self.weight(layer).std().item()

    def pair(self, *layers: str, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
        """Down and up of a layer, or of several that are one."""
        out = sum(self.weight(layer).shape[0] for layer in layers)
        into = self.weight(layers[0]).shape[1]
        return randn(rank, into) / into**0.5, randn(out, rank) * self.std(layers[0]) * into**0.5

    def split(self, delta: torch.Tensor, *layers: str) -> Tensors:
        """The delta of several layers that are one, by layer."""
        parts = torch.split(delta, [self.weight(layer).shape[0] for layer in layers])
        return dict(zip(layers, parts, strict=True))


QKV = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
ADDED = [f"transformer.transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]
OUT = "transformer.transformer_blocks.0.attn.to_out.0"
SINGLE = [
    *(f"transformer.single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
    "transformer.single_transformer_blocks.0.proj_mlp",
]
CLIP = "text_encoder.encoder.layers.0.self_attn.q_proj"
Make = Callable[[Shape], Layout]
LAYOUTS: dict[str, Make] = {}


def make(name: str, engine: Engine) -> Layout:
    """The same numbers whichever tests ran before."""
    RANDOM.manual_seed(0)
    return LAYOUTS[name](Shape(engine))


def layout(function: Make) -> Make:
    LAYOUTS[function.__name__] = function
    return function


def kohya(name: str, down: torch.Tensor, up: torch.Tensor, alpha: float | None = None) -> Tensors:
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def peft(name: str, down: torch.Tensor, up: torch.Tensor, adapter: str = "") -> Tensors:
    return {f"{name}.lora_A{adapter}.weight": down, f"{name}.lora_B{adapter}.weight": up}


def header(**config: Any) -> dict[str, str]:
    config = {f"transformer.{name}": value for name, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


@layout
def diffusers(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    return Layout(peft(OUT, down, up), {OUT: up @ down})


@layout
def diffusers_alpha_in_the_header(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    metadata = header(r=8, lora_alpha=8, alpha_pattern={"attn.to_out.0": 1}, target_modules=["to_out.0"])
    return Layout(peft(OUT, down, up), {OUT: up @ down / RANK}, metadata)


@layout
def diffusers_rslora(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    return Layout(peft(OUT, down, up), {OUT: up @ down}, header(r=RANK, lora_alpha=2, use_rslora=True))


@layout
def diffusers_ranks_by_layer(at: Shape) -> Layout:
    (down, up), (down_2, up_2) = at.pair(OUT), at.pair(QKV[0], rank=2)
    tensors = {**peft(OUT, down, up), **peft(QKV[0], down_2, up_2)}
    return Layout(tensors, {OUT: up @ down * 2, QKV[0]: up_2 @ down_2 * 4}, header(r=RANK, lora_alpha=8))


@layout
def diffusers_down_up_with_alpha(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    return Layout(kohya(OUT, down, up, alpha=1.0), {OUT: up @ down / RANK})


@layout
def peft_base_model(at: Shape) -> Layout:
    down, up = at.pair(*QKV)
    return Layout(peft("base_model.model.double_blocks.0.img_attn.qkv", down, up), at.split(up @ down, *QKV))


@layout
def peft_adapter_name(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    return Layout(peft(OUT, down, up, adapter=".default"), {OUT: up @ down})


@layout
def peft_without_prefix(at: Shape) -> Layout:
    (down, up), (down_2, up_2) = at.pair(OUT), at.pair(*ADDED)
    tensors = {**peft(OUT.removeprefix("transformer."), down, up), **peft("double_blocks.0.txt_attn.qkv", down_2, up_2)}
    return Layout(tensors, {OUT: up @ down, **at.split(up_2 @ down_2, *ADDED)})


@layout
def ai_toolkit(at: Shape) -> Layout:
    down, up = at.pair(*SINGLE)
    return Layout(peft("diffusion_model.single_blocks.0.linear1", down, up), at.split(up @ down, *SINGLE))


@layout
def kohya_with_clip(at: Shape) -> Layout:
    (down, up), (down_2, up_2) = at.pair(OUT), at.pair(CLIP)
    return Layout(
        {
            **kohya("lora_unet_double_blocks_0_img_attn_proj", down, up, alpha=2.0),
            **kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", down_2, up_2, alpha=8.0),
        },
        {OUT: up @ down / 2, CLIP: up_2 @ down_2 * 2},
    )


@layout
def clip_with_text_model(at: Shape) -> Layout:
    down, up = at.pair(CLIP)
    name = CLIP.replace("text_encoder.", "text_encoder.text_model.")
    return Layout(peft(name, down, up), {CLIP: up @ down})


@layout
def clip_ranks_by_layer(at: Shape) -> Layout:
    other = CLIP.replace("q_proj", "v_proj")
    (down, up), (down_2, up_2) = at.pair(CLIP), at.pair(other, rank=2)
    return Layout({**peft(CLIP, down, up), **peft(other, down_2, up_2)}, {CLIP: up @ down, other: up_2 @ down_2})


@layout
def kohya_bias(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    bias = randn(up.shape[0])
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {**kohya(name, down, up, alpha=2.0), f"{name}.diff_b": bias}
    (down_2, up_2) = at.pair(QKV[0])
    tensors |= kohya("lora_unet_transformer_blocks_0_attn_to_q", down_2, up_2)
    return Layout(tensors, {OUT: up @ down / 2, f"{OUT}.bias": bias, QKV[0]: up_2 @ down_2})


@layout
def bias_alone(at: Shape) -> Layout:
    bias = randn(at.weight(OUT).shape[0])
    return Layout({"lora_unet_double_blocks_0_img_attn_proj.diff_b": bias}, {f"{OUT}.bias": bias})


@layout
def peft_lora_bias(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    bias = randn(up.shape[0])
    tensors = {**peft(OUT, down, up), f"{OUT}.lora_B.bias": bias}
    return Layout(tensors, {OUT: up @ down / 2, f"{OUT}.bias": bias / 2}, header(r=RANK, lora_alpha=2))


@layout
def kohya_with_t5(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    t5 = kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", randn(4, 64), randn(64, 4), alpha=4.0)
    return Layout(
        {**kohya("lora_unet_double_blocks_0_img_attn_proj", down, up), **t5},
        {OUT: up @ down},
        says="3 of its tensors are of T5 (text_encoder_2)",
    )


@layout
def comfyui_text_encoders(at: Shape) -> Layout:
    down, up = at.pair(CLIP)
    return Layout(
        {
            **peft("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", down, up),
            **peft("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", randn(4, 8), randn(8, 4)),
        },
        {CLIP: up @ down},
        says="2 of its tensors are of T5 (text_encoder_2)",
    )


@layout
def t5_alone(_: Shape) -> Layout:
    return Layout(kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", randn(4, 64), randn(64, 4)), says="alone")


@layout
def another_models_width(_: Shape) -> Layout:
    tensors = kohya("lora_unet_single_blocks_0_linear1", randn(4, 3072), randn(27648, 4), alpha=4.0)
    return Layout(tensors, says="was made for another model")


@layout
def fp8(at: Shape) -> Layout:
    down, up = (tensor.to(torch.float8_e4m3fn) for tensor in at.pair(*QKV))
    tensors = kohya("lora_unet_double_blocks_0_img_attn_qkv", down, up)
    return Layout(tensors, at.split(up.float() @ down.float(), *QKV))


@layout
def mixed_types(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    down, up = down.half(), up.bfloat16()
    tensors = kohya("lora_unet_double_blocks_0_img_attn_proj", down, up)
    return Layout(tensors | {"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor([2.0]).half()}, {
        OUT: up.float() @ down.float() / 2
    })  # fmt: skip


@layout
def kohya_outside_of_blocks(at: Shape) -> Layout:
    layers = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
        "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
        "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
        "double_blocks_0_img_mod_lin": "transformer_blocks.0.norm1.linear",
        "single_blocks_0_modulation_lin": "single_transformer_blocks.0.norm.linear",
    }  # fmt: skip
    made = {theirs: (f"transformer.{ours}", *at.pair(f"transformer.{ours}")) for theirs, ours in layers.items()}
    tensors = [kohya(f"lora_unet_{theirs}", down, up, alpha=1.0) for theirs, (_, down, up) in made.items()]
    deltas = {ours: up @ down / RANK for ours, down, up in made.values()}
    return Layout({name: tensor for each in tensors for name, tensor in each.items()}, deltas)


@layout
def final_modulation_is_swapped(at: Shape) -> Layout:
    name = "transformer.norm_out.linear"
    down, up = at.pair(name)
    shift, scale = (up @ down).chunk(2)
    tensors = kohya("lora_unet_final_layer_adaLN_modulation_1", down, up)
    return Layout(tensors, {name: torch.cat([scale, shift])})


@layout
def one_trainer(at: Shape) -> Layout:
    (down, up), (down_2, up_2) = at.pair(OUT), at.pair(QKV[1])
    return Layout(
        {
            **kohya("lora_transformer_transformer_blocks_0_attn_to_out_0", down, up, alpha=1.0),
            **kohya("transformer.double_blocks.0.img_attn.qkv.1", down_2, up_2),
        },
        {OUT: up @ down / RANK, QKV[1]: up_2 @ down_2},
    )


@layout
def xlabs(at: Shape) -> Layout:
    single = SINGLE[:3]
    (down, up), (down_2, up_2), (down_3, up_3) = at.pair(*QKV), at.pair(OUT), at.pair(*single)

    def named(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
        return {f"{name}.down.weight": down, f"{name}.up.weight": up}

    return Layout(
        {
            **named("double_blocks.0.processor.qkv_lora1", down, up),
            **named("double_blocks.0.processor.proj_lora1", down_2, up_2),
            **named("single_blocks.0.processor.qkv_lora", down_3, up_3),
        },
        {**at.split(up @ down, *QKV), OUT: up_2 @ down_2, **at.split(up_3 @ down_3, *single)},
    )


@layout
def attention_processors(at: Shape) -> Layout:
    down, up = at.pair(QKV[0])
    name = "transformer.transformer_blocks.0.attn.processor.to_q_lora"
    return Layout({f"{name}.down.weight": down, f"{name}.up.weight": up}, {QKV[0]: up @ down})


@layout
def fused_and_apart(at: Shape) -> Layout:
    (down, up), (down_2, up_2) = at.pair(*QKV), at.pair(QKV[2], rank=2)
    deltas = at.split(up @ down, *QKV)
    deltas[QKV[2]] = deltas[QKV[2]] + up_2 @ down_2
    tensors = {**peft("diffusion_model.double_blocks.0.img_attn.qkv", down, up), **peft(QKV[2], down_2, up_2)}
    return Layout(tensors, deltas)


@layout
def loha(at: Shape) -> Layout:
    (w1_b, w1_a), (w2_b, w2_a) = at.pair(OUT, rank=2), at.pair(OUT, rank=2)
    w2_a, w2_b = w2_a / w2_a.std(), w2_b / w2_b.std()
    parts = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b, "alpha": torch.tensor(1.0)}
    tensors = {f"lycoris_transformer_blocks_0_attn_to_out_0.{name}": tensor for name, tensor in parts.items()}
    return Layout(tensors, {OUT: (w1_a @ w1_b) * (w2_a @ w2_b) / 2})


def lokr_of(at: Shape, *layers: str, factors: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    out, into = sum(at.weight(layer).shape[0] for layer in layers), at.weight(layers[0]).shape[1]
    w1 = randn(*factors) * at.std(layers[0]) * 2
    return w1, randn(out // factors[0], into // factors[1])


@layout
def lokr_of_fused_layers(at: Shape) -> Layout:
    w1, w2 = lokr_of(at, *QKV, factors=(16, 16))  # 480 = 16 * 30 rows, and 160 = 5.3 * 30 are one layer's
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(1e10)}
    return Layout(tensors, at.split(torch.kron(w1, w2), *QKV), without_meaning=".alpha")


@layout
def lokr_decomposed(at: Shape) -> Layout:
    w1, w2 = lokr_of(at, OUT, factors=(8, 8))
    a, b = randn(w2.shape[0], 2), randn(2, w2.shape[1])
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    tensors = {f"lycoris_transformer_blocks_0_attn_to_out_0.{name}": tensor for name, tensor in parts.items()}
    return Layout(tensors, {OUT: torch.kron(w1, a @ b) / 2})


@layout
def lokr_and_lora(at: Shape) -> Layout:
    w1, w2 = lokr_of(at, OUT, factors=(8, 8))
    down, up = at.pair(QKV[0])
    tensors = {f"{OUT}.lokr_w1": w1, f"{OUT}.lokr_w2": w2, **peft(QKV[0], down, up)}
    return Layout(tensors, {OUT: torch.kron(w1, w2), QKV[0]: up @ down})


def dora_delta(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    adapted = weight + delta
    made: torch.Tensor = adapted * (magnitude / adapted.norm(dim=1))[:, None] - weight
    return made


@layout
def dora(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    weight = at.weight(OUT).detach()
    magnitude = weight.norm(dim=1) * (1 + randn(len(weight)).abs())
    tensors = {**peft(OUT, down, up), f"{OUT}.lora_magnitude_vector": magnitude}
    return Layout(tensors, {OUT: dora_delta(weight, up @ down, magnitude)})


@layout
def kohya_dora_of_fused_layers(at: Shape) -> Layout:
    down, up = at.pair(*QKV)
    weight = torch.cat([at.weight(layer).detach() for layer in QKV])
    magnitude = weight.norm(dim=1, keepdim=True) * 1.5
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {**kohya(name, down, up, alpha=2.0), f"{name}.dora_scale": magnitude}
    return Layout(tensors, at.split(dora_delta(weight, up @ down / 2, magnitude.flatten()), *QKV))


@layout
def dora_of_columns(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    return Layout(
        {**kohya(name, down, up), f"{name}.dora_scale": randn(1, 160)},
        says="where only one for each of its 160 rows can be applied",
    )


@layout
def dora_in_some_layers(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    tensors = {**peft(OUT, down, up), f"{OUT}.lora_magnitude_vector": randn(160), **peft(QKV[0], *at.pair(QKV[0]))}
    return Layout(tensors, says="a DoRA in some of its layers and none in others")


@layout
def not_finite(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    return Layout(peft(OUT, down, torch.full_like(up, torch.nan)), says="values that are not finite")


@layout
def whole_weight(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    diff = {"lora_unet_double_blocks_0_img_attn_proj.diff": up @ down}
    return Layout({**peft(QKV[0], *at.pair(QKV[0])), **diff}, says="a full weight (diff)")


@layout
def oft(_: Shape) -> Layout:
    return Layout({"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": randn(4, 40, 40)}, says="it is an OFT")


@layout
def norm(at: Shape) -> Layout:
    changed = {"transformer.transformer_blocks.0.attn.norm_q.weight": randn(32)}
    return Layout({**peft(OUT, *at.pair(OUT)), **changed}, says="attn.norm_q.weight")


@layout
def two_adapters(at: Shape) -> Layout:
    tensors = peft(OUT, *at.pair(OUT), adapter=".one") | peft(OUT, *at.pair(OUT), adapter=".other")
    return Layout(tensors, says="holds two adapters")


@layout
def numbers_of_no_weights(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    return Layout(peft(OUT, down, up.to(torch.int8)), says="int8")


@layout
def bad_header(at: Shape) -> Layout:
    return Layout(peft(OUT, *at.pair(OUT)), metadata={"lora_adapter_metadata": "[1"}, says="no JSON object")


@layout
def pattern_in_the_header(at: Shape) -> Layout:
    metadata = header(lora_alpha=4, alpha_pattern={".*to_out": 8})
    return Layout(peft(OUT, *at.pair(OUT)), metadata=metadata, says="where only layers' names are read")


@layout
def pissa(at: Shape) -> Layout:
    return Layout(
        peft(OUT, *at.pair(OUT)), metadata=header(init_lora_weights="pissa_niter_4"), says="convert it to LoRA"
    )


@layout
def klein_ai_toolkit(at: Shape) -> Layout:
    linear1 = "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    mlp = "transformer.transformer_blocks.0.ff.linear_in"
    (down, up), (down_2, up_2), (down_3, up_3) = at.pair(*QKV), at.pair(linear1), at.pair(mlp)
    return Layout(
        {
            **peft("diffusion_model.double_blocks.0.img_attn.qkv", down, up),
            **peft("diffusion_model.single_blocks.0.linear1", down_2, up_2),
            **kohya("lora_unet_double_blocks_0_img_mlp_0", down_3, up_3, alpha=2.0),
        },
        {**at.split(up @ down, *QKV), linear1: up_2 @ down_2, mlp: up_3 @ down_3 / 2},
    )


@layout
def klein_modulation(at: Shape) -> Layout:
    name = "transformer.double_stream_modulation_img.linear"
    down, up = at.pair(name)
    return Layout(peft("base_model.model.double_stream_modulation_img.lin", down, up), {name: up @ down})


@layout
def klein_lokr(at: Shape) -> Layout:
    (w1, w2), (w3, w4) = lokr_of(at, OUT, factors=(4, 4)), lokr_of(at, *QKV, factors=(16, 4))
    proj, qkv = (f"diffusion_model.double_blocks.0.img_attn.{name}" for name in ("proj", "qkv"))
    tensors = {f"{proj}.lokr_w1": w1, f"{proj}.lokr_w2": w2, f"{qkv}.lokr_w1": w3, f"{qkv}.lokr_w2": w4}
    deltas = {OUT: torch.kron(w1, w2), **at.split(torch.kron(w3, w4), *QKV)}
    return Layout(tensors, deltas)


@layout
def klein_text_encoder(at: Shape) -> Layout:
    down, up = at.pair(OUT)
    words = kohya("lora_te1_model_layers_0_self_attn_q_proj", randn(4, 16), randn(16, 4))
    return Layout({**peft(OUT, down, up), **words}, {OUT: up @ down}, says="2 of its tensors are of")


def narrow_x_embedder(at: Shape) -> Layout:
    name = "transformer.x_embedder"
    _, up = at.pair(name)
    down = randn(RANK, 64) / 8
    delta = torch.zeros_like(at.weight(name))
    delta[:, :64] = up @ down
    return Layout(peft(name, down, up), {name: delta})


@layout
def fill_narrow_x_embedder(at: Shape) -> Layout:
    return narrow_x_embedder(at)


@layout
def control_narrow_x_embedder(at: Shape) -> Layout:
    return narrow_x_embedder(at)


def original_flux_3(at: Shape, prefix: str, *layers: tuple[str, str]) -> Layout:
    """A LoRA for each of `layers`, which are pairs: Black Forest Labs' name, and the model's."""
    tensors, deltas = Tensors(), Tensors()
    for theirs, ours in layers:
        down, up = at.pair(f"transformer.{ours}")
        tensors |= peft(f"{prefix}{theirs}", down, up)
        deltas[f"transformer.{ours}"] = up @ down
    return Layout(tensors, deltas)


def in_a_block(theirs: str, ours: str) -> list[tuple[str, str]]:
    names = {"q_proj": "attn.to_q", "k_proj": "attn.to_k", "v_proj": "attn.to_v", "attn_out": "attn.to_out.0",
             "mlp_in": "ff.linear_in", "mlp_out": "ff.linear_out"}  # fmt: skip
    return [(f"{theirs}.0.{one}", f"{ours}.0.{other}") for one, other in names.items()]


@layout
def flux_3_original(at: Shape) -> Layout:
    """As ComfyUI and ai-toolkit write it."""
    modes = [layer for mode in ("image", "image_cond")
             for layer in in_a_block(f"content_mode_blocks.{mode}", f"mode_blocks.{mode}")]  # fmt: skip
    texts = in_a_block("txt_mode_blocks", "txt_mode_blocks")
    singles = in_a_block("single_blocks", "single_transformer_blocks")
    return original_flux_3(at, "diffusion_model.", *modes, *texts, *singles)


@layout
def flux_3_original_outside_of_blocks(at: Shape) -> Layout:
    modulation = [(f"{stream}_stream_modulations.{mode}.lin", f"{stream}_stream_modulations.{mode}.linear")
                  for stream in ("early", "single") for mode in ("image", "image_cond", "txt")]  # fmt: skip
    return original_flux_3(
        at,
        "base_model.model.",
        ("emb_in.image", "x_embedders.image"),
        ("emb_in.image_cond", "x_embedders.image_cond"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "timestep_embedder.linear_1"),
        ("time_in.out_layer", "timestep_embedder.linear_2"),
        ("ref_time_in.in_layer", "target_timestep_embedder.linear_1"),
        ("ref_time_in.out_layer", "target_timestep_embedder.linear_2"),
        ("final_layer.image.linear", "proj_out"),
        *modulation,
    )


@layout
def flux_3_original_last_norm(at: Shape) -> Layout:
    """Shift and scale there, scale and shift here."""
    name = "transformer.norm_out.linear"
    down, up = at.pair(name)
    shift, scale = (up @ down).chunk(2)
    key = "diffusion_model.final_layer.image.adaLN_modulation.1"
    return Layout(peft(key, down, up), {name: torch.cat([scale, shift])})


@layout
def flux_3_diffusers(at: Shape) -> Layout:
    names = ("mode_blocks.image.0.attn.to_q", "txt_mode_blocks.0.ff.linear_in", "single_transformer_blocks.0.attn.to_v",
             "mode_blocks.image_cond.0.attn.to_out.0")  # fmt: skip
    return original_flux_3(at, "transformer.", *((name, name) for name in names))


@layout
def flux_3_kohya(at: Shape) -> Layout:
    made = original_flux_3(
        at, "", *in_a_block("content_mode_blocks.image_cond", "mode_blocks.image_cond"),
        *in_a_block("single_blocks", "single_transformer_blocks"),
    )  # fmt: skip
    tensors = Tensors()
    for key, tensor in made.tensors.items():
        name, _, kind = key.removesuffix(".weight").rpartition(".")
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{flat}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(2.0)
    return Layout(tensors, {name: delta * 2 / RANK for name, delta in made.deltas.items()})


@layout
def flux_3_fused(at: Shape) -> Layout:
    names = [f"transformer.mode_blocks.image.0.attn.to_{x}" for x in "qkv"]
    down, up = at.pair(*names)
    return Layout(peft("transformer.mode_blocks.image.0.attn.to_qkv", down, up), at.split(up @ down, *names))


@layout
def flux_3_lokr(at: Shape) -> Layout:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    w1, w2 = lokr_of(at, name, factors=(4, 4))
    key = "lycoris_single_blocks_0_q_proj"
    return Layout({f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2}, {name: torch.kron(w1, w2)})


@layout
def flux_3_of_another_width(at: Shape) -> Layout:
    return Layout(
        peft("diffusion_model.single_blocks.0.q_proj", randn(RANK, 48), randn(48, RANK)),
        says="is 32x32 here and 48x48 there",
    )


@layout
def flux_3_of_flux_1(at: Shape) -> Layout:
    down, up = randn(RANK, 32), randn(96, RANK)
    return Layout(
        peft("diffusion_model.double_blocks.0.img_attn.qkv", down, up), says="was made for another model: this one has"
    )


@contextmanager
def merged(engine: Engine, deltas: Tensors) -> Iterator[None]:
    """The model with `deltas` added to its weights."""
    kept = []
    with torch.inference_mode(False), torch.no_grad():
        for name, delta in deltas.items():
            network, _, layer = name.removesuffix(".bias").partition(".")
            module = getattr(engine._pipeline, network).get_submodule(layer)
            weight = module.bias if name.endswith(".bias") else module.weight
            kept.append((weight, weight.clone()))
            weight += delta
        engine._prompts._remembered.clear()
        yield
        engine._prompts._remembered.clear()
        for weight, before in kept:
            weight.copy_(before)


class Ask:
    """Small pictures of a model."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._settings = Settings(lora_dir=folder)

    def answer(self, **fields: Any) -> dict[str, Any]:
        grey = base64_of(Image.new("L", (64, 64), 128))
        more: dict[str, dict[str, Any]] = {
            "fill": {"init_image": grey, "mask_image": grey},
            "control": {"control_image": grey, "control_type": "canny"},
            "flux.3": {"init_image": grey},  # references have blocks of their own
        }
        fields = {**more.get(self._engine.model.family, {}), **fields}
        event = {"input": {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "width": 64, "height": 64,
                           **fields}}  # fmt: skip
        return respond(event, Job(), lambda: self._settings, lambda: self._engine)

    def pixels(self, **fields: Any) -> np.ndarray[Any, Any]:
        response = self.answer(**fields)
        assert response["status"] == "success", response
        return np.asarray(opened(response)[0], float)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_picture_is_that_of_the_merged_weights_or_the_reason_is_said(
    name: str, engines: Mapping[str, Engine], tmp_path: Path
) -> None:
    engine = engines[next((family for family in FAMILIES if name.startswith(family)), "shapes")]
    made = make(name, engine)
    tensors = {key: tensor.contiguous() for key, tensor in made.tensors.items()}
    save_file(tensors, tmp_path / "adapter.safetensors", made.metadata)
    ask = Ask(engine, tmp_path)
    plain = ask.pixels()
    answer = ask.answer(lora_path="adapter.safetensors", lora_scale=1)
    if not made.deltas:
        (fault,) = answer["errors"]
        assert (fault["field"], answer["error_code"]) == ("lora_path", "invalid_request")
        assert made.says in fault["message"], fault
        return
    assert answer["status"] == "success", answer
    with merged(engine, made.deltas):
        truth = ask.pixels()
    assert np.abs(np.asarray(opened(answer)[0], float) - truth).max() <= 1
    assert np.abs(truth - plain).max() > 3, "or nothing was proven"
    warnings = [text for text in answer["metadata"]["warnings"] if text.startswith("lora_path: ")]
    assert len(warnings) == bool(made.says)
    assert all(made.says in warning for warning in warnings)
    assert (ask.pixels(lora_path="adapter.safetensors", lora_scale=0) == plain).all()
    assert (ask.pixels() == plain).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_tensor_is_lost(name: str, engines: Mapping[str, Engine], tmp_path: Path) -> None:
    """What is neither applied nor named would give the same without it: each tensor is left out, or made another."""
    engine = engines[next((family for family in FAMILIES if name.startswith(family)), "shapes")]
    made, networks = make(name, engine), Networks(engine._pipeline)

    def read(tensors: Tensors) -> object:
        file = tmp_path / "adapter.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, made.metadata)
        try:
            weights = AdapterFile(file, networks).read()
        except Refused as error:
            return str(error)
        parts = {key: total(tensor) for key, tensor in weights.lora.items()}
        lokr = {key: (total(delta.w1), total(delta.w2)) for key, (delta, _) in weights.lokr.items()}
        return parts, lokr, weights.warnings

    whole = read(made.tensors)
    if isinstance(whole, str):
        return
    for key in made.tensors:
        without = read({name: tensor for name, tensor in made.tensors.items() if name != key})
        assert (without == whole) == bool(made.without_meaning and key.endswith(made.without_meaning)), key
        assert read({**made.tensors, f"{key}.unknown": torch.ones(2)}) != whole, key


@pytest.mark.parametrize("memory_mode", ["modulation_cache", "stream", "sequential_offload"])
def test_adapters_count_wherever_the_weights_live(
    memory_mode: str, engines: Mapping[str, Engine], tmp_path: Path
) -> None:
    here = engines["shapes"]
    asks = [
        Ask(engine, tmp_path) for engine in (here, load_engine(Settings(model_name=SHAPES, memory_mode=memory_mode)))
    ]
    for name in ("kohya_outside_of_blocks", "kohya_dora_of_fused_layers", "lokr_of_fused_layers", "kohya_with_clip"):
        made = make(name, here)
        tensors = {key: tensor.contiguous() for key, tensor in made.tensors.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors", made.metadata)
        one, other = (ask.pixels(lora_path=f"{name}.safetensors", lora_scale=1) for ask in asks)
        assert (one == other).all(), name

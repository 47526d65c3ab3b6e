"""A model in one file, recognized by its header alone, or refused by what it is."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf as makers
import pytest
import torch
from diffusers.loaders import single_file_utils

from src.catalog import FAMILIES
from src.errors import Refused
from src.settings import ROOT
from src.weights.gguf_header import TYPES, GgufHeader
from src.weights.single_file import GGUF_READ, explain_folder, read_single_file
from tests.headers import (
    CLIP,
    QWEN,
    T5,
    VAE,
    Shapes,
    chroma,
    flux_1,
    flux_2,
    flux_3,
    gguf,
    prefixed,
    safetensors,
)

# What it is: tensors in BFL's names, diffusers' converter of them, and the families that look so, the plain one first.
MODELS: dict[str, tuple[Shapes, str, list[str]]] = {
    "dev": (flux_1(), "flux", ["dev", "kontext"]),
    "fewer blocks": (flux_1(1, 3), "flux", ["dev", "kontext"]),
    "schnell": (flux_1(guidance=False), "flux", ["schnell"]),
    "fill": (flux_1(channels=384), "flux", ["fill"]),
    "control": (flux_1(channels=128), "flux", ["control"]),
    "FLUX.2-dev": (flux_2(inner=6144, joint=15360, guidance=True), "flux2", ["flux.2-dev"]),
    "klein 4B": (flux_2(), "flux2", ["klein", "klein-base"]),
    "klein 9B": (flux_2(inner=4096, joint=12288), "flux2", ["klein", "klein-base"]),
    "FLUX.3": (flux_3(), "flux3", []),
    "FLUX.3 base": (flux_3(flow_map=False), "flux3", []),
    "Chroma": (chroma(), "chroma", []),
}
NAMES = {"flux": "Flux", "flux2": "Flux2", "flux3": "Flux3", "chroma": "Chroma"}


@pytest.fixture(autouse=True)
def _every_class_has_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families of other branches: what is recognized does not depend on the catalog's having them."""
    known = {row.transformer["_class_name"] for row in FAMILIES.values()}
    more = [f"{name}Transformer2DModel" for name in NAMES.values() if f"{name}Transformer2DModel" not in known]

    def like(transformer: Any) -> tuple[str, ...]:
        from src.catalog import families_like

        return ("dev",) if transformer["_class_name"] in more else families_like(transformer)

    monkeypatch.setattr("src.weights.single_file.families_like", like)


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_shapes_say_the_configuration_and_diffusers_own_converter_agrees(
    what: str, prefix: str, tmp_path: Path
) -> None:
    shapes, kind, families = MODELS[what]
    file = read_single_file(safetensors(tmp_path / "any name.safetensors", prefixed(prefix, shapes)))
    assert (file.layout, dict(file.parts), file.weights) == (
        "original",
        {"transformer": prefix},
        {"transformer": "BF16"},
    )
    assert not families or file.family == families[0]
    of = getattr(diffusers, file.configuration["_class_name"])
    with torch.device("meta"):
        there = {name: list(value.shape) for name, value in of.from_config(file.configuration).state_dict().items()}
        tensors = {name: torch.empty(list(shape)) for name, shape in shapes.items()}
        convert = getattr(single_file_utils, f"convert_{kind}_transformer_checkpoint_to_diffusers")
        assert {name: list(value.shape) for name, value in convert(tensors).items()} == there
    # the same in diffusers' layout, as Civitai has it and as a part of a folder
    for before in ("", "transformer."):
        again = read_single_file(safetensors(tmp_path / "b.safetensors", prefixed(before, there), "F16"))
        assert (again.layout, again.parts["transformer"]) == ("diffusers", before)
        assert again.configuration == file.configuration
        assert again.family == file.family


def test_all_in_one_files_name_their_parts(tmp_path: Path) -> None:
    shapes = {
        **prefixed("model.diffusion_model.", flux_1()),
        **prefixed("vae.", VAE),
        **prefixed("text_encoders.clip_l.transformer.", CLIP),
        **prefixed("text_encoders.t5xxl.transformer.", T5),
        "text_encoders.t5xxl.logit_scale": [],
        "model.diffusion_model.scaled_fp8": [0],
        "model.diffusion_model.double_blocks.0.img_mod.lin.scale_weight": [],
    }
    scales = {"model.diffusion_model.double_blocks.0.img_mod.lin.scale_weight": "F32"}
    file = read_single_file(safetensors(tmp_path / "flux1-dev-fp8.safetensors", shapes, "F8_E4M3", others=scales))
    assert dict(file.parts) == {
        "transformer": "model.diffusion_model.",
        "vae": "vae.",
        "text_encoder": "text_encoders.clip_l.transformer.text_model.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    }
    assert file.weights["transformer"] == "scaled F8_E4M3"
    assert file.weights["vae"] == "F8_E4M3"
    assert set(file.of("vae")) == set(VAE)
    klein = {**prefixed("model.diffusion_model.", flux_2()), **prefixed("text_encoders.qwen3_4b.transformer.", QWEN)}
    parts = read_single_file(safetensors(tmp_path / "klein.safetensors", klein)).parts
    assert parts["text_encoder"] == "text_encoders.qwen3_4b.transformer."


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q3_K", "IQ4_XS", "BF16"])
def test_gguf_is_read_by_its_content(kind: str, tmp_path: Path) -> None:
    shapes = flux_1(1, 1)
    path = gguf(tmp_path / "flux.gguf", shapes, kind, keys={"comfy.gguf.orig_shape.img_in.weight": [3072, 64]})
    file = read_single_file(path)
    assert file.is_gguf
    assert (file.family, file.layout, file.weights) == ("dev", "original", {"transformer": kind})
    assert {name: list(tensor.shape) for name, tensor in file.tensors.items()} == shapes
    reader = makers.GGUFReader(path)  # the makers' own
    assert {each.name: (each.tensor_type.name, each.data_offset, each.n_bytes) for each in reader.tensors} == {
        name: (tensor.dtype, tensor.start, tensor.size) for name, tensor in file.tensors.items()
    }
    renamed = path.rename(tmp_path / "flux.safetensors")
    assert read_single_file(renamed).is_gguf


def test_ggml_types_are_the_makers_and_what_is_read_is_diffusers() -> None:
    assert {number: (row.name, row.block, row.size) for number, row in TYPES.items()} == {
        kind.value: (kind.name, *makers.GGML_QUANT_SIZES[kind]) for kind in makers.GGMLQuantizationType
    }
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    assert set(GGUF_READ) == {kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} | {"F32", "F16"}


def other(names: str | list[str], dtype: str = "F16") -> Callable[[Path], object]:
    """Makes a file of tensors with these names."""
    listed = [names] if isinstance(names, str) else names
    return lambda path: safetensors(path, dict.fromkeys(listed, (8, 8)), dtype)


def held(written: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(written)


def without(name: str) -> dict[str, Any]:
    return {each: shape for each, shape in flux_1().items() if each != name}


FLUX_1 = "single_transformer_blocks.0.norm.linear.weight"  # which others have too
ZIP = b"PK\x03\x04" + bytes(26)
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "SDXL": (other(["conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.input_blocks.0.0.weight"]),
             "is SDXL, and this worker draws with FLUX"),
    "SDXL's network": (other("add_embedding.linear_1.weight"), "is SDXL"),
    "Stable Diffusion 1.5": (other("model.diffusion_model.input_blocks.0.0.weight"), "is Stable Diffusion 1.5 or 2"),
    "Stable Diffusion 3": (other("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"), "Stable Diffusion 3"),
    "SD3 of diffusers": (other(["pos_embed.proj.weight", "time_text_embed.text_embedder.linear_1.weight"]), "ion 3"),
    "T5": (other("encoder.block.0.layer.0.SelfAttention.q.weight"), "is T5, a text encoder: give the model"),
    "CLIP": (other("text_model.encoder.layers.0.mlp.fc1.weight"), "is CLIP or SigLIP: give the model"),
    "CLIP of transformers 5": (other(["embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"]),
                               "is CLIP or SigLIP"),
    "Qwen": (other("model.layers.0.self_attn.q_proj.weight"), "is a language model (Qwen, Mistral, Llama ...)"),
    "LoRA": (other("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), "is a LoRA: give it in"),
    "kohya's LoRA": (other("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), "is a LoRA"),
    "ControlNet": (other(["controlnet_x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"]),
                   "is a ControlNet: name it in CONTROLNETS"),
    "IP-Adapter": (other("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"), "is an IP-Adapter"),
    "Redux": (other("redux_up.weight"), "is FLUX.1 Redux: name its whole repo in REDUX_MODEL"),
    "VAE": (other(["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"]), "is a VAE: give the model"),
    "upscaler": (other("body.0.rdb1.conv1.weight"), "is an upscaler"),
    "HunyuanVideo": (lambda path: safetensors(path, flux_1() | {"txt_in.individual_token_refiner.x.weight": [1]}),
                     "is HunyuanVideo"),
    "Wan": (other("head.modulation"), "is Wan, and"),
    "Qwen-Image": (other("transformer_blocks.0.img_mod.1.weight"), "is Qwen-Image"),
    "Z-Image": (other(["cap_embedder.0.weight", "x_pad_token"]), "is Z-Image"),
    "LTX": (other("model.diffusion_model.patchify_proj.weight"), "is LTX-Video"),
    "LTX of diffusers": (other("time_embed.emb.timestep_embedder.linear_1.weight"), "is LTX-Video"),
    "Wan of diffusers": (other(["blocks.0.scale_shift_table", "blocks.0.attn1.norm_q.weight"]), "is Wan"),
    "AuraFlow of diffusers": (other(["pos_embed.proj.weight", "joint_transformer_blocks.0.attn.to_q.weight"]),
                              "is AuraFlow"),
    "Sana of diffusers": (other(["caption_norm.weight", "time_embed.emb.timestep_embedder.linear_1.weight"]), "Sana"),
    "Mochi of diffusers": (other(["time_embed.timestep_embedder.linear_1.weight", "time_embed.pooler.to_q.weight"]),
                           "is Mochi"),
    "Krea 2 of diffusers": (other("text_fusion.projector.weight"), "is Krea 2"),
    "Cosmos of diffusers": (other("time_embed.t_embedder.linear_1.weight"), "is Cosmos"),
    "CogView": (other("patch_embed.text_proj.weight"), "is CogView or CogVideoX"),
    "Kandinsky": (other("visual_embeddings.in_layer.weight"), "is Kandinsky"),
    "LongCat-Image": (other([FLUX_1, "time_embed.timestep_embedder.linear_1.weight"]), "is LongCat-Image or Bria"),
    "Ovis-Image": (other([FLUX_1, "context_embedder_norm.weight"]), "is Ovis-Image"),
    "Motif-Video": (other([FLUX_1, "context_embedder.linear_1.weight"]), "is Motif-Video"),
    "XLabs' LoRA": (other("double_blocks.0.processor.qkv_lora1.down.weight"), "is a LoRA: give it in"),
    "an embedding": (other("emb_params"), "is an embedding of a word"),
    "what nobody knows": (other("a.b"), "is no FLUX: its 1 tensors ('a.b' ...) are those of no model"),
    "Nunchaku": (other("transformer_blocks.0.qkv_proj.wscales"), "quantized by Nunchaku (SVDQuant): give the model in"),
    "bitsandbytes": (other(["double_blocks.0.img_mod.lin.weight.quant_state.bitsandbytes__nf4"]), "by bitsandbytes"),
    "AWQ": (other("blocks.0.attn.qweight"), "quantized by AWQ or GPTQ"),
    "NVFP4": (other("double_blocks.0.img_mod.lin.weight_scale_2"), "quantized to NVFP4"),
    "int8": (lambda path: safetensors(path, flux_1(), "I8"), "holds weights in I8 ("),
    "channels of Flex.2": (lambda path: safetensors(path, flux_1(channels=196)), "is a FLUX that reads 196 channels"),
    "a block less": (lambda path: safetensors(path, without("double_blocks.1.txt_mlp.0.weight")),
                     "is not whole: double_blocks.1.txt_mlp.0.weight is not there"),
    "no input": (lambda path: safetensors(path, without("img_in.weight")), "is not whole: a FLUX has a tensor img_in"),
    "cut short": (lambda path: safetensors(path, flux_1(), cut=1), "is not a complete .safetensors file (its header"),
    "HTML": (held(b"<!DOCTYPE html><html>"), "is an HTML page and no .safetensors or .gguf file: give the address of"),
    "JSON": (held(b'{"error": "x"}'), "is JSON and no"),
    "LFS": (held(b"version https://git-lfs.github.com/spec/v1\noid sha256:x"), "is a Git LFS pointer"),
    "pickle": (held(b"\x80\x02}q\x00."), "is a pickle of PyTorch and no"),
    "zipped pickle": (held(ZIP + b"archive/data.pkl"), "is a pickle of PyTorch"),
    "zip": (held(ZIP + b"flux.safetensors"), "is a zip archive"),
    "encrypted": (held(b"age-encryption.org/v1\n"), "is an encrypted file and no"),
    "noise": (held(bytes(range(200, 100, -1))), "begins with bytes that no .safetensors or .gguf file begins with"),
    "empty": (held(b""), "is an empty file and no"),
    "no tensors": (lambda path: safetensors(path, {}), "holds no tensors"),
    "Llama": (lambda path: gguf(path, {"blk.0.attn_q.weight": [32, 32]}, architecture="llama"), "is a language model"),
    "Wan in GGUF": (lambda path: gguf(path, {"head.modulation": [32, 32]}, architecture="wan"), "is Wan"),
    "another GGUF": (lambda path: gguf(path, {"a": [32]}, architecture="whisper"), "of the architecture 'whisper'"),
    "IQ2_XS": (lambda path: gguf(path, flux_1(1, 1), "IQ2_XS"), "holds weights in IQ2_XS ("),
    "GGUF 1": (held(b"GGUF" + struct.pack("<IQQ", 1, 1, 1)), "is GGUF of version 1, and 2 and 3 are read"),
    "GGUF cut short": (lambda path: os.truncate(gguf(path, flux_1(1, 1)), 5000), "not a complete GGUF file (its"),
    "a GGUF of a billion keys": (held(b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 30)), "1,073,741,824 keys, and at most"),
    "a GGUF of a million texts": (
        held(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x" + struct.pack("<IIQ", 9, 8, 1_000_001)),
        "is GGUF with an array of 1,000,001 texts, and at most 1,000,000 are read",
    ),
    "a directory": (lambda path: path.mkdir(), "is no plain file"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, and there is no such file"),
    "a pipe": (os.mkfifo, "is no plain file"),
    "nothing": (lambda path: None, "is not there"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_flux_is_refused_by_what_it_is(what: str, tmp_path: Path) -> None:
    make, words = WRONG[what]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(Refused) as caught:
        read_single_file(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["flux-00001-of-00003.safetensors", "flux-00002-of-00002.gguf"])
def test_one_part_of_several_is_named_as_such(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"is part [12] of [32] of a network: give the folder"):
        read_single_file(safetensors(tmp_path / name, flux_1()))


def test_a_folder_without_an_index_is_explained(tmp_path: Path) -> None:
    assert explain_folder(tmp_path).endswith("not a model in diffusers' layout")
    safetensors(tmp_path / "flux.safetensors", VAE)
    assert "; the one file in it, flux.safetensors, is a VAE: give" in explain_folder(tmp_path)
    safetensors(tmp_path / "flux.safetensors", flux_1())
    assert explain_folder(tmp_path).endswith(f"for the one file in it set MODEL_NAME={tmp_path}/flux.safetensors")
    (tmp_path / "other.gguf").touch()
    assert explain_folder(tmp_path).endswith("name it, one of flux.safetensors, other.gguf")
    for file in tmp_path.iterdir():
        file.unlink()
    for number in (1, 2):
        (tmp_path / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors").touch()
    assert "is one network in 2 parts: give the folder that holds all" in explain_folder(tmp_path)


@pytest.mark.parametrize("end", range(0, 400, 7))
def test_a_gguf_header_that_ends_anywhere_is_refused(end: int, tmp_path: Path) -> None:
    path = gguf(tmp_path / "flux.gguf", {"a.weight": [32, 32], "b.weight": [32, 32]}, keys={"comfy.key": [1, 2, 3]})
    written = path.read_bytes()[:end]
    path.write_bytes(written)
    with pytest.raises(Refused):
        GgufHeader(path)


def test_neither_torch_nor_a_value_is_read(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "flux.safetensors", flux_1(19, 38))
    assert path.stat().st_size > 20e9
    script = (
        "import sys, resource, pathlib; from src.weights.single_file import read_single_file; "
        f"print(read_single_file(pathlib.Path({str(path)!r})).configuration['num_layers'], 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["19", "False"]
    assert path.stat().st_blocks * 512 < 1_000_000, "the file is a hole, which reading would not have filled"

"""Models in one file as headers alone: files of the right length, in which nothing is written but the header."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.weights.gguf_header import TYPES

Shapes = Mapping[str, Sequence[int]]
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}


def safetensors(
    path: Path, shapes: Shapes, dtype: str = "BF16", *, cut: int = 0, others: Mapping[str, str] | None = None
) -> Path:
    """`path`, a safetensors file of these tensors; `others` of them are of another type."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        kind = (others or {}).get(name, dtype)
        begin, end = end, end + math.prod(shape) * _BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    return _sparse(path, _framed(json.dumps(header).encode()), end - cut)


def gguf(
    path: Path, shapes: Shapes, kind: str = "Q4_0", architecture: str = "flux", keys: Shapes | None = None
) -> Path:
    """`path`, a GGUF file of these tensors, those of one dimension or short rows in F32; `keys` are numbers."""
    keys = keys or {}
    numbers = {row.name: (number, row) for number, row in TYPES.items()}
    written = b"".join(
        [_text("general.architecture") + struct.pack("<I", 8) + _text(architecture)]
        + [_text(name) + struct.pack("<IIQ", 9, 5, len(each)) + struct.pack(f"<{len(each)}i", *each)
           for name, each in keys.items()]
    )  # fmt: skip
    end = 0
    for name, shape in shapes.items():
        number, row = numbers[kind]
        if len(shape) == 1 or shape[-1] % row.block:
            number, row = numbers["F32"]
        written += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        written += struct.pack("<IQ", number, end)
        end += -(-math.prod(shape) // row.block * row.size // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1 + len(keys)) + written
    return _sparse(path, header + bytes(-len(header) % 32), end)


def prefixed(prefix: str, shapes: Shapes) -> dict[str, Sequence[int]]:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def flux_1(
    layers: int = 2, single: int = 2, *, inner: int = 3072, joint: int = 4096, channels: int = 64, guidance: bool = True
) -> dict[str, Sequence[int]]:
    """FLUX.1 in BFL's names."""
    found = {
        **_linear("img_in", inner, channels), **_linear("txt_in", inner, joint),
        **_embedder("time_in", inner), **_embedder("vector_in", inner, 768),
        **(_embedder("guidance_in", inner) if guidance else {}),
        **_linear("final_layer.linear", 64, inner), **_linear("final_layer.adaLN_modulation.1", 2 * inner, inner),
    }  # fmt: skip
    for i in range(layers):
        for stream in ("img", "txt"):
            found |= _linear(f"double_blocks.{i}.{stream}_mod.lin", 6 * inner, inner)
            found |= _stream(f"double_blocks.{i}.{stream}", inner, 4 * inner, 4 * inner, bias=True)
    for i in range(single):
        found |= _linear(f"single_blocks.{i}.modulation.lin", 3 * inner, inner)
        found |= _single(f"single_blocks.{i}", inner, 4 * inner, 4 * inner, bias=True)
    return found


def chroma(layers: int = 2, single: int = 2, inner: int = 3072) -> dict[str, Sequence[int]]:
    """Chroma in its makers' names: FLUX.1 without modulations of its own."""
    found = {
        name: shape
        for name, shape in flux_1(layers, single, inner=inner, guidance=False).items()
        if not any(part in name for part in ("_mod.", "modulation", "time_in", "vector_in"))
    }
    approximator = "distilled_guidance_layer"
    found |= _linear(f"{approximator}.in_proj", 5120, 64) | _linear(f"{approximator}.out_proj", inner, 5120)
    for i in range(5):
        found |= _linear(f"{approximator}.layers.{i}.in_layer", 5120, 5120)
        found |= _linear(f"{approximator}.layers.{i}.out_layer", 5120, 5120)
        found[f"{approximator}.norms.{i}.scale"] = [5120]
    return found


def flux_2(
    layers: int = 2, single: int = 2, *, inner: int = 3072, joint: int = 7680, guidance: bool = False
) -> dict[str, Sequence[int]]:
    """FLUX.2 in BFL's names: klein 4B's widths by default."""
    found: dict[str, Sequence[int]] = {
        "img_in.weight": [inner, 128], "txt_in.weight": [inner, joint], "final_layer.linear.weight": [128, inner],
        "final_layer.adaLN_modulation.1.weight": [2 * inner, inner],
        "double_stream_modulation_img.lin.weight": [6 * inner, inner],
        "double_stream_modulation_txt.lin.weight": [6 * inner, inner],
        "single_stream_modulation.lin.weight": [3 * inner, inner],
        **_embedder("time_in", inner, bias=False), **(_embedder("guidance_in", inner, bias=False) if guidance else {}),
    }  # fmt: skip
    for i in range(layers):
        for stream in ("img", "txt"):
            found |= _stream(f"double_blocks.{i}.{stream}", inner, 6 * inner, 3 * inner, bias=False)
    for i in range(single):
        found |= _single(f"single_blocks.{i}", inner, 6 * inner, 3 * inner, bias=False)
    return found


def flux_3(layers: int = 2, single: int = 2, *, flow_map: bool = True) -> dict[str, Sequence[int]]:
    """FLUX.3 klein in BFL's names."""
    inner, streams = 3072, ("image", "image_cond", "txt")
    found: dict[str, Sequence[int]] = {
        "emb_in.image.weight": [inner, 128], "emb_in.image_cond.weight": [inner, 128], "txt_in.weight": [inner, 20480],
        "final_layer.image.linear.weight": [128, inner],
        "final_layer.image.adaLN_modulation.1.weight": [2 * inner, inner],
        **_embedder("time_in", inner, bias=False), **(_embedder("ref_time_in", inner, bias=False) if flow_map else {}),
    }  # fmt: skip
    for part in ("early", "single"):
        found |= {f"{part}_stream_modulations.{stream}.lin.weight": [3 * inner, inner] for stream in streams}
    places = [f"content_mode_blocks.{stream}.{i}" for stream in streams[:2] for i in range(layers)]
    places += [f"txt_mode_blocks.{i}" for i in range(layers)] + [f"single_blocks.{i}" for i in range(single)]
    for place in places:
        found |= {f"{place}.{each}.weight": [inner, inner] for each in ("q_proj", "k_proj", "v_proj", "attn_out")}
        found |= {f"{place}.norm.{each}_norm.scale": [128] for each in ("query", "key")}
        found |= {f"{place}.mlp_in.weight": [6 * inner, inner], f"{place}.mlp_out.weight": [inner, 3 * inner]}
    return found


VAE = {"encoder.conv_in.weight": [128, 3, 3, 3], "decoder.conv_in.weight": [512, 16, 3, 3]}
CLIP = {"text_model.embeddings.token_embedding.weight": [49408, 768]}
T5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": [4096, 4096], "shared.weight": [32128, 4096]}
QWEN = {"model.layers.0.self_attn.q_proj.weight": [4096, 2560], "model.embed_tokens.weight": [1000, 2560]}


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> dict[str, Sequence[int]]:
    return {f"{name}.weight": [out, into], **({f"{name}.bias": [out]} if bias else {})}


def _embedder(name: str, inner: int, into: int = 256, *, bias: bool = True) -> dict[str, Sequence[int]]:
    return _linear(f"{name}.in_layer", inner, into, bias=bias) | _linear(f"{name}.out_layer", inner, inner, bias=bias)


def _stream(name: str, inner: int, wide: int, narrow: int, *, bias: bool) -> dict[str, Sequence[int]]:
    return {
        **_linear(f"{name}_attn.qkv", 3 * inner, inner, bias=bias),
        **_linear(f"{name}_attn.proj", inner, inner, bias=bias),
        **{f"{name}_attn.norm.{each}_norm.scale": [128] for each in ("query", "key")},
        **_linear(f"{name}_mlp.0", wide, inner, bias=bias),
        **_linear(f"{name}_mlp.2", inner, narrow, bias=bias),
    }


def _single(name: str, inner: int, wide: int, narrow: int, *, bias: bool) -> dict[str, Sequence[int]]:
    return {
        **_linear(f"{name}.linear1", 3 * inner + wide, inner, bias=bias),
        **_linear(f"{name}.linear2", inner, inner + narrow, bias=bias),
        **{f"{name}.norm.{each}_norm.scale": [128] for each in ("query", "key")},
    }


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _sparse(path: Path, header: bytes, values: int) -> Path:
    with path.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + values)
    return path

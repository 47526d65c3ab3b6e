"""`python -m benchmarks.single_files`: what smaller types of weights lose, on the shipped transformer as one file.

Each type as a file of its own, loaded as MODEL_NAME with BASE_MODEL=flux-shapes: its bytes, how far its matrices are
from the model's own (the norm of the difference in their norms), and its pictures in decibels.
The types whose blocks are of 256 values (Q2_K to Q6_K) do not fit its rows of 160. Writes results/single_files.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from benchmarks.machine import machine
from src.engine import Engine, load_engine
from src.engine.gguf_linear import GGUFLinear, dequantize
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.settings import ROOT, Settings

RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ROOT / "models" / "flux-shapes"
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
PICTURES = 2


def main() -> None:
    (weights,) = (SHAPES / "transformer").glob("*.safetensors")
    own = load_file(weights)
    plain = load_engine(Settings(model_name="flux-shapes"))
    wanted = [draw(plain, seed) for seed in range(PICTURES)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("BF16", *FP8, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"):
            file = write(Path(folder), kind, own)
            engine = load_engine(Settings(model_name=str(file), base_model="flux-shapes"))
            error = float(np.mean([((draw(engine, seed) - wanted[seed]) ** 2).mean() for seed in range(PICTURES)]))
            rows.append(
                {
                    "type": kind,
                    "file_bytes": file.stat().st_size,
                    "matrices": round(lost(engine, own), 5),
                    "decibels": round(10 * np.log10(255**2 / error), 1) if error else None,
                }
            )
    results = {"machine": machine(), "pictures": PICTURES, "types": rows}
    (RESULTS / "single_files.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def write(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> Path:
    """The transformer in one file, its matrices in `kind`."""
    if kind == "BF16" or kind in FP8:
        dtype = FP8.get(kind, torch.bfloat16)
        file = folder / f"{kind}.safetensors"
        save_file({name: each.to(dtype) if each.ndim == 2 else each for name, each in tensors.items()}, file)
        return file
    file = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(file, "flux")
    for name, tensor in tensors.items():
        wanted = GGMLQuantizationType[kind] if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def lost(engine: Engine, own: dict[str, torch.Tensor]) -> float:
    """Of the matrices together."""
    difference = whole = 0.0
    for name, tensor in own.items():
        if tensor.ndim == 2:
            layer: Any = engine.transformer.get_submodule(name.removesuffix(".weight"))
            packed = isinstance(layer, GGUFLinear)
            here = dequantize(layer.weight, layer.kind).view(tensor.shape) if packed else layer.weight
            difference += float((here.double() - tensor.double()).square().sum())
            whole += float(tensor.double().square().sum())
    return float((difference / whole) ** 0.5)


def draw(engine: Engine, seed: int) -> np.ndarray[Any, Any]:
    """One picture."""
    request, faults, _ = read_request({"input": {"prompt": "a large red circle on a blue background", "seed": seed}})
    return np.asarray(engine.run(make_plan(request, faults, engine.model, max_pixels=128 * 128)).pictures[0], float)


if __name__ == "__main__":
    main()

"""What stands in an adapter's file for one layer: the end of a tensor's name -> what it is, by PEFT's word for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import torch

from src.engine.lora.names import AdaptedLayer
from src.errors import Refused
from src.request.tensor_file import TensorFile

# One row for each way in which somebody writes it.
_PARAMETERS = {
    "lora_A": "lora_A", "lora_down": "lora_A", "lora.down": "lora_A", "lora_linear_layer.down": "lora_A",
    "down": "lora_A",
    "lora_B": "lora_B", "lora_up": "lora_B", "lora.up": "lora_B", "lora_linear_layer.up": "lora_B", "up": "lora_B",
    "alpha": "alpha", "lora_alpha": "alpha",
    "lora_magnitude_vector": "lora_magnitude_vector", "dora_scale": "lora_magnitude_vector",
    "diff_b": "bias",
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b",
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b", "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b",
}  # fmt: skip

# What can be told by its name, and cannot be applied to a linear layer here.
_OTHER_KINDS = {
    "diff": "a full weight (diff)",
    "set_weight": "a full weight (set_weight)",
    "lora_mid": "a LoCon of convolutions (lora_mid)",
    "lokr_t2": "a LoKr of convolutions (lokr_t2)",
    "hada_t1": "a LoHa of convolutions (hada_t1)",
    "hada_t2": "a LoHa of convolutions (hada_t2)",
    "lora_embedding_A": "a LoRA of an embedding",
    "lora_embedding_B": "a LoRA of an embedding",
    "oft_blocks": "an OFT", "oft_diag": "an OFT", "oft_R": "an OFT", "oft_r": "an OFT", "oft_s": "an OFT",
    "boft_R": "a BOFT", "boft_s": "a BOFT",
    "a1": "a GLoRA", "a2": "a GLoRA", "b1": "a GLoRA", "b2": "a GLoRA", "bm1": "a GLoRA", "bm2": "a GLoRA",
    "w_norm": "a norm", "b_norm": "a norm",
    "on_input": "an IA3", "ia3_l": "an IA3",
    "vera_lambda_b": "a VeRA", "vera_lambda_d": "a VeRA",
}  # fmt: skip

# The file's word for a type of numbers, and torch's.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass
class LayerTensors:
    """The tensors of one layer that a trainer adapted, by what they are and in float32; `name` is the file's own.

    They are torch's meta tensors, shapes alone, until `with_values`.
    """

    network: str
    name: str
    adapted: AdaptedLayer
    max_rank: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # the file's names of them

    @property
    def shape(self) -> tuple[int, int]:
        """Features that go out of the model's layer and into it."""
        return self.adapted.out_features, self.adapted.in_features

    @property
    def alpha(self) -> float | None:
        """What the layer is scaled by, times its rank."""
        if "alpha" not in self.tensors:
            return None
        alpha = self._of_size("alpha", 1)
        return 1.0 if alpha.is_meta else alpha.item()

    def add(self, parameter: str, key: str, file: TensorFile) -> None:
        """Raises Refused where there is such a one already, or where its values are no weights."""
        if parameter in self.tensors:
            raise Refused(f"holds two adapters: {self.name} has {parameter} twice")
        info = file.tensors[key]
        dtype = _TYPES.get(info.dtype)
        if dtype is None or not (dtype.is_floating_point or parameter == "alpha"):
            kind = str(dtype).removeprefix("torch.") if dtype else info.dtype
            raise Refused(f"holds {kind} values in {self.name}, which are no weights")
        self.tensors[parameter] = torch.empty(info.shape, dtype=torch.float32, device="meta")
        self.keys[parameter] = key

    def with_values(self, file: TensorFile, opened: BinaryIO) -> LayerTensors:
        """The layer, whose tensors are read. Raises Refused where they are not finite, and OSError."""
        read = {}
        for parameter, key in self.keys.items():
            info = file.tensors[key]
            memory = torch.empty(info.size, dtype=torch.uint8)
            file.read(key, opened, memory.numpy().data)
            read[parameter] = memory.view(_TYPES[info.dtype]).reshape(info.shape).float()
            if not read[parameter].isfinite().all():
                raise Refused(f"holds values that are not finite (NaN or infinity) in {self.name}: it is broken")
        return replace(self, tensors=read)

    def matrix(self, parameter: str) -> torch.Tensor:
        """Of [out, in], or of a convolution's [out, in, 1, 1], as some trainers keep linear layers. Raises Refused."""
        if parameter not in self.tensors:
            raise Refused(f"is not complete: {self.name} lacks {parameter}")
        tensor = self.tensors[parameter]
        if tensor.ndim < 2 or tensor.shape[2:].numel() != 1 or 0 in tensor.shape:
            raise Refused(f"is not complete: {self.name} has a {parameter} of {_size(tensor)}, which is no matrix")
        return tensor.flatten(1)

    def vector(self, parameter: str) -> torch.Tensor | None:
        """One number for each feature that goes out; None where there is none. Raises Refused."""
        return self._of_size(parameter, self.shape[0]) if parameter in self.tensors else None

    def check_shape(self, out: int, into: int) -> None:
        """Raise Refused where an adapter for this many features is another model's."""
        if (out, into) != self.shape:
            here = "x".join(map(str, self.shape))
            raise Refused(f"was made for another model: {self.name} is {here} here and {out}x{into} there")

    def _of_size(self, parameter: str, size: int) -> torch.Tensor:
        tensor = self.tensors[parameter]
        if tensor.numel() != size or max(tensor.shape, default=1) != size or (tensor.ndim and tensor.shape[0] != size):
            wanted = f"one for each of its {size} rows" if size > 1 else "one number"
            raise Refused(f"has a {parameter} of {_size(tensor)} in {self.name}, where only {wanted} can be applied")
        return tensor.flatten()

    def only(self, kind: str) -> Mapping[str, torch.Tensor]:
        """The tensors, where all are of one kind of adapter. Raises Refused."""
        if others := [name for name in self.tensors if "_" in name and not name.startswith((kind, "lora_magnitude"))]:
            raise Refused(f"has {', '.join(others)} beside a {kind.removesuffix('_')}, and one layer is of one kind")
        return self.tensors


def split_name(key: str) -> tuple[str, str]:
    """The layer that a tensor of this name belongs to, and what it is; "" twice where that is not known."""
    words = key.split(".")
    last = words.pop() if words[-1] in ("weight", "bias") else ""
    for rest in (words, words[:-1] if key.count("lora_") else []):  # PEFT writes the adapter's name after lora_A
        for length in (2, 1):
            parameter = _PARAMETERS.get(".".join(rest[-length:]))
            if parameter and len(rest) > length:
                if last == "bias":
                    parameter = "lora_B.bias" if parameter == "lora_B" else ""
                return (".".join(rest[:-length]), parameter) if parameter else ("", "")
    return "", ""


def other_kind(key: str) -> str:
    """What a tensor is that no adapter can be here; "" where its name does not say."""
    words = [word for word in key.split(".") if word not in ("weight", "default")]
    return _OTHER_KINDS.get(words[-1], "") if words else ""


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"

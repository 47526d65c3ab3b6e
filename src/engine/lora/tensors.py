"""What stands in an adapter's file for one layer: the end of a tensor's name -> what it is, by PEFT's word for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from src.engine.lora.names import AdaptedLayer
from src.errors import Refused

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


@dataclass
class LayerTensors:
    """The tensors of one layer that a trainer adapted, by what they are and in float32; `name` is the file's own."""

    network: str
    name: str
    adapted: AdaptedLayer
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, parameter: str, tensor: torch.Tensor) -> None:
        """Raises Refused where there is such a one already, or where its type is no adapter's."""
        if parameter in self.tensors:
            raise Refused(f"holds two adapters: {self.name} has {parameter} twice")
        if not tensor.is_floating_point():
            raise Refused(f"holds {str(tensor.dtype).removeprefix('torch.')} values in {self.name}, and no numbers")
        self.tensors[parameter] = tensor.float()

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

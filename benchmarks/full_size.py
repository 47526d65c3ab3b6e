"""FLUX at its full size without a download: the configurations of the published models, random weights.

`python -m benchmarks.full_size` writes how large their layers are to deploy/weights.json.

Configurations: config.json of black-forest-labs', lodestones' and Freepik's repos on the hub, the text encoders' of
google/t5-v1_1-xxl, openai/clip-vit-large-patch14, Qwen/Qwen3-4B and 8B, Qwen/Qwen3-VL-4B-Instruct,
mistralai/Mistral-Small-3.2-24B-Instruct-2506.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from torch import nn

from deploy.plan import WEIGHTS
from src.catalog import get_model
from src.engine.pipelines import pipeline_class
from src.settings import ROOT
from src.weights.files import check_whole
from src.weights.placement import Weights
from tests.small_models import SHAPES, chat_tokenizer

Part = Callable[[], nn.Module]


def _clip() -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, projection_dim=768, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    network: nn.Module = transformers.CLIPTextModel(config)
    return network


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_gated_act=True, tie_word_embeddings=False,
    )  # fmt: skip
    network: nn.Module = transformers.T5EncoderModel(config)
    return network


def _qwen(hidden_size: int, intermediate_size: int, *, tied: bool) -> nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip
    network: nn.Module = transformers.Qwen3ForCausalLM(config)
    return network


def _qwen_vl() -> nn.Module:
    text = {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    sees = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=sees, tie_word_embeddings=True)
    network: nn.Module = transformers.Qwen3VLForConditionalGeneration(config)
    return network


def _mistral() -> nn.Module:
    text = {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    sees = {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(vision_config=sees, text_config=text)
    network: nn.Module = transformers.Mistral3ForConditionalGeneration(config)
    return network


def _vae() -> nn.Module:
    network: nn.Module = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    return network


def _flux_1(*, guided: bool, layers: int = 19) -> Mapping[str, Part]:
    return {
        "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=guided, num_layers=layers),
        "text_encoder": _clip,
        "text_encoder_2": _t5,
        "vae": _vae,
    }


def _klein(layers: int, single: int, heads: int, joint: int, text_encoder: Part) -> Mapping[str, Part]:
    def transformer() -> nn.Module:
        network: nn.Module = diffusers.Flux2Transformer2DModel(
            num_layers=layers, num_single_layers=single, num_attention_heads=heads, joint_attention_dim=joint,
            guidance_embeds=False,
        )  # fmt: skip
        return network

    return {"transformer": transformer, "text_encoder": text_encoder, "vae": diffusers.AutoencoderKLFlux2}


def _flux_3(*, flow_map: bool) -> Mapping[str, Part]:
    return {
        "transformer": lambda: diffusers.Flux3Transformer2DModel(flow_map=flow_map),
        "text_encoder": _qwen_vl,
        "vae": diffusers.AutoencoderKLFlux2,
    }


FULL_SIZE: Mapping[str, Mapping[str, Part]] = {
    "FLUX.1-dev": _flux_1(guided=True),
    "FLUX.1-schnell": _flux_1(guided=False),
    "FLUX.1-lite-8B": _flux_1(guided=True, layers=8),
    "Chroma1-HD": {"transformer": diffusers.ChromaTransformer2DModel, "text_encoder": _t5, "vae": _vae},
    "FLUX.2-dev": {
        "transformer": diffusers.Flux2Transformer2DModel,
        "text_encoder": _mistral,
        "vae": diffusers.AutoencoderKLFlux2,
    },
    "FLUX.2-klein-4B": _klein(5, 20, 24, 7680, lambda: _qwen(2560, 9728, tied=True)),
    "FLUX.2-klein-9B": _klein(8, 24, 32, 12288, lambda: _qwen(4096, 12288, tied=False)),
    "FLUX.3-klein": _flux_3(flow_map=True),
    "FLUX.3-klein-base": _flux_3(flow_map=False),
}


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The pipeline of a model of full size in the host's memory; its tokenizers are small, their words mean nothing.

    Weights are drawn once and repeated: billions of their own would take minutes.
    """
    with _without_weights():
        parts: dict[str, Any] = {part: make() for part, make in FULL_SIZE[name].items()}
    drawn = (0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))).to(dtype)
    for network in parts.values():
        filled: dict[int, nn.Parameter] = {}  # weights that two layers share stay one
        for layer in network.modules():
            for weight_name, weight in layer.named_parameters(recurse=False):
                if id(weight) not in filled:
                    filled[id(weight)] = nn.Parameter(_filled(weight.shape, weight_name, drawn), requires_grad=False)
                layer.register_parameter(weight_name, filled[id(weight)])
        network.eval()
    model = get_model(name)
    tokenizers: dict[str, Any] = {"tokenizer": chat_tokenizer()}
    if isinstance(parts["text_encoder"], transformers.T5EncoderModel):
        tokenizers = {"tokenizer": transformers.T5TokenizerFast.from_pretrained(SHAPES / "tokenizer_2")}
    if "text_encoder_2" in parts:
        tokenizers = {
            "tokenizer": transformers.CLIPTokenizer.from_pretrained(SHAPES / "tokenizer"),
            "tokenizer_2": transformers.T5TokenizerFast.from_pretrained(SHAPES / "tokenizer_2"),
        }
    options = {"is_distilled": True} if name.startswith("FLUX.2-klein") else {}
    dynamic = name != "FLUX.1-schnell" and model.architecture != "FLUX.3"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    return pipeline_class(model.base.class_name)(scheduler=scheduler, **parts, **tokenizers, **options)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Within it layers are made without memory for their weights; their buffers are real."""
    own = nn.Module.register_parameter

    def register(layer: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        if weight is not None and not weight.is_meta:  # one that two layers share stays one
            weight = nn.Parameter(weight.data.to("meta"), requires_grad=False)
        own(layer, name, weight)

    with patch.object(nn.Module, "register_parameter", register):
        yield


def _filled(shape: torch.Size, name: str, drawn: torch.Tensor) -> torch.Tensor:
    """Norms that leave what they scale as it is, no biases, and for the others `drawn`, again and again."""
    if len(shape) == 1:
        return torch.full(shape, float(name == "weight"), dtype=drawn.dtype)
    weight = torch.empty(shape, dtype=drawn.dtype)
    flat = weight.view(-1)
    whole = len(flat) // len(drawn) * len(drawn)
    flat[:whole].view(-1, len(drawn)).copy_(drawn.expand(whole // len(drawn), -1))
    flat[whole:].copy_(drawn[: len(flat) - whole])
    return weight


def weigh(name: str, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """The sizes of a model of full size; takes no memory."""
    with torch.device("meta"):
        parts = {part: build() for part, build in FULL_SIZE[name].items()}
    return weigh_parts(parts, dtype)


def weigh_parts(parts: Mapping[str, Any], dtype: torch.dtype) -> Weights:
    """The sizes of networks, by their names in a pipeline."""
    sizes = {part: {tensor: weight.numel() for tensor, weight in net.named_parameters()} for part, net in parts.items()}
    return Weights.of(sizes, parts["transformer"].config, parts["vae"].config, dtype.itemsize)


def weigh_shapes() -> Weights:
    """The same of the model that ships with this worker, by its files."""
    folder = ROOT / get_model("flux-shapes").repo
    transformer, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae"))
    return Weights.of(check_whole(folder), transformer, vae, torch.bfloat16.itemsize)


def sizes() -> dict[str, Any]:
    """What deploy/weights.json holds, by the model's name."""
    weighed = {"flux-shapes": weigh_shapes()} | {name: weigh(name) for name in FULL_SIZE}
    return {
        name: {
            "itemsize": weights.itemsize,
            "width": weights.width,
            "channels": weights.channels,
            "networks": {
                part: {
                    "outside": network.outside,
                    "kinds": dict(network.kinds),
                    "blocks": dict(network.blocks),
                    "modulation": dict(network.modulation),
                }
                for part, network in weights.networks.items()
            },
        }
        for name, weights in weighed.items()
    }


if __name__ == "__main__":
    WEIGHTS.write_text(json.dumps(sizes()) + "\n")

"""Small random models of every family, in the classes and layouts of the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from src.catalog import FAMILIES, Model, get_model
from src.settings import ROOT
from src.weights.files import check_whole
from src.weights.placement import GB, Machine, Placement, Weights, Work, placements

SHAPES = ROOT / "models" / "flux-shapes"
LETTERS = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
_MARKS = (
    "<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
_UPSAMPLERS_CHAT = (  # as Qwen3.5's own says it, without the system's pages, in which few words would be lost
    "{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
_DEEPEST_LAYER = {
    "Flux2Pipeline": 30,
    "Flux2KleinPipeline": 27,
    "Flux2KleinKVPipeline": 27,
}  # that FLUX.2 takes its words from


def head(family: str) -> Model:
    """The row that stands for `family`."""
    return get_model(FAMILIES[family].model)


def small(family: str, folder: Path, **changes: Any) -> Path:
    """`folder`, with a small random model of `family` in it; `changes` are of FLUX.1's transformer, or of FLUX.3."""
    torch.manual_seed(0)
    class_name = head(family).base.class_name
    if class_name.startswith("Flux3"):
        _flux_3(class_name, folder, **changes)
    elif class_name.startswith("Flux2"):
        _flux_2(class_name, family, folder)
    elif class_name == "ChromaPipeline":
        _chroma(folder)
    else:
        _flux_1(class_name, family, folder, changes)
    return folder


def weights_of(folder: Path, itemsize: int = 4) -> Weights:
    """The sizes of the model in `folder`, in float32 or with `itemsize` bytes to a value."""
    transformer, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae"))
    return Weights.of(check_whole(folder), transformer, vae, itemsize)


def all_placements(weights: Weights) -> list[Placement]:
    """All exact ones, on a card that has room for each."""
    machine, work = Machine("a small card", GB, GB, 1e11, 1e10), Work(128, 128, 8, 32, 128 * 128)
    return list(placements(weights, machine, work, "auto"))


def controlnet(folder: Path, num_mode: int | None = None, **changes: Any) -> Path:
    """`folder`, with a small random ControlNet for flux-shapes and FLUX.1's small ones in it."""
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(SHAPES / "transformer", dtype=torch.float32)
    config = {**transformer.config, "num_layers": 1, "num_single_layers": 1, "num_mode": num_mode, **changes}
    net = diffusers.FluxControlNetModel.from_config(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # its own are zero where it speaks
    net.save_pretrained(folder)
    return folder


def redux(folder: Path, words: int = 128) -> Path:
    """`folder`, with a small random Redux in it whose words have so many numbers."""
    torch.manual_seed(2)
    sees = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    diffusers.FluxPriorReduxPipeline(
        image_encoder=transformers.SiglipVisionModel(sees),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
        image_embedder=diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(16, words),
    ).save_pretrained(folder)
    return folder


def upsampler(folder: Path) -> Path:
    """`folder`, with a small random prompt upsampler in it, in the layout of a hub's repo: Qwen3.5 and its processor.

    What it writes is printable, and ends at one letter in six.
    """
    torch.manual_seed(6)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.Qwen2TokenizerFast(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], pad_token=_MARKS[0], unk_token=_MARKS[0],
        eos_token=_MARKS[2], additional_special_tokens=list(_MARKS[1:]),
    )  # fmt: skip
    tokenizer.chat_template = _UPSAMPLERS_CHAT
    pad, _, end, start, stop, picture, film = tokenizer.convert_tokens_to_ids(list(_MARKS))
    words: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "eos_token_id": end,
        "pad_token_id": pad, "initializer_range": 2.0,
    }  # fmt: skip
    sees = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "num_position_embeddings": 16, "initializer_range": 2.0}  # fmt: skip
    network = transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(
            text_config=words, vision_config=sees, image_token_id=picture, video_token_id=film,
            vision_start_token_id=start, vision_end_token_id=stop,
        )
    )  # fmt: skip
    printable = [i for i, letter in enumerate(letters) if "!" <= letter <= "~"]
    with torch.no_grad():
        for i in set(range(len(tokenizer))) - set(printable):
            network.lm_head.weight[i] = 0  # some other word is likelier
    network.generation_config.eos_token_id = printable[::6]
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 1024, "longest_edge": 2**24}
    ).save_pretrained(folder)
    return folder


def _flux_1(class_name: str, family: str, folder: Path, changes: Mapping[str, Any]) -> None:
    """flux-shapes' parts around a random transformer of the family's shape."""
    shapes = diffusers.FluxPipeline.from_pretrained(SHAPES, dtype=torch.float32)
    transformer = diffusers.FluxTransformer2DModel.from_config(
        {
            **shapes.transformer.config,
            "num_layers": 2,
            "num_single_layers": 2,
            "in_channels": FAMILIES[family].in_channels(shapes.vae.config.latent_channels),
            "out_channels": 64,
            "guidance_embeds": FAMILIES[family].guided,
            **changes,
        }
    )
    parts = {name: getattr(shapes, name) for name in shapes.components if hasattr(shapes, name)}
    parts = {name: part for name, part in parts.items() if part is not None and name != "transformer"}
    if (shift := FAMILIES[family].dynamic_shift) is not None:
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config, use_dynamic_shifting=shift)
    getattr(diffusers, class_name)(transformer=transformer, **parts).save_pretrained(folder)


def _chroma(folder: Path) -> None:
    """flux-shapes' T5 and VAE around a random transformer, whose adaptive norms a small network answers."""
    shapes = diffusers.FluxPipeline.from_pretrained(SHAPES, dtype=torch.float32)
    own = shapes.transformer.config
    same = {name: own[name] for name in (
        "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope"
    )}  # fmt: skip
    transformer = diffusers.ChromaTransformer2DModel(
        **same, num_layers=2, num_single_layers=2, approximator_hidden_dim=16, approximator_layers=2
    )
    diffusers.ChromaPipeline(
        scheduler=shapes.scheduler,
        vae=shapes.vae,
        text_encoder=shapes.text_encoder_2,
        tokenizer=shapes.tokenizer_2,
        transformer=transformer.eval(),
    ).save_pretrained(folder)


def _flux_2(class_name: str, family: str, folder: Path) -> None:
    layers = _DEEPEST_LAYER[class_name]
    size: dict[str, Any] = {
        "vocab_size": len(LETTERS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    if class_name == "Flux2Pipeline":
        sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        encoder = transformers.Mistral3ForConditionalGeneration(
            transformers.Mistral3Config(
                vision_config={**sees, "model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14},
                text_config={**size, "model_type": "mistral"},
            )
        )
    else:
        encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**size))
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=family == "flux.2-dev",
    )  # fmt: skip
    distilled = {} if class_name == "Flux2Pipeline" else {"is_distilled": not FAMILIES[family].guided}
    getattr(diffusers, class_name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae_of_flux_2(),
        text_encoder=encoder.eval(),
        tokenizer=chat_tokenizer(),
        transformer=transformer.eval(),
        **distilled,
    ).save_pretrained(folder)
    if class_name == "Flux2Pipeline":  # as the real one's, which reads pictures too
        index = json.loads((folder / "model_index.json").read_text())
        index["tokenizer"] = ["transformers", "PixtralProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index))


def _flux_3(class_name: str, folder: Path, text_layers: int = 33) -> None:
    """As diffusers' modular pipelines are saved: with an index of their own."""
    text = {
        "vocab_size": len(LETTERS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": text_layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    sees = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    encoder = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=sees)
    )
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8 * 16, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
        flow_map=class_name == "Flux3DistilledModularPipeline",
    )  # fmt: skip
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=6.93),
        "vae": _vae_of_flux_2(),
        "text_encoder": encoder.eval(),
        "tokenizer": chat_tokenizer(),
        "transformer": transformer.eval(),
    }
    blocks = getattr(diffusers, class_name).default_blocks_name
    index: dict[str, Any] = {"_class_name": class_name, "_blocks_class_name": blocks, "_diffusers_version": "0.42.1"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        kind = type(part)
        place = {"pretrained_model_name_or_path": "someone/flux-3", "subfolder": name, "revision": None}
        hint = [kind.__module__.partition(".")[0], "Qwen3VLProcessor" if name == "tokenizer" else kind.__name__]
        index[name] = [None, None, place | {"type_hint": hint, "variant": None}]
    (folder / "modular_model_index.json").write_text(json.dumps(index))


def _vae_of_flux_2() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip
    return vae.eval()


def chat_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = transformers.Qwen2TokenizerFast(
        vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[], pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} {% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %} {% endfor %}"
    )
    return tokenizer

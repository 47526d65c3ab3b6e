"""What a file of tensors may be that is no FLUX, by the names of its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Other:
    """A kind of file: what to call it, names that it alone has, and what to do with it."""

    name: str
    pattern: re.Pattern[str]  # looked for in all names, a line each
    advice: str = ""


def _row(name: str, pattern: str, advice: str = "") -> Other:
    return Other(name, re.compile(pattern, re.MULTILINE), advice)


_PLAIN = "give the model in bf16, fp16, fp8 or GGUF"
_PART = "give the model that it goes with, and in BASE_MODEL a whole model, where the rest comes from"

# Weights that nothing here reads, whatever model they are of.
UNREADABLE = (
    _row("quantized by Nunchaku (SVDQuant)", r"\.(?:smooth_factor|smooth_factor_orig|wscales)$", _PLAIN),
    _row("quantized by bitsandbytes (nf4, fp4 or int8)", r"\.(?:quant_state\.bitsandbytes__\w+|absmax|SCB)$", _PLAIN),
    _row("quantized by AWQ or GPTQ", r"\.(?:qweight|qzeros)$", _PLAIN),
    _row("quantized to NVFP4", r"\.weight_scale_2$", _PLAIN),
)
# Networks beside a FLUX, which have layers of its names.
ADAPTED = (
    _row(
        "a ControlNet",
        r"(?:^|\.)(?:controlnet_|control_model\.|input_hint_block\.|control_all_x_embedder|control_img_in\.)",
        "name it in CONTROLNETS, where the catalog has it, and in MODEL_NAME the model",
    ),
    _row("an IP-Adapter", r"ip_adapter|^image_proj\.|^pulid_", "MODEL_NAME wants the model that it was made for"),
    _row("FLUX.1 Redux", r"^redux_(?:up|down)\.", "name its whole repo in REDUX_MODEL, and in MODEL_NAME the model"),
    _row(
        "HunyuanVideo or HunyuanImage",
        r"(?:^|\.)(?:txt_in\.individual_token_refiner|byt5_in\.|context_embedder\.token_refiner)",
    ),
    _row("Hunyuan3D", r"(?:^|\.)latent_in\.weight$"),
    _row("Step1X-Edit", r"(?:^|\.)connector\."),
    _row(
        "Chroma1-Radiance, which draws pixels without a VAE", r"(?:^|\.)nerf_(?:blocks|image_embedder)|img_in_patch\."
    ),
)
# Models of others whose blocks have FLUX.1's names.
ALIKE = (
    _row("LongCat-Image or Bria", r"(?:^|\.)time_embed\.timestep_embedder\."),
    _row("Ovis-Image", r"(?:^|\.)context_embedder_norm\."),
    _row("Motif-Video", r"(?:^|\.)context_embedder\.linear_1\."),
)
OTHERS = (
    _row(
        "a LoRA",
        r"\.(?:lora_[AB]|lora_(?:up|down)|lokr_w\d|hada_w\d|oft_blocks|lora_magnitude_vector)\b"
        r"|^(?:lora_(?:unet|te\d?)|lycoris)_|[._]lora\d?\.(?:up|down)\.",
        "give it in a request as lora_path, and in MODEL_NAME the model",
    ),
    _row("SDXL", r"(?:^|\.)(?:conditioner\.embedders\.1\.|add_embedding\.linear_1\.|label_emb\.0\.0\.)"),
    _row("Wan", r"(?:^|\.)(?:head\.modulation$|vace_blocks\.0\.|blocks\.0\.(?:cross_attn\.norm_k|attn1\.norm_q)\.)"),
    _row("Sana", r"(?:^|\.)(?:blocks\.0\.cross_attn\.q_linear|caption_norm)\."),
    _row(
        "LTX-Video or PixArt",
        r"(?:^|\.)(?:patchify_proj\.|adaln_single\.|time_embed\.emb\.|blocks\.0\.scale_shift_table$)",
    ),
    _row("AuraFlow", r"(?:^|\.)(?:double_layers\.0\.|cond_seq_linear\.|joint_transformer_blocks\.0\.)"),
    _row("Stable Diffusion 3", r"(?:^|\.)(?:joint_blocks\.0\.|pos_embed\.proj\.weight$)"),
    _row(
        "Stable Diffusion 1.5 or 2",
        r"(?:^|\.)(?:input_blocks\.0\.0\.weight|cond_stage_model\.|down_blocks\.0\.attentions\.0\.transformer_blocks)",
    ),
    _row("Qwen-Image", r"(?:^|\.)(?:transformer_blocks\.0\.img_mod\.1\.|txt_in\.text_norm\.)"),
    _row("Z-Image", r"(?:^|\.)(?:x_pad_token$|cap_pad_token$)"),
    _row("Lumina 2", r"(?:^|\.)(?:cap_embedder\.0|time_caption_embed\.)"),
    _row("HiDream", r"(?:^|\.)double_stream_blocks\.0\."),
    _row("Krea 2", r"(?:^|\.)(?:txtfusion|text_fusion)\."),
    _row("Mochi", r"(?:^|\.)(?:blocks\.0\.attn\.qkv_x|time_embed\.pooler)\."),
    _row("Cosmos", r"(?:^|\.)(?:net\.(?:x_embedder|blocks)|time_embed\.t_embedder)\."),
    _row("CogView or CogVideoX", r"(?:^|\.)patch_embed\.text_proj\."),
    _row("Kandinsky", r"(?:^|\.)(?:visual|pooled_text)_embeddings\.in_layer\."),
    _row("Stable Cascade", r"(?:^|\.)(?:clip_txt_mapper\.|down_blocks\.1\.0\.channelwise)"),
    _row("an upscaler", r"(?:^|\.)(?:body\.0\.rdb1\.|model\.1\.sub\.0\.|conv_up1\.|upconv1\.|conv_first\.)"),
    _row("T5, a text encoder", r"(?:^|\.)encoder\.block\.0\.layer\.0\.|^enc\.blk\.0\.", _PART),
    _row(
        "CLIP or SigLIP",
        r"(?:^|\.)(?:(?:text|vision)_model\.(?:encoder|embeddings)|embeddings\.(?:token|patch)_embedding)\."
        r"|^transformer\.resblocks\.",
        _PART,
    ),
    _row(
        "a language model (Qwen, Mistral, Llama ...)",
        r"(?:^|\.)layers\.0\.self_attn\.q_proj\.|^blk\.0\.attn_(?:q|qkv|k)\.|^token_embd\.",
        _PART,
    ),
    _row("a VAE", r"(?:^|\.)(?:decoder|encoder)\.(?:conv_in|up_blocks|down_blocks|up|down|mid|layers)\b", _PART),
    _row("an embedding of a word", r"^(?:emb_params|clip_[lg]|t5xxl|string_to_param\b.*)$"),
)  # fmt: skip

"""The networks of flux-shapes: diffusers' and transformers' own FLUX.1 classes, only small."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

LATENT_CHANNELS = 16
POOLED_DIM = 128
T5_DIM = 128


def autoencoder() -> AutoencoderKL:
    """RGB in -1..1, 8 pixels to one latent of 16 channels, as FLUX.1's own."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def transformer() -> FluxTransformer2DModel:
    """Five heads of 32, two double and five single blocks, no guidance embedding (as FLUX.1-schnell)."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def clip(vocab_size: int, eos_token_id: int) -> CLIPTextModel:
    """Gives the pooled prompt."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=POOLED_DIM,
            intermediate_size=2 * POOLED_DIM,
            projection_dim=POOLED_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=eos_token_id - 1,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )


def t5(vocab_size: int) -> T5EncoderModel:
    """Gives one vector a token."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=T5_DIM,
            d_kv=32,
            d_ff=2 * T5_DIM,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-schnell's, with more of the steps near the noise, where the prompt decides (see flow.times)."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0)

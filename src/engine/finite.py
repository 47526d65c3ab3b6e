"""Values that are not finite, caught before anybody sees or keeps them; a decoder has a second try in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from src.errors import GenerationFailed

# What layers call with their weights, and what puts values into the type of weights.
_LAYERS = {
    functional.conv2d,
    functional.linear,
    functional.group_norm,
    functional.layer_norm,
    functional.scaled_dot_product_attention,
}
_TO = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.bfloat16, torch.Tensor.half}


def check_finite(tensors: Mapping[str, torch.Tensor], advice: str) -> None:
    """Raise GenerationFailed with the names of those that hold NaN or an infinity, and with `advice`."""
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise GenerationFailed(f"the model's values are not finite: {', '.join(wrong)}; {advice}")


@contextmanager
def finite_decoding(vae: Any, decoding: Callable[[], bool], warn: Callable[[str], None]) -> Iterator[None]:
    """Within it `vae` decodes once more in float32 what is not finite, while `decoding`, and `warn` gets a word of it.

    Its weights stay as they are, and where they are. Raises GenerationFailed where that is not finite either.
    """
    decode, own = vae.decode, vars(vae).get("decode")

    def finite(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        decoded = decode(latents, *arguments, **options)
        if not decoding() or _is_finite(decoded):
            return decoded
        del decoded
        with _InFloat32():
            decoded = decode(latents.float(), *arguments, **options)
        if not _is_finite(decoded):
            raise GenerationFailed(
                "the decoder's values are not finite, in float32 neither; try another seed, size or guidance_scale"
            )
        warn("the decoder's values were not finite: the picture was decoded once more, in float32")
        return decoded

    vae.decode = finite
    try:
        yield
    finally:
        if own is None:
            del vae.decode
        else:
            vae.decode = own


def _is_finite(decoded: Any) -> bool:
    """Of what a VAE answers: [pictures, 3, height, width], alone in a tuple."""
    return bool(decoded[0].isfinite().all())


class _InFloat32(TorchFunctionMode):
    """Within it layers compute in float32, whatever type their weights have and wherever they come from."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS:
            args, kwargs = tree_map_only(torch.Tensor, _in_float32, (args, kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _TO and args[0].dtype == torch.float32 and result.dtype in (torch.bfloat16, torch.float16):
            return args[0].to(result.device)
        return result


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor

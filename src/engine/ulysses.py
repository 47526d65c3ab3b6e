"""One transformer over several processes: each has a share of the tokens, and within attention a share of the heads.

Ulysses (arXiv 2309.14509), as diffusers has it: https://huggingface.co/docs/diffusers/training/distributed_inference.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

# Added to the tokens of the picture from within, where diffusers has no plan for sharing them.
_SAMPLES = ("controlnet_block_samples", "controlnet_single_block_samples")


def can_share(heads: int, processes: int) -> bool:
    """Whether so many attention heads can be shared: all that are filled up must be of the last process."""
    left = -heads % processes
    return left < (heads + left) // processes


class Ulysses:
    """`transformer`, called by all processes of torch's default group at once, with the same inputs.

    Raises ValueError where its attention backend cannot be shared.
    """

    def __init__(self, transformer: Any, device: torch.device) -> None:
        self._processes, self._rank = distributed.get_world_size(), distributed.get_rank()
        self._config = config = diffusers.ContextParallelConfig(ulysses_degree=self._processes)
        self._shares_heads = not transformer.config.num_attention_heads % self._processes
        mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)

        def resolve(_: Any) -> Any:
            """As diffusers' own, which knows no process without an accelerator."""
            parallel = diffusers.ParallelConfig(context_parallel_config=config)
            parallel.setup(self._rank, self._processes, device, mesh=mesh)
            transformer._parallel_config = parallel
            return parallel

        transformer._resolve_parallel_config = resolve
        # Its own way to join the answers, at proj_out, wants shares of one size where they travel over gloo.
        transformer.enable_parallelism(config=config, cp_plan={"": transformer._cp_plan[""]})
        self._forward = transformer.forward

    def __call__(self, **inputs: Any) -> Any:
        """What the whole transformer answers, in each process; `inputs` by their names."""
        tokens = [inputs[name].shape[1] for name in ("hidden_states", "encoder_hidden_states")]
        evenly = self._shares_heads and not any(count % self._processes for count in tokens)
        self._config.ulysses_anything = not evenly
        for name in _SAMPLES:
            if inputs.get(name) is not None:
                inputs[name] = [each.tensor_split(self._processes, dim=1)[self._rank] for each in inputs[name]]
        (share,) = self._forward(**{**inputs, "return_dict": False})
        whole = self._joined(share, tokens[0])
        return Transformer2DModelOutput(sample=whole) if inputs.get("return_dict", True) else (whole,)

    def _joined(self, share: torch.Tensor, tokens: int) -> torch.Tensor:
        """All shares, [pictures, `tokens`, channels]: the first ones may have a token more."""
        each, more = divmod(tokens, self._processes)
        filled = functional.pad(share, (0, 0, 0, each + bool(more) - share.shape[1])).contiguous()
        shares = [torch.empty_like(filled) for _ in range(self._processes)]
        distributed.all_gather(shares, filled)
        return torch.cat([one[:, : each + (rank < more)] for rank, one in enumerate(shares)], dim=1)

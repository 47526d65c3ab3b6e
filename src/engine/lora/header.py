"""What the header of an adapter's file says of its scale: PEFT's LoraConfig, as diffusers writes it there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from src.errors import Refused
from src.wording import show

_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
# Ways to start a training that change the model's own weights, so that the adapter alone is not what was trained.
_CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")
_OF_PATTERNS = frozenset("*+?[](){}|^$\\")


class Header:
    """Raises Refused where it is none that PEFT writes."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            config = json.loads(metadata.get(_KEY, "{}"))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise Refused(f"has a header whose {_KEY} is no JSON object")
        self._config: dict[str, Any] = config
        for name, value in config.items():
            if name.endswith("init_lora_weights") and str(value).lower().startswith(_CHANGE_THE_MODEL):
                raise Refused(
                    f"was trained from {show(value)}, which changes the model's own weights: convert it to LoRA"
                )

    def scale(self, network: str, layer: str, rank: int) -> float:
        """lora_alpha / r of a layer, or over the root of r where that is said; 1 where nothing is said."""
        alpha = self._of_layer(network, layer, "alpha_pattern")
        alpha = self._get(network, "lora_alpha") if alpha is None else alpha
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise Refused(f"has a header whose lora_alpha is {show(alpha)}, which must be a number")
        return float(alpha / (math.sqrt(rank) if self._get(network, "use_rslora") is True else rank))

    def _get(self, network: str, name: str) -> Any:
        return self._config.get(f"{network}.{name}", self._config.get(name))

    def _of_layer(self, network: str, layer: str, name: str) -> Any:
        """What a pattern says of a layer: by its whole name or by the end of it."""
        patterns = self._get(network, name)
        if not isinstance(patterns, dict):
            return None
        for pattern, value in patterns.items():
            end = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if set(end) & _OF_PATTERNS:  # it may be any regular expression of whoever made the file
                raise Refused(f"has a header whose {name} names {show(pattern)}, where only layers' names are read")
            if f".{layer}".endswith(f".{end}"):
                return value
        return None

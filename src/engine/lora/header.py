"""What the header of an adapter's file says of its scale: PEFT's LoraConfig, as diffusers writes it there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from src.errors import Refused
from src.wording import show

_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_LONGEST = 1_000_000  # characters; that of every layer of FLUX has 100,000
_LARGEST = 1e30
# Ways to start a training that change the model's own weights, so that the adapter alone is not what was trained.
_CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")
_OF_PATTERNS = frozenset("*+?[](){}|^$\\")


class Header:
    """Raises Refused where it is none that PEFT writes."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        written = metadata.get(_KEY, "{}")
        if len(written) > _LONGEST:
            raise Refused(
                f"has a header whose {_KEY} has {len(written):,} characters, and at most {_LONGEST:,} are read"
            )
        try:
            config = json.loads(written)
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise Refused(f"has a header whose {_KEY} is no JSON object")
        self._config: dict[str, Any] = config
        self._read: dict[tuple[str, str], _Patterns] = {}
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
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST:
            raise Refused(f"has a header whose lora_alpha is {show(alpha)}, which must be a number")
        return float(alpha / (math.sqrt(rank) if self._get(network, "use_rslora") is True else rank))

    def _get(self, network: str, name: str) -> Any:
        return self._config.get(f"{network}.{name}", self._config.get(name))

    def _of_layer(self, network: str, layer: str, name: str) -> Any:
        """What a pattern says of a layer: by its whole name or by the end of it; of several, the first."""
        if not isinstance(patterns := self._get(network, name), dict):
            return None
        if (network, name) not in self._read:
            self._read[network, name] = _Patterns(patterns)
        read, words = self._read[network, name], layer.split(".")
        fitting = [read.ends[end] for i in range(len(words)) if (end := ".".join(words[i:])) in read.ends]
        place, value = min(fitting, key=lambda each: each[0], default=(len(patterns), None))
        if read.odd < place:  # it may be any regular expression of whoever made the file
            odd = list(patterns)[read.odd]
            raise Refused(f"has a header whose {name} names {show(odd)}, where only layers' names are read")
        return value


class _Patterns:
    """`ends` of layers' names, each with its place and its value; `odd` is the place of the first that is none."""

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self.ends: dict[str, tuple[int, Any]] = {}
        self.odd = len(patterns)
        for place, (pattern, value) in enumerate(patterns.items()):
            end = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if set(end) & _OF_PATTERNS:
                self.odd = min(self.odd, place)
            self.ends.setdefault(end, (place, value))

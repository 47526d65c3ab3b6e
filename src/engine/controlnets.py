"""Networks that hear control pictures: fetched and loaded when first asked for, they work beside the transformer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import diffusers

from src.catalog import CONTROLNETS, ControlNet, Model, controlnets_for
from src.controls import PlannedControl
from src.engine.files import Files, Refused, Source, why
from src.errors import InvalidSettings, ModelUnavailable

_MEASURES = ("joint_attention_dim", "pooled_projection_dim", "num_attention_heads", "attention_head_dim", "in_channels")


class ControlNets:
    """Those of one model. What CONTROLNETS names stays; of others only what the latest plan asked for."""

    def __init__(self, pipeline: Any, model: Model, files: Files) -> None:
        self._pipeline = pipeline
        self._model = model
        self._files = files
        self._kept: set[str] = set()
        self._sources: dict[str, Source] = {}
        self._guided: dict[str, bool] = {}
        self._loaded: dict[str, Any] = {}

    @property
    def in_memory(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._loaded)

    def load(self, names: Sequence[str]) -> None:
        """Load these at the start, and keep them."""
        rows = {name.lower(): row for row in controlnets_for(self._model) for name in (row.name, row.repo)}
        if strange := [name for name in names if name.lower() not in rows]:
            known = ", ".join(row.name for row in CONTROLNETS if row.architecture == self._model.architecture)
            raise InvalidSettings(f"CONTROLNETS={','.join(strange)}: {self._model.name} has {known or 'none'}")
        for name in names:
            row = rows[name.lower()]
            self._kept.add(row.name)
            self._fetch(row, lambda: None)
            self._load(row)

    def fetch(self, controls: Sequence[PlannedControl], before_download: Callable[[], None]) -> None:
        """See that the networks' files are here and made for this model; takes no time of the device.

        Raises ModelUnavailable with the reason where they are not.
        """
        nets = [control.net for control in controls if control.net]
        for net in nets:
            self._fetch(net, before_download)
        if len({self._guided[net.name] for net in nets}) > 1:
            names = " and ".join(sorted({net.name for net in nets}))
            raise ModelUnavailable(f"{names} cannot be heard together: only one of them reads guidance_scale")

    def use(self, controls: Sequence[PlannedControl]) -> tuple[Any, dict[str, Any]]:
        """The networks of `controls` as one, loaded, and the arguments that a pipeline wants with them."""
        nets = [control.net for control in controls if control.net]
        for name in self._loaded.keys() - self._kept - {net.name for net in nets}:
            del self._loaded[name]
        for net in nets:
            self._load(net)
        several = diffusers.FluxMultiControlNetModel([self._loaded[net.name] for net in nets])
        return several, {
            "control_mode": [control.mode for control in controls],
            "controlnet_conditioning_scale": [control.scale for control in controls],
            "control_guidance_start": [control.start for control in controls],
            "control_guidance_end": [control.end for control in controls],
        }

    def _fetch(self, net: ControlNet, before_download: Callable[[], None]) -> None:
        if net.name in self._sources:
            return
        try:
            source = self._files.find(net.repo, net.repo, part=True, before_download=before_download)
            config = json.loads((source.folder / "config.json").read_text())
            here = self._pipeline.transformer.config
            for measure in _MEASURES:
                if config[measure] != here[measure]:
                    raise Refused(f"is made for another model: {measure} is {config[measure]} and {here[measure]} here")
        except Exception as error:
            raise ModelUnavailable(f"ControlNet {net.name} ({net.repo}): {why(error, self._files.settings)}") from error
        self._sources[net.name] = source
        self._guided[net.name] = bool(config.get("guidance_embeds"))

    def _load(self, net: ControlNet) -> None:
        if net.name not in self._loaded:
            found = diffusers.FluxControlNetModel.from_pretrained(
                self._sources[net.name].folder,
                dtype=self._pipeline.dtype,
                use_safetensors=True,
                local_files_only=True,
            )
            self._loaded[net.name] = found.to(self._pipeline.device).eval()

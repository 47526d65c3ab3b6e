"""Networks that read control pictures, fetched and loaded when first asked for; they work with the transformer."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch

from src.catalog import ControlNet, Model, controlnets_for
from src.engine.loading_lock import LOADING
from src.engine.memory import is_out_of_memory, load_with_room
from src.errors import InvalidSettings, ModelUnavailable, OutOfMemory, Refused
from src.plan.controls import PlannedControl
from src.weights.files import Files, Source, check_whole, values_of
from src.weights.ledger import ExtraKind, Ledger

_MEASURES = ("joint_attention_dim", "pooled_projection_dim", "num_attention_heads", "attention_head_dim", "in_channels")


class MultiControlNet(diffusers.FluxMultiControlNetModel):  # type: ignore[misc]
    """Networks of any depth, added up: diffusers' own adds up block by block, and drops what another lacks."""

    def __init__(self, nets: Sequence[Any], transformer: Mapping[str, Any]) -> None:
        super().__init__(nets)
        self._depths = transformer["num_layers"], transformer["num_single_layers"]

    def forward(
        self,
        *,
        controlnet_cond: Sequence[torch.Tensor],
        controlnet_mode: Sequence[torch.Tensor],
        conditioning_scale: Sequence[float],
        **inputs: Any,
    ) -> tuple[list[torch.Tensor] | None, ...]:
        """One sum for each of the transformer's double blocks and one for each single block, or None for neither.

        `controlnet_cond` holds a picture's latents [pictures, tokens, channels] for each network, `controlnet_mode` the
        number of its type [pictures], which a network wants as [pictures, 1]; sums are [pictures, tokens, width].
        """
        totals: list[list[torch.Tensor] | None] = [None, None]
        for net, picture, mode, scale in zip(
            self.nets, controlnet_cond, controlnet_mode, conditioning_scale, strict=True
        ):
            samples_of_net = net(
                controlnet_cond=picture, controlnet_mode=mode[:, None], conditioning_scale=scale, **inputs
            )
            for kind, (samples, depth) in enumerate(zip(samples_of_net, self._depths, strict=True)):
                if samples:
                    each = math.ceil(depth / len(samples))  # blocks in a row share one, as in FluxTransformer2DModel
                    spread = [samples[i // each] for i in range(depth)]
                    before = totals[kind]
                    totals[kind] = spread if before is None else [a + b for a, b in zip(before, spread, strict=True)]
        return tuple(totals)


def find_values(net: ControlNet, files: Files) -> int:
    """How many numbers its weights are; it is downloaded where it is not here.

    Raises ModelUnavailable with the reason where it cannot be had.
    """
    with _named(net, files):
        found = check_whole(files.find(net.repo, net.repo, part=True).folder)
    return values_of(found)


@contextmanager
def _named(net: ControlNet, files: Files) -> Iterator[None]:
    """Say of which network it is that something is wrong."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        raise ModelUnavailable(f"ControlNet {net.name} ({net.repo}): {files.explain(error)}") from error


class ControlNets:
    """Those of one model. What CONTROLNETS names stays; of others what the latest plan that had some asked for.

    Those others leave earlier where the ledger has no room for them.
    """

    def __init__(
        self,
        pipeline: Any,
        model: Model,
        files: Files,
        device: torch.device,
        *,
        ledger: Ledger,
        on_load: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._ledger = ledger
        self._pipeline = pipeline
        self._on_load = on_load  # gets each network
        self._device = device
        self._model = model
        self._files = files
        self._kept: set[str] = set()
        self._sources: dict[str, Source] = {}
        self._guided: dict[str, bool] = {}
        self._values: dict[str, int] = {}  # how many numbers their weights are
        self._loaded: dict[str, Any] = {}

    @property
    def in_memory(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._loaded)

    def load(self, names: Sequence[str]) -> None:
        """Load these at the start, and keep them."""
        rows = {name.lower(): row for row in controlnets_for(self._model) for name in (row.name, row.repo)}
        if strange := [name for name in names if name.lower() not in rows]:
            known = ", ".join(dict.fromkeys(row.name for row in rows.values()))
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
            raise ModelUnavailable(f"{names} cannot be used together: only one of them reads guidance_scale")

    def use(self, controls: Sequence[PlannedControl]) -> tuple[Any, dict[str, Any]]:
        """The networks of `controls` as one, loaded, and the arguments that a pipeline wants with them."""
        nets = [control.net for control in controls if control.net]
        for name in self._loaded.keys() - self._kept - {net.name for net in nets}:
            self._ledger.remove(name)
            self._leave(name)
        for net in nets:
            self._load(net)
        several = MultiControlNet([self._loaded[net.name] for net in nets], self._pipeline.transformer.config)
        return several, {
            "control_mode": [control.control_mode for control in controls],
            "controlnet_conditioning_scale": [control.scale for control in controls],
            "control_guidance_start": [control.start for control in controls],
            "control_guidance_end": [control.end for control in controls],
        }

    def _fetch(self, net: ControlNet, before_download: Callable[[], None]) -> None:
        if net.name in self._sources:
            return
        with _named(net, self._files):
            source = self._files.find(net.repo, net.repo, part=True, before_download=before_download)
            config = json.loads((source.folder / "config.json").read_text())
            if not (found := check_whole(source.folder)):
                raise Refused("holds no weights")
            here = self._pipeline.transformer.config
            for measure in _MEASURES:
                if config[measure] != here[measure]:
                    raise Refused(f"is made for another model: {measure} is {config[measure]} and {here[measure]} here")
        self._values[net.name] = values_of(found)
        self._guided[net.name] = bool(config.get("guidance_embeds"))
        self._sources[net.name] = source  # the last: other jobs take it for done

    def _load(self, net: ControlNet) -> None:
        if net.name in self._loaded:
            return
        with _named(net, self._files), LOADING.networks():
            try:
                self._loaded[net.name] = load_with_room(
                    self._ledger,
                    lambda: self._read(net),
                    name=net.name,
                    kind=ExtraKind.CONTROLNET,
                    size=self._values[net.name] * self._pipeline.dtype.itemsize,
                    leave=lambda: self._leave(net.name),
                    kept=net.name in self._kept,
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemory(
                    f"there is no room for the ControlNet {net.name} on this card, even with as little of the model on "
                    "it as MEMORY_MODE allows: choose another MEMORY_MODE or a larger card"
                ) from error

    def _read(self, net: ControlNet) -> Any:
        folder, dtype = self._sources[net.name].folder, self._pipeline.dtype
        with torch.inference_mode(False):  # graphs tell tensors of inference from others
            found = diffusers.FluxControlNetModel.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True
            )
            found = found.to(self._device).eval()
        self._on_load(found)
        return found

    def _leave(self, name: str) -> None:
        del self._loaded[name]
        gc.collect()  # compiled, its blocks refer to themselves: it would stay until Python happened to look

"""The networks of a model in one file, each of its tensors proven to have a place; a folder has what it lacks."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers.loaders import single_file_utils as of_diffusers
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import nn

from src.engine.components import FolderNetworks, check_report, some, written
from src.engine.gguf_linear import GGUFLinear, can_stay, dequantize
from src.engine.staging import Staging
from src.errors import Refused
from src.weights.files import Source
from src.weights.single_file import SingleFile

# Rows of each tensor that a converter is asked with: FLUX.1's and Chroma's know the width of the published models
# alone, 3072, and take queries, keys, values (a width each) and an MLP (four) of 7 x 3072 rows.
_ROWS = 7 * 3072
_PLAIN = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
_TYPES = MappingProxyType({**_PLAIN, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2})
_SCALE = re.compile(r"(?:^|(?<=\.))(?:scale_weight|weight_scale)$")  # of fp8 weights, in ComfyUI's names
# Scales of activations, marks of formats, what training alone needs, and what every library makes by itself.
_HARMLESS = re.compile(
    r"(?:^|\.)(?:scaled_fp8|scale_input|input_scale|comfy_quant|position_ids|inv_freq|logit_scale|spiece_model"
    r"|num_batches_tracked|text_projection(?:\.weight)?)$|^repa_projectors\."
)
_WORDS = "lm_head.weight"
_NORM = re.compile(r"(?<=y_norm\.)weight$")  # query_norm, key_norm: newer programs' word for BFL's scale
_FLUX_2_VAE = re.compile(r"^(?:encoder\.(?=quant_conv\.)|decoder\.(?=post_quant_conv\.))")  # BFL has them within

_Tensors = dict[str, torch.Tensor]


class Rows(NamedTuple):
    """Rows of a tensor of the file, from `begin` to before `end`."""

    tensor: str
    begin: int
    end: int


class SingleFileNetworks(FolderNetworks):
    """The networks that `file` holds, and of `folder` those that it lacks.

    Raises Refused where a tensor of the file has no place, or one is missing; nothing of their values is read yet.
    """

    def __init__(self, index: Mapping[str, Any], source: Source, file: SingleFile) -> None:
        super().__init__(index, source)
        self._file = file
        self._held = {part: _StoredTensors(file, part) for part in file.parts}
        own = tuple(file.parts.values())
        if strangers := [name for name in file.tensors if not name.startswith(own) and not _HARMLESS.search(name)]:
            raise Refused(f"{file.path.name} holds what no part of its model has a place for: {some(strangers)}")
        # Where each tensor of a network comes from, in the names of its class.
        self._places: dict[str, dict[str, list[Rows]]] = {}
        self._sizes: dict[str, dict[str, int]] = {}
        for part, tensors in self._held.items():
            places = {name: [Rows(name, 0, tensors.rows(name))] for name in tensors.names}
            sizes = {name: tensors.values(name) for name in tensors.names}
            if self.index[part][0] == "diffusers":
                network = self.empty(part, torch.float32)
                shapes = {name: weight.shape for name, weight in network.state_dict().items()}
                places = tensors.places(shapes, partial(self._to_own_names, part))
                sizes = {name: shapes[name].numel() for name in places}
                if part == "transformer":
                    packed = {name: tensors.packed(rows, _linear(network, name)) for name, rows in places.items()}
                    self.packed = {name: found[1].nbytes for name, found in packed.items() if found}
            self._places[part], self._sizes[part] = places, sizes

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """As of a folder; of what both have, the file's."""
        return super().sizes | self._sizes

    def files(self, but_for: Container[str] = ()) -> list[Path]:
        """As of a folder; of what both have, the file's."""
        others = [file for file in super().files(but_for) if file.parent.name not in self._held]
        own = [self._file.path] if any(part not in but_for for part in self._held) else []
        return sorted(own + others, key=lambda file: -file.stat().st_size)

    @property
    def fingerprint(self) -> list[str]:
        """Tells the file from others, and from itself once it was written anew."""
        return written([self._file.path.resolve()])

    @property
    def stored(self) -> str | None:
        """The type that most of the transformer's values have, where that takes less than 16 bits."""
        kinds = self._held["transformer"].kinds()
        kind = max(kinds, key=kinds.__getitem__)
        return None if kind in _PLAIN else kind

    def configuration(self, part: str) -> dict[str, Any]:
        """As of a folder, and what the shapes of the transformer's tensors say."""
        return super().configuration(part) | (dict(self._file.configuration) if part == "transformer" else {})

    def load(
        self, dtype: torch.dtype, staging: Staging, *, but_for: Container[str] = (), short: bool = False
    ) -> Iterator[tuple[str, Any]]:
        """The file's networks come first.

        Weights that it has in `dtype`, and those that stay packed, are mapped from it, and nothing is read of them yet;
        the others are read and converted, a tensor at a time.
        """
        for part, tensors in self._held.items():
            if part not in but_for:
                value = partial(tensors.value, dtype=dtype, staging=staging)
                make = self._of_diffusers if self.index[part][0] == "diffusers" else self._of_transformers
                yield part, make(part, value, dtype)
        rest = [part for part in self.index if part in but_for or part in self._held]
        yield from super().load(dtype, staging, but_for=rest, short=short)

    def _of_diffusers(self, part: str, value: Callable[..., torch.Tensor], dtype: torch.dtype) -> Any:
        network, weights = self.empty(part, dtype), _Tensors()
        shapes = {name: weight.shape for name, weight in network.state_dict().items()}
        for name, rows in self._places[part].items():
            linear = _linear(network, name)
            if name in self.packed and linear and (packed := self._held[part].packed(rows, linear)):
                network.set_submodule(name.removesuffix(".weight"), GGUFLinear(linear, *packed))
            else:
                weights[name] = value(rows, shapes[name])
        network.load_state_dict(weights, strict=False, assign=True)
        return network.requires_grad_(False)

    def _of_transformers(self, part: str, value: Callable[..., torch.Tensor], dtype: torch.dtype) -> Any:
        """By the library's own loading, which knows the names of its older versions."""
        of, tensors = self.class_of(part), self._held[part]
        weights = {name: value(rows, tensors.shape(name)) for name, rows in self._places[part].items()}
        configuration = of.config_class.from_pretrained(self.folder / part)
        try:
            network, report = of.from_pretrained(
                None, config=configuration, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise Refused(f"its {part} has other sizes than the one that {self.folder} describes") from error
        missing = set(report["missing_keys"]) - {_WORDS}  # of which FLUX asks none: it takes what lies before them
        check_report(part, {**report, "missing_keys": missing})
        return network

    def _to_own_names(self, part: str, tensors: _Tensors) -> _Tensors:
        """Tensors of the file in the names of the network's class."""
        if part == "transformer" and self._file.layout == "diffusers":
            return tensors
        renamed = {_FLUX_2_VAE.sub("", _NORM.sub("scale", name)): tensor for name, tensor in tensors.items()}
        convert = _CONVERTERS[self.index[part][1]]
        converted: _Tensors = convert(renamed, config=self.configuration(part))
        return converted


class _StoredTensors:
    """The tensors of one network in a file, by their `names` without its prefix; scales count with their weights."""

    def __init__(self, file: SingleFile, part: str) -> None:
        self._part = part
        self._tensors = file.of(part)
        scales = [name for name in self._tensors if _SCALE.search(name)]
        self._scales = {_SCALE.sub("weight", name): name for name in scales}
        self.names = [name for name in self._tensors if not _SCALE.search(name) and not _HARMLESS.search(name)]
        # Mapped, not read.
        self._file = torch.from_file(str(file.path), size=file.path.stat().st_size, dtype=torch.uint8)
        if alone := [name for weight, name in self._scales.items() if weight not in self._tensors]:
            raise Refused(f"the weights of {part} hold scales of nothing: {some(alone)}")
        if twice := [name for name in scales if name not in self._scales.values()]:
            raise Refused(f"weights of {part} have two scales each, and it is not known which counts: {some(twice)}")
        if other := {self._tensors[name].dtype for name in scales} - _PLAIN.keys():
            raise Refused(
                f"the scales of {part} are {', '.join(sorted(other))}, and what is read is {', '.join(_PLAIN)}"
            )
        known = {*_TYPES, *(kind.name for kind in dequantize_functions)}
        if other := {self._tensors[name].dtype for name in self.names} - known:
            raise Refused(
                f"the weights of {part} are {', '.join(sorted(other))}, which is not read: take bfloat16 ones"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def rows(self, name: str) -> int:
        """How many there are; a number alone is one."""
        return (*self.shape(name), 1)[0]

    def values(self, name: str) -> int:
        """How many there are."""
        return math.prod(self.shape(name))

    def stored(self, name: str) -> torch.Tensor:
        """As the file has it, mapped; of a packed type uint8 [rows, bytes of a row], or [1, bytes] where rows are no
        whole blocks.
        """
        info = self._tensors[name]
        memory = self._file[info.start : info.start + info.size]
        dtype = _TYPES.get(info.dtype)
        if dtype is None:
            block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[info.dtype]]
            return memory.view(1 if info.shape[-1] % block else math.prod(info.shape[:-1]), -1)
        if info.start % dtype.itemsize:  # as headers are that nobody filled up
            memory = memory.clone()
        return memory.view(dtype).view(info.shape)

    def kinds(self) -> Counter[str]:
        """How many values are of each type."""
        counted = Counter[str]()
        for name in self.names:
            counted[self._tensors[name].dtype] += self.values(name)
        return counted

    def places(
        self, shapes: Mapping[str, torch.Size], convert: Callable[[_Tensors], _Tensors]
    ) -> dict[str, list[Rows]]:
        """Where each tensor of a network of `shapes` comes from. Raises Refused unless all are there, and no other."""
        numbers = torch.arange(len(self.names) * _ROWS, dtype=torch.int32).view(-1, _ROWS, 1, 1)
        try:
            converted = convert(dict(zip(self.names, numbers, strict=True)))
        except KeyError as error:
            raise Refused(f"the weights of {self._part} lack {error.args[0]}; download it again") from error
        found = {name: self._rows_of(numbers) for name, numbers in converted.items()}
        used = {rows.tensor for places in found.values() for rows in places}
        unread = [name for name in found if name not in shapes] or [name for name in self.names if name not in used]
        check_report(self._part, {"missing_keys": _needed(shapes) - found.keys(), "unexpected_keys": unread})
        for name, places in found.items():
            values = sum(self.values(row.tensor) // self.rows(row.tensor) * (row.end - row.begin) for row in places)
            if values != shapes[name].numel():
                here, there = (" x ".join(map(str, shape)) for shape in (self.shape(places[0].tensor), shapes[name]))
                raise Refused(f"{places[0].tensor} of the {self._part} is {here}, and {name} has to be {there}")
        return found

    def _rows_of(self, numbers: torch.Tensor) -> list[Rows]:
        """What a converter answered, in the rows of the file's tensors."""
        numbers = numbers.flatten()
        cuts = 1 + torch.nonzero((numbers.diff() != 1) | (numbers[1:] % _ROWS == 0)).flatten()
        places = []
        for part in numbers.tensor_split(cuts):
            tensor, begin = divmod(int(part[0]), _ROWS)
            name = self.names[tensor]
            parts = begin * self.rows(name), (begin + len(part)) * self.rows(name)
            if any(each % _ROWS for each in parts):
                raise Refused(f"{name} of the {self._part} has {self.rows(name)} rows, which cannot be shared out")
            places.append(Rows(name, *(each // _ROWS for each in parts)))
        return places

    def value(self, rows: list[Rows], shape: tuple[int, ...], *, dtype: torch.dtype, staging: Staging) -> torch.Tensor:
        """A tensor of `shape` in `dtype`: mapped where it lies in the file as it is, made of its parts elsewhere."""
        parts = [self._converted(each, dtype, staging) for each in rows]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)

    def packed(self, rows: list[Rows], linear: nn.Linear | None) -> tuple[GGMLQuantizationType, torch.Tensor] | None:
        """The blocks that may stay the weights of `linear` as they are; None of other types and layers."""
        kinds = {self._tensors[each.tensor].dtype for each in rows}
        if linear is None or len(kinds) > 1 or kinds & _TYPES.keys():
            return None
        kind = GGMLQuantizationType[kinds.pop()]
        stored = [self.stored(each.tensor) for each in rows]
        if any(len(tensor) != self.rows(each.tensor) for tensor, each in zip(stored, rows, strict=True)):
            return None  # as some are laid whose rows are no whole blocks
        blocks = [tensor[each.begin : each.end] for tensor, each in zip(stored, rows, strict=True)]
        joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return (kind, joined) if can_stay(linear, kind, joined) else None

    def _converted(self, rows: Rows, dtype: torch.dtype, staging: Staging) -> torch.Tensor:
        kind, stored = self._tensors[rows.tensor].dtype, self.stored(rows.tensor)
        part, scale = slice(rows.begin, rows.end), self._scales.get(rows.tensor)
        if kind not in _TYPES:
            blocks = _read(stored, staging)
            values = dequantize(blocks, GGMLQuantizationType[kind]).view(self.shape(rows.tensor))
            return values[part].to(dtype)
        stored = stored.view(self.shape(rows.tensor) or (1,))[part]
        if scale is None:
            return stored if stored.dtype == dtype else _read(stored, staging).to(dtype)
        return (_read(stored, staging).float() * self._scale(scale, rows)).to(dtype)

    def _scale(self, name: str, rows: Rows) -> torch.Tensor:
        """Of one number, or of one for each row. Raises Refused where it is another."""
        scale = self.stored(name).float().flatten()
        if scale.numel() not in (1, self.rows(rows.tensor)):
            raise Refused(
                f"{name} of the {self._part} has {scale.numel():,} numbers for {self.rows(rows.tensor):,} rows: scales "
                "of blocks are not read; take a file with one for each tensor or row, or one of bfloat16"
            )
        return scale if scale.numel() == 1 else scale[rows.begin : rows.end, None]


def _read(stored: torch.Tensor, staging: Staging) -> torch.Tensor:
    """`stored` in memory of its own, read by large requests."""
    memory = torch.empty_like(stored)
    staging.fill([(stored, memory)])
    return memory


def _linear(network: nn.Module, name: str) -> nn.Linear | None:
    """The linear whose weight is called `name`."""
    layer = network.get_submodule(name.rpartition(".")[0])
    return layer if isinstance(layer, nn.Linear) and name.endswith(".weight") else None


def _needed(names: Mapping[str, Any]) -> set[str]:
    return {name for name in names if not _HARMLESS.search(name)}


def _vae(tensors: _Tensors, config: Mapping[str, Any]) -> Any:
    """BFL's names, or diffusers' own; FLUX.2's has statistics of latents, which have one name everywhere."""
    if any("_blocks." in name for name in tensors):
        return tensors
    statistics = {name: tensor for name, tensor in tensors.items() if name.startswith("bn.")}
    return of_diffusers.convert_ldm_vae_checkpoint(tensors, config) | statistics


_CONVERTERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "FluxTransformer2DModel": of_diffusers.convert_flux_transformer_checkpoint_to_diffusers,
        "ChromaTransformer2DModel": of_diffusers.convert_chroma_transformer_checkpoint_to_diffusers,
        "Flux2Transformer2DModel": of_diffusers.convert_flux2_transformer_checkpoint_to_diffusers,
        "Flux3Transformer2DModel": of_diffusers.convert_flux3_transformer_checkpoint_to_diffusers,
        "AutoencoderKL": _vae,
        "AutoencoderKLFlux2": _vae,
    }
)

"""A pipeline's networks and tokenizers, each proven whole.

Libraries fill what is missing with random numbers or with an empty vocabulary, and say so in a log at most.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open

from src.engine.staging import Staging
from src.errors import Refused
from src.weights.files import Source, check_whole, components
from src.weights.read_ahead import one_ahead, weight_files

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_NETWORKS = (diffusers.ModelMixin, transformers.PreTrainedModel)
_WRITTEN = {torch.float32: "F32", torch.bfloat16: "BF16"}  # in a safetensors file's header
_UNTRAINED = ("position_ids", "inv_freq")  # buffers that old files hold and that every library makes by itself
_SPARE_WORDS = 0.1  # encoders are padded for the hardware's sake, tokenizers have marks that nobody uses
_MOST_NAMED = 5


class FolderNetworks:
    """The networks of a model in a folder of diffusers' layout, as its `index` names them."""

    packed: Mapping[str, int] = MappingProxyType({})  # bytes of tensors of the transformer that stay packed

    def __init__(self, index: Mapping[str, Any], source: Source) -> None:
        self.index = index
        self.folder = source.folder
        self._revision = source.revision

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """The number of values in each tensor, by network. Raises Refused where a file is not whole."""
        return dict(self._in_folder)

    @cached_property
    def _in_folder(self) -> dict[str, dict[str, int]]:
        """Read once: on a volume each file's header is a request."""
        named = components(self.index)
        return {name: tensors for name, tensors in check_whole(self.folder).items() if name in named}

    def files(self, but_for: Container[str] = ()) -> list[Path]:
        """Those with weights, `but_for` some networks', the largest first."""
        return [file for file in weight_files(self.folder) if file.parent.name not in but_for]

    @property
    def stored(self) -> str | None:
        """The type of the transformer's weights, where that has less than 16 bits."""
        return None

    @property
    def fingerprint(self) -> list[str]:
        """Tells models apart by their commit, or by where their files are and when they were written."""
        if self._revision:
            return [self._revision]
        return written(file for file in self.files() if file.parent.name == "transformer")

    def configuration(self, part: str) -> dict[str, Any]:
        """Of one part: what its file says, and what its class says where the file is silent."""
        signature = inspect.signature(self.class_of(part).__init__)
        own = {name: each.default for name, each in signature.parameters.items() if name != "self"}
        written: dict[str, Any] = json.loads((self.folder / part / "config.json").read_text())
        return own | written

    def class_of(self, part: str) -> Any:
        """The class of a network, or of another part of these libraries; None for what is of no such library."""
        library, name = self.index[part]
        return getattr(_LIBRARIES.get(library), name, None)

    def empty(self, part: str, dtype: torch.dtype) -> Any:
        """A network of diffusers' without weights."""
        of = self.class_of(part)
        with init_empty_weights():
            return of.from_config(self.configuration(part)).to(dtype).eval()

    def load(
        self,
        dtype: torch.dtype,
        staging: Staging,  # noqa: ARG002 - of those who read files by themselves
        *,
        but_for: Container[str] = (),
        short: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """The networks, `but_for` some, as `load_networks` has them."""
        return load_networks(self.index, self.folder, dtype, but_for=but_for, short=short)


def written(files: Iterable[Path]) -> list[str]:
    """Where each of `files` is and when it was written."""
    return [f"{file} {file.stat().st_mtime_ns}" for file in sorted(files)]


def load_networks(
    index: Mapping[str, Any], folder: Path, dtype: torch.dtype, *, but_for: Container[str], short: bool = False
) -> Iterator[tuple[str, Any]]:
    """The networks that `index` names, one after another with their names, in the host's memory.

    Weights that their files hold in `dtype` are mapped from there, and nothing is read of them yet. The others are
    converted; where memory is `short`, their files are read just before, and leave the system's cache after.

    Raises Refused with the tensors that a file lacks, or holds and nobody reads.
    """
    wanted: dict[str, Any] = {
        name: found
        for name, class_name in components(index).items()
        if name not in but_for and _is_network(found := getattr(_LIBRARIES.get(index[name][0]), class_name, None))
    }
    converted = [_converted(folder / name, dtype) if short else [] for name in wanted]
    for _, (name, found) in zip(one_ahead(converted), wanted.items(), strict=True):
        yield name, load_network(name, found, folder / name, dtype)


def load_network(name: str, found: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One network, of the class `found`, that is called `name`; raises Refused as `load_networks` does."""
    network, report = found.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    check_report(name, report)
    return network


def _converted(folder: Path, dtype: torch.dtype) -> list[Path]:
    """The files of a network that hold values of another type."""
    files = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            types = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - a handle, no mapping
        if types != {_WRITTEN[dtype]}:
            files.append(file)
    return files


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a processor's `folder`; raises Refused where nothing there says how to chat with its model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if (template := folder / "chat_template.json").is_file() and not tokenizer.chat_template:
        tokenizer.chat_template = json.loads(template.read_text())["chat_template"]  # where processors once kept it
    if not tokenizer.chat_template:
        raise Refused(f"has no chat template in {folder.name}; download it again")
    return tokenizer


def check_vocabularies(pipeline: Any) -> None:
    """Raise Refused where a tokenizer knows far fewer words than its text encoder, or far more."""
    for suffix in ("", "_2"):
        tokenizer, encoder = (getattr(pipeline, f"{part}{suffix}", None) for part in ("tokenizer", "text_encoder"))
        if tokenizer is not None and encoder is not None:
            check_vocabulary(f"tokenizer{suffix}", f"text_encoder{suffix}", tokenizer, encoder)


def check_vocabulary(here: str, name: str, tokenizer: Any, network: Any) -> None:
    """Raise Refused where the vocabulary in `here` is not that of the network `name`."""
    config = network.config.get_text_config()
    known, words = config.vocab_size, len(tokenizer)
    if abs(words - known) > _SPARE_WORDS * known:
        raise Refused(
            f"the vocabulary in {here} has {words:,} words, and {name} was made for {known:,}; download it again"
        )


def _is_network(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, _NETWORKS)


def check_report(name: str, report: Mapping[str, Any]) -> None:
    """What the library says of loading, as Refused: transformers 5 and diffusers only log it."""
    if report["missing_keys"]:
        raise Refused(f"the weights of {name} lack {some(report['missing_keys'])}; download it again")
    unread = [key for key in report["unexpected_keys"] if not key.endswith(_UNTRAINED)]
    if scales := [key for key in unread if "scale" in key.rpartition(".")[2]]:
        raise Refused(f"the weights of {name} are scaled fp8 ({some(scales)}), which is not read: take bfloat16 ones")
    if unread:
        raise Refused(f"the weights of {name} hold what its configuration has no place for: {some(unread)}")


def some(names: Iterable[str]) -> str:
    """The first of `names`, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more

"""A pipeline's networks and tokenizers, each proven whole.

Libraries fill what is missing with random numbers or with an empty vocabulary, and say so in a log at most.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open

from src.errors import Refused
from src.weights.files import components
from src.weights.read_ahead import one_ahead

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_NETWORKS = (diffusers.ModelMixin, transformers.PreTrainedModel)
_WRITTEN = {torch.float32: "F32", torch.bfloat16: "BF16"}  # in a safetensors file's header
_UNTRAINED = ("position_ids", "inv_freq")  # buffers that old files hold and that every library makes by itself
_SPARE_WORDS = 0.1  # encoders are padded for the hardware's sake, tokenizers have marks that nobody uses
_MOST_NAMED = 5


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
    _check_report(name, report)
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


def _check_report(name: str, report: Mapping[str, Any]) -> None:
    """What the library says of loading: transformers 5 and diffusers only log it."""
    if report["missing_keys"]:
        raise Refused(f"the weights of {name} lack {_some(report['missing_keys'])}; download it again")
    unread = [key for key in report["unexpected_keys"] if not key.endswith(_UNTRAINED)]
    if scales := [key for key in unread if "scale" in key.rpartition(".")[2]]:
        raise Refused(f"the weights of {name} are scaled fp8 ({_some(scales)}), which is not read: take bfloat16 ones")
    if unread:
        raise Refused(f"the weights of {name} hold what its configuration has no place for: {_some(unread)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more

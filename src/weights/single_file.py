"""A model in one file: what is in it, by its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header has it: `dtype` in safetensors' words, or a GGML type's name such as "Q4_K"."""

    dtype: str
    shape: tuple[int, ...]  # of its values, torch's order: [out, in] of a linear


@dataclass(frozen=True)
class SingleFile:
    """A FLUX in one file.

    `parts` says which of a pipeline's networks are in it and what their tensors' names begin with there;
    `layout` whose names those are: "diffusers" or "original" (BFL's, which Comfy and Civitai keep);
    `configuration` what the tensors' shapes say of the transformer, in the names of diffusers' configuration.
    """

    path: Path
    family: str  # a row of FAMILIES
    layout: str
    parts: Mapping[str, str]  # "transformer", "vae", "text_encoder", "text_encoder_2" -> prefix
    tensors: Mapping[str, StoredTensor]  # of the whole file
    configuration: Mapping[str, Any]

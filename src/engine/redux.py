"""FLUX.1-Redux: a picture as part of the prompt. Fetched and loaded when first asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image

from src.engine.loading_lock import LOADING
from src.engine.memory import is_out_of_memory, load_with_room
from src.errors import ModelUnavailable, Refused
from src.weights.files import Files, Source, check_whole, values_of
from src.weights.ledger import ExtraKind, Ledger

REDUX = "Redux"  # to the ledger


class Redux:
    """Reads pictures for one model; `name` is a hub id or a folder. It stays until others need the room."""

    def __init__(self, pipeline: Any, name: str, files: Files, device: torch.device, ledger: Ledger) -> None:
        self._pipeline = pipeline
        self._name = name
        self._device = device
        self._files = files
        self._ledger = ledger
        self._source: Source | None = None
        self._values = 0  # how many numbers its weights are
        self._prior: Any = None

    def fetch(self, before_download: Callable[[], None] = lambda: None) -> Source:
        """See that its files are here and made for this model; takes no time of the device.

        Raises ModelUnavailable with the reason where they are not.
        """
        if self._source:
            return self._source
        try:
            source = self._files.find(self._name, self._name, before_download=before_download)
            reads = json.loads((source.folder / "image_embedder" / "config.json").read_text())["txt_in_features"]
            if not (found := check_whole(source.folder)):
                raise Refused("holds no weights")
            here = self._pipeline.transformer.config.joint_attention_dim
            if reads != here:
                raise Refused(f"is made for another model: its embeddings have {reads} values and this model's {here}")
        except Exception as error:
            raise self._unavailable(error) from error
        self._values = values_of(found)
        self._source = source
        return source

    def load(self) -> None:
        """Have it in memory before pictures are read; raises ModelUnavailable, or what says that memory is short."""
        if self._prior is None:
            self.fetch()
            size = self._values * self._pipeline.dtype.itemsize
            with LOADING.networks():
                self._prior = load_with_room(
                    self._ledger, self._load, name=REDUX, kind=ExtraKind.REDUX, size=size, leave=self._leave
                )

    def read(self, picture: Image.Image, scale: float) -> torch.Tensor:
        """What follows the prompt's words: [1, tokens, joint_attention_dim], the model's own times `scale`.

        It must be loaded.
        """
        seen = self._prior.encode_image(picture, self._device, 1)
        words: torch.Tensor = self._prior.image_embedder(seen).image_embeds
        return words * scale

    def _leave(self) -> None:
        self._prior = None

    def _load(self) -> Any:
        folder = self.fetch().folder
        try:
            return diffusers.FluxPriorReduxPipeline.from_pretrained(
                folder,
                dtype=self._pipeline.dtype,
                use_safetensors=True,
                local_files_only=True,
                **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
            ).to(self._device)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> ModelUnavailable:
        return ModelUnavailable(f"REDUX_MODEL={self._name}: {self._files.explain(error)}")

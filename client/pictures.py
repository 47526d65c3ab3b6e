"""What a job brought: its pictures' files, each with its seed, and the metadata."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from PIL import Image

from client.errors import JobFailed
from client.transport import Transport
from src.catalog import FORMATS
from src.wording import show

_LOST = "is lost: the worker could neither upload it nor carry it; ask for its seed alone, or for a smaller format"


@dataclass(frozen=True)
class Picture:
    """One picture: its file as the worker wrote it, which carries the request that makes it again."""

    file: bytes
    seed: int
    format: str  # a row of FORMATS: PNG, JPEG, WEBP or AVIF

    @property
    def suffix(self) -> str:
        """Of the file's name, without the dot."""
        return FORMATS[self.format].suffix

    @property
    def image(self) -> Image.Image:
        """The file opened by Pillow."""
        return Image.open(io.BytesIO(self.file))


@dataclass(frozen=True)
class Pictures(Sequence[Picture]):
    """The pictures of one request in the order of their seeds; `lost` says why a seed brought none.

    `metadata` is the worker's (docs/api.md), `seconds` what RunPod bills of the job, without the worker's start.
    """

    pictures: tuple[Picture, ...]
    metadata: Mapping[str, Any]
    lost: Mapping[int, str]
    seconds: float

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Picture, ...]: ...
    def __getitem__(self, index: int | slice) -> Picture | tuple[Picture, ...]:
        return self.pictures[index]

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)


async def pictures_of(status: Mapping[str, Any], transport: Transport | None = None) -> Pictures:
    """The pictures of a job by RunPod's status of it; what is in a bucket is fetched by `transport`.

    Raises JobFailed where the output is not a worker's answer, or a file no picture.
    """
    output = status["output"]
    metadata = output.get("metadata")
    try:
        seeds = [int(seed) for seed in metadata["seeds"]]
        texts, urls = (list(output.get(name) or [None] * len(seeds)) for name in ("images", "image_urls"))
        sources = list(zip(seeds, texts, urls, strict=True))
        total = float(metadata["timings"]["total"])
    except (KeyError, TypeError, ValueError):
        raise JobFailed("no_pictures", f"the output is not an answer with pictures: {show(output)}") from None

    async def one(seed: int, text: str | None, url: str | None) -> Picture | None:
        if text is not None:
            return await asyncio.to_thread(_read, text, seed)
        if url is not None and transport is not None:
            return _checked(await transport.fetch(url), seed)
        return None

    found = dict(zip(seeds, await asyncio.gather(*(one(*source) for source in sources)), strict=True))
    milliseconds = status.get("executionTime")
    return Pictures(
        tuple(picture for picture in found.values() if picture),
        metadata,
        {seed: _LOST for seed, picture in found.items() if picture is None},
        milliseconds / 1_000 if isinstance(milliseconds, (int, float)) else total,
    )


def _read(text: str, seed: int) -> Picture:
    try:
        return _checked(base64.b64decode(text, validate=True), seed)
    except (binascii.Error, TypeError, ValueError):
        raise JobFailed("no_pictures", f"the picture of seed {seed} is no base64: {show(text)}") from None


def _checked(file: bytes, seed: int) -> Picture:
    try:
        with Image.open(io.BytesIO(file), formats=list(FORMATS)) as image:
            return Picture(file, seed, str(image.format))
    except (OSError, ValueError, Image.DecompressionBombError):
        raise JobFailed("no_pictures", f"the file of seed {seed} is no picture: {show(file)}") from None

"""The shipped model, loaded once; no test reads the developer's own environment or the network."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from src.settings import Settings
from tests.hub import Hub

if "PYTEST_XDIST_WORKER" in os.environ:  # each of them has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before anything imports huggingface_hub or builds the worker's settings.
_hub, _home = Hub(), tempfile.TemporaryDirectory()
os.environ.update(MODEL_NAME="flux-shapes", HF_ENDPOINT=_hub.url, HF_HOME=_home.name, HF_HUB_DISABLE_TELEMETRY="1")
for name in Settings.model_fields.keys() - {"model_name"}:
    if name.startswith("runpod_"):
        os.environ.pop(name.upper(), None)  # the SDK reads these too, and an empty one is no number to it
    else:
        os.environ[name.upper()] = ""  # and what .env says counts for nothing


# Modules whose single tests take minutes: begun first, or one worker of xdist would wait for the other at the end.
LONGEST = ("test_image.py", "test_serving.py", "test_soak.py", "test_training.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    yield _hub
    _hub.close()


@pytest.fixture(scope="session")
def generate() -> Callable[..., dict[str, Any]]:
    """handler() on the shipped model: the fields of a request as arguments, a success as result."""
    from handler import handler

    def call(prompt: str, **fields: Any) -> dict[str, Any]:
        response: dict[str, Any] = handler({"id": "test", "input": {"prompt": prompt, **fields}})
        assert response["status"] == "success", response
        return response

    return call


def opened(response: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a response."""
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in response["images"]]


def base64_of(picture: Image.Image) -> str:
    """`picture` as a request carries it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()

"""RunPod Hub's two files, made from the settings, the catalog and the placement; `make docs` writes them.

What the Hub reads: https://docs.runpod.io/hub/publishing-guide. Tests hold the files in .runpod to what is made here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deploy.cards import CARDS, Card
from deploy.endpoint import MIN_CUDA
from deploy.plan import disk_gb, estimate, init_seconds
from src.catalog import Model, get_model
from src.settings import ROOT, SET_BY_RUNPOD, Settings
from src.weights.placement import DoesNotFit

FOLDER = ROOT / ".runpod"
DEFAULT = "FLUX.2-klein-4B"  # not gated: it runs without a token
PRESETS = ("FLUX.1-dev", "FLUX.1-schnell", DEFAULT, "FLUX.3-klein", "flux-shapes")
# What most operators choose from; all other rows are folded away.
_FREQUENT = frozenset(
    {
        "model_name", "hf_token", "memory_mode", "max_pixels", "bucket_endpoint_url", "bucket_access_key_id",
        "bucket_secret_access_key",
    }
)  # fmt: skip
_WORDS = {"Hf": "Hugging Face", "Lora": "LoRA", "Loras": "LoRAs", "Gb": "GB", "Mb": "MB", "Url": "URL", "Id": "ID"}
_TEST_CARD = "RTX 4090"
_TEST_MILLISECONDS = 600_000  # the image is pulled within the first

# 16x16 pixels, red above and blue below.
_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2A"
    "AAAGUlEQVR42mP4z8BAEmIY1UATDaPhNCg0AACR6v8BCilG7wAAAABJRU5ErkJggg=="
)
INPUTS: Mapping[str, Mapping[str, Any]] = {
    "text_to_image": {"prompt": "a green triangle on an orange background", "seed": 42},
    "image_to_image": {
        "prompt": "a red circle on a blue background",
        "init_image": _PICTURE,
        "width": 128,
        "height": 128,
        "seed": 1,
    },
    "describe": {"describe": True},
}


def hub() -> dict[str, Any]:
    """What hub.json says."""
    models = [get_model(name) for name in PRESETS]
    downloaded = [model for model in models if model.download_gb]
    return {
        "title": "FLUX",
        "description": "FLUX.1, FLUX.2, FLUX.3, Chroma and their fine-tunes, GGUF too: text and pictures in, pictures "
        "out, with LoRAs and ControlNets, on any card from 24 GB",
        "type": "serverless",
        "category": "image",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": disk_gb(models, Settings()),
            "gpuCount": 1,
            "gpuIds": ",".join(card.pool for card in CARDS if _holds(card, models)),
            "allowedCudaVersions": [MIN_CUDA],
            "presets": [{"name": model.name, "defaults": {"MODEL_NAME": _value(model)}} for model in models],
            "env": [
                *(_row(name, schema) for name, schema in _properties().items() if name not in SET_BY_RUNPOD),
                {"key": "RUNPOD_INIT_TIMEOUT", "value": str(init_seconds(downloaded, Settings()))},
            ],
        },
    }


def hub_tests() -> dict[str, Any]:
    """What tests.json says: the shipped model, which wants neither a token nor a download."""
    card = next(card for card in CARDS if card.name == _TEST_CARD)
    return {
        "tests": [
            {"name": name, "input": dict(fields), "timeout": _TEST_MILLISECONDS} for name, fields in INPUTS.items()
        ],
        "config": {
            "gpuTypeId": card.types[0],
            "gpuCount": 1,
            "env": [{"key": "MODEL_NAME", "value": "flux-shapes"}],
            "allowedCudaVersions": [MIN_CUDA],
        },
    }


FILES = {"hub.json": hub, "tests.json": hub_tests}


def _holds(card: Card, models: list[Model]) -> bool:
    """Whether each of `models` runs on `card` without a byte of its pictures changed."""
    try:
        return all(estimate(model, card, Settings()).exact for model in models)
    except DoesNotFit:
        return False


def _value(model: Model) -> str:
    """MODEL_NAME as the console's picker of Hugging Face's models writes it."""
    return model.repo if model.download_gb else model.name


def _properties() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = Settings.model_json_schema()["properties"]
    return found


def _row(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as the console asks for it, by its JSON schema."""
    kinds = schema.get("anyOf", [schema])
    schema = {**kinds[0], **schema}
    kind, default, optional = schema.get("type"), schema.get("default"), len(kinds) > 1
    asked: dict[str, Any] = {
        "name": " ".join(_WORDS.get(word, word) for word in schema["title"].split()),
        "type": "string",
        "description": f"{schema['description'][0].upper()}{schema['description'][1:]}.",
    }
    if name == "model_name":
        asked |= {"type": "huggingface", "default": _value(get_model(DEFAULT))}
    elif "enum" in schema:
        asked |= {"options": [{"label": value, "value": value} for value in schema["enum"]], "default": default}
    elif kind == "boolean" and optional:  # the console's switch has no third place
        values = {"by default": "", "yes": "true", "no": "false"}
        asked |= {"options": [{"label": label, "value": value} for label, value in values.items()], "default": ""}
    elif kind == "boolean":
        asked |= {"type": "boolean", "default": default, "trueValue": "true", "falseValue": "false"}
    elif kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum"))  # the Hub knows no bound that is left out itself
        bounds = {"default": default, "min": least, "max": schema.get("maximum")}
        asked |= {"type": "number"} | {bound: value for bound, value in bounds.items() if value is not None}
    elif kind == "string" and default:
        asked["default"] = default
    asked |= {"required": name == "model_name", "advanced": name not in _FREQUENT}
    return {"key": name.upper(), "input": asked}


def written(content: Mapping[str, Any]) -> str:
    """A file's text."""
    return json.dumps(content, indent=2) + "\n"

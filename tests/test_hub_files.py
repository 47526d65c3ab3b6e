"""RunPod Hub's files: as the Hub wants them, and as the settings and the catalog are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import Field

import deploy.hub
from deploy.cards import CARDS
from deploy.hub import FILES, FOLDER, INPUTS, PRESETS, hub, hub_tests, written
from src.catalog import MEMORY_MODES, PROFILES, QUANTIZATIONS, get_model
from src.settings import SET_BY_RUNPOD, Settings
from tests.runpod_rest import GPU_TYPES

_TEXT = {"type": "string", "minLength": 1}
_VALUE = {"type": ["string", "number", "boolean"]}
_CUDA = {"type": "array", "items": {"type": "string", "pattern": r"^\d+\.\d+$"}, "minItems": 1}


def closed(required: str, /, **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required.split()}


_INPUT = closed(
    "name type",
    name=_TEXT,
    type={"enum": ["string", "number", "boolean", "huggingface"]},
    description=_TEXT,
    default=_VALUE,
    options={"type": "array", "minItems": 1, "items": closed("label value", label=_TEXT, value={"type": "string"})},
    min={"type": "number"},
    max={"type": "number"},
    required={"type": "boolean"},
    advanced={"type": "boolean"},
    trueValue=_TEXT,
    falseValue=_TEXT,
)
_POOLS = "ADA_24|AMPERE_24|ADA_48_PRO|AMPERE_48|ADA_80_PRO|AMPERE_80|HOPPER_141"
# As the publishing guide has them.
SCHEMAS = {
    "hub.json": closed(
        "title description type category config",
        title=_TEXT,
        description=_TEXT,
        type={"const": "serverless"},
        category={"enum": ["audio", "embedding", "language", "video", "image"]},
        iconUrl=_TEXT,
        config=closed(
            "runsOn containerDiskInGb gpuCount gpuIds",
            runsOn={"enum": ["GPU", "CPU"]},
            endpointType={"const": "LB"},
            containerDiskInGb={"type": "integer", "minimum": 1},
            gpuCount={"type": "integer", "minimum": 1},
            gpuIds={"type": "string", "pattern": rf"^({_POOLS})(,({_POOLS}|-[\w ]+))*$"},
            cpuFlavor=_TEXT,
            allowedCudaVersions=_CUDA,
            presets={
                "type": "array",
                "items": closed(
                    "name defaults", name=_TEXT, defaults={"type": "object", "additionalProperties": _VALUE}
                ),
            },
            env={
                "type": "array",
                "items": {
                    "oneOf": [
                        closed("key value", key=_TEXT, value=_VALUE),
                        closed("key input", key=_TEXT, input=_INPUT),
                    ]
                },
            },
        ),
    ),
    "tests.json": closed(
        "tests",
        tests={
            "type": "array",
            "minItems": 1,
            "items": closed(
                "name input", name=_TEXT, input={"type": "object"}, timeout={"type": "integer", "minimum": 1}
            ),
        },
        config=closed(
            "",
            gpuTypeId={"enum": list(GPU_TYPES)},
            gpuCount={"type": "integer", "minimum": 1},
            cpuFlavor=_TEXT,
            env={"type": "array", "items": closed("key value", key=_TEXT, value={"type": "string"})},
            allowedCudaVersions=_CUDA,
        ),
    ),
}  # fmt: skip


def rows() -> dict[str, dict[str, Any]]:
    """What the console asks for, by variable."""
    return {row["key"]: row["input"] for row in hub()["config"]["env"] if "input" in row}


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_what_the_code_makes_and_what_the_hub_reads(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert text == written(FILES[name]()), "run make docs"
    jsonschema.validate(json.loads(text), SCHEMAS[name], cls=jsonschema.Draft202012Validator)


class OtherDefault(Settings):
    max_lora_rank: int = Field(256, ge=1, description=Settings.model_fields["max_lora_rank"].description)


class OtherRange(Settings):
    batch_size: int = Field(1, ge=1, le=8, description=Settings.model_fields["batch_size"].description)


class OtherOptions(Settings):
    bucket_addressing_style: Literal["auto", "path"] = Field(
        "auto", description=Settings.model_fields["bucket_addressing_style"].description
    )


class OtherSetting(Settings):
    another: str = Field("", description="of a test")


@pytest.mark.parametrize("changed", [OtherDefault, OtherRange, OtherOptions, OtherSetting])
def test_a_changed_setting_wants_the_file_made_anew(changed: type[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.hub, "Settings", changed)
    assert written(hub()) != (FOLDER / "hub.json").read_text()


def test_a_changed_model_wants_the_file_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str) -> Any:
        found = get_model(name)
        return replace(found, repo="someone/else") if name == "FLUX.1-dev" else found

    monkeypatch.setattr(deploy.hub, "get_model", other)
    assert written(hub()) != (FOLDER / "hub.json").read_text()


def test_every_setting_that_an_operator_may_set_is_asked_for() -> None:
    assert set(rows()) == {name.upper() for name in Settings.model_fields.keys() - SET_BY_RUNPOD}
    for name, row in rows().items():
        field = Settings.model_fields[name.lower()]
        if "Secret" in str(field.annotation):
            assert "default" not in row
            assert row["type"] == "string"
        elif name != "MODEL_NAME" and isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert row["default"] == field.default
            assert row["type"] == "number"


def test_rows_of_each_kind() -> None:
    found = rows()
    assert found["MODEL_NAME"]["type"] == "huggingface"
    assert found["MODEL_NAME"]["default"] == "black-forest-labs/FLUX.2-klein-4B"
    assert not get_model(found["MODEL_NAME"]["default"]).gated
    assert found["MODEL_NAME"]["required"]
    weights = ["auto", "none", *QUANTIZATIONS]
    for name, values in {"MEMORY_MODE": [*MEMORY_MODES], "QUANTIZATION": weights, "PROFILE": [*PROFILES]}.items():
        assert [option["value"] for option in found[name]["options"]] == values
    assert [option["value"] for option in found["COMPILE"]["options"]] == ["", "true", "false"]
    batch = found["BATCH_SIZE"]
    assert (batch["type"], batch["default"], batch["min"], batch["max"]) == ("number", 1, 1, 4)
    traceback = found["INCLUDE_TRACEBACK"]
    assert (traceback["type"], traceback["default"], traceback["trueValue"]) == ("boolean", True, "true")
    assert found["LORA_DIR"]["default"] == "/runpod-volume/loras"
    assert found["HF_TOKEN"]["name"] == "Hugging Face Token"
    assert not found["HF_TOKEN"]["advanced"]
    assert found["PROGRESS_INTERVAL"]["advanced"]


def test_what_the_console_sends_back_is_what_the_worker_reads() -> None:
    """All defaults, as texts, are the settings' own; each option is one that they take."""
    defaults = {
        key: str(row["default"]).lower() if row["type"] == "boolean" else str(row["default"])
        for key, row in rows().items()
        if "default" in row and key != "MODEL_NAME"
    }
    assert Settings.from_environment(defaults) == Settings()
    for key, row in rows().items():
        for option in row.get("options", ()):
            Settings.from_environment({key: option["value"]})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_models_that_the_worker_knows(name: str) -> None:
    (preset,) = (preset for preset in hub()["config"]["presets"] if preset["name"] == name)
    assert get_model(preset["defaults"]["MODEL_NAME"]).name == name


def test_the_disk_holds_the_largest_preset_and_the_pools_all_of_them() -> None:
    config = hub()["config"]
    assert config["containerDiskInGb"] == 75
    assert config["gpuIds"].split(",") == [card.pool for card in CARDS]


@pytest.mark.parametrize("name", INPUTS)
def test_the_hubs_tests_pass_on_the_shipped_model(name: str) -> None:
    from handler import handler

    (sent,) = (test["input"] for test in hub_tests()["tests"] if test["name"] == name)
    response: Callable[..., Any] | dict[str, Any] = handler({"id": name, "input": sent})
    assert isinstance(response, dict)
    assert response["status"] == "success", response

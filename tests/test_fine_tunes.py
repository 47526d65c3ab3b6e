"""Fine-tunes whose configuration differs: fewer blocks, no guidance, other channels than their pipeline has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from handler import respond
from src.catalog import CONTROLNETS
from src.engine import Engine, load_engine
from src.engine.placed_pipeline import PlacedPipeline
from src.errors import ModelUnavailable
from src.job import Job
from src.response.describe import describe
from src.response.encode import read_parameters
from src.settings import Settings
from tests.conftest import base64_of, opened
from tests.hub import Hub, Repo, download_into
from tests.small_models import all_placements, controlnet, small, weights_of
from tests.test_family import PICTURE, SMALL
from tests.test_together import CPU


def ask(held: Engine, **fields: Any) -> dict[str, Any]:
    event = {"input": {"prompt": "a red circle", "seed": 1, **SMALL, **fields}}
    return respond(event, Job(), Settings, lambda: held)


def drawn(held: Engine, **fields: Any) -> list[bytes]:
    response = ask(held, **fields)
    assert response["status"] == "success", response
    return [picture.tobytes() for picture in opened(response)]


def test_a_model_of_fewer_blocks_takes_the_controlnets_of_the_whole_one(hub: Hub, tmp_path: Path) -> None:
    """As FLUX.1-lite-8B and Flex.1: the network has more double blocks than the model."""
    folder = small("dev", tmp_path / "lite", num_layers=1, num_single_layers=3)
    net = next(net for net in CONTROLNETS if net.name == "Union-Pro")
    hub.repos[net.repo] = Repo(controlnet(tmp_path / "net", 7, num_layers=2))
    plain, thrifty = (load_engine(Settings(model_name=str(folder)), download_into(tmp_path / "home")) for _ in range(2))
    least = min(all_placements(weights_of(folder)), key=lambda found: found.resident)
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, CPU)
    assert plain.model.family == "dev"
    control = {"control_image": base64_of(PICTURE), "control_type": "canny"}
    for fields in ({}, control, {"init_image": base64_of(PICTURE), "strength": 1.0}):
        assert drawn(thrifty, **fields) == drawn(plain, **fields) == drawn(plain, **fields)
    assert drawn(plain, **control) != drawn(plain)


@pytest.fixture(scope="module")
def de_distilled(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("tune")
    return load_engine(Settings(model_name=str(small("de-distilled", folder))))


def test_a_model_without_guidance_is_steered_from_outside_unless_a_request_says_otherwise(de_distilled: Engine) -> None:
    response = ask(de_distilled)
    sampling = response["metadata"]
    assert (sampling["true_cfg_scale"], sampling["negative_prompt"]) == (3.5, "")
    by_itself = drawn(de_distilled)
    assert by_itself == drawn(de_distilled, true_cfg_scale=3.5, negative_prompt="")
    assert by_itself != drawn(de_distilled, true_cfg_scale=1)
    assert by_itself != drawn(de_distilled, negative_prompt="a blue square")
    (warning,) = ask(de_distilled, guidance_scale=3)["metadata"]["warnings"]
    assert warning.endswith("it was trained without guidance; true_cfg_scale has one")


def test_its_file_says_how_it_was_steered(de_distilled: Engine) -> None:

    for fields in ({}, {"true_cfg_scale": 1}):
        response = ask(de_distilled, **fields)
        (picture,) = opened(response)
        event = read_parameters(picture)
        assert event is not None
        (again,) = opened(respond(event, Job(), Settings, lambda: de_distilled))
        assert again.tobytes() == picture.tobytes()


def test_describe_says_the_default(de_distilled: Engine) -> None:
    described = describe(de_distilled.model, None, Settings(), de_distilled.loaded())["describe"]
    assert (described["defaults"]["true_cfg_scale"], described["defaults"]["guidance_scale"]) == (3.5, None)
    assert {mode for mode, row in described["modes"].items() if "true_cfg_scale" not in row["takes"]} == set()


@pytest.mark.parametrize(("family", "channels", "given"), [("dev", 196, 64), ("schnell", 128, 64), ("fill", 64, 384)])
def test_a_transformer_of_other_channels_is_refused_before_its_weights_are_read(
    family: str, channels: int, given: int, tmp_path: Path
) -> None:
    folder = small(family, tmp_path / "tune", in_channels=channels, num_layers=1, num_single_layers=1)
    with pytest.raises(ModelUnavailable, match=rf"its transformer reads {channels} channels and \w+ gives it {given}"):
        load_engine(Settings(model_name=str(folder)))


def test_a_pipeline_that_is_none_of_these_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = small("dev", tmp_path / "tune", num_layers=1, num_single_layers=1)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("Flex2Pipeline", "ChromaRadiancePipeline"):
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        with pytest.raises(ModelUnavailable, match=f"is a {name}; this worker runs "):
            load_engine(Settings(model_name=str(folder)))

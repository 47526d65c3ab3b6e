"""Under which licence weights are: from the row, the card or the file, and told at the start and by describe."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from src.catalog import MODELS, Model, get_model, settle_model
from src.engine import load_engines
from src.response.describe import describe
from src.settings import Settings
from src.weights.files import Files
from src.weights.licences import UNKNOWN, is_non_commercial, licence_of
from tests.hub import Hub, Repo, download_into
from tests.small_models import small

TUNE = settle_model("someone/tune", class_name="FluxPipeline", guided=True)
LINK = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
CARDS = {
    "---\nlicense: apache-2.0\n---\n# A model\n": "apache-2.0",
    "---\r\nlicense: mit\r\n---\r\n": "mit",
    "\ufeff---\nlicense: mit\n---\n": "mit",
    f"---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: {LINK}\n---\n": f"flux-1-dev ({LINK})",
    f"---\nlicense: other\nlicense_link: {LINK}\n---\n": f"other ({LINK})",
    "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\n---\n": "own",
    "---\nlicense: [apache-2.0, mit]\n---\n": "apache-2.0, mit",
    "---\nlicense: 'two\n\n  lines \x1b[31m'\n---\n": UNKNOWN,  # a control character is no YAML
    f"---\nlicense: {'x' * 999}\n---\n": "x" * 200,
    "---\nlicense: unknown\n---\n": UNKNOWN,
    "---\nlicense:\n---\n": UNKNOWN,
    "---\nlicense: {a: 1}\n---\n": UNKNOWN,
    "---\nlicense: 7\n---\n": UNKNOWN,
    "---\nlicense: [\n---\n": UNKNOWN,
    "---\n- a\n- list\n---\n": UNKNOWN,
    "---\nlicense: mit": UNKNOWN,
    "# A model under the MIT licence": UNKNOWN,
    "": UNKNOWN,
    f"---\n{'[' * 5000}\n---\n": UNKNOWN,
    "---\nlicense: !!python/object/apply:os.system ['true']\n---\n": UNKNOWN,
    "<!doctype html><title>404</title>": UNKNOWN,
}


@pytest.mark.parametrize(("card", "said"), CARDS.items(), ids=range(len(CARDS)))
def test_a_card_says_what_it_says_and_never_fails(card: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, newline="")
    assert licence_of(TUNE, tmp_path) == said


def test_a_fine_tune_has_not_the_licence_of_its_base(tmp_path: Path) -> None:
    assert licence_of(TUNE, None) == licence_of(TUNE, tmp_path) == UNKNOWN
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\n" * 9)
    assert licence_of(TUNE, tmp_path) == UNKNOWN
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert licence_of(TUNE, tmp_path) == UNKNOWN


def test_a_row_is_believed_and_a_copy_what_is_said_with_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    for model in MODELS:
        assert licence_of(model, tmp_path) == model.licence
    copy = get_model("mirror/FLUX.1-dev")
    assert licence_of(copy, None) == get_model("FLUX.1-dev").licence
    assert licence_of(copy, tmp_path) == "mit"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"modelspec.license": "CreativeML Open RAIL++-M"}, "CreativeML Open RAIL++-M"),
        ({"general.license": "other", "general.license.name": "flux-1-dev"}, "flux-1-dev"),
        ({"general.license": "apache-2.0"}, "apache-2.0"),
        ({"modelspec.license": ""}, "mit"),
        ({"modelspec.license": 3}, "mit"),
        ({}, "mit"),
    ],
)
def test_a_files_own_words_come_before_its_card(metadata: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(TUNE, tmp_path, metadata) == said


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_which_licences_bound_commercial_use(model: Model) -> None:
    free, silent = {"Apache-2.0", "MIT"}, {"FLUX Kommunity License"}  # whose name says nothing of it
    assert is_non_commercial(model.licence) == (model.licence not in free | silent)


def test_licences_by_the_hubs_names() -> None:
    assert all(map(is_non_commercial, ("cc-by-nc-4.0", "flux-1-dev-non-commercial-license", "CC BY-NC-SA 4.0")))
    assert not any(map(is_non_commercial, ("apache-2.0", "mit", "openrail++", "llama3.1", "since-1.0", UNKNOWN)))


def test_the_start_and_describe_tell_what_the_card_on_the_hub_says(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = small("schnell", tmp_path / "tune", num_layers=1, num_single_layers=1)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    hub.repos["someone/tune"] = Repo(folder)
    settings = Settings(model_name="someone/tune")
    with caplog.at_level(logging.INFO, "worker"):
        engines = load_engines(settings, download_into(tmp_path / "home"))
    (line,) = [record for record in caplog.records if "licence" in record.getMessage()]
    assert "someone/tune" in line.getMessage()
    assert line.getMessage().endswith("cc-by-nc-4.0, which bounds what the worker and its pictures may be used for")
    assert line.facts["licence"] == "cc-by-nc-4.0"  # type: ignore[attr-defined]
    described = describe(engines.model, engines.revision, settings, engines.loaded())["describe"]
    assert described["licence"] == "cc-by-nc-4.0"


def test_files_that_came_without_a_card_are_whole(hub: Hub, tmp_path: Path) -> None:
    """A volume that an older worker filled, on a machine that cannot ask the hub."""
    folder = small("schnell", tmp_path / "tune", num_layers=1, num_single_layers=1)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.repos["someone/older"] = Repo(folder)
    home = download_into(tmp_path / "home")

    def without_card(**wanted: Any) -> str:
        wanted["allow_patterns"] = [pattern for pattern in wanted["allow_patterns"] if pattern != "README.md"]
        return home(**wanted)

    Files(Settings(), without_card).find("someone/older", "someone/older")
    hub.down = True
    try:
        source = Files(Settings(), home).find("someone/older", "someone/older")
    except errors.LocalEntryNotFoundError:
        pytest.fail("its weights are here")
    finally:
        hub.down = False
    assert licence_of(replace(TUNE, name="someone/older"), source.folder) == UNKNOWN


def test_a_card_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    asked = threading.Thread(target=licence_of, args=(TUNE, tmp_path), daemon=True)
    asked.start()
    asked.join(10)
    assert not asked.is_alive()

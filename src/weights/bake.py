"""`python -m src.weights.bake true`: the model's files into the image while it is built.

They are the very ones that a worker looks for, and src/weights/files.py finds them there. HF_TOKEN opens gated repos.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download

from src.catalog import repo_of
from src.errors import WorkerError
from src.redaction import redact
from src.settings import Settings
from src.weights.files import BAKED, Files

_SPELLINGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def main(bake_model: str, folder: Path = BAKED) -> str | None:
    """Download MODEL_NAME into `folder` where `bake_model` says so; a sentence where that cannot be."""
    folder.mkdir(exist_ok=True)
    wanted = _SPELLINGS.get(bake_model.strip().lower())
    if wanted is None:
        return f"BAKE_MODEL={bake_model}: must be one of {', '.join(_SPELLINGS)}"
    if not wanted:
        return None
    try:
        settings = Settings.from_environment()
    except WorkerError as error:
        return redact(str(error))
    name = settings.model_name
    files = Files(settings, partial(snapshot_download, cache_dir=folder), folder)
    try:
        source = files.find(name, repo_of(name), settings.model_revision)
    except Exception as error:  # noqa: BLE001 - whatever it is, the build ends with it
        why = files.explain(error, "--secret id=HF_TOKEN,env=HF_TOKEN hands a build the token")
        return redact(f"MODEL_NAME={name}: {why}")
    print(f"{name} is in the image: {source.revision or source.folder}")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

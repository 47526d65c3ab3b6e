"""`python -m src.weights.bake true`: the model's files into the image while it is built.

They are the very ones that a worker looks for, and src/weights/files.py finds them there. HF_TOKEN opens gated repos.
They are downloaded into a cache of the builder's: the next build downloads only what has changed on the hub.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download

from src.errors import WorkerError
from src.redaction import redact
from src.settings import Settings
from src.weights.files import BAKED, Source
from src.weights.model_files import FROM_THE_WEB, ModelFiles, Repo

DOWNLOADS = Path("/var/cache/huggingface")  # a mount of the Dockerfile's
_SPELLINGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def main(bake_model: str, folder: Path = BAKED, downloads: Path = DOWNLOADS) -> str | None:
    """MODEL_NAME's files, and PROMPT_UPSAMPLER's, into `folder`, by way of `downloads`, where `bake_model` says so.

    A sentence where that cannot be.
    """

    def download(*, local_files_only: bool = False, **wanted: Any) -> str:
        if local_files_only:  # an earlier build's may be an older commit
            raise errors.LocalEntryNotFoundError("the hub is asked")
        return str(snapshot_download(cache_dir=downloads, **wanted))

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
    models = ModelFiles(settings, download, folder, downloads)
    upsampler = settings.prompt_upsampler
    wanted_files: list[tuple[str, str, Callable[[], Source]]] = [("MODEL_NAME", settings.model_name, models.find)]
    if upsampler:
        wanted_files.append(("PROMPT_UPSAMPLER", upsampler, Repo(models.files, upsampler, upsampler, part=True).find))
    for variable, name, find in wanted_files:
        try:
            source = find()
            found = [source.folder, *([source.single_file.path.parent] if source.single_file else [])]
            for baked in {_kept_together(each) for each in found if each.is_relative_to(downloads)}:
                if baked.parent.name == FROM_THE_WEB:
                    shutil.copytree(baked, folder / baked.relative_to(downloads))
                else:
                    _copy(baked, folder)
        except Exception as error:  # noqa: BLE001 - whatever it is, the build ends with it
            why = models.files.explain(error, "--secret id=HF_TOKEN,env=HF_TOKEN hands a build the token")
            return redact(f"{variable}={name}: {why}")
        print(redact(f"{name} is in the image: {source.revision or source.folder}"))
    return None


def _kept_together(folder: Path) -> Path:
    """The snapshot of a repo that `folder` is or lies in, or what came from one address."""
    return next(path for path in (folder, *folder.parents) if path.parent.name in ("snapshots", FROM_THE_WEB))


def _copy(snapshot: Path, cache: Path) -> None:
    """One snapshot of a cache of the hub's into another, which has its files, no older ones, and the refs to it."""
    repo = snapshot.parent.parent
    copied = cache / repo.name
    shutil.copytree(snapshot, copied / "snapshots" / snapshot.name, symlinks=True, dirs_exist_ok=True)
    others = {file.resolve() for file in snapshot.rglob("*") if file.is_symlink()}
    others |= {ref for ref in (repo / "refs").rglob("*") if ref.is_file() and ref.read_text() == snapshot.name}
    others |= {*(repo / "trees").glob(f"{snapshot.name}.json")}  # the list by which it is known to be whole
    for file in others:
        target = copied / file.relative_to(repo)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

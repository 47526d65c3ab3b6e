"""What this user may write, and where there is room for it."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("worker")


def keep(file: Path, setting: str, write: Callable[[Path], object]) -> None:
    """Let `write` make `file` for the next worker, whole or not at all, in the folder that `setting` names.

    Where that cannot be, a warning says why and what to do; where there is no such volume, a line.
    """
    folder, unfinished = file.parent, file.with_suffix(f".{os.getpid()}")
    if not folder.parent.is_dir():
        log.info("%s is not kept: there is no %s; attach a volume, or set %s", file.name, folder.parent, setting)
        return
    try:
        folder.mkdir(exist_ok=True)  # on a volume that is there, that is: not its parents
        write(unfinished)
        unfinished.rename(file)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk in a RuntimeError
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        why = f"{folder} {unwritable}" if (unwritable := why_not_writable(folder)) else str(error)
        log.warning(
            "%s is not kept, and the next worker makes it anew: %s, or set %s to another folder",
            *(file.name, why, setting),
        )


def why_not_writable(folder: Path) -> str | None:
    """Why this user cannot make files in `folder`, which may not be there yet, and what to do; None where it can.

    The words follow the folder's name.
    """
    there = _first_that_exists(folder)
    if os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return None
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return f"cannot be written by {user()}, its file system being read-only: mount a volume or a tmpfs there"
    give = f"chown -R {os.geteuid()}" if there == folder.resolve() else f"install -d -o {os.geteuid()}"
    owner = there.stat().st_uid
    return f"cannot be written by {user()}, since {there} belongs to user {owner}: run `{give} {folder}` as root"


def free_bytes(folder: Path) -> int:
    """What this user may still write below `folder`, which may not be there yet; a quota is not counted."""
    return shutil.disk_usage(_first_that_exists(folder)).free


def user() -> str:
    """Who this process is, by number and where there is one by name."""
    with suppress(KeyError):
        return f"user {os.geteuid()} ({pwd.getpwuid(os.geteuid()).pw_name})"
    return f"user {os.geteuid()}"


def _first_that_exists(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())

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


def keep(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make `file` for the next worker, whole or not at all; a folder that cannot be made keeps nothing."""
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(exist_ok=True)  # on a volume that is there, that is: not its parents
        write(unfinished)
        unfinished.rename(file)
    except FileNotFoundError as error:
        log.info("%s is not kept, since there is no such volume: %s", file, error)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk in a RuntimeError
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        log.warning("%s is not kept for the next worker: %s", file, _why(error, file.parent))


def why_not_writable(folder: Path) -> str | None:
    """Why this user cannot make files in `folder`, which may not be there yet, and what to do; None where it can.

    The words follow the folder's name.
    """
    there = _first_that_exists(folder)
    if os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return None
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return f"cannot be written by {user()}, its file system being read-only: mount a volume or a tmpfs there"
    return (
        f"cannot be written by {user()}, since {there} belongs to user {there.stat().st_uid}: run "
        f"`chown -R {os.geteuid()} {there}` as root"
    )


def free_bytes(folder: Path) -> int:
    """What this user may still write below `folder`, which may not be there yet; a quota is not counted."""
    return shutil.disk_usage(_first_that_exists(folder)).free


def user() -> str:
    """Who this process is, by number and where there is one by name."""
    with suppress(KeyError):
        return f"user {os.geteuid()} ({pwd.getpwuid(os.geteuid()).pw_name})"
    return f"user {os.geteuid()}"


def _why(error: Exception, folder: Path) -> str:
    unwritable = why_not_writable(folder)
    return f"{folder} {unwritable}" if unwritable else str(error)


def _first_that_exists(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())

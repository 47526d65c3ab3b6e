"""Packages that src imports at the top of a file and no picture needs: a machine for measuring may lack them.

What src does need: torch, transformers, diffusers, what they bring, and pydantic. Without psutil no placement can be
chosen, and the ways of this worker are rows that say so.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

NEEDLESS = ("accelerate", "backports", "brotli", "dotenv", "gguf", "httpx2", "peft", "psutil")


class _Absent(type):
    """Stands for all that a package has: it can be named, in an `except` too; calling it says what is missing."""

    def __getattr__(cls, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(cls.__name__)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {cls.__name__!r}", name=cls.__name__)


def absent(package: str) -> _Absent:
    """What stands for `package` where it is not installed."""
    return _Absent(package, (Exception,), {})


@contextmanager
def without_needless_packages(*packages: str) -> Iterator[None]:
    """Within it what src imports of `packages` need not be installed; everybody else is told the truth.

    NEEDLESS are those by default.
    """
    own, needless = builtins.__import__, packages or NEEDLESS

    def load(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        package = name.partition(".")[0]
        by_src = str((globals or {}).get("__name__")).partition(".")[0] == "src"
        if level or not by_src:
            return own(name, globals, locals, fromlist or (), level)
        try:
            found = own(name, globals, locals, fromlist or (), level)
        except ModuleNotFoundError as error:  # of the package itself, or of one that it wants, as diffusers wants gguf
            missing = str(error.name).partition(".")[0]
            if missing not in needless:
                raise
            return absent(missing)
        whole = package not in needless or all(hasattr(found, each) for each in fromlist or ())
        return found if whole else absent(package)

    builtins.__import__ = load
    try:
        yield
    finally:
        builtins.__import__ = own

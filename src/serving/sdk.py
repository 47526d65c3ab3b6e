"""What this worker touches of runpod's insides, each looked for before it is used: a newer SDK may have moved it.

`python -m src.serving.sdk` prints what the installed one has moved, a line each, and nothing where all is there.
"""

from __future__ import annotations

import importlib
import signal
from typing import Any, NamedTuple

import runpod

_MODULES = "runpod.serverless.modules"


class Call(NamedTuple):
    """A call of the SDK's JobScaler that src/serving/control_plane.py replaces, and what is lost where it cannot."""

    attribute: str
    function: str  # of rp_job, the SDK's own
    lost: str


CALLS = (
    Call("jobs_fetcher", "get_job", "jobs are taken by number alone, and one odd job may hide others"),
    Call("jobs_handler", "handle_job", "results are lost when RunPod cannot be reached or refuses them"),
    Call("stop_signals_fetcher", "get_stop_signals", "a job that is cancelled before it begins is run all the same"),
)
# What else is used, by module and name.
_PARTS = (
    (f"{_MODULES}.rp_scale", "JobScaler"),
    (f"{_MODULES}.rp_http", "JOB_DONE_URL"),
    ("runpod.http_client", "AsyncClientSession"),
)


def find(module: str, name: str) -> Any:
    """What `module` holds under `name`; None where there is no such module or name."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def call(function: str) -> Any:
    """A function of the SDK's rp_job."""
    return find(f"{_MODULES}.rp_job", function)


def done_url(id: str) -> str:
    """Where the result of a job is posted to; `id` as it is to stand there."""
    return str(find(f"{_MODULES}.rp_http", "JOB_DONE_URL")).replace("$ID", id)


def client_session() -> Any:
    """An aiohttp session that bears the worker's key."""
    return find("runpod.http_client", "AsyncClientSession")()


def running_scaler() -> Any:
    """The JobScaler whose loop is running: the SDK shows it nowhere but as what answers SIGTERM. None without one."""
    scaler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    kind = find(*_PARTS[0])
    return scaler if kind is not None and isinstance(scaler, kind) else None


def moved(scaler: Any) -> list[str]:
    """What is not where runpod 1.12 has it, a sentence each, with what is lost thereby."""
    wrong = [f"{module} has no {name}" for module, name in _PARTS if find(module, name) is None]
    if scaler is None:
        wrong.append("no JobScaler answers SIGTERM")
    for attribute, function, lost in CALLS:
        own = call(function)
        if own is None or getattr(scaler, attribute, None) is not own:
            wrong.append(f"JobScaler.{attribute} is not the SDK's own {function}: {lost}")
    return wrong


def main() -> None:
    """Print what the installed SDK has moved."""
    kind = find(*_PARTS[0])
    for line in moved(None if kind is None else kind({"handler": None})):
        print(f"runpod {runpod.__version__}: {line}")


if __name__ == "__main__":
    main()

"""The stages of a start: a line each with its seconds, which one is under way, and the whole at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

log = logging.getLogger("worker")

# In the order in which a worker goes through them.
STAGES: Mapping[str, str] = MappingProxyType(
    {
        "settings": "code imported and settings read",
        "read-ahead": "weights read ahead into memory",
        "checks": "token, hub, disk and driver checked",
        "bucket": "bucket tried",
        "files": "files of the model found",
        "torch": "torch and diffusers imported",
        "device": "device tried",
        "inspect": "files of the model inspected",
        "placement": "placement of the weights chosen",
        "read": "weights read",
        "load": "weights brought to where they live",
        "controlnets": "ControlNets loaded",
        "cards": "model loaded on the other cards",
        "warm-up": "warmed up",
    }
)


class Start:
    """A process's way from its first line until it takes jobs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # of each stage that is done
        self._begun = time.perf_counter()
        self._current: str | None = None
        self._ready = False

    @contextmanager
    def stage(self, name: str, since: float | None = None) -> Iterator[dict[str, Any]]:
        """Do a row of STAGES, and say so the first time; what is put into the dict is said with it.

        Of bytes it is said how many that is a second.
        `since` is when it began, by time.perf_counter(), and the whole start with it.
        """
        begun = time.perf_counter() if since is None else since
        if since is not None:
            self._begun = since
        self._current = name
        facts: dict[str, Any] = {}
        yield facts
        self.say(name, time.perf_counter() - begun, **facts)

    def say(self, name: str, seconds: float, **facts: Any) -> None:
        """A row of STAGES is done and took `seconds`, as `stage` says it; also of what other threads did meanwhile."""
        if name in self.seconds or self._ready:  # another model in the same process
            return
        moved = {f"{fact}_per_second": value for fact, value in facts.items() if fact.endswith("bytes") and value}
        facts |= {fact: round(value / max(seconds, 0.001)) for fact, value in moved.items()}
        self.seconds[name] = round(seconds, 2)
        words = "".join(f", {fact.replace('_', ' ')} {_shown(value)}" for fact, value in facts.items() if value)
        line = {"stage": name, "seconds": self.seconds[name], **facts}
        log.info("start: %s in %.2f s%s", STAGES[name], self.seconds[name], words, extra={"facts": line})

    def ready(self) -> None:
        """All stages are done: say what the whole took."""
        self._ready = True
        whole = round(time.perf_counter() - self._begun, 2)
        stages = dict(self.seconds)
        words = ", ".join(f"{name} {seconds}" for name, seconds in stages.items())
        facts = {"stage": "ready", "seconds": whole, "stages": stages}
        log.info("start: ready for jobs after %.2f s: %s", whole, words, extra={"facts": facts})

    def under_way(self) -> str:
        """Where the start is, for the middle of a sentence; nothing once it is ready."""
        if self._ready:
            return ""
        return f" {time.perf_counter() - self._begun:.1f} s into the start, in its stage {self._current or 'settings'}"


START = Start()  # of this process


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)

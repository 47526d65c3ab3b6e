"""handler.py under an SDK whose JobScaler has renamed something: `python -m tests.moved_sdk ATTRIBUTE`."""

from __future__ import annotations

import sys
from typing import Any

from runpod.serverless.modules import rp_scale

import handler

if __name__ == "__main__":
    attribute = sys.argv.pop()
    init = rp_scale.JobScaler.__init__

    class Renamed(rp_scale.JobScaler):  # type: ignore[misc]
        """Has `attribute` under another name, and asks for it there."""

        def __init__(self, config: dict[str, Any]) -> None:
            init(self, config)
            self.renamed = self.__dict__.pop(attribute)

        def __getattr__(self, name: str) -> Any:
            if name == attribute and sys._getframe(1).f_globals["__name__"] == rp_scale.__name__:
                return self.renamed
            raise AttributeError(name)

    rp_scale.JobScaler = Renamed
    handler.main()

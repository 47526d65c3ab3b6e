"""`python -m fuzz [TARGET ...] --minutes 30`: each target for as long, one after the other; 1 where one was broken.

What breaks one lies in fuzz/crashes with its traceback, one input for each kind. What ends the process, or takes it
longer than a minute, is kept too, and a new process goes on from there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from fuzz import CRASHES
from fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[*TARGETS], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=30, help="for each target")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    for name in arguments.targets:
        ends = time.monotonic() + 60 * arguments.minutes
        while (left := ends - time.monotonic()) > 1:
            known = broken(name)
            print(f"{name}: {left / 60:.1f} minutes", flush=True)
            status = subprocess.run([sys.executable, "-m", "fuzz.run", name, f"{left:.0f}"], check=False).returncode
            if status and broken(name) == known:
                return status  # no input ended it: it cannot run
    found = [file for name in arguments.targets for file in broken(name)]
    print("\n".join(map(str, found)))
    return bool(found)


def broken(name: str) -> list[Path]:
    return sorted(file for file in (CRASHES / name).glob("*") if file.suffix != ".txt")


if __name__ == "__main__":
    sys.exit(main())

"""Coverage-guided fuzzing of all that reads foreign bytes; `make fuzz MINUTES=30 TARGETS="pictures adapters"`."""

from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"  # what it starts from, and what tests replay: a folder a target
FOUND = HERE / "found"  # what it found to lead somewhere new
CRASHES = HERE / "crashes"

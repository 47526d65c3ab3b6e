"""`python -m benchmarks.accuracy`: does the shipped model draw what it is asked for?

Every colour x shape x background (280 prompts, one seed each) goes through handler(); the judge of
training/judge.py, which tests hold to drawn scenes, looks at what came back. Writes results/accuracy.json
and a grid of samples, results/samples.png.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from training import judge
from training.scenes import every_prompt

RESULTS = Path(__file__).parent / "results"
SAMPLES = (
    "a red circle on a blue background",
    "a large white star on a black background",
    "a purple diamond on a yellow background",
    "a green triangle on an orange background",
    "a small red circle above a large blue square on a yellow background",
    "orange square left of a blue triangle, black background",
    "a tiny yellow star in the top right corner on a purple background",
    "two words: emerald pyramid, snowy backdrop",
    "A VIOLET BALL UNDER A GOLDEN RHOMBUS ON WHITE",
    "draw a large black diamond in the bottom left corner on green",
    "crimson star next to an azure star on a black background",
    "on an orange background, a big white box",
)
_COLUMNS = 4
_CAPTION = 30


def main() -> None:
    os.environ["MODEL_NAME"] = "flux-shapes"
    accuracy, misses = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "accuracy.json").write_text(json.dumps({**accuracy, "misses": misses}, indent=2) + "\n")
    grid().save(RESULTS / "samples.png", optimize=True)
    print(json.dumps(accuracy, indent=2))


def measure() -> tuple[dict[str, float], list[dict[str, str | None]]]:
    """The shares of right answers, and what was wrong."""
    right, misses, count = Counter[str](), [], 0
    for seed, (prompt, scene) in enumerate(every_prompt()):
        picture = generate(prompt, seed=seed)
        wanted = {"centre": scene.things[0].colour, "background": scene.background, "shape": scene.things[0].shape}
        seen = {
            "centre": judge.centre_colour(picture),
            "background": judge.background_colour(picture),
            "shape": judge.shape(picture),
        }
        right.update(name for name in wanted if wanted[name] == seen[name])
        count += 1
        if seen != wanted:
            misses.append({"prompt": prompt, **seen})
    shares = {name: round(right[name] / count, 4) for name in ("centre", "background", "shape")}
    return {"prompts": count, **shares}, misses


def grid() -> Image.Image:
    """SAMPLES with their prompts beneath, seed 1."""
    pictures = [generate(prompt, seed=1) for prompt in SAMPLES]
    side = pictures[0].width
    cell = side + 60
    sheet = Image.new("RGB", (_COLUMNS * cell, -(-len(pictures) // _COLUMNS) * (side + _CAPTION + 12)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(SAMPLES, pictures, strict=True)):
        x, y = i % _COLUMNS * cell, i // _COLUMNS * (side + _CAPTION + 12)
        sheet.paste(picture, (x + 30, y + 6))
        pen.multiline_text((x + cell // 2, y + side + 9), _wrap(prompt), fill="black", anchor="ma", align="center")
    return sheet


def generate(prompt: str, **fields: Any) -> Image.Image:
    from handler import handler

    response = handler({"input": {"prompt": prompt, **fields}})
    if response["status"] != "success":
        raise RuntimeError(response["error"])
    return Image.open(io.BytesIO(base64.b64decode(response["images"][0])))


def _wrap(prompt: str, width: int = 32) -> str:
    lines = [""]
    for word in prompt.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    main()

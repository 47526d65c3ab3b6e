"""`python -m benchmarks.accuracy`: does the shipped model draw what it is asked for?

Every colour x shape x background (280 prompts, one seed each), 600 sentences of newcomers and 100 pairs go through
handler(); the judge of training/judge.py, which tests hold to drawn scenes, looks at what came back. So do 70 with the
shipped LoRA and 50 with the shipped ControlNet. Writes results/accuracy.json and grids of samples: samples.png,
wordings.png, outline.png, edges.png.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from benchmarks.wordings import FORMS, newcomers
from src.plan.preprocessors import canny_edges
from training import judge
from training.report import captioned, sample_grid
from training.scenes import COLOURS, Scene, draw, every_prompt, some_anywhere, some_pairs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUTLINE = {"path": "flux-shapes-outline/pytorch_lora_weights.safetensors", "scale": 1.0}


def main() -> None:
    os.environ.update(MODEL_NAME="flux-shapes", LORA_DIR=str(ROOT / "models"))
    accuracy, misses = measure()
    wordings, unheard = measure(newcomers())
    figures = {
        **accuracy,
        "wordings": wordings,
        "pairs": measure_pairs(),
        "outline": measure_outline(),
        "edges": measure_edges(),
    }
    (RESULTS / "accuracy.json").write_text(json.dumps({**figures, "misses": [*misses, *unheard]}, indent=2) + "\n")
    sample_grid(generate).save(RESULTS / "samples.png", optimize=True)
    wordings_grid().save(RESULTS / "wordings.png", optimize=True)
    sample_grid(partial(generate, loras=[OUTLINE])).save(RESULTS / "outline.png", optimize=True)
    edge_grid().save(RESULTS / "edges.png", optimize=True)
    print(json.dumps(figures, indent=2))


def measure(
    prompts: Iterable[tuple[str, Scene]] | None = None,
) -> tuple[dict[str, float], list[dict[str, str | None]]]:
    """The shares of right answers on prompts of one shape, or on every one in plain words, and what was wrong."""
    right, misses, count = Counter[str](), [], 0
    for seed, (prompt, scene) in enumerate(every_prompt() if prompts is None else prompts):
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


def measure_pairs(count: int = 100) -> dict[str, float]:
    """The shares of right answers on pictures of two things; colours and shapes count for each thing."""
    right = Counter[str]()
    for seed, (prompt, scene) in enumerate(some_pairs(count)):
        picture = generate(prompt, seed=seed)
        right["background"] += judge.background_colour(picture) == scene.background
        seen = [(judge.centre_colour(half), judge.shape(half)) for half in judge.halves(picture, scene.layout)]
        wanted = [(thing.colour, thing.shape) for thing in scene.things]
        right["all"] += seen == wanted
        for one, other in zip(seen, wanted, strict=True):
            right["colour"] += one[0] == other[0]
            right["shape"] += one[1] == other[1]
    return {
        "prompts": count,
        "background": right["background"] / count,
        "colour": right["colour"] / (2 * count),
        "shape": right["shape"] / (2 * count),
        "both_right": right["all"] / count,
    }


def measure_outline() -> dict[str, float]:
    """The share of large shapes that are hollow, with the adapter and without: the background's colour in the middle,
    and the shape's on at least 3 of 100 pixels."""
    prompts = list(every_prompt())[::4]
    hollow = Counter[float]()
    for scale in (0.0, 1.0):
        for seed, (prompt, scene) in enumerate(prompts):
            thing = scene.things[0]
            picture = generate(f"large {prompt.partition(' ')[2]}", seed=seed, loras=[{**OUTLINE, "scale": scale}])
            ink = judge.name_colours(picture) == list(COLOURS).index(thing.colour)
            hollow[scale] += judge.centre_colour(picture) == scene.background and bool(ink.mean() > 0.03)
    return {
        "prompts": len(prompts),
        "hollow_at_1": round(hollow[1.0] / len(prompts), 4),
        "hollow_at_0": round(hollow[0.0] / len(prompts), 4),
    }


def measure_edges(count: int = 50) -> dict[str, float]:
    """How much of a shape and of what its edges enclose is common to both (IoU, mean), with the ControlNet and
    without."""
    overlaps: dict[float, list[float]] = {0.0: [], 1.0: []}
    for seed, (prompt, scene) in enumerate(some_anywhere(count)):
        drawn = draw(scene, 128, 128)
        for scale, found in overlaps.items():
            picture = generate(prompt, seed=seed, **_edges(drawn), controlnet_conditioning_scale=scale)
            inside, shape = (
                judge.name_colours(one) != list(COLOURS).index(scene.background) for one in (drawn, picture)
            )
            found.append(float((inside & shape).sum() / (inside | shape).sum()))
    return {
        "prompts": count,
        "iou_at_1": round(mean(overlaps[1.0]), 4),
        "iou_at_0": round(mean(overlaps[0.0]), 4),
        "at_least_0.7": sum(iou >= 0.7 for iou in overlaps[1.0]) / count,
    }


def wordings_grid(count: int = 12) -> Image.Image:
    """One prompt of every fifth form, with what came of it."""
    some = list(newcomers(each=1))[:: len(FORMS) // count][:count]
    return captioned([(generate(prompt, seed=1), prompt) for prompt, _ in some], columns=4)


def edge_grid(count: int = 8) -> Image.Image:
    """Edges above, and beneath what was drawn from them."""
    sheet = Image.new("RGB", (count * 138, 2 * 138), "white")
    for i, (prompt, scene) in enumerate(some_anywhere(count)):
        drawn = draw(scene, 128, 128)
        sheet.paste(canny_edges(drawn), (i * 138 + 5, 5))
        sheet.paste(generate(prompt, seed=i, **_edges(drawn)), (i * 138 + 5, 143))
    return sheet


def _edges(drawn: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return {"control_image": base64.b64encode(file.getvalue()).decode(), "preprocess": True}


def generate(prompt: str, **fields: Any) -> Image.Image:
    from handler import handler

    response = handler({"input": {"prompt": prompt, **fields}})
    if response["status"] != "success":
        raise RuntimeError(response["error"])
    return Image.open(io.BytesIO(base64.b64decode(response["images"][0])))


if __name__ == "__main__":
    main()

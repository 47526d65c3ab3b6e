"""`make docs`: what README, docs/ and .runpod/ repeat of the code and of measured results; tests hold them to it.

A page is written by hand but for what stands between its marks, <!-- name --> and <!-- end -->. BLOCKS says which page
has which marks, and what makes the text between them.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields as fields_of
from functools import partial
from typing import Any

from pydantic import BaseModel

from benchmarks.readme import TABLES, figures, table
from deploy import hub
from deploy.cards import CARDS, Card
from deploy.endpoint import OTHER_VARIABLES
from deploy.plan import disk_gb, estimate, init_seconds, nearest, two_digits
from scripts.examples import EXAMPLES, SHIPPED, pictures_of
from src.catalog import (
    CONTROLNETS,
    EVERY_MODE_TAKES,
    FAMILIES,
    FORMATS,
    MODELS,
    PROFILES,
    SCHEDULERS,
    SPEEDS,
    ControlDefaults,
    Model,
    ModeSpec,
    get_model,
)
from src.request.aliases import ALIASES, INSTEAD, NAMED_SIZES, OTHER_PROGRAMS, WITHOUT_EFFECT
from src.request.schema import CONTROL_OPTIONS, SINGLES, Borders, Control, Lora, Request
from src.settings import ROOT, SET_BY_RUNPOD, Settings
from src.weights.placement import GB, DoesNotFit

# How a table names a family.
FAMILY_NAMES: Mapping[str, str] = {
    "kontext": "Kontext", "fill": "Fill", "control": "Canny, Depth", "flux.2-dev": "FLUX.2-dev", "chroma": "Chroma",
    "flux.3": "FLUX.3", "flux.3-base": "FLUX.3 base",
}  # fmt: skip
_ENTRIES: Mapping[str, type[BaseModel]] = {"loras": Lora, "controls": Control, "outpaint": Borders}
# The models that the table of cards shows; the others fit and cost as one of them does.
ON_CARDS = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev", "FLUX.3-klein")


def rows(heads: Iterable[str], cells: Iterable[Iterable[str]]) -> str:
    """A table."""
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# The API


def modes() -> str:
    """Which pictures ask for which mode, and which models have it."""
    kinds = ("init_image", "mask_image", "control_image")
    cells = [
        (mode, *("x" if kind in row.needs else "" for kind in kinds), _models_with(mode))
        for mode, row in _every_mode().items()
    ]
    return rows(("mode", *(f"`{kind}`" for kind in kinds), "works with"), cells)


def _every_mode() -> dict[str, ModeSpec]:
    return {mode: get_model(example.model).modes[mode] for mode, example in EXAMPLES.items()}


def _models_with(mode: str) -> str:
    having = [family for family, row in FAMILIES.items() if mode in get_model(row.model).modes]
    return ", ".join(FAMILY_NAMES.get(family, family) for family in having)


def examples() -> str:
    """Each mode: what it is for, a request, and what the shipped model draws of it."""
    return "\n\n".join(_example(mode) for mode in EXAMPLES)


def _example(mode: str) -> str:
    example = EXAMPLES[mode]
    sent = pictures_of(example)
    body = {**example.fields, **{name: f"<{file} in base64>" for name, file in sent.items()}}
    lines = [f"### {mode}", "", f"{example.shows} Works with {_models_with(mode)}.", ""]
    lines += ["```json", json.dumps({"input": body}, indent=2), "```", ""]
    if example.model == SHIPPED:
        shown = {**sent, "the answer": f"{mode}.png"}
        lines += [rows(shown, [[f"![{name}](pictures/{file})" for name, file in shown.items()]])]
    else:
        lines += [f"For {example.model}; the shipped model has no such mode, so there is no picture of it here."]
    return "\n".join(lines)


def fields() -> str:
    """Every field of a request: what it may be, its default, and which modes take it."""
    return rows(
        ("field", "what it may be", "default", "taken by"),
        (
            (f"`{name}`", str(field.description), _default(name, field.get_default()), _taken_by(name))
            for name, field in Request.model_fields.items()
        ),
    )


def _default(name: str, value: object) -> str:
    if name in Request.model_fields and Request.model_fields[name].is_required():
        return "required"
    if value in (None, ()):
        column = re.sub("^control(net)?_", "", name)
        for owner, row in (("model", Model), ("mode", ModeSpec), ("ControlNet", ControlDefaults)):
            if column in {one.name for one in fields_of(row)}:
                return f"the {owner}'s"
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _taken_by(name: str) -> str:
    if name in EVERY_MODE_TAKES | {"describe", "dry_run"}:
        return "every mode"
    wanted = SINGLES.get(name, name)
    every = {(_generation(model), mode): row for model in MODELS for mode, row in model.modes.items()}
    taking = [key for key, row in every.items() if wanted in row.takes | row.needs]
    generations = dict.fromkeys(generation for generation, _ in taking)
    if len(taking) > 1 and set(taking) == {key for key in every if key[0] in generations}:
        *most, last = generations
        return f"every mode of {' and '.join([', '.join(most), last] if most else [last])}"
    return ", ".join(dict.fromkeys(mode for _, mode in taking))


def _generation(model: Model) -> str:
    """FLUX.2, say; what ships with the worker is a FLUX.1."""
    return next((name for name in ("FLUX.2", "FLUX.3", "Chroma") if model.architecture.startswith(name)), "FLUX.1")


def entries() -> str:
    """What an entry of a list or an object of a request holds."""
    found = []
    for name, model in _ENTRIES.items():
        properties = model.model_json_schema()["properties"]
        for key, about in properties.items():
            field, same = model.model_fields[key], CONTROL_OPTIONS.get(key, "")
            default = "required" if field.is_required() else _default(same, field.default)
            found.append((f"`{name}`", f"`{key}`", allowed(about), default))
    return rows(("field", "key", "what it may be", "default"), found)


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema lets through, in words."""
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        kinds = [allowed(kind) for kind in schema["anyOf"] if kind.get("type") != "null" and "const" not in kind]
        return " or ".join(dict.fromkeys(kinds))
    least = f"from {_number(schema['minimum'])}" if "minimum" in schema else ""
    least = f"above {_number(schema['exclusiveMinimum'])}" if "exclusiveMinimum" in schema else least
    most = f" to {_number(schema['maximum'])}" if "maximum" in schema else ""
    kind = {"integer": "an integer", "number": "a number", "boolean": "true or false", "array": "a list, by commas"}
    names = {"path": "a folder", "password": "a secret"}
    word = kind.get(schema["type"]) or names.get(schema.get("format", ""), "text")
    return f"{word} {least or ('' if not most else 'at most')}{most}".strip()


def _number(value: float) -> str:
    return f"{value:,g}" if abs(value) < 1_000_000 else f"{value:,.0f}"


def models() -> str:
    """The catalog's models, with their defaults."""
    cells = []
    for model in MODELS:
        name = f"`{model.name}`" + (" (gated)" if model.gated else " (shipped)" if model.name == SHIPPED else "")
        guidance = str(model.guidance_scale) + ("" if FAMILIES[model.family].guided else ", without effect")
        guidance += f"; true_cfg_scale {model.true_cfg_scale}" if model.true_cfg_scale > 1 else ""
        size, steps = f"{model.width}x{model.height}", str(model.num_inference_steps)
        cells.append((name, model.licence, size, steps, guidance, str(model.max_sequence_length)))
    cells.append(("a fine-tune of one of them", "its own", "as its family, read from its configuration", "", "", ""))
    return rows(("model", "licence", "size", "steps", "guidance", "tokens"), cells)


def controlnets() -> str:
    """The catalog's ControlNets, and what each reads by default at which scale."""
    return rows(
        ("ControlNet", "repo", "for", "reads (at the scale)", "licence"),
        (
            (
                f"`{net.name}`",
                f"`{net.repo}`",
                net.architecture,
                ", ".join(f"{kind} ({row.conditioning_scale:g})" for kind, row in net.types.items()),
                net.licence,
            )
            for net in CONTROLNETS
        ),
    )


def schedulers() -> str:
    """The catalog's schedulers."""
    return rows(
        ("scheduler", "class", "starts from a picture", "calls of the model a step"),
        (
            (f"`{name}`", f"`{row.class_name}`", "yes" if row.starts_midway else "no", str(row.order))
            for name, row in SCHEDULERS.items()
        ),
    )


def speeds() -> str:
    """The catalog's speeds."""
    return rows(
        ("speed", "what is computed"),
        (
            (
                f"`{name}`",
                f"the first {row.computed_first} steps, then one in {row.interval}" if row else "every step",
            )
            for name, row in SPEEDS.items()
        ),
    )


def formats() -> str:
    """The catalog's formats."""
    return rows(
        ("output_format", "type", "`output_quality`"),
        ((f"`{name}`", f"`{row.mime}`", "1 to 100" if row.quality else "none: exact") for name, row in FORMATS.items()),
    )


def aliases() -> str:
    """Other services' names, by the field that they become."""
    return rows(
        ("field", "also taken as"),
        (
            (f"`{field}`", _code(name for name, meant in ALIASES.items() if meant == field))
            for field in dict.fromkeys(ALIASES.values())
        ),
    )


def sizes() -> str:
    """Sizes by the names that fal has for them."""
    return ", ".join(f"`{name}` ({width}x{height})" for name, (width, height) in NAMED_SIZES.items()) + "."


def without_effect() -> str:
    """What is taken with a warning, by its reason."""
    return rows(
        ("the warning", "fields"),
        (
            (f"has no effect: {why}", _code(name for name, given in WITHOUT_EFFECT.items() if given == why))
            for why in dict.fromkeys(WITHOUT_EFFECT.values())
        ),
    )


def refused() -> str:
    """What is refused with a word of its own."""
    said = {**INSTEAD, **OTHER_PROGRAMS}
    return rows(
        ("the fault", "fields"),
        ((why, _code(name for name, given in said.items() if given == why)) for why in dict.fromkeys(said.values())),
    )


# Performance


def profiles() -> str:
    """What each PROFILE asks for."""
    return rows(
        ("`PROFILE`", "weights", "attention", "a request without `speed`", "compiled for"),
        (
            (
                f"`{name}`",
                "as they are" if row.quantization == "none" else row.quantization,
                ", else ".join((*(f"`{backend}`" for backend in row.attention), "the card's own")),
                row.speed,
                "any size, and each warm-up size once more" if row.static_shapes else "any size",
            )
            for name, row in PROFILES.items()
        ),
    )


# The settings


def settings() -> str:
    """Every setting that an operator sets."""
    properties = Settings.model_json_schema()["properties"]
    return rows(
        ("variable", "default", "what it is", "what it may be"),
        (
            (f"`{name.upper()}`", _shown(field.default), str(field.description), allowed(properties[name]))
            for name, field in Settings.model_fields.items()
            if name not in SET_BY_RUNPOD
        ),
    )


def _shown(default: object) -> str:
    if default in (None, "", ()):
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{','.join(map(str, default))}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def other_variables() -> str:
    """Variables of an endpoint that libraries and RunPod read."""
    return rows(
        ("variable", "default", "what it is"),
        ((f"`{name}`", default, what) for name, (default, what) in OTHER_VARIABLES.items()),
    )


# Deploying


def cards() -> str:
    """What each card makes of each model."""
    return rows(
        ("model", "card", "`MEMORY_MODE`", "on the card", "exact", "one picture", "1000 pictures"),
        ((f"`{name}`", card.name, *_on_a_card(get_model(name), card)) for name in ON_CARDS for card in CARDS),
    )


def _on_a_card(model: Model, card: Card) -> tuple[str, ...]:
    try:
        found = estimate(model, card, Settings())
        mode = f"`auto`: {found.placement.mode}"
    except DoesNotFit:
        instead = nearest(model, card, Settings())
        if instead is None:
            return ("none fits", *[""] * 4)
        found, mode = instead, f"`{instead.placement.mode}`, asked for"
    return (
        mode,
        f"{found.placement.peak / GB:.1f} of {card.memory_gb} GB",
        "yes" if found.exact else "no",
        f"{two_digits(found.seconds)} s, {found.source}",
        f"${two_digits(found.dollars)}, {found.source}",
    )


def disks() -> str:
    """What each model wants of a worker's disk and start."""
    return rows(
        ("model", "download", "container disk", "`RUNPOD_INIT_TIMEOUT`"),
        (
            (
                f"`{model.name}`",
                f"{model.download_gb:g} GB" if model.download_gb else "none",
                f"{disk_gb([model], Settings())} GB",
                f"{init_seconds([model], Settings())} s" if model.download_gb else "RunPod's own",
            )
            for model in MODELS
        ),
    )


# How it is built


def ladder() -> str:
    """The rooms of src/, each above those that it may import."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("containers") == ["src"]]
    return rows(
        ("rung", "room", "what it is"),
        ((str(rung), f"`{room}`", _about(room)) for rung, layer in enumerate(layers, 1) for room in layer.split(" | ")),
    )


def _about(room: str) -> str:
    """The first sentence of a room's docstring."""
    folder = ROOT / "src" / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    return re.split(r"(?<=[.?])\s", " ".join(said.partition("\n\n")[0].split()))[0]


BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"docs: modes": modes, "docs: figures": figures},
    "docs/api.md": {
        "docs: examples": examples,
        "docs: fields": fields,
        "docs: entries": entries,
        "docs: models": models,
        "docs: controlnets": controlnets,
        "docs: schedulers": schedulers,
        "docs: speeds": speeds,
        "docs: formats": formats,
        "docs: aliases": aliases,
        "docs: sizes": sizes,
        "docs: without effect": without_effect,
        "docs: refused": refused,
    },
    "docs/settings.md": {"docs: settings": settings, "docs: other variables": other_variables},
    "docs/deploy.md": {"docs: cards": cards, "docs: disks": disks},
    "docs/architecture.md": {"docs: ladder": ladder},
    "docs/performance.md": {
        **{f"benchmarks/results/{name}.json": partial(table, name) for name in TABLES},
        "docs: profiles": profiles,
    },
}


def filled(page: str, text: str) -> str:
    """`text` of `page` with what belongs between its marks; raises ValueError where a mark is not there once."""
    for mark, make in BLOCKS[page].items():
        begin, end = f"<!-- {mark} -->\n", "\n<!-- end -->"
        if text.count(begin) != 1:
            raise ValueError(f"{page} must have the mark {begin.strip()} once, and has it {text.count(begin)} times")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end.lstrip("\n"))
        text = f"{before}{begin}{make()}{end}{after}"
    return text


def main() -> None:
    """Write the pages anew, and RunPod Hub's files."""
    for page in BLOCKS:
        file = ROOT / page
        file.write_text(filled(page, file.read_text()))
    for name, make in hub.FILES.items():
        (hub.FOLDER / name).write_text(hub.written(make()))


if __name__ == "__main__":
    main()

"""Run the worker's handler() here, once: `python local_test.py`, then look into outputs/.

Takes test_input.json, another file (--input), or any field of a request as an option (--prompt, --num-images ...).
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from client.output import contact_sheet, save
from client.values import each_picture, picture
from handler import get_engine, get_settings, handler
from src.catalog import FORMATS
from src.errors import WorkerError
from src.job import Progress
from src.redaction import redact
from src.request.schema import Request
from src.request.texts import typed
from src.response.encode import read_parameters
from src.serving.logs import log, quiet_libraries
from src.serving.warm_up import warm_up
from src.weights.disk import why_not_writable

if TYPE_CHECKING:
    from src.engine import AnyEngine

ROOT = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when pictures were saved, 1 with one line on stderr when not."""
    options = _parser().parse_args(arguments)
    with _log_lines(logging.WARNING if options.quiet else logging.INFO) as lines:
        return _run(options, lines)


def _run(options: argparse.Namespace, lines: logging.Handler) -> int:
    try:
        event = _event(options)
        draws = not {"describe", "dry_run"} & event["input"].keys()
        if draws:
            _check_output(options.output)
        started = time.perf_counter()
        print(redact(f"model    {get_settings().model_name}"), flush=True)
        engine = get_engine()
        load = time.perf_counter() - started
        if draws:
            _warm_up(engine, options)
        if options.picture:
            _check_maker(options.picture, engine.model.name, engine.revision)
    except (WorkerError, OSError, ValueError) as error:
        return _fail(str(error))
    lines.setLevel(logging.WARNING)  # the bar and the table say the rest

    with _Bar(disable=options.quiet) as bar:
        response = handler(event, bar.show)
    if "error" in response:
        return _fail(response["error"])
    if "metadata" not in response:  # a description, a plan, or what OpenAI's clients get
        print(json.dumps(response, indent=2))
        return 0
    try:
        for path in _save(response, options.output):
            print(f"saved    {path}")
    except OSError as error:
        return _fail(f"the pictures cannot be saved in {options.output.resolve()}: {error}")
    _report(response["metadata"], load, bar.steps)
    return 0


def _warm_up(engine: AnyEngine, options: argparse.Namespace) -> None:
    """Where that is asked for; or say what the seconds below are of."""
    if options.warm_up:
        for warm in warm_up(engine, get_settings()):
            print(f"warm-up  {warm.width}x{warm.height}: {warm.seconds:.2f} s", flush=True)
    elif engine.loaded().acceleration["compiled"] != "off":
        print("compiled no: a worker's blocks are compiled while it warms up, and faster; --warm-up does that here")


def _check_output(folder: Path) -> None:
    """Raise OSError where pictures could not be saved, before seconds or hours go into them."""
    if unwritable := why_not_writable(folder):
        raise OSError(f"{folder.resolve()} {unwritable}, or give another --output")


class _Lines(logging.Handler):
    """Plain lines on stderr, above the bar; of what fails the one line of `_fail` is enough."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            prefix = "warning: " if record.levelno == logging.WARNING else ""
            tqdm.write(f"{prefix}{record.getMessage()}", file=sys.stderr)


@contextmanager
def _log_lines(level: int) -> Iterator[_Lines]:
    """The worker's log as lines from `level` on, and other libraries quiet."""
    quiet_libraries()
    lines, before = _Lines(level), log.level
    log.addHandler(lines)
    log.setLevel(level)
    try:
        yield lines
    finally:
        log.removeHandler(lines)
        log.setLevel(before)


class _Bar:
    """A tqdm bar that follows Progress: one tick a step, its label the phase."""

    def __init__(self, disable: bool) -> None:
        self._bar: tqdm[Any] = tqdm(unit="step", disable=disable)
        self.steps = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        self._bar.set_description(progress.phase, refresh=False)
        if progress.steps:
            self._bar.total = self.steps = progress.steps
            self._bar.update(progress.step - self._bar.n)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=ROOT / "test_input.json", help='a file of {"input": {...}}')
    parser.add_argument("--from", type=Path, dest="picture", metavar="PICTURE", help="repeat what made this picture")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the pictures")
    parser.add_argument("--warm-up", action="store_true", help="warm up first, as a worker does: compile, then draw")
    parser.add_argument("--quiet", action="store_true", help="no stages and no progress bars")
    fields = parser.add_argument_group("fields of the request")
    for name, field in Request.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        fields.add_argument(flag, f"--{name}", dest=f"field_{name}", metavar="VALUE", help=field.description)
    return parser


def _event(options: argparse.Namespace) -> dict[str, Any]:
    """The file's event with the options' fields over it; a --prompt starts from nothing."""
    given = {
        name: _value(name, value)
        for name in Request.model_fields
        if (value := getattr(options, f"field_{name}")) is not None
    }
    if options.picture:
        event = {"input": _carried(options.picture).get("input")}
    else:
        event = {"input": {}} if "prompt" in given else json.loads(options.input.read_text(encoding="utf-8"))
    if not isinstance(event, dict) or not isinstance(event.get("input"), dict):
        raise ValueError(f'{options.input}: must hold {{"input": {{...}}}}')
    return {**event, "input": {**event["input"], **given}}


def _carried(file: Path) -> dict[str, Any]:
    """What the picture's file carries: its event, and who made it."""
    with Image.open(file) as opened:
        carried = read_parameters(opened)
    if carried is None:
        raise ValueError(f"{file}: carries no request; only this worker's own pictures do")
    return carried


def _check_maker(file: Path, model: str, revision: str | None) -> None:
    """Another model would make another picture."""
    made_by = _carried(file)
    if made_by.get("model") != model:
        raise ValueError(f"{file}: was made by {made_by.get('model')}, and this is {model}; set MODEL_NAME")
    if made_by.get("model_revision") != revision:
        raise ValueError(
            f"{file}: was made by revision {made_by.get('model_revision')} of {model}, and this is {revision}; set "
            "MODEL_REVISION"
        )


def _value(name: str, text: str) -> object:
    """An option's text as a value of the field, with the files of pictures that it names."""
    return each_picture(name, typed(name, text), picture)


def _save(response: dict[str, Any], folder: Path) -> list[Path]:
    """The pictures as they came, named by their seeds, and a contact sheet where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = response["metadata"]
    suffix = FORMATS[metadata["output_format"]].suffix
    for url in response.get("image_urls", ()):
        print(f"uploaded {url}")
    paths = []
    for seed, text in zip(metadata["seeds"], response.get("images", ()), strict=False):
        if text is None:
            continue  # it was uploaded
        paths.append(folder / f"{seed}.{suffix}")
        save(paths[-1], base64.b64decode(text))
    if len(paths) > 1:
        sheet = folder / "contact-sheet.png"
        contact_sheet(paths, sheet, columns=len(paths))
        paths.append(sheet)
    return paths


def _report(metadata: dict[str, Any], load: float, steps: int) -> None:
    timings = metadata["timings"]
    print("\n{width}x{height}, {num_images} picture(s) of {num_inference_steps} steps".format(**metadata))
    rows = {"load": load, **timings, "per step": timings["denoise"] / steps}
    order = ("load", "encode_prompt", "denoise", "per step", "decode", "encode_images", "total")
    for name in order:
        print(f"  {name.replace('_', ' '):<14}{rows[name]:9.3f} s")
    if metadata["peak_memory"] is not None:
        print(f"  {'peak memory':<14}{metadata['peak_memory'] / 1e9:9.2f} GB")
    for warning in metadata["warnings"]:
        print(f"warning  {warning}")


def _fail(reason: str) -> int:
    print(redact(f"error: {reason}"), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m scripts.screenshots`: what people see, as pictures for README and docs, in Debian's chromium."""

from __future__ import annotations

import base64
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image
from playwright.sync_api import Browser, expect

from client.batch import main as batch
from client.output import contact_sheet
from src.settings import ROOT
from tests.browser import PATIENCE, Tab, launched, opened_tab, serving

FOLDER = ROOT / "docs" / "pictures"
_DESK, _PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 800}
_ROWS = ROOT / "examples" / "prompts.csv"
_COLOURS = 256  # of a file
_DRAWN: tuple[dict[str, Any], ...] = (
    {"prompt": "a small yellow circle on a green background", "seed": 5},
    {"prompt": "a large purple diamond on a white background", "seed": 7},
    {"prompt": "a yellow star on a blue background", "seed": 4, "width": 160, "height": 96},
    {"prompt": "a green triangle on an orange background", "seed": 42, "num_images": 4},
    {"prompt": "a white star on a red background", "seed": 3},
)
_SLOW = {"num_inference_steps": 100, "num_images": 4, "seed": 1}


def main() -> None:
    """Every screenshot anew."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MODEL_NAME"] = "flux-shapes"
        # Before the browser, whose own event loop suffers no other in this thread.
        if batch([str(_ROWS), "--local", "--out", folder]) != 0:
            raise SystemExit("the rows were not drawn")
        _screenshots(Path(folder))


def _screenshots(rows: Path) -> None:
    with launched() as browser, serving() as server:
        page_light(browser, server.url, FOLDER / "page-light.png")
        page_dark(browser, server.url, FOLDER / "page-dark.png")
        page_phone(browser, server.url, FOLDER / "page-phone.png")
        gallery(browser, rows / "index.html", FOLDER / "batch.png")
        openai(server.url, FOLDER / "openai.png")


def page_light(browser: Browser, url: str, to: Path) -> None:
    """The page with pictures and one on its way."""
    with opened_tab(browser, url, viewport=_DESK, color_scheme="light") as tab:
        _draw(tab)
        _save(tab, to)


def page_dark(browser: Browser, url: str, to: Path) -> None:
    """The same in the dark."""
    with opened_tab(browser, url, viewport=_DESK, color_scheme="dark") as tab:
        _draw(tab)
        _save(tab, to)


def page_phone(browser: Browser, url: str, to: Path) -> None:
    """What a phone shows of it."""
    options = {"viewport": _PHONE, "is_mobile": True, "has_touch": True}
    with opened_tab(browser, url, color_scheme="light", **options) as tab:
        _draw(tab)
        tab.page.evaluate("() => document.querySelector('#groups details:nth-of-type(6)').scrollIntoView()")
        _save(tab, to)


def gallery(browser: Browser, file: Path, to: Path) -> None:
    """The page of `python -m client.batch examples/prompts.csv --local`, drawn by the shipped model."""
    page = browser.new_page(viewport={"width": 1120, "height": 800}, color_scheme="light")
    page.goto(file.as_uri())
    while not page.evaluate("[...document.images].filter(i => i.src).slice(0, 8).every(i => i.naturalWidth)"):
        page.wait_for_timeout(50)  # wait_for_function would want eval, which the page forbids
    _small(page.screenshot(), to)
    page.close()


def openai(url: str, to: Path) -> None:
    """What OpenAI's client gets of a stream, side by side: pictures on their way, and the last."""
    client = OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none")
    stream = client.images.generate(
        prompt="could you draw a purple star in front of a yellow wall?", stream=True, partial_images=3,
        extra_body={"seed": 1, "num_inference_steps": 100},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files: list[Path] = []
        for event in stream:
            files.append(Path(folder) / f"{len(files)}.png")
            picture = Image.open(io.BytesIO(base64.b64decode(event.b64_json))).convert("RGB")
            picture.resize((256, 256), Image.Resampling.BICUBIC).save(files[-1])
        contact_sheet(files, to, columns=len(files))


def _draw(tab: Tab) -> None:
    """A gallery, and one job at a step where its picture can be seen."""
    tab.open()
    pictures = 0
    for fields in _DRAWN:
        tab.page.click("#reset")
        tab.draw(**fields)
        pictures += fields.get("num_images", 1)
        tab.wait_for_pictures(pictures)
    tab.page.click("#reset")
    tab.draw("a red star on a blue background", **_SLOW)
    for summary in tab.page.query_selector_all("details[open] > summary"):
        summary.click()
    tab.page.evaluate("() => { document.querySelector('#form').scrollTo(0, 0); scrollTo(0, 0); }")
    line = tab.page.locator(".job .line")
    expect(line).to_have_text(re.compile(r"step (9\d|1[0-9][05]|2\d\d) of 400"), timeout=PATIENCE * 1000)


def _save(tab: Tab, to: Path) -> None:
    _small(tab.page.screenshot(), to)
    tab.page.locator(".job").get_by_role("button", name="Stop").click()
    expect(tab.page.locator(".job .line")).to_have_text("Stopped.", timeout=PATIENCE * 1000)


def _small(screenshot: bytes, to: Path) -> None:
    picture = Image.open(io.BytesIO(screenshot)).convert("RGB")
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)


if __name__ == "__main__":
    main()

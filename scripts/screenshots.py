"""`python -m scripts.screenshots`: what people see, as pictures for README and docs, in Debian's chromium."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from client.batch import main as batch
from src.settings import ROOT

FOLDER = ROOT / "docs" / "pictures"
CHROMIUM = "/usr/bin/chromium"
_ROWS = ROOT / "examples" / "prompts.csv"


def main() -> None:
    """Every screenshot anew."""
    gallery(FOLDER / "batch.png")


def gallery(to: Path) -> None:
    """The page of `python -m client.batch examples/prompts.csv --local`, drawn by the shipped model."""
    os.environ["MODEL_NAME"] = "flux-shapes"
    with tempfile.TemporaryDirectory() as folder:
        if batch([str(_ROWS), "--local", "--out", folder]) != 0:
            raise SystemExit("the rows were not drawn")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM)
            page = browser.new_page(viewport={"width": 1120, "height": 860}, color_scheme="light")
            page.goto((Path(folder) / "index.html").as_uri())
            page.wait_for_function("[...document.images].filter(i => i.src).every(i => i.complete)")
            page.screenshot(path=to)
            browser.close()


if __name__ == "__main__":
    main()

"""The page as people have it: web.py as a process, and a headless Chromium in front of it."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from src.settings import ROOT

PATIENCE = 120  # seconds to wait for what happens: the machine may be busy
READY = "body[data-ready]"


@cache
def find_chromium() -> str:
    """The program; where there is none, root of a Debian gets one, and others skip."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        script = str(ROOT / "tests" / "chromium.sh")
        run = subprocess.run(["/bin/sh", script], capture_output=True, text=True, check=False)
        found = shutil.which("chromium")
        if found is None:
            pytest.skip(f"no chromium, and apt-get has none: {run.stderr.strip()[-300:]}")
    if found is None:
        pytest.skip("no chromium: sh tests/chromium.sh installs Debian's, as root")
    return found


@cache
def find_axe() -> str:
    """axe-core's source, by the hash in tests/axe/package-lock.json."""
    npm, folder = shutil.which("npm"), ROOT / "tests" / "axe"
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not source.is_file():
        if npm is None:
            pytest.skip("no npm, which axe-core comes from")
        run = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode:
            assert "EINTEGRITY" not in run.stderr, run.stderr
            pytest.skip(f"npm has no axe-core: {run.stderr.strip()[-300:]}")
    return source.read_text(encoding="utf-8")


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser."""
    program = find_chromium()
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Server:
    """A running web.py."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(port: int = 0, **environment: str) -> Iterator[Server]:
    """web.py on the shipped model, once it says where the page is."""
    process = subprocess.Popen(
        [sys.executable, "web.py", "--port", str(port)],
        cwd=ROOT, env={**os.environ, "MODEL_NAME": "flux-shapes", "LORA_DIR": "models", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("the page is at http://"), line
        yield Server(process, line.split()[-1].partition("#")[0])
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


@dataclass
class Tab:
    """A tab with the page, and what the browser said of it that nobody `expects`."""

    page: Page
    url: str
    expects: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.said.append(f"{error}"))
        self.page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.elsewhere.append(request.url)

    def check(self) -> None:
        unexpected = [text for text in self.said if not any(part in text for part in self.expects)]
        assert not unexpected, f"the browser said: {unexpected}"
        assert not self.elsewhere, f"the page asked elsewhere: {self.elsewhere}"

    # ---- what people do

    def open(self, fragment: str = "") -> None:
        self.page.goto(f"{self.url}{fragment}")
        self.page.wait_for_selector(READY)

    def unfold(self, group: str) -> None:
        details = self.page.locator("details", has=self.page.locator(f"summary span:text-is('{group}')"))
        if details.get_attribute("open") is None:
            details.locator("summary").click()

    def unfold_all(self) -> None:
        """Every group that is shown, from the last up: what opens pushes others down."""
        for summary in reversed(self.page.locator("details:not([open]) > summary:visible").element_handles()):
            summary.click()

    def fill(self, **fields: Any) -> None:
        """Type into fields, whose groups are unfolded."""
        for name, value in fields.items():
            control = self.page.locator(f"[name={name}]")
            if not control.is_visible():
                group = self.page.locator("details", has=control).locator("summary span").first.text_content()
                self.unfold(group or "")
            if control.evaluate("(node) => node.localName") == "select":
                control.select_option(str(value))
            else:
                control.fill(str(value))

    def draw(self, prompt: str, **fields: Any) -> None:
        """Draw, without waiting for it."""
        self.fill(prompt=prompt, **fields)
        self.page.click("#draw")

    def wait_for_pictures(self, count: int) -> None:
        expect(self.page.locator(".tile img")).to_have_count(count, timeout=PATIENCE * 1000)

    def drop(self, file: bytes, name: str, type: str = "image/png", target: str = "body") -> None:
        """A file of this name onto the page."""
        transfer = self.page.evaluate_handle(
            """([text, name, type]) => {
                const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], name, { type }));
                return transfer;
            }""",
            [base64.b64encode(file).decode(), name, type],
        )
        self.page.dispatch_event(target, "drop", {"dataTransfer": transfer})

    def download(self, i: int = 0) -> bytes:
        """The file of the i-th picture of the gallery."""
        self.page.locator(".tile .open").nth(i).click()
        with self.page.expect_download() as download:
            self.page.click("#viewer >> text=Download")
        self.page.keyboard.press("Escape")
        return Path(download.value.path()).read_bytes()

    def value(self, name: str) -> str:
        return self.page.locator(f"[name={name}]").input_value()

    def clear(self) -> None:
        """No picture is left."""
        self.button("Clear all").click()
        self.page.locator("#question").get_by_role("button", name="Clear all").click()
        self.wait_for_pictures(0)

    def button(self, text: str) -> Locator:
        return self.page.get_by_role("button", name=text, exact=True)


@contextmanager
def opened_tab(browser: Browser | BrowserContext, url: str, **options: Any) -> Iterator[Tab]:
    """A tab of its own context, or another one of a context; at its end nothing may have been said."""
    context = browser.new_context(**options) if isinstance(browser, Browser) else browser
    tab = Tab(context.new_page(), url)
    try:
        yield tab
        tab.check()
    finally:
        tab.page.close()
        if isinstance(browser, Browser):
            context.close()


def wait_until(happened: Any, what: str) -> None:
    """Until `happened()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)

"""`python -m client.batch`: what it writes, what it refuses, and what becomes of it when it is stopped or killed."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.batch import killed_and_resumed, memory
from client.batch import main
from client.journal import NAME, Journal
from client.output import Line, contact_sheet, save_gallery
from src.settings import ROOT
from tests.answers import answer, picture_file
from tests.runpod_stand_in import ENDPOINT, StandIn

KEY = "rpa_a_key_that_nobody_may_see"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    held = StandIn(simulate=answer)
    held.key = KEY
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    yield held
    held.close()


def prompts(folder: Path, count: int, text: str = "prompt {i}") -> Path:
    file = folder / "prompts.csv"
    file.write_text("prompt,seed\n" + "".join(f"{text.format(i=i)},{i}\n" for i in range(count)))
    return file


def arguments(stand_in: StandIn, file: Path, out: Path, *more: str) -> list[str]:
    url = f"http://127.0.0.1:{stand_in.port}/v2"
    return [str(file), "--endpoint", ENDPOINT, "--url", url, "--out", str(out), "--quiet", *more]


def begun(arguments: Sequence[str], *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(command or ("-m", "client.batch")), *arguments],
        cwd=ROOT, env={**os.environ, "RUNPOD_API_KEY": KEY}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / NAME).read_text().splitlines()]


def until(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def sent(out: Path) -> int:
    return (out / NAME).read_text().count('"sent"') if (out / NAME).exists() else 0


def test_a_picture_a_row_a_table_a_sheet_and_a_page(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(stand_in, prompts(tmp_path, 5), out, "--price-per-second", "0.001")) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{i + 2:04}-{i}.png" for i in range(5)), "contact-sheet.jpeg", "index.html", NAME, "results.csv",
    ]  # fmt: skip
    assert (out / "0006-4.png").read_bytes() == picture_file(4)
    assert results(out)[4] == {"row": "6", "seed": "4", "file": "0006-4.png", "seconds": "0.100", "error": ""}
    said = capsys.readouterr()
    assert said.out == (
        f"5 pictures in {out}, see {out}/index.html; "
        "they took 0.5 s of workers, $0.00 without starts and idle seconds\n"
    )
    assert said.err == ""


def test_the_key_stands_nowhere(stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.key = "another"
    out = tmp_path / "out"
    assert main(arguments(stand_in, prompts(tmp_path, 2), out)) == 2
    said = capsys.readouterr()
    assert "does not know the API key" in said.err
    assert not any(KEY in text for text in (said.out, said.err, *(path.read_text() for path in out.iterdir())))
    stand_in.key = KEY
    assert main(arguments(stand_in, prompts(tmp_path, 3), out)) == 0, "nothing was begun"


def test_a_row_that_fails_has_its_error_and_the_others_their_pictures(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def simulate(input: dict[str, Any]) -> dict[str, Any]:
        bad = input["seed"] == 1
        return {"status": "error", "error": "invalid_request: =1+1 is wrong"} if bad else answer(input)

    stand_in._simulate = simulate
    assert main(arguments(stand_in, prompts(tmp_path, 3), tmp_path / "out", "--set", "num_images=2")) == 1
    assert [(row["row"], row["seed"], row["file"], row["error"]) for row in results(tmp_path / "out")] == [
        ("2", "0", "0002-0.png", ""), ("2", "1", "0002-1.png", ""),
        ("3", "1", "", "invalid_request: =1+1 is wrong"),
        ("4", "2", "0004-2.png", ""), ("4", "3", "0004-3.png", ""),
    ]  # fmt: skip
    assert "failed: row 3, seed 1: invalid_request" in capsys.readouterr().err
    assert len(stand_in.jobs) == 3
    assert (
        main(arguments(stand_in, tmp_path / "prompts.csv", tmp_path / "out", "--set", "num_images=2", "--resume")) == 1
    )
    assert len(stand_in.jobs) == 3, "what is wrong stays wrong, and is not paid again"


def test_what_failed_for_reasons_of_the_worker_is_tried_anew_by_resume(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in._simulate = lambda _: {"status": "error", "error": "out_of_memory: too little"}
    command = arguments(stand_in, prompts(tmp_path, 2), tmp_path / "out")
    assert main(command) == 1
    stand_in._simulate = answer
    assert main([*command, "--resume"]) == 0
    assert [row["error"] for row in results(tmp_path / "out")] == ["", ""]


def test_nothing_is_sent_where_a_row_is_wrong(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,width\na,63\nb,64\n,64\n")
    assert main(arguments(stand_in, file, tmp_path / "out", "--set", "num_image=4", "--set", "seed")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --set: must be FIELD=VALUE, got 'seed'", "error: nothing was sent, mend these first",
    ]  # fmt: skip
    assert main(arguments(stand_in, file, tmp_path / "out")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:20] for line in lines] == ["error: row 2: width:", "error: row 4: prompt", "error: nothing was s"]
    assert not stand_in.jobs
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_and_says_what_it_knows_of_the_price(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(stand_in, prompts(tmp_path, 3), tmp_path / "out", "--dry-run", "--seeds", "4")
    assert main(command) == 0
    assert capsys.readouterr().out == "3 rows make 12 pictures in 12 jobs; nothing was sent.\n"
    assert main([*command, "--price-per-second", "0.00116"]) == 0
    assert (
        "Its price depends on the seconds that a picture takes: give --seconds-per-picture" in capsys.readouterr().out
    )
    assert main([*command, "--price-per-second", "0.00116", "--seconds-per-picture", "6.5"]) == 0
    assert "At 6.5 s a picture that is 78 s of a worker, $0.09;" in capsys.readouterr().out
    assert not stand_in.jobs
    assert not (tmp_path / "out").exists()


def test_seeds_that_were_picked_are_those_of_the_journal(stand_in: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\nan owl\n")
    assert main(arguments(stand_in, file, tmp_path / "out", "--seeds", "2")) == 0
    seeds = journal(tmp_path / "out")[0]["seeds"]
    assert [row["seed"] for row in results(tmp_path / "out")] == [
        str(seeds[number] + i) for number in ("1", "2") for i in range(2)
    ]
    assert main(arguments(stand_in, file, tmp_path / "out", "--seeds", "2", "--resume")) == 0
    assert len(stand_in.jobs) == 4


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (False, [], "holds a batch that was begun: add --resume to go on with it, or give another --out"),
        (True, ["--resume"], "prompts.csv, --set, --seeds or a picture changed since it was begun"),
        (
            False,
            ["--resume", "--set", "width=64"],
            "prompts.csv, --set, --seeds or a picture changed since it was begun",
        ),
        (False, ["--resume", "--seeds", "2"], "prompts.csv, --set, --seeds or a picture changed since it was begun"),
        (
            False,
            ["--resume", "--endpoint", "other"],
            "--endpoint, --url, --local or its model changed since it was begun",
        ),
    ],
)
def test_another_batch_is_not_mixed_into_a_folder(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, change: bool, more: list[str], words: str
) -> None:
    command = arguments(stand_in, prompts(tmp_path, 2), tmp_path / "out")
    assert main(command) == 0
    capsys.readouterr()
    if change:
        prompts(tmp_path, 2, "another {i}")
    assert main([*command, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert len(stand_in.jobs) == 2


def test_two_runs_in_one_folder_are_refused(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal(tmp_path / "out", resume=False):
        assert main(arguments(stand_in, prompts(tmp_path, 2), tmp_path / "out", "--resume")) == 2
    assert "is in use by another run" in capsys.readouterr().err
    assert main(arguments(stand_in, prompts(tmp_path, 2), tmp_path / "out")) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--local"], "give either --endpoint with the id of an endpoint on RunPod, or --local"),
        (["--out", "/proc/no/such"], "error: /proc/no cannot be used: No such file or directory"),
        (["--url", "https://api.runpod.ai/v2"], "RUNPOD_API_KEY is not set"),
        (["--url", "api.runpod.ai"], "'api.runpod.ai' is no address: it must be as https://api.runpod.ai/v2"),
    ],
)
def test_what_cannot_begin_is_one_line(
    stand_in: StandIn,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    more: list[str],
    words: str,
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "")
    stand_in.key = ""
    assert main([*arguments(stand_in, prompts(tmp_path, 2), tmp_path / "out"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not stand_in.jobs


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "gone.csv"), "--endpoint", "x"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone.csv'} cannot be used: No such file or directory\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_what_is_open_and_says_how_to_go_on(stand_in: StandIn, tmp_path: Path, number: int) -> None:
    stand_in._seconds_a_job = 0.2
    out, command = tmp_path / "out", arguments(stand_in, prompts(tmp_path, 20), tmp_path / "out", "--concurrency", "8")
    process = begun(command)
    until(lambda: sent(out) > 10, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping: open jobs are being cancelled" in errors
    assert "jobs are left: the same command with --resume goes on with them" in errors
    statuses = Counter(job.status for job in stand_in.jobs.values())
    assert statuses["CANCELLED"] >= 3
    assert statuses.keys() == {"CANCELLED", "COMPLETED"}
    rows = results(out)
    assert len(rows) == 20
    assert {row["error"] for row in rows if not row["file"]} == {"not drawn yet: --resume goes on"}
    stand_in._seconds_a_job = 0.0
    assert main([*command, "--resume"]) == 0
    assert all((out / f"{i + 2:04}-{i}.png").read_bytes() == picture_file(i) for i in range(20))
    drawn = Counter(job.input["seed"] for job in stand_in.jobs.values() if job.status == "COMPLETED")
    assert set(drawn.values()) == {1}


def test_what_a_kill_leaves_between_a_file_and_its_line_is_not_paid_again(stand_in: StandIn, tmp_path: Path) -> None:
    out, command = tmp_path / "out", arguments(stand_in, prompts(tmp_path, 4), tmp_path / "out")
    assert main(command) == 0
    lines = (out / NAME).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not ('"files"' in line and '"row": 3' in line)]
    (out / NAME).write_text("".join(kept) + '{"row": 4, "se')  # and a line that was cut off
    stand_in.jobs.clear()
    assert main([*command, "--resume"]) == 0
    assert not stand_in.jobs
    assert [row["file"] for row in results(out)] == [f"{i + 2:04}-{i}.png" for i in range(4)]
    assert all(isinstance(line, dict) for line in journal(out))


def test_a_job_whose_id_is_known_is_asked_for_and_one_that_is_forgotten_is_sent_again(
    stand_in: StandIn, tmp_path: Path
) -> None:
    out, command = tmp_path / "out", arguments(stand_in, prompts(tmp_path, 3), tmp_path / "out")
    assert main(command) == 0
    lines = (out / NAME).read_text().splitlines(keepends=True)
    (out / NAME).write_text("".join(line for line in lines if '"files"' not in line))
    for file in out.glob("*.png"):
        file.unlink()
    del stand_in.jobs[next(line["sent"] for line in journal(out) if line.get("row") == 3)]
    assert main([*command, "--resume"]) == 0
    assert Counter(job.input["seed"] for job in stand_in.jobs.values()) == {0: 1, 1: 1, 2: 1}
    assert [row["error"] for row in results(out)] == [""] * 3
    assert len(stand_in.calls["run"]) == 4


def test_a_journal_that_is_none_is_refused(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / NAME).write_text('{"rows": "x"}\nnothing\n')
    assert main(arguments(stand_in, prompts(tmp_path, 1), tmp_path, "--resume")) == 2
    assert f"line 2 of {tmp_path / NAME} is not one that this program wrote" in capsys.readouterr().err


def test_a_full_disk_ends_it_and_nothing_is_lost(stand_in: StandIn, tmp_path: Path) -> None:
    """A file may have ten kilobytes, and a picture has twelve."""
    stand_in._simulate = lambda input: answer(input, side=96)
    out, command = tmp_path / "out", arguments(stand_in, prompts(tmp_path, 3), tmp_path / "out")

    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
    process = begun(command, "-c", limited + "from client.batch import main; sys.exit(main(sys.argv[1:]))")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a file of --out cannot be used: File too large\n" in errors
    assert "--resume goes on" in errors
    assert not list(out.glob("*.png")) + list(out.glob(".*"))
    assert main([*command, "--resume"]) == 0
    assert len(list(out.glob("*.png"))) == 3
    drawn = Counter(job.input["seed"] for job in stand_in.jobs.values() if job.status == "COMPLETED")
    assert set(drawn.values()) == {1}


class Page(HTMLParser):
    """What a browser makes of a page: its tags, and what buttons carry."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.requests: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.addresses += [str(found[name]) for name in ("src", "href") if name in found]
        assert not [name for name in found if name.startswith("on")]
        if found.get("data-request"):
            self.requests.append(json.loads(str(found["data-request"])))


def test_the_page_escapes_everything_and_asks_no_host(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> & <!-- count --> \u2028"
    request = {"prompt": hostile, "init_image": "A" * 5_000, "note": {"deep": ["</button>"]}}
    lines = [
        Line(2, 1, "0002-1.png", 0.5, "", request),
        Line(3, 2, "", None, f"failed: {hostile}", {"prompt": [hostile, "b"]}),
    ]
    save_gallery(lines, tmp_path / "index.html", hostile)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (page.tags["script"], page.tags["li"]) == (1, 2)
    assert page.addresses == ["data:,", "0002-1.png"]
    assert page.requests[0]["prompt"] == hostile
    assert page.requests[0]["init_image"] == "A" * 300 + "..."
    assert "1 pictures, 1 failed" in text
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "http:" not in text
    assert "https:" not in text


@pytest.mark.slow
def test_the_page_works_from_the_disk_by_keyboard_alone(tmp_path: Path) -> None:
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("Debian's chromium is not installed")
    from playwright.sync_api import sync_playwright

    lines = []
    for i in range(40):
        (tmp_path / f"{i:04}-{i}.png").write_bytes(picture_file(i))
        lines.append(Line(i, i, f"{i:04}-{i}.png", 0.1, "", {"prompt": f"<b>picture</b> {'odd' if i % 2 else 'even'}"}))
    lines.append(Line(40, 40, "", None, "failed: why", {"prompt": "odd too"}))
    save_gallery(lines, tmp_path / "index.html", "prompts.csv")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "index.html").as_uri())

        def holds(expression: str) -> None:  # wait_for_function would want eval, which the page forbids
            while not page.evaluate(expression):
                page.wait_for_timeout(20)

        holds("document.images[0].naturalWidth === 8")
        assert len([url for url in asked if url.endswith(".png")]) < 40, "those that nobody sees yet are not loaded"
        page.keyboard.press("Tab")
        page.keyboard.type("ODD")
        assert page.inner_text("#count") == "21 of 41 shown"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowRight")
        assert json.loads(page.inner_text("pre")) == {"prompt": "<b>picture</b> odd", "seed": 3}
        assert page.inner_text("#about") == "row 3, seed 3, 0.10 s, 0003-3.png"
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("dialog .error") == "failed: why"
        page.keyboard.press("Escape")
        holds("document.activeElement.textContent.startsWith('failed: why')")
        assert not page.is_visible("dialog")
        page.fill("#filter", "nothing like it")
        assert page.is_visible("#nothing")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_the_sheet_is_bounded_and_says_so(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.batch._ON_THE_SHEET", 6)
    assert main(arguments(stand_in, prompts(tmp_path, 9), tmp_path / "out")) == 0
    assert "contact-sheet.jpeg shows the first 6 of 9 pictures" in capsys.readouterr().err
    with Image.open(tmp_path / "out" / "contact-sheet.jpeg") as sheet:
        assert sheet.size == (3 * 12 - 4, 2 * 12 - 4)


def test_pictures_of_different_sizes_are_on_one_sheet(tmp_path: Path) -> None:
    files = []
    for i, size in enumerate([(400, 200), (200, 400), (100, 100)]):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", size, "red").save(files[-1])
    contact_sheet(files, tmp_path / "sheet.png", columns=2, side=100)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (204, 104)


def test_local_draws_the_same_by_the_handler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,seed,num_images\na red circle,1,2\na blue star,7,\na,1,4\n")
    size = ["--set", "width=64", "--set", "height=64", "--set", "num_inference_steps=1"]
    assert main([str(file), "--local", "--out", str(tmp_path / "out"), "--quiet", *size]) == 0
    assert [row["file"] for row in results(tmp_path / "out")] == [
        "0002-1.png", "0002-2.png", "0003-7.png", "0004-1.png", "0004-2.png", "0004-3.png", "0004-4.png",
    ]  # fmt: skip
    bad = [*size[:-1], "num_inference_steps=1", "--set", "scheduler=nothing"]
    assert main([str(file), "--local", "--out", str(tmp_path / "bad"), "--quiet", *bad]) == 1
    assert {row["error"][:27] for row in results(tmp_path / "bad")} == {"invalid_request: scheduler:"}


SMALL = ("--set", "width=64", "--set", "height=64", "--set", "num_inference_steps=4")
CLIENT_FAULTS = ("429", "500", "drop", "slow", "unanswered", "garbage")


@pytest.mark.slow
def test_300_rows_with_faults_a_kill_and_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row one picture, or one error; none paid twice but those that were lost; the bytes are those of --local."""
    monkeypatch.setenv("MODEL_NAME", "flux-shapes")
    found = killed_and_resumed(tmp_path, 300)
    assert (found["pictures"], found["errors"], found["rows_of_the_table"]) == (294, 6, 300)
    assert found["errors"] == found["expected_errors"]
    assert found["paid_twice"] == 0
    assert found["never_known"] < 30
    assert found["files_as_local"]
    assert found["calls_above_the_limits"] == 0
    assert found["calls_a_job"] < 10
    assert found["faults_of_the_client"] > 30
    assert found["exit_status"] == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    few, many = (memory(folder, rows) for folder, rows in ((tmp_path / "few", 500), (tmp_path / "many", 2_000)))
    assert many["megabytes_of_pictures"] > 100
    assert many["megabytes"] < few["megabytes"] + 30
    assert many["calls_above_the_limits"] == 0

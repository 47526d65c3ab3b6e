"""`python -m client.batch`: a picture for each row of a file, by an endpoint on RunPod or by this machine.

python -m client.batch prompts.csv --endpoint ID --out outputs/      the API key is RUNPOD_API_KEY
python -m client.batch prompts.csv --local --out outputs/            by handler(), with the model of MODEL_NAME
python -m client.batch prompts.csv --dry-run                         how many pictures, and what is wrong with the rows

A CSV names fields of a request in its first row; a .jsonl has a request on each line; any other file has a prompt on
each line. A picture is named by its file, from the folder of the rows.

Exit status: 0 where every row has its pictures, 1 where some failed, 2 where nothing was done, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from client.errors import ClientError, EndpointUnusable, JobFailed, Unreachable
from client.journal import Entry, Journal, JournalError
from client.output import Line, contact_sheet, save, save_gallery, save_table
from client.pictures import pictures_of
from client.queue import CONCURRENCY, Job, Queue, failure_of
from client.rows import Batch, Drawing, InvalidRows, column, read_batch
from client.transport import URL, Transport
from client.values import each_picture
from src.catalog import FORMATS
from src.errors import InvalidSettings, WorkerError
from src.redaction import redact
from src.request.texts import typed
from src.settings import runpod_api_key

_ON_THE_SHEET = 400  # pictures
_SHEET_SIDE = 4096  # pixels, of the whole sheet at most
_NOT_ASKED = "the answer has no picture of this seed"
_PICTURE_SIDE = 512  # pixels, of one picture on it at most


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    options = _parser().parse_args(arguments)
    try:
        batch = read_batch(options.prompts, _for_all(options.pairs), seeds=options.seeds)
        for warning in batch.warnings:
            _say(f"warning: {warning}")
        if options.dry_run:
            print(_plan(batch, options))
            return 0
        with Journal(options.out, resume=options.resume) as journal:
            return asyncio.run(_Run(batch, journal, options).run())
    except InvalidRows as error:
        for fault in error.faults:
            _say(f"error: {fault}")
        _say("error: nothing was sent, mend these first")
    except (JournalError, InvalidSettings, ClientError, WorkerError, OSError) as error:
        _say(f"error: {_worded(error)}")
    except KeyboardInterrupt:
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client.batch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("prompts", type=Path, help="the file of rows: .csv, .tsv, .jsonl, .json, or text with a prompt on each line")
    add("--endpoint", metavar="ID", help="of the endpoint on RunPod")
    add("--local", action="store_true", help="draw here, by handler() in this process, one picture after the other")
    add("--out", type=Path, default=Path("outputs"), help="folder for the pictures (%(default)s)")
    add("--resume", action="store_true", help="go on with the batch that was begun in --out")
    add("--set", action="append", default=[], dest="pairs", metavar="FIELD=VALUE",
        help="a field of all requests, over what rows say of it; again for more")  # fmt: skip
    add("--seeds", type=_count, default=1, metavar="N",
        help="draw each row with so many seeds, each in a job of its own: its seed and those after it")  # fmt: skip
    add("--concurrency", type=_count, default=CONCURRENCY, metavar="N", help="jobs open at a time (%(default)s)")
    add("--dry-run", action="store_true", help="send nothing: say how many pictures it would be")
    add("--price-per-second", type=_amount, metavar="DOLLARS", help="of a worker: 0.00116 for an H100, say")
    add("--seconds-per-picture", type=_amount, metavar="SECONDS",
        help="for the price before anything is drawn; results.csv of an earlier batch has them")  # fmt: skip
    add("--url", default=URL, help="where RunPod's routes are (%(default)s); of web.py http://127.0.0.1:8080/v2")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1_000:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 1000, got {text!r}")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1
    if not 0 < amount < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return amount


def _for_all(pairs: Sequence[str]) -> dict[str, Any]:
    """The fields that --set names; a picture's file is found from the folder that the command runs in."""
    fields: dict[str, Any] = {}
    faults = []
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = column(name)
        if not equals or not name:
            faults.append(f"--set: must be FIELD=VALUE, got {pair!r}")
        elif name in fields:
            faults.append(f"--set: says {name} more than once")
        else:
            fields[name] = each_picture(name, typed(name, text), _absolute)
    if faults:
        raise InvalidRows(faults)
    return fields


def _absolute(text: str) -> str:
    with suppress(OSError, ValueError):
        if Path(text).is_file():
            return str(Path(text).resolve())
    return text


def _plan(batch: Batch, options: argparse.Namespace) -> str:
    """What a run would be, and its price as far as it can be known."""
    jobs = len(batch.rows) * batch.seeds
    said = f"{len(batch.rows):,} rows make {batch.pictures:,} pictures in {jobs:,} jobs; nothing was sent."
    each, price = options.seconds_per_picture, options.price_per_second
    if price and each:
        seconds = batch.pictures * each
        said += f"\nAt {each:g} s a picture that is {seconds:,.0f} s of a worker, ${seconds * price:,.2f};"
        said += " RunPod bills the starts and the idle seconds of workers too."
    elif price:
        said += "\nIts price depends on the seconds that a picture takes: give --seconds-per-picture (results.csv of a"
        said += " small batch on this endpoint has them)."
    return said


class _Run:
    """One run of the command: what is drawn, and the folder that it comes into."""

    def __init__(self, batch: Batch, journal: Journal, options: argparse.Namespace) -> None:
        self._batch, self._journal, self._options = batch, journal, options
        self._out: Path = options.out
        self._drawings: dict[tuple[int, int], Drawing] = {}
        self._width = max(4, len(str(max(row.number for row in batch.rows))))
        self._bar: _Bar

    async def run(self) -> int:
        """The exit status."""
        if self._options.local == bool(self._options.endpoint):
            raise JournalError("give either --endpoint with the id of an endpoint on RunPod, or --local")
        key = "" if self._options.local else _api_key(self._options.url)
        where = _load() if self._options.local else f"{self._options.url.rstrip('/')}/{self._options.endpoint}"
        self._begin(where)
        jobs = [self._job(drawing) for drawing in self._drawings.values() if not self._is_done(drawing)]
        jobs.sort(key=lambda job: job.id is None)  # what RunPod has already comes first
        status = 0
        self._bar = _Bar(self._batch.pictures, self._done_pictures(), quiet=self._options.quiet)
        with self._bar:
            drawing = self._draw_here(jobs) if self._options.local else self._draw_there(jobs, key)
            task = asyncio.ensure_future(drawing)
            try:
                with _StoppedBySignals(task):
                    await task
            except asyncio.CancelledError:
                status = 130
            except (ClientError, OSError) as error:
                nothing = isinstance(error, (EndpointUnusable, Unreachable)) and not any(
                    map(self._is_done, self._drawings.values())
                )
                status = 2 if nothing else 1
                _say(f"error: {_worded(error)}")
        if status == 2:
            return status
        lines = list(self._lines())
        self._write(lines)
        return self._report(lines, status)

    # ---- before

    def _begin(self, where: str) -> None:
        about = self._journal.about
        picked = {int(number): seed for number, seed in about.get("seeds", {}).items()} or self._batch.picked()
        self._journal.begin(
            {"rows": self._batch.digest, "where": where, "seeds": picked, "begun": about.get("begun", time.time())},
            {
                "rows": f"{self._options.prompts}, --set, --seeds or a picture",
                "where": "--endpoint, --url, --local or its model",
            },
        )
        self._drawings = {drawing.key: drawing for drawing in self._batch.drawings(picked)}
        for drawing in self._drawings.values():
            self._find(drawing)

    def _find(self, drawing: Drawing) -> None:
        """Take the files of a job that was saved when a kill came before the journal's line."""
        entry = self._journal.entries.get(drawing.key)
        if entry and entry.id and not entry.ended:
            begun = float(self._journal.about["begun"])
            names = [self._name(drawing, seed, format.suffix) for format in FORMATS.values() for seed in drawing.seeds]
            there = [name for name in names if _changed(self._out / name) >= begun]
            if len(there) == len(drawing.seeds):
                self._journal.saved(drawing.key, dict(zip(drawing.seeds, there, strict=True)), {}, 0.0)

    def _name(self, drawing: Drawing, seed: int, suffix: str) -> str:
        return f"{drawing.row.number:0{self._width}}-{seed}.{suffix}"

    def _is_done(self, drawing: Drawing) -> bool:
        entry = self._journal.entries.get(drawing.key)
        return bool(entry and entry.ended and not (entry.error and entry.retryable))

    def _done_pictures(self) -> int:
        return sum(drawing.row.pictures for drawing in self._drawings.values() if self._is_done(drawing))

    def _job(self, drawing: Drawing) -> Job:
        entry = self._journal.entries.get(drawing.key, Entry())
        id = None if entry.error else entry.id
        return Job(drawing.key, drawing.input, id=id, resumed=id is not None)

    # ---- drawing

    async def _draw_there(self, jobs: Sequence[Job], key: str) -> None:
        options = self._options
        async with Transport(options.endpoint, key, options.url) as transport:

            async def receive(job: Job, status: Mapping[str, Any]) -> None:
                await self._receive(job, status, transport)

            queue = Queue(
                transport,
                receive,
                concurrency=options.concurrency,
                sent=lambda job: self._journal.sent(job.key, str(job.id)),
                lost=self._lost,
            )
            ended = queue.run(jobs)
            try:
                await self._take(ended)
            finally:
                await ended.aclose()
                if queue.cancelled:
                    _say(f"{queue.cancelled} open jobs were cancelled")
                if again := transport.sent_again:
                    _say(
                        f"{again} jobs were sent again, as no answer told their ids; RunPod may have drawn those twice"
                    )

    async def _draw_here(self, jobs: Sequence[Job]) -> None:
        from handler import answer
        from src.job import Job as LocalJob

        async def ended() -> AsyncGenerator[tuple[Job, JobFailed | None], None]:
            for job in jobs:
                event = {"id": "local", "input": await asyncio.to_thread(job.input)}
                local = LocalJob.of(event)
                drawing = asyncio.ensure_future(asyncio.to_thread(answer, event, local))
                try:
                    output = await asyncio.shield(drawing)
                finally:
                    local.cancel()
                    await asyncio.wait([drawing])
                failure = failure_of({"status": "COMPLETED", "output": output})
                if failure is None:
                    await self._receive(job, {"output": output}, None)
                yield job, failure

        await self._take(ended())

    async def _take(self, ended: AsyncGenerator[tuple[Job, JobFailed | None], None]) -> None:
        async for job, failure in ended:
            if failure is not None:
                self._journal.failed(job.key, str(failure), retryable=failure.retryable)
                self._bar.fail(self._drawings[job.key])
                _say(f"failed: row {job.key[0]}, seed {job.key[1]}: {failure}")

    async def _receive(self, job: Job, status: Mapping[str, Any], transport: Transport | None) -> None:
        """Save what a job brought; only then it is done."""
        drawing = self._drawings[job.key]
        pictures = await pictures_of(status, transport)
        files = {picture.seed: self._name(drawing, picture.seed, picture.suffix) for picture in pictures}
        for picture in pictures:
            await asyncio.to_thread(save, self._out / files[picture.seed], picture.file)
        missing = {seed: pictures.lost.get(seed, _NOT_ASKED) for seed in drawing.seeds if seed not in files}
        self._journal.saved(job.key, files, missing, pictures.seconds)
        for warning in pictures.metadata.get("warnings", ()):
            _say(f"warning: row {drawing.row.number}: {redact(str(warning))}")
        self._bar.update(drawing.row.pictures)

    def _lost(self, job: Job, failure: JobFailed) -> None:
        self._journal.lost(job.key, str(failure))
        _say(f"again: row {job.key[0]}, seed {job.key[1]}: {failure}")

    # ---- afterwards

    def _lines(self) -> Iterator[Line]:
        for drawing in self._drawings.values():
            entry = self._journal.entries.get(drawing.key, Entry())
            if entry.files is None:
                error = entry.error or "not drawn yet: --resume goes on"
                yield Line(drawing.row.number, drawing.seed, "", None, error, drawing.request(drawing.seed))
                continue
            seconds = entry.seconds / len(drawing.seeds) or None
            for seed in drawing.seeds:
                file, error = entry.files.get(seed, ""), entry.lost.get(seed, "")
                yield Line(drawing.row.number, seed, file, seconds, error, drawing.request(seed))

    def _write(self, lines: Sequence[Line]) -> None:
        try:
            save_table(lines, self._out / "results.csv")
            save_gallery(lines, self._out / "index.html", self._options.prompts.name)
            files = [self._out / line.file for line in lines if line.file]
            if len(files) > 1:
                columns = min(round(len(files[:_ON_THE_SHEET]) ** 0.5 + 0.5), 20)
                side = min(_PICTURE_SIDE, _SHEET_SIDE // columns)
                contact_sheet(files[:_ON_THE_SHEET], self._out / "contact-sheet.jpeg", columns=columns, side=side)
                if len(files) > _ON_THE_SHEET:
                    _say(f"contact-sheet.jpeg shows the first {_ON_THE_SHEET} of {len(files):,} pictures")
        except OSError as error:
            _say(f"error: {_worded(error)}; the pictures are there")

    def _report(self, lines: Sequence[Line], status: int) -> int:
        drawn = sum(bool(line.file) for line in lines)
        again = [drawing for drawing in self._drawings.values() if not self._is_done(drawing)]
        failed = sum(bool(line.error) for line in lines)
        said = f"{drawn:,} pictures in {self._out}, see {self._out / 'index.html'}"
        if failed:
            said += f"; {failed:,} without a picture, see {self._out / 'results.csv'}"
        seconds = sum(entry.seconds for entry in self._journal.entries.values())
        if self._options.price_per_second and not self._options.local:
            price = seconds * self._options.price_per_second
            said += f"; they took {seconds:,.1f} s of workers, ${price:,.2f} without starts and idle seconds"
        print(said, flush=True)
        if again:
            _say(f"{len(again):,} jobs are left: the same command with --resume goes on with them")
        return status or (1 if failed else 0)


def _api_key(url: str) -> str:
    """RUNPOD_API_KEY; elsewhere than at RunPod there may be none."""
    key = runpod_api_key()
    if key is None and url == URL:
        raise JournalError(
            "RUNPOD_API_KEY is not set: make a key at https://console.runpod.io/user/settings and export it"
        )
    return key or ""


def _load() -> str:
    """The model, loaded, and which it is."""
    from handler import get_engine
    from src.serving.logs import quiet_libraries

    quiet_libraries()
    engine = get_engine()
    return f"--local with {engine.model.name}, revision {engine.revision}"


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return -1.0


class _StoppedBySignals:
    """Ctrl-C and SIGTERM cancel `task`, and by that its open jobs; a second one leaves those to RunPod."""

    def __init__(self, task: asyncio.Future[None]) -> None:
        self._task, self._asked = task, False

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _stop(self) -> None:
        if not self._asked:
            _say("stopping: open jobs are being cancelled; once more leaves them as they are")
        self._asked = True
        self._task.cancel()


class _Bar(tqdm):  # type: ignore[type-arg]
    """Pictures, how many a minute, how many failed, and the seconds left."""

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        self._failed = 0
        super().__init__(
            total=total,
            initial=done,
            disable=quiet,
            bar_format="{n_fmt}/{total_fmt} pictures |{bar}| {minute} a minute, {failed} failed, {left} left",
        )

    def fail(self, drawing: Drawing) -> None:
        """Its pictures will not come."""
        self._failed += drawing.row.pictures
        self.update(drawing.row.pictures)

    @property
    def format_dict(self) -> dict[str, Any]:
        found = dict(super().format_dict)
        done = found["n"] - found["initial"]
        rate = done / found["elapsed"] if done > 0 and found["elapsed"] else 0.0
        left = f"{(found['total'] - found['n']) / rate:,.0f} s" if rate else "? s"
        return {**found, "minute": f"{60 * rate:.0f}", "failed": self._failed, "left": left}


def _worded(error: Exception) -> str:
    """What went wrong, also where the system says it: a file that is not there, a folder of others, a full disk."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename or 'a file of --out'} cannot be used: {error.strerror or error}"


def _say(line: str) -> None:
    tqdm.write(redact(line), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

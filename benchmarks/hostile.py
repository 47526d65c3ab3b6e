"""`python -m benchmarks.hostile`: requests that are meant to hurt, through the real SDK, with honest jobs among them.

Each is sent to one worker under the stand-in of tests/, and plain jobs with it. Measured: the seconds from its being
taken until its answer, the most memory above what the worker had before (its decoders' processes included), and how
much later than usual the plain jobs were answered. Writes results/hostile.json. Wants an idle machine.
"""

from __future__ import annotations

import base64
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save

from benchmarks.machine import machine
from tests import test_hostile_pictures as pictures
from tests.runpod_stand_in import StandIn, WorkerProcess, worker
from tests.test_fetch import answers, drips_a_handshake, drips_blanks, floods, says_nothing, sends
from tests.web import Web, open_web

RESULTS = Path(__file__).parent / "results"
_HONEST = {"prompt": "a red circle", "seed": 1, "width": 64, "height": 64}
_HONEST_JOBS = 4  # with each hostile one
_OK = b"HTTP/1.1 200 OK\r\n"

LAYER = "transformer.transformer_blocks.0.attn.to_q"

Input = Any  # of an event
Cases = dict[str, Callable[[], Input]]


def _with(**fields: Any) -> Callable[[], Input]:
    return lambda: {"prompt": "a red circle", **fields}


def text_cases() -> Cases:
    """Foreign text of up to 5 MB, wherever it gets into a message or a pattern."""
    long = 64_000
    return {
        "sig x 64,000 in an address": _with(init_image="https:///?" + "sig" * long),
        "token= without end": _with(init_image="https://a/?" + "token" * long),
        "://a:a:a": _with(init_image="https://" + "a:" * long),
        "@ without end": _with(init_image="https://" + "@" * 200_000),
        "Bearer without end": _with(lora_path="Bearer " * long),
        "key=key=": _with(lora_path="https://x/?" + "key=" * long),
        "hf_ without end": _with(lora_path="hf_" * long),
        "weight_name": _with(loras=[{"path": "a/b", "weight_name": "sig" * long}]),
        "revision": _with(loras=[{"path": "a/b", "revision": "secret-" * long}]),
        "an address of 5 MB": _with(init_image="https://example.com/" + "a" * 5_000_000),
        "data:;a;a": _with(init_image="data:" + ";a" * 10_000_000),
        "data: of commas": _with(init_image="data:" + "," * 10_000_000),
        "data: of quotes": _with(init_image='data:"' * 2_000_000),
        "% without end": _with(init_image="%" * 10_000_000),
        "%41 without end": _with(init_image="%41" * 5_000_000),
        "blanks of every kind": _with(init_image="\u2003" * 5_000_000),
        "backslashes": _with(init_image="\\" * 10_000_000),
        "base64 with a strange end": _with(init_image="A" * 20_000_000 + "\u00e9"),
        "a prompt of 5 MB": _with(prompt="sig=" * 1_200_000),
        "a prompt of surrogates": _with(prompt="\ud800" * 1_000_000),
        "a scheduler of 1 MB": _with(scheduler="euler" * 200_000),
        "an id within an id": _with(lora_path="a/" * 500_000),
        "dots": _with(lora_path="." * 1_000_000),
    }


def request_cases() -> Cases:
    """Objects and lists of many items, and values that no field has."""
    many = {f"k{i}": i for i in range(200_000)}
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    values: Mapping[str, Any] = {
        "200,000 keys": many,
        "200,000 keys in outpaint": {"outpaint": many, "init_image": "x"},
        "200,000 keys in four controls": {"controls": [many] * 4},
        "200,000 loras": {"loras": [{"path": "a/b"}] * 200_000},
        "200,000 unknown loras": {"loras": [{f"k{i}": 1} for i in range(200_000)]},
        "200,000 pictures": {"init_images": ["x"] * 200_000},
        "200,000 prompts": {"prompt": ["x"] * 200_000},
        "200,000 seeds": {"seed": list(range(200_000))},
        "a million sigmas": {"sigmas": [0.5] * 1_000_000},
        "a list of lists": {"loras": [[[]] * 1_000] * 100},
        "nested 900 times": {"loras": deep},
        "the same in the prompt": {"prompt": deep},
        "an integer of 4,000 digits": {"seed": 10**3_999},
        "an integer of 400,000 digits": {"seed": "1" * 400_000},
        "not a number": {"guidance_scale": float("nan")},
        "infinity": {"width": float("inf")},
        "keys like fields": {f"widt{'h' * i}": 1 for i in range(5_000)},
        "keys of 5 kB": {"x" * 5_000 + str(i): 1 for i in range(500)},
        "controls of controls": {"controls": [{"controls": [{"controls": [{}] * 100}] * 100}] * 10},
        "a key of 5 MB": {"x" * 5_000_000: 1},
        "every alias twice": {"image": "x", "init_image": "y", "image_url": "z", "lora": 1, "loras": 2, "lora_url": 3},
        "sizes of a million": {"width": 10**6, "height": 10**6, "num_images": 10**6, "num_inference_steps": 10**6},
    }
    return {name: _with(**value) for name, value in values.items()}


def picture_cases() -> Cases:
    """Files that are small and take long, or much memory, to decode."""
    makers: Mapping[str, Callable[[], bytes]] = {
        "2,800 scans": lambda: pictures.scans(2_800, 2_000),
        "100 scans of 8,000 x 8,000": lambda: pictures.scans(100, 8_000),
        "15 MB of 0xFF": lambda: b"\xff\xd8" + b"\xff" * 15_000_000,
        "0xFF within a scan": lambda: pictures.jpeg(inside=b"\xff" * 15_000_000),
        "4,700,000 comments": lambda: pictures.jpeg(b"\xff\xfe\0\2" * 4_700_000),
        "a million chunks": lambda: pictures.png(pictures.chunk(b"tEXt", b"a\0b") * 1_000_000),
        "1,600,000 empty IDATs": lambda: pictures.png(pictures.chunk(b"IDAT") * 1_600_000),
        "15 GB of zTXt": lambda: pictures.png(pictures.chunk(b"zTXt", b"\0\0" + pictures.UNPACKED) * 15_000),
        "15 GB of ICC profiles": lambda: pictures.png(pictures.chunk(b"iCCP", b"a\0\0" + pictures.UNPACKED) * 15_000),
        "a million EXIF entries": lambda: pictures.png(pictures.chunk(b"eXIf", pictures.exif(0x112, 3, 1_000_000))),
        "10,000 frames": lambda: pictures.frames(10_000),
        "a million WEBP chunks": lambda: pictures.webp(*[(b"abcd", b"")] * 1_000_000),
        "3,000,000 pages": lambda: pictures.directories(3_000_000),
        "a million strips": lambda: pictures.tiff(16, 1_000_000, {273: (4, 1_000_000, 0)}),
        "strips a byte apart": lambda: pictures.strips_a_byte_apart(1_000),
        "a tile of 16,384 x 16,384": lambda: pictures.tile(16_384),
        "56,000,000 pixels in runs": lambda: pictures.bmp(8_000, b"\1\10" * 7_000_000),
        "7,400,000 pixels in runs of one": lambda: pictures.bmp(2_800, b"\1\2" * 7_400_000),
        "9,000,000 runs": lambda: pictures.bmp(1_000, b"\1\2" * 500 + b"\1\1" * 9_000_000),
        "19,000 boxes in each other": lambda: pictures.nested(19_000),
        "2,400,000 boxes": lambda: pictures.HEIC + b"\0\0\0\x08free" * 2_400_000,
        "a decoder that crashes": lambda: pictures.HEIC[:176] + b"\xa2" + pictures.HEIC[177:],
        "noise of 15 MB": lambda: b"\x89PNG\r\n\x1a\n" + np.random.default_rng(0).bytes(15_000_000),
    }

    def sent(make: Callable[[], bytes]) -> Input:
        return {"prompt": "x", "init_image": base64.b64encode(make()).decode()}

    return {name: partial(sent, make) for name, make in makers.items()}


def server_cases(web: Web) -> Cases:
    """Servers that drip, flood or lie; each may take its 30 seconds, and nobody else's."""
    behaviours = {
        "says nothing": says_nothing,
        "drips a handshake": drips_a_handshake,
        "drips blanks": drips_blanks,
        "drips a status line": sends(b"HTTP/1.1 200 OK" * 1_000),
        "drips a header": sends(_OK + b"a: " + b"b" * 10_000),
        "drips a body": sends(_OK + b"Content-Length: 100000\r\n\r\n" + b"x" * 10_000),
        "drips chunk sizes": sends(_OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 10_000),
        "100 Continue for ever": floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "trailers for ever": floods(_OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
        "headers for ever": floods(_OK, b"a: b\r\n"),
        "chunks of nothing": floods(_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        "a body for ever": floods(_OK + b"\r\n", bytes(1_000_000)),
        "garbage": answers(b"\0\1\2" * 100),
        "hangs up": answers(b""),
        "less than it says": answers(_OK + b"Content-Length: 1000\r\n\r\nx"),
        "304 unasked": answers(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        "a redirect to http": answers(b"HTTP/1.1 302 Found\r\nLocation: http://localhost/\r\n\r\n"),
        "a redirect to a file": answers(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"),
        "a redirect to metadata": answers(b"HTTP/1.1 302 Found\r\nLocation: https://169.254.169.254/\r\n\r\n"),
        "a page": answers(_OK + b"Content-Type: text/html\r\n\r\n<html>" + b"x" * 100_000),
    }
    urls = {name: web.behave("localhost/x.png", behaviour) for name, behaviour in behaviours.items()}
    return {name: _with(init_image=url) for name, url in urls.items()}


def adapter_cases(folder: Path) -> Cases:
    """Files whose headers, names, ranks or values are meant to hurt."""

    def header(text: bytes, body: bytes = b"") -> bytes:
        return len(text).to_bytes(8, "little") + text + body

    def lora(rank: int, name: str = LAYER) -> dict[str, Any]:
        return {
            f"{name}.lora_A.weight": np.zeros((rank, 128), np.float32),
            f"{name}.lora_B.weight": np.zeros((128, rank), np.float32),
        }

    def names(count: int, each: Callable[[int], str]) -> bytes:
        found = {each(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
        return header(json.dumps(found).encode())

    files: Mapping[str, Callable[[], bytes]] = {
        "a name of 40 kB": lambda: save({"sig" * 13_000 + ".lora_A.weight": np.zeros((4, 4), np.float32)}),
        "a name of 4 MB": lambda: save({"secret-" * 600_000: np.zeros((4, 4), np.float32)}),
        "a name of dots": lambda: save({"." * 1_000_000: np.zeros((4, 4), np.float32)}),
        "a million names": lambda: names(1_000_000, "lora_unet_{}".format),
        "100,000 layers": lambda: names(100_000, "transformer.x{}.lora_A.weight".format),
        "a header of 99 MB": lambda: header(b'{"a":"' + b"x" * 99_000_000 + b'"}'),
        "a header of brackets": lambda: header(b"[" * 1_000_000),
        "a header nested deeply": lambda: header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "metadata of 10 MB": lambda: save(lora(4), metadata={"a": "x" * 10_000_000}),
        "metadata nested deeply": lambda: save(lora(4), metadata={"lora_adapter_metadata": "[" * 100_000}),
        "a rank of 4,096": lambda: save(lora(4_096)),
        "rank 0": lambda: save(lora(0)),
        "a tensor of 0 dimensions": lambda: save({f"{LAYER}.lora_A.weight": np.zeros((), np.float32)}),
        "integers": lambda: save({name: tensor.astype(np.int8) for name, tensor in lora(4).items()}),
        "not numbers": lambda: save({name: tensor + np.float32("nan") for name, tensor in lora(4).items()}),
        "lengths of 2^63": lambda: header(b'{"a":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]}}'),
        "a header longer than the file": lambda: (2**62).to_bytes(8, "little") + b"{}",
        "an empty file": lambda: b"",
        "a page": lambda: b"<!DOCTYPE html>" * 100_000,
        "a pickle": lambda: b"\x80\x02}q\x00." * 1_000,
        "mixed kinds": lambda: save(
            lora(4) | {"transformer.transformer_blocks.0.attn.to_q.hada_w1_a": np.zeros((4, 4))}
        ),
    }
    cases: Cases = {}
    for number, (name, make) in enumerate(files.items()):
        (folder / f"{number}.safetensors").write_bytes(make())
        cases[name] = _with(lora_path=f"{number}.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    return cases | {
        "a loop of links": _with(lora_path="loop.safetensors"),
        "a folder": _with(lora_path="folder.safetensors"),
    }


class Watch:
    """The most memory of a process and of those that it started, while the block runs, above what it had before."""

    def __init__(self, process: psutil.Process) -> None:
        self.megabytes = 0.0
        self._process = process
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        self._before = self._process.memory_info().rss
        self._of_children = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        most = next(int(line.split()[1]) * 1_024 for line in status if line.startswith("VmHWM"))
        self.megabytes = (most - self._before + self._of_children) / 1e6

    def _look(self) -> None:
        known = {child.pid for child in self._process.children(recursive=True)}  # the SDK's process for pings
        while not self._done.wait(0.02):
            total = 0
            for child in self._process.children(recursive=True):
                if child.pid not in known:
                    try:
                        total += child.memory_info().rss
                    except psutil.NoSuchProcess:
                        continue
            self._of_children = max(self._of_children, total)


def measure(stand_in: StandIn, process: WorkerProcess, make: Callable[[], Input], usual: float) -> dict[str, Any]:
    """One hostile job, and honest ones with it."""
    input = make()
    with Watch(psutil.Process(process.process.pid)) as watch:
        id = stand_in.submit_as("", input)
        honest = []
        for _ in range(_HONEST_JOBS):
            honest.append((time.time(), stand_in.submit(**_HONEST)))
            time.sleep(0.3)
        waits = [stand_in.wait(other)[0].results[0][0] - at for at, other in honest]
        (job,) = stand_in.wait(id)
    job.input = None
    posted = job.results[0][1]
    return {
        "seconds": round(job.results[0][0] - job.taken[0], 2),
        "megabytes": round(watch.megabytes),
        "honest_delay": round(max(0.0, max(waits) - usual), 2),
        "code": posted.get("error", "success: ").partition(":")[0],
        "answer": posted.get("error", "")[:200],
        "answer_bytes": len(json.dumps(posted)) if "error" in posted else 0,
    }


@contextmanager
def serving(folder: Path) -> Iterator[tuple[StandIn, WorkerProcess, Web, Path]]:
    """A worker that may ask this machine's servers, and its LORA_DIR."""
    loras = folder / "loras"
    loras.mkdir()
    with pytest.MonkeyPatch.context() as patch, open_web(folder, patch, "localhost") as web:
        stand_in = StandIn(max_body=50_000_000)
        with worker(stand_in, folder / "log", LORA_DIR=str(loras)) as process:
            yield stand_in, process, web, loras
        stand_in.close()


def main() -> None:
    results: dict[str, Any] = {"machine": machine(), "kinds": {}}
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as (stand_in, process, web, loras):
        waits = []
        for _ in range(30):
            began = time.time()
            waits.append(stand_in.wait(stand_in.submit(**_HONEST))[0].results[0][0] - began)
        usual = results["usual_seconds"] = round(statistics.median(waits[5:]), 3)
        kinds = {
            "text": text_cases(),
            "requests": request_cases(),
            "pictures": picture_cases(),
            "adapters": adapter_cases(loras),
            "servers": server_cases(web),
        }
        for kind, cases in kinds.items():
            for case, make in cases.items():
                row = measure(stand_in, process, make, usual)
                results["kinds"].setdefault(kind, {})[case] = row
                print(f"{kind:9} {case:32} {json.dumps(row)}", flush=True)
    (RESULTS / "hostile.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

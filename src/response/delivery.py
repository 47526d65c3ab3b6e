"""Pictures -> the response that RunPod carries to the client, whole: by URL, in base64, or smaller with a warning.

Knows nothing of how pictures are made.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from src import __version__
from src.catalog import FORMATS, Model
from src.errors import ResponseTooLarge, WorkerError, WorkerUnavailable
from src.job import Job, Progress
from src.outputs import Generation
from src.plan.plan import Plan
from src.redaction import hide_known_in, redact
from src.response.encode import can_carry, encode_image
from src.response.storage import UPLOAD_SECONDS, Bucket

log = logging.getLogger("worker")
T = TypeVar("T")

_SIDE_BY_SIDE = 4  # pictures of one response
_ROOM_FOR_WORDS = 2_000  # bytes kept free for the warnings that come with smaller pictures


@dataclass(frozen=True)
class Coding:
    """One way to write a picture's file."""

    format: str
    quality: int
    lossless: bool = False

    def __str__(self) -> str:
        if not FORMATS[self.format].quality:
            return self.format
        return f"lossless {self.format}" if self.lossless else f"{self.format} of quality {self.quality}"

    def smaller(self) -> Iterator[Coding]:
        """Ways that need fewer bytes, the best picture first."""
        keeps_pixels = not FORMATS[self.format].quality
        if keeps_pixels:
            yield Coding("WEBP", 100, lossless=True)
        for quality in (95, 90, 85):
            if keeps_pixels or quality < self.quality:
                yield Coding("JPEG" if keeps_pixels else self.format, quality)


class Base64(str):
    """A picture in base64; who prints it, as the SDK's debug log does with results, gets its size instead."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self):,} characters of base64>"


def deliver(
    generation: Generation,
    plan: Plan,
    model: Model,
    revision: str | None,
    *,
    job: Job,
    bucket: Bucket | None = None,
    max_bytes: int = 10_000_000,
) -> dict[str, Any]:
    """The contract's success: URLs where there is a `bucket`, else base64, in the order of the seeds.

    Each picture's file carries the event that makes that one picture again, and the model that made it: a prompt that
    was upsampled stands there as it was drawn, and beside it what was sent, as `original_prompt`. A picture
    that cannot be uploaded travels in base64, and then `images` and `image_urls` hold null for each other's. What
    would make more than `max_bytes` of JSON is encoded smaller. The metadata's warnings say both. Raises
    ResponseTooLarge where nothing helps, WorkerUnavailable where the worker's bucket would have.
    """
    # 1. What the files and the metadata say
    more = {"base_model": model.base_model, "quantization": generation.quantization}
    made_by = {"model": model.name, "model_revision": revision, **{name: said for name, said in more.items() if said}}
    nets = {"controlnets": [control.network for control in plan.controls if control.net]} if plan.controls else {}
    timings = {"queued": job.seconds.get("queued", 0.0), **generation.timings}
    warnings = [*plan.warnings, *generation.warnings]
    parameters = hide_known_in([{**each, **made_by, **nets} for each in _events(generation, plan)])

    # 2. Files, as they were asked for
    def encode(which: Iterable[int], coding: Coding) -> dict[int, bytes]:
        def one(i: int) -> bytes:
            job.check()
            picture = generation.pictures[i]
            return encode_image(picture, coding.format, coding.quality, parameters[i], lossless=coding.lossless)

        job.report(Progress("encode_images"))
        with _timed(timings, "encode_images"):
            return _side_by_side(one, which)

    asked = Coding(plan.sampling.output_format, plan.sampling.output_quality)
    carried = encode(range(len(plan.seeds)), asked)

    # 3. Into the bucket, where there is one
    urls, failures = dict[int, str](), dict[int, str]()
    if bucket is not None and bucket.no_links:
        warnings.append(f"pictures are here in base64, as nobody could fetch them from the bucket: {bucket.no_links}")
    elif bucket is not None:
        job.report(Progress("upload"))
        with _timed(timings, "upload"):
            urls, failures = _upload(bucket, job, plan, carried)
        warnings += (f"picture {i} is here in base64: its upload failed ({reason})" for i, reason in failures.items())
        carried = {i: file for i, file in carried.items() if i not in urls}

    # 4. Into the response, smaller where it would be too large
    metadata = hide_known_in({**made_by, "worker_version": __version__, **_metadata(generation, plan)})
    response: dict[str, Any] = {"status": "success", "metadata": metadata}
    if urls:
        response["image_urls"] = [urls.get(i) for i in range(len(plan.seeds))]
    room = (
        max_bytes - len(json.dumps({"output": response}, ensure_ascii=False).encode(errors="replace")) - _ROOM_FOR_WORDS
    )
    used = asked
    for coding in asked.smaller():
        if _carried_bytes(carried) <= room:
            break
        carried, used = encode(carried, coding), coding
    if _carried_bytes(carried) > room:
        if not urls:
            raise _too_large(plan, carried, used, max_bytes, failures if bucket and not bucket.brought else {})
        warnings.append(
            f"picture(s) {sorted(carried)} are lost: neither uploaded nor small enough; ask for their seeds"
        )
        carried = {}
    elif used != asked:
        metadata |= {"output_format": used.format, "output_quality": used.quality}
        warnings.append(
            f"{len(carried)} picture(s) came as {used} instead of {asked}: a response may have {max_bytes / 1e6:g} MB"
        )
    if not all(can_carry(used.format, each) for each in parameters):
        warnings.append(f"files do not carry this request: a {used.format} has no room for it")
    if carried:
        texts = {i: Base64(base64.b64encode(file), "ascii") for i, file in carried.items()}
        response["images"] = [texts.get(i) for i in range(len(plan.seeds))]
    timings["total"] = sum(timings.values())
    metadata["timings"] = {phase: round(seconds, 4) for phase, seconds in timings.items()}
    metadata["warnings"] = hide_known_in(warnings)
    return response


def _metadata(generation: Generation, plan: Plan) -> dict[str, Any]:
    """What was decided, under the request's names, and what became of it."""
    return {
        "mode": plan.mode,
        **plan.sampling.values(),
        "prompt": _one_or_each(plan.prompts),
        "upsampled_prompt": _one_or_each(generation.prompts) if plan.sampling.prompt_upsampling else None,
        "prompt_tokens": generation.prompt_tokens,
        "seeds": list(plan.seeds),
        "num_images": len(plan.seeds),
        "scheduler": generation.scheduler,
        "profile": generation.profile,
        "quantization": generation.quantization,
        "loras": [adapter.summary() for adapter in plan.adapters],
        "controls": [
            {"type": control.type, "controlnet": control.network, "scale": control.scale} for control in plan.controls
        ],
        "inference_time": round(sum(generation.timings.values()), 4),
        "device": generation.device,
        "peak_memory": generation.peak_memory,
    }


def _events(generation: Generation, plan: Plan) -> Iterator[dict[str, Any]]:
    """For each picture the event that makes it again, and the prompt that was sent where another one was drawn."""
    upsampled = plan.sampling.prompt_upsampling
    drawn = plan.upsampled(generation.prompts) if upsampled else plan
    for i, prompt in enumerate(plan.prompts):
        yield {"input": drawn.parameters(i), **({"original_prompt": prompt} if upsampled else {})}


def _one_or_each(prompts: Sequence[str]) -> str | list[str]:
    """A prompt of all pictures, or one a picture."""
    return prompts[0] if len(set(prompts)) == 1 else list(prompts)


def _upload(bucket: Bucket, job: Job, plan: Plan, files: Mapping[int, bytes]) -> tuple[dict[int, str], dict[int, str]]:
    """The signed URLs of the pictures that arrived, and why the others did not."""
    from src.response.connections import in_time  # with botocore, which only those pay for who have a bucket

    format = FORMATS[plan.sampling.output_format]
    folder = re.sub(r"[^\w.-]", "_", job.id)[:100]

    def one(i: int) -> str:
        return bucket.upload(files[i], f"{folder}/{plan.seeds[i]}.{format.suffix}", format.mime)

    outcomes = in_time({i: partial(one, i) for i in files}, UPLOAD_SECONDS, job.check)
    failures = {i: outcome for i, outcome in outcomes.items() if isinstance(outcome, Exception)}
    for i, error in failures.items():
        # The picture is made, and has another way to go.
        level = logging.WARNING if bucket.brought else logging.ERROR
        log.log(level, "job %s: upload of picture %d failed: %s", job.id, i, redact(str(error)))
    urls = {i: outcome for i, outcome in outcomes.items() if isinstance(outcome, str)}
    return urls, {i: type(error).__name__ for i, error in failures.items()}


def _side_by_side(work: Callable[[int], T], which: Iterable[int]) -> dict[int, T]:
    """`work` of each, in threads: Pillow lets go of the interpreter; fpng, soon done, does not.

    This thread works too, and does it all where there are no others to be had.
    """
    numbers = list(which)
    waiting, done, failures = iter(numbers), dict[int, T](), list[BaseException]()

    def take() -> None:
        try:
            for i in waiting:
                done[i] = work(i)
                if failures:
                    return
        except BaseException as error:  # noqa: BLE001 - it is raised again where the work came from
            failures.append(error)

    helpers = [Thread(target=take, name="encode") for _ in range(min(len(numbers), _SIDE_BY_SIDE) - 1)]
    started = []
    with suppress(RuntimeError):  # no more threads
        for helper in helpers:
            helper.start()
            started.append(helper)
    take()
    for helper in started:
        helper.join()
    if failures:
        try:
            raise failures[0]
        finally:
            failures.clear()  # an error would hold this frame, and this frame the error
    return {i: done[i] for i in numbers}


def _carried_bytes(files: Mapping[int, bytes]) -> int:
    """In base64, as JSON writes it."""
    return sum(-(-len(file) // 3) * 4 + len('"", ') for file in files.values())


def _too_large(
    plan: Plan, files: Mapping[int, bytes], coding: Coding, max_bytes: int, not_uploaded: Mapping[int, str]
) -> WorkerError:
    size = f"{plan.sampling.width}x{plan.sampling.height}"
    pictures = f"{len(files)} picture(s) of {size} take {_carried_bytes(files) / 1e6:.1f} MB even as {coding}"
    room, seeds = f"a response may have {max_bytes / 1e6:g} MB", f"the seeds were {list(plan.seeds)}"
    if not_uploaded:
        reasons = ", ".join(sorted(set(not_uploaded.values())))
        return WorkerUnavailable(
            f"the worker's bucket took none of the pictures ({reasons}); {pictures}, and {room}; send the request "
            f"again; {seeds}"
        )
    return ResponseTooLarge(
        f"{pictures}, and {room} (MAX_RESPONSE_MB); ask for fewer or smaller pictures, for JPEG of a lower "
        "output_quality, or set BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY on the worker; "
        f"{seeds}"
    )


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[phase] = timings.get(phase, 0.0) + time.perf_counter() - started


def encodable(answer: T) -> T:
    """`answer` as UTF-8 can carry it: half a character, which JSON may hold, is a question mark."""
    found: Any = answer
    if isinstance(answer, str):
        found = answer if answer.isascii() else answer.encode(errors="replace").decode()
    elif isinstance(answer, dict):
        found = {encodable(name): encodable(value) for name, value in answer.items()}
    elif isinstance(answer, (list, tuple)):
        found = type(answer)(map(encodable, answer))
    return found  # type: ignore[no-any-return]

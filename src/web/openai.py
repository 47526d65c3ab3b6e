"""OpenAI's routes over HTTP: JSON, forms with pictures, and pictures that are on their way as server-sent events.

Each call is a job of the endpoint's, in the form in which RunPod passes such calls on.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from src.request.openai import EDITS, GENERATIONS, MODELS
from src.request.schema import MAX_PICTURES, MAX_PROMPT_CHARACTERS
from src.request.texts import typed
from src.response.openai import http_status
from src.web.bodies import BadBody, Bodies, parse
from src.web.endpoint import FINAL, RunPodEndpoint, UnknownJob

VARIATIONS = "/v1/images/variations"
_GENERATIONS_BYTES, _EDITS_BYTES = 20_000_000, 50_000_000
_MOST_FIELDS = 100  # of a form
_PATIENCE = 5  # of the endpoint's looks at a job, between two at whether anybody still waits
# What an event of a stream begins with.
_KINDS: Mapping[str, str] = {GENERATIONS: "image_generation", EDITS: "image_edit"}
# Fields of OpenAI's forms that are no text, and no other name of ours.
_NO_TEXT = frozenset({"stream", "partial_images"})


class Failed(Exception):
    """A call that failed; `error` is OpenAI's object."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = dict(error)

    @classmethod
    def field(cls, name: str, message: str) -> Failed:
        """What is wrong with one field."""
        return cls(_error(f"{name}: {message}", "invalid_request", name))


def add_openai(app: FastAPI, endpoint: RunPodEndpoint, bodies: Bodies) -> None:
    """OpenAI's routes, below /v1."""

    @app.exception_handler(Failed)
    async def failed(_: HttpRequest, failure: Failed) -> Response:
        status = http_status(failure.error)
        # Its client tries again at any of 5xx, and would pay for the same failure again.
        again = {"x-should-retry": "true" if status == 503 else "false"}
        return JSONResponse({"error": failure.error}, status, again)

    @app.get(MODELS)
    async def models(request: HttpRequest) -> Response:
        return JSONResponse(await _answer(endpoint, request, {"openai_route": MODELS}))

    @app.get(f"{MODELS}/{{name:path}}")
    async def model(request: HttpRequest, name: str) -> Response:
        return JSONResponse(await _answer(endpoint, request, {"openai_route": f"{MODELS}/{name}"}))

    @app.post(GENERATIONS)
    async def generations(request: HttpRequest) -> Response:
        fields, size = await bodies.read_json(request, _GENERATIONS_BYTES)
        return await _draw(endpoint, request, GENERATIONS, fields, size)

    @app.post(EDITS)
    @app.post(VARIATIONS)
    async def edits(request: HttpRequest) -> Response:
        fields, size = await _form(request, bodies)
        return await _draw(endpoint, request, request.url.path, fields, size)


async def _draw(
    endpoint: RunPodEndpoint, request: HttpRequest, route: str, fields: dict[str, Any], size: int
) -> Response:
    """Pictures, whole or as a stream."""
    if type(stream := fields.pop("stream", None) or False) is not bool:
        raise Failed.field("stream", "must be true or false")
    call = {"openai_route": route, "openai_input": fields}
    if not stream:
        return JSONResponse(await _answer(endpoint, request, call, size))
    events = _events(endpoint, request, call, size)
    first = await anext(events)  # what is wrong of a request is said before a stream begins
    return StreamingResponse(_chain(first, events), media_type="text/event-stream")


async def _answer(
    endpoint: RunPodEndpoint, request: HttpRequest, call: Mapping[str, Any], size: int = 0
) -> dict[str, Any]:
    """What the job of `call` answers; the job is cancelled where nobody waits for it any more."""
    answered: dict[str, Any] = {}
    async for state in _follow(endpoint, request, call, size, _PATIENCE * endpoint.poll_seconds):
        answered = state
    return _unwrapped(answered)


async def _follow(
    endpoint: RunPodEndpoint, request: HttpRequest, call: Mapping[str, Any], size: int, pause: float
) -> AsyncIterator[dict[str, Any]]:
    """What /status tells of the job of `call`, every `pause` seconds, and at last its end."""
    id = await endpoint.run({"input": call}, size)
    state: dict[str, Any] = {}
    try:
        while state.get("status") not in FINAL:
            state = json.loads(await endpoint.wait(id, pause))
            yield state
            if state.get("status") not in FINAL and await request.is_disconnected():
                return
    except UnknownJob:
        raise Failed(_error("the result is not kept any more", "worker_unavailable")) from None
    finally:
        if state.get("status") not in FINAL:  # on a task of its own: this one may be cancelled itself
            _cancelling.add(cancelling := asyncio.ensure_future(_cancel(endpoint, id)))
            cancelling.add_done_callback(_cancelling.discard)


_cancelling: set[asyncio.Future[None]] = set()  # or nobody would hold them


async def _cancel(endpoint: RunPodEndpoint, id: str) -> None:
    with suppress(UnknownJob):
        await endpoint.cancel(id)


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's object in the end of a job; raises Failed where it failed."""
    output = state.get("output")
    if state.get("status") == "COMPLETED":
        answered = output[0] if isinstance(output, list) and len(output) == 1 else output
        if isinstance(answered, dict):
            return answered
    if state.get("status") == "TIMED_OUT":
        raise Failed(_error("the endpoint ended the job, which took longer than it lets one take", "timed_out"))
    if state.get("status") == "FAILED":
        raise Failed(_failure(state.get("error")))
    raise Failed(_error("the job was cancelled: this server is ending", "cancelled"))


def _failure(error: object) -> dict[str, Any]:
    """OpenAI's object in the text of a job's error, or one made of it."""
    try:
        found = json.loads(error) if isinstance(error, str) else error
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("message"), str):
        return found
    return _error(str(error)[:1_000], "internal_error")


def _error(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    error: dict[str, Any] = {"message": message, "type": "server_error", "param": param, "code": code}
    if http_status(error) < 500:
        error["type"] = "invalid_request_error"
    return error


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    try:
        async for event in rest:
            yield event
    except Failed as failure:
        yield _event("error", {"error": failure.error})


async def _events(
    endpoint: RunPodEndpoint, request: HttpRequest, call: Mapping[str, Any], size: int
) -> AsyncIterator[bytes]:
    """Server-sent events: partial_images at most, evenly over the steps, then each picture that is done."""
    kind, fields = _KINDS.get(call["openai_route"], "image_edit"), call["openai_input"]
    partial = fields.get("partial_images") or 0
    sent, shown, state = 0, None, dict[str, Any]()
    async for state in _follow(endpoint, request, call, size, endpoint.poll_seconds):
        progress = state.get("output")
        if state.get("status") != "IN_PROGRESS" or not isinstance(progress, dict):
            continue
        preview, step, steps = progress.get("preview"), progress.get("step") or 0, progress.get("steps") or 0
        if preview and preview != shown and sent < partial and step * (partial + 1) >= steps * (sent + 1):
            picture = {"b64_json": preview, "output_format": "jpeg", "size": _size(preview), "background": "opaque"}
            about = {"quality": fields.get("quality") or "auto", "created_at": int(time.time())}
            yield _event(f"{kind}.partial_image", {**picture, **about, "partial_image_index": sent})
            sent, shown = sent + 1, preview
    answered = _unwrapped(state)
    about = {
        name: answered.get(name) for name in ("background", "output_format", "quality", "size", "model", "warnings")
    }
    usage = _share(answered.get("usage"), len(answered.get("data", ())))
    for picture in answered.get("data", ()):
        done = {**picture, **about, "created_at": answered["created"], "usage": usage}
        yield _event(f"{kind}.completed", done)


def _share(usage: Any, pictures: int) -> Any:
    """What one of so many pictures took."""
    if isinstance(usage, dict):
        return {name: _share(value, pictures) for name, value in usage.items()}
    return usage // pictures if isinstance(usage, int) else usage


def _size(preview: str) -> str:
    """The sides of a picture in base64."""
    with Image.open(io.BytesIO(base64.b64decode(preview))) as picture:
        return f"{picture.width}x{picture.height}"


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


async def _form(request: HttpRequest, bodies: Bodies) -> tuple[dict[str, Any], int]:
    """The fields of a form or of JSON, pictures in base64, and the bytes that they took."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await bodies.read_json(request, _EDITS_BYTES)
    if kind != "multipart/form-data":
        raise BadBody(415, "the header Content-Type must be multipart/form-data or application/json")
    body = await bodies.read(request, _EDITS_BYTES)

    async def whole() -> AsyncGenerator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers, whole(), max_files=MAX_PICTURES + 5, max_fields=_MOST_FIELDS, max_part_size=_EDITS_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise BadBody(400, f"the form cannot be read: {error.message}") from None
    except Exception as error:
        raise BadBody(400, f"the form cannot be read: {type(error).__name__}") from error
    try:
        return await _fields(form), len(body)
    finally:
        await form.close()


async def _fields(form: FormData) -> dict[str, Any]:
    """What a form holds, under JSON's names: files in base64, and several of one name as a list."""
    fields: dict[str, Any] = {}
    pictures: dict[str, list[str]] = {}
    for written, value in form.multi_items():
        name = written.removesuffix("[]")
        if isinstance(value, UploadFile):
            if not (file := await value.read()):
                raise Failed.field(name, "is an empty file; send a picture, or leave it out")
            pictures.setdefault(name, []).append(base64.b64encode(file).decode())
        elif name in fields:
            raise Failed.field(name, "is sent twice; send it once")
        else:
            fields[name] = read_text(name, value)
    for name, several in pictures.items():
        if name in fields:
            raise Failed.field(name, "is sent as a file and as text; send one of them")
        if len(several) > 1 and name not in ("image", "images", "init_images"):
            raise Failed.field(name, f"must be one file, and there are {len(several)}")
        fields[name] = several if len(several) > 1 else several[0]
    return fields


def read_text(name: str, text: str) -> Any:
    """What the text of a form means: numbers, truth and lists where the field takes such, as JSON writes them."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        return text
    if name not in _NO_TEXT:
        return typed(name, text)
    try:
        return parse(f'{{"value": {text}}}'.encode())["value"]
    except BadBody:
        return text

"""The routes: the page, RunPod's for one endpoint, and what a picture's file says of itself."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from src.catalog import FORMATS
from src.request.bounds import measure
from src.response.encode import read_parameters
from src.web.bodies import BadBody, Bodies
from src.web.endpoint import NotAnswered, RunPodEndpoint, UnknownJob
from src.web.guard import Guard, failure
from src.web.openai import add_openai

PAGE = Path(__file__).parent / "page"
# https://docs.runpod.io/serverless/endpoints/send-requests
RUN_BYTES, RUNSYNC_BYTES = 10_000_000, 20_000_000
RUNSYNC_SECONDS = 90.0  # until /runsync answers with what is known, and the job goes on
PICTURE_BYTES = 60_000_000  # of a file that may carry its request: 4 megapixels of noise as PNG, and room
_ID = re.compile(r"[\w-]{1,100}", re.ASCII)
_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


def make_app(
    endpoint: RunPodEndpoint,
    *,
    token: str | None = None,
    api: str | None = None,
    page: Path = PAGE,
    bodies: Bodies | None = None,
) -> FastAPI:
    """The application; `api` is the address that the page shows in examples, by default where it is asked."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with endpoint:
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, token=token)
    bodies = bodies or Bodies()
    _answer_errors(app)
    _add_page(app, endpoint.name, api, page)
    _add_runpod(app, endpoint, bodies)
    add_openai(app, endpoint, bodies)

    @app.post("/parameters")
    async def parameters(request: HttpRequest) -> Response:
        file = await bodies.read(request, PICTURE_BYTES)
        return JSONResponse(await asyncio.to_thread(carried, file))

    return app


def _answer_errors(app: FastAPI) -> None:
    def answer(request: HttpRequest, status: int, message: str, code: str | None = None) -> Response:
        body = failure(request.url.path, status, message, code)
        headers = {"connection": "close"} if status in (408, 413, 503) else None  # of its body more may come
        return Response(body, status, headers, "application/json")

    @app.exception_handler(BadBody)
    @app.exception_handler(NotAnswered)
    async def refused(request: HttpRequest, error: BadBody | NotAnswered) -> Response:
        return answer(request, error.status, str(error), "invalid_request")

    @app.exception_handler(UnknownJob)
    async def unknown(request: HttpRequest, _: UnknownJob) -> Response:
        return answer(request, 404, "there is no job of this id, or its result is not kept any more")

    @app.exception_handler(HTTPException)
    async def other(request: HttpRequest, error: HTTPException) -> Response:
        words = {404: "there is no such route", 405: f"{request.method} is not for this route"}
        return answer(request, error.status_code, words.get(error.status_code, str(error.detail)), "unknown_url")


def _add_page(app: FastAPI, name: str, api: str | None, folder: Path) -> None:
    @app.get("/")
    async def index(request: HttpRequest) -> Response:
        here = api or f"{str(request.base_url).rstrip('/')}/v2/{name}"
        text = (folder / "index.html").read_text(encoding="utf-8")
        for mark, value in (("{{ endpoint }}", name), ("{{ api }}", here)):
            text = text.replace(mark, escape(value))
        return Response(text, media_type=_TYPES[".html"], headers={"cache-control": "no-cache"})

    @app.get("/page/{path:path}")
    async def file(path: str) -> Response:
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        found = files.get(path)
        if found is None or found.suffix not in _TYPES:
            raise HTTPException(404)
        return Response(found.read_bytes(), media_type=_TYPES[found.suffix], headers={"cache-control": "no-cache"})


def _add_runpod(app: FastAPI, endpoint: RunPodEndpoint, bodies: Bodies) -> None:
    root = f"/v2/{endpoint.name}"

    async def take(request: HttpRequest, most: int) -> str:
        event, size = await bodies.read_json(request, most)
        if "input" not in event:
            raise BadBody(400, 'the body must be {"input": {...}}')
        return await endpoint.run(event, size)

    def known(id: str) -> str:
        if not _ID.fullmatch(id):
            raise UnknownJob
        return id

    @app.post(f"{root}/run")
    async def run(request: HttpRequest) -> Response:
        return JSONResponse({"id": await take(request, RUN_BYTES), "status": "IN_QUEUE"})

    @app.post(f"{root}/runsync")
    async def runsync(request: HttpRequest) -> Response:
        return _json(await endpoint.wait(await take(request, RUNSYNC_BYTES), RUNSYNC_SECONDS))

    @app.api_route(f"{root}/status/{{id}}", methods=["GET", "POST"])
    async def status(id: str) -> Response:
        return _json(await endpoint.status(known(id)))

    @app.post(f"{root}/cancel/{{id}}")
    async def cancel(id: str) -> Response:
        return _json(await endpoint.cancel(known(id)))

    @app.get(f"{root}/health")
    async def health() -> dict[str, Any]:
        return await endpoint.health()


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def carried(file: bytes) -> dict[str, Any]:
    """What the file of one of this worker's pictures says of itself; raises BadBody where it says nothing."""
    try:
        measure(file)
        with Image.open(io.BytesIO(file), formats=list(FORMATS)) as picture:
            found = read_parameters(picture)
    except Exception as error:  # whatever a hostile file makes of Pillow
        raise BadBody(422, f"the file is no picture in {', '.join(FORMATS)} that can be read") from error
    if found is None or not isinstance(found.get("input"), dict):
        raise BadBody(422, "the picture carries no request; only this worker's own pictures do")
    return found

"""Who may ask: this machine's own pages and programs, or whoever has the token. And what browsers may do with answers.

A page of another site can make a browser ask here, and a name of its own can lead to this address (DNS rebinding): the
names that a browser sends along tell of both.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_HOST = re.compile(r"(?:\[([\da-fA-F:.]{2,45})\]|([\w.-]{1,253}))(?::\d{1,5})?", re.ASCII)
OPENAI = "/v1/"  # where errors are in OpenAI's form

# The page loads its own files and shows its own pictures, and nothing else: whatever stands in a request or an answer.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Mapping[str, str] = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def failure(path: str, status: int, message: str, code: str | None = None, param: str | None = None) -> bytes:
    """The JSON of an error: OpenAI's where `path` is one of its routes, else RunPod's."""
    if not path.startswith(OPENAI):
        return json.dumps({"error": message}).encode()
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


class Guard:
    """Middleware in front of `app`. Without a `token` only names of this machine's own are answered."""

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self._app = app
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if refused := self._refusal(scope["path"], Headers(scope=scope)):
            return await _answer(guarded, scope["path"], *refused)
        return await self._app(scope, receive, guarded)

    def _refusal(self, path: str, headers: Headers) -> tuple[int, str, str] | None:
        """A status, a sentence and OpenAI's code, where this is not to be answered."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(host)
        if not name or (self._token is None and name not in LOOPBACK):
            known = ", ".join(sorted(LOOPBACK))
            return 403, f"the Host header must name this machine ({known}) where no --token is set", "wrong_host"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "a page of another site asked, and only this server's own page may", "wrong_origin"
        if self._token is None or path == "/" or path.startswith("/page/"):
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            return 401, "the header Authorization must be: Bearer, and the token of this server", "invalid_api_key"
        return None


def _name(host: str) -> str:
    """Of a Host header, without its port; empty where it is none."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""


async def _answer(send: Send, path: str, status: int, message: str, code: str) -> None:
    body = failure(path, status, message, code)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

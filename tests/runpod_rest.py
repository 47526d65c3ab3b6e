"""A stand-in for the endpoints of RunPod's REST API (v2) over HTTP: bodies are checked as its OpenAPI describes them.

https://docs.runpod.io/api-reference-v2/openapi.json: CreateEndpointRequest, UpdateEndpointRequest, Endpoint.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jsonschema

KEY = "rpa_TESTSKEYTESTSKEY"
GPU_TYPES = (
    "NVIDIA GeForce RTX 4090", "NVIDIA A40", "NVIDIA RTX A5000", "NVIDIA GeForce RTX 5090", "NVIDIA H100 80GB HBM3",
    "NVIDIA GeForce RTX 3090", "NVIDIA L40S", "NVIDIA H200", "NVIDIA L4", "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA A100-SXM4-80GB", "NVIDIA RTX A6000", "NVIDIA A100 80GB PCIe", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
    "NVIDIA L40", "NVIDIA B200",
)  # fmt: skip
POOLS = (
    "AMPERE_16",
    "AMPERE_24",
    "ADA_24",
    "ADA_32_PRO",
    "AMPERE_48",
    "ADA_48_PRO",
    "AMPERE_80",
    "ADA_80_PRO",
    "HOPPER_141",
)
_TEXT, _COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
_CUDA = r"^\d+\.\d+$"


def _closed(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """An object of these properties and no others."""
    return {
        "type": "object", "additionalProperties": False, "properties": dict(properties), "required": list(required),
    }  # fmt: skip


_GPU: Mapping[str, Any] = {
    "pools": {"type": "array", "minItems": 1, "items": {"enum": list(POOLS)}},
    "excludedTypes": {"type": "array", "uniqueItems": True, "items": {"enum": list(GPU_TYPES)}},
    "count": {"type": "integer", "minimum": 1},
    "allowedCudaVersions": {"type": "array", "items": {"type": "string", "pattern": _CUDA}},
}
_CHANGED: Mapping[str, Any] = {
    "name": _TEXT,
    "image": {"type": "string"},
    "args": {"type": "string"},
    "disk": {"type": "integer", "minimum": 1},
    "ports": {"type": "array", "items": {"type": "string"}},
    "env": {"type": "object", "additionalProperties": {"type": "string"}},
    "registry": {"type": ["string", "null"]},
    "gpu": {
        **_closed({**_GPU, "minCudaVersion": {"type": "string", "pattern": f"^$|{_CUDA}"}}),
        "dependentRequired": {"excludedTypes": ["pools"]},
    },
    "workers": _closed(
        {"min": _COUNT, "max": _COUNT, "idleTimeout": {"type": "integer", "minimum": 1, "maximum": 3600}}
    ),
    "scaling": {
        "oneOf": [
            _closed(
                {"type": {"const": "QUEUE_DELAY"}, "queueDelay": {"type": "number", "minimum": 0.5}},
                "type", "queueDelay",
            ),
            _closed(
                {"type": {"const": "REQUEST_COUNT"}, "requestCount": {"type": "integer", "minimum": 1}},
                "type", "requestCount",
            ),
        ]
    },
    "dataCenterIds": {"type": "array", "items": {"type": "string"}},
    "networkVolumes": {"type": "array", "items": {"type": "string"}},
    "templateId": _TEXT,
    "timeout": {"type": "integer"},
    "flashboot": {"enum": ["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"]},
}  # fmt: skip
_CREATED: Mapping[str, Any] = {
    **_CHANGED,
    "type": {"enum": ["QUEUE", "LOAD_BALANCER"]},
    "gpu": _closed({**_GPU, "minCudaVersion": {"type": "string", "pattern": _CUDA}}, "pools"),
}
# Without a templateId, which nobody here uses, an image is required too.
SCHEMAS = {"POST": _closed(_CREATED, "name", "type", "scaling", "image"), "PATCH": _closed(_CHANGED)}
# What an endpoint has where nobody set it.
_DEFAULTS: Mapping[str, Any] = {
    "args": "", "ports": [], "env": {}, "registry": None, "dataCenterIds": [], "networkVolumes": [], "flashboot": "OFF",
    "createdAt": "2026-03-13T20:00:00Z",
}  # fmt: skip


class RestStandIn:
    """`kept` holds the endpoints by id; `asked` each request that came: method, path, body.

    `answers` has what is answered instead, once each, by method: a status and a text. What is named in `stays` is not
    changed by a PATCH, which succeeds.
    """

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.answers: dict[str, tuple[int, str]] = {}
        self.stays: set[str] = set()
        self.url = ""

    @property
    def endpoint(self) -> dict[str, Any]:
        """The only one."""
        (found,) = self.kept.values()
        return found

    def answer(self, method: str, path: str, key: str | None, body: Any) -> tuple[int, str]:
        """The status and the body of one request."""
        self.asked.append((method, path, body))
        if key != f"Bearer {KEY}":
            return _problem(401, "Unauthorized", "invalid bearer token")
        if instead := self.answers.pop(method, None):
            return instead
        route = re.fullmatch("/v2/serverless(?:/([^/]+))?", path)
        if route is None or (route[1] is None) != (method in ("GET", "POST")):
            return _problem(404, "Not Found", "resource not found")
        if method == "GET":
            return 200, json.dumps({"endpoints": list(self.kept.values())})
        validator = jsonschema.Draft202012Validator(SCHEMAS[method])
        if faults := [error.message for error in validator.iter_errors(body)]:
            return _problem(422, "Unprocessable Entity", "Request validation failed.", *faults)
        if body.get("gpu", {}).get("minCudaVersion") and body["gpu"].get("allowedCudaVersions"):
            return _problem(400, "Bad Request", "minCudaVersion and allowedCudaVersions are mutually exclusive")
        if method == "POST":
            id = f"ep{len(self.kept) + 1}"
            self.kept[id] = {**_DEFAULTS, "id": id, **body}
            return 201, json.dumps(self.kept[id])
        found = self.kept.get(route[1])
        if found is None:
            return _problem(404, "Not Found", "resource not found")
        for field, value in body.items():
            if field not in self.stays:
                found[field] = {**found[field], **value} if field in ("gpu", "workers") else value
        return 200, json.dumps(found)


def _problem(status: int, title: str, detail: str, *errors: str) -> tuple[int, str]:
    return status, json.dumps({"title": title, "status": status, "detail": detail, "errors": errors})


@contextmanager
def rest_api() -> Iterator[RestStandIn]:
    """A stand-in of its own, at its `url`."""
    stand_in = RestStandIn()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, text = stand_in.answer(self.command, self.path, self.headers.get("Authorization"), body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PATCH = _do

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_port}/v2"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()

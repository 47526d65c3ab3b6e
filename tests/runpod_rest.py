"""A stand-in for RunPod's REST API (v1) over HTTP: templates and endpoints, bodies checked as its OpenAPI describes."""

from __future__ import annotations

import json
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
_TEXT, _COUNT, _SWITCH = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_CUDA = {"enum": ["13.0", "12.9", "12.8", "12.7", "12.6", "12.5", "12.4", "12.3", "12.2", "12.1", "12.0", "11.8"]}
_TEMPLATE: Mapping[str, Any] = {
    "name": _TEXT,
    "imageName": _TEXT,
    "containerDiskInGb": _COUNT,
    "containerRegistryAuthId": _TEXT,
    "env": {"type": "object", "additionalProperties": {"type": "string"}},
}
_ENDPOINT: Mapping[str, Any] = {
    "name": _TEXT,
    "templateId": _TEXT,
    "gpuTypeIds": {"type": "array", "minItems": 1, "items": {"enum": list(GPU_TYPES)}},
    "gpuCount": {"type": "integer", "minimum": 1},
    "minCudaVersion": _CUDA,
    "allowedCudaVersions": {"type": "array", "items": _CUDA},
    "workersMin": _COUNT,
    "workersMax": _COUNT,
    "idleTimeout": {"type": "integer", "minimum": 1, "maximum": 3600},
    "executionTimeoutMs": {"type": "integer", "minimum": 1},
    "scalerType": {"enum": ["QUEUE_DELAY", "REQUEST_COUNT"]},
    "scalerValue": {"type": "integer", "minimum": 1},
    "flashboot": _SWITCH,
    "networkVolumeId": _TEXT,
}
_ONCE: Mapping[str, Mapping[str, Any]] = {
    "templates": {"isServerless": _SWITCH, "category": {"enum": ["NVIDIA", "AMD", "CPU"]}},
    "endpoints": {"computeType": {"enum": ["GPU", "CPU"]}},
}
_FIELDS = {"templates": _TEMPLATE, "endpoints": _ENDPOINT}
_REQUIRED = {"templates": ["name", "imageName"], "endpoints": ["templateId"]}
_NOT_SHOWN = ("minCudaVersion", "flashboot")  # of an endpoint, when it is read


class RestStandIn:
    """`kept` holds what was made by kind and id; `asked` each request that came: method, path, body.

    `answers` has what is answered instead, once each, by method and kind: a status and a text.
    """

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, dict[str, Any]]] = {"templates": {}, "endpoints": {}}
        self.asked: list[tuple[str, str, Any]] = []
        self.answers: dict[tuple[str, str], tuple[int, str]] = {}
        self.url = ""

    @property
    def template(self) -> dict[str, Any]:
        """The only one."""
        (found,) = self.kept["templates"].values()
        return found

    @property
    def endpoint(self) -> dict[str, Any]:
        """The only one."""
        (found,) = self.kept["endpoints"].values()
        return found

    def answer(self, method: str, path: str, key: str | None, body: Any) -> tuple[int, str]:
        """The status and the body of one request."""
        self.asked.append((method, path, body))
        _, _, kind, *rest = path.split("/")
        if key != f"Bearer {KEY}":
            return 401, '{"error": "Unauthorized"}'
        if instead := self.answers.pop((method, kind), None):
            return instead
        kept = self.kept[kind]
        if method == "GET":
            return 200, json.dumps([self._shown(kind, each) for each in kept.values()])
        making = method == "POST"
        schema = {
            "type": "object",
            "additionalProperties": False,
            "properties": {**_FIELDS[kind], **(_ONCE[kind] if making else {})},
            "required": _REQUIRED[kind] if making else [],
        }
        try:
            jsonschema.validate(body, schema)
        except jsonschema.ValidationError as error:
            return 400, json.dumps({"error": error.message})
        if "templateId" in body and body["templateId"] not in self.kept["templates"]:
            return 400, json.dumps({"error": "there is no such template"})
        if making:
            if kind == "templates" and body["name"] in [each["name"] for each in kept.values()]:
                return 409, '{"error": "Template name must be unique"}'
            id = f"{kind[:2]}{len(kept) + 1}"
            kept[id] = {"id": id, **body}
        else:
            (id,) = rest
            if id not in kept:
                return 404, ""
            kept[id] |= body
        return 200, json.dumps(self._shown(kind, kept[id]))

    @staticmethod
    def _shown(kind: str, each: Mapping[str, Any]) -> dict[str, Any]:
        """As RunPod tells it: endpoints with flash boot have a suffix, and not all that was set is told."""
        suffix = " -fb" if each.get("flashboot") else ""
        shown = {name: value for name, value in each.items() if kind == "templates" or name not in _NOT_SHOWN}
        return shown | {"name": f"{each['name']}{suffix}"}


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
    stand_in.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()

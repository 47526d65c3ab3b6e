"""The web over real HTTPS: every host is one server on this machine, whose certificate is good."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Page:
    """An answer; with `hangs_up` the connection ends before it."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs_up: bool = False


@dataclass
class Web:
    """`pages` by host and path, each the answers to come, of which the last stays; `asked` is what was requested."""

    port: int
    pages: dict[str, list[Page]] = field(default_factory=dict)
    asked: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)

    def put(self, address: str, *pages: Page | bytes) -> str:
        """Let what is at host/path answer so; its URL."""
        self.pages[address] = [page if isinstance(page, Page) else Page(page) for page in pages]
        return self.url(address)

    def url(self, address: str) -> str:
        host, _, path = address.partition("/")
        return f"https://{host}:{self.port}/{path}"

    def paths(self) -> list[str]:
        return [address for address, _ in self.asked]


@contextmanager
def open_web(folder: Path, monkeypatch: pytest.MonkeyPatch, *hosts: str) -> Iterator[Web]:
    """A web of `hosts`, which the SDK may ask although it is on this machine."""
    certificate = _certificate(folder, hosts)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers["Host"].partition(":")[0]
            address = f"{host}{self.path}"
            web.asked.append((address, dict(self.headers)))
            pages = web.pages.get(address) or web.pages.get(address.partition("?")[0]) or [Page(status=404)]
            page = pages.pop(0) if len(pages) > 1 else pages[0]
            if page.hangs_up:
                self.close_connection = True
                return
            etag = page.headers.get("ETag")
            if etag and self.headers["If-None-Match"] == etag and page.status == 200:
                page = Page(status=304, headers={"ETag": etag})
            self.send_response(page.status)
            length = {} if page.status == 304 else {"Content-Length": str(len(page.body))}
            for name, value in (length | dict(page.headers)).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page.body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    web = Web(server.server_port)
    resolve: Callable[..., Any] = socket.getaddrinfo

    def local(host: Any, *rest: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host in hosts else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


def _certificate(folder: Path, hosts: tuple[str, ...]) -> Path:
    """A file with a certificate for `hosts`, which signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / "certificate.pem"
    file.write_bytes(certificate.public_bytes(pem) + private)
    return file

"""The web over real HTTPS: every host is one server on this machine, whose certificate is good."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Behaviour = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Page:
    """An answer; with `hangs_up` the connection ends before it."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs_up: bool = False


@dataclass
class Web:
    """`pages` by host and path, each the answers to come, of which the last stays; `asked` is what was requested.

    `addresses` has those of a host that is elsewhere, and `resolved` the hosts whose addresses were asked for.
    """

    port: int
    context: ssl.SSLContext
    pages: dict[str, list[Page]] = field(default_factory=dict)
    asked: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    addresses: dict[str, list[str]] = field(default_factory=dict)
    resolved: list[str] = field(default_factory=list)
    listeners: list[socket.socket] = field(default_factory=list)

    def put(self, address: str, *pages: Page | bytes) -> str:
        """Let what is at host/path answer so; its URL."""
        self.pages[address] = [page if isinstance(page, Page) else Page(page) for page in pages]
        return self.url(address)

    def url(self, address: str) -> str:
        host, _, path = address.partition("/")
        return f"https://{host}:{self.port}/{path}"

    def behave(self, address: str, behaviour: Behaviour, tls: bool = True) -> str:
        """Let a server of its own at host/path do `behaviour` to each connection, then hang up; its URL."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.serve(listener, behaviour, tls)
        host, _, path = address.partition("/")
        return f"https://{host}:{listener.getsockname()[1]}/{path}"

    def serve(self, listener: socket.socket, behaviour: Behaviour, tls: bool = True) -> None:
        """Do `behaviour` to each connection that `listener` gets, then hang up."""
        self.listeners.append(listener)

        def talk(line: socket.socket) -> None:
            with suppress(OSError), line:
                line.settimeout(60)
                if tls:
                    with self.context.wrap_socket(line, server_side=True) as within:
                        behaviour(within)
                else:
                    behaviour(line)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    line, _ = listener.accept()
                    threading.Thread(target=talk, args=(line,), name="web", daemon=True).start()

        threading.Thread(target=serve, name="web", daemon=True).start()

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
    web = Web(server.server_port, context)
    resolve: Callable[..., Any] = socket.getaddrinfo

    def local(host: Any, *rest: Any, **options: Any) -> Any:
        web.resolved.append(host)
        there = web.addresses.get(host, ["127.0.0.1"] if host in hosts else [host])
        return [found for address in there for found in resolve(address, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", local)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        for listener in web.listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


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

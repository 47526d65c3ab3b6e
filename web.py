"""The page for people, and OpenAI's routes: `python web.py`, then open the address that it prints.

What is asked for is drawn by this process, or by a deployed endpoint (--endpoint ID, with RUNPOD_API_KEY set).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from src.errors import InvalidSettings, WorkerError
from src.redaction import SHORTEST_SECRET, keep_secret, redact
from src.serving import leaving, logs, startup
from src.serving.warm_up import seconds_of, warm_up
from src.settings import Settings, runpod_api_key, web_token
from src.stages import START
from src.web.app import make_app
from src.web.endpoint import NotAnswered, RunPodEndpoint, UnknownJob
from src.web.guard import LOOPBACK
from src.web.local import LocalEndpoint

log = logging.getLogger("worker")

API = "https://api.runpod.ai/v2"
HEAD_SECONDS = 30.0  # for the first request of a connection to begin and for its headers
_MOST_CONNECTIONS = 250
_LEAVING_SECONDS = 1  # for answers that are on their way


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop; the exit status, 1 with one line on stderr where it cannot start."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leaving.leave_at_once)  # until the server has its own
    try:
        logs.keep_secrets_out()
        logs.configure(settings := Settings.from_environment(), sdk=False)
        token = _token(options)
        with bind(options.host, options.port) as bound:
            return _serve(options, settings, token, bound)
    except (WorkerError, OSError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; another than this machine's own "
                        "wants a token")  # fmt: skip
    parser.add_argument("--port", type=int, default=8080, choices=range(65_536), metavar="PORT", help="0 takes any "
                        "that is free")  # fmt: skip
    parser.add_argument("--token", help="what whoever asks must send as Authorization: Bearer; or set WEB_TOKEN, which "
                        "other users of this machine do not see")  # fmt: skip
    parser.add_argument("--endpoint", metavar="ID", help="a deployed endpoint that answers instead of this process")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def _token(options: argparse.Namespace) -> str | None:
    """What whoever asks must have; raises InvalidSettings where there must be one."""
    token: str | None = options.token or web_token()
    if token is None:
        if options.host not in LOOPBACK:
            raise InvalidSettings(
                f"--host {options.host} lets others reach this server, so it wants a token: set WEB_TOKEN, or give "
                "--token"
            )
        return None
    if len(token) < SHORTEST_SECRET or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidSettings(
            f"the token must have {SHORTEST_SECRET} characters at least, letters, digits and signs without blanks"
        )
    keep_secret(token)
    return token


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which answers nobody yet; raises InvalidSettings where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # Named TCP, or asyncio would leave Nagle's algorithm on: 40 ms for each answer on a kept connection.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidSettings(
            f"--host {host} --port {port}: {reason.lower()}; give another --port, or end what listens there"
        ) from error
    return bound


def _local(settings: Settings, failed: Callable[[], None]) -> RunPodEndpoint:
    """The handler of this process, once it is ready for jobs: as RunPod's loop makes it."""
    import handler

    endpoint = LocalEndpoint(handler.answer, settings.request_timeout, device_failed=failed)
    handler.read_ahead()
    handler.check_start()
    startup.check_bucket(handler.get_bucket())
    handler.find_files()
    with START.stage("torch"):
        from src.engine import check_device
    with START.stage("device"):
        endpoint.on_device(check_device)
    engine = handler.get_engine()
    endpoint.serve_devices(engine.at_once)
    with START.stage("warm-up") as facts:
        for warm in warm_up(engine, settings, endpoint.on_device):
            facts.update(seconds_of(warm))
    return endpoint


def deployed(id: str, key: str | None, url: str = API) -> RunPodEndpoint:
    """An endpoint of RunPod's; raises InvalidSettings where it cannot be asked."""
    if not re.fullmatch(r"[\w-]{1,100}", id, re.ASCII) or id == "local":
        raise InvalidSettings(f"--endpoint {id}: an endpoint's id is letters and digits, as RunPod's console shows it")
    if key is None:
        raise InvalidSettings("--endpoint wants RUNPOD_API_KEY, which stays with this server")
    from client.errors import ClientError, Forgotten, JobFailed
    from client.transport import Transport
    from src.web.deployed import DeployedEndpoint

    def explain(error: Exception) -> Exception:
        if isinstance(error, Forgotten):
            return UnknownJob()
        if isinstance(error, ClientError):
            return NotAnswered(400 if isinstance(error, JobFailed) else 502, redact(str(error)))
        return error

    return DeployedEndpoint(id, Transport(id, key, url), explain)


class _Protocol(H11Protocol):
    """Ends a connection whose first request does not come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._end_unless_asked)

    def _end_unless_asked(self) -> None:
        if self.cycle is None:
            self.transport.close()


class Server(uvicorn.Server):
    """Ends within a second or so: jobs in hand are cancelled, and whoever waits for one is told."""

    exit_status = 0

    def __init__(self, app: FastAPI, endpoint: RunPodEndpoint, ready: Callable[[], None]) -> None:
        # h11 and asyncio's loop are there on every machine, and h11 bounds what a request's head may have.
        super().__init__(
            uvicorn.Config(
                app, loop="asyncio", http=_Protocol, ws="none", log_config=None, access_log=False, server_header=False,
                proxy_headers=False, limit_concurrency=_MOST_CONNECTIONS, timeout_graceful_shutdown=_LEAVING_SECONDS,
            )
        )  # fmt: skip
        self._endpoint = endpoint
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests, and say so."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take none any more."""
        self._endpoint.close()
        await super().shutdown(sockets)


def _serve(options: argparse.Namespace, settings: Settings, token: str | None, bound: socket.socket) -> int:
    host = f"[{options.host}]" if ":" in options.host else options.host
    page = f"http://{host}:{bound.getsockname()[1]}/"

    def ready() -> None:
        START.ready()
        print(f"the page is at {page}{'#token=YOUR_TOKEN' if token else ''}", flush=True)
        if options.open:
            webbrowser.open(f"{page}#token={token}" if token else page)

    def device_failed() -> None:
        server.should_exit, server.exit_status = True, 1

    if options.endpoint:
        endpoint, api = deployed(options.endpoint, runpod_api_key()), f"{API}/{options.endpoint}"
    else:
        endpoint, api = _local(settings, device_failed), None
    server = Server(make_app(endpoint, token=token, api=api), endpoint, ready)
    server.run(sockets=[bound])
    return server.exit_status


if __name__ == "__main__":
    leaving.leave(main())

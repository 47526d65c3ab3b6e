"""web.py's server on a thread of a test, with an address of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from src.web.app import make_app
from src.web.endpoint import RunPodEndpoint
from web import Server, bind


@contextmanager
def served(endpoint: RunPodEndpoint, **options: Any) -> Iterator[str]:
    """Its address, http://127.0.0.1:PORT; `options` are make_app's."""
    ready = threading.Event()
    with bind("127.0.0.1", 0) as bound:
        server = Server(make_app(endpoint, **options), endpoint, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert ready.wait(30)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

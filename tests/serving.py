"""Start the server in this process, and talk to it over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def running(*overrides: str, load: Any = None, wait: bool = True) -> Iterator[Any]:
    """Serve on a free port, and yield an HTTP client whose `server` is what the routes share.

    Args:
        overrides: Overrides of the command.
        load: Builds the pipeline; None to build that of the config.
        wait: Whether to wait until the models are loaded.
    """
    import httpx

    from grounded_sam.cli.serve import compose_server, listen, make_runner, url_of
    from grounded_sam.serve.server import Server

    cfg, words = compose_server(["preset=shapes", "serve.port=0", *overrides])
    server = Server(cfg, words, load)
    token = server.settings.token
    with listen("127.0.0.1", 0) as listening:
        runner = make_runner(server)
        thread = threading.Thread(target=lambda: runner.run(sockets=[listening]), daemon=True)
        thread.start()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            with httpx.Client(base_url=url_of(listening), timeout=300, headers=headers) as client:
                client.server, client.address = server, listening.getsockname()[:2]
                until(lambda: client.get("/health").status_code == 200)
                if wait:
                    until(lambda: client.get("/ready").status_code == 200)
                yield client
        finally:
            runner.should_exit = True
            thread.join(30)
            server.close()
            assert not thread.is_alive()


def until(condition: Any, seconds: float = 300) -> None:
    """Wait until a condition holds."""
    import httpx

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError("it did not come true in time")

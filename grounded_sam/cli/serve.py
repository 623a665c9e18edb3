"""The command `grounded-sam-serve`: the models behind HTTP."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.config.compose import compose, to_override
from grounded_sam.config.words import read_words
from grounded_sam.errors import ConfigError, GroundedSamError, redact
from grounded_sam.files import home_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from grounded_sam.serve.server import Server

HELP = """\
grounded-sam-serve: find, click and track over HTTP, with the models loaded once.

  grounded-sam-serve preset=shapes                              http://127.0.0.1:8000, with the small models
  grounded-sam-serve 'text=[car, wheel]' serve.port=9000        classes of requests that name none
  grounded-sam-serve 'serve.roots=[photos]' 'serve.stores={street: photos/labels}'
  GROUNDED_SAM_TOKEN=... grounded-sam-serve serve.host=0.0.0.0  other machines reach it, with the token

The keys are those of grounded-sam, and those of the group serve: host, port, token, roots, stores, sweeps, queue,
max_body_mb, upload_gb, session_gb, prediction_mb, idle_s and cors. /docs lists the routes, /ready tells when the models
are loaded. Ctrl-C ends the server and deletes what clients have sent.
"""
#: Packages of the extra `serve`.
NEEDED = ("fastapi", "python_multipart", "uvicorn")
#: Seconds that open connections have to end when the server is stopped, and that idle ones are kept.
GRACE_S, KEEP_ALIVE_S = 3, 60


def compose_server(words: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Compose the config of a server.

    Args:
        words: Words of the command: overrides, and `--config-dir FOLDER`.

    Returns:
        The config, and the overrides that make it.

    Raises:
        ConfigError: If a word cannot be read, or a key or choice is unknown.

    >>> compose_server(["serve.port=9000"])[0].serve.port
    9000
    """
    words = read_words(words)
    overrides, folder = [], None
    remaining = iter(words)
    for word in remaining:
        if word.partition("=")[0] in ("--config-dir", "-cd"):
            folder = home_path(word.partition("=")[2] or next(remaining, ""))
        elif word.startswith("-"):
            raise ConfigError(f"{word} is a flag of grounded-sam; the server takes key=value and --config-dir")
        else:
            overrides.append(word)
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir: folder {folder} does not exist")
        overrides.insert(0, f"hydra.searchpath=[{to_override(f'file://{folder.resolve()}')}]")
    chosen = [word for word in overrides if word.startswith("serve=")]
    rest = [word for word in overrides if word not in chosen]
    overrides = [*rest, f"+{chosen[-1]}" if chosen else "+serve=local"]
    return compose(overrides), overrides


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: Name or address.
        port: Port; 0 for any free one.

    Raises:
        ConfigError: If the address does not exist, or is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
        return listening
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with serve.host or serve.port"
        ) from error


def url_of(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_runner(server: Server) -> Any:
    """Return uvicorn's server for the application.

    Args:
        server: What the routes share.
    """
    import uvicorn

    from grounded_sam.serve.app import create_app

    config = uvicorn.Config(
        create_app(server),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(config)


def run_server(server: Server, listening: socket.socket) -> None:
    """Serve until Ctrl-C, or until the models cannot be loaded.

    Args:
        server: What the routes share.
        listening: Socket that listens.

    Raises:
        GroundedSamError: Why the models cannot be loaded.
    """
    runner = make_runner(server)

    def stop(error: BaseException | None) -> None:
        runner.should_exit = True

    def tell_ready() -> None:
        with suppress(OSError):  # the terminal may be gone
            print("Ready.", flush=True)

    server.on_failure, server.on_ready = stop, tell_ready
    print(f"Serving on {url_of(listening)}, loading models; {url_of(listening)}/docs lists the routes", flush=True)
    runner.run(sockets=[listening])
    if server.worker.failure is not None:
        raise server.worker.failure


def check_extra() -> None:
    """Check that what the server needs is installed.

    Raises:
        ConfigError: If not, with the extra to install.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {missing[0]}: pip install 'grounded_sam[serve]'")


def main() -> None:
    """Run the command: a user's mistake ends with one line and exit code 1."""
    words = sys.argv[1:]
    if set(words) & {"-h", "--help"}:
        print(HELP, end="")
        return
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for user-defined stages, as in `grounded-sam`
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_extra()
        cfg, overrides = compose_server(words)
        from grounded_sam.serve.server import Server

        server = Server(cfg, overrides)
        try:
            with listen(server.settings.host, server.settings.port) as listening:
                run_server(server, listening)
        finally:
            server.close()
    except (GroundedSamError, OSError) as error:
        if os.environ.get("GROUNDED_SAM_DEBUG") == "1":
            raise
        sys.exit(f"grounded-sam-serve: {redact(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

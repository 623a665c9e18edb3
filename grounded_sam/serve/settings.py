"""Settings of the server; the config group `serve`."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from grounded_sam.checks import check_int, check_number
from grounded_sam.errors import ConfigError, shorten

#: Environment variable of the token.
TOKEN_VARIABLE = "GROUNDED_SAM_TOKEN"
#: Fewest characters of a token.
MIN_TOKEN = 8


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where the server listens, who may use it, what it may read, and how much it keeps.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        token: Secret that every request must give; None for none, which only a loopback address may have.
        roots: Folders whose files requests may name.
        stores: Folders of stores by name; None for none.
        sweeps: Folders of sweeps by name; None for none.
        queue: Largest number of requests that wait for the models.
        max_body_mb: Largest body of a request, in MB.
        upload_gb: Largest size of the temporary folder, in GB.
        session_gb: Largest memory of all sessions, in GB.
        prediction_mb: Largest memory of all predictions, in MB.
        idle_s: Seconds that a video is tracked on while no client listens.
        cors: Origins of pages of other servers that may send requests.
        label_studio: Address of the Label Studio whose ML backend the server is, the only host that it fetches files
            from; None for the one that a project says when it connects.

    Raises:
        ConfigError: If a value is out of range, or the address needs a token.

    >>> ServeSettings(host="0.0.0.0")
    Traceback (most recent call last):
    grounded_sam.errors.ConfigError: serve.host=0.0.0.0 can be reached from other machines, so it needs a token: ...
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    roots: Sequence[str] = ()
    stores: Mapping[str, str] | None = None
    sweeps: Mapping[str, str] | None = None
    queue: int = 64
    max_body_mb: float = 256
    upload_gb: float = 8
    session_gb: float = 2
    prediction_mb: float = 512
    idle_s: float = 60
    cors: Sequence[str] = ()
    label_studio: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise ConfigError(f"serve.host must be an address or a name, got {shorten(self.host)}")
        check_int("serve.port", self.port, 0, 65535)
        check_int("serve.queue", self.queue, 1)
        for key in ("max_body_mb", "upload_gb", "session_gb", "prediction_mb"):
            check_number(f"serve.{key}", getattr(self, key), 0, above=True)
        check_number("serve.idle_s", self.idle_s, 0)
        for key in ("roots", "cors"):
            values = getattr(self, key)
            if isinstance(values, str) or not all(isinstance(value, str) and value for value in values):
                raise ConfigError(f"serve.{key} must be a list of texts, got {shorten(values)}")
        for key in ("stores", "sweeps"):
            _check_folders(key, getattr(self, key) or {})
        for origin in self.cors:
            if not _is_origin(origin):
                raise ConfigError(f"serve.cors must have origins such as https://labels.example.com, got {origin!r}")
        self._check_token()

    def _check_token(self) -> None:
        if self.token is not None and (not isinstance(self.token, str) or len(self.token) < MIN_TOKEN):
            raise ConfigError(f"serve.token must be a text of at least {MIN_TOKEN} characters")
        if self.token is None and not self.is_loopback:
            raise ConfigError(
                f"serve.host={self.host} can be reached from other machines, so it needs a token: set the environment "
                f"variable {TOKEN_VARIABLE}, or serve.token"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def with_token_of_environment(given: Mapping[str, object]) -> dict[str, object]:
    """Return settings with the token of the environment variable, if they have none.

    Args:
        given: Settings, as the config has them.

    >>> os.environ[TOKEN_VARIABLE] = "a long secret"
    >>> with_token_of_environment({"port": 1, "token": None})
    {'port': 1, 'token': 'a long secret'}
    >>> del os.environ[TOKEN_VARIABLE]
    """
    token = given.get("token")
    return {**given, "token": os.environ.get(TOKEN_VARIABLE) or None if token is None else token}


def _check_folders(key: str, folders: object) -> None:
    """Check that names, which become a part of a URL, stand for folders."""
    if not isinstance(folders, Mapping):
        raise ConfigError(f"serve.{key} must map names to folders, such as {{street: labels}}, got {shorten(folders)}")
    for name, folder in folders.items():
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"serve.{key}: a name has letters, digits, - and _, got {shorten(name)}")
        if not isinstance(folder, str) or not folder:
            raise ConfigError(f"serve.{key}.{name} must be a folder, got {shorten(folder)}")


def _is_origin(text: str) -> bool:
    """Return whether a text is a scheme, a host and perhaps a port, and nothing else."""
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and text == f"{url.scheme}://{url.netloc}"
    except ValueError:
        return False

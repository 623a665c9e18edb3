"""An S3 server on this machine, and buckets in it, for tests of addresses.

The fixtures are `s3` (the server, with its settings in the environment) and `bucket` (a new bucket); a test module has
them by `from s3 import bucket, s3  # noqa: F401`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

#: Settings of clients; the moto server takes any key.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Bucket:
    """A bucket, with a client that works without the code under test.

    Attributes:
        name: Its name.
        client: A client of boto3.
    """

    name: str
    client: Any

    @property
    def address(self) -> str:
        """Address of the bucket, without a slash at its end."""
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> str:
        """Write an object and return its address."""
        self.client.put_object(Bucket=self.name, Key=key, Body=data)
        return f"{self.address}/{key}"

    def get(self, key: str) -> bytes:
        """Return the content of an object."""
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def upload(self, folder: Path, prefix: str = "") -> None:
        """Write all files below a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(prefix + path.relative_to(folder).as_posix(), path.read_bytes())


def client(endpoint: str) -> Any:
    """Return a client of boto3."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test-key",
        aws_secret_access_key="test-secret",
    )


@contextmanager
def running_server() -> Iterator[str]:
    """Run a moto server, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Start a moto server, set the environment variables of its clients, and return its address."""
    pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="the extra `remote` is not installed")
    with running_server() as endpoint:
        settings = {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}
        before = {name: os.environ.get(name) for name in (*settings, "AWS_PROFILE", "NO_PROXY")}
        try:
            os.environ.update(settings, NO_PROXY="127.0.0.1")
            os.environ.pop("AWS_PROFILE", None)
            yield endpoint
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@pytest.fixture
def bucket(s3: str) -> Bucket:
    """Make a new bucket."""
    made = Bucket(f"test-{uuid.uuid4().hex[:12]}", client(s3))
    made.client.create_bucket(Bucket=made.name)
    return made


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("the S3 server did not start")

"""Addresses: what they are, and how objects are read and written."""

from __future__ import annotations

import pickle
import subprocess
import sys
import traceback

import pytest
from s3 import bucket, s3  # noqa: F401

from grounded_sam.errors import AccessDeniedError, ConfigError, MissingObjectError, RemoteError
from grounded_sam.remote import (
    Location,
    is_address,
    is_transient,
    open_filesystem,
    read_bytes,
    redact_address,
    retry,
    write_bytes,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/photos/**", True),
        ("gs://bucket/a.jpg", True),
        ("hf://datasets/user/name/data", True),
        ("memory://a/b", True),
        ("zip://**::s3://bucket/a.zip", True),
        ("https://host/a.jpg?token=1", True),
        ("https://host/list.txt", True),
        ("https://host/clip.mp4", False),
        ("https://host/live", False),
        ("rtsp://camera/live", False),
        ("file:///tmp/a.jpg", False),
        ("builtin:demo", False),
        ("C:\\photos", False),
        ("0", False),
        ("a://b", True),
    ],
)
def test_what_an_address_is(text, expected):
    assert is_address(text) is expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("s3://key:se/cr+et@bucket/a b.jpg", "s3://bucket/a b.jpg"),
        ("s3://bucket/a@b.jpg", "s3://bucket/a@b.jpg"),
        ("s3://bucket/what?.jpg", "s3://bucket/what?.jpg"),
        ("https://user:pw@host/a.jpg?X-Amz-Signature=12#x", "https://host/a.jpg"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("hf://datasets/user/name@main/a.jpg", "hf://datasets/user/name@main/a.jpg"),
        ("zip://a::b.jpg::s3://key:secret@bucket/a.zip", "zip://a::b.jpg::s3://bucket/a.zip"),
        ("photos/a.jpg", "photos/a.jpg"),
    ],
)
def test_credentials_are_removed_and_names_are_kept(address, expected):
    assert redact_address(address) == expected
    assert str(Location(address)) == expected and "se/cr" not in repr(Location(address))


def test_an_object_is_written_whole_and_read(bucket):  # noqa: F811
    fs, key = open_filesystem(f"{bucket.address}/a b/ü?#.bin")
    write_bytes(fs, key, b"one", create=True)
    write_bytes(fs, key, b"one", create=True)  # such as an attempt whose answer was lost
    with pytest.raises(FileExistsError):
        write_bytes(fs, key, b"two", create=True)
    assert bucket.get("a b/ü?#.bin") == b"one"
    write_bytes(fs, key, b"three")
    assert read_bytes(fs, key) == b"three" and read_bytes(fs, key, (1, 3)) == b"hr"
    location = pickle.loads(pickle.dumps(Location(f"{bucket.address}/a b/ü?#.bin")))
    assert location.read_bytes() == b"three" and location.name == "ü?#.bin"


def test_credentials_of_an_address_are_used_and_shown_nowhere(bucket):  # noqa: F811
    bucket.put("a", b"1")
    address = f"s3://other:hunter%2F2@{bucket.name}/a"
    assert Location(address).read_bytes() == b"1"
    fs, _ = open_filesystem(address)
    assert (fs.key, fs.secret) == ("other", "hunter/2")
    for wrong in (f"s3://other:hunter2@{bucket.name}/none", "s3://other:hunter2@no-such-bucket/a"):
        with pytest.raises(MissingObjectError, match="no such object") as caught:
            Location(wrong).read_bytes()
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(RemoteError, match="no such bucket"):
        fs, key = open_filesystem("s3://no-such-bucket/a")
        write_bytes(fs, key, b"")


def test_what_is_missing_is_named_in_one_line():
    with pytest.raises(ConfigError, match="unknown protocol 'gopher'; known are"):
        open_filesystem("gopher://host/a")
    code = "import sys; sys.modules['s3fs'] = None\nfrom grounded_sam.remote import *\nopen_filesystem('s3://b/a')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: s3://b/a needs a package" in done.stderr
    assert "pip install 'grounded_sam[remote]'" in done.stderr.strip().splitlines()[-1]


def test_errors_of_a_connection_are_tried_again(monkeypatch):
    monkeypatch.setattr("grounded_sam.remote.FIRST_WAIT_S", 0.001)
    calls = []

    def fails_twice() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError
        return "done"

    assert retry(fails_twice) == "done" and len(calls) == 3

    def never() -> None:
        calls.append(1)
        raise PermissionError

    calls.clear()
    with pytest.raises(PermissionError):
        retry(never)
    assert len(calls) == 1


def test_statuses_tell_what_may_be_gone_later():
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

    def error(status: int) -> ClientError:
        return ClientError({"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

    assert [is_transient(error(status)) for status in (403, 404, 412, 429, 500, 503)] == [False] * 3 + [True] * 3
    assert is_transient(EndpointConnectionError(endpoint_url="https://host"))
    assert not is_transient(NoCredentialsError())


def test_denied_access_is_named(bucket, monkeypatch):  # noqa: F811
    fs, key = open_filesystem(f"{bucket.address}/a")

    def denied(path, **options):
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(fs, "cat_file", denied)
    with pytest.raises(AccessDeniedError, match=r"s3://.*/a: access denied \(Access Denied\)$"):
        read_bytes(fs, key)


def test_local_runs_import_no_fsspec(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import sys; from grounded_sam.sources.auto import AutoSource; "
        f"from grounded_sam.formats.store_writer import StoreWriter; [f.image for f in AutoSource({str(tmp_path)!r})]; "
        "sys.exit(', '.join({'fsspec', 's3fs', 'botocore', 'aiohttp'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""User names, passwords and tokens in URLs appear nowhere that a run writes or prints."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import traceback
from pathlib import Path

import pytest
from command import run_command
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from s3 import CREDENTIALS, bucket, s3  # noqa: F401

from grounded_sam import GroundedSamError
from grounded_sam.config.secrets import VARIABLE, hide_in_overrides, hide_secrets
from grounded_sam.errors import redact
from grounded_sam.sources.video import VideoSource

#: Settings of a run that loads no models and finds a box in each frame.
BOX = ("detector=clicks", "detector.prompts=[{class: a, box: [1, 1, 20, 20]}]", "segmenter=none", "tracker=none")
SECRET = "hunter2"
UNREACHABLE = (
    f"rtsp://admin:{SECRET}@127.0.0.1:1/cam",
    f"rtsp://{SECRET}@127.0.0.1:1/cam",
    f"rtsp://admin:a/{SECRET}@127.0.0.1:1/cam",
    f"https://127.0.0.1:1/a.mp4?token={SECRET}&x=1",
    f"http://127.0.0.1:1/a.mp4?{SECRET}",
    f"s3://key:{SECRET}@bucket/a.mp4",
)


def check_nowhere(printed: str, folder: Path) -> None:
    """Check that the secret was not printed, and is in no file and no name below a folder."""
    assert SECRET not in printed
    for path in folder.rglob("*"):
        assert SECRET not in str(path)
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.fixture(autouse=True)
def _no_real_buckets(monkeypatch):
    """Send requests for buckets to a closed port of this machine, unless a test starts a server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.parametrize("url", UNREACHABLE)
def test_a_stream_that_fails(url, tmp_path):
    for quoted, flags in ((url, ()), (f"'{url}'", ("-m", "select.score=0.4,0.5"))):
        arguments = [*flags, *BOX, f"input={quoted}", "output=o", "sink=[store,jsonl]"]
        result = run_command("grounded_sam.cli.main", arguments, tmp_path)
        printed = result.stdout + result.stderr
        assert result.returncode == 1 and url.partition("://")[0] in printed
        check_nowhere(printed, tmp_path)


@pytest.mark.parametrize("url", UNREACHABLE)
def test_errors_in_python(url):
    with pytest.raises(GroundedSamError) as caught:
        list(VideoSource(url))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.fixture
def server(tmp_path):
    """Serve a folder over HTTP; return it and the address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.fixture(autouse=True)
def _no_other_secrets(monkeypatch):
    """Begin without the secrets of other tests, which processes that a test starts would inherit."""
    for name in [name for name in os.environ if name.startswith(VARIABLE)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("where", ["argument", "file", "variable"])
def test_a_stream_that_is_read(server, tmp_path, scenes, where):
    from grounded_sam.media.mp4 import Mp4Writer

    served, host = server
    writer = Mp4Writer(served / "clip.mp4")
    for i in range(3):
        writer.write(scenes[0].image, i / 10)
    writer.close()
    url = f"http://admin:{SECRET}@{host}/clip.mp4?token={SECRET}"
    work, conf, env = tmp_path / "work", tmp_path / "conf", {"CAMERA": url}
    work.mkdir()
    (conf / "preset").mkdir(parents=True)
    (conf / "preset" / "mine.yaml").write_text(f"# @package _global_\ninput: '{url}'\n")
    given_input = {"argument": f"input={url}", "variable": "input=${oc.env:CAMERA}", "file": "preset=mine"}[where]
    arguments = ["--config-dir", str(conf), *BOX, given_input, "sink=[store,report,coco,overlay]"]
    for flags, more in (([], ["output=o"]), (["-m"], ["output=sweep", "select.top_k=1,2"])):
        result = run_command("grounded_sam.cli.main", [*flags, *arguments, *more], work, env)
        assert result.returncode == 0, result.stdout + result.stderr
        check_nowhere(result.stdout + result.stderr, work)
    assert "clip.mp4" in (work / "o" / "annotations.json").read_text()
    # The saved config runs again with the secret, and without it says what it needs.
    saved = ["--config-path", str(work / "o" / ".hydra"), "--config-name", "config", "output=again"]
    secrets = {f"{VARIABLE}1": f"admin:{SECRET}", f"{VARIABLE}2": f"token={SECRET}"}
    result = run_command("grounded_sam.cli.main", saved, work, {**env, **secrets})
    assert result.returncode == 0 and (work / "again" / "annotations.json").is_file(), result.stderr
    if where != "variable":
        result = run_command("grounded_sam.cli.main", saved, work)
        assert result.returncode == 1 and f"environment variable {VARIABLE}1" in result.stderr


@pytest.mark.parametrize("where", ["argument", "file", "list"])
def test_a_bucket(s3, bucket, tmp_path, folder, where):  # noqa: F811
    bucket.upload(folder, "photos/")
    work, conf, env = tmp_path / "work", tmp_path / "conf", {"AWS_ENDPOINT_URL": s3, **CREDENTIALS}
    work.mkdir()
    (conf / "preset").mkdir(parents=True)
    address = f"s3://admin:{SECRET}@{bucket.name}/photos/"
    (conf / "preset" / "mine.yaml").write_text(f"# @package _global_\ninput: '{address}'\n")
    (conf / "list.txt").write_text(f"{address}0.png\n{address}none.png\n")
    given_input = {"argument": f"input={address}", "file": "preset=mine", "list": f"input={conf / 'list.txt'}"}[where]
    sinks = "sink=[store,report,coco,jsonl,label_studio,yolo]"
    images = ["sink.coco.images=address", "sink.label_studio.images=address"]
    arguments = ["--config-dir", str(conf), *BOX, given_input, sinks, *images]
    for _ in range(2):  # the second run resumes
        result = run_command("grounded_sam.cli.main", [*arguments, "output=o"], work, env)
        assert result.returncode == 0, result.stdout + result.stderr
        check_nowhere(result.stdout + result.stderr, work)
    assert f"s3://{bucket.name}/photos/0.png" in (work / "o" / "annotations.json").read_text()
    replay = ["source=stored", "input=o", "output=again", "sink=[jsonl,report]", f"source.roots=[{address}]"]
    result = run_command("grounded_sam.cli.main", replay, work, env)
    assert result.returncode == 0 and "0 skipped" not in result.stdout, result.stdout + result.stderr
    assert (work / "again" / "results.jsonl").read_text().count("\n") >= 1
    check_nowhere(result.stdout + result.stderr, work)
    for url in (f"s3://admin:{SECRET}@{bucket.name}/none/", f"s3://admin:{SECRET}@{bucket.name}x/a.png"):
        result = run_command("grounded_sam.cli.main", [*BOX, f"input={url}", "output=p"], work, env)
        assert result.returncode == 1 and bucket.name in result.stderr
        check_nowhere(result.stdout + result.stderr, work)


WORD = st.text("ab1-._~%", min_size=1, max_size=6)


@given(WORD, WORD, WORD, st.one_of(st.none(), st.text("ab1=&,+", min_size=1, max_size=8)))
@example("admin", "p=w,x", "host", "a=b,c")
def test_hidden_secrets_come_back_from_the_environment(user, password, host, query):
    url = f"rtsp://{user}:{password}@{host}/live" + ("" if query is None else f"?{query}")
    before = {key: value for key, value in os.environ.items() if key.startswith(VARIABLE)}
    try:
        hidden = hide_secrets({"input": url, "list": [url, 3]})
        assert f"{user}:{password}@" not in str(hidden)
        assert OmegaConf.to_container(OmegaConf.create(hidden), resolve=True) == {"input": url, "list": [url, 3]}
        assert hide_secrets(hidden) == hidden
        (word,) = hide_in_overrides([f"input='{url}'"])
        assert OmegaConf.create({"input": word[7:-1]}).input == url
        assert f"{user}:{password}@" not in redact(f"{url}: no answer") and redact(redact(url)) == redact(url)
    finally:
        for key in [key for key in os.environ if key.startswith(VARIABLE)]:
            del os.environ[key]
        os.environ.update(before)


@pytest.mark.parametrize(
    "text", ["https://host/a.mp4", "photos/a@b.jpg", "rtsp://camera:554/@user/live", "a: b", "x?y=1"]
)
def test_addresses_without_secrets_are_shown(text):
    assert redact(text) == text and hide_secrets(text) == text
    assert hide_in_overrides([f"input={text}"]) == [f"input={text}"]

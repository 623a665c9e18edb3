"""The command that lists, downloads and locates weights, with a small local server in place of the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from grounded_sam.config.hydra import conf_dir
from grounded_sam.config.weights import all_weights
from grounded_sam.weights.hub import files_to_load
from grounded_sam.weights.loading import BUILTIN_DIR

ROOT = Path(__file__).parents[1]
COMMIT = "c0ffee" + "0" * 34
#: A transformers checkpoint as on the hub, with many files that are not loaded.
CHECKPOINT = {
    "config.json": b"{}",
    "preprocessor_config.json": b"{ }",
    "tokenizer.json": b"{  }",
    "vocab.txt": b"a\nb\n",
    "model.safetensors": b"weights " * 500,
    "pytorch_model.bin": b"weights again " * 500,
    "onnx/model.onnx": b"weights once more " * 500,
    "onnx/config.json": b"{   }",
    "README.md": b"read me",
    "modeling_own.py": b"print('never')",
    ".gitattributes": b"* lfs",
}
NEEDED = {"config.json", "preprocessor_config.json", "tokenizer.json", "vocab.txt", "model.safetensors"}
#: Overrides with which every stage loads a checkpoint of the local hub.
OVERRIDES = ("checkpoints.grounding_dino=acme/dino", "checkpoints.sam2=acme/sam2")


class Hub(ThreadingHTTPServer):
    """A hub with some repositories, some of them gated, and their model cards."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cards: dict[str, dict[str, str]] = {}
        self.fetched: list[str] = []  # files that were downloaded, in order
        self.address = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that its client uses to list and download."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def send(self, code: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def respond(self, body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in hub.repos:
                self.send(404, b"{}", body, X_Error_Code="RepoNotFound")
            elif parts[4:5] == ["tree"]:
                self.json([self.entry(name, data) for name, data in hub.repos[repo].items()], body)
            else:
                files = [self.entry(name, data) for name, data in hub.repos[repo].items()]
                siblings = [
                    {"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]}
                    | ({"lfs": f["lfs"] | {"sha256": f["lfs"]["oid"]}} if "lfs" in f else {})
                    for f in files
                ]
                info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
                gated = "manual" if repo in hub.gated else False
                self.json(info | {"gated": gated, "private": False, "cardData": hub.cards.get(repo)}, body)
        elif "resolve" in parts:
            repo, name = "/".join(parts[:2]), "/".join(parts[4:])
            if repo not in hub.repos:
                self.send(404, b"", body, X_Error_Code="RepoNotFound")
            elif repo in hub.gated:
                self.send(403, b"", body, X_Error_Code="GatedRepo")
            elif name not in hub.repos[repo]:
                self.send(404, b"", body, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                data = hub.repos[repo][name]
                entry = self.entry(name, data)
                tags = {"ETag": f'"{entry["oid"]}"'}
                if "lfs" in entry:
                    tags |= {"X_Linked_Etag": f'"{entry["lfs"]["oid"]}"', "X_Linked_Size": str(len(data))}
                if body:
                    hub.fetched.append(f"{repo}/{name}")
                self.send(200, data, body, X_Repo_Commit=COMMIT, **tags)
        else:
            self.send(200, b"", body)

    def json(self, content: Any, body: bool) -> None:
        self.send(200, json.dumps(content).encode(), body, Content_Type="application/json")

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": sha1}
        if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".onnx")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    server.repos = {
        "acme/dino": dict(CHECKPOINT),
        "acme/sam2": {"sam2.1_hiera_tiny.pt": b"tiny " * 999, "sam2.1_hiera_large.pt": b"large " * 999},
        "acme/gated": dict(CHECKPOINT),
    }
    server.gated = {"acme/gated"}
    server.cards = {"acme/dino": {"license": "bsd-3-clause"}, "acme/gated": {"license": "other", "license_name": "own"}}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub: Hub, tmp_path: Path):
    """Run the command with the local hub and an empty cache, and check that it shows no traceback."""

    def command(*arguments: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        clean |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        out = subprocess.run(
            [sys.executable, "-m", "grounded_sam.cli.models", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=120,
            env={**clean, **env},
        )
        assert out.returncode == code, out.stdout + out.stderr
        assert "Traceback" not in out.stderr
        return out

    return command


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


def snapshot(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


def only_error(out: subprocess.CompletedProcess[str]) -> str:
    """Return the only line on stderr, without the name of the command."""
    lines = [line for line in out.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("grounded-sam-models: ")
    return lines[0].removeprefix("grounded-sam-models: ")


def test_the_command_is_installed_and_shows_help_quickly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"]["grounded-sam-models"] == "grounded_sam.cli.models:main"
    assert "models.yaml" in project["tool"]["setuptools"]["package-data"]["grounded_sam.weights"]
    code = (
        "import sys, grounded_sam.cli.models as m; m.parse_arguments(['list']); "
        "print({'torch', 'hydra'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
    started = time.monotonic()
    text = subprocess.check_output([sys.executable, "-m", "grounded_sam.cli.models", "--help"], text=True)
    assert time.monotonic() - started < 5
    assert "grounded-sam-models fetch detector=" in text and "hf auth login" in text


def test_the_list_covers_every_choice_with_weights():
    specs, errors = all_weights()
    assert not errors
    listed = {(spec.stage, spec.choice) for spec in specs}
    for stage in ("detector", "segmenter", "verify", "tracker"):
        for file in (conf_dir() / stage).glob("*.yaml"):
            if re.search(r"\n *checkpoint:", file.read_text(encoding="utf-8")):
                assert (stage, file.stem) in listed
            elif file.stem in ("none", "clicks", "stored"):
                assert (stage, file.stem) not in listed
    assert ("detector", "everything") in listed
    for spec in specs:  # classes that load a single file say so
        assert spec.repo is not None or spec.checkpoint == "builtin:shapes"
        assert (spec.file is not None) == (spec.choice in ("sam", "sam2", "everything")), spec


def test_only_files_that_are_loaded_are_selected_from_a_repository():
    assert set(files_to_load(CHECKPOINT, None)) == NEEDED
    no_safetensors = [name for name in CHECKPOINT if name != "model.safetensors"]
    assert set(files_to_load(no_safetensors, None)) == NEEDED - {"model.safetensors"} | {"pytorch_model.bin"}
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert set(files_to_load([*no_safetensors, *parts, "pytorch_model.bin.index.json"], None)) == {
        *parts,
        *(NEEDED - {"model.safetensors"}),
    }
    assert files_to_load(["a/b.pth", "config.json"], "a/b.pth") == ["a/b.pth"]


def test_list_works_with_and_without_the_network(run, hub):
    overrides = (*OVERRIDES, "segmenter=sam_hq", "checkpoints.sam_hq=acme/gated")
    rows = json.loads(run("list", "--json", *overrides).stdout)
    assert [(row["stage"], row["choice"], row["repo"], row["file"]) for row in rows] == [
        ("detector", "grounding_dino", "acme/dino", None),
        ("segmenter", "sam_hq", "acme/gated", None),
        ("tracker", "sam2", "acme/sam2", "sam2.1_hiera_tiny.pt"),
    ]
    needed = sum(len(CHECKPOINT[name]) for name in NEEDED)
    assert [row["size"] for row in rows] == [needed, needed, 5 * 999]
    assert [row["license"] for row in rows] == ["bsd-3-clause", "own", None]
    assert [row["gated"] for row in rows] == [False, True, False]
    assert [row["cached"] for row in rows] == ["no"] * 3
    table = run("list", *overrides).stdout
    for text in ("acme/gated", "bsd-3-clause", "sam2.1_hiera_tiny.pt", "5.0 kB", "unknown"):
        assert text in table

    hub.shutdown()
    hub.server_close()
    overrides = ("detector=sam3", "tracker=sam2_hf", "checkpoints.sam2_hf=acme/other")
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        started = time.monotonic()
        out = run("list", "--json", *overrides, **env)
        assert time.monotonic() - started < 15
        assert "the hub was not contacted" in only_error(out)
        sam3, other = json.loads(out.stdout)  # sam3 needs no segmenter
        assert (sam3["license"], sam3["gated"], sam3["size"], sam3["cached"]) == ("SAM License", True, None, "no")
        assert (other["license"], other["gated"], other["size"]) == (None, None, None)
    assert not hub.fetched


def test_list_shows_all_choices_including_those_of_the_user(run, tmp_path):
    (tmp_path / "own's" / "detector").mkdir(parents=True)
    (tmp_path / "own's" / "detector" / "mine.yaml").write_text("_target_: mine.Mine\ncheckpoint: acme/dino\n")
    (tmp_path / "own's" / "detector" / "wrong.yaml").write_text("_target_: mine.Mine\ncheckpoint: ${nothing}\n")
    out = run("list", "--json", "--config-dir", "own's")
    rows = {(row["stage"], row["choice"]): row for row in json.loads(out.stdout)}
    assert rows["detector", "mine"]["repo"] == "acme/dino" and rows["detector", "mine"]["size"]
    assert ("tracker", "sam2") in rows and ("segmenter", "sam") in rows
    assert "detector=wrong: " in out.stderr
    assert "repository facebook/sam3 not found" in out.stderr  # the local hub does not have it
    assert rows["detector", "sam3"]["license"] == "SAM License"
    text = run("path", "detector=mine", "--config-dir", "own's", *OVERRIDES, code=1)
    assert "download with: grounded-sam-models fetch '--config-dir=own'\"'\"'s' detector=mine" in only_error(text)


def test_path_works_offline_after_fetch(run, hub, cache):
    error = only_error(run("path", *OVERRIDES, code=1))
    assert "acme/dino of detector=grounding_dino, acme/sam2 of segmenter=sam2" in error
    assert f"download with: grounded-sam-models fetch {' '.join(OVERRIDES)}" in error
    out = run("fetch", *OVERRIDES)
    assert "detector=grounding_dino: acme/dino, 4.0 kB, 5 of 5 digests match, in " in out.stdout
    assert "segmenter=sam2, tracker=sam2: acme/sam2, 5.0 kB, 1 of 1 digests match, in " in out.stdout
    # Only files that are loaded, and once if two stages load them.
    assert sorted(hub.fetched) == sorted([*(f"acme/dino/{n}" for n in NEEDED), "acme/sam2/sam2.1_hiera_tiny.pt"])
    assert {p.name for p in snapshot(cache, "acme/dino").iterdir()} == NEEDED
    before = len(hub.fetched)
    run("fetch", *OVERRIDES)
    assert len(hub.fetched) == before
    assert [row["cached"] for row in json.loads(run("list", "--json", *OVERRIDES).stdout)] == ["whole"] * 3

    hub.shutdown()
    hub.server_close()
    dino, sam2 = snapshot(cache, "acme/dino"), snapshot(cache, "acme/sam2") / "sam2.1_hiera_tiny.pt"
    out = run("path", *OVERRIDES)
    assert out.stdout.splitlines() == [str(dino), str(sam2), str(sam2)]
    assert out.stderr == ""
    rows = json.loads(run("list", "--json", *OVERRIDES).stdout)
    assert [(row["cached"], row["size"] == row["cached_size"]) for row in rows] == [("whole", True)] * 3
    assert rows[1]["path"] == str(sam2)
    assert "5 of 5 digests match" in run("fetch", *OVERRIDES).stdout  # verifies only
    error = only_error(run("fetch", *OVERRIDES, "segmenter.size=large", HF_HUB_OFFLINE="1", code=1))
    assert (
        error == "segmenter=sam2: acme/sam2 is not in the cache, and the hub was not contacted (HF_HUB_OFFLINE is set)"
    )

    (dino / "vocab.txt").unlink()  # as after an interrupted download
    rows = json.loads(run("list", "--json", *OVERRIDES).stdout)
    assert rows[0]["cached"] == "part" and rows[0]["size"] == rows[0]["cached_size"] + len(CHECKPOINT["vocab.txt"])
    assert "acme/dino of detector" in only_error(run("path", *OVERRIDES, code=1))


def test_damaged_files_are_detected_and_downloaded_again(run, hub, cache):
    run("fetch", *OVERRIDES)
    weights, vocab = (snapshot(cache, "acme/dino") / name for name in ("model.safetensors", "vocab.txt"))
    for path in (weights, vocab):
        blob = path.resolve()
        data = blob.read_bytes()
        blob.chmod(0o644)
        blob.write_bytes(b"X" + data[1:])
    # Newer caches share one copy between repositories, behind a second link; it is damaged too.
    shared, blob = cache / "blobs" / "ab" / ("ab" * 32), weights.resolve()
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    error = only_error(run("fetch", *OVERRIDES, HF_HUB_OFFLINE="1", code=1))
    assert "damaged in the cache: " in error and str(weights) in error and str(vocab) in error
    assert weights.read_bytes().startswith(b"X")  # nothing is deleted that cannot be replaced
    hub.fetched.clear()
    out = run("fetch", *OVERRIDES)
    assert "damaged in the cache, downloading again: " in only_error(out)
    assert sorted(hub.fetched) == ["acme/dino/model.safetensors", "acme/dino/vocab.txt"]
    assert weights.read_bytes() == CHECKPOINT["model.safetensors"] and not shared.exists()
    assert "5 of 5 digests match" in out.stdout


def test_a_file_that_is_not_the_official_one_is_refused(run, hub):
    hub.repos["facebook/sam2.1-hiera-tiny"] = {"sam2.1_hiera_tiny.pt": b"other"}
    overrides = ("detector=clicks", "tracker=none", "segmenter=sam2")
    error = only_error(run("fetch", *overrides, code=1))
    assert "matches the hub, but its SHA-256 is not the expected 7402e0d8" in error
    digest = hashlib.sha256(b"other").hexdigest()
    assert "1 of 1 digests match" in run("fetch", *overrides, f"segmenter.sha256={digest}").stdout


def test_a_cache_without_symlinks_cannot_be_verified(run, cache):
    overrides = (OVERRIDES[0], "segmenter=none", "tracker=none")
    run("fetch", *overrides)
    for path in snapshot(cache, "acme/dino").iterdir():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    out = run("fetch", *overrides)
    assert "0 of 5 digests match; the others cannot be verified" in out.stdout


def test_gated_and_missing_models_do_not_stop_the_others(run, hub, cache):
    overrides = (
        "detector=owlv2",
        "checkpoints.owlv2=acme/gated",
        "tracker=sam2_hf",
        "checkpoints.sam2_hf=acme/nothing",
    )
    out = run("fetch", *overrides, OVERRIDES[1], code=1)
    gated, missing = out.stderr.splitlines()
    assert gated.startswith("grounded-sam-models: detector=owlv2: acme/gated is gated: accept its license at ")
    assert "https://huggingface.co/acme/gated" in gated and "`hf auth login`" in gated and "HF_TOKEN" in gated
    assert missing.startswith(
        "grounded-sam-models: tracker=sam2_hf: repository acme/nothing not found; if it is private"
    )
    assert hub.fetched == ["acme/sam2/sam2.1_hiera_tiny.pt"]
    assert "segmenter=sam2: acme/sam2" in out.stdout
    assert not any(cache.rglob("model.safetensors"))
    error = only_error(
        run("fetch", "detector=clicks", "tracker=none", "segmenter=sam", "checkpoints.sam=acme/dino", code=1)
    )
    assert error == "segmenter=sam: acme/dino on the hub has no checkpoints/sam_vit_b_01ec64.pth"


def test_a_fetched_model_loads_offline(run, hub, tmp_path):
    """The selected files are those that transformers needs: load the small detector from the cache alone."""
    source = BUILTIN_DIR / "shapes-detector"
    hub.repos["acme/shapes"] = {p.name: p.read_bytes() for p in source.iterdir()} | {"README.md": b"no"}
    run("fetch", "checkpoints.grounding_dino=acme/shapes", "segmenter=none", "tracker=none")
    code = "from grounded_sam.detectors.grounding_dino import GroundingDino; GroundingDino('acme/shapes')"
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert out.returncode == 0, out.stderr


def test_local_and_builtin_weights_are_not_downloaded(run, hub, tmp_path):
    local = tmp_path / "local.safetensors"
    local.write_bytes((BUILTIN_DIR / "shapes-sam2.safetensors").read_bytes())
    out = run("fetch", "preset=shapes", "checkpoints.sam2=local.safetensors", "tracker=none")
    assert "detector=grounding_dino: builtin:shapes is part of the package, nothing to download" in out.stdout
    assert "segmenter=sam2: local.safetensors is local (local.safetensors), nothing to download" in out.stdout
    assert "tracker=none: loads no weights" in out.stdout
    assert not hub.fetched
    assert run("path", "preset=shapes", "tracker=none").stdout.splitlines() == [
        str(BUILTIN_DIR / "shapes-detector"),
        str(BUILTIN_DIR / "shapes-sam2.safetensors"),
    ]
    assert "part of the package" in run("list", "preset=shapes").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a command is missing: list, fetch or path"),
        (("lsit",), "unknown command 'lsit'; did you mean list?"),
        (("list", "--jsn"), "unrecognized arguments: --jsn"),
        (("fetch", "--json"), "--json goes with list"),
        (("fetch", "detector=dino"), "unknown choice detector=dino; the choices are clicks, "),
        (("path", "segmenter.siz=large"), "did you mean 'segmenter.size'?"),
        (("list", "segmenter.size=huge"), "segmenter.size must be tiny, small, base_plus or large, got 'huge'"),
        (("path", "checkpoints.sam2=gone.pt"), "no weights at 'gone.pt'"),
        (("list", "--config-dir", "gone"), "--config-dir: folder gone does not exist"),
    ],
)
def test_mistakes_are_reported_in_one_line(run, arguments, message):
    assert message in only_error(run(*arguments, code=1))

"""The server over HTTP: every route, odd files, refusals in words, many clients, and what they leave."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import run_command
from PIL import Image
from pycocotools import mask as coco_mask
from serving import running, until
from test_guarded_files import write_bomb

from grounded_sam import ImageError
from grounded_sam.cli.serve import check_extra, compose_server
from grounded_sam.config.compose import compose
from grounded_sam.errors import ConfigError
from grounded_sam.media.images import read_image
from grounded_sam.media.video import VideoDecoder
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.runner import Runner
from grounded_sam.serve.server import Server
from grounded_sam.serve.worker import Work
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.jsonl import frame_line
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.video import VideoSource
from grounded_sam.structures.detections import coco_annotation
from grounded_sam.structures.masks import pack_masks
from grounded_sam.structures.vocabulary import Vocabulary

for package in ("fastapi", "uvicorn", "python_multipart", "httpx"):
    pytest.importorskip(package, reason="the extra `serve`, or httpx, is not installed")

DEMO = Path(__file__).parents[1] / "grounded_sam" / "shapes" / "examples" / "demo"
TEXT = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Return a folder that the server may read: the scenes of the demo, a store and a sweep of them."""
    root = tmp_path_factory.mktemp("roots")
    (root / "photos").mkdir()
    for path in DEMO.glob("*.png"):
        (root / "photos" / path.name).write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def labeled(files, shapes) -> Path:
    """Store what the models find in the scenes, and make a sweep of two thresholds by hand."""
    words = Vocabulary.parse(TEXT)
    model = Pipeline(shapes.detector, shapes.segmenter, shapes.select, words)
    Runner(model, ImageSource(files / "photos"), [StoreSink(files / "labels", words)], files / "labels").run()
    (files / "labels" / "review.csv").write_text("file,reason\nscene-2.png,alike\n")
    for number, score in enumerate((0.45, 0.8)):
        folder = files / "sweep" / str(number)
        model = Pipeline(shapes.detector, shapes.segmenter, _select(shapes, score), words)
        Runner(model, ImageSource(files / "photos"), [CocoSink(folder, words)], folder).run()
        record = {"overrides": [f"select.score={score}"], "value": 1 - score, "images": 4, "seconds": {"all": 2.0}}
        (folder / "run.json").write_text(json.dumps(record))
        plain = files / "plain" / str(number)  # the same without ground truth
        shutil.copytree(folder, plain)
        found = {"value": None, "objects": {}, "empty": 0}
        (plain / "run.json").write_text(json.dumps({**record, **found}))
    return files


def _select(shapes, score: float):
    return replace(shapes.select, score=score)


@pytest.fixture(scope="module")
def client(labeled, shapes):
    """Serve with the models of the `shapes` fixture."""
    folders = f"serve.roots=[{labeled}]", f"serve.stores={{scenes: {labeled}/labels}}"
    sweeps = f"serve.sweeps={{scores: {labeled}/sweep, plain: {labeled}/plain}}"
    with running(*folders, sweeps, "serve.max_body_mb=4", load=lambda: shapes) as http:
        yield http


def send(client, path: Path | bytes, name: str = "") -> str:
    """Send a picture, and return its id."""
    content = path if isinstance(path, bytes) else path.read_bytes()
    answer = client.post("/v1/pictures", files={"file": (name or getattr(path, "name", "a.png"), content)})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def expected(detections) -> list[dict]:
    """Return what the command writes about detections, in the form of the server."""
    packed, entries = pack_masks(detections), []
    for i in range(len(packed)):
        entry = coco_annotation(packed, i, range(100))
        x, y, width, height = entry["bbox"]
        entries.append(
            {
                "class_id": entry["category_id"],
                "score": entry["score"],
                "box": pytest.approx([x, y, x + width, y + height], abs=2e-3),
                "area": entry["area"],
                "mask": entry["segmentation"],
            }
        )
    return entries


def shown(objects: list[dict]) -> list[dict]:
    """Return the keys of objects that `expected` has."""
    return [{key: entry[key] for key in ("class_id", "score", "box", "area", "mask")} for entry in objects]


def error_of(answer, status: int) -> str:
    """Check that an answer is an error in one sentence, without a path or a traceback, and return it."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    text = answer.json()["error"]
    assert text and "\n" not in text and "Traceback" not in text
    assert "/tmp" not in text and "site-packages" not in text and "grounded_sam-serve-" not in text, text
    return text


# About


def test_the_server_tells_what_it_is(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["status"] == "ready"
    about = client.get("/v1/about").json()
    assert about["stages"] == {
        "detector": "GroundingDino",
        "segmenter": "Sam2",
        "tracker": "Sam2Tracker",
        "verify": None,
    }
    assert about["device"] == "cpu" and about["stores"] == ["scenes"] and about["sweeps"] == ["plain", "scores"]
    score = compose(["preset=shapes"]).select.score
    assert about["settings"]["select"]["score"] == score and about["limits"]["max_body_bytes"] == 4_000_000
    assert {entry["license"] for entry in about["licenses"]} == {"apache-2.0"}
    assert "builtin:demo/scene-1.png" in about["examples"] and "token" not in json.dumps(about)


def test_health_answers_while_models_are_loaded():
    release = threading.Event()

    def load():
        release.wait()
        raise ConfigError("no such weights")

    with running(load=load, wait=False) as http:
        failures = []
        http.server.on_failure = failures.append
        start = time.monotonic()
        assert http.get("/health").status_code == 200 and time.monotonic() - start < 5
        assert "being loaded" in error_of(http.get("/ready"), 503)
        assert http.get("/v1/about").json()["ready"] is False
        picture = send(http, DEMO / "scene-1.png")
        answer = http.post("/v1/predict", json={"picture": picture, "text": ["car"]})
        assert "being loaded" in error_of(answer, 503) and answer.headers["retry-after"]
        folder = Path(http.server.folder.name)
        assert len(list(folder.rglob("scene-1.png"))) == 1
        release.set()
        until(lambda: failures)
        assert "no such weights" in str(failures[0])
    assert not folder.exists()


def test_all_routes_are_described_and_the_page_needs_no_other_host(client):
    described = client.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            assert route["summary"] and route["description"], f"{method} {path}"
    wanted = [
        *("/health", "/ready", "/v1/about", "/v1/pictures", "/v1/predict", "/v1/select", "/v1/sessions", "/v1/videos"),
        *("/v1/sessions/{session}", "/v1/sessions/{session}/segment", "/v1/videos/{video}/track"),
        *("/v1/jobs/{job}", "/v1/jobs/{job}/events", "/v1/videos/{video}/frames/{number}"),
        *("/v1/stores/{store}/pictures", "/v1/stores/{store}/pictures/{picture}/thumbnail"),
        *("/v1/stores/{store}/pictures/{picture}/image", "/v1/stores/{store}/pictures/{picture}/open"),
        *(
            "/v1/stores/{store}/edits",
            "/v1/stores/{store}/undo",
            "/v1/stores/{store}/next",
            "/v1/stores/{store}/videos",
        ),
        *("/v1/sweeps/{sweep}", "/v1/sweeps/{sweep}/compare"),
    ]
    assert set(wanted) <= set(described["paths"])
    for schema in described["components"]["schemas"].values():
        for name, entry in schema.get("properties", {}).items():
            assert entry.get("description") or schema["title"] in ("HTTPValidationError", "ValidationError"), name
    for path in ("/", "/docs", "/static/docs.js", "/static/base.css", "/static/icon.svg"):
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        links = re.findall(r"""(?:src|href|from|import)\s*=?\s*["'(]([^"')]+)""", answer.text)
        assert not [link for link in links if "//" in link], links
    assert "/static/docs.js" in client.get("/docs").text
    assert "no such route" in error_of(client.get("/v1/nothing"), 404)
    error_of(client.delete("/v1/about"), 405)


# Pictures


def odd_pictures(folder: Path) -> dict[str, Path]:
    """Write odd pictures that can be read."""
    scene = Image.open(DEMO / "scene-1.png").convert("RGB").resize((120, 80))
    paths = {name: folder / name for name in ("one.png", "exif.jpg", "cmyk.jpg", "deep.png", "alpha.png", "größe.png")}
    Image.new("RGB", (1, 1), "red").save(paths["one.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.save(paths["exif.jpg"], exif=exif)
    scene.convert("CMYK").save(paths["cmyk.jpg"])
    Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257).save(paths["deep.png"])
    scene.putalpha(128)
    scene.save(paths["alpha.png"])
    scene.convert("P").save(paths["größe.png"])
    return paths


def test_odd_pictures_are_read_as_the_command_does(client, tmp_path, shapes):
    for name, path in odd_pictures(tmp_path).items():
        image = read_image(path)
        answer = client.post("/v1/pictures", files={"file": (name, path.read_bytes())}).json()
        assert (answer["height"], answer["width"], answer["name"]) == (*image.shape[:2], name)
        found = client.post("/v1/predict", json={"picture": answer["id"], "text": TEXT}).json()
        assert shown(found["objects"]) == expected(shapes.segment(path, TEXT)), name


def test_damaged_pictures_are_refused_in_the_words_of_the_command(client, tmp_path):
    whole = (DEMO / "scene-1.png").read_bytes()
    write_bomb(tmp_path / "bomb.png")
    bad = {"cut.png": whole[: len(whole) // 2], "empty.png": b"", "text.png": b"hello", "a.eps": b"%!PS-Adobe-3.0 EPSF"}
    Image.open(DEMO / "scene-1.png").convert("RGB").save(tmp_path / "cut.jpg")
    bad["cut.jpg"] = (tmp_path / "cut.jpg").read_bytes()[:-5000]
    bad["bomb.png"] = (tmp_path / "bomb.png").read_bytes()
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError) as raised:
            read_image(tmp_path / name)
        answer = client.post("/v1/pictures", files={"file": (name, content)})
        assert error_of(answer, 422) == str(raised.value).replace(f"{tmp_path}/", "")
    assert not list(Path(client.server.folder.name, "uploads").glob("part-*"))


def test_a_picture_comes_as_base64_or_as_a_path(client, files):
    content = (DEMO / "scene-1.png").read_bytes()
    data = base64.b64encode(content).decode()
    bodies = [
        {"data": data, "name": "../../scene-1.png"},
        {"data": f"data:image/png;base64,{data}"},
        {"path": "photos/scene-1.png"},
        {"path": str(files / "photos" / "scene-1.png")},
        {"path": "builtin:demo/scene-1.png"},
    ]
    ids = set()
    for body in bodies:
        answer = client.post("/v1/pictures", json=body)
        assert answer.status_code == 200, answer.text
        ids.add(answer.json()["id"])
    assert ids == {send(client, DEMO / "scene-1.png")}
    shown_picture = client.get(f"/v1/pictures/{ids.pop()}?max_side=100")
    assert Image.open(io.BytesIO(shown_picture.content)).size == (100, 67)
    for body in ({}, {"data": data, "path": "a"}, {"data": "???"}, {"date": data}, [1], {"path": 7}):
        error_of(client.post("/v1/pictures", json=body), 422)
    error_of(client.post("/v1/pictures", content=b"{", headers={"content-type": "application/json"}), 422)
    error_of(client.post("/v1/pictures", files={"other": ("a.png", content)}), 422)
    error_of(client.get("/v1/pictures/0123"), 404)


def test_no_path_leaves_the_roots(client, files, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    (files / "link.png").symlink_to(secret)
    (files / "folder").symlink_to(tmp_path)
    (files / "loop.png").symlink_to(files / "loop.png")
    outside = [
        *(str(secret), "../secret.png", "photos/../../secret.png", "link.png", "folder/secret.png", "/etc/passwd"),
        *("/etc/no-such-file", "~/x.png", "/dev/zero", "http://example.com/a.png", f"{files}/../{files.name}x/a.png"),
    ]
    texts = set()
    for path in outside:
        answer = client.post("/v1/pictures", json={"path": path})
        if answer.status_code == 404:  # `~` and `http:` are names of files in the roots, which are not there
            assert path.startswith(("~", "http")) and "no such file" in error_of(answer, 404)
        else:
            texts.add(error_of(answer, 403))
        assert client.post("/v1/videos", json={"path": path}).status_code in (403, 404)
    assert len(texts) == 1  # whether there is a file or not
    for path in ("", "a\0b", "a" * 5000):
        error_of(client.post("/v1/pictures", json={"path": path}), 422)
    assert client.post("/v1/pictures", json={"path": "loop.png"}).status_code in (403, 404)
    os.mkfifo(files / "pipe.png")
    for path in ("pipe.png", "photos"):
        error_of(client.post("/v1/pictures", json={"path": path}), 422)
    error_of(client.post("/v1/pictures", json={"path": "photos/none.png"}), 404)
    error_of(client.post("/v1/pictures", json={"path": "builtin:demo/../../x"}), 404)


# Predictions


def test_a_prediction_is_what_the_command_finds(client, shapes, tmp_path):
    words = {"text": TEXT[:3], "negatives": ["red square"], "prompt_template": "a {}"}
    vocabulary = Vocabulary.parse(TEXT[:3], ["red square"]).with_prompt_template("a {}")
    for number in (1, 2, 3):
        path = DEMO / f"scene-{number}.png"
        body = {"picture": send(client, path), "select": {"score": 0.3, "top_k": 4}, **words}
        answer = client.post("/v1/predict", json=body).json()
        assert shown(answer["objects"]) == expected(shapes.segment(path, vocabulary, score=0.3, top_k=4))
        assert [entry["id"] for entry in answer["objects"]] == answer["selected"]
        assert answer["classes"] == TEXT[:3] and (answer["width"], answer["height"]) == (960, 640)
    arguments = ["preset=shapes", f"input={path}", "text=[red circle,blue square]", "output=out", "sink=coco"]
    assert run_command("grounded_sam.cli.main", arguments, tmp_path).returncode == 0
    written = json.loads((tmp_path / "out" / "annotations.json").read_text())["annotations"]
    served = client.post("/v1/predict", json={"picture": send(client, path), "text": "red circle, blue square"}).json()
    assert len(written) == len(served["objects"]) > 0
    for entry, own in zip(written, served["objects"], strict=True):
        assert (entry["score"], entry["segmentation"], entry["area"]) == (own["score"], own["mask"], own["area"])
        assert entry["category_id"] == own["class_id"] + 1 and own["class"] in TEXT
        x, y, width, height = entry["bbox"]
        assert own["box"] == pytest.approx([x, y, x + width, y + height], abs=2e-3)


def test_the_same_request_computes_nothing(client):
    body = {"picture": send(client, DEMO / "scene-4.png"), "text": {"ring": ["orange ring"]}}
    first = client.post("/v1/predict", json=body)
    computed = client.server.predictor.computed
    again = client.post("/v1/predict", json={**body, "select": {}})
    assert again.content == first.content and client.server.predictor.computed == computed
    client.post("/v1/predict", json={**body, "text": {"ring": ["ring"]}})
    assert client.server.predictor.computed == computed + 1


def test_selections_are_those_of_the_command(client, shapes):
    path = DEMO / "scene-1.png"
    body = {"picture": send(client, path), "text": TEXT, "min_score": 0.05, "masks": "none"}
    everything = client.post("/v1/predict", json=body).json()
    assert everything["min_score"] == 0.05 and len(everything["objects"]) > len(everything["selected"])
    marked = [entry["id"] for entry in everything["objects"] if entry["selected"]]
    assert sorted(marked) == sorted(everything["selected"])
    computed = client.server.predictor.computed
    selections = [
        {},
        {"score": 0.05},
        {"score": 0.1, "nms": 0.2, "class_agnostic": True},
        {"score": 0.1, "nms": None},
        {"score": 0.2, "class_score": {"red circle": 0.9}},
        {"score": 0.1, "nms_by": "mask", "nms": 0.4},
        {"score": 0.1, "max_ios": 0.8, "top_k": 3},
        {"score": 0.1, "min_area": 2000, "max_area": 9000.5, "top_k": 2},
        {"top_k": 0},
    ]
    for select in selections:
        answer = client.post(
            "/v1/select", json={"prediction": everything["prediction"], "select": select, "masks": "rle"}
        )
        assert answer.status_code == 200, answer.text
        wanted = shapes.segment(path, TEXT, **select)
        own = answer.json()["objects"]
        assert [(entry["class"], entry["score"], entry["box"]) for entry in own] == [
            (name, round(float(score), 6), pytest.approx(box.tolist(), abs=2e-3))
            for name, score, box in zip(wanted.data["class_name"], wanted.confidence, wanted.xyxy, strict=True)
        ], select
        for entry, mask in zip(own, wanted.mask, strict=True):  # decoded together with others: rounding may differ
            assert (coco_mask.decode(entry["mask"]).astype(bool) ^ mask).sum() <= 2
    assert client.server.predictor.computed == computed
    low = client.post("/v1/select", json={"prediction": everything["prediction"], "select": {"score": 0.01}})
    assert "min_score=0.01" in error_of(low, 409)
    plain = client.post("/v1/predict", json={**body, "min_score": None}).json()
    stricter = client.post("/v1/select", json={"prediction": plain["prediction"], "select": {"score": 0.9}})
    assert stricter.status_code == 200
    error_of(client.post("/v1/select", json={"prediction": plain["prediction"], "select": {"nms": 0.1}}), 409)
    error_of(client.post("/v1/select", json={"prediction": "abcdef"}), 404)


def test_masks_come_in_all_forms(client):
    body = {"picture": send(client, DEMO / "scene-2.png"), "text": TEXT}
    rle, polygon, png, none = (
        client.post("/v1/predict", json={**body, "masks": form}).json()["objects"]
        for form in ("rle", "polygon", "png", "none")
    )
    assert len(rle) > 2
    for a, b, c, d in zip(rle, polygon, png, none, strict=True):
        mask = coco_mask.decode(a["mask"])
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(b["mask"], 640, 960)))
        assert (drawn == mask).all() and a["area"] == mask.sum()
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(c["mask"]))))
        assert (pixels == mask.astype(bool)).all() and "mask" not in d


def test_bad_questions_are_refused_in_words(client, files):
    picture = send(client, DEMO / "scene-1.png")
    (files / "classes.yaml").write_text("[red circle]")
    bad = [
        *({"text": f"{files}/classes.yaml"}, {"text": ["/etc/none.txt"]}, {"text": []}, {"text": {}}, {"text": "..."}),
        *({"text": ["a", "a"], "negatives": ["a"]}, {"text": ["a"], "prompt_template": "b"}, {"text": 7}),
        *({"text": ["x" * 501]}, {"text": [f"c{i}" for i in range(1001)]}, {"negatives": ["a"]}, {}),
        *(
            {"text": ["a"], "select": {"score": 2}},
            {"text": ["a"], "select": {"scores": 1}},
            {"text": ["a"], "masks": "x"},
        ),
        *({"text": ["a"], "select": {"class_score": {"b": 0.5}}}, {"text": ["a"], "min_score": -1}, {"texts": ["a"]}),
        *({"text": {"a": {"b": {"c": "d"}}}}, {"text": ["a"], "select": {"top_k": 1.5}}),
    ]
    for body in bad:
        error_of(client.post("/v1/predict", json={"picture": picture, **body}), 422)
    error_of(client.post("/v1/predict", json={"picture": "ab", "text": ["a"]}), 404)
    error_of(client.post("/v1/predict", json={"picture": "../x", "text": ["a"]}), 422)
    nested = "[" * 100_000
    headers = {"content-type": "application/json"}
    assert client.post("/v1/predict", content=nested, headers=headers).status_code in (400, 422)


# Guards


def test_too_large_requests_are_refused(client):
    for headers in ({}, {"transfer-encoding": "chunked"}):
        content = b"x" * 5_000_000
        body = iter([content]) if headers else content
        answer = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
        assert "larger than" in error_of(answer, 413)
    answer = client.post("/v1/pictures", files={"file": ("a.png", b"x" * 5_000_000)})
    assert "larger than" in error_of(answer, 413)


def test_a_token_is_needed_where_one_is_set(shapes):
    with running("serve.token=a-long-secret", "serve.cors=[https://labels.example.com]", load=lambda: shapes) as http:
        assert http.get("/v1/about").status_code == 200
        basic = base64.b64encode(b"anyone:a-long-secret").decode()
        assert http.get("/v1/about", headers={"Authorization": f"Basic {basic}"}).status_code == 200
        wrong = [
            "",
            "Bearer",
            "Bearer a-long-secre",
            "Bearer a-long-secret2",
            "Basic !!!",
            "Basic YTpi",
            "Token x",
            "Bearer ä",
        ]
        for text in wrong:
            for path in ("/v1/about", "/", "/docs", "/openapi.json", "/static/base.css", "/v1/nothing"):
                answer = http.get(path, headers={"Authorization": text.encode()})
                assert "token" in error_of(answer, 401) and "basic" in answer.headers["www-authenticate"].lower()
            assert http.get("/health", headers={"Authorization": text.encode()}).status_code == 200
        origin = {"Origin": "https://labels.example.com"}
        answer = http.get("/v1/about", headers=origin)
        assert answer.headers["access-control-allow-origin"] == origin["Origin"]
        preflight = {
            **origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        assert http.options("/v1/predict", headers=preflight).status_code == 200
        error_of(http.get("/v1/about", headers={"Origin": "https://evil.example.com"}), 403)


def test_pages_of_other_origins_and_names_are_refused(client):
    host = "{}:{}".format(*client.address)
    assert client.get("/v1/about", headers={"Origin": f"http://{host}"}).status_code == 200
    for origin in ("https://evil.example.com", "null", f"http://{client.address[0]}:1", "http://["):
        error_of(client.get("/v1/about", headers={"Origin": origin}), 403)
    error_of(client.get("/v1/about", headers={"Host": "evil.example.com"}), 421)
    assert client.get("/v1/about", headers={"Host": f"localhost:{client.address[1]}"}).status_code == 200


# Many clients


def test_eight_clients_at_once_get_the_answers_of_one(client):
    pictures = [send(client, DEMO / f"scene-{number}.png") for number in (1, 2, 3, 4)]
    bodies = [{"picture": picture, "text": TEXT[:4], "select": {"score": 0.4}} for picture in pictures] * 2
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: client.post("/v1/predict", json=body).content, bodies))
    client.server.predictor._kept.clear()
    assert together == [client.post("/v1/predict", json=body).content for body in bodies]


def memory() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_memory_stays_flat(client):
    def predict_and_click(count: int) -> None:
        for number in range(count):
            image = Image.new("RGB", (320, 200), (number % 256, number // 256, 80))
            out = io.BytesIO()
            image.save(out, "PNG")
            picture = send(client, out.getvalue())
            assert client.post("/v1/predict", json={"picture": picture, "text": TEXT[:2]}).status_code == 200
            session = client.post("/v1/sessions", json={"picture": picture}).json()["id"]
            prompts = {"prompts": [{"points": [[20, 30]]}]}
            assert client.post(f"/v1/sessions/{session}/segment", json=prompts).status_code == 200
            client.delete(f"/v1/sessions/{session}")

    count = int(os.environ.get("SERVE_MEMORY_COUNT", "12"))
    predict_and_click(count // 2)
    before = memory()
    predict_and_click(count)
    assert memory() - before < 60e6
    assert len(client.server.sessions) == 0


def block(client) -> threading.Event:
    """Keep the models busy until the event is set."""
    started, release = threading.Event(), threading.Event()

    def wait(payloads):
        started.set()
        release.wait(60)
        return payloads

    client.server.worker.submit(Work(wait))
    assert started.wait(60)
    return release


def test_a_client_that_leaves_takes_its_request_with_it(client):
    worker, picture = client.server.worker, send(client, DEMO / "scene-3.png")
    computed = client.server.predictor.computed
    release = block(client)
    try:
        body = json.dumps({"picture": picture, "text": ["never asked before"]}).encode()
        head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        with socket.create_connection(client.address) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: worker.num_waiting == 1, 60)
        until(lambda: not client.server.uploads.get(picture, "image").users, 60)
        assert all(work.future.cancelled() for work in worker._waiting)
    finally:
        release.set()
    until(lambda: worker.num_waiting == 0, 60)
    assert client.server.predictor.computed == computed


def test_a_client_that_dies_while_it_sends_leaves_nothing(client):
    uploads = client.server.uploads
    before = len(uploads), {path.name for path in uploads.folder.iterdir()}
    content = (DEMO / "clip.mp4").read_bytes()
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n' + content[: len(content) // 2]
    )
    head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection(client.address) as connection:
        connection.sendall(f"{head}Content-Length: {len(content) + 100}\r\n\r\n".encode() + form)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # as a killed process does
    assert client.get("/v1/about").status_code == 200
    assert (len(uploads), {path.name for path in uploads.folder.iterdir()}) == before


def test_a_full_queue_says_when_to_try_again(client, monkeypatch):
    worker, picture = client.server.worker, send(client, DEMO / "scene-3.png")
    monkeypatch.setattr(worker, "max_waiting", 2)
    release = block(client)
    try:
        with ThreadPoolExecutor(3) as pool:
            body = {"picture": picture, "text": ["blue square"]}
            waiting = [pool.submit(client.post, "/v1/predict", json=body) for _ in range(2)]
            until(lambda: worker.num_waiting == 2, 60)
            answer = client.post("/v1/sessions", json={"picture": picture})
            assert "try again" in error_of(answer, 429) and int(answer.headers["retry-after"]) >= 1
            release.set()
            assert [future.result().status_code for future in waiting] == [200, 200]
    finally:
        release.set()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError(), 503, "not enough memory"),
        (ZeroDivisionError("in /tmp/secret/file.py"), 500, "GROUNDED_SAM_DEBUG"),
        (ImageError("/tmp/secret/a.png: odd"), 422, "a.png: odd"),
    ],
)
def test_a_failing_model_answers_in_words_and_the_server_goes_on(client, monkeypatch, error, status, words):
    picture = send(client, DEMO / "scene-3.png")

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(client.server.pipeline.detector, "detect", fail)
        answer = client.post("/v1/predict", json={"picture": picture, "text": [f"words of {status}"]})
        assert words in error_of(answer, status)
    assert client.post("/v1/predict", json={"picture": picture, "text": [f"words of {status}"]}).status_code == 200


# Sessions


def test_sessions_segment_points_boxes_and_masks(client, shapes):
    path = DEMO / "scene-1.png"
    picture = send(client, path)
    found = client.post("/v1/predict", json={"picture": picture, "text": TEXT}).json()["objects"][0]
    x1, y1, x2, y2 = found["box"]
    center = [(x1 + x2) / 2, (y1 + y2) / 2]
    session = client.post("/v1/sessions", json={"picture": picture}).json()
    assert session["bytes"] > 100_000 and (session["width"], session["height"]) == (960, 640)
    url = f"/v1/sessions/{session['id']}/segment"
    clicks = [
        [{"class": "cup", "points": [center]}],
        [{"class": "cup", "points": [center, [5, 5]], "labels": [1, 0]}],
        [{"class": "box", "box": found["box"]}, {"points": [center]}],
    ]
    with shapes.session(path) as own:
        for prompts in clicks:
            answer = client.post(url, json={"prompts": prompts}).json()
            wanted = pack_masks(own.segment([{"class": "object", **prompt} for prompt in prompts]))
            assert [entry["mask"]["counts"] for entry in answer["objects"]] == [
                rle["counts"].decode() for rle in wanted.data["rle"]
            ]
            assert answer["objects"][0]["mask_score"] == pytest.approx(float(wanted.data["mask_score"][0]), abs=1e-6)
    answer = client.post(url, json={"prompts": [{"mask": found["mask"]}], "masks": "none"}).json()
    assert "mask" not in answer["objects"][0] and answer["classes"] == ["object"]
    bad = [
        *([], [{"class": "a"}], [{"points": [[1]]}], [{"points": [[1, "x"]]}], [{"points": [[5000, 1]]}]),
        *([{"points": [[1, 1]], "labels": [2]}], [{"points": [[1, 1]], "labels": [1, 1]}], [{"box": [9, 9, 1, 1]}]),
        *([{"mask": {"size": [1, 1], "counts": "0"}}], [{"mask": {"size": [640, 960], "counts": "!!"}}]),
        [{"mask": "/etc/passwd"}],
    ]
    for prompts in bad:
        error_of(client.post(url, json={"prompts": prompts}), 422)
    assert client.delete(f"/v1/sessions/{session['id']}").status_code == 204
    for answer in (client.delete(f"/v1/sessions/{session['id']}"), client.post(url, json={"prompts": clicks[0]})):
        assert "open it again" in error_of(answer, 404)


def test_the_oldest_sessions_make_room(client, monkeypatch):
    picture = send(client, DEMO / "scene-2.png")
    first = client.post("/v1/sessions", json={"picture": picture}).json()
    monkeypatch.setattr(client.server.sessions._open, "max_bytes", int(first["bytes"] * 2.5))
    others = [client.post("/v1/sessions", json={"picture": picture}).json()["id"] for _ in range(3)]
    assert len(client.server.sessions) == 2 and client.server.sessions.num_bytes <= first["bytes"] * 2.5
    prompts = {"prompts": [{"points": [[20, 30]]}]}
    statuses = [
        client.post(f"/v1/sessions/{session}/segment", json=prompts).status_code for session in (first["id"], *others)
    ]
    assert statuses == [404, 404, 200, 200]


# Videos


def events(client, job: str, last: int | None = None) -> tuple[list[dict], dict]:
    """Return the lines of a job, and its end."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    lines, kind = [], ""
    with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                lines.append(json.loads(line.removeprefix("data: ")))
    assert kind == "end"
    return lines[:-1], lines[-1]


def test_a_video_is_tracked_as_the_command_does(client, shapes):
    clip = DEMO / "clip.mp4"
    with clip.open("rb") as file:
        video = client.post("/v1/videos", files={"file": ("clip.mp4", file)}).json()
    assert video == {**client.post("/v1/videos", json={"path": "builtin:demo/clip.mp4"}).json()}
    decoded = list(VideoDecoder(clip, stop=6))
    assert (video["height"], video["width"]) == decoded[0].image.shape[:2] and video["frames"] >= 30
    clicks = [{"class": "thing", "points": [[5.0, 5.0]], "frame": 3}]
    body = {"text": TEXT[:2], "clicks": clicks, "stop": 6, "track": {"redetect_every": 3}}
    job = client.post(f"/v1/videos/{video['id']}/track", json=body)
    assert job.status_code == 202 and job.json()["total"] == 6
    picture = send(client, DEMO / "scene-1.png")  # answered between two frames
    assert client.post("/v1/predict", json={"picture": picture, "text": ["green star"]}).status_code == 200
    lines, end = events(client, job.json()["id"])
    assert (end["state"], end["frames"], end["error"]) == ("done", 6, None)
    own = replace(shapes.track_settings, redetect_every=3)
    model = Pipeline(shapes.detector, shapes.segmenter, shapes.select, tracker=shapes.tracker, track=own)
    wanted = [frame_line(result) for result in model.track(VideoSource(clip, stop=6), TEXT[:2], clicks)]
    assert lines == wanted
    again, _ = events(client, job.json()["id"], last=3)
    assert again == wanted[4:]
    error_of(client.get(f"/v1/jobs/{job.json()['id']}/events", headers={"Last-Event-ID": "x"}), 422)
    for number in (4, 2, 3):
        shown_frame = client.get(f"/v1/videos/{video['id']}/frames/{number}")
        pixels = np.asarray(Image.open(io.BytesIO(shown_frame.content)).convert("RGB"), int)
        assert np.abs(pixels - decoded[number].image).mean() < 4
    error_of(client.get(f"/v1/videos/{video['id']}/frames/100000"), 404)
    error_of(client.get(f"/v1/videos/{video['id']}/frames/-1"), 422)
    assert client.delete(f"/v1/jobs/{job.json()['id']}").status_code == 204
    error_of(client.get(f"/v1/jobs/{job.json()['id']}"), 404)
    assert not list(Path(client.server.folder.name, "jobs").iterdir())


def test_tracking_ends_when_it_is_cancelled_or_nobody_listens(client, monkeypatch):
    video = client.post("/v1/videos", json={"path": "builtin:demo/clip.mp4"}).json()["id"]
    release = block(client)
    jobs = [client.post(f"/v1/videos/{video}/track", json={"text": ["red circle"]}).json()["id"] for _ in range(3)]
    held = [client.server.jobs.get(job) for job in jobs]
    assert client.server.uploads.get(video, "video").users == 3
    held[1]._idle_s = 0.0
    try:
        assert client.delete(f"/v1/jobs/{jobs[0]}").status_code == 204
        assert held[0].state == "cancelled"
    finally:
        release.set()
    until(lambda: held[1].is_over)
    assert held[1].state == "cancelled" and "nobody has listened" in held[1].error
    until(lambda: held[2].num_frames > 0)
    assert client.delete(f"/v1/jobs/{jobs[2]}").status_code == 204
    until(lambda: held[2].is_over and client.server.worker.num_long == 0)
    assert held[2].num_frames < 30 and not client.server.uploads.get(video, "video").users
    until(lambda: not held[2].path.exists())


def test_bad_videos_are_refused_in_words(client, files):
    bad = {"a.mp4": b"not a video", "list.mp4": b"#EXTM3U\n#EXTINF:1,\nreal.mp4\n", "empty.mp4": b""}
    for name, content in bad.items():
        text = error_of(client.post("/v1/videos", files={"file": (name, content)}), 422)
        assert text.startswith(name)
    video = client.post("/v1/videos", json={"path": "builtin:demo/clip.mp4"}).json()["id"]
    for body in (
        {"text": []},
        {"stop": 0},
        {"text": ["a"], "start": 9, "stop": 3},
        {"text": ["a"], "track": {"x": 1}},
        {},
    ):
        error_of(client.post(f"/v1/videos/{video}/track", json=body), 422)
    error_of(client.post("/v1/videos/abc/track", json={"text": ["a"]}), 404)
    assert not client.server.uploads.get(video, "video").users


# Stores and sweeps


def test_a_store_is_browsed_by_class_score_and_reason(client, labeled):
    page = client.get("/v1/stores/scenes/pictures").json()
    assert page["total"] == 4 and page["next"] is None and page["classes"] == TEXT
    names = [picture["name"] for picture in page["pictures"]]
    assert names == [f"scene-{i}.png" for i in (1, 2, 3, 4)]
    first = page["pictures"][0]
    whole = client.get(f"/v1/stores/scenes/pictures/{first['id']}").json()
    assert len(whole["detections"]) == first["objects"] == sum(first["classes"].values())
    assert min(entry["score"] for entry in whole["detections"]) == first["min_score"]

    def listed(**query):
        return [p["name"] for p in client.get("/v1/stores/scenes/pictures", params=query).json()["pictures"]]

    for name in TEXT:
        assert listed(**{"class": name}) == [p["name"] for p in page["pictures"] if name in p["classes"]]
    assert listed(max_score=0) == [] and len(listed(max_score=1)) == 4
    assert listed(reason="alike") == ["scene-2.png"] and listed(reason="empty") == []
    crowded = [p["objects"] for p in client.get("/v1/stores/scenes/pictures?reason=crowded").json()["pictures"]]
    assert crowded == sorted(crowded, reverse=True)
    uncertain = [p["min_score"] for p in client.get("/v1/stores/scenes/pictures?reason=uncertain").json()["pictures"]]
    assert uncertain == sorted(uncertain)
    assert client.get("/v1/stores/scenes/pictures?reason=skipped").json()["skipped"] == []
    thumbnail = client.get(f"/v1/stores/scenes/pictures/{first['id']}/thumbnail?max_side=64")
    assert max(Image.open(io.BytesIO(thumbnail.content)).size) == 64
    assert listed(cursor=2) == names[2:] and listed(cursor=99) == []
    for query in ({"reason": "x"}, {"max_score": 2}, {"cursor": -1}, {"cursor": "x"}):
        error_of(client.get("/v1/stores/scenes/pictures", params=query), 422)
    error_of(client.get("/v1/stores/scenes/pictures", params={"class": "x"}), 404)
    error_of(client.get("/v1/stores/none/pictures"), 404)
    error_of(client.get("/v1/stores/scenes/pictures/abc"), 404)


def test_a_click_corrects_a_mask_of_a_store(client):
    picture = client.get("/v1/stores/scenes/pictures").json()["pictures"][0]
    url = f"/v1/stores/scenes/pictures/{picture['id']}"
    before = client.get(url).json()
    found = before["detections"][0]
    opened = client.post(f"{url}/open").json()
    assert opened["id"] == send(client, DEMO / picture["name"]) and opened["width"] == picture["width"]
    session = client.post("/v1/sessions", json={"picture": opened["id"]}).json()["id"]
    x1, y1, x2, y2 = found["box"]
    prompts = [{"class": found["class"], "points": [[(x1 + x2) / 2, (y1 + y2) / 2]], "mask": found["mask"]}]
    mask = client.post(f"/v1/sessions/{session}/segment", json={"prompts": prompts}).json()["objects"][0]["mask"]
    edit = {"action": "mask", "object_id": found["object_id"], "mask": mask}
    answer = client.post("/v1/stores/scenes/edits", json={"edits": [edit], "author": "ann"}).json()
    changed = next(e for e in client.get(url).json()["detections"] if e["object_id"] == found["object_id"])
    assert (changed["mask"], changed["status"], changed["author"]) == (mask, "edited", "ann")
    assert client.post("/v1/stores/scenes/undo", json={"batch": answer["batch"]}).status_code == 200
    assert client.get(url).json() == before
    client.delete(f"/v1/sessions/{session}")


def test_pictures_of_a_store_outside_of_the_roots_are_not_shown(labeled, shapes):
    with running(
        f"serve.roots=[{labeled}/labels]", f"serve.stores={{s: {labeled}/labels}}", load=lambda: shapes
    ) as http:
        first = http.get("/v1/stores/s/pictures").json()["pictures"][0]["id"]
        for route in ("thumbnail", "image"):
            assert "outside" in error_of(http.get(f"/v1/stores/s/pictures/{first}/{route}"), 403)
        assert "outside" in error_of(http.post(f"/v1/stores/s/pictures/{first}/open"), 403)
    with pytest.raises(ConfigError, match=r"serve.stores.s: .* is in none of serve.roots"):
        Server(compose_server([f"serve.stores={{s: {labeled}/labels}}"])[0])


def test_the_jobs_of_a_sweep_are_compared(client):
    table = client.get("/v1/sweeps/scores").json()
    assert [row["job"] for row in table["rows"]] == ["0", "1"] and "select.score" in table["columns"]
    answer = client.get("/v1/sweeps/scores/compare", params={"a": "0", "b": "1", "masks": "none"}).json()
    assert answer["total"] == 4 and answer["only_a"] > 0 == answer["only_b"] and answer["matched"] > 0
    different = [len(picture["only_a"]) for picture in answer["pictures"]]
    assert different == sorted(different, reverse=True) and sum(different) == answer["only_a"]
    assert all(entry["score"] < 0.8 for picture in answer["pictures"] for entry in picture["only_a"])
    pair = next(picture["matched"][0] for picture in answer["pictures"] if picture["matched"])
    assert pair["iou"] > 0.99 and pair["a"]["box"] == pair["b"]["box"]
    for query in ({"a": "0"}, {"a": "0", "b": "1", "min_iou": 0}):
        error_of(client.get("/v1/sweeps/scores/compare", params=query), 422)
    for job in ("2", "../labels", "/etc"):
        error_of(client.get("/v1/sweeps/scores/compare", params={"a": "0", "b": job}), 404)
    error_of(client.get("/v1/sweeps/none"), 404)


def test_a_sweep_without_ground_truth_has_counts_and_agreement(client, files):
    table = client.get("/v1/sweeps/plain").json()
    assert table["metric"] is None and table["notes"] == []
    compared = client.get("/v1/sweeps/plain/compare", params={"a": "0", "b": "1", "masks": "none"}).json()
    different = compared["only_a"] + compared["only_b"]
    wanted = 2 * compared["matched"] / (2 * compared["matched"] + different)
    assert [row["agreement"] for row in table["rows"]] == [pytest.approx(wanted)] * 2
    assert [row["empty"] for row in table["rows"]] == [0, 0] and table["rows"][0]["agrees with 1"] < 1
    (files / "plain" / "1" / "annotations.json").write_text("damaged")
    os.utime(files / "plain" / "1" / "run.json")
    table = client.get("/v1/sweeps/plain").json()
    (note,) = table["notes"]
    assert note.startswith("no agreement of job 1: ") and str(files) not in note
    assert "agreement" not in table["columns"] or table["rows"][0]["agreement"] is None


# The command


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"the server needs uvicorn: pip install 'grounded_sam\[serve\]'"):
        check_extra()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve.prot=1"], "unknown key 'serve.prot'; did you mean 'serve.port'"),
        (["serve.host=0.0.0.0"], "needs a token: set the environment variable GROUNDED_SAM_TOKEN"),
        (["serve.roots=[/no/such/folder]"], "serve.roots: folder /no/such/folder does not exist"),
        (["-m"], "-m is a flag of grounded-sam"),
        (["8000"], "expected key=value"),
        (["serve=other"], "unknown choice serve=other"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, message):
    result = run_command("grounded_sam.cli.serve", words, tmp_path, {"GROUNDED_SAM_TOKEN": ""})
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert result.stderr.startswith("grounded-sam-serve: ") and result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["preset=shapes", f"serve.port={taken.getsockname()[1]}"]
        result = run_command("grounded_sam.cli.serve", words, tmp_path)
    assert result.returncode == 1 and "choose another with serve.host or serve.port" in result.stderr

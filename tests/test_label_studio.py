"""The ML backend of Label Studio, in requests that were recorded from version 1.23.2, and what it writes and reads."""

from __future__ import annotations

import json
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import run_command
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from serving import running, until

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.formats.label_studio import decode_brush, encode_brush, read_region, region_value
from grounded_sam.formats.label_studio_config import read_labeling_config
from grounded_sam.formats.label_studio_video import TrackBoxes, VideoTrack
from grounded_sam.formats.store import StoreReader
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.runner import Runner
from grounded_sam.shapes.examples import demo_clip, demo_images
from grounded_sam.sinks.label_studio import LabelStudioSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.video import VideoSource
from grounded_sam.structures.masks import encode_rle
from grounded_sam.structures.vocabulary import Vocabulary

for package in ("fastapi", "uvicorn", "python_multipart", "httpx"):
    pytest.importorskip(package, reason="the extra `serve`, or httpx, is not installed")

DEMO = Path(__file__).parents[1] / "grounded_sam" / "shapes" / "examples" / "demo"
RECORDED = json.loads((Path(__file__).parent / "data" / "label_studio_requests.json").read_text())
TOKEN = RECORDED["setup"]["access_token"]
FRAMES = 6
WORDS = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"]
LABELS = "".join(f'<Label value="{word}"/>' for word in WORDS)
POINTS = "".join(f'<Label value="{word}" alias="point on {word}"/>' for word in WORDS)
CONFIG = f"""<View><Image name="image" value="$image"/>
<BrushLabels name="brush" toName="image">{LABELS}</BrushLabels>
<KeyPointLabels name="point" toName="image" smart="true" smartOnly="true">{POINTS}</KeyPointLabels>
<RectangleLabels name="box" toName="image" smart="true" smartOnly="true">{LABELS}</RectangleLabels>
<TextArea name="words" toName="image" value="$words"/></View>"""
VIDEO_CONFIG = f"""<View><Labels name="label" toName="video">{LABELS}</Labels>
<Video name="video" value="$video" framerate="$fps"/><VideoRectangle name="box" toName="video"/></View>"""


@contextmanager
def label_studio(files: dict[str, bytes], personal: bool = False):
    """Serve files as Label Studio does, to those who have the token, and keep what is sent to its API."""
    state = SimpleNamespace(sent=[], fetched=Counter(), address="", valid={f"Token {TOKEN}"})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.fetched[self.path] += 1
            if self.headers.get("Authorization") not in state.valid:
                self.answer(302 if "upload" in self.path else 401, b"{}", "/user/login/?next=/")
            elif self.path == "/data/elsewhere.png":
                self.answer(302, b"", "http://127.0.0.1:9/scene-1.png")
            else:
                self.answer(200 if self.path in files else 404, files.get(self.path, b"{}"))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/api/token/refresh":
                state.valid = {f"Bearer access-{len(state.sent)}"}
                state.sent.append((self.path, body))
                self.answer(200, json.dumps({"access": f"access-{len(state.sent) - 1}"}).encode())
                return
            state.sent.append((self.path, body))
            self.answer(201, b"{}")

        def answer(self, status, content, location=None):
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Return a Label Studio with the scenes of the demo and its clip."""
    files = {f"/data/upload/1/{path.name}": path.read_bytes() for path in DEMO.iterdir()}
    short = tmp_path_factory.mktemp("clips") / "short.mp4"
    video = Mp4Writer(short, crf=24)
    for t, frame in zip(range(FRAMES), demo_clip(), strict=False):
        video.write(frame.image, t / 24)
    video.close()
    files["/data/upload/1/short.mp4"] = short.read_bytes()
    with label_studio(files) as state:
        yield state


@pytest.fixture(scope="module")
def stored(tmp_path_factory, shapes) -> Path:
    """Store what is found in the scenes, and in some frames of the clip."""
    root = tmp_path_factory.mktemp("stores")
    words = Vocabulary.parse(WORDS)
    for name, source in (
        ("images", ImageSource(DEMO / "scene-1.png")),
        ("video", VideoSource(DEMO / "clip.mp4", stop=6)),
    ):
        tracker = shapes.tracker if name == "video" else None
        model = Pipeline(shapes.detector, shapes.segmenter, shapes.select, words, tracker=tracker)
        Runner(model, source, [StoreSink(root / name, words)], root / name).run()
    return root


@pytest.fixture(scope="module")
def client(shapes, stored):
    stores = f"serve.stores={{images: {stored}/images, video: {stored}/video}}"
    with running(f"serve.roots=[{stored}]", stores, load=lambda: shapes) as http:
        yield http


@pytest.fixture
def connected(client, studio):
    connect(client, studio)
    return client


def connect(http, studio, config=CONFIG):
    answer = http.post("/label-studio/setup", json={**RECORDED["setup"], "schema": config, "hostname": studio.address})
    assert answer.status_code == 200, answer.text
    return answer.json()["model_version"]


def predict(http, tasks, config=CONFIG, context=None, status=200, project=None):
    recorded = RECORDED["predict" if context is None else "click"]
    body = {**recorded, "label_config": config, "params": {**recorded["params"], "context": context}}
    body["tasks"] = [{**recorded["tasks"][0], "id": i, "data": data} for i, data in enumerate(tasks, 1)]
    body["project"] = project or body["project"]
    answer = http.post("/label-studio/predict", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def scene(number):
    return {"image": f"/data/upload/1/scene-{number}.png", "file": f"scene-{number}.png", "words": ""}


def point(x, y, positive=True, label="green star"):
    label = f"point on {label}"
    value = {"x": x / 9.6, "y": y / 6.4, "width": 0.5, "keypointlabels": [label], "labels": [label]}
    result = {**RECORDED["click"]["params"]["context"]["result"][0], "value": value, "is_positive": positive}
    return result


def iou(a, b) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def truth_of(number, color, shape):
    image = demo_images()[number - 1]
    index = image.pairs.index((color, shape))
    return image.masks[index]


# The protocol


def test_health_and_setup_answer_before_the_models_are_loaded(shapes, studio):
    release = threading.Event()

    def load():
        release.wait(60)
        return shapes

    with running(load=load, wait=False) as http:
        assert http.get("/label-studio/health").json()["status"] == "UP"
        version = connect(http, studio)
        assert version.startswith("grounded_sam-") and not http.get("/label-studio/health").json()["ready"]
        threading.Timer(0.5, release.set).start()
        (entry,) = predict(http, [scene(1)])["results"]  # waits for them
        assert entry[0]["model_version"] == version and entry[0]["result"]


def test_the_version_depends_on_words_and_settings(client, studio, shapes):
    versions = [connect(client, studio, config) for config in (CONFIG, CONFIG, CONFIG.replace("green star", "star"))]
    assert versions[0] == versions[1] != versions[2]
    assert connect(client, studio, "<View></View>") not in versions  # a project without labels yet
    with running("select.score=0.9", load=lambda: shapes) as http:
        assert connect(http, studio) not in versions


def test_tasks_are_predicted_in_order_as_the_server_predicts_pictures(connected, studio):
    numbers, before = (2, 1, 4), dict(studio.fetched)
    for _ in range(2):
        results = predict(connected, [scene(number) for number in numbers])["results"]
    assert sum(studio.fetched.values()) - sum(before.values()) <= 3  # kept by URL
    for number, (entry,) in zip(numbers, results, strict=True):
        content = (DEMO / f"scene-{number}.png").read_bytes()
        picture = connected.post("/v1/pictures", files={"file": ("a.png", content)}).json()["id"]
        wanted = connected.post("/v1/predict", json={"picture": picture, "text": WORDS}).json()["objects"]
        assert len(wanted) == len(entry["result"]) > 0 and 0 < entry["score"] <= 1
        for region, item in zip(entry["result"], wanted, strict=True):
            assert region["from_name"] == "brush" and region["to_name"] == "image"
            assert region["value"]["brushlabels"] == [item["class"]] and region["score"] == item["score"]
            mask = read_region(region, tuple(item["mask"]["size"])).mask
            assert encode_rle(mask) == item["mask"]


def test_a_task_that_cannot_be_used_does_not_end_the_others(connected, caplog):
    tasks = [{"image": "/data/upload/1/none.png"}, scene(1), {"image": "https://example.com/a.png"}, {"text": "a"}]
    tasks += [{"image": "/data/elsewhere.png"}, {"image": "/data/upload/1/clip.mp4"}]
    results = predict(connected, tasks)["results"]
    assert [len(entry) for entry in results] == [0, 1, 0, 0, 0, 0]
    log = caplog.text
    assert "answers 404 to none.png" in log and "neither an image nor a video" in log
    assert "example.com/a.png' is not on" in log and "from another host, 127.0.0.1" in log
    assert TOKEN not in log


def test_an_alias_has_the_words(connected, caplog):
    alias = '<Label value="thing" alias="green star, purple cross"/>'
    config = CONFIG.replace('<Label value="green star"/>', alias).replace('<Label value="purple cross"/>', "")
    (entry,) = predict(connected, [scene(1)], config)["results"][0]
    labels = Counter(r["value"]["brushlabels"][0] for r in entry["result"])
    assert labels["green star, purple cross"] >= 1  # Label Studio calls a label by its alias
    twice = CONFIG.replace('<Label value="green star"/>', alias)
    assert predict(connected, [scene(1)], twice)["results"] == [[]]
    assert "phrase 'purple cross' belongs to both 'thing' and 'purple cross'" in caplog.text


@pytest.mark.parametrize(
    ("tags", "kind"),
    [
        ('<BitmaskLabels name="b" toName="image">{}</BitmaskLabels>', "bitmasklabels"),
        ('<PolygonLabels name="b" toName="image">{}</PolygonLabels>', "polygonlabels"),
        ('<Bitmask name="b" toName="image"/><Labels name="l" toName="image">{}</Labels>', "bitmask"),
        ('<RectangleLabels name="b" toName="image">{}</RectangleLabels>', "rectanglelabels"),
    ],
)
def test_the_controls_of_the_project_are_used(connected, tags, kind):
    config = f'<View><Image name="image" value="$image"/>{tags.format(LABELS)}</View>'
    (entry,) = predict(connected, [scene(1)], config)["results"][0]
    regions = [r for r in entry["result"] if r["type"] == kind]
    star = truth_of(1, "green", "star")
    best = 0.0
    for result in regions:
        region = read_region(result, star.shape)
        mask = region.mask
        if mask is None:
            mask = np.zeros_like(star)
            x1, y1, x2, y2 = (round(v) for v in region.box)
            mask[y1:y2, x1:x2] = True
        best = max(best, iou(mask, star))
    assert best > (0.3 if kind == "rectanglelabels" else 0.9)
    if kind == "bitmask":
        labels = {r["id"]: r["value"]["labels"] for r in entry["result"] if r["type"] == "labels"}
        assert set(labels) == {r["id"] for r in regions}


def test_words_of_a_task_and_of_a_text_area(connected):
    (entry,) = predict(connected, [{**scene(1), "words": "green star; brown triangle"}])["results"][0]
    assert entry["result"]
    text = {"type": "textarea", "from_name": "words", "to_name": "image", "value": {"text": ["purple cross"]}}
    (answer,) = predict(connected, [scene(1)], context={"result": [text]})["results"]
    assert [r["value"]["brushlabels"] for r in answer["result"]] == [["purple cross"]]


# Smart tools


def test_points_and_rectangles_are_segmented_together(connected):
    circle = truth_of(1, "red", "circle")
    ys, xs = np.nonzero(circle)
    middle = point(float(xs.mean()), float(ys.mean()), label="red circle")
    (answer,) = predict(connected, [scene(1)], context={"result": [middle]})["results"]
    (region,) = answer["result"]
    assert iou(read_region(region, circle.shape).mask, circle) > 0.9
    outside = point(float(xs.min() - 20), float(ys.mean()), positive=False, label="red circle")
    (answer,) = predict(connected, [scene(1)], context={"result": [middle, outside]})["results"]
    assert iou(read_region(answer["result"][0], circle.shape).mask, circle) > 0.9
    (answer,) = predict(connected, [scene(1)], context={"result": [outside]})["results"]
    assert answer["result"] == []
    value = {"x": xs.min() / 9.6, "y": ys.min() / 6.4, "width": np.ptp(xs) / 9.6, "height": np.ptp(ys) / 6.4}
    value = {k: float(v) for k, v in value.items()} | {"rotation": 0, "rectanglelabels": ["red circle"]}
    box = {"type": "rectanglelabels", "from_name": "box", "to_name": "image", "value": value}
    (answer,) = predict(connected, [scene(1)], context={"result": [box]})["results"]
    assert iou(read_region(answer["result"][0], circle.shape).mask, circle) > 0.9


def test_a_picture_is_encoded_once_for_all_clicks(connected):
    before = len(connected.server.sessions)
    for x in (400, 410, 420):
        predict(connected, [scene(3)], context={"result": [point(x, 300)]})
    assert len(connected.server.sessions) == before + 1


def test_a_malformed_context_is_refused_in_words(connected):
    for result, words in (
        ("x", "context.result must be a list"),
        ([{"type": "keypointlabels", "value": {"x": "a", "y": 1}}], "a point needs x and y"),
        ([point(1, 1, label="bus")], "no control takes masks with the label 'point on bus'"),
        ([{"type": "brushlabels", "value": {"rle": []}}], "smart tools are points, rectangles and words"),
        ([{"type": "rectanglelabels", "value": {"x": 1, "y": 1, "width": -1, "height": 2}}], "a rectangle needs"),
    ):
        answer = predict(connected, [scene(1)], context={"result": result}, status=422)
        assert words in answer["error"]


def test_a_project_that_never_connected_is_told(client, shapes, studio, monkeypatch):
    answer = predict(client, [scene(1)], status=409, project="77.1")
    assert "serve.label_studio=ADDRESS and LABEL_STUDIO_API_KEY" in answer["error"]
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
    with running(f"serve.label_studio={studio.address}", load=lambda: shapes) as http:  # started anew
        assert predict(http, [scene(1)], context={"result": [point(480, 160)]}, project="77.1")["results"]
        setup = {**RECORDED["setup"], "schema": CONFIG, "hostname": "http://127.0.0.1:9", "access_token": "x"}
        assert http.post("/label-studio/setup", json=setup).status_code == 200  # another address is not asked
        assert predict(http, [scene(2)])["results"][0]


def test_a_personal_token_is_renewed(shapes, monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "a.b.c")
    files = {"/data/a.png": (DEMO / "scene-1.png").read_bytes(), "/data/b.png": (DEMO / "scene-2.png").read_bytes()}
    with label_studio(files) as studio, running(f"serve.label_studio={studio.address}", load=lambda: shapes) as http:
        assert predict(http, [{"image": "/data/a.png"}])["results"][0]
        studio.valid = set()  # it has expired
        assert predict(http, [{"image": "/data/b.png"}])["results"][0]
        assert [path for path, _ in studio.sent] == ["/api/token/refresh"] * 2


def test_the_token_of_the_server_counts_for_label_studio(shapes):
    with running("serve.token=a-long-secret", load=lambda: shapes) as http:
        headers = {"Authorization": "Basic eDphLWxvbmctc2VjcmV0"}  # x:a-long-secret, as Label Studio sends it
        assert http.get("/label-studio/health", headers=headers).status_code == 200
        assert http.get("/label-studio/health", headers={"Authorization": "Basic eDp5"}).status_code == 401


# Videos


def test_a_video_that_takes_long_is_sent_afterwards(client, studio, monkeypatch):
    connect(client, studio, VIDEO_CONFIG)
    monkeypatch.setattr("grounded_sam.serve.label_studio.backend.ANSWER_S", 0.2)
    task = {"video": "/data/upload/1/short.mp4", "fps": 24}
    assert predict(client, [task, task], VIDEO_CONFIG)["results"] == [[], []]
    assert predict(client, [task], VIDEO_CONFIG)["results"] == [[]]  # is not computed twice
    until(lambda: len([path for path, _ in studio.sent if path == "/api/predictions"]) == 2)
    for body in [body for path, body in studio.sent if path == "/api/predictions"]:
        assert body["task"] in (1, 2) and body["model_version"].startswith("grounded_sam-")
        names = Counter(region["value"]["labels"][0] for region in body["result"])
        assert names["red circle"] >= 1 and names["green star"] >= 1
        for region in body["result"]:
            assert region["type"] == "videorectangle" and region["from_name"] == "box"
            frames = [key["frame"] for key in region["value"]["sequence"]]
            assert frames == sorted(set(frames)) and frames[-1] <= region["value"]["framesCount"] <= FRAMES + 1


def test_a_track_is_written_with_few_keyframes_and_read_back():
    rng = np.random.default_rng(0)
    track, boxes = VideoTrack(), {}
    for i in [*range(30), *range(50, 90)]:
        x = 2.0 * i + (3 * np.sin(i) if i > 60 else 0)
        boxes[i] = [x, 10.0, x + 30, 60.0 + rng.uniform(0, 0.2)]
        track.add(i, i / 25, boxes[i], (200, 400), "car", 0.5)
    value = track.value(25, 90, 90 / 25)
    assert len(value["sequence"]) < 45
    read = TrackBoxes({**value, "labels": ["car"]}, (200, 400))
    for i in range(95):
        box = read.at(i + 1)
        assert (box is None) == (i not in boxes)
        if box is not None:
            assert np.abs(np.subtract(box, boxes[i])).max() < 1.1


# Annotations


def webhook(http, result, store, file, action="ANNOTATION_CREATED", config=CONFIG, **data):
    recorded = RECORDED["annotation_created"]
    annotation = {**recorded["annotation"], "result": result}
    task = {**recorded["task"], "data": {"file": file, "store": store, **data}}
    project = {**recorded["project"], "label_config": config}
    return http.post(
        "/label-studio/webhook",
        json={**recorded, "action": action, "annotation": annotation, "task": task, "project": project},
    )


def rows_of(folder, file):
    store = StoreRows(folder / "store")
    return [(image, rows) for image, rows in store.rows(store.key_of_name(file))]


def brush(object_id, mask, label, origin="prediction-changed"):
    height, width = mask.shape
    return {
        "id": f"{object_id}-brush",
        "type": "brushlabels",
        "from_name": "brush",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "origin": origin,
        "value": {"format": "rle", "rle": encode_brush(mask), "brushlabels": [label]},
    }


def test_an_annotation_becomes_decisions(client, stored):
    from pycocotools import mask as coco_mask

    ((image, rows),) = rows_of(stored / "images", "scene-1.png")
    size = [image["height"], image["width"]]
    masks = [coco_mask.decode({"size": size, "counts": row["counts"].encode()}).astype(bool) for row in rows]
    assert len(rows) >= 4
    moved = np.roll(masks[2], 40, axis=1)
    new = np.zeros(size, bool)
    new[:30, :30] = True
    result = [
        brush(rows[0]["object_id"], masks[0], rows[0]["class"], "prediction"),
        brush(
            rows[1]["object_id"], masks[1], "yellow triangle" if rows[1]["class"] != "yellow triangle" else "red circle"
        ),
        brush(rows[2]["object_id"], moved, rows[2]["class"]),
        brush("abc", new, "purple cross", "manual"),
    ]
    answer = webhook(client, result, "images", "scene-1.png").json()
    assert answer["notes"] == [] and answer["edits"] == len(rows) + 1
    ((_, after),) = rows_of(stored / "images", "scene-1.png")
    by_id = {row["object_id"]: row for row in after}
    statuses = [by_id[row["object_id"]]["status"] for row in rows]
    assert statuses == ["accepted", "edited", "edited", *["rejected"] * (len(rows) - 3)]
    assert by_id[rows[1]["object_id"]]["class"] != rows[1]["class"]
    assert by_id[rows[2]["object_id"]]["counts"] == encode_rle(moved)["counts"]
    (added,) = [row for row in after if row["status"] == "added"]
    assert added["class"] == "purple cross" and added["author"] == "Label Studio 1"
    # The same once more changes nothing; what was added is known by its place.
    again = webhook(client, result, "images", "scene-1.png", "ANNOTATION_UPDATED").json()
    assert again == {"edits": 0, "notes": []}


def test_an_annotation_of_a_video_becomes_decisions_frame_by_frame(client, stored):
    frames = rows_of(stored / "video", "clip.mp4")
    ids = sorted({row["tracker_id"] for _, rows in frames for row in rows})
    height, width = frames[0][0]["height"], frames[0][0]["width"]
    result = []
    for number in ids[:2]:
        track = VideoTrack()
        for position, (image, rows) in enumerate(frames):
            for row in rows:
                if row["tracker_id"] == number:
                    box = [row[key] for key in ("x1", "y1", "x2", "y2")]
                    track.add(position, image["time_s"], box, (height, width), row["class"], 1.0)
        value = {**track.value(24, 96, 4.0), "labels": [track.class_name if number == ids[0] else "orange ring"]}
        result.append(
            {"id": f"track-{number}", "type": "videorectangle", "from_name": "box", "to_name": "video", "value": value}
        )
    answer = webhook(client, result, "video", "clip.mp4", config=VIDEO_CONFIG, fps=24.0).json()
    assert answer["notes"] == [] and answer["edits"] == sum(len(rows) for _, rows in frames)
    for _, rows in rows_of(stored / "video", "clip.mp4"):
        for row in rows:
            wanted = {ids[0]: "accepted", ids[1]: "edited"}.get(row["tracker_id"], "rejected")
            assert row["status"] == wanted and (wanted != "edited" or row["class"] == "orange ring")


def test_a_webhook_that_cannot_be_applied_says_why(client):
    assert client.post("/label-studio/webhook", json={"action": "TASKS_CREATED"}).json() == {"edits": 0, "notes": []}
    deleted = client.post("/label-studio/webhook", json=RECORDED["annotations_deleted"]).json()
    assert deleted["edits"] == 0 and "nothing is taken back" in deleted["notes"][0]
    for store, file, status, words in (
        ("other", "scene-1.png", 404, "the stores of this server are images, video"),
        (None, "scene-1.png", 404, "the task names the store None"),
        ("images", "../x.png", 404, "no image or video '../x.png'"),
        ("images", 3, 404, "no image or video 3"),
    ):
        answer = webhook(client, [], store, file)
        assert answer.status_code == status and words in answer.json()["error"]
    bad = [brush("x", np.ones((4, 4), bool), "red circle"), {"id": "e", "type": "ellipselabels", "value": {}}]
    answer = webhook(client, bad, "images", "scene-1.png").json()
    notes = answer["notes"]
    assert answer["edits"] == 0 and notes[-1] == "so nothing is rejected"
    assert "64 belong" not in notes[0] and "the brush has 64 bytes" in notes[0] and "ellipselabels" in notes[1]


# Formats


@given(hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.integers(0, 60), st.integers(0, 255))
def test_brushes_come_back_and_damaged_ones_are_refused(mask, at, byte):
    code = encode_brush(mask)
    assert np.array_equal(decode_brush(code, mask.shape), mask)
    damaged = [*code[: at % len(code)], byte]
    with suppress(ImageError):
        assert decode_brush(damaged, mask.shape).shape == mask.shape


@given(hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))).filter(np.any))
def test_regions_come_back(mask):
    for kind in ("brush", "bitmask"):
        value = {**region_value(kind, [0, 0, 1, 1], mask, mask.shape), f"{kind}labels": ["a"]}
        region = read_region({"type": f"{kind}labels", "value": value}, mask.shape)
        assert np.array_equal(region.mask, mask) and region.labels == ("a",)


def test_a_rotated_rectangle_is_a_mask():
    value = {"x": 50, "y": 10, "width": 20, "height": 20, "rotation": 45, "rectanglelabels": ["a"]}
    region = read_region({"type": "rectanglelabels", "value": value}, (100, 100))
    assert abs(region.mask.sum() - 400) < 40 and region.mask[24, 50] and not region.mask[12, 68]


def test_configs_are_read():
    config = read_labeling_config(CONFIG)
    assert [control.kind for control in config.controls] == ["brush", "keypoint", "rectangle", "textarea"]
    assert set(config.outputs(config.objects[0])) == set(WORDS)
    video = read_labeling_config(VIDEO_CONFIG)
    assert video.objects[0].fps({"fps": 30}) == 30 and video.objects[0].fps({}) == 24
    for text, words in (
        ("<View>", "is not XML"),
        ("<View></View>", "no Image or Video"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><View/>', "without DOCTYPE"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_labeling_config(text)


# The sink, and the command


def test_a_video_is_one_task_with_a_track_for_each_object(stored, tmp_path):
    reader = StoreReader(stored / "video" / "store")
    with LabelStudioSink(tmp_path, reader.vocabulary) as sink:
        for key in reader.keys():  # noqa: SIM118
            for result in reader.read(key, reader.vocabulary):
                sink.write(result)
    folder = tmp_path / "label_studio"
    assert not (folder / "tasks.json").exists() and (folder / "videos" / "clip.mp4").is_file()
    assert "1 video for Label Studio" in sink.summary() and "videos.json" in (folder / "README.txt").read_text()
    (task,) = json.loads((folder / "videos.json").read_text())
    assert task["data"] == {"video": "/data/local-files/?d=videos/clip.mp4", "file": "clip.mp4", "fps": 24.0}
    config = read_labeling_config((folder / "videos.xml").read_text())
    assert set(config.outputs(config.objects[0])) == set(WORDS) and config.objects[0].fps(task["data"]) == 24
    frames = rows_of(stored / "video", "clip.mp4")
    regions = {region["id"]: region["value"] for region in task["predictions"][0]["result"]}
    for image, rows in frames:
        for row in (row for row in rows if row["status"] != "rejected"):
            value = regions[f"track-{row['tracker_id']}"]
            box = TrackBoxes(value, (image["height"], image["width"])).at(image["frame"] + 1)
            wanted = [row[key] for key in ("x1", "y1", "x2", "y2")]
            assert np.abs(np.subtract(box, wanted)).max() < 0.006 * image["width"]


def test_frames_of_a_video_can_be_images_with_masks(stored, tmp_path):
    reader = StoreReader(stored / "video" / "store")
    with LabelStudioSink(tmp_path, reader.vocabulary, videos="frames") as sink:
        for key in reader.keys():  # noqa: SIM118
            for result in reader.read(key, reader.vocabulary):
                sink.write(result)
    tasks = json.loads((tmp_path / "label_studio" / "tasks.json").read_text())
    assert len(tasks) == FRAMES and not (tmp_path / "label_studio" / "videos.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a command is missing: create"),
        (["create", "labels"], "the following arguments are required: --url"),
        (
            ["create", "labels", "--url", "localhost"],
            "must be an address such as http://localhost:8080, got 'localhost'",
        ),
        (["create", "labels", "--url", "http://127.0.0.1:9"], "Label Studio cannot be reached at http://127.0.0.1:9: "),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, message):
    result = run_command("grounded_sam.cli.label_studio", words, tmp_path)
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert result.stderr.startswith("grounded-sam-label-studio: ") and result.stderr.count("\n") == 1


def test_a_token_that_is_not_accepted_is_named(tmp_path, studio):
    words = ["create", "labels", "--url", studio.address]
    result = run_command("grounded_sam.cli.label_studio", words, tmp_path, {"LABEL_STUDIO_API_KEY": "wrong-token"})
    assert "does not accept the token; set LABEL_STUDIO_API_KEY" in result.stderr and "wrong-token" not in result.stderr

"""Parts of the server without HTTP: what is kept, selected, put together and refused."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from fakes import Fill, Halves

from grounded_sam import ConfigError, Pipeline, Select, Vocabulary
from grounded_sam.evaluation.comparison import pair_detections
from grounded_sam.pipeline.refine import Refine
from grounded_sam.pipeline.select import select_detections
from grounded_sam.serve.memory import ByteLimited
from grounded_sam.serve.predictions import MAX_CANDIDATES, Predictor, covers, kept_selection
from grounded_sam.serve.problems import RequestError, public_message
from grounded_sam.serve.settings import ServeSettings, with_token_of_environment
from grounded_sam.serve.uploads import Upload, Uploads
from grounded_sam.serve.worker import Work, Worker
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.masks import pack_masks

WORDS = Vocabulary.parse({"classes": [{"name": "a"}, {"name": "b", "score": 0.35}, {"name": "c"}]})


class Boxes:
    """A detector that returns fixed boxes of an image of 60x40 px."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        corners = rng.integers(0, [50, 30], (count, 2))
        sides = rng.integers(3, 24, (count, 2))
        self.xyxy = np.concatenate([corners, corners + sides], 1)
        self.score = rng.choice(np.linspace(0.02, 0.98, 25), count)  # with ties
        self.class_id = rng.integers(0, 3, count)

    def detect(self, frames, vocabulary):
        return [make_detections(self.xyxy, self.score, self.class_id, vocabulary, f.size_hw) for f in frames]


class Inside(Fill):
    """A segmenter whose masks are boxes without a border that depends on the box."""

    def segment(self, image, detections):
        result = super().segment(image, detections)
        score = 0.5 + (result.xyxy[:, 0] % 5) / 10
        result.data["mask_score"] = score.astype(np.float32)
        return result


def upload(tmp_path: Path, name: str = "a.png", size: tuple[int, int] = (60, 40)) -> Upload:
    """Write a picture, as an upload."""
    from PIL import Image

    Image.new("RGB", size, (90, 20, len(name))).save(tmp_path / name)
    return Upload(name, "image", name, tmp_path / name, 1, *size)


SELECTS = [
    Select(score=0.3),
    Select(score=0.1, nms=0.3),
    Select(score=0.1, nms=0.3, class_agnostic=True),
    Select(score=0.2, nms=None, max_ios=0.7),
    Select(score=0.2, nms=0.4, nms_by="mask"),
    Select(score=0.2, top_k=3, min_area=60),
    Select(score=0.2, top_k=2, max_area=200),
    Select(score=0.15, class_score={"a": 0.6, "c": 0.1}, nms=0.2),
    Select(score=0.3, class_score={"a": 0.6}, nms=0.2, class_agnostic=True, max_ios=0.5),
]


@pytest.mark.parametrize("refine", [Refine(), Refine(boxes=True, score="product"), Refine(score="mask")])
@pytest.mark.parametrize("seed", range(4))
def test_a_selection_of_candidates_is_that_of_the_pipeline(tmp_path, refine, seed):
    picture, detector = upload(tmp_path), Boxes(60, seed)
    model = Pipeline(detector, Inside(), vocabulary=WORDS, refine=refine)
    predictor = Predictor(model, "models", 10**7, 10**6)
    (loose,) = predictor.answer([predictor.question(picture, WORDS, SELECTS[0], min_score=0.05)])
    checked = 0
    for select in SELECTS:
        own = model.stages.with_select(select)
        alone = Pipeline(detector, Inside(), select=select, vocabulary=WORDS, refine=refine).segment(picture.path)
        (exact,) = predictor.answer([predictor.question(picture, WORDS, select)])
        for prediction in (loose, exact):
            rows = predictor.select(prediction, select)
            chosen = pack_masks(alone)
            assert prediction.candidates.xyxy[rows].tolist() == chosen.xyxy.tolist(), select
            assert prediction.candidates.confidence[rows].tolist() == chosen.confidence.tolist()
            assert [prediction.candidates.data["rle"][i] for i in rows] == list(chosen.data["rle"])
            checked += len(rows)
        assert own.select == select
    assert checked > 40


@pytest.mark.parametrize("seed", range(30))
def test_what_is_covered_is_complete(seed):
    """If one selection covers another, selecting from what it kept gives the same as selecting from everything."""
    rng = np.random.default_rng(seed)
    boxes = Boxes(50, seed)
    everything = make_detections(boxes.xyxy, boxes.score, boxes.class_id, WORDS, (60, 80))

    def any_select() -> Select:
        return Select(
            score=float(rng.choice([0.05, 0.2, 0.5])),
            class_score={"a": float(rng.choice([0.1, 0.6]))} if rng.random() < 0.4 else None,
            nms=rng.choice([None, 0.3, 0.6]),
            class_agnostic=bool(rng.random() < 0.3),
            max_ios=rng.choice([None, 0.8]),
            top_k=rng.choice([None, 3, 8]),
        )

    covered = 0
    for _ in range(120):
        first, second = any_select(), any_select()
        floor = None if rng.random() < 0.5 else float(rng.choice([0.02, 0.1, 0.4]))
        kept = kept_selection(first, WORDS, floor, tiled=False)
        assert covers(kept, first, WORDS, tiled=False)
        if covers(kept, second, WORDS, tiled=False):
            covered += 1
            part = select_detections(select_detections(everything, kept, WORDS), second.before_masks(), WORDS)
            own = select_detections(select_detections(everything, second.before_masks(), WORDS), second, WORDS)
            assert select_detections(part, second, WORDS).xyxy.tolist() == own.xyxy.tolist(), (kept, second)
    assert covered > 10


def test_a_picture_with_too_many_candidates_keeps_the_best(tmp_path):
    picture = upload(tmp_path)
    detector = Boxes(MAX_CANDIDATES + 200, 1)
    detector.score = np.linspace(0.05, 0.95, MAX_CANDIDATES + 200)
    model = Pipeline(detector, Fill(), select=Select(score=0.9, nms=None), vocabulary=WORDS)
    predictor = Predictor(model, "models", 10**8, 10**6)
    (prediction,) = predictor.answer([predictor.question(picture, WORDS, model.select, min_score=0.01)])
    assert len(prediction.candidates) == MAX_CANDIDATES
    floor = prediction.kept.score
    assert floor == pytest.approx(detector.score[200], abs=1e-3)
    assert len(predictor.select(prediction, replace(model.select, score=0.9))) > 50
    with pytest.raises(RequestError, match="too few candidates"):
        predictor.select(prediction, replace(model.select, score=0.1))


def test_requests_with_the_same_words_run_together(tmp_path):
    detector = Halves(batch_size=8)
    model = Pipeline(detector, Fill(), vocabulary=WORDS)
    worker = Worker(lambda: model, 100)
    worker.start()
    while not worker.is_ready:
        time.sleep(0.01)
    predictor = Predictor(model, "models", 10**8, 10**6)
    release = threading.Event()
    worker.submit(Work(lambda payloads: [release.wait(30)]))
    questions = [predictor.question(upload(tmp_path, f"{i % 5}.png"), WORDS, model.select) for i in range(7)]
    other = predictor.question(upload(tmp_path, "other.png"), Vocabulary.parse(["x"]), model.select)
    futures = [worker.submit(Work(predictor.answer, question, "words")) for question in questions[:3]]
    futures.append(worker.submit(Work(predictor.answer, other, "others")))
    futures += [worker.submit(Work(predictor.answer, question, "words")) for question in questions[3:]]
    cancelled = worker.submit(Work(predictor.answer, questions[0], "words"))
    cancelled.cancel()
    release.set()
    answers = [future.result(30) for future in futures]
    assert detector.calls == [5, 1]  # the same picture is looked at once
    assert [answer.name for answer in answers] == [
        "0.png",
        "1.png",
        "2.png",
        "other.png",
        "3.png",
        "4.png",
        "0.png",
        "1.png",
    ]
    worker.stop()
    with pytest.raises(RequestError, match="shutting down"):
        worker.submit(Work(predictor.answer, questions[0]))


def test_one_bad_picture_does_not_fail_the_others(tmp_path):
    model = Pipeline(Halves(batch_size=8), Fill(), vocabulary=WORDS)
    predictor = Predictor(model, "models", 10**8, 10**6)
    pictures = [upload(tmp_path, f"{i}.png") for i in range(3)]
    pictures[1].path.write_bytes(b"damaged")
    answers = predictor.answer([predictor.question(picture, WORDS, model.select) for picture in pictures])
    assert [type(answer).__name__ for answer in answers] == ["Prediction", "ImageError", "Prediction"]


def test_the_worker_survives_whatever_a_request_raises():
    worker = Worker(lambda: Pipeline(Halves()), 4)
    worker.start()
    while not worker.is_ready:
        time.sleep(0.01)

    def fail(payloads):
        raise payloads[0]

    for error, status in (
        (KeyError("x"), 500),
        (MemoryError(), 503),
        (SystemExit(1), 500),
        (RequestError(404, "a"), 404),
    ):
        with pytest.raises(RequestError) as raised:
            worker.submit(Work(fail, error)).result(30)
        assert raised.value.status == status
    assert worker.submit(Work(lambda payloads: payloads, 7)).result(30) == 7
    worker.stop()


class Counting:
    """Long work of a few steps."""

    def __init__(self, steps: int, log: list[str]) -> None:
        self.steps, self.log, self.is_over = steps, log, False

    def step(self) -> bool:
        self.log.append("step")
        self.steps -= 1
        return self.steps > 0

    def abandon(self, reason: str) -> None:
        self.log.append(reason)


def test_requests_are_answered_between_the_steps_of_long_work():
    log: list[str] = []
    worker = Worker(lambda: Pipeline(Halves()), 10)
    worker.start()
    while not worker.is_ready:
        time.sleep(0.01)
    release = threading.Event()
    worker.submit(Work(lambda payloads: [release.wait(30)]))
    worker.submit_long(Counting(3, log), 2)
    worker.submit_long(Counting(10**9, log), 2)
    with pytest.raises(RequestError, match="2 videos are being tracked"):
        worker.submit_long(Counting(1, log), 2)
    futures = [worker.submit(Work(lambda payloads: [log.append("request")])) for _ in range(2)]
    release.set()
    for future in futures:
        future.result(30)
    assert log[:4] == ["step", "request", "step", "request"]
    worker.stop()
    assert log[-1] == "the server is shutting down"


def test_uploads_make_room_unless_they_are_in_use(tmp_path):
    uploads = Uploads(tmp_path / "uploads", 25)

    def add(content: bytes, name: str = "a") -> Upload:
        return uploads.add(io.BytesIO(content), name, "image", lambda upload: None)

    first, second = add(b"1" * 10), add(b"2" * 10)
    assert add(b"1" * 10, "b") is first and len(uploads) == 2
    with uploads.use(second.id, "image"):
        third = add(b"3" * 10)
        assert uploads.get(second.id, "image") is second and third.path.read_bytes() == b"3" * 10
        with pytest.raises(RequestError, match="never sent"):
            uploads.get(first.id, "image")
        with uploads.use(third.id, "image"), pytest.raises(RequestError, match="no room"):
            add(b"4" * 10)
    with pytest.raises(RequestError, match="more than the 25 bytes"):
        add(b"5" * 26)
    with pytest.raises(RequestError, match="no video"):
        uploads.get(second.id, "video")
    assert uploads.num_bytes == 20
    assert sorted(path.name for path in (tmp_path / "uploads").iterdir()) == sorted([second.id, third.id])
    assert add(b"6", "../..\\ \0x/../nul.png").path.parent.parent == tmp_path / "uploads"


def test_values_in_memory_have_a_size_limit():
    removed: list[str] = []
    kept = ByteLimited(10, len, removed.append)
    kept.put("a", "aaaa")
    kept.put("b", "bbbb")
    kept.get("a")
    kept.put("c", "cccc")
    assert removed == ["bbbb"] and kept.num_bytes == 8
    kept.put("big", "x" * 50)
    assert len(kept) == 1 and kept.get("big")
    assert kept.remove("big") and not kept.remove("big") and removed[-1] == "x" * 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "192.168.0.1"}, "serve.host=192.168.0.1 can be reached from other machines, so it needs a token"),
        ({"host": "::"}, "needs a token"),
        ({"host": ""}, "serve.host must be"),
        ({"port": 70000}, "serve.port must be an integer from 0 to 65535"),
        ({"token": "short"}, "serve.token must be a text of at least 8 characters"),
        ({"roots": "photos"}, "serve.roots must be a list"),
        ({"stores": ["labels"]}, "serve.stores must map names to folders"),
        ({"stores": {"a/b": "labels"}}, "serve.stores: a name has letters"),
        ({"cors": ["*"]}, "serve.cors must have origins"),
        ({"cors": ["https://a.example/path"]}, "serve.cors must have origins"),
        ({"queue": 0}, "serve.queue must be an integer >= 1"),
        ({"session_gb": 0}, "serve.session_gb must be a number > 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        ServeSettings(**settings)


def test_the_token_comes_from_the_environment_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("GROUNDED_SAM_TOKEN", "from the environment")
    assert with_token_of_environment({"token": None})["token"] == "from the environment"
    assert with_token_of_environment({"token": "of the config"})["token"] == "of the config"
    settings = ServeSettings(host="0.0.0.0", token="a long secret")
    assert "secret" not in repr(settings) and not settings.is_loopback
    assert ServeSettings(host="localhost").is_loopback and ServeSettings(host="::1").is_loopback


def test_messages_name_no_path():
    error = ConfigError("/home/me/x/part-1.parquet cannot be read (/var/lib: no); see docs/security.md and a/b.png")
    assert public_message(error) == "part-1.parquet cannot be read (lib: no); see docs/security.md and a/b.png"
    assert public_message(ConfigError("~/keys/id: no"), [Path("/x")]) == "id: no"
    assert public_message(ConfigError("/roots/a/b.png: no"), [Path("/roots")]) == "a/b.png: no"


def test_detections_are_paired_by_class_and_iou():
    def detections(boxes, names) -> sv.Detections:
        return sv.Detections(np.array(boxes, float).reshape(-1, 4), data={"class_name": np.array(names)})

    a = detections([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], ["x", "y", "x"])
    b = detections([[20, 0, 30, 10], [1, 0, 10, 10], [0, 0, 9, 10]], ["x", "x", "x"])
    pairs = pair_detections(a, b)
    assert pairs.matched == [(0, 1, pytest.approx(0.9))] and pairs.only_a == [1, 2] and pairs.only_b == [0, 2]
    assert pair_detections(a, detections([], [])).only_a == [0, 1, 2] and pairs.num_different == 4
    assert pair_detections(detections([], []), detections([], [])).num_different == 0

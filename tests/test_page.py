"""The page in a real browser: what is found, clicked, tracked, decided and compared there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsing import browsing, find_chromium
from PIL import Image
from pycocotools import mask as coco_mask
from serving import running
from test_review import exported, tracks
from test_store import clip
from test_store import track as store_clip

from grounded_sam.formats.store_edits import StoreEditor
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.runner import Runner
from grounded_sam.shapes.scenes import make_clip, make_scene
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.structures.vocabulary import Vocabulary

for package in ("fastapi", "uvicorn", "python_multipart", "httpx", "playwright"):
    pytest.importorskip(package, reason="the extra `serve`, httpx or playwright is not installed")
pytestmark = pytest.mark.browser

PAIRS = [("green", "star"), ("red", "circle"), ("blue", "square"), ("yellow", "triangle"), ("orange", "ring")]
TEXT = [" ".join(pair) for pair in PAIRS]


@pytest.fixture(scope="module")
def truth() -> list:
    """Return scenes with three large objects each; the first has a green star."""
    return [
        make_scene(np.random.default_rng([7, i]), PAIRS[:3] if i < 3 else PAIRS[1:], 3, (300, 400), (), (0.25, 0.4))
        for i in range(6)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, truth, shapes) -> Path:
    """Return a folder with pictures, a store of them, a sweep of two thresholds, a store of a clip, and a clip."""
    find_chromium()
    root = tmp_path_factory.mktemp("page")
    for name in ("photos", "clips"):
        (root / name).mkdir()
    for i, scene in enumerate(truth):
        Image.fromarray(scene.image).save(root / "photos" / f"{i}.png")
    words = Vocabulary.parse(TEXT)
    model = Pipeline(shapes.detector, shapes.segmenter, replace(shapes.select, score=0.3), words)
    labels = StoreSink(root / "labels", words)
    Runner(model, ImageSource(root / "photos"), [labels], root / "labels").run()
    for number, score in enumerate((0.3, 0.99)):
        folder = root / "sweep" / str(number)
        model = Pipeline(shapes.detector, shapes.segmenter, replace(shapes.select, score=score), words)
        Runner(model, ImageSource(root / "photos"), [CocoSink(folder, words)], folder).run()
        record = {"overrides": [f"select.score={score}"], "value": 1 - score, "images": 6, "seconds": {"all": 2.0}}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "config.yaml").write_text(f"input: {root / 'photos'}\n")
        (folder / "hydra.yaml").write_text("hydra: {runtime: {cwd: /}}\n")
    clip(root / "clips" / "a.mkv")
    store_clip(root / "clips", root / "tracked")
    write_clip(root / "shapes.mp4")
    return root


def write_clip(path: Path) -> None:
    """Write a clip of two shapes."""
    import av

    frames = make_clip(np.random.default_rng(3), 8, PAIRS[:2], 2, (160, 224), speed=0.01)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 224, 160, "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.image, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def served(folders, shapes):
    """Serve the folder with the models of the `shapes` fixture."""
    stores = f"serve.stores={{scenes: {folders}/labels, clips: {folders}/tracked}}"
    roots, sweeps = f"serve.roots=[{folders}]", f"serve.sweeps={{scores: {folders}/sweep}}"
    with running(roots, stores, sweeps, load=lambda: shapes) as http:
        yield http


@pytest.fixture(scope="module")
def browser(served):
    """Start one browser for all tests."""
    with browsing(str(served.base_url)) as browsed:
        yield browsed


@pytest.fixture
def page(browser):
    """Return the page; a test fails if there was an error, or a request to another machine."""
    browser.requests.clear()
    browser.problems.clear()
    yield browser
    assert browser.problems == []


def open_picture(page, path: Path, words: list[str]) -> None:
    """Open a picture in Try, and look for words."""
    page.open("try")
    page.until("() => groundedSam.views.try.prediction")  # of the example
    page.page.set_input_files("#view-try input[type=file]", str(path))
    page.until(f"() => groundedSam.views.try.picture.name === '{path.name}' && groundedSam.views.try.prediction")
    page.run("() => groundedSam.views.try.words.set([])")
    for word in words:
        page.page.fill("#try-words", word)
        page.page.press("#try-words", "Enter")
    page.until(f"() => groundedSam.views.try.prediction?.classes.join() === {json.dumps(','.join(words))}")


def shown(page) -> list[dict]:
    """Return the objects that Try shows."""
    script = """() => groundedSam.views.try.objects.list().map((o) =>
        ({ key: o.key, id: o.id, class: o.class, area: o.area, box: o.box, score: o.score }))"""
    return page.run(script)


def mask_of(page, key: str) -> np.ndarray:
    """Return the mask of an object in Try, `(H, W) bool`."""
    script = """async (key) => {
        const { toRle } = await import('/static/app/rle.js');
        return toRle(groundedSam.views.try.objects.get(key).shape);
    }"""
    rle = page.run(script, key)
    return coco_mask.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def test_masks_are_read_and_written_as_pycocotools_does(page):
    page.open("try")
    rng = np.random.default_rng(0)
    masks = [rng.random((17, 23)) < share for share in (0.0, 0.1, 0.5, 1.0)]
    masks.append(np.kron(rng.random((9, 7)) < 0.5, np.ones((40, 31))).astype(bool))
    rles = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    plain = [{"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()} for rle in rles]
    script = """async (rles) => {
        const { fromRle, toRle, toBytes, maskIou } = await import('/static/app/rle.js');
        const masks = rles.map(fromRle);
        return { back: masks.map(toRle), areas: masks.map((m) => m.area), boxes: masks.map((m) => m.box),
            bytes: masks.map((m) => [...toBytes(m)]), iou: maskIou(masks[1], masks[2]) };
    }"""
    answer = page.run(script, plain)
    assert answer["back"] == plain and answer["areas"] == [int(mask.sum()) for mask in masks]
    for mask, values in zip(masks, answer["bytes"], strict=True):
        assert np.array_equal(np.array(values, bool).reshape(mask.shape), mask)
    assert answer["iou"] == pytest.approx(iou(masks[1], masks[2]))


def test_words_color_the_pixels_and_a_slider_asks_nobody(page, folders, truth):
    number = next(i for i, scene in enumerate(truth) if ("green", "star") in scene.pairs)
    mask = truth[number].masks[truth[number].pairs.index(("green", "star"))]
    open_picture(page, folders / "photos" / f"{number}.png", ["green star"])
    found = [entry for entry in shown(page) if iou(mask_of(page, entry["key"]), mask) > 0.6]
    assert found and found[0]["class"] == "green star"
    ys, xs = np.nonzero(mask & mask_of(page, found[0]["key"]))
    points = [[int(xs[i]), int(ys[i])] for i in np.linspace(0, len(xs) - 1, 20).astype(int)]
    script = """(points) => { const { viewer } = groundedSam.views.try; viewer.image = null; viewer.drawNow();
        const context = viewer.canvas.getContext('2d');
        return points.map(([x, y]) => [...context.getImageData(...viewer.toCanvas(x + .5, y + .5), 1, 1).data]); }"""
    pixels = np.array(page.run(script, points))
    on = pixels[:, 3] > 0  # labels and lines hide some
    assert on.mean() > 0.8
    assert np.abs(np.median(pixels[on][:, :3], axis=0) - [0x28, 0xAA, 0x3C]).max() < 10

    page.requests.clear()
    slider = page.page.locator("#slider-score")
    box = slider.bounding_box()
    page.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.page.mouse.down()
    for share in (0.6, 0.8, 1.1):
        page.page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
    page.until("() => !groundedSam.views.try.objects.list().length")
    assert page.requests == []
    assert not np.array(page.run(script, points)).any()
    page.page.mouse.up()  # only now the server is asked, once
    page.page.wait_for_timeout(600)
    assert page.requests == ["POST /v1/select"]


SELECTIONS = [
    {},
    {"score": 0.8},
    {"score": 0.1, "nms": None},
    {"score": 0.1, "nms": 0.2},
    {"score": 0.1, "nms": 0.05, "class_agnostic": True},
    {"score": 0.1, "nms": 0.5, "nms_by": "mask"},
    {"score": 0.1, "nms": 0.1, "nms_by": "mask", "class_agnostic": True},
    {"score": 0.1, "nms": None, "max_ios": 0.6, "class_agnostic": True},
    {"score": 0.1, "top_k": 2},
    {"score": 0.1, "top_k": 0},
    {"score": 0.2, "nms": None, "min_area": 3000, "max_area": 8000, "top_k": 3},
    {"score": 0.5, "class_score": {"red circle": 0.05, "green star": 0.95}},
    {"score": 0.1, "nms": None, "max_area": 5000},
]


def test_the_page_selects_what_the_server_selects(page, folders):
    open_picture(page, folders / "photos" / "0.png", TEXT)
    page.run("() => { const v = groundedSam.views.try; v.floor = 0.05; v.prediction = null; v.find(); }")
    page.until("() => groundedSam.views.try.prediction")
    assert page.run("() => groundedSam.views.try.objects.base.length") > 5
    script = """async (selections) => {
        const { select } = await import('/static/app/selection.js');
        const api = await import('/static/app/api.js');
        const { prediction, objects, initial } = groundedSam.views.try;
        const answers = [];
        for (const values of selections) {
            const settings = { ...initial, ...values };
            const mine = select(objects.base, settings, prediction).map((object) => object.id);
            delete settings.status;
            const { selected } = await api.select({ prediction: prediction.prediction, select: settings });
            answers.push([mine, selected]);
        }
        return answers;
    }"""
    rng = np.random.default_rng(1)
    rest = [{"score": round(float(rng.uniform(0.05, 1)), 2), "nms": round(float(rng.uniform(0, 1)), 2)} for _ in range(20)]
    answers = page.run(script, [*SELECTIONS, *rest])
    for values, (mine, selected) in zip([*SELECTIONS, *rest], answers, strict=True):
        assert mine == selected, values
    assert len({tuple(mine) for mine, _ in answers}) > 4

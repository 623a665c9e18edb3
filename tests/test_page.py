"""The page in a real browser: what is found, clicked, tracked, decided and compared there."""

from __future__ import annotations

import itertools
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
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "config.yaml").write_text("input: photos\n")
        (folder / ".hydra" / "hydra.yaml").write_text(f"hydra: {{runtime: {{cwd: {root}}}}}\n")
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
    names = ",".join(word for word in words if not word.startswith("!"))
    page.until(f"() => groundedSam.views.try.prediction?.classes.join() === {json.dumps(names)}")


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
    page.run("() => { const v = groundedSam.views.try; v.floor = 0.002; v.prediction = null; v.find(); }")
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
    rest = [dict(zip(("score", "nms"), rng.uniform([0.05, 0], 1).round(2).tolist(), strict=True)) for _ in range(20)]
    answers = page.run(script, [*SELECTIONS, *rest])
    for values, (mine, selected) in zip([*SELECTIONS, *rest], answers, strict=True):
        assert mine == selected, values
    assert len({tuple(mine) for mine, _ in answers}) > 3


def test_points_change_the_mask_as_expected(page, folders, truth):
    scene = truth[0]
    mask = scene.masks[scene.pairs.index(("blue", "square"))]
    y, x = (int(values.mean()) for values in np.nonzero(mask))
    open_picture(page, folders / "photos" / "0.png", ["red circle"])
    before = {entry["key"] for entry in shown(page)}
    page.page.keyboard.press("Escape")
    page.page.click("#view-try button:has-text('Point')")
    page.click_at("try/canvas", x, y)  # left: this belongs to the object
    page.until("() => groundedSam.views.try.objects.active?.startsWith('a')")
    [key] = {entry["key"] for entry in shown(page)} - before
    clicked = mask_of(page, key)
    assert iou(clicked, mask) > 0.6

    everything = scene.masks.any(0)
    free = np.argwhere(~everything & ~np.roll(everything, 30, 0) & ~np.roll(everything, 30, 1))
    far = free[np.argmax(np.abs(free - [y, x]).sum(1) * (free.min(1) > 30) * (free[:, 1] < 370) * (free[:, 0] < 270))]
    page.page.click("#view-try button:has-text('Brush')")
    page.run("() => groundedSam.views.try.toolbar.setSize(40)")
    page.click_at("try/canvas", float(far[1]), float(far[0]))
    painted = mask_of(page, key)
    assert painted[far[0], far[1]] and iou(painted, mask) < iou(clicked, mask)
    page.page.keyboard.press("p")
    page.click_at("try/canvas", float(far[1]), float(far[0]), button="right")  # right: this does not
    page.until(f"() => groundedSam.views.try.objects.promptsOf('{key}').points.length === 2")
    corrected = mask_of(page, key)
    assert iou(corrected, mask) > iou(painted, mask) and not corrected[far[0], far[1]]

    page.page.keyboard.press("u")
    assert np.array_equal(mask_of(page, key), painted)
    page.page.keyboard.press("u")
    assert np.array_equal(mask_of(page, key), clicked)
    page.page.keyboard.press("Control+Shift+Z")
    assert np.array_equal(mask_of(page, key), painted)
    page.page.keyboard.press("Delete")
    assert {entry["key"] for entry in shown(page)} == before


def test_everything_in_try_works_by_keyboard(page, folders, truth):
    scene = truth[0]
    x1, y1, x2, y2 = scene.xyxy[scene.pairs.index(("blue", "square"))].tolist()
    open_picture(page, folders / "photos" / "0.png", ["red circle"])
    keys = page.page.keyboard
    page.run("() => document.activeElement.blur()")
    for _ in range(80):  # the canvas is reached by Tab alone
        keys.press("Tab")
        if page.run("() => document.activeElement.tagName") == "CANVAS":
            break
    keys.press("b")
    at = [200, 150]  # the cross begins in the middle
    for target in ((x1, y1), (x2, y2)):
        for axis, (less, more) in enumerate((("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))):
            tens, ones = divmod(abs(round(target[axis]) - at[axis]), 10)
            for name, count in ((f"Shift+{more}", tens), (more, ones)):
                for _ in range(count):
                    keys.press(name if target[axis] > at[axis] else name.replace(more, less))
            at[axis] = round(target[axis])
        keys.press("Enter")
    page.until("() => groundedSam.views.try.objects.active?.startsWith('a')")
    key = page.run("() => groundedSam.views.try.objects.active")
    assert iou(mask_of(page, key), scene.masks[scene.pairs.index(("blue", "square"))]) > 0.6
    for _ in range(20):
        keys.press("+")
    assert page.run("() => groundedSam.views.try.viewer.scale") == 8
    keys.press("0")
    assert page.run("() => groundedSam.views.try.viewer.isFitted")


def test_an_ontology_and_negatives_are_taken(page, folders):
    open_picture(page, folders / "photos" / "0.png", ["red circle", "!blue square"])
    view = "groundedSam.views.try"
    assert page.run(f"() => {view}.words.negatives") == ["blue square"]
    command = page.run(f"() => {view}.recipe.command.textContent")
    assert "'text=[red circle]'" in command and "'negative=[blue square]'" in command
    yaml = "classes:\n  ball:\n    phrases: [red circle]\n    colour: '#ff00ff'\n    score: 0.2\n"
    page.run(
        """(text) => { const data = new DataTransfer(); data.setData('text', text);
        document.getElementById('try-words').dispatchEvent(new ClipboardEvent('paste', { clipboardData: data })); }""",
        yaml,
    )
    page.until(f"() => {view}.prediction.classes.join() === 'ball'")
    assert page.run(f"() => {view}.prediction.colors") == ["#ff00ff"]
    assert page.run(f"() => {view}.prediction.class_score") == {"ball": 0.2}
    assert page.run(f"() => {view}.colorOf('ball')") == "#ff00ff"
    with page.page.expect_download() as waiting:
        page.page.click("#view-try button:has-text('COCO')")
    coco = json.loads(Path(waiting.value.path()).read_text())
    assert len(coco["annotations"]) == len(shown(page)) and coco["categories"] == [{"id": 1, "name": "ball"}]
    for name in ("PNG", "Cut-out"):
        with page.page.expect_download() as waiting:
            page.page.click(f"#view-try button:has-text('{name}')")
        with Image.open(waiting.value.path()) as picture:
            assert picture.format == "PNG" and (name == "PNG") == (picture.size == (400, 300))


def test_a_clip_gives_its_lanes(page, folders):
    page.open("video")
    page.until("() => groundedSam.views.video.source")
    page.page.set_input_files("#view-video input[type=file]", str(folders / "shapes.mp4"))
    page.until("() => groundedSam.views.video.source.name === 'shapes.mp4'")
    page.page.click("#view-video [data-part=run] button:has-text('Track')")
    page.until("() => groundedSam.views.video.source.lines.size === 8 && !groundedSam.views.video.job")
    lanes = page.run("() => groundedSam.views.video.source.tracks()")
    assert lanes and all(lane["class"] in ("green star", "red circle") for lane in lanes)
    page.until(f"() => document.querySelectorAll('#view-video .lane').length === {len(lanes)}")
    assert page.run("() => document.querySelectorAll('#view-video .lane .bar').length") >= len(lanes)
    first = lanes[0]["track"]
    page.run(f"() => groundedSam.views.video.choose({first})")
    page.run("() => groundedSam.views.video.go(4)")
    page.page.click("#view-video button:has-text('Split here')")
    page.until(f"() => groundedSam.views.video.source.tracks().length === {len(lanes) + 1}")
    page.page.click("#view-video button:has-text('Undo')")
    page.until(f"() => groundedSam.views.video.source.tracks().length === {len(lanes)}")


def test_labels_do_not_cover_each_other_where_there_is_room(page):
    boxes = [[100, 50, 200, 150], [110, 50, 220, 150], [0, 0, 50, 40], [0, 60, 30, 90]]
    sizes = [[90, 16], [90, 16], [40, 16], [40, 16]]
    page.open("try")
    script = "async ([boxes, sizes]) => (await import('/static/app/labels.js')).placeLabels(boxes, sizes)"
    corners = page.run(script, [boxes, sizes])
    assert corners[0] == [100, 34] and corners[2] == [0, 0]  # above its box, and not above the image
    places = [(x, y, x + width, y + height) for (x, y), (width, height) in zip(corners, sizes, strict=True)]
    for (left, top, right, bottom), (x1, y1, x2, y2) in itertools.combinations(places, 2):
        assert min(right, x2) <= max(left, x1) or min(bottom, y2) <= max(top, y1)


def test_tracks_have_the_colors_of_their_classes_if_all_names_contain_one(page):
    page.open("try")
    script = "async (given) => (await import('/static/app/colors.js')).colorOfTrack(...given)"
    named = [page.run(script, [track, "red car", ["red car", "blue car"]]) for track in (1, 2)]
    others = [page.run(script, [track, "red car", ["red car", "person"]]) for track in (1, 2)]
    assert named[0] == named[1] == "#dc2828" and others[0] != others[1]


def test_lanes_of_a_store_are_split_merged_and_relabeled_there(page, folders):
    before = tracks(folders / "tracked")
    [(first, members)] = before.items()
    page.open("video")
    page.until("() => groundedSam.views.video.source")
    page.page.select_option("#view-video [data-part=stored] select", label="clips: a.mkv")
    page.until("() => groundedSam.views.video.source.isStored")
    page.until("() => groundedSam.views.video.viewer.image && document.querySelectorAll('#view-video .lane').length")
    page.page.click(f"#view-video .lane[data-track='{first}'] .choose")
    page.run("() => groundedSam.views.video.go(6)")
    page.until("() => groundedSam.views.video.shown.length && groundedSam.views.video.frame === 6")
    page.page.click("#view-video button:has-text('Split here')")
    page.until("() => groundedSam.views.video.source.tracks().length === 2")
    split = tracks(folders / "tracked")
    assert [frame for frame, _ in split[first]] == [frame for frame, _ in members if frame < 6] and len(split) == 2
    [new] = set(split) - {first}
    page.page.fill(f"#view-video .lane[data-track='{new}'] input", "c")
    page.page.keyboard.press("Enter")
    page.until("() => groundedSam.views.video.source.tracks()[1].class === 'c'")
    assert {name for _, name in tracks(folders / "tracked")[new]} == {"c"}
    page.page.click(f"#view-video .lane[data-track='{new}'] .choose")
    page.page.select_option("#view-video [aria-label='Merge this lane into']", str(first))
    page.until("() => groundedSam.views.video.source.tracks().length === 1")
    merged = tracks(folders / "tracked")
    assert set(merged) == {first} and [frame for frame, _ in merged[first]] == [frame for frame, _ in members]


def test_a_relabel_in_browse_is_exported(page, folders, tmp_path):
    page.open("browse")
    page.page.select_option("#view-browse [data-part=filters] select >> nth=0", "scenes")
    page.until("() => groundedSam.views.browse.picture?.name === '0.png'")
    chosen = page.run("() => { const o = groundedSam.views.browse.current; return [o.object_id, o.class]; }")
    number = 5  # orange ring
    page.page.keyboard.press(str(number))
    page.until("() => !groundedSam.views.browse.verdicts.isBusy")
    content = exported(folders / "labels", tmp_path / "export")
    of_picture = [name for picture, name, _ in content if picture == "0.png"]
    assert TEXT[number - 1] in of_picture and of_picture.count(chosen[1]) == 0
    page.page.keyboard.press("u")  # back to the object, as it was
    page.until(f"() => groundedSam.views.browse.current?.object_id === '{chosen[0]}'")
    page.until("() => !groundedSam.views.browse.verdicts.isBusy")
    assert page.run("() => groundedSam.views.browse.current.status") == "predicted"
    assert chosen[1] in [name for picture, name, _ in exported(folders / "labels", tmp_path / "again")]


def test_thirty_verdicts_a_minute_are_possible_by_keyboard(page, folders):
    page.open("browse")
    page.page.select_option("#view-browse [data-part=filters] select >> nth=0", "scenes")
    page.until("() => groundedSam.views.browse.picture?.name === '0.png'")
    page.page.check("#view-browse input[type=checkbox]")
    page.until("() => groundedSam.views.browse.filter.unreviewed && groundedSam.views.browse.picture")
    page.until("() => groundedSam.views.browse.current?.status === 'predicted'")
    view = "groundedSam.views.browse"
    left = page.run(f"() => {view}.counts.unreviewed")
    for i in range(left):
        page.until(f"() => !{view}.isOpening && {view}.current.status === 'predicted'")
        page.page.keyboard.press("r" if i % 4 == 3 else "a")
    page.until("() => !groundedSam.views.browse.verdicts.isBusy")
    speed = page.run("() => groundedSam.views.browse.verdicts.perMinute")
    print(f"{left} verdicts, {speed} a minute")
    assert speed > 30
    rows = StoreEditor(folders / "labels").rows
    statuses = [row["status"] for key in rows.index.sorted_keys() for _, found in rows.rows(key) for row in found]
    assert statuses.count("rejected") == left // 4 and "predicted" not in statuses
    assert "0 to review" in page.run("() => document.querySelector('#view-browse [data-part=counts]').textContent")
    page.page.select_option("#view-browse [data-part=filters] select >> nth=2", "empty")
    page.until("() => document.querySelector('#view-browse .filters .quiet').textContent")


def test_a_picture_of_a_store_is_corrected_in_try(page, folders, tmp_path):
    page.open("browse")
    page.page.select_option("#view-browse [data-part=filters] select >> nth=0", "scenes")
    page.until("() => groundedSam.views.browse.picture?.name === '0.png'")
    page.page.keyboard.press("e")
    page.until("() => groundedSam.current === 'try' && groundedSam.views.try.stored.isOpen")
    page.until("() => groundedSam.views.try.objects.base.length")
    key = shown(page)[0]["key"]
    page.run(f"() => groundedSam.views.try.choose('{key}')")
    before = mask_of(page, key)
    page.page.click("#view-try button:has-text('Eraser')")
    ys, xs = np.nonzero(before)
    page.click_at("try/canvas", float(np.median(xs)), float(np.median(ys)))
    page.page.click("#view-try button:has-text('Save to the store')")
    page.until("() => document.getElementById('status').textContent.includes('saved to store')")
    after = mask_of(page, key)
    assert 0 < after.sum() < before.sum()
    content = exported(folders / "labels", tmp_path / "export")
    assert content


def test_compare_finds_the_pictures_that_differ(page, folders):
    page.open("compare")
    page.until("() => groundedSam.views.compare.picture?.shapes")
    script = "() => groundedSam.views.compare.pictures.map((p) => [p.name, p.only_a.length + p.only_b.length])"
    pictures = page.run(script)
    counts: dict[str, int] = {}
    for job, sign in (("0", 1), ("1", -1)):  # what the second job has, the first one has too
        stored = json.loads((folders / "sweep" / job / "annotations.json").read_text())
        names = {image["id"]: image["file_name"] for image in stored["images"]}
        counts = dict.fromkeys(names.values(), 0) | counts
        for entry in stored["annotations"]:
            counts[names[entry["image_id"]]] += sign
    assert dict(pictures) == counts and [n for _, n in pictures] == sorted(counts.values(), reverse=True)
    assert page.run("() => groundedSam.views.compare.viewers.map((v) => v.outlined.length)") == [pictures[0][1], 0]
    assert page.run("() => groundedSam.views.compare.viewers[0].image.naturalWidth") == 400
    page.page.focus("#view-compare [data-part=canvas-a]")
    page.page.keyboard.press("+")
    scales = page.run("() => groundedSam.views.compare.viewers.map((v) => [v.scale, ...v.offset])")
    assert scales[0] == pytest.approx(scales[1])
    page.page.focus("#view-compare [data-part=pictures]")
    page.page.keyboard.press("ArrowDown")
    page.until(f"() => groundedSam.views.compare.picture.name === '{pictures[1][0]}'")


def test_errors_are_said_in_words(page, folders):
    page.open("try")
    page.until("() => groundedSam.views.try.prediction")
    (folders / "broken.png").write_bytes(b"\x89PNG not really")
    page.page.set_input_files("#view-try input[type=file]", str(folders / "broken.png"))
    text = page.until("() => document.querySelector('#status.error')?.textContent")
    assert text.startswith("broken.png: ")
    page.problems[:] = [problem for problem in page.problems if "422" not in problem]  # the browser logs the status


def test_pictures_of_a_job_are_those_of_its_input(served, folders):
    path = "/v1/sweeps/scores/image"
    answer = served.get(path, params={"job": "0", "name": "1.png", "max_side": 64})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"
    assert served.get(path, params={"job": "0", "name": "../0.png"}).status_code == 404
    assert served.get(path, params={"job": "7", "name": "0.png"}).status_code == 404
    config = folders / "sweep" / "1" / ".hydra" / "config.yaml"
    before = config.read_text()
    config.write_text("input: /etc\n")
    assert served.get(path, params={"job": "1", "name": "hostname"}).status_code == 404
    outside = folders.parent / "outside"
    outside.mkdir()
    (outside / "0.png").write_bytes((folders / "photos" / "0.png").read_bytes())
    config.write_text(f"input: {outside}\n")
    assert served.get(path, params={"job": "1", "name": "0.png"}).status_code == 403
    config.write_text(before)

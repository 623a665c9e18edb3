"""Give damaged and hostile files to every reader, and odd names to every writer, for `FUZZ_MINUTES` minutes.

    make fuzz                      # ten minutes
    FUZZ_MINUTES=60 make fuzz

A reader uses a file, or raises an error of the package of one short line. Anything else, also a crash of the
interpreter and more than `MEMORY` bytes, is a failure, which Hypothesis prints as small as it can.
"""

from __future__ import annotations

import copy
import faulthandler
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import GroundedSamError, Vocabulary, read_image
from grounded_sam.config.build import build_sinks
from grounded_sam.config.compose import compose
from grounded_sam.config.words import read_words
from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.output_classes import OutputClasses
from grounded_sam.media.images import safe_formats
from grounded_sam.sources.stored import StoreSource
from grounded_sam.sources.tracks import LabelledVideoSource
from grounded_sam.sources.video import VideoSource
from grounded_sam.structures.clicks import Clicks
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult

MINUTES = float(os.environ.get("FUZZ_MINUTES", "10"))
MEMORY = 16 * 2**30  # of address space, most of which torch reserves
SINKS = ("coco", "yolo", "voc", "labelme", "label_studio", "cvat", "imagefolder", "masks", "jsonl", "store", "report")
NUMBERS = [0, -1, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -1e308, float("nan"), float("inf"), -float("inf")]
VALUES = [*NUMBERS, True, None, "7", "", "\ud800", "a\0b", "../../x", "x" * 300, [], [1], {}, [[[1]]]]
values = st.one_of(
    st.sampled_from(VALUES), st.floats(-100, 100), st.integers(-50, 50), st.text(max_size=20), st.lists(st.integers())
)
names = st.one_of(
    st.text(min_size=1, max_size=40),
    st.text(st.sampled_from("ab/.\\-= \n:%é'\"<&\ud800,"), min_size=1, max_size=20),
    st.sampled_from(["a" * 300, "..", "CON", "a/../b", "images/a.png", "=1+1", "a.png/b.png", "labels"]),
)


@pytest.fixture(scope="module", autouse=True)
def _limit_memory():
    """Make a reader that takes all memory fail instead of the machine."""
    faulthandler.enable()
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limit)


def survives(read: Callable[[], Any]) -> None:
    """Run a reader; the only exceptions are errors of the package, of one short line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except GroundedSamError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, str(error)


@st.composite
def damaged(draw, contents: list[bytes]) -> bytes:
    """Draw one of some files with a few changes: other bytes, cut, repeated or removed blocks."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["byte", "block", "number", "cut", "remove", "repeat"]))
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "block":
            block = draw(st.binary(min_size=1, max_size=32))
            data[at : at + len(block)] = block
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 2**7, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
            data[at : at + 4] = number.to_bytes(4, draw(st.sampled_from(["little", "big"])))
        elif kind == "cut":
            del data[at:]
        else:
            block = bytes(data[at : at + draw(st.integers(1, 64))])
            data[at : at + len(block)] = b"" if kind == "remove" else block * 3
    return bytes(data)


@st.composite
def changed(draw, content: Any) -> Any:
    """Draw a copy of a JSON document with a few values replaced or removed, at any depth."""
    document = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        parent, key, node = None, None, document
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 4))):
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
            parent, node = node, node[key]
        if parent is None:
            return copy.deepcopy(draw(values))
        if draw(st.integers(0, 5)):
            parent[key] = copy.deepcopy(draw(values))
        else:
            del parent[key]
    return document


def image_files() -> dict[str, list[bytes]]:
    """Return images of each format that is read, by suffix."""
    pixels = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(20, 24, 3)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., 0]).convert("P")]
    images += [Image.fromarray(pixels[..., 0].astype(np.float32)), Image.fromarray(pixels[..., 0].astype(np.int32))]
    files: dict[str, list[bytes]] = {}
    formats = safe_formats()
    suffixes = {name: suffix for suffix, name in dict(Image.registered_extensions()).items() if name in formats}
    for name, suffix in suffixes.items():
        for image in images:
            out = io.BytesIO()
            with suppress(Exception), warnings.catch_warnings():  # a mode that it cannot have, or a format only read
                warnings.simplefilter("ignore")
                image.save(out, format=name, **({"save_all": True} if name in ("GIF", "TIFF") else {}))
                files.setdefault(suffix, []).append(out.getvalue())
    return files


def video_files() -> dict[str, list[bytes]]:
    """Return short videos in several containers, by suffix."""
    files: dict[str, list[bytes]] = {}
    codecs = {".mp4": "mpeg4", ".mkv": "mpeg4", ".avi": "mpeg4", ".mov": "mjpeg", ".ts": "mpeg2video", ".flv": "flv1"}
    for suffix, codec in codecs.items():
        out = io.BytesIO()
        with av.open(out, "w", format={".mkv": "matroska", ".ts": "mpegts"}.get(suffix, suffix[1:])) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for i in range(6):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * i, np.uint8), "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        files[suffix] = [out.getvalue()]
    return files


def coco() -> dict[str, Any]:
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 30, "license": 1}
    labels = [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[2, 2, 12, 2, 12, 12]], "bbox": [2, 2, 10, 10]},
        {"id": 2, "image_id": 1, "category_id": 2, "iscrowd": 1, "bbox": [2, 2, 10, 10], "area": 4.5, "score": 0.5},
    ]
    labels[1]["segmentation"] = {"size": [30, 40], "counts": [600, 600]}
    categories = [{"id": 1, "name": "cat", "supercategory": "pet"}, {"id": 2, "name": "dog"}]
    return {"images": [image], "annotations": labels, "categories": categories, "licenses": [{"id": 1, "name": "x"}]}


def youtube_vis() -> dict[str, Any]:
    video = {"id": 1, "file_names": ["v/0.jpg", "v/1.jpg"], "width": 40, "height": 30}
    masks = [{"size": [30, 40], "counts": [600, 600]}, None]
    return {
        "videos": [video],
        "annotations": [{"id": 1, "video_id": 1, "category_id": 1, "segmentations": masks}],
        "categories": [{"id": 1, "name": "cat"}],
    }


def sa_v() -> dict[str, Any]:
    rle = {"size": [30, 40], "counts": "T3b01O10O1O01000000O0100000O1N00i0"}
    return {"masklet": [[rle]], "masklet_id": [1], "video_frame_count": 1, "video_id": "v"}


CLASS_FILES = {
    ".yaml": [
        b"classes:\n  car: {phrases: [car, auto], id: 3, score: 0.4, color: '#ff0000'}\n  bus:\nnegative: [tram]\n"
    ],
    ".json": [json.dumps(coco()).encode(), b'{"id2label": {"0": "car", "1": "bus"}}'],
    ".txt": [b"car\nbus, coach\n# a comment\n"],
    ".csv": [b"id,name\n1,car\n2,bus\n"],
    ".names": [b"car\nbus\n"],
}
VOC = (
    b"<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size><object><name>cat</name>"
    b"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)
DATA_YAML = b"train: images/train\nval: images/train\nnc: 2\nnames: {0: cat, 1: dog}\n"


def write(path: Path, content: Any) -> Path:
    """Write bytes, or a JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read_video(path: Path) -> None:
    for _ in VideoSource(path, stop=20):
        pass


def read_labels(path: Path) -> None:
    """Read a COCO file, and its images with their labels."""
    file = CocoFile(path)
    for image in file.images:
        file.detections(image)


def read_tracks(path: Path) -> None:
    for frame in LabelledVideoSource(path):
        assert frame.annotations is not None


def file_name(name: str) -> str:
    """Return a name as sources give it, which escape what is no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_everywhere(folder: Path, image_names: list[str], class_names: list[str]) -> None:
    """Write images of some names with objects of some classes with every sink, and read the store back."""
    words = Vocabulary.parse({name: [f"thing {i}"] for i, name in enumerate(class_names)})
    cfg = compose(["input=x", f"sink=[{','.join(SINKS)}]", "sink.masks.mode=objects"])
    classes = OutputClasses(folder, words)
    classes.save()
    with ExitStack() as stack:
        sinks = [stack.enter_context(sink) for sink in build_sinks(cfg, folder, words, classes)]
        for name in dict.fromkeys(map(file_name, image_names)):
            masks = np.zeros((len(words), 8, 9), bool)
            masks[:, 2:5, 3:7] = True
            boxes, ids = np.tile([3.0, 2, 7, 5], (len(words), 1)), np.arange(len(words))
            frame = Frame(pixels=np.zeros((8, 9, 3), np.uint8), name=name)
            detections = make_detections(boxes, np.full(len(words), 0.5), ids, words, (8, 9), masks)
            for sink in sinks:
                sink.write(FrameResult(frame=frame, detections=detections))
    outside = [path for path in folder.parent.rglob("*") if not path.is_relative_to(folder)]
    assert not outside, outside
    assert len(list(StoreSource(folder, check_files=False))) == len(set(map(file_name, image_names)))


def store_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a store with two images."""
    write_everywhere(folder / "out", ["a.png", "b.png"], ["cat", "dog"])
    return {path.name: path.read_bytes() for path in (folder / "out" / "store").iterdir()}


def targets(folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]]:
    """Return what is drawn and what is done with it, by the name of the target."""
    images, videos, stored = image_files(), video_files(), store_files(folder / "seed")
    by_suffix = st.sampled_from(sorted(images)).flatmap(lambda s: st.tuples(st.just(s), damaged(images[s])))
    video = st.sampled_from(sorted(videos)).flatmap(lambda s: st.tuples(st.just(s), damaged(videos[s])))
    class_file = st.sampled_from(sorted(CLASS_FILES)).flatmap(
        lambda s: st.tuples(st.just(s), st.one_of(damaged(CLASS_FILES[s]), st.binary(max_size=80)))
    )
    part = st.sampled_from(sorted(stored)).flatmap(lambda name: st.tuples(st.just(name), damaged([stored[name]])))
    click = {"class": "cup", "points": [[3, 4]], "labels": [1], "box": [1, 2, 3, 4], "frame": 1, "object": 1}

    def few(strategy: st.SearchStrategy[str], most: int) -> st.SearchStrategy[list[str]]:
        return st.lists(strategy, min_size=1, max_size=most)

    def read_store(drawn: tuple[str, bytes]) -> None:
        output = folder / "stored"
        shutil.rmtree(output, ignore_errors=True)
        for name, content in {**stored, drawn[0]: drawn[1]}.items():
            write(output / "store" / name, content)
        for frame in StoreSource(output, check_files=False):
            assert frame.annotations is not None

    def read_truth(drawn: tuple[str, bytes]) -> None:
        truth = folder / "truth"
        shutil.rmtree(truth, ignore_errors=True)
        for sub in ("images/train", "JPEGImages"):
            (truth / sub).mkdir(parents=True)
            Image.new("RGB", (40, 30)).save(truth / sub / "a.png")
        files = {"data.yaml": DATA_YAML, "labels/train/a.txt": b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.4 0.1 0.4 0.4\n"}
        if drawn[0] not in files:
            files = {"Annotations/a.xml": VOC}
        for name, content in {**files, drawn[0]: drawn[1]}.items():
            write(truth / name, content)
        read_ground_truth(truth / "data.yaml" if "data.yaml" in files else truth)

    def write_names(drawn: tuple[list[str], list[str]]) -> None:
        shutil.rmtree(folder / "written", ignore_errors=True)
        write_everywhere(folder / "written" / "out", *drawn)

    return {
        "images": (by_suffix, lambda drawn: read_image(write(folder / f"image{drawn[0]}", drawn[1]))),
        "videos": (video, lambda drawn: read_video(write(folder / f"video{drawn[0]}", drawn[1]))),
        "coco": (changed(coco()), lambda drawn: read_labels(write(folder / "coco.json", drawn))),
        "youtube_vis": (changed(youtube_vis()), lambda drawn: read_tracks(write(folder / "vis.json", drawn))),
        "sa_v": (changed(sa_v()), lambda drawn: read_tracks(write(folder / "sa_v.json", drawn))),
        "json": (damaged([json.dumps(coco()).encode()]), lambda drawn: read_labels(write(folder / "d.json", drawn))),
        "truth": (
            st.one_of(
                st.tuples(st.just("data.yaml"), damaged([DATA_YAML])),
                st.tuples(st.just("labels/train/a.txt"), damaged([b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.4 0.1 0.4 0.4\n"])),
                st.tuples(st.just("Annotations/a.xml"), damaged([VOC])),
            ),
            read_truth,
        ),
        "classes": (class_file, lambda drawn: Vocabulary.parse(str(write(folder / f"classes{drawn[0]}", drawn[1])))),
        "text": (st.text(max_size=60), Vocabulary.parse),
        "words": (st.lists(st.text(max_size=30).filter(lambda word: "\0" not in word), max_size=4), read_words),
        "clicks": (changed([click]), lambda drawn: Clicks(str(write(folder / "clicks.json", drawn)))),
        "store": (part, read_store),
        "names": (st.tuples(few(names, 5), few(names, 3)), write_names),
    }


TARGETS = ("images", "videos", "coco", "youtube_vis", "sa_v", "json", "truth", "classes", "text", "words", "clicks")
TARGETS += ("store", "names")


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input(name, tmp_path):
    drawn, use = targets(tmp_path)[name]
    end, count = time.monotonic() + MINUTES * 60 / len(TARGETS), 0

    @settings(
        max_examples=100,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(drawn)
    def round_of_examples(example: Any) -> None:
        nonlocal count
        count += 1
        survives(lambda: use(example))

    while time.monotonic() < end:
        round_of_examples()
    print(f"{name}: {count:,} inputs")
    assert count

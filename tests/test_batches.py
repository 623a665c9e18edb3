"""Batches, order and overlap of the stages."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from fakes import CLASSES, Fill, Halves
from hypothesis import given
from hypothesis import strategies as st

from grounded_sam.errors import ImageError, StageError
from grounded_sam.media.prefetch import Prefetch, map_ahead
from grounded_sam.pipeline.batches import WINDOW, collect_batches, in_order
from grounded_sam.pipeline.images import process_images
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.runner import Runner
from grounded_sam.structures.detections import tracked_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult


def frame(width: int = 8, index: int = 0, height: int = 6) -> Frame:
    return Frame(pixels=np.full((height, width, 3), index % 256, np.uint8), index=index, name=f"{index}.png")


class Grouped(Halves):
    """`Halves` that accepts only frames of one size per call, and refuses some of them.

    Args:
        batch_size: Frames per call.
        refused: Names of frames that it refuses.
        fits: Frames that fit into memory.
    """

    def __init__(self, batch_size: int = 4, refused: tuple[str, ...] = (), fits: int = 99) -> None:
        super().__init__(batch_size=batch_size)
        self.refused, self.fits = refused, fits
        self.names: list[list[str]] = []

    def batch_key(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        return size_hw

    def detect(self, frames, vocabulary):
        assert len({f.size_hw for f in frames}) == 1
        self.names.append([f.name for f in frames])
        if len(frames) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(f.name in self.refused for f in frames):
            raise ValueError("refused")
        return super().detect(frames, vocabulary)


class BatchFill(Fill):
    """`Fill` that takes several images per call."""

    batch_size = 3

    def __init__(self) -> None:
        self.calls: list[int] = []

    def segment_batch(self, images, detections):
        self.calls.append(len(images))
        return [self.segment(image, part) for image, part in zip(images, detections, strict=True)]


@given(st.lists(st.integers(1, 4), max_size=60), st.integers(1, 5))
def test_batches_have_one_key_and_hold_every_frame_once(widths, batch_size):
    frames = [frame(width, i) for i, width in enumerate(widths)]
    taken = []

    def source():
        for item in frames:
            taken.append(item)
            yield item

    seen = []
    for batch in collect_batches(source(), batch_size, lambda f: f.size_hw[1]):
        assert 1 <= len(batch) <= batch_size
        assert len({f.size_hw for _, f in batch}) == 1
        seen += [position for position, _ in batch]
        assert len(taken) - len(seen) <= WINDOW * batch_size  # what waits
    assert sorted(seen) == list(range(len(widths)))


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_results_are_put_in_order(positions, missing):
    items = ((i, None if i in missing else i) for i in positions)
    assert list(in_order(items)) == [i for i in range(12) if i not in missing]


@pytest.mark.parametrize("segmenter", [Fill, BatchFill])
def test_results_keep_the_order_of_the_source_over_mixed_sizes(segmenter):
    widths = [4, 8, 4, 6, 8, 8, 4, 4, 6, 20, 4, 8, 4]
    detector = Grouped()
    stages = Pipeline(detector, segmenter()).stages
    results = list(process_images((frame(w, i) for i, w in enumerate(widths)), CLASSES, stages))
    assert [result.frame.index for result in results] == list(range(len(widths)))
    assert [result.detections.mask.shape[2] for result in results] == widths
    assert max(len(names) for names in detector.names) == 4  # frames of a kind went together
    alone = Pipeline(Halves(), Fill())
    for result in results:
        assert (result.detections.mask == alone.segment(result.frame, CLASSES).mask).all()


def test_the_segmenter_gets_images_in_batches_of_its_own():
    segmenter = BatchFill()
    results = Pipeline(Halves(batch_size=5), segmenter).segment([np.zeros((4, 6, 3), np.uint8)] * 10, CLASSES)
    assert len(results) == 10
    assert segmenter.calls == [3, 2, 3, 2]


def test_only_the_frame_at_fault_of_a_batch_is_skipped():
    detector, skipped = Grouped(refused=("2.png", "9.png")), []
    stages = Pipeline(detector, BatchFill()).stages
    frames = (frame(8, i) for i in range(11))
    results = list(process_images(frames, CLASSES, stages, on_skipped=skipped.append))
    assert [result.frame.index for result in results] == [0, 1, 3, 4, 5, 6, 7, 8, 10]
    assert [item.file for item in skipped] == ["2.png", "9.png"]
    with pytest.raises(StageError, match="refused"):
        list(process_images((frame(8, i) for i in range(11)), CLASSES, stages))


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_stays_so(caplog):
    detector, skipped = Grouped(batch_size=8, fits=3), []
    stages = Pipeline(detector, Fill()).stages
    results = list(process_images((frame(8, i) for i in range(20)), CLASSES, stages, on_skipped=skipped.append))
    assert [result.frame.index for result in results] == list(range(20)) and not skipped
    assert [len(names) for names in detector.names] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert "ran out of memory with 8 images at once and goes on with 4" in caplog.text
    # Also where errors are raised: a smaller batch is no reason to fail.
    assert len(list(process_images((frame(8, i) for i in range(9)), CLASSES, stages))) == 9
    with pytest.raises(StageError, match="out of memory"):
        list(process_images(iter([frame()]), CLASSES, Pipeline(Grouped(fits=0), Fill()).stages))


class SlowFill(Fill):
    """`Fill` that takes some seconds per image."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def segment(self, image, detections):
        time.sleep(self.delay)
        return super().segment(image, detections)


class SlowSource:
    """Frames that take some seconds each to decode."""

    def __init__(self, count: int, delay: float) -> None:
        self.count, self.delay, self.skipped = count, delay, []

    def __len__(self) -> int:
        return self.count

    def _frames(self):
        for i in range(self.count):
            time.sleep(self.delay)
            yield frame(8, i)

    def __iter__(self):
        return Prefetch(self._frames(), 2)


class SlowSink:
    """A sink that takes some seconds per result, and keeps the order of names."""

    def __init__(self, delay: float) -> None:
        self.delay, self.names = delay, []

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def write(self, result: FrameResult) -> None:
        time.sleep(self.delay)
        self.names.append(result.frame.name)

    def summary(self) -> str:
        return "slow"


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("slowest", range(4))
def test_the_slowest_stage_sets_the_pace(tmp_path, slowest, batch_size):
    count = 60
    delays = [0.006] * 4
    delays[slowest] = 0.015
    sink = SlowSink(delays[3])
    pipeline = Pipeline(Halves(delay=delays[1], batch_size=batch_size), SlowFill(delays[2]), vocabulary=CLASSES)
    runner = Runner(pipeline, SlowSource(count, delays[0]), [sink], tmp_path)
    start = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - start
    assert sink.names == [f"{i}.png" for i in range(count)]
    one_by_one = count * sum(delays)
    assert seconds < 0.75 * one_by_one  # a busy machine may be far from the 0.45 of the slowest stage alone


class Network(Fill, Halves):
    """A stage with a network."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.model = torch.nn.Linear(1, 1, device=device)


def test_stages_that_share_the_cores_of_the_cpu_do_not_overlap():
    stages = Pipeline(Network(), Network()).stages
    assert not stages.can_overlap(stages.segmenter)
    assert stages.can_overlap(Network("meta")) and stages.can_overlap(Fill())
    assert not stages.can_overlap(None)


def test_an_abandoned_run_leaves_no_thread():
    names = {"collect", "detect", "decode"}
    stages = Pipeline(Halves(delay=0.001), Fill()).stages
    results = process_images((frame(8, i) for i in range(1000)), CLASSES, stages)
    next(results)
    assert names & {thread.name for thread in threading.enumerate()}
    results.close()
    assert not names & {thread.name for thread in threading.enumerate()}


def test_an_error_of_the_source_reaches_the_caller():
    def frames():
        yield frame(8, 0)
        raise ImageError("broken")

    results = process_images(frames(), CLASSES, Pipeline(Halves(), Fill()).stages)
    assert next(results).frame.index == 0
    with pytest.raises(ImageError, match="broken"):
        next(results)


class Announced:
    """A session that records which frames were announced before they came."""

    def __init__(self, log: list[tuple[str, int]]) -> None:
        self.log, self.size_hw = log, (6, 8)

    def encode_ahead(self, image):
        self.log.append(("ahead", int(image[0, 0, 0])))

    def step(self, image):
        self.log.append(("step", int(image[0, 0, 0])))
        time.sleep(0.005)
        return tracked_detections(np.empty(0, np.int64), np.zeros((0, 6, 8), bool), np.empty(0), np.empty(0))

    def prompt(self, detections):
        masks = np.ones((len(detections), 6, 8), bool)
        ones = np.ones(len(detections))
        return tracked_detections(detections.tracker_id, masks, ones, ones)

    def remove(self, tracker_id):
        pass

    def close(self):
        pass


class AnnouncedTracker:
    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def open(self, size_hw):
        return Announced(self.log)


def test_a_session_hears_of_the_next_frame_before_it_steps():
    tracker = AnnouncedTracker()
    pipeline = Pipeline(None, tracker=tracker)
    clicks = [{"class": "a", "points": [[1, 1]]}]
    count = sum(1 for _ in pipeline.track([frame(8, i).image for i in range(12)], clicks=clicks))
    assert count == 12
    steps = [i for kind, i in tracker.log if kind == "step"]
    ahead = [i for kind, i in tracker.log if kind == "ahead"]
    assert steps == list(range(12))
    assert len(ahead) >= 8 and all(tracker.log.index(("ahead", i)) < tracker.log.index(("step", i)) for i in ahead)
    assert max(Counter(ahead).values()) == 1


def test_map_ahead_keeps_order_and_stops_when_closed():
    done = []

    def work(i):
        time.sleep(0.01 * (i % 3))
        done.append(i)
        return i

    results = map_ahead(work, range(1000), workers=4)
    assert [next(results) for _ in range(20)] == list(range(20))
    results.close()
    count = len(done)
    assert count <= 26
    time.sleep(0.05)
    assert len(done) == count
    failing = map_ahead(lambda i: 1 // i, [1, 0, 1], workers=2)
    assert next(failing) == 1
    with pytest.raises(ZeroDivisionError):
        next(failing)


def test_peek_shows_the_next_item_without_taking_it():
    items = Prefetch(iter([None, 1, 2]), 3)
    time.sleep(0.05)
    assert items.peek() is None and next(items) is None
    assert items.peek() == 1 and items.peek() == 1
    assert list(items) == [1, 2]
    assert items.peek() is None

"""SAM 3's video model against transformers' own loop over a whole video, on random weights of the real class.

Random weights detect and track nothing, so most tests replace the outputs of the detector and the mask decoder by
simulated objects; the association, the hotstart and the memory are those of the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

from grounded_sam import ConfigError, GroundedSamError, VocabularyError, load
from grounded_sam.cli.main import main
from grounded_sam.structures.frame import to_frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.trackers.sam3_video import Sam3VideoSession, Sam3VideoTracker, _Kernels

SIZE = (72, 96)
WORDS = Vocabulary.parse({"car": ["a", "b"], "dog": ["c"]}, ["d"])  # prompts 0 to 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(checkpoints.sam3_video(tmp_path_factory.mktemp("sam3_video")))


@dataclass
class SimulatedObject:
    """A moving square, identified by its detection score.

    Attributes:
        score: Detection score, unique among the objects.
        prompt: Index of the phrase that it matches.
        position: `(x, y)` of its square of 6x6 low-resolution pixels.
        detected: First and last frame in which the detector finds it.
        tracked: First and last frame in which the tracker finds it.
    """

    score: float
    prompt: int
    position: tuple[int, int]
    detected: tuple[int, int]
    tracked: tuple[int, int] = (0, 10**6)

    def mask(self, side: int, frame: int) -> torch.Tensor:
        """Return the logits `(side, side)`; the square moves down by one pixel every four frames."""
        logits = torch.full((side, side), -8.0)
        x, y = self.position
        y = (y + frame // 4) % (side - 6)
        logits[y : y + 6, x : x + 6] = 8.0
        return logits


def simulate(model, objects, monkeypatch):
    """Replace what a model detects and tracks by simulated objects."""
    frame = [0]
    process_frame, propagate = model._det_track_one_frame, model.run_tracker_propagation
    side = model.low_res_mask_size

    def remember_frame(**kwargs):
        frame[0] = kwargs["frame_idx"]
        return process_frame(**kwargs)

    def detect(inference_session, vision_embeds):
        out = {}
        for prompt in inference_session.prompts:
            visible = [o for o in objects if o.prompt == prompt and o.detected[0] <= frame[0] <= o.detected[1]]
            masks = [t.mask(side, frame[0]) for t in visible]
            out[prompt] = {
                "bbox": torch.zeros(len(visible), 4),
                "mask": torch.stack(masks) if masks else torch.zeros(0, side, side),
                "scores": torch.tensor([t.score for t in visible]),
            }
        return out

    def track(inference_session, **kwargs):
        masks, scores = propagate(inference_session=inference_session, **kwargs)
        for i, obj_id in enumerate(inference_session.obj_ids):
            score = inference_session.obj_id_to_score[obj_id]
            simulated = min(objects, key=lambda o: abs(o.score - score))
            tracked = simulated.tracked[0] <= frame[0] <= simulated.tracked[1]
            masks[i] = simulated.mask(side, frame[0]) if tracked else -8.0
            scores[i] = 8.0
        return masks, scores

    monkeypatch.setattr(model, "_det_track_one_frame", remember_frame)
    monkeypatch.setattr(model, "run_detection", detect)
    monkeypatch.setattr(model, "run_tracker_propagation", track)


def make_images(count):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 255, (*SIZE, 3), np.uint8) for _ in range(count)]


def track_images(tracker, images, vocabulary=WORDS):
    frames = iter([to_frame(image, i) for i, image in enumerate(images)])
    return [detections for _, detections in tracker.track_text(frames, vocabulary)]


def track_with_transformers(tracker, images, phrases):
    """Return the ids, masks and scores of each frame, and the ids that transformers removed in it."""
    session = tracker.processor.init_video_session(video=images)
    tracker.processor.add_text_prompt(session, phrases)
    out, removed = [], set()
    for raw in tracker.model.propagate_in_video_iterator(session):
        done = tracker.processor.postprocess_outputs(session, raw)
        new, removed = raw.removed_obj_ids - removed, raw.removed_obj_ids
        out.append((done["object_ids"].tolist(), done["masks"].numpy(), done["scores"].numpy(), new))
    return out


CARS = [
    SimulatedObject(0.9, 0, (1, 2), (0, 99)),
    SimulatedObject(0.91, 1, (10, 4), (0, 99)),
    SimulatedObject(0.92, 2, (20, 8), (5, 99)),
]
UNCONFIRMED = SimulatedObject(0.8, 0, (12, 20), (3, 4))


def test_results_equal_transformers_over_the_whole_video(folder, monkeypatch):
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", settings={"recondition_every_nth_frame": 4})
    simulate(tracker.model, [*CARS, UNCONFIRMED], monkeypatch)
    images = make_images(40)
    vocabulary = Vocabulary.parse(["a", "b", "c"])
    detections, expected = (
        track_images(tracker, images, vocabulary),
        track_with_transformers(tracker, images, ["a", "b", "c"]),
    )
    assert len(detections) == 40
    num_removed = 0
    for frame, (ids, masks, scores, removed) in zip(detections, expected, strict=True):
        assert frame.tracker_id.tolist() == ids
        np.testing.assert_array_equal(frame.confidence, scores)
        num_removed += len(removed)
        if not removed:  # in such a frame, transformers gives masks to the wrong ids
            np.testing.assert_array_equal(frame.mask, masks)
    assert num_removed == 1
    assert sorted(detections[20].class_id.tolist()) == [0, 1, 2]


def test_its_own_detections_equal_those_of_transformers(folder):
    settings = {"score_threshold_detection": 0.0, "new_det_thresh": 0.0, "max_num_objects": 4}
    settings |= dict.fromkeys(("hotstart_delay", "hotstart_unmatch_thresh", "hotstart_dup_thresh"), 16)
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", max_lost_frames=999, settings=settings)
    with torch.no_grad():  # otherwise all objects are absent from the second frame on
        for name, weight in tracker.model.tracker_model.mask_decoder.named_parameters():
            if name.startswith("pred_obj_score_head") and name.endswith("proj_out.bias"):
                weight.fill_(10.0)
            if name.startswith("output_hypernetworks_mlps") and weight.ndim > 1:
                weight.normal_(0, 0.2)
    images = make_images(20)
    detections = track_images(tracker, images, Vocabulary.parse(["a", "b"]))
    expected = track_with_transformers(tracker, images, ["a", "b"])
    assert sum(map(len, detections)) > 20
    for frame, (ids, masks, _, removed) in zip(detections, expected, strict=True):
        visible = masks.any((1, 2))
        assert frame.tracker_id.tolist() == np.array(ids)[visible].tolist()
        if not removed:
            np.testing.assert_array_equal(frame.mask, masks[visible])


def test_objects_that_the_detector_does_not_confirm_are_not_reported(folder, monkeypatch):
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu")
    simulate(tracker.model, [UNCONFIRMED, *CARS], monkeypatch)
    detections = track_images(tracker, make_images(30))
    assert all((frame.confidence != np.float32(UNCONFIRMED.score)).all() for frame in detections)
    # Every id stays on its object, also in the frame in which the unconfirmed object is removed.
    for i in set(np.concatenate([frame.tracker_id for frame in detections]).tolist()):
        columns = {float(frame.xyxy[frame.tracker_id == i][0, 0]) for frame in detections if i in frame.tracker_id}
        assert len(columns) == 1


def test_objects_have_the_class_of_their_phrase_and_negatives_suppress_them(folder, monkeypatch):
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu")
    negative = SimulatedObject(0.95, 3, CARS[1].position, (0, 99))
    simulate(tracker.model, [*CARS, negative], monkeypatch)
    detections = track_images(tracker, make_images(20))[10]
    assert detections.data["class_name"].tolist() == ["car", "dog"]
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.92])


def test_an_object_lost_for_long_returns_with_a_new_id(folder, monkeypatch):
    """This also holds for the only object, whose removal empties the session of transformers."""
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", max_lost_frames=3)
    objects = [SimulatedObject(0.9, 0, (1, 2), (0, 20), (0, 20)), SimulatedObject(0.91, 0, (1, 2), (26, 99))]
    simulate(tracker.model, objects, monkeypatch)
    detections = track_images(tracker, make_images(40))
    ids = [frame.tracker_id.tolist() for frame in detections]
    assert ids[20] != ids[30] and ids[24] == [] and len(ids[20]) == len(ids[30]) == 1


def memory_use(session):
    """Return the bytes of tensors and the number of container entries in a session of transformers."""
    size, entries, seen, stack = 0, 0, set(), [vars(session)]
    while stack:
        it = stack.pop()
        if isinstance(it, torch.Tensor):
            if it.untyped_storage().data_ptr() not in seen:
                seen.add(it.untyped_storage().data_ptr())
                size += it.untyped_storage().nbytes()
        elif isinstance(it, dict):
            entries += len(it)
            stack += it.values()
        elif isinstance(it, list | tuple | set):
            entries += len(it)
            stack += it
        elif hasattr(it, "__dict__") and not isinstance(it, type):
            stack.append(vars(it))
    return size, entries


def test_the_memory_does_not_grow_with_the_length_of_the_video(folder, monkeypatch):
    settings = {"recondition_every_nth_frame": 2, "hotstart_delay": 4, "hotstart_unmatch_thresh": 2}
    settings |= {"hotstart_dup_thresh": 2}
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", max_lost_frames=2, max_prompts=6, settings=settings)
    passing = [SimulatedObject(0.75 + 0.001 * i, 2, (24, 3), (6 * i, 6 * i + 3), (0, 6 * i + 3)) for i in range(20)]
    simulate(tracker.model, [*CARS[:2], *passing], monkeypatch)
    session = Sam3VideoSession(tracker, WORDS)
    sizes = []
    for i, image in enumerate(make_images(100)):
        out = session.step(to_frame(image, i))
        session.prune(set(out.obj_id_to_mask))
        sizes.append(memory_use(session.state))
    early, late = sizes[34], sizes[94]  # at the same phase of the passing objects
    assert late[0] <= early[0] and late[1] <= early[1]


def test_long_videos_keep_the_first_and_the_latest_prompts(folder, monkeypatch):
    settings = {"recondition_every_nth_frame": 1}
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", max_prompts=5, settings=settings)
    simulate(tracker.model, CARS[:1], monkeypatch)
    session = Sam3VideoSession(tracker, WORDS)
    for i, image in enumerate(make_images(20)):
        session.prune(set(session.step(to_frame(image, i)).obj_id_to_mask))
    assert list(session.state.output_dict_per_obj[0]["cond_frame_outputs"]) == [0, 16, 17, 18, 19]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    for i, image in enumerate(make_images(20)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def overrides_for(folder):
    return [f"checkpoints.sam3_video='{folder}'", "tracker=sam3_video", "device=cpu"]


def test_a_video_needs_neither_detector_nor_segmenter(folder, video, monkeypatch):
    model = load(*overrides_for(folder), "select.score=0.905", text={"car": ["a", "b"], "dog": ["c"]})
    assert model.detector is None and model.segmenter is None
    simulate(model.tracker.model, [*CARS, UNCONFIRMED], monkeypatch)
    from grounded_sam.sources.video import VideoSource

    results = [result.detections for result in model.track(VideoSource(video))]
    assert len(results) == 20
    assert [frame.tracker_id.tolist() for frame in results[:6]] == [[1]] * 5 + [[1, 2]]  # select drops the first
    assert results[8].data["class_name"].tolist() == ["car", "dog"]


def test_images_beside_videos_are_listed_as_skipped(folder, video, tmp_path, monkeypatch):
    inputs = tmp_path / "in"
    inputs.mkdir()
    Image.fromarray(make_images(1)[0]).save(inputs / "a.png")
    overrides = [*overrides_for(folder), f"input='{inputs}'", "text=[a]", f"output='{tmp_path / 'out'}'", "sink=coco"]
    monkeypatch.setattr("sys.argv", ["grounded-sam", *overrides])
    with pytest.raises(SystemExit, match="there is no detector for images"):
        main()
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["file"] for entry in skipped] == ["a.png"]


def test_a_detector_can_be_added_for_images(folder):
    model = load(*overrides_for(folder), "detector=clicks", "detector.prompts=[{class: a, box: [1, 2, 30, 40]}]")
    assert len(model.detect(make_images(1)[0])) == 1


def test_detector_none_alone_is_refused_before_a_model_loads():
    for tracker in ("none", "sam2", "boxes"):
        with pytest.raises(ConfigError, match="detector=none needs a tracker that finds objects itself"):
            load("detector=none", f"tracker={tracker}", "checkpoints.sam2=/nowhere")


def test_detecting_without_a_detector_names_the_missing_detector(folder):
    with pytest.raises(GroundedSamError, match="no detector"):
        load(*overrides_for(folder)).segment(make_images(1)[0], ["a"])


def test_settings_that_the_model_does_not_have_are_refused(folder):
    with pytest.raises(ConfigError, match=r"unknown key 'new_thresh'; the keys are .*new_det_thresh"):
        Sam3VideoTracker(checkpoint=folder, settings={"new_thresh": 0.5})
    with pytest.raises(ConfigError, match=r"hotstart_delay must be of type int, got 'x'"):
        Sam3VideoTracker(checkpoint=folder, settings={"hotstart_delay": "x"})
    with pytest.raises(ConfigError, match=r"hotstart_unmatch_thresh \(8\) must be <="):
        Sam3VideoTracker(checkpoint=folder, settings={"hotstart_delay": 4})
    with pytest.raises(ConfigError, match=r"tracker\.max_lost_frames must be an integer >= 0"):
        Sam3VideoTracker(checkpoint=folder, max_lost_frames=-1)
    with pytest.raises(VocabularyError, match="tokens; the model takes at most 32"):
        Sam3VideoSession(Sam3VideoTracker(checkpoint=folder), Vocabulary.parse(["a" * 60]))


def test_nms_and_connected_components_equal_the_kernels_of_the_hub():
    from scipy import ndimage

    rng = np.random.default_rng(1)
    masks = torch.from_numpy((rng.random((5, 1, 17, 23)) > 0.5).astype(np.uint8))
    labels, counts = _Kernels.cc_2d(masks)
    for i in range(5):
        components, number = ndimage.label(masks[i, 0].numpy(), np.ones((3, 3)))
        assert len(np.unique(labels[i])) == number + 1
        areas = ndimage.sum_labels(masks[i, 0].numpy(), components, components)
        np.testing.assert_array_equal(counts[i, 0].numpy(), np.where(components, areas, 0))
    boxes = torch.from_numpy(rng.random((40, 4)).astype(np.float32))
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.from_numpy(rng.random(40).astype(np.float32))
    from torchvision.ops import box_iou, nms

    kept = _Kernels.generic_nms(box_iou(boxes, boxes), scores, 0.3, use_iou_matrix=True)
    assert kept.tolist() == nms(boxes, scores, 0.3).tolist()

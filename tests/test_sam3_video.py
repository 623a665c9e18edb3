"""SAM 3's video model against transformers' own loop over a whole video, on random weights of the real class.

Random weights find and follow nothing, so most tests put detections and masks of a small world in their place: the
model's association, its hotstart and its memory are the real ones.
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
class Thing:
    """Something in the world, known by the score that it is detected with.

    Attributes:
        score: unlike that of any other thing.
        prompt: number of the phrase that means it.
        place: `(x, y)` of its square of 6 low-resolution pixels.
        seen: frames, first and last, in which the detector sees it.
        there: frames in which the tracker finds it once it is followed; by default all.
    """

    score: float
    prompt: int
    place: tuple[int, int]
    seen: tuple[int, int]
    there: tuple[int, int] = (0, 10**6)

    def mask(self, side: int, frame: int) -> torch.Tensor:
        """Logits; it goes down a pixel every four frames."""
        logits = torch.full((side, side), -8.0)
        x, y = self.place
        y = (y + frame // 4) % (side - 6)
        logits[y : y + 6, x : x + 6] = 8.0
        return logits


def put_into(model, world, monkeypatch):
    """Let a model see the things of a world."""
    frame = [0]
    go, propagate = model._det_track_one_frame, model.run_tracker_propagation
    side = model.low_res_mask_size

    def noted(**told):
        frame[0] = told["frame_idx"]
        return go(**told)

    def detect(inference_session, vision_embeds):
        out = {}
        for prompt in inference_session.prompts:
            here = [t for t in world if t.prompt == prompt and t.seen[0] <= frame[0] <= t.seen[1]]
            masks = [t.mask(side, frame[0]) for t in here]
            out[prompt] = {
                "bbox": torch.zeros(len(here), 4),
                "mask": torch.stack(masks) if masks else torch.zeros(0, side, side),
                "scores": torch.tensor([t.score for t in here]),
            }
        return out

    def follow(inference_session, **told):
        masks, scores = propagate(inference_session=inference_session, **told)
        for i, obj_id in enumerate(inference_session.obj_ids):
            score = inference_session.obj_id_to_score[obj_id]
            thing = min(world, key=lambda t: abs(t.score - score))
            there = thing.there[0] <= frame[0] <= thing.there[1]
            masks[i] = thing.mask(side, frame[0]) if there else -8.0
            scores[i] = 8.0
        return masks, scores

    monkeypatch.setattr(model, "_det_track_one_frame", noted)
    monkeypatch.setattr(model, "run_detection", detect)
    monkeypatch.setattr(model, "run_tracker_propagation", follow)


def pictures(count):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 255, (*SIZE, 3), np.uint8) for _ in range(count)]


def follow(tracker, images, vocabulary=WORDS):
    frames = iter([to_frame(image, i) for i, image in enumerate(images)])
    return [found for _, found in tracker.follow(frames, vocabulary, None)]


def by_transformers(tracker, images, phrases):
    """Ids, masks and scores of each frame by `propagate_in_video_iterator`, and ids that were taken back there."""
    session = tracker.processor.init_video_session(video=images)
    tracker.processor.add_text_prompt(session, phrases)
    out, gone = [], set()
    for raw in tracker.model.propagate_in_video_iterator(session):
        done = tracker.processor.postprocess_outputs(session, raw)
        new, gone = raw.removed_obj_ids - gone, raw.removed_obj_ids
        out.append((done["object_ids"].tolist(), done["masks"].numpy(), done["scores"].numpy(), new))
    return out


CARS = [Thing(0.9, 0, (1, 2), (0, 99)), Thing(0.91, 1, (10, 4), (0, 99)), Thing(0.92, 2, (20, 8), (5, 99))]
GHOST = Thing(0.8, 0, (12, 20), (3, 4))


def test_results_are_those_of_transformers_over_the_whole_video(folder, monkeypatch):
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", settings={"recondition_every_nth_frame": 4})
    put_into(tracker.model, [*CARS, GHOST], monkeypatch)
    images = pictures(40)
    vocabulary = Vocabulary.parse(["a", "b", "c"])
    found, expected = follow(tracker, images, vocabulary), by_transformers(tracker, images, ["a", "b", "c"])
    assert len(found) == 40
    taken_back = 0
    for seen, (ids, masks, scores, gone) in zip(found, expected, strict=True):
        assert seen.tracker_id.tolist() == ids
        np.testing.assert_array_equal(seen.confidence, scores)
        taken_back += len(gone)
        if not gone:  # in that frame the original gives masks to the wrong ids
            np.testing.assert_array_equal(seen.mask, masks)
    assert taken_back == 1
    assert sorted(found[20].class_id.tolist()) == [0, 1, 2]


def test_with_its_own_eyes_it_sees_what_transformers_sees(folder):
    settings = {"score_threshold_detection": 0.0, "new_det_thresh": 0.0, "max_num_objects": 4}
    settings |= dict.fromkeys(("hotstart_delay", "hotstart_unmatch_thresh", "hotstart_dup_thresh"), 16)
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", patience=999, settings=settings)
    with torch.no_grad():  # else objects are held to be absent from the second frame on
        for name, weight in tracker.model.tracker_model.mask_decoder.named_parameters():
            if name.startswith("pred_obj_score_head") and name.endswith("proj_out.bias"):
                weight.fill_(10.0)
            if name.startswith("output_hypernetworks_mlps") and weight.ndim > 1:
                weight.normal_(0, 0.2)
    images = pictures(20)
    found = follow(tracker, images, Vocabulary.parse(["a", "b"]))
    expected = by_transformers(tracker, images, ["a", "b"])
    assert sum(map(len, found)) > 20
    for seen, (ids, masks, _, gone) in zip(found, expected, strict=True):
        there = masks.any((1, 2))
        assert seen.tracker_id.tolist() == np.array(ids)[there].tolist()
        if not gone:
            np.testing.assert_array_equal(seen.mask, masks[there])


def test_what_the_detector_does_not_confirm_was_never_there(folder, monkeypatch):
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu")
    put_into(tracker.model, [GHOST, *CARS], monkeypatch)
    found = follow(tracker, pictures(30))
    assert all((seen.confidence != np.float32(GHOST.score)).all() for seen in found)
    # Every id keeps to its thing, also in the frame in which the ghost is taken back.
    for i in set(np.concatenate([seen.tracker_id for seen in found]).tolist()):
        columns = {float(seen.xyxy[seen.tracker_id == i][0, 0]) for seen in found if i in seen.tracker_id}
        assert len(columns) == 1


def test_classes_are_those_of_the_phrases_and_negatives_take_their_place(folder, monkeypatch):
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu")
    toy = Thing(0.95, 3, CARS[1].place, (0, 99))
    put_into(tracker.model, [*CARS, toy], monkeypatch)
    found = follow(tracker, pictures(20))[10]
    assert found.data["class_name"].tolist() == ["car", "dog"]
    assert found.confidence.tolist() == pytest.approx([0.9, 0.92])


def test_what_is_gone_for_long_is_dropped_and_comes_back_as_another(folder, monkeypatch):
    """Also if it was the last one, which empties transformers' session."""
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", patience=3)
    world = [Thing(0.9, 0, (1, 2), (0, 20), (0, 20)), Thing(0.91, 0, (1, 2), (26, 99))]
    put_into(tracker.model, world, monkeypatch)
    found = follow(tracker, pictures(40))
    ids = [seen.tracker_id.tolist() for seen in found]
    assert ids[20] != ids[30] and ids[24] == [] and len(ids[20]) == len(ids[30]) == 1


def held(session):
    """Bytes of tensors and number of entries in a session of transformers."""
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


def test_what_is_held_does_not_grow_with_the_video(folder, monkeypatch):
    settings = {"recondition_every_nth_frame": 2, "hotstart_delay": 4, "hotstart_unmatch_thresh": 2}
    settings |= {"hotstart_dup_thresh": 2}
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", patience=2, max_prompts=6, settings=settings)
    passing = [Thing(0.75 + 0.001 * i, 2, (24, 3), (6 * i, 6 * i + 3), (0, 6 * i + 3)) for i in range(20)]
    put_into(tracker.model, [*CARS[:2], *passing], monkeypatch)
    session = Sam3VideoSession(tracker, WORDS)
    sizes = []
    for i, image in enumerate(pictures(100)):
        out = session.step(to_frame(image, i))
        session.prune(set(out.obj_id_to_mask))
        sizes.append(held(session.state))
    early, late = sizes[34], sizes[94]  # at the same point of a passing thing's time
    assert late[0] <= early[0] and late[1] <= early[1]


def test_longer_videos_keep_the_first_and_the_latest_prompts(folder, monkeypatch):
    settings = {"recondition_every_nth_frame": 1}
    tracker = Sam3VideoTracker(checkpoint=folder, device="cpu", max_prompts=5, settings=settings)
    put_into(tracker.model, CARS[:1], monkeypatch)
    session = Sam3VideoSession(tracker, WORDS)
    for i, image in enumerate(pictures(20)):
        session.prune(set(session.step(to_frame(image, i)).obj_id_to_mask))
    assert list(session.state.output_dict_per_obj[0]["cond_frame_outputs"]) == [0, 16, 17, 18, 19]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    place = tmp_path_factory.mktemp("frames")
    for i, image in enumerate(pictures(20)):
        Image.fromarray(image).save(place / f"{i:03d}.png")
    return place


def words_for(folder):
    return [f"checkpoints.sam3_video='{folder}'", "tracker=sam3_video", "device=cpu"]


def test_a_video_needs_neither_detector_nor_segmenter(folder, video, monkeypatch):
    model = load(*words_for(folder), "select.score=0.905", text={"car": ["a", "b"], "dog": ["c"]})
    assert model.detector is None and model.segmenter is None
    put_into(model.tracker.model, [*CARS, GHOST], monkeypatch)
    from grounded_sam.sources.video import VideoSource

    results = [result.detections for result in model.track(VideoSource(video))]
    assert len(results) == 20
    assert [seen.tracker_id.tolist() for seen in results[:6]] == [[1]] * 5 + [[1, 2]]  # select drops the first
    assert results[8].data["class_name"].tolist() == ["car", "dog"]


def test_pictures_beside_videos_are_listed_as_skipped(folder, video, tmp_path, monkeypatch):
    inputs = tmp_path / "in"
    inputs.mkdir()
    Image.fromarray(pictures(1)[0]).save(inputs / "a.png")
    words = [*words_for(folder), f"input='{inputs}'", "text=[a]", f"output='{tmp_path / 'out'}'", "sink=coco"]
    monkeypatch.setattr("sys.argv", ["grounded-sam", *words])
    with pytest.raises(SystemExit, match="no detector to look at a picture"):
        main()
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["file"] for entry in skipped] == ["a.png"]


def test_a_detector_may_look_at_the_pictures(folder):
    model = load(*words_for(folder), "detector=clicks", "detector.prompts=[{class: a, box: [1, 2, 30, 40]}]")
    assert len(model.detect(pictures(1)[0])) == 1


def test_detector_none_alone_is_refused_before_a_model_loads():
    for tracker in ("none", "sam2", "boxes"):
        with pytest.raises(ConfigError, match="detector=none needs a tracker that finds things by itself"):
            load("detector=none", f"tracker={tracker}", "checkpoints.sam2=/nowhere")


def test_a_call_without_a_detector_says_so(folder):
    with pytest.raises(GroundedSamError, match="no detector"):
        load(*words_for(folder)).segment(pictures(1)[0], ["a"])


def test_settings_that_the_model_has_not_are_refused(folder):
    with pytest.raises(ConfigError, match=r"unknown key 'new_thresh'; the keys are .*new_det_thresh"):
        Sam3VideoTracker(checkpoint=folder, settings={"new_thresh": 0.5})
    with pytest.raises(ConfigError, match=r"hotstart_delay must be of the kind of 15, got 'x'"):
        Sam3VideoTracker(checkpoint=folder, settings={"hotstart_delay": "x"})
    with pytest.raises(ConfigError, match=r"hotstart_unmatch_thresh \(8\) must be <="):
        Sam3VideoTracker(checkpoint=folder, settings={"hotstart_delay": 4})
    with pytest.raises(ConfigError, match=r"tracker\.patience must be a whole number from 0"):
        Sam3VideoTracker(checkpoint=folder, patience=-1)
    with pytest.raises(VocabularyError, match="tokens, the model takes 32"):
        Sam3VideoSession(Sam3VideoTracker(checkpoint=folder), Vocabulary.parse(["a" * 60]))


def test_duplicates_and_pieces_are_told_as_the_kernels_of_the_hub_do():
    from scipy import ndimage

    rng = np.random.default_rng(1)
    masks = torch.from_numpy((rng.random((5, 1, 17, 23)) > 0.5).astype(np.uint8))
    labels, counts = _Kernels.cc_2d(masks)
    for i in range(5):
        pieces, number = ndimage.label(masks[i, 0].numpy(), np.ones((3, 3)))
        assert len(np.unique(labels[i])) == number + 1
        areas = ndimage.sum_labels(masks[i, 0].numpy(), pieces, pieces)
        np.testing.assert_array_equal(counts[i, 0].numpy(), np.where(pieces, areas, 0))
    boxes = torch.from_numpy(rng.random((40, 4)).astype(np.float32))
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.from_numpy(rng.random(40).astype(np.float32))
    from torchvision.ops import box_iou, nms

    kept = _Kernels.generic_nms(box_iou(boxes, boxes), scores, 0.3, use_iou_matrix=True)
    assert kept.tolist() == nms(boxes, scores, 0.3).tolist()

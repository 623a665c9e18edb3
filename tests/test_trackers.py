"""SAM 2's session against its authors' `SAM2VideoPredictor`, on the embedded weights and a real video."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import checkpoints
import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image

from grounded_sam import CheckpointError, ConfigError, load
from grounded_sam.segmenters.sam2 import Sam2
from grounded_sam.segmenters.sam2_hf import Sam2Hf
from grounded_sam.shapes.scenes import make_clip
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.trackers.sam2 import Sam2Tracker
from grounded_sam.trackers.sam2_hf import Sam2HfTracker

KINDS = [Sam2Tracker, Sam2HfTracker]


@pytest.fixture(scope="module")
def trackers():
    return {kind: kind(checkpoint="builtin:shapes", device="cpu") for kind in KINDS}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a folder of 40 JPEG frames (sam2 reads these), the frames, and the masks of three objects in frame 0."""
    folder = tmp_path_factory.mktemp("frames")
    for seed in range(100):
        scenes = make_clip(np.random.default_rng([5, seed]), 40, count=4, size_hw=(180, 260))
        if len(scenes[0].ids) >= 3 and min(m.sum() for m in scenes[0].masks[:3]) > 400:
            break
    frames = []
    for t, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(folder / f"{t:05d}.jpg", quality=95)
        frames.append(np.asarray(Image.open(folder / f"{t:05d}.jpg")))
    return folder, frames, list(scenes[0].masks[:3])


def track_with_sam2(model, folder, prompts, **flags):
    """Return the masks `{frame: {id: mask}}` of sam2's own predictor; `prompts` are calls on it in order of frames."""
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    predictor = copy.copy(model)
    predictor.__class__ = SAM2VideoPredictor
    defaults = {"fill_hole_area": 0, "non_overlap_masks": False, "clear_non_cond_mem_around_input": False}
    for name, value in (defaults | {"add_all_frames_to_correct_as_cond": True} | flags).items():
        setattr(predictor, name, value)
    out = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = predictor.init_state(str(folder))
        steps = sorted({frame for frame, _, _ in prompts})
        for begin, end in zip(steps, [*steps[1:], None], strict=True):
            for frame, method, arguments in prompts:
                if frame == begin:
                    getattr(predictor, method)(state, frame_idx=frame, **arguments)
            count = None if end is None else end - begin
            for frame, ids, logits in predictor.propagate_in_video(state, begin, count):
                out[frame] = {i: (logits[k, 0] > 0).numpy() for k, i in enumerate(ids)}
    return out


def mask_detections(masks, ids=None) -> sv.Detections:
    masks = np.array(masks)
    ids = range(1, len(masks) + 1) if ids is None else ids
    return sv.Detections(xyxy=masks_to_xyxy(masks), mask=masks, tracker_id=np.array(list(ids)))


def click_detections(tracker_id, points, labels=None, box=None) -> sv.Detections:
    """Return clicks or a box in the form in which the `clicks` detector returns them."""
    column = {key: np.full(1, None, object) for key in ("points", "labels", "prompt_mask")}
    if points is not None:
        column["points"][0], column["labels"][0] = np.array(points, np.float32), np.array(labels)
    xyxy = [0, 0, 1, 1] if box is None else box
    data = {**column, "prompt_box": np.array([box is not None])}
    return sv.Detections(xyxy=np.array([xyxy], float), tracker_id=np.array([tracker_id]), data=data)


def track_frames(tracker, frames, prompts):
    """Return our masks `{frame: {id: mask}}`; `prompts` is `{frame: detections}`."""
    session = tracker.open(frames[0].shape[:2])
    out = {}
    for t, frame in enumerate(frames):
        detections = session.step(frame)
        out[t] = dict(zip(detections.tracker_id.tolist(), detections.mask, strict=True))
        if t in prompts:
            new = session.prompt(prompts[t])
            out[t] |= dict(zip(new.tracker_id.tolist(), new.mask, strict=True))
    session.close()
    return out


def mask_ious(actual, expected, frames):
    """Return the IoU of each frame and id; 1 where both masks are empty."""
    values = []
    for t in frames:
        for i, mask in expected[t].items():
            other = actual[t].get(i, np.zeros_like(mask))
            union = (other | mask).sum()
            values.append((other & mask).sum() / union if union else 1.0)
    return np.array(values)


@pytest.fixture
def never_absent(trackers):
    """Raise the bias of the object score heads: the small models would lose the swan within a few frames."""
    sam2, hf = (trackers[kind].model for kind in KINDS)
    biases = [
        sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias,
        hf.mask_decoder.pred_obj_score_head.proj_out.bias,
    ]
    for bias in biases:
        bias.data += 50
    yield
    for bias in biases:
        bias.data -= 50


@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_the_authors_predictor_on_a_real_video(trackers, data, kind, never_absent):
    folder = data / "vos" / "JPEGImages" / "480p" / "blackswan"
    frames = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))]
    swan = np.asarray(Image.open(data / "vos" / "Annotations" / "480p" / "blackswan" / "00000.png")) > 127
    expected = track_with_sam2(trackers[Sam2Tracker].model, folder, [(0, "add_new_mask", {"obj_id": 1, "mask": swan})])
    actual = track_frames(trackers[kind], frames, {0: mask_detections([swan])})
    values = mask_ious(actual, expected, range(50))
    assert len(values) == 50 and sum(mask[1].any() for mask in expected.values()) > 10
    assert values.mean() >= 0.999
    assert values[1:].min() >= 0.999  # on frame 0 we return the mask that was the prompt


@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_the_authors_for_several_objects_boxes_clicks_and_corrections(trackers, clip, kind):
    folder, frames, masks = clip
    box = masks_to_xyxy(np.array(masks))[1]
    rows, columns = np.nonzero(masks[2])
    center = [int(columns.mean()), int(rows.mean())]
    background = [5, 5]
    prompts = [
        (0, "add_new_mask", {"obj_id": 1, "mask": masks[0]}),
        (0, "add_new_points_or_box", {"obj_id": 2, "box": box}),
        (0, "add_new_points_or_box", {"obj_id": 3, "points": [center, background], "labels": [1, 0]}),
        (12, "add_new_points_or_box", {"obj_id": 3, "points": [center], "labels": [1]}),
    ]
    expected = track_with_sam2(trackers[Sam2Tracker].model, folder, prompts)
    session = trackers[kind].open(frames[0].shape[:2])
    actual = {}
    for t, frame in enumerate(frames):
        detections = session.step(frame)
        actual[t] = dict(zip(detections.tracker_id.tolist(), detections.mask, strict=True))
        new_prompts = {
            0: [
                mask_detections(masks[:1]),
                click_detections(2, None, box=box),
                click_detections(3, [center, background], [1, 0]),
            ],
            12: [click_detections(3, [center], [1])],
        }.get(t, [])
        for prompt in new_prompts:
            new = session.prompt(prompt)
            actual[t] |= dict(zip(new.tracker_id.tolist(), new.mask, strict=True))
    assert mask_ious(actual, expected, range(1, 40)).min() >= 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_adding_and_removing_objects_leaves_the_others_unchanged(trackers, clip, kind):
    _, frames, masks = clip
    alone = track_frames(trackers[kind], frames, {0: mask_detections(masks[:2])})
    session = trackers[kind].open(frames[0].shape[:2])
    worst = 1.0
    for t, frame in enumerate(frames):
        detections = session.step(frame)
        if t == 0:
            session.prompt(mask_detections(masks[:2]))
            continue
        if t == 30:
            session.prompt(mask_detections([masks[2]], [9]))
        if t == 35:
            session.remove(1)
        ids = detections.tracker_id.tolist()
        assert (9 in ids) <= (t > 30) and (1 in ids) <= (t <= 35)
        for i, mask in zip(ids, detections.mask, strict=True):
            if i != 9:
                expected = alone[t][i]
                worst = min(worst, (mask & expected).sum() / (mask | expected).sum())
    assert worst > 0.999


def memory_bytes(session) -> int:
    """Return the bytes of the tensors of a session."""
    sizes = {}

    def walk(value, depth=0):
        if isinstance(value, torch.Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                walk(item, depth)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item, depth)
        elif hasattr(value, "__dict__") and depth < 3 and not isinstance(value, torch.nn.Module):
            walk(vars(value), depth + 1)

    walk(
        {
            key: value
            for key, value in vars(session).items()
            if key not in ("model", "objects", "segmenter", "_encode", "_hook")
        }
    )
    return sum(sizes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_session_does_not_grow(trackers, clip, kind):
    _, frames, masks = clip
    session = trackers[kind].open(frames[0].shape[:2])
    sizes = []
    for t in range(60):
        session.step(frames[t % 40])
        if t % 10 == 0:  # prompted repeatedly
            session.prompt(mask_detections(masks))
        sizes.append(memory_bytes(session))
    assert sizes[55] > 0 and sizes[59] <= 1.02 * sizes[49] and sizes[49] <= 1.02 * sizes[39]
    session.close()
    assert memory_bytes(session) == 0


def test_objects_in_a_batch_get_the_same_masks_as_one_at_a_time(trackers, clip):
    """On CUDA, objects are processed in batches; this runs the same code on the CPU."""
    _, frames, masks = clip
    one = track_frames(
        trackers[Sam2Tracker], frames[:25], {0: mask_detections(masks[:2]), 6: mask_detections([masks[2]], [3])}
    )
    batched = copy.copy(trackers[Sam2Tracker])
    batched.chunk = 2
    many = track_frames(batched, frames[:25], {0: mask_detections(masks[:2]), 6: mask_detections([masks[2]], [3])})
    assert mask_ious(many, one, range(25)).min() > 0.999


@pytest.mark.parametrize("kind, encoder", [("sam2", "image_encoder"), ("sam2_hf", "vision_encoder")])
def test_segmenter_and_tracker_encode_each_frame_once(clip, kind, encoder):
    _, frames, _ = clip
    model = load("select.score=0.2", "track.redetect_every=3", preset="shapes", segmenter=kind, tracker=kind)
    passes = []
    hook = getattr(model.segmenter.model, encoder).register_forward_hook(lambda *_: passes.append(1))
    assert model.tracker.model is model.segmenter.model
    names = ["red shape", "green shape", "blue shape", "yellow shape", "purple shape", "orange shape"]
    counts = [len(result.detections) for result in model.track(frames[:10], names)]
    hook.remove()
    assert sum(counts) and len(passes) == 10
    empty = list(model.track([np.full((90, 90, 3), 128, np.uint8)] * 5, ["green star"]))
    assert not sum(len(result.detections) for result in empty)


@pytest.mark.parametrize("segments, tracks", [(Sam2, Sam2Tracker), (Sam2Hf, Sam2HfTracker)])
def test_masks_of_a_keyframe_come_from_the_segmenter(clip, segments, tracks):
    """The shared features differ slightly from those of an image because frames are resized differently."""
    _, frames, masks = clip
    segmenter = segments("builtin:shapes", device="cpu")
    session = tracks(segmenter, "builtin:shapes", device="cpu").open(frames[0].shape[:2])
    session.step(frames[0])
    boxes = sv.Detections(xyxy=masks_to_xyxy(np.array(masks)), confidence=np.ones(3), class_id=np.zeros(3, int))
    shared, own = session.segmenter.segment(frames[0], boxes), segmenter.segment(frames[0], boxes)
    for a, b in zip(shared.mask, own.mask, strict=True):
        assert (a & b).sum() / (a | b).sum() > 0.95


def test_a_tracker_shares_only_the_same_model():
    segmenter = Sam2("builtin:shapes", device="cpu")
    assert Sam2Tracker(segmenter, "builtin:shapes", device="cpu").model is segmenter.model
    assert Sam2Tracker(None, "builtin:shapes", device="cpu").shared is None
    assert Sam2HfTracker(segmenter, "builtin:shapes", device="cpu").shared is None


def test_prompt_box_ignores_the_masks_of_detections(trackers, clip):
    _, frames, masks = clip
    tracker = copy.copy(trackers[Sam2Tracker])
    tracker.options = replace(tracker.options, prompt="box")
    session = tracker.open(frames[0].shape[:2])
    session.step(frames[0])
    mask = session.prompt(mask_detections(masks[:1])).mask[0]
    assert 0.5 < (mask & masks[0]).sum() / (mask | masks[0]).sum() < 1


@pytest.mark.parametrize("kind", ["edgetam", "sam3_tracker"])
def test_other_models_run_with_the_same_bounded_session(kind, tmp_path, clip):
    """The memories of these models differ in kind or size; the weights are random."""
    folder = getattr(checkpoints, kind)(tmp_path)
    _, frames, masks = clip
    session = Sam2HfTracker(checkpoint=str(folder), device="cpu").open(frames[0].shape[:2])
    session.step(frames[0])
    assert session.prompt(mask_detections(masks[:1])).tracker_id.tolist() == [1]
    for t in range(1, 4):
        session.step(frames[t])
    assert len(session.state.output_dict_per_obj[1]["non_cond_frame_outputs"]) == 3


def test_checkpoints_without_a_tracker_are_refused(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot track"):
        Sam2HfTracker(checkpoint=str(tmp_path))
    for keys, message in (({"prompt": "word"}, "tracker.prompt"), ({"max_prompts": 0}, "tracker.max_prompts")):
        for kind in KINDS:
            with pytest.raises(ConfigError, match=message):
                kind(checkpoint="builtin:shapes", **keys)


def test_a_frame_of_another_size_is_an_error(trackers, clip):
    _, frames, _ = clip
    for tracker in trackers.values():
        with pytest.raises(ValueError, match="expected a frame of 260x180"):
            tracker.open((180, 260)).step(frames[0][:90])


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_and_cpu_give_the_same_masks(trackers, clip, kind):
    _, frames, masks = clip
    expected = track_frames(trackers[kind], frames, {0: mask_detections(masks)})
    actual = track_frames(kind(checkpoint="builtin:shapes", device="cuda"), frames, {0: mask_detections(masks)})
    assert mask_ious(actual, expected, range(40)).mean() > 0.99

from __future__ import annotations

import hashlib
from copy import copy
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import sam, sam2
from fakes import CLASSES, boxes
from safetensors.torch import save_file

from grounded_sam import CheckpointError, load
from grounded_sam.detectors.clicks import ClickDetector
from grounded_sam.segmenters.base import clean_mask, group_prompts
from grounded_sam.segmenters.sam import Sam
from grounded_sam.segmenters.sam2 import Sam2, fit_predictor
from grounded_sam.segmenters.sam2_hf import Sam2Hf
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.weights.loading import load_weights


@pytest.fixture(scope="module")
def embedded():
    """The segmenters with the weights that ship with the package."""
    kinds = {"sam": Sam, "sam2": Sam2, "sam2_hf": Sam2Hf}
    return {name: kind("builtin:shapes", device="cpu") for name, kind in kinds.items()}


class Transformers:
    """`Sam2Model` with its processor in the words of the authors' predictor."""

    def __init__(self, segmenter, kind="Sam2"):
        import transformers

        config, video = getattr(transformers, f"{kind}Config")(), segmenter.model.config
        for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
            setattr(config, part, getattr(video, part))
        self.model = getattr(transformers, f"{kind}Model")(config).eval()
        missing = self.model.load_state_dict(segmenter.model.state_dict(), strict=False).missing_keys
        assert not missing
        processor = transformers.Sam3TrackerProcessor if kind == "Sam3Tracker" else transformers.Sam2Processor
        self.processor = processor(segmenter.processor, target_size=video.image_size)

    def set_image(self, image):
        self.image = image

    def predict(self, multimask_output, point_coords=None, point_labels=None, box=None, mask_input=None):
        prompts = {} if box is None else {"input_boxes": [[np.asarray(box).tolist()]]}
        if point_coords is not None:
            prompts |= {"input_points": [[point_coords.tolist()]], "input_labels": [[point_labels.tolist()]]}
        inputs = self.processor(images=self.image, return_tensors="pt", **prompts)
        sizes = inputs.pop("original_sizes")
        with torch.inference_mode():
            given = None if mask_input is None else torch.from_numpy(np.asarray(mask_input))[None]
            out = self.model(**inputs, multimask_output=multimask_output, input_masks=given)
        masks = self.processor.post_process_masks(out.pred_masks, sizes)[0][0]
        return masks.numpy(), out.iou_scores[0, 0].numpy(), out.pred_masks[0, 0].numpy()


def truth_boxes(scene):
    n = len(scene.xyxy)
    return make_detections(scene.xyxy, np.ones(n), np.zeros(n), CLASSES, scene.image.shape[:2])


def authors_predictor(segmenter, image):
    """The authors' predictor over the same model, with the image set."""
    if isinstance(segmenter, Sam):
        from segment_anything import SamPredictor

        predictor = SamPredictor(segmenter.model)
    elif isinstance(segmenter, Sam2Hf):
        predictor = Transformers(segmenter)
    else:
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        predictor = fit_predictor(SAM2ImagePredictor(segmenter.model), segmenter.model)
    predictor.set_image(image)
    return predictor


def by_hand(predictor, multimask, **prompt):
    """The best mask of one prompt and its score."""
    masks, scores, _ = predictor.predict(multimask_output=multimask, **prompt)
    return masks[scores.argmax()] > 0, scores.max()


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
@pytest.mark.parametrize("multimask", [False, True])
def test_masks_equal_those_of_the_authors_predictor(embedded, scenes, name, multimask):
    segmenter = embedded[name]
    segmenter.multimask = multimask
    try:
        for scene in scenes:
            found = segmenter.segment(scene.image, truth_boxes(scene))
            predictor = authors_predictor(segmenter, scene.image)
            for box, mask, score in zip(found.xyxy, found.mask, found.data["mask_score"], strict=True):
                expected, expected_score = by_hand(predictor, multimask, box=box)
                assert np.array_equal(mask, expected)
                assert score == pytest.approx(expected_score, abs=1e-4)
    finally:
        segmenter.multimask = False


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
@pytest.mark.parametrize("multimask", [False, True])
def test_rounds_prompt_again_with_the_masks_own_box_and_logits(embedded, scenes, name, multimask):
    segmenter, scene = copy(embedded[name]), scenes[0]
    segmenter.multimask, segmenter.rounds = multimask, 2
    loose = truth_boxes(scene)
    loose.xyxy = (loose.xyxy + [-6, -4, 5, 7]).clip(0, 199).astype(np.float32)
    found = segmenter.segment(scene.image, loose)
    predictor = authors_predictor(segmenter, scene.image)
    for box, mask, score in zip(loose.xyxy, found.mask, found.data["mask_score"], strict=True):
        masks, scores, logits = predictor.predict(multimask_output=multimask, box=box)
        best = int(scores.argmax())
        around = masks_to_xyxy(masks[best : best + 1] > 0)[0]
        expected, expected_score = by_hand(predictor, multimask, box=around, mask_input=logits[best : best + 1])
        assert (mask == expected).mean() > 0.9999
        assert score == pytest.approx(expected_score, abs=1e-4)


def test_rounds_of_sam_hq_keep_the_clicks(scenes, tmp_path):
    folder = checkpoints.sam_hq(tmp_path)
    words = (f"checkpoints.sam_hq={folder}", "segmenter.rounds=2")
    segmenter = load(*words, preset="shapes", segmenter="sam_hq").segmenter
    given = []
    decode = segmenter._decode
    segmenter._decode = lambda prompts: given.append(prompts) or decode(prompts)
    found = truth_boxes(scenes[0])[:2]
    found.data["points"], found.data["labels"] = np.full(2, None, object), np.full(2, None, object)
    for i in range(2):
        found.data["points"][i], found.data["labels"][i] = np.array([[30.0, 40.0]]), np.array([1])
    found.data["prompt_box"] = np.zeros(2, bool)
    got = segmenter.segment(scenes[0].image, found)
    first, second = given
    assert (first.boxes, first.logits) == (None, None)
    assert second.boxes.shape == (2, 4) and second.logits.shape[0] == 2
    np.testing.assert_array_equal(second.points, first.points)
    assert got.mask.shape[0] == 2
    # Where a click gives no mask there is no box to go on with.
    given.clear()
    nothing = np.zeros((2, 1, *scenes[0].image.shape[:2]), bool)
    segmenter._decode = lambda prompts: given.append(prompts) or (nothing, *decode(prompts)[1:])
    assert not segmenter.segment(scenes[0].image, found).mask.any()
    assert len(given) == 1


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_clicks_equal_those_of_the_authors_predictor(embedded, scenes, name):
    scene = scenes[0]
    rows, columns = np.nonzero(scene.masks[-1])
    points = [[int(columns[len(columns) // 2]), int(rows[len(rows) // 2])], [2, 2]]
    box = [float(v) for v in scene.xyxy[-1]]
    entries = [
        {"class": "a", "points": points, "labels": [1, 0]},
        {"class": "b", "points": points[:1], "box": box},
        {"class": "c", "box": box},
    ]
    detector = ClickDetector(entries)
    found = detector.detect([Frame(scene.image)], detector.vocabulary)[0]
    out = embedded[name].segment(scene.image, found)
    prompts = [
        {"point_coords": np.array(points), "point_labels": np.array([1, 0])},
        {"point_coords": np.array(points[:1]), "point_labels": np.array([1]), "box": np.array(box)},
        {"box": np.array(box)},
    ]
    predictor = authors_predictor(embedded[name], scene.image)
    for mask, prompt in zip(out.mask, prompts, strict=True):
        assert np.array_equal(mask, by_hand(predictor, False, **prompt)[0])
    ys, xs = np.nonzero(out.mask[0])
    assert out.xyxy[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert out.xyxy[1].tolist() == pytest.approx(box)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_mask_prompts_are_followed(embedded, scenes, tmp_path, name):
    from PIL import Image

    scene = scenes[0]
    Image.fromarray(scene.masks[-1].astype(np.uint8) * 255).save(tmp_path / "m.png")
    x1, y1, x2, y2 = (float(v) for v in scene.xyxy[-1])
    detector = ClickDetector([{"class": "a", "mask": str(tmp_path / "m.png"), "box": [x1, y1, x2, y2]}])
    found = embedded[name].segment(scene.image, detector.detect([Frame(scene.image)], detector.vocabulary)[0])
    truth = scene.masks[-1]
    assert (found.mask[0] & truth).sum() / (found.mask[0] | truth).sum() > 0.7


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_several_masks_alone_are_prompts_too(embedded, scenes, tmp_path, name):
    from PIL import Image

    scene, entries = scenes[0], []
    for i, mask in enumerate(scene.masks[:2]):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{i}.png")
        entries.append({"class": "a", "mask": str(tmp_path / f"{i}.png")})
    detector = ClickDetector(entries)
    found = embedded[name].segment(scene.image, detector.detect([Frame(scene.image)], detector.vocabulary)[0])
    assert found.mask.shape == (2, *scene.image.shape[:2])
    one = ClickDetector(entries[1:])
    alone = embedded[name].segment(scene.image, one.detect([Frame(scene.image)], one.vocabulary)[0])
    assert np.array_equal(found.mask[1], alone.mask[0])


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_chunks_change_nothing_and_the_image_is_encoded_once(embedded, scenes, name, monkeypatch):
    segmenter, scene = embedded[name], scenes[1]
    whole = segmenter.segment(scene.image, truth_boxes(scene))
    encoder = getattr(segmenter.model, "image_encoder", None) or segmenter.model.vision_encoder
    calls: list[int] = []
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(segmenter, "chunk", 1)
    parts = segmenter.segment(scene.image, truth_boxes(scene))
    handle.remove()
    assert len(calls) == 1
    assert np.array_equal(whole.mask, parts.mask)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_nothing_to_segment_runs_nothing(embedded, name):
    image = np.zeros((40, 50, 3), np.uint8)
    found = embedded[name].segment(image, boxes(size_hw=(40, 50)))
    assert found.mask.shape == (0, 40, 50)
    assert found.data["mask_score"].shape == (0,)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_masks_of_true_boxes_are_good(embedded, name):
    from grounded_sam.shapes.scenes import make_scene

    overlaps = []
    for i in range(25):
        scene = make_scene(np.random.default_rng([77, i]), count=4)
        found = embedded[name].segment(scene.image, truth_boxes(scene))
        overlaps += ((found.mask & scene.masks).sum((1, 2)) / (found.mask | scene.masks).sum((1, 2))).tolist()
    assert np.mean(overlaps) > 0.85


def test_prompts_of_like_shape_go_together():
    found = boxes(*[(0, 0, 10, 10, 0.9, 0)] * 5)
    points = np.full(5, None, object)
    labels = np.full(5, None, object)
    points[1], labels[1] = np.ones((2, 2)), np.ones(2)
    points[3], labels[3] = np.ones((2, 2)), np.ones(2)
    found.data |= {"points": points, "labels": labels}
    groups = list(group_prompts(found, chunk=2))
    assert [g.rows.tolist() for g in groups] == [[0, 2], [4], [1, 3]]
    assert [g.points is None for g in groups] == [True, True, False]


def test_holes_are_filled_and_specks_dropped():
    mask = np.zeros((40, 40), bool)
    mask[5:30, 5:30] = True
    mask[10:12, 10:12] = False  # a hole of 4
    mask[15:25, 15:25] = False  # a hole of 100
    mask[35:37, 35:37] = True  # a speck of 4
    clean_mask(mask, fill_holes=20, drop_specks=20)
    assert mask[10, 10] and not mask[20, 20] and not mask[35, 35]
    only = np.zeros((20, 20), bool)
    only[:2, :2] = only[10:13, 10:13] = True
    clean_mask(only, 0, 50)
    assert only.sum() == 9


def test_options_reach_the_masks(scenes):
    model = load("segmenter.fill_holes=100000", "segmenter.drop_specks=10", preset="shapes")
    ring = next(s for s in scenes if any(shape == "ring" for _, shape in s.pairs))
    found = model.segmenter.segment(ring.image, truth_boxes(ring))
    i = next(i for i, (_, shape) in enumerate(ring.pairs) if shape == "ring")
    assert found.mask[i].sum() > 1.15 * ring.masks[i].sum()


def test_a_wrong_checksum_is_an_error(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=f"expected SHA-256 {'0' * 64}, got {right}"):
        Sam(str(path), sha256="0" * 64)
    with pytest.raises(CheckpointError, match="does not fit SAM vit_b"):
        Sam(str(path), sha256=right)


@pytest.mark.parametrize("kind", [Sam, Sam2])
def test_weights_that_are_missing_or_hold_code_are_refused(tmp_path, kind):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot load"):
        kind(str(tmp_path / "evil.pt"))
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot load"):
        kind(str(tmp_path / "empty.pt"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot load"):
        kind(str(tmp_path / "text.pth"))
    with pytest.raises(CheckpointError, match="no weights at"):
        kind(str(tmp_path / "nowhere.pt"))
    with pytest.raises(CheckpointError, match="found 3"):
        kind(str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not show what is mapped")
def test_weights_are_mapped_and_those_of_the_old_format_load_too(tmp_path):
    """What is mapped is not held twice: the copy in the file's pages goes when memory is short."""
    values = {"a": torch.randn(4_000_000), "b": torch.arange(5)}
    for old in (False, True):
        path = tmp_path / f"{old}.pt"
        torch.save({"model": values}, path, _use_new_zipfile_serialization=not old)
        held = load_weights(path)
        mapped = any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())
        assert mapped is not old
        for name, value in values.items():
            assert torch.equal(held[name], value)
        del held


def test_sam_of_real_size_masks_a_photo_as_its_predictor_does(tmp_path, photos):
    from grounded_sam import read_image

    segmenter = Sam(str(sam(tmp_path / "sam_vit_b.pth")), size="vit_b", device="cpu")
    check_real_size(segmenter, read_image(photos / "truck.jpg"))


def test_sam2_of_real_size_masks_a_photo_as_its_predictor_does(tmp_path, photos):
    from grounded_sam import read_image

    segmenter = Sam2(str(sam2(tmp_path / "sam2.1_hiera_tiny.pt").parent), size="tiny", device="cpu")
    check_real_size(segmenter, read_image(photos / "truck.jpg"))


def check_real_size(segmenter, image):
    found = boxes((100, 200, 900, 800, 0.9, 0), (1000, 100, 1700, 1100, 0.8, 1), size_hw=image.shape[:2])
    out = segmenter.segment(image, found)
    assert out.mask.shape == (2, *image.shape[:2])
    predictor = authors_predictor(segmenter, image)
    for box, mask in zip(found.xyxy, out.mask, strict=True):
        assert np.array_equal(mask, by_hand(predictor, False, box=box)[0])


@pytest.mark.parametrize(("make", "kind"), [("sam3_tracker", "Sam3Tracker"), ("edgetam", "EdgeTam")])
def test_edgetam_and_sam3_give_the_masks_of_their_models_for_pictures(make, kind, scenes, tmp_path):

    folder = getattr(checkpoints, make)(tmp_path)
    segmenter = load(f"checkpoints.{make}={folder}", preset="shapes", segmenter=make).segmenter
    assert isinstance(segmenter, Sam2Hf)
    boxes = truth_boxes(scenes[0])
    found = segmenter.segment(scenes[0].image, boxes)
    upstream = Transformers(segmenter, kind)
    upstream.set_image(scenes[0].image)
    for i, box in enumerate(boxes.xyxy):
        masks, scores, _ = upstream.predict(False, box=box)
        assert np.array_equal(masks[0], found.mask[i])
        assert scores[0] == pytest.approx(found.data["mask_score"][i], abs=1e-5)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompt", ["box", "clicks", "both"])
def test_sam_hq_gives_the_masks_of_transformers(multimask, prompt, scenes, tmp_path):
    from transformers import SamHQModel, SamHQProcessor, SamImageProcessor

    folder = checkpoints.sam_hq(tmp_path)
    words = (f"checkpoints.sam_hq={folder}", f"segmenter.multimask={str(multimask).lower()}")
    segmenter = load(*words, preset="shapes", segmenter="sam_hq").segmenter
    model, processor = SamHQModel.from_pretrained(folder), SamHQProcessor(SamImageProcessor.from_pretrained(folder))
    image = scenes[0].image[:, :201]
    found = truth_boxes(scenes[0])[:2]
    clicks = [[[30.0, 40.0], [90.0, 100.0]], [[60.0, 20.0], [10.0, 15.0]]]
    if prompt != "box":
        found.data["points"] = np.array([None, None], object)
        found.data["labels"] = found.data["points"].copy()
        for i in range(2):
            found.data["points"][i], found.data["labels"][i] = np.array(clicks[i]), np.array([1, 0])
        found.data["prompt_box"] = np.array([prompt == "both"] * 2)
    given = {}
    if prompt != "clicks":
        given["input_boxes"] = [found.xyxy.tolist()]
    if prompt != "box":
        given |= {"input_points": [clicks], "input_labels": [[[1, 0], [1, 0]]]}
    inputs = processor(images=image, return_tensors="pt", **given)
    sizes = [inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")]
    with torch.inference_mode():
        out = model(**inputs, multimask_output=multimask)
    masks = processor.post_process_masks(out.pred_masks, *sizes)[0].numpy()
    got = segmenter.segment(image, found)
    best = out.iou_scores[0].argmax(1).tolist()
    assert got.data["mask_score"] == pytest.approx(out.iou_scores[0].max(1).values.numpy(), abs=1e-4)
    for i in range(2):
        # Logits of random weights lie around 0, where the last bit of a coordinate tells.
        assert (got.mask[i] == masks[i, best[i]]).mean() > 0.9999


def test_sam_hq_takes_masks_and_refuses_other_checkpoints(scenes, tmp_path):
    from grounded_sam.segmenters.sam_hq import SamHq

    segmenter = SamHq(str(checkpoints.sam_hq(tmp_path / "hq")))
    found = truth_boxes(scenes[0])[:2]
    found.data["prompt_mask"] = np.array([None, None], object)
    for i in range(2):
        found.data["prompt_mask"][i] = np.asarray(scenes[0].masks[i], bool)
    assert segmenter.segment(scenes[0].image, found).mask.shape == (2, *scenes[0].image.shape[:2])
    with pytest.raises(CheckpointError, match="is a grounding-dino checkpoint; expected sam_hq"):
        SamHq(str(checkpoints.grounding_dino(tmp_path / "dino")))


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf", "edgetam", "sam3_tracker", "sam_hq"])
def test_segmenters_are_swapped_by_name_alone(name, scenes, tmp_path):
    own = {"edgetam": checkpoints.edgetam, "sam3_tracker": checkpoints.sam3_tracker, "sam_hq": checkpoints.sam_hq}
    weights = [f"checkpoints.{name}={own[name](tmp_path)}"] if name in own else []  # others ship with the package
    model = load(*weights, preset="shapes", segmenter=name)
    found = model.segment(scenes[0].image, [f"{colour} shape" for colour in ("red", "green", "blue", "yellow")])
    assert len(found) and found.mask.shape == (len(found), *scenes[0].image.shape[:2])
    assert found.data["mask_score"].dtype == np.float32

"""Segmenters against the predictors of their authors and the models of transformers."""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import replace
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
def segmenters():
    """Return the segmenters that have weights in the package."""
    kinds = {"sam": Sam, "sam2": Sam2, "sam2_hf": Sam2Hf}
    return {name: kind("builtin:shapes", device="cpu") for name, kind in kinds.items()}


def with_options(segmenter, **options):
    """Return a copy of a segmenter with other options and the same model."""
    other = copy(segmenter)
    other.options = replace(segmenter.options, **options)
    return other


class TransformersPredictor:
    """`Sam2Model` and its processor behind the interface of `SAM2ImagePredictor`."""

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
            input_masks = None if mask_input is None else torch.from_numpy(np.asarray(mask_input))[None]
            out = self.model(**inputs, multimask_output=multimask_output, input_masks=input_masks)
        masks = self.processor.post_process_masks(out.pred_masks, sizes)[0][0]
        return masks.numpy(), out.iou_scores[0, 0].numpy(), out.pred_masks[0, 0].numpy()


def ground_truth_boxes(scene):
    n = len(scene.xyxy)
    return make_detections(scene.xyxy, np.ones(n), np.zeros(n), CLASSES, scene.image.shape[:2])


def authors_predictor(segmenter, image):
    """Return the authors' predictor for the model of a segmenter, with the image set."""
    if isinstance(segmenter, Sam):
        from segment_anything import SamPredictor

        predictor = SamPredictor(segmenter.model)
    elif isinstance(segmenter, Sam2Hf):
        predictor = TransformersPredictor(segmenter)
    else:
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        predictor = fit_predictor(SAM2ImagePredictor(segmenter.model), segmenter.model)
    predictor.set_image(image)
    return predictor


def best_mask(predictor, multimask, **prompt):
    """Return the mask with the highest score for one prompt, and its score."""
    masks, scores, _ = predictor.predict(multimask_output=multimask, **prompt)
    return masks[scores.argmax()] > 0, scores.max()


def assert_same_mask(mask, expected):
    """Check that two masks are equal but for single pixels, whose logits are 0 up to rounding."""
    assert mask.shape == expected.shape
    assert (mask != expected).mean() < 1e-5


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
@pytest.mark.parametrize("multimask", [False, True])
def test_masks_equal_those_of_the_authors_predictor(segmenters, scenes, name, multimask):
    segmenter = with_options(segmenters[name], multimask=multimask)
    for scene in scenes:
        segmented = segmenter.segment(scene.image, ground_truth_boxes(scene))
        predictor = authors_predictor(segmenter, scene.image)
        for box, mask, score in zip(segmented.xyxy, segmented.mask, segmented.data["mask_score"], strict=True):
            expected, expected_score = best_mask(predictor, multimask, box=box)
            assert_same_mask(mask, expected)
            assert score == pytest.approx(expected_score, abs=1e-4)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_a_single_click_gives_the_best_of_three_masks_as_in_the_authors_demos(segmenters, scenes, name):
    segmenter, scene = segmenters[name], scenes[0]
    assert segmenter.options.multimask == "auto"
    points = scene.xyxy[:1].reshape(2, 2).mean(0) + [[0, 0], [3, 2]]
    predictor = authors_predictor(segmenter, scene.image)
    for count, with_box, multimask in ((1, False, True), (2, False, False), (1, True, False)):
        click = ground_truth_boxes(scene)[:1]
        click.data["points"], click.data["labels"] = np.full(1, None, object), np.full(1, None, object)
        click.data["points"][0], click.data["labels"][0] = points[:count], np.ones(count, int)
        click.data["prompt_box"] = np.array([with_box])
        prompt = {"point_coords": points[:count], "point_labels": np.ones(count, int)}
        prompt |= {"box": click.xyxy[0]} if with_box else {}
        segmented = segmenter.segment(scene.image, click)
        expected, expected_score = best_mask(predictor, multimask, **prompt)
        assert_same_mask(segmented.mask[0], expected)
        assert segmented.data["mask_score"][0] == pytest.approx(expected_score, abs=1e-4)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
@pytest.mark.parametrize("multimask", [False, True])
def test_later_rounds_are_prompted_with_box_and_logits_of_the_mask(segmenters, scenes, name, multimask):
    segmenter, scene = with_options(segmenters[name], multimask=multimask, rounds=2), scenes[0]
    loose = ground_truth_boxes(scene)
    loose.xyxy = (loose.xyxy + [-6, -4, 5, 7]).clip(0, 199).astype(np.float32)
    segmented = segmenter.segment(scene.image, loose)
    predictor = authors_predictor(segmenter, scene.image)
    for box, mask, score in zip(loose.xyxy, segmented.mask, segmented.data["mask_score"], strict=True):
        masks, scores, logits = predictor.predict(multimask_output=multimask, box=box)
        best = int(scores.argmax())
        mask_box = masks_to_xyxy(masks[best : best + 1] > 0)[0]
        expected, expected_score = best_mask(predictor, multimask, box=mask_box, mask_input=logits[best : best + 1])
        assert (mask == expected).mean() > 0.9999
        assert score == pytest.approx(expected_score, abs=1e-4)


def test_later_rounds_of_sam_hq_keep_the_clicks(scenes, tmp_path):
    folder = checkpoints.sam_hq(tmp_path)
    overrides = (f"checkpoints.sam_hq={folder}", "segmenter.rounds=2")
    segmenter = load(*overrides, preset="shapes", segmenter="sam_hq").segmenter
    decoded = []
    decode = segmenter._decode
    segmenter._decode = lambda prompts: decoded.append(prompts) or decode(prompts)
    clicks = ground_truth_boxes(scenes[0])[:2]
    clicks.data["points"], clicks.data["labels"] = np.full(2, None, object), np.full(2, None, object)
    for i in range(2):
        clicks.data["points"][i], clicks.data["labels"][i] = np.array([[30.0, 40.0]]), np.array([1])
    clicks.data["prompt_box"] = np.zeros(2, bool)
    segmented = segmenter.segment(scenes[0].image, clicks)
    first, second = decoded
    assert (first.boxes, first.logits) == (None, None)
    assert second.boxes.shape == (2, 4) and second.logits.shape[0] == 2
    np.testing.assert_array_equal(second.points, first.points)
    assert segmented.mask.shape[0] == 2
    # An empty mask has no box for another round.
    decoded.clear()
    empty = np.zeros((2, 1, *scenes[0].image.shape[:2]), bool)
    segmenter._decode = lambda prompts: decoded.append(prompts) or replace(decode(prompts), masks=empty)
    assert not segmenter.segment(scenes[0].image, clicks).mask.any()
    assert len(decoded) == 1


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_masks_of_clicks_equal_those_of_the_authors_predictor(segmenters, scenes, name):
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
    clicks = detector.detect([Frame(pixels=scene.image)], detector.vocabulary)[0]
    segmented = segmenters[name].segment(scene.image, clicks)
    prompts = [
        {"point_coords": np.array(points), "point_labels": np.array([1, 0])},
        {"point_coords": np.array(points[:1]), "point_labels": np.array([1]), "box": np.array(box)},
        {"box": np.array(box)},
    ]
    predictor = authors_predictor(segmenters[name], scene.image)
    for mask, prompt in zip(segmented.mask, prompts, strict=True):
        assert_same_mask(mask, best_mask(predictor, False, **prompt)[0])
    ys, xs = np.nonzero(segmented.mask[0])
    assert segmented.xyxy[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert segmented.xyxy[1].tolist() == pytest.approx(box)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_a_mask_prompt_gives_a_similar_mask(segmenters, scenes, tmp_path, name):
    from PIL import Image

    scene = scenes[0]
    Image.fromarray(scene.masks[-1].astype(np.uint8) * 255).save(tmp_path / "m.png")
    x1, y1, x2, y2 = (float(v) for v in scene.xyxy[-1])
    detector = ClickDetector([{"class": "a", "mask": str(tmp_path / "m.png"), "box": [x1, y1, x2, y2]}])
    prompts = detector.detect([Frame(pixels=scene.image)], detector.vocabulary)[0]
    mask, ground_truth = segmenters[name].segment(scene.image, prompts).mask[0], scene.masks[-1]
    assert (mask & ground_truth).sum() / (mask | ground_truth).sum() > 0.7


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_several_masks_without_boxes_can_be_prompts(segmenters, scenes, tmp_path, name):
    from PIL import Image

    scene, entries = scenes[0], []
    for i, mask in enumerate(scene.masks[:2]):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{i}.png")
        entries.append({"class": "a", "mask": str(tmp_path / f"{i}.png")})
    detector = ClickDetector(entries)
    prompts = detector.detect([Frame(pixels=scene.image)], detector.vocabulary)[0]
    both = segmenters[name].segment(scene.image, prompts)
    assert both.mask.shape == (2, *scene.image.shape[:2])
    detector = ClickDetector(entries[1:])
    prompts = detector.detect([Frame(pixels=scene.image)], detector.vocabulary)[0]
    second = segmenters[name].segment(scene.image, prompts)
    assert_same_mask(both.mask[1], second.mask[0])


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_chunks_do_not_change_masks_and_share_one_encoding(segmenters, scenes, name):
    segmenter, scene = segmenters[name], scenes[1]
    expected = segmenter.segment(scene.image, ground_truth_boxes(scene))
    encoder = getattr(segmenter.model, "image_encoder", None) or segmenter.model.vision_encoder
    calls: list[int] = []
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    chunked = with_options(segmenter, chunk=1).segment(scene.image, ground_truth_boxes(scene))
    handle.remove()
    assert len(calls) == 1
    assert np.array_equal(expected.mask, chunked.mask)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_no_detections_give_no_masks(segmenters, name):
    image = np.zeros((40, 50, 3), np.uint8)
    segmented = segmenters[name].segment(image, boxes(size_hw=(40, 50)))
    assert segmented.mask.shape == (0, 40, 50)
    assert segmented.data["mask_score"].shape == (0,)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf"])
def test_masks_of_ground_truth_boxes_have_a_high_iou(segmenters, name):
    from grounded_sam.shapes.scenes import make_scene

    ious = []
    for i in range(25):
        scene = make_scene(np.random.default_rng([77, i]), count=4)
        masks = segmenters[name].segment(scene.image, ground_truth_boxes(scene)).mask
        ious += ((masks & scene.masks).sum((1, 2)) / (masks | scene.masks).sum((1, 2))).tolist()
    assert np.mean(ious) > 0.85


def test_prompts_of_the_same_kinds_are_grouped():
    detections = boxes(*[(0, 0, 10, 10, 0.9, 0)] * 5)
    points = np.full(5, None, object)
    labels = np.full(5, None, object)
    points[1], labels[1] = np.ones((2, 2)), np.ones(2)
    points[3], labels[3] = np.ones((2, 2)), np.ones(2)
    detections.data |= {"points": points, "labels": labels}
    groups = list(group_prompts(detections, chunk=2))
    assert [g.rows.tolist() for g in groups] == [[0, 2], [4], [1, 3]]
    assert [g.points is None for g in groups] == [True, True, False]


def test_small_holes_are_filled_and_small_regions_removed():
    mask = np.zeros((40, 40), bool)
    mask[5:30, 5:30] = True
    mask[10:12, 10:12] = False  # a hole of 4 pixels
    mask[15:25, 15:25] = False  # a hole of 100 pixels
    mask[35:37, 35:37] = True  # a region of 4 pixels
    clean_mask(mask, max_hole_area=20, min_region_area=20)
    assert mask[10, 10] and not mask[20, 20] and not mask[35, 35]
    small = np.zeros((20, 20), bool)
    small[:2, :2] = small[10:13, 10:13] = True
    clean_mask(small, 0, 50)
    assert small.sum() == 9


def test_max_hole_area_of_the_config_fills_a_ring(scenes):
    model = load("segmenter.max_hole_area=100000", "segmenter.min_region_area=10", preset="shapes")
    ring = next(s for s in scenes if any(shape == "ring" for _, shape in s.pairs))
    segmented = model.segmenter.segment(ring.image, ground_truth_boxes(ring))
    i = next(i for i, (_, shape) in enumerate(ring.pairs) if shape == "ring")
    assert segmented.mask[i].sum() > 1.15 * ring.masks[i].sum()


def test_a_wrong_checksum_is_an_error(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=f"expected SHA-256 {'0' * 64}, got {sha256}"):
        Sam(str(path), sha256="0" * 64)
    with pytest.raises(CheckpointError, match="does not fit SAM vit_b"):
        Sam(str(path), sha256=sha256)


@pytest.mark.parametrize("kind", [Sam, Sam2])
def test_weights_that_are_missing_damaged_or_contain_code_are_refused(tmp_path, kind):
    class RunsCode:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"model": RunsCode()}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="cannot load"):
        kind(str(tmp_path / "code.pt"))
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot load"):
        kind(str(tmp_path / "empty.pt"))
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(CheckpointError, match="cannot load"):
        kind(str(tmp_path / "text.pth"))
    with pytest.raises(CheckpointError, match="no weights at"):
        kind(str(tmp_path / "missing.pt"))
    with pytest.raises(CheckpointError, match="found 3"):
        kind(str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_are_memory_mapped_unless_the_file_has_the_old_format(tmp_path):
    """The system can drop mapped pages when memory is short, so weights are not in memory twice."""
    values = {"a": torch.randn(4_000_000), "b": torch.arange(5)}
    for old_format in (False, True):
        path = tmp_path / f"{old_format}.pt"
        torch.save({"model": values}, path, _use_new_zipfile_serialization=not old_format)
        weights = load_weights(path)
        mapped = any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())
        assert mapped is not old_format
        for name, value in values.items():
            assert torch.equal(weights[name], value)
        del weights


def test_sam_of_real_size_equals_its_predictor_on_a_photo(tmp_path, photos):
    from grounded_sam import read_image

    segmenter = Sam(str(sam(tmp_path / "sam_vit_b.pth")), size="vit_b", device="cpu")
    check_equals_predictor(segmenter, read_image(photos / "truck.jpg"))


def test_sam2_of_real_size_equals_its_predictor_on_a_photo(tmp_path, photos):
    from grounded_sam import read_image

    segmenter = Sam2(str(sam2(tmp_path / "sam2.1_hiera_tiny.pt").parent), size="tiny", device="cpu")
    check_equals_predictor(segmenter, read_image(photos / "truck.jpg"))


def check_equals_predictor(segmenter, image):
    detections = boxes((100, 200, 900, 800, 0.9, 0), (1000, 100, 1700, 1100, 0.8, 1), size_hw=image.shape[:2])
    segmented = segmenter.segment(image, detections)
    assert segmented.mask.shape == (2, *image.shape[:2])
    predictor = authors_predictor(segmenter, image)
    for box, mask in zip(detections.xyxy, segmented.mask, strict=True):
        assert_same_mask(mask, best_mask(predictor, False, box=box)[0])


@pytest.mark.parametrize(("make", "kind"), [("sam3_tracker", "Sam3Tracker"), ("edgetam", "EdgeTam")])
def test_masks_of_edgetam_and_sam3_equal_those_of_their_image_models(make, kind, scenes, tmp_path):
    folder = getattr(checkpoints, make)(tmp_path)
    segmenter = load(f"checkpoints.{make}={folder}", preset="shapes", segmenter=make).segmenter
    assert isinstance(segmenter, Sam2Hf)
    detections = ground_truth_boxes(scenes[0])
    segmented = segmenter.segment(scenes[0].image, detections)
    predictor = TransformersPredictor(segmenter, kind)
    predictor.set_image(scenes[0].image)
    for i, box in enumerate(detections.xyxy):
        masks, scores, _ = predictor.predict(False, box=box)
        assert_same_mask(masks[0], segmented.mask[i])
        assert scores[0] == pytest.approx(segmented.data["mask_score"][i], abs=1e-5)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompt", ["box", "clicks", "both"])
def test_masks_of_sam_hq_equal_those_of_transformers(multimask, prompt, scenes, tmp_path):
    from transformers import SamHQModel, SamHQProcessor, SamImageProcessor

    folder = checkpoints.sam_hq(tmp_path)
    overrides = (f"checkpoints.sam_hq={folder}", f"segmenter.multimask={str(multimask).lower()}")
    segmenter = load(*overrides, preset="shapes", segmenter="sam_hq").segmenter
    model, processor = SamHQModel.from_pretrained(folder), SamHQProcessor(SamImageProcessor.from_pretrained(folder))
    image = scenes[0].image[:, :201]
    detections = ground_truth_boxes(scenes[0])[:2]
    clicks = [[[30.0, 40.0], [90.0, 100.0]], [[60.0, 20.0], [10.0, 15.0]]]
    if prompt != "box":
        detections.data["points"] = np.array([None, None], object)
        detections.data["labels"] = detections.data["points"].copy()
        for i in range(2):
            detections.data["points"][i], detections.data["labels"][i] = np.array(clicks[i]), np.array([1, 0])
        detections.data["prompt_box"] = np.array([prompt == "both"] * 2)
    prompts = {}
    if prompt != "clicks":
        prompts["input_boxes"] = [detections.xyxy.tolist()]
    if prompt != "box":
        prompts |= {"input_points": [clicks], "input_labels": [[[1, 0], [1, 0]]]}
    inputs = processor(images=image, return_tensors="pt", **prompts)
    sizes = [inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")]
    with torch.inference_mode():
        out = model(**inputs, multimask_output=multimask)
    masks = processor.post_process_masks(out.pred_masks, *sizes)[0].numpy()
    segmented = segmenter.segment(image, detections)
    best = out.iou_scores[0].argmax(1).tolist()
    assert segmented.data["mask_score"] == pytest.approx(out.iou_scores[0].max(1).values.numpy(), abs=1e-4)
    for i in range(2):
        # Logits of random weights are close to 0, where rounding of coordinates decides.
        assert (segmented.mask[i] == masks[i, best[i]]).mean() > 0.9999


def test_sam_hq_accepts_mask_prompts_and_refuses_other_checkpoints(scenes, tmp_path):
    from grounded_sam.segmenters.sam_hq import SamHq

    segmenter = SamHq(str(checkpoints.sam_hq(tmp_path / "hq")))
    prompts = ground_truth_boxes(scenes[0])[:2]
    prompts.data["prompt_mask"] = np.array([None, None], object)
    for i in range(2):
        prompts.data["prompt_mask"][i] = np.asarray(scenes[0].masks[i], bool)
    assert segmenter.segment(scenes[0].image, prompts).mask.shape == (2, *scenes[0].image.shape[:2])
    with pytest.raises(CheckpointError, match="is a grounding-dino checkpoint; expected sam_hq"):
        SamHq(str(checkpoints.grounding_dino(tmp_path / "dino")))


@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf", "edgetam", "sam3_tracker", "sam_hq"])
def test_the_segmenter_can_be_changed_by_its_name(name, scenes, tmp_path):
    makers = {"edgetam": checkpoints.edgetam, "sam3_tracker": checkpoints.sam3_tracker, "sam_hq": checkpoints.sam_hq}
    weights = [f"checkpoints.{name}={makers[name](tmp_path)}"] if name in makers else []  # others are in the package
    model = load(*weights, preset="shapes", segmenter=name)
    detections = model.segment(scenes[0].image, [f"{color} shape" for color in ("red", "green", "blue", "yellow")])
    assert len(detections) and detections.mask.shape == (len(detections), *scenes[0].image.shape[:2])
    assert detections.data["mask_score"].dtype == np.float32

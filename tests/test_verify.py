"""Verification: crops, SigLIP, SigLIP 2 and CLIP as transformers runs them, scores, selection, examples."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from checkpoints import image_text
from PIL import Image

from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.protocols import Verifier
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.verifiers.calibration import ScoreWeights, to_logit
from grounded_sam.verifiers.crops import crop_square, dim_surroundings
from grounded_sam.verifiers.image_text import ImageTextVerifier

WORDS = Vocabulary.parse({"vehicle": ["red car", "truck"], "dog": None}, negative=["toy car"])
KINDS = ["siglip", "siglip2", "clip"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: image_text(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def two_boxes(masks: bool = True) -> sv.Detections:
    """Two classes for one box, and a third box."""
    boxes = [[10, 10, 50, 40], [10, 10, 50, 40], [60, 30, 110, 80]]
    mask = np.zeros((3, 90, 120), bool)
    mask[:2, 15:35, 15:45] = True
    mask[2, 40:70, 70:100] = True
    data = {"mask_score": np.array([0.9, 0.9, 0.8], np.float32)} if masks else {}
    return make_detections(boxes, [0.6, 0.4, 0.8], [0, 1, 1], WORDS, (90, 120), mask=mask if masks else None, **data)


def build(folder: Path, **settings: object) -> ImageTextVerifier:
    defaults = {"device": "cpu", "background": ["a sign"], "prompt_template": "a {}"}
    return ImageTextVerifier(str(folder), **{**defaults, **settings})  # type: ignore[arg-type]


def own_forward(folder: Path, kind: str, crops: list[np.ndarray], texts: list[str]) -> torch.Tensor:
    """Logits by image as the documentation of transformers computes them."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    images = [Image.fromarray(crop) for crop in crops]
    padding = True if kind == "clip" else "max_length"
    length = 77 if kind == "clip" else 64
    inputs = processor(
        text=texts, images=images, padding=padding, max_length=length, truncation=True, return_tensors="pt"
    )
    names = {"input_ids", "pixel_values", "pixel_attention_mask", "spatial_shapes"}
    names |= {"attention_mask"} if kind == "clip" else set()
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name in names}).logits_per_image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crops", ["box", "masked"])
def test_scores_are_those_of_transformers(folders, image, kind, crops):
    verifier = build(folders[kind], crops=[crops], score="relative")
    detections = two_boxes()
    judged = verifier.verify([image], [detections], WORDS)[0]
    size = verifier.network.size
    expected = []
    for i, owner in enumerate(detections.class_id.tolist()):
        crop = crop_square(image, detections.xyxy[i], 1.25, size)
        if crops == "masked":
            mask = crop_square(detections.mask[i], detections.xyxy[i], 1.25, size, fill=0)
            crop = dim_surroundings(crop, mask, 0.7)
        phrases = ["a red car", "a truck", "a dog", "a toy car", "a a sign"]
        logits = own_forward(folders[kind], kind, [crop], phrases)[0].double()
        own = logits[:2].max() if owner == 0 else logits[2]
        expected.append(float((own - logits[3:].logsumexp(0)).sigmoid()))
    np.testing.assert_allclose(judged.data["verify_score"], expected, atol=1e-4)
    assert judged.data["verify_score"].dtype == judged.data["calibrated_score"].dtype == np.float32


def test_sigmoid_scores_are_the_models_own_probabilities(folders, image):
    verifier = build(folders["siglip"], crops="box", score="sigmoid", background=[])
    words = Vocabulary.parse(["dog", "truck"])
    detections = make_detections([[10, 10, 50, 40]], [0.6], [0], words, (90, 120))
    score = verifier.verify([image], [detections], words)[0].data["verify_score"][0]
    crop = crop_square(image, detections.xyxy[0], 1.25, 32)
    logits = own_forward(folders["siglip"], "siglip", [crop], ["a dog", "a truck"])[0]
    assert score == pytest.approx(float(logits[0].sigmoid()), abs=1e-4)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_phrase_has_the_same_embedding_beside_longer_ones(folders, kind):
    """SigLIP pools the last position, so texts that were padded to the longest one would change with it."""
    network = build(folders[kind]).network
    alone, beside = network.embed_texts(["a dog"]), network.embed_texts(["a dog", "the red car parking entrance sign"])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-6)


def test_text_that_is_cut_is_named_once(folders):
    network = build(folders["siglip"]).network
    with pytest.warns(UserWarning, match="only the first 64 tokens of 'dog dog"):
        network.embed_texts(["dog " * 70])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.embed_texts(["dog " * 70])


def test_boxes_that_share_a_crop_are_embedded_once(folders, image, monkeypatch):
    verifier = build(folders["siglip"])
    counts = []
    embed = verifier.network.embed_crops
    monkeypatch.setattr(verifier.network, "embed_crops", lambda crops: counts.append(len(crops)) or embed(crops))
    verifier.verify([image, image], [two_boxes(), two_boxes()], WORDS)
    assert counts == [4]  # two boxes, each as box and masked, in the same image twice


def test_batches_and_single_images_agree(folders, image):
    other = np.ascontiguousarray(image[::-1])
    verifier = build(folders["siglip"], batch_size=3)
    together = verifier.verify([image, other], [two_boxes(), two_boxes(masks=False)], WORDS)
    alone = [build(folders["siglip"]).verify([image], [two_boxes()], WORDS)[0]]
    alone += build(folders["siglip"]).verify([other], [two_boxes(masks=False)], WORDS)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.data["verify_score"], b.data["verify_score"], atol=1e-5)
        np.testing.assert_allclose(a.data["calibrated_score"], b.data["calibrated_score"], atol=1e-5)


def test_presence_is_that_of_the_best_box_of_each_class(folders, image):
    verifier = build(folders["siglip"])
    judged = verifier.verify([image], [two_boxes()], WORDS)[0]
    assert set(judged.metadata["presence"]) == {"vehicle", "dog"}
    rows = [1, 2]
    best = rows[np.argmax([judged.confidence[i] * judged.data["verify_score"][i] for i in rows])]
    logit = (to_logit(judged.confidence[best]) + to_logit(judged.data["verify_score"][best])) / 2
    assert to_logit(judged.metadata["presence"]["dog"]) == pytest.approx(logit, abs=1e-3)
    with_image = build(folders["siglip"], whole_image=True).verify([image], [two_boxes()], WORDS)[0]
    assert with_image.metadata["presence"] != judged.metadata["presence"]
    told = two_boxes()
    told.metadata["presence"] = {"dog": 0.001}
    assert verifier.verify([image], [told], WORDS)[0].metadata["presence"]["dog"] < judged.metadata["presence"]["dog"]


def test_empty_detections_and_tiny_boxes_are_judged(folders, image):
    verifier = build(folders["clip"])
    empty = make_detections(np.zeros((0, 4)), [], [], WORDS, (90, 120))
    tiny = make_detections([[119.2, 89.3, 120, 90]], [0.5], [0], WORDS, (90, 120))
    results = verifier.verify([image, image], [empty, tiny], WORDS)
    assert [len(result.data["verify_score"]) for result in results] == [0, 1]
    assert results[0].metadata["presence"] == {}
    assert isinstance(verifier, Verifier)


def test_calibration_reads_its_weights_and_refuses_others():
    weights = ScoreWeights.read({"bias": -1, "detector": 2}, "verify.calibration")
    assert weights == ScoreWeights(bias=-1.0, detector=2.0, verify=0.0)
    probability = weights.probability([0.5, 0.9], [0.1, 0.1], [np.inf, 3], None)
    np.testing.assert_allclose(to_logit(probability), [-1, 2 * to_logit(0.9) - 1], atol=1e-5)
    for wrong in ({"detectors": 1}, {"bias": "x"}, {"bias": float("nan")}, [1], {"bias": True}):
        with pytest.raises(ConfigError, match=r"verify\.calibration must map some of bias, detector, verify"):
            ScoreWeights.read(wrong, "verify.calibration")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crops": ["boxes"]}, "verify.crops must be masked or box"),
        ({"crops": []}, "verify.crops must be some of"),
        ({"margin": 0.5}, "verify.margin must be"),
        ({"min_score": 2}, "verify.min_score must be"),
        ({"prompt_template": "photo"}, "verify.prompt_template must have one"),
        ({"background": [], "score": "relative"}, "needs phrases to compare with"),
        ({"examples": {"cat": [np.zeros((4, 4, 3), np.uint8)]}}, "not in text: 'cat'; text has 'vehicle', 'dog'"),
        ({"negative_examples": [np.zeros((4, 4, 3), np.uint8)]}, "has look-alikes, but no examples"),
        ({"examples": {"dog": []}}, "verify.examples.dog has no example"),
        ({"examples": {"dog": [{"box": [0, 0, 1, 1]}]}}, "verify.examples.dog: expected an image or"),
        (
            {"examples": {"dog": {"image": np.zeros((4, 4, 3), np.uint8), "box": [9, 9, 12, 12]}}},
            "lies outside verify.examples.dog, which is 4x4 px",
        ),
        ({"examples": {"dog": {"image": np.zeros((4, 4, 3), np.uint8), "box": [1, 2]}}}, "expected a box"),
        ({"presence": {"word": 1}}, "verify.presence must map"),
        ({"batch_size": 0}, "verify.batch_size must be"),
    ],
)
def test_wrong_settings_are_named(folders, image, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(folders["siglip"], **settings).verify([image], [two_boxes()], WORDS)


def test_other_checkpoints_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="CLIP has no sigmoid"):
        build(folders["clip"], score="sigmoid")
    with pytest.raises(CheckpointError, match="no siglip named 'cars'; available: builtin:"):
        build(Path("builtin:cars"))
    broken = image_text(tmp_path / "broken", "siglip")
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace("{", '{"verification": {"examples": {"scale": -1}},', 1))
    with pytest.raises(CheckpointError, match="must have a scale > 0 and an offset"):
        build(broken)


def test_examples_stand_for_a_class(folders, image):
    """A crop is more like the example that it was cut from than like another."""
    here, there = {"image": image, "box": [10, 10, 50, 40]}, {"image": image, "box": [60, 30, 110, 80]}
    words = Vocabulary.parse(["dog", "truck"])
    detections = make_detections([[10, 10, 50, 40]] * 2, [0.6, 0.6], [0, 1], words, (90, 120))
    settings = {"crops": "box", "score": "sigmoid", "background": []}
    verifier = build(folders["siglip"], examples={"dog": [here], "truck": [there]}, **settings)
    scores = verifier.verify([image], [detections], words)[0].data["verify_score"]
    assert scores[0] > scores[1]
    assert to_logit(scores[0]) == pytest.approx(6, abs=1e-3)  # a cosine of 1: scale 20, offset -14
    against = build(folders["siglip"], examples={"dog": [here]}, negative_examples=[here], **settings)
    assert against.verify([image], [detections], words)[0].data["verify_score"][0] == pytest.approx(0.5, abs=1e-3)
    words_too = build(folders["siglip"], examples={"truck": [there]}, words=True, **settings)
    alone = build(folders["siglip"], **settings).verify([image], [detections], words)[0].data["verify_score"][1]
    assert words_too.verify([image], [detections], words)[0].data["verify_score"][1] >= alone - 1e-6


def test_masks_of_examples_hide_what_surrounds_them(folders, image, tmp_path):
    mask = np.zeros(image.shape[:2], bool)
    mask[15:35, 15:45] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(image).save(tmp_path / "image.png")
    words = Vocabulary.parse(["dog"])
    detections = make_detections([[15, 15, 45, 35]], [0.6], [0], words, (90, 120), mask=mask[None])
    scores = []
    for entry in ({"image": image, "mask": mask}, {"image": f"{tmp_path}/image.png", "mask": f"{tmp_path}/mask.png"}):
        verifier = build(folders["siglip"], crops="masked", dim=1.0, examples={"dog": entry}, score="sigmoid")
        scores.append(float(verifier.verify([image], [detections], words)[0].data["verify_score"][0]))
    assert scores[0] == scores[1]
    assert to_logit(scores[0]) == pytest.approx(6, abs=1e-3)

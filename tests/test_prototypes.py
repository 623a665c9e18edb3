"""Proposals of the small detector, classified by examples."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

from grounded_sam import CheckpointError, ConfigError, load
from grounded_sam.detectors.crop_embedder import CropEmbedder, pad_to_square

#: What the first image of the demo has.
PAIRS = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"]
IMAGE = Path(__file__).parents[1] / "grounded_sam" / "shapes" / "examples" / "demo" / "scene-1.png"
WORDS = f"[{', '.join(PAIRS)}]"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return checkpoints.embedder(tmp_path_factory.mktemp("models") / "embedder")


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "clip"])
def test_embeddings_equal_those_of_transformers(kind, tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    folder = checkpoints.embedder(tmp_path / "model", kind)
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((40, 20), (3, 9), (64, 64))]
    embeddings = CropEmbedder(str(folder), device="cpu", batch_size=2).embed_crops(crops)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    for crop, embedding in zip(crops, embeddings, strict=True):
        inputs = processor(images=Image.fromarray(pad_to_square(crop)), return_tensors="pt")
        with torch.inference_mode():
            output = model(**inputs) if kind == "dinov2" else model.get_image_features(**inputs)
        expected = torch.nn.functional.normalize(output.pooler_output, dim=-1)[0].numpy()
        np.testing.assert_allclose(embedding, expected, atol=1e-4)
    assert CropEmbedder(str(folder), device="cpu").embed_crops([]).shape[0] == 0


def pipeline(embedder, *overrides):
    common = [f"checkpoints.embedder={embedder}", f"detector.words={WORDS}", "device=cpu", "select.score=0.0"]
    return load(*common, *overrides, preset="shapes", detector="prototypes", segmenter="none")


def test_proposals_get_the_class_of_the_most_similar_example(embedder):
    plain = load("select.score=0.5", preset="shapes", segmenter="none").detect(str(IMAGE), PAIRS)
    assert len(plain) >= 2
    boxes = [[round(float(v)) for v in box] for box in plain.xyxy[:2]]
    entries = [f"{{image: '{IMAGE}', box: {box}}}" for box in boxes]
    examples = f"detector.examples={{first: {entries[0]}, second: {entries[1]}}}"
    detections = pipeline(embedder, examples).detect(str(IMAGE))
    for name, box in zip(("first", "second"), boxes, strict=True):
        overlap = np.abs(detections.xyxy - box).max(1)
        (nearest,) = [int(overlap.argmin())]
        assert overlap[nearest] < 2 and detections.data["class_name"][nearest] == name
        assert detections.confidence[nearest] > 0.95
        assert 0.1 <= detections.data["detector_scores"][nearest]["proposal"] <= 1
    # As a negative example, an object takes itself away, and the other one stays.
    fewer = pipeline(
        embedder, f"detector.examples={{second: {entries[1]}}}", f"detector.negative_examples=[{entries[0]}]"
    ).detect(str(IMAGE))
    assert np.abs(fewer.xyxy - boxes[0]).max(1).min() >= 2
    assert np.abs(fewer.xyxy - boxes[1]).max(1).min() < 2


def test_examples_are_needed_and_must_fit_the_text(embedder, tmp_path):
    with pytest.raises(ConfigError, match="detector=prototypes needs detector.examples"):
        pipeline(embedder)
    Image.new("RGB", (40, 40)).save(tmp_path / "crop.png")
    model = pipeline(embedder, f"detector.examples={{cup: '{tmp_path / 'crop.png'}'}}")
    with pytest.raises(ConfigError, match="detector.examples has 'cup', but text has 'bowl'; both must have the same"):
        model.detect(str(IMAGE), ["bowl"])


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a owlv2 checkpoint; expected dinov2 or"):
        CropEmbedder(str(checkpoints.owlv2(tmp_path / "owlv2")))

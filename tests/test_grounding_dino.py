"""Grounding DINO on random weights, compared with the processor of transformers; prompts; checkpoints."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import grounding_dino, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from grounded_sam import CheckpointError, Vocabulary, VocabularyError
from grounded_sam.detectors.grounding_dino import (
    MAX_VOCABULARIES,
    GroundingDino,
    PhraseScorer,
    SpecialTokens,
    read_calibration,
    write_prompts,
)
from grounded_sam.shapes.scenes import make_scene
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import GroupsBySize

IMAGE = np.random.default_rng(0).integers(0, 255, (120, 170, 3), dtype=np.uint8)
AWKWARD_PHRASES = ["parking entrance sign", "U.S. flag", "T-shirt?", "car", "taxi"]


@pytest.fixture(scope="module", params=["grounding-dino", "mm-grounding-dino"])
def folder(request, tmp_path_factory):
    return grounding_dino(tmp_path_factory.mktemp(request.param), mm=request.param.startswith("mm"))


@pytest.fixture(scope="module")
def detector(folder):
    return GroundingDino(str(folder), device="cpu")


def upstream(folder, image: np.ndarray, phrases: list[str]):
    """Run transformers' own processor, model and post-processing."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    inputs = processor(images=Image.fromarray(image), text=[phrases], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    result = processor.post_process_grounded_object_detection(
        out, inputs.input_ids, threshold=0.0, text_threshold=0.0, target_sizes=[image.shape[:2]]
    )[0]
    return inputs, out, result


def test_boxes_and_logits_equal_those_of_transformers(folder, detector):
    phrases = ["car", "parking entrance sign", "taxi"]
    inputs, out, result = upstream(folder, IMAGE, phrases)
    vocabulary = Vocabulary.parse(phrases)
    encoded, output = next(iter(detector.forward([Frame(pixels=IMAGE)], vocabulary)))
    assert encoded.prompt.ids == inputs.input_ids[0].tolist()
    length = len(encoded.prompt.ids)
    assert torch.allclose(output.logits, out.logits[..., :length], atol=1e-4)
    assert torch.allclose(output.pred_boxes, out.pred_boxes, atol=1e-4)
    detections = detector.detect([Frame(pixels=IMAGE)], vocabulary)[0]
    boxes = result["boxes"].numpy().clip(0, [170, 120, 170, 120])
    inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    assert np.allclose(detections.xyxy, boxes[inside], atol=1e-4 * 170)


def test_scores_of_one_word_phrases_are_close_to_those_of_transformers(folder, detector):
    """With one token per phrase, the best class is the best token, which transformers thresholds."""
    _, _, result = upstream(folder, IMAGE, ["car", "taxi", "dog"])
    detections = detector.detect([Frame(pixels=IMAGE)], Vocabulary.parse(["car", "taxi", "dog"]))[0]
    # Upstream takes the maximum over [CLS], full stops and [SEP] too, so it can only be larger.
    assert len(detections) == len(result["scores"])
    assert (detections.confidence <= result["scores"].numpy() + 1e-4).all()


def test_a_calibration_in_the_config_is_applied_by_number_of_tokens(folder, detector, tmp_path):
    calibration = [[2.0, 0.5], [0.5, -1.0]]
    copy = tmp_path / "calibrated"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"phrase_calibration": calibration}))
    for phrase, (scale, offset) in (("car", calibration[0]), ("parking entrance sign", calibration[1])):
        vocabulary = Vocabulary.parse([phrase])
        frames = [Frame(pixels=IMAGE)]
        raw = detector.detect(frames, vocabulary)[0].confidence
        calibrated = GroundingDino(str(copy), device="cpu").detect(frames, vocabulary)[0].confidence
        expected = 1 / (1 + np.exp(-(np.log(raw / (1 - raw)) * scale + offset)))
        np.testing.assert_allclose(calibrated, expected, atol=1e-4)


@pytest.mark.parametrize(
    "value", [[], "high", 3, [[1, 2, 3]], [[-1, 0]], [[float("inf"), 0]], [["a", "b"]], {"1": [1, 0]}]
)
def test_a_malformed_calibration_is_refused(value):
    with pytest.raises(CheckpointError, match="phrase_calibration in config.json must be a list of"):
        read_calibration(value, "dino")


@pytest.mark.parametrize("phrase_score", ["mean", "max"])
def test_a_phrase_is_scored_over_its_own_tokens(folder, phrase_score):
    detector = GroundingDino(str(folder), device="cpu", phrase_score=phrase_score)
    inputs, out, _ = upstream(folder, IMAGE, ["car", "parking entrance sign"])
    stops = [i for i, token in enumerate(inputs.input_ids[0].tolist()) if token == 1012]
    probability = out.logits[0].sigmoid()
    spans = [(1, stops[0]), (stops[0] + 1, stops[1])]
    reduce = torch.mean if phrase_score == "mean" else torch.amax
    scores = torch.stack([reduce(probability[:, a:b], 1) for a, b in spans], 1)
    detections = detector.detect([Frame(pixels=IMAGE)], Vocabulary.parse(["car", "parking entrance sign"]))[0]
    assert len(detections) == len(scores)
    assert np.allclose(detections.confidence, scores.max(1).values.numpy(), atol=1e-5)
    assert np.array_equal(detections.class_id, scores.argmax(1).numpy())


def test_every_label_is_a_requested_class(detector):
    detections = detector.detect([Frame(pixels=IMAGE)], Vocabulary.parse(AWKWARD_PHRASES))[0]
    assert len(detections) > 0
    assert set(detections.data["class_name"]) <= set(AWKWARD_PHRASES)


def test_phrases_of_one_class_give_no_duplicates(detector):
    detections = detector.detect(
        [Frame(pixels=IMAGE)], Vocabulary.parse({"vehicle": ["car", "taxi", "truck"], "dog": "dog"})
    )[0]
    assert len(detections) <= detector.model.config.num_queries
    assert set(detections.data["class_name"]) <= {"vehicle", "dog"}


def test_detections_of_negatives_are_dropped(detector):
    vocabulary = Vocabulary.parse(["car"], negative=["dog", "cat", "flag"])
    every = detector.detect([Frame(pixels=IMAGE)], Vocabulary.parse(["car", "dog", "cat", "flag"]))[0]
    detections = detector.detect([Frame(pixels=IMAGE)], vocabulary)[0]
    assert set(detections.data["class_name"]) <= {"car"}
    assert np.allclose(detections.xyxy, every[every.class_id == 0].xyxy)
    assert len(detections) < len(every)


def test_the_case_of_phrases_does_not_matter(detector):
    upper = detector.detect([Frame(pixels=IMAGE)], Vocabulary.parse(["Car", "TAXI"]))[0]
    lower = detector.detect([Frame(pixels=IMAGE)], Vocabulary.parse(["car", "taxi"]))[0]
    assert np.allclose(upper.confidence, lower.confidence)
    assert list(upper.data["class_name"][:1]) != list(lower.data["class_name"][:1])


def test_a_long_vocabulary_equals_its_prompts_one_by_one(tmp_path):
    detector = GroundingDino(str(grounding_dino(tmp_path)), device="cpu")
    names = [f"{'red ' * (i % 3)}thing {i:04d}" for i in range(1203)]
    vocabulary = Vocabulary.parse(names)
    prompts = detector.prompts(vocabulary)
    assert len(prompts) > 20
    calls = 0
    backbone = detector.model.model.backbone.conv_encoder.model
    original = type(backbone).forward

    def counting(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    type(backbone).forward = counting
    try:
        detections = detector.detect([Frame(pixels=IMAGE)], vocabulary)[0]
    finally:
        type(backbone).forward = original
    assert calls == 1
    parts, start = [], 0
    for prompt in prompts:
        count = len(prompt.spans)
        part = detector.detect([Frame(pixels=IMAGE)], Vocabulary.parse(names[start : start + count]))[0]
        parts.append(part)
        start += count
    assert start == len(names)
    assert np.allclose(detections.xyxy, np.concatenate([part.xyxy for part in parts]), atol=1e-3)
    assert np.allclose(detections.confidence, np.concatenate([part.confidence for part in parts]), atol=1e-5)
    assert list(detections.data["class_name"]) == [name for part in parts for name in part.data["class_name"]]


def make_frames(sizes):
    rng = np.random.default_rng(3)
    return [Frame(pixels=rng.integers(0, 255, (*size, 3), dtype=np.uint8), index=i) for i, size in enumerate(sizes)]


MIXED_SIZES = [(120, 170), (170, 120), (60, 60), (120, 170), (119, 170), (120, 171), (200, 90), (240, 340)]


def assert_same_detections(actual, expected, size_hw):
    assert np.array_equal(actual.class_id, expected.class_id)
    np.testing.assert_allclose(actual.confidence, expected.confidence, atol=1e-5)
    np.testing.assert_allclose(actual.xyxy, expected.xyxy, atol=1e-5 * max(size_hw))


@pytest.mark.parametrize("batch_size", [2, 8])
def test_each_frame_of_a_batch_has_the_result_that_it_has_alone(folder, batch_size):
    detector = GroundingDino(str(folder), device="cpu", batch_size=batch_size)
    vocabulary = Vocabulary.parse(["car", "parking entrance sign", "taxi"])
    frames = make_frames(MIXED_SIZES)
    assert len({detector.batch_key(size) for size in MIXED_SIZES}) < len(set(MIXED_SIZES))
    batched = detector.detect(frames, vocabulary)
    for frame, detections in zip(frames, batched, strict=True):
        assert len(detections) > 0
        assert_same_detections(detections, detector.detect([frame], vocabulary)[0], frame.size_hw)


def test_frames_of_a_backbone_that_sees_padding_are_batched_by_their_exact_size():
    """The detector of the package has a ResNet; it resizes to 160 px, at most 320."""
    detector = GroundingDino("builtin:shapes", device="cpu", batch_size=4)
    keys = [detector.batch_key(size) for size in ((120, 170), (120, 171), (1, 1))]
    assert keys == [(160, 226), (160, 228), (160, 160)]
    vocabulary = Vocabulary.parse(["red circle", "blue square"])
    frames = [
        Frame(pixels=make_scene(np.random.default_rng([7, i]), count=3, size_hw=size).image)
        for i, size in enumerate([(120, 170), (180, 150), (120, 170), (121, 170)])
    ]
    batched = detector.detect(frames, vocabulary)
    assert max(detections.confidence.max() for detections in batched) > 0.3
    for frame, detections in zip(frames, batched, strict=True):
        assert_same_detections(detections, detector.detect([frame], vocabulary)[0], frame.size_hw)


@pytest.mark.parametrize("size_hw", [(1, 1), (30, 3000), (97, 131), (800, 1333), (333, 777), (5, 4)])
def test_a_batch_key_is_the_size_of_the_resized_frame_in_whole_patches(detector, size_hw):
    pixels = detector.prepare([Frame(pixels=np.zeros((*size_hw, 3), np.uint8))])
    height, width = detector.batch_key(size_hw)
    assert pixels.shape == (1, 3, height, width)
    assert height % 4 == width % 4 == 0
    assert isinstance(detector, GroupsBySize)


def test_an_image_with_fewer_positions_than_queries_has_as_many_detections_as_positions(folder):
    detector = GroundingDino(str(folder), device="cpu")
    detector.image_processor.size = {"shortest_edge": 96, "longest_edge": 80}
    frames = make_frames([(8, 80), (7, 80)])
    _, output = next(iter(detector.forward(frames, Vocabulary.parse(["car"]))))
    positions = 10 + 5 + 3 + 2  # of strides 8 to 64
    assert output.logits.shape[:2] == output.pred_boxes.shape[:2] == (2, positions)
    assert positions < detector.model.config.num_queries
    assert all(len(detections) > 0 for detections in detector.detect(frames, Vocabulary.parse(["car"])))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    reduction=st.sampled_from(["mean", "max"]),
    seed=st.integers(0, 99),
)
def test_phrase_scores_are_means_or_maxima_over_the_tokens_of_each_phrase(lengths, reduction, seed):
    spans, start = [], 1
    for length in lengths:
        spans.append((len(spans), start, start + length))
        start += length + 1
    logits = 3 * torch.randn(2, 5, start + 1, generator=torch.Generator().manual_seed(seed))
    probability = logits.sigmoid()
    reduce = torch.mean if reduction == "mean" else torch.amax
    expected = torch.stack([reduce(probability[..., a:b], -1) for _, a, b in spans], -1)
    np.testing.assert_allclose(PhraseScorer(spans, reduction, [], "cpu")(logits), expected, atol=1e-6)


def test_encoded_prompts_of_the_latest_vocabularies_are_kept(detector):
    vocabularies = [Vocabulary.parse([f"car {i}"]) for i in range(MAX_VOCABULARIES + 1)]
    encoded = [detector.encoded_prompts(vocabulary) for vocabulary in vocabularies]
    assert detector.encoded_prompts(vocabularies[-1]) is encoded[-1]
    assert detector.encoded_prompts(vocabularies[0]) is not encoded[0]


@pytest.mark.parametrize("size_hw", [(1, 1), (30, 3000), (12, 16)])
def test_tiny_and_very_long_images_give_boxes(detector, size_hw):
    detections = detector.detect([Frame(pixels=np.zeros((*size_hw, 3), np.uint8))], Vocabulary.parse(["car"]))[0]
    assert detections.xyxy.shape[1] == 4


TOKENIZER = tokenizer()
SPECIAL = SpecialTokens(cls=101, sep=102, stop=1012)


def tokenize(phrase: str) -> list[int]:
    return TOKENIZER(phrase.lower(), add_special_tokens=False)["input_ids"]


phrase = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=30).filter(
    lambda p: any(c.isalnum() for c in p)
)


@given(
    st.lists(phrase, min_size=1, max_size=40, unique_by=lambda p: "".join(c for c in p.casefold() if c.isalnum())),
    st.integers(48, 256),
)
def test_prompts_contain_every_phrase_uncut_and_once(phrases, limit):
    try:
        vocabulary = Vocabulary.parse(phrases)
    except VocabularyError:
        return
    prompts = write_prompts(vocabulary, tokenize, SPECIAL, limit)
    owners = [owner for prompt in prompts for owner, _, _ in prompt.spans]
    assert owners == list(range(len(vocabulary)))
    for prompt in prompts:
        assert len(prompt.ids) <= limit
        assert (prompt.ids[0], prompt.ids[-2:]) == (101, [1012, 102])
        for _, start, stop in prompt.spans:
            assert prompt.ids[stop] == 1012
            assert start < stop
            assert not {101, 102, 1012, 1029} & set(prompt.ids[start:stop])


def test_every_prompt_contains_the_negatives():
    vocabulary = Vocabulary.parse([f"car {i}" for i in range(60)], negative=["toy car", "dog"])
    prompts = write_prompts(vocabulary, tokenize, SPECIAL, 64)
    assert len(prompts) > 2
    for prompt in prompts:
        assert [owner for owner, _, _ in prompt.spans[-2:]] == [-1, -1]


def test_phrases_that_are_too_long_are_refused_by_name():
    with pytest.raises(VocabularyError, match="'car car car.*20 tokens; the detector takes at most 13"):
        write_prompts(Vocabulary.parse([" ".join(["car"] * 20)]), tokenize, SPECIAL, 16)
    with pytest.raises(VocabularyError, match="the negatives take"):
        write_prompts(Vocabulary.parse(["car"], negative=["dog " * 6, "cat " * 6]), tokenize, SPECIAL, 16)


def test_wrong_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        GroundingDino(str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        GroundingDino("./nowhere")
    with pytest.raises(CheckpointError, match="builtin:shapes"):
        GroundingDino("builtin:nothing")
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        GroundingDino(str(tmp_path))


def test_damaged_and_incomplete_checkpoints_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = grounding_dino(tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.level_embed")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights of its model, such as model.level_embed"):
        GroundingDino(str(folder))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load"):
        GroundingDino(str(folder))


def test_words_that_the_tokenizer_does_not_know_are_named_and_the_advice_works(shapes, tmp_path):
    image = np.full((64, 64, 3), 128, np.uint8)
    for text in (["red 汽车"], ["red circle", "мяч"], {"thing": ["circle", "汽车"]}):
        with pytest.raises(VocabularyError, match="does not know '(汽车|мяч)'.*: english words'"):
            shapes.detect(image, text)
    (tmp_path / "classes.yaml").write_text("汽车: red circle\n", encoding="utf-8")
    assert shapes.detect(image, str(tmp_path / "classes.yaml")) is not None
    shapes.detect(image, ["traffic_light", "driver's red-circle", "café 2"])  # signs and accents are no words

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import grounding_dino, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from grounded_sam import CheckpointError, Vocabulary, VocabularyError
from grounded_sam.detectors.grounding_dino import GroundingDino, write_prompts
from grounded_sam.structures.frame import Frame

IMAGE = np.random.default_rng(0).integers(0, 255, (120, 170, 3), dtype=np.uint8)
AWKWARD = ["parking entrance sign", "U.S. flag", "T-shirt?", "car", "taxi"]


@pytest.fixture(scope="module", params=["grounding-dino", "mm-grounding-dino"])
def folder(request, tmp_path_factory):
    return grounding_dino(tmp_path_factory.mktemp(request.param), mm=request.param.startswith("mm"))


@pytest.fixture(scope="module")
def detector(folder):
    return GroundingDino(str(folder), device="cpu")


def upstream(folder, image: np.ndarray, phrases: list[str]):
    """transformers' own way: processor, forward, post-processing."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    inputs = processor(images=Image.fromarray(image), text=[phrases], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    result = processor.post_process_grounded_object_detection(
        out, inputs.input_ids, threshold=0.0, text_threshold=0.0, target_sizes=[image.shape[:2]]
    )[0]
    return inputs, out, result


def test_boxes_and_logits_equal_transformers_own(folder, detector):
    phrases = ["car", "parking entrance sign", "taxi"]
    inputs, out, result = upstream(folder, IMAGE, phrases)
    vocabulary = Vocabulary.parse(phrases)
    prompt, own = next(iter(detector.forward([Frame(IMAGE)], vocabulary)))
    assert prompt.ids == inputs.input_ids[0].tolist()
    length = len(prompt.ids)
    assert torch.allclose(own.logits[..., :length], out.logits[..., :length], atol=1e-4)
    assert torch.allclose(own.pred_boxes, out.pred_boxes, atol=1e-4)
    found = detector.detect([Frame(IMAGE)], vocabulary)[0]
    boxes = result["boxes"].numpy().clip(0, [170, 120, 170, 120])
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    assert np.allclose(found.xyxy, boxes[keep], atol=1e-4 * 170)


def test_scores_of_one_word_phrases_are_transformers_scores(folder, detector):
    """With one token a phrase, the best class is the best token, which is what transformers thresholds."""
    _, _, result = upstream(folder, IMAGE, ["car", "taxi", "dog"])
    found = detector.detect([Frame(IMAGE)], Vocabulary.parse(["car", "taxi", "dog"]))[0]
    # Upstream's maximum runs over [CLS], full stops and [SEP] too, so it can only be larger.
    assert len(found) == len(result["scores"])
    assert (found.confidence <= result["scores"].numpy() + 1e-4).all()


@pytest.mark.parametrize("phrase_score", ["mean", "max"])
def test_a_phrase_is_scored_over_its_own_tokens(folder, phrase_score):
    detector = GroundingDino(str(folder), device="cpu", phrase_score=phrase_score)
    inputs, out, _ = upstream(folder, IMAGE, ["car", "parking entrance sign"])
    words = inputs.input_ids[0].tolist()
    stops = [i for i, word in enumerate(words) if word == 1012]
    probability = out.logits[0].sigmoid()
    spans = [(1, stops[0]), (stops[0] + 1, stops[1])]
    reduce = torch.mean if phrase_score == "mean" else torch.amax
    scores = torch.stack([reduce(probability[:, a:b], 1) for a, b in spans], 1)
    found = detector.detect([Frame(IMAGE)], Vocabulary.parse(["car", "parking entrance sign"]))[0]
    assert len(found) == len(scores)
    assert np.allclose(found.confidence, scores.max(1).values.numpy(), atol=1e-5)
    assert np.array_equal(found.class_id, scores.argmax(1).numpy())


def test_every_label_is_a_class_that_was_named(detector):
    found = detector.detect([Frame(IMAGE)], Vocabulary.parse(AWKWARD))[0]
    assert len(found) > 0
    assert set(found.data["class_name"]) <= set(AWKWARD)


def test_phrases_of_one_class_make_no_duplicates(detector):
    found = detector.detect([Frame(IMAGE)], Vocabulary.parse({"vehicle": ["car", "taxi", "truck"], "dog": "dog"}))[0]
    assert len(found) <= detector.model.config.num_queries
    assert set(found.data["class_name"]) <= {"vehicle", "dog"}


def test_negatives_take_their_detections_away(detector):
    words = Vocabulary.parse(["car"], negative=["dog", "cat", "flag"])
    plain = detector.detect([Frame(IMAGE)], Vocabulary.parse(["car", "dog", "cat", "flag"]))[0]
    found = detector.detect([Frame(IMAGE)], words)[0]
    assert set(found.data["class_name"]) <= {"car"}
    assert np.allclose(found.xyxy, plain[plain.class_id == 0].xyxy)
    assert len(found) < len(plain)


def test_case_does_not_matter(detector):
    one = detector.detect([Frame(IMAGE)], Vocabulary.parse(["Car", "TAXI"]))[0]
    two = detector.detect([Frame(IMAGE)], Vocabulary.parse(["car", "taxi"]))[0]
    assert np.allclose(one.confidence, two.confidence)
    assert list(one.data["class_name"][:1]) != list(two.data["class_name"][:1])


def test_a_long_vocabulary_gives_what_its_chunks_give_by_hand(tmp_path):
    detector = GroundingDino(str(grounding_dino(tmp_path)), device="cpu")
    names = [f"{'red ' * (i % 3)}thing {i:04d}" for i in range(1203)]
    vocabulary = Vocabulary.parse(names)
    prompts = detector.prompts(vocabulary)
    assert len(prompts) > 20
    calls = 0
    backbone = detector.model.model.backbone
    plain = type(backbone).forward

    def counting(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return plain(self, *args, **kwargs)

    type(backbone).forward = counting
    try:
        found = detector.detect([Frame(IMAGE)], vocabulary)[0]
    finally:
        type(backbone).forward = plain
    assert calls == 1
    by_hand, start = [], 0
    for prompt in prompts:
        count = len(prompt.spans)
        part = detector.detect([Frame(IMAGE)], Vocabulary.parse(names[start : start + count]))[0]
        by_hand.append((part.xyxy, part.confidence, part.data["class_name"]))
        start += count
    assert start == len(names)
    assert np.allclose(found.xyxy, np.concatenate([p[0] for p in by_hand]), atol=1e-3)
    assert np.allclose(found.confidence, np.concatenate([p[1] for p in by_hand]), atol=1e-5)
    assert list(found.data["class_name"]) == [name for p in by_hand for name in p[2]]


def test_images_of_mixed_sizes_in_one_batch(detector):
    vocabulary = Vocabulary.parse(["car", "taxi"])
    frames = [Frame(IMAGE, 0), Frame(np.ascontiguousarray(IMAGE.transpose(1, 0, 2)), 1), Frame(IMAGE[:60, :60], 2)]
    found = detector.detect(frames, vocabulary)
    assert [len(f) > 0 for f in found] == [True] * 3
    for frame, f in zip(frames, found, strict=True):
        assert (f.xyxy[:, 2] <= frame.image.shape[1]).all()
        assert (f.xyxy[:, 3] <= frame.image.shape[0]).all()


@pytest.mark.parametrize("size_hw", [(1, 1), (30, 3000), (12, 16)])
def test_tiny_and_very_long_images(detector, size_hw):
    found = detector.detect([Frame(np.zeros((*size_hw, 3), np.uint8))], Vocabulary.parse(["car"]))[0]
    assert found.xyxy.shape[1] == 4


WORDS = tokenizer()
IDS = {"cls": 101, "sep": 102, "stop": 1012}


def tokenize(phrase: str) -> list[int]:
    return WORDS(phrase.lower(), add_special_tokens=False)["input_ids"]


phrase = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=30).filter(
    lambda p: any(c.isalnum() for c in p)
)


@settings(deadline=None)
@given(
    st.lists(phrase, min_size=1, max_size=40, unique_by=lambda p: "".join(c for c in p.casefold() if c.isalnum())),
    st.integers(48, 256),
)
def test_prompts_hold_every_phrase_whole_and_once(phrases, limit):
    try:
        vocabulary = Vocabulary.parse(phrases)
    except VocabularyError:
        return
    prompts = write_prompts(vocabulary, tokenize, IDS, limit)
    owners = [owner for prompt in prompts for owner, _, _ in prompt.spans]
    assert owners == list(range(len(vocabulary)))
    for prompt in prompts:
        assert len(prompt.ids) <= limit
        assert (prompt.ids[0], prompt.ids[-2:]) == (101, [1012, 102])
        for _, start, stop in prompt.spans:
            assert prompt.ids[stop] == 1012
            assert start < stop
            assert not {101, 102, 1012, 1029} & set(prompt.ids[start:stop])


def test_negatives_stand_in_every_prompt():
    vocabulary = Vocabulary.parse([f"car {i}" for i in range(60)], negative=["toy car", "dog"])
    prompts = write_prompts(vocabulary, tokenize, IDS, 64)
    assert len(prompts) > 2
    for prompt in prompts:
        assert [owner for owner, _, _ in prompt.spans[-2:]] == [-1, -1]


def test_what_cannot_fit_is_refused_by_name():
    with pytest.raises(VocabularyError, match="'car car car.*20 tokens; the detector takes at most 13"):
        write_prompts(Vocabulary.parse([" ".join(["car"] * 20)]), tokenize, IDS, 16)
    with pytest.raises(VocabularyError, match="negatives take"):
        write_prompts(Vocabulary.parse(["car"], negative=["dog " * 6, "cat " * 6]), tokenize, IDS, 16)


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

"""Language models that write boxes and points: small ones that learned an answer, and hostile answers."""

from __future__ import annotations

import json
import math
import re

import checkpoints
import numpy as np
import pytest
import torch
from command import run_command
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import CheckpointError, ConfigError, Vocabulary, VocabularyError, load
from grounded_sam.detectors.vlm import PROMPTS, Vlm
from grounded_sam.detectors.written_objects import MAX_OBJECTS, parse_answer
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import RefusesAnswers

SIZE = (1000, 1000)
PHRASES = ["cup", "red spoon"]
#: What the small models learn to answer: a good box, one of a phrase in other case, and three to refuse.
BOXES = (
    '[{"bbox_2d": [100, 200, 500, 400], "label": "cup"}, {"bbox_2d": [10, 10, 90, 90], "label": "Red  spoon"}, '
    '{"bbox_2d": [1, 2, 3], "label": "cup"}, {"bbox_2d": [5, 6, 30, 40], "label": "mug"}, '
    '{"bbox_2d": [5, 6, 3000, 40], "label": "cup"}]'
)
TOGETHER = PROMPTS["boxes"].replace("{}", "cup, red spoon")
EACH = [PROMPTS["tags"].replace("{}", phrase) for phrase in PHRASES]
POINTS = {EACH[0]: '<points coords="1 1 250 500 2 701 498">cups</points>', EACH[1]: "There are none."}


@pytest.fixture(scope="module")
def frame():
    image = np.full((64, 96, 3), 128, np.uint8)
    image[20:44, 12:36] = (200, 20, 20)
    return Frame(pixels=image, name="table.png")


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    return checkpoints.qwen3_vl(tmp_path_factory.mktemp("models") / "qwen3_vl", answers={TOGETHER: BOXES})


@pytest.fixture(scope="module")
def molmo2(tmp_path_factory):
    return checkpoints.molmo2(tmp_path_factory.mktemp("models") / "molmo2", answers=POINTS)


def make_vlm(folder, **settings):
    return Vlm(str(folder), device="cpu", **{"dtype": "float32", "max_new_tokens": 400, **settings})


def ask_upstream(folder, image, question):
    """Return what transformers alone answers, and the probability of each token."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    options = {"max_new_tokens": 400, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    with torch.inference_mode():
        output = model.generate(**inputs, **options)
        scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)[0].exp()
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    return [(processor.tokenizer.decode([i]), float(score)) for i, score in zip(ids, scores, strict=True)]


@pytest.mark.parametrize("kind", ["qwen3_vl", "molmo2"])
def test_answers_and_probabilities_equal_those_of_transformers(kind, request, frame):
    folder, question = request.getfixturevalue(kind), TOGETHER if kind == "qwen3_vl" else EACH[0]
    detector = make_vlm(folder, score="tokens")
    text, tokens, _ = detector.generate(frame, question)
    expected = ask_upstream(folder, frame.image, question)
    assert text == "".join(piece for piece, _ in expected).removesuffix("<|im_end|>")
    np.testing.assert_allclose(np.exp([log for _, log in tokens]), [score for _, score in expected], atol=1e-4)
    # The score of the first object is the geometric mean over its digits, which are tokens of one character here.
    pieces = "".join(piece for piece, _ in expected)
    first = pieces.index("100, 200, 500, 400") if kind == "qwen3_vl" else pieces.index("250 500")
    length = len("100, 200, 500, 400") if kind == "qwen3_vl" else len("250 500")
    digits = [score for piece, score in expected[first : first + length] if piece.isdigit()]
    detections = detector.detect([frame], Vocabulary.parse(PHRASES))[0]
    np.testing.assert_allclose(detections.confidence[0], math.prod(digits) ** (1 / len(digits)), atol=1e-4)
    assert 0 < detections.confidence[0] < 1


def test_boxes_have_the_class_of_their_label_and_the_rest_is_named(qwen3_vl, frame):
    detector = make_vlm(qwen3_vl)
    assert isinstance(detector, RefusesAnswers)
    detections = detector.detect([frame], Vocabulary.parse({"mug": "cup", "spoon": "red spoon"}))[0]
    np.testing.assert_allclose(detections.xyxy, [[9.6, 12.8, 48, 25.6], [0.96, 0.64, 8.64, 5.76]], rtol=1e-5)
    assert detections.data["class_name"].tolist() == ["mug", "spoon"]
    assert detections.confidence.tolist() == [1, 1]
    (skipped,) = detector.take_refused()
    assert skipped.file == "table.png"
    assert skipped.reason.startswith("3 parts of the answer refused, 2 objects read; the first: bbox_2d must be 4")
    assert detector.take_refused() == []


def test_a_box_of_a_negative_drops_what_it_overlaps(frame, tmp_path):
    answer = (
        '[{"bbox_2d": [100, 200, 500, 400], "label": "cup"}, {"bbox_2d": [100, 200, 500, 410], "label": "red spoon"}, '
        '{"bbox_2d": [600, 600, 900, 900], "label": "cup"}]'
    )
    detector = make_vlm(checkpoints.qwen3_vl(tmp_path / "model", answers={TOGETHER: answer}))
    detections = detector.detect([frame], Vocabulary.parse(["cup"], ["red spoon"]))[0]
    np.testing.assert_allclose(detections.xyxy, [[57.6, 38.4, 86.4, 57.6]], rtol=1e-5)
    assert len(detector.detect([frame], Vocabulary.parse(PHRASES))[0]) == 3


def test_pixels_of_qwen2_5_vl_are_those_of_the_resized_image(frame, tmp_path):
    answer = '{"bbox_2d": [21, 14, 63, 56], "label": "cup"}'
    folder = checkpoints.qwen2_5_vl(tmp_path / "model", answers={PROMPTS["boxes"].replace("{}", "cup"): answer})
    detections = make_vlm(folder).detect([frame], Vocabulary.parse(["cup"]))[0]
    from transformers import AutoProcessor

    inputs = AutoProcessor.from_pretrained(folder).image_processor(images=frame.image, return_tensors="pt")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    scale = np.array([96 / (columns * 14), 64 / (rows * 14)] * 2)
    assert (scale != 1).all()
    np.testing.assert_allclose(detections.xyxy, [np.array([21, 14, 63, 56]) * scale], rtol=1e-5)


def test_points_become_clicks_for_the_segmenter(molmo2, frame):
    overrides = [f"checkpoints.vlm={molmo2}", "detector.dtype=float32", "device=cpu", "detector.max_new_tokens=100"]
    overrides += ["select.nms=null", "select.min_area=0"]
    pipeline = load(*overrides, preset="shapes", detector="vlm", segmenter="sam2")
    detections = pipeline.segment(frame.image, PHRASES)
    assert set(detections.data["class_name"]) == {"cup"} and len(detections) == 2 and detections.mask[0].any()
    clicks = [{"class": "cup", "points": [[24, 32]]}, {"class": "cup", "points": [[67.296, 31.872]]}]
    with pipeline.session(frame.image) as session:
        expected = session.segment(clicks)
    np.testing.assert_array_equal(detections.mask, expected.mask)
    tiled = load(*overrides, "tiles.size=48", preset="shapes", detector="vlm", segmenter="none")
    with pytest.raises(ConfigError, match="this one gives points; remove tiles.size"):
        tiled.detect(frame.image, ["cup"])


def test_a_run_lists_what_was_refused(qwen3_vl, frame, tmp_path):
    Image.fromarray(frame.image).save(tmp_path / "table.png")
    arguments = ["preset=shapes", "detector=vlm", f"checkpoints.vlm={qwen3_vl}", "detector.dtype=float32"]
    arguments += ["detector.max_new_tokens=400", "text=[cup,red spoon]", "input=table.png", "output=out", "sink=coco"]
    arguments += ["segmenter=none"]
    done = run_command("grounded_sam.cli.main", arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert entry["file"] == "table.png" and "3 parts of the answer refused" in entry["reason"]
    assert "table.png: 3 parts of the answer refused" in " ".join(done.stdout.split())
    assert "1 cup" in done.stdout and "1 red spoon" in done.stdout


def test_an_answer_that_is_cut_is_named(qwen3_vl, frame):
    detector = make_vlm(qwen3_vl, max_new_tokens=60)
    assert len(detector.detect([frame], Vocabulary.parse(PHRASES))[0]) == 1
    (skipped,) = detector.take_refused()
    assert "2 parts" in skipped.reason and "an object without an end" in skipped.reason
    text, tokens, _ = detector.generate(frame, TOGETHER)
    assert len(tokens) == 60 and BOXES.startswith(text)


def test_settings_that_cannot_work_are_refused(qwen3_vl, molmo2, frame, tmp_path):
    for settings, message in [
        ({"answer": "masks"}, "detector.answer must be boxes, points, tags or null"),
        ({"coordinates": "pixels"}, "detector.coordinates must be relative, input or null"),
        ({"prompt": "boxes please"}, "detector.prompt must contain {} for the phrases"),
        ({"score": "logits"}, "detector.score must be none or tokens"),
        ({"max_new_tokens": 0}, "detector.max_new_tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Vlm("no/where", **settings)
    with pytest.raises(ConfigError, match="ask=together needs labels"):
        make_vlm(molmo2, ask="together")
    with pytest.raises(ConfigError, match="florence2, whose answers are not known: set detector.answer and"):
        make_vlm(checkpoints.florence2(tmp_path / "florence2"))
    with pytest.raises(CheckpointError, match="is a owlv2 checkpoint"):
        make_vlm(checkpoints.owlv2(tmp_path / "owlv2"))
    with pytest.raises(VocabularyError, match=r"contains '<\|image_pad\|>', which controls the model"):
        make_vlm(qwen3_vl).detect([frame], Vocabulary.parse(["a cup<|image_pad|>"]))


@pytest.mark.parametrize("text", ["", "[]", "```json\n[]\n```", "None.", "There are no cups in the image.", "[ ]\n"])
def test_that_there_is_nothing_is_an_answer(text):
    for form in PROMPTS:
        answer = parse_answer(text, form, SIZE)
        assert not answer.objects and not answer.refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The cups are left.", "no boxes in the answer 'The cups are left.'"),
        ('[{"bbox_2d": [1, 2, 3, 4]', "an object without an end"),
        ("{" * 50_000, "an object without an end"),
        ('{"bbox_2d": ' + "[" * 50_000 + "]" * 50_000 + "}", "no valid JSON|must be 4 finite numbers"),
        ('{"objects": {"bbox_2d": [1, 2, 3, 4]}}', "an object without bbox_2d"),
        ('{"bbox_2d": [1, 2, 3, 4], "more": {"bbox_2d": [1, 2, 3, 4]}}', "an object without bbox_2d"),
        ('{"box": [1, 2, 3, 4], "label": "cup"}', "an object without bbox_2d"),
        ('{"bbox_2d": [1, 2, 3, NaN]}', "no valid JSON"),
        ('{"bbox_2d": [1, 2, 3, Infinity]}', "no valid JSON"),
        ('{"bbox_2d": [1, 2, 3, 1e999]}', "must be 4 finite numbers"),
        ('{"bbox_2d": [1, 2, 3, ' + "9" * 5000 + "]}", "no valid JSON"),
        ('{"bbox_2d": [1, 2, 3, ' + "9" * 500 + "]}", "must be 4 finite numbers"),
        ('{"bbox_2d": ["1", 2, 3, 4]}', "must be 4 finite numbers"),
        ('{"bbox_2d": [true, 2, 3, 4]}', "must be 4 finite numbers"),
        ('{"bbox_2d": "1, 2, 3, 4"}', "must be 4 finite numbers"),
        ('{"bbox_2d": [[1, 2, 3, 4]]}', "must be 4 finite numbers"),
        ('{"bbox_2d": [1, 2, 3]}', "must be 4 finite numbers"),
        ('{"bbox_2d": [30, 2, 3, 4]}', "an empty box"),
        ('{"bbox_2d": [3, 4, 3, 9]}', "an empty box"),
        ('{"bbox_2d": [0, 0, 1200, 900]}', "outside of 0 to 1000"),
        ('{"bbox_2d": [-90, 0, 100, 90]}', "outside of 0 to 1000"),
        ('{"bbox_2d": [1, 2, 3, 4], "label": 7}', "label must be text"),
        ('{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [1, 2, 3, 9]}', "no valid JSON"),
        ("{'bbox_2d': [1, 2, 3, 4]}", "no valid JSON"),
        ("x" * 300_000, "an answer of 300,000 characters"),
    ],
)
def test_garbage_is_refused_and_named(text, reason):
    answer = parse_answer(text, "boxes", SIZE)
    assert not answer.objects
    assert len(answer.refused) == 1 and re.search(reason, answer.refused[0])
    assert len(answer.refused[0]) < 300


def test_good_objects_are_read_beside_bad_ones():
    text = 'I think {"bbox_2d": [9, 9, 99, 99]}</think>Here: [{"bbox_2d": [1.5, 2, 1005, 4], "label": "a \\" {b}"}, '
    text += '{"bbox_2d": 3}, {"bbox_2d": [1.5, 2, 1005, 4], "label": "a \\" {b}"}, {"bbox_2d": [1, 2, 3, 4], "x": 1}]'
    answer = parse_answer(text, "boxes", SIZE)
    assert [(item.label, item.numbers) for item in answer.objects] == [
        ('a " {b}', (1.5, 2.0, 1005.0, 4.0)),
        (None, (1.0, 2.0, 3.0, 4.0)),
    ]
    assert [text[item.start : item.stop] for item in answer.objects] == ["[1.5, 2, 1005, 4]", "[1, 2, 3, 4]"]
    assert len(answer.refused) == 2 and "written twice" in answer.refused[1]
    many = ",".join(f'{{"point_2d": [{i % 1000}, {i // 1000}]}}' for i in range(MAX_OBJECTS + 5))
    answer = parse_answer(f"[{many}]", "points", SIZE)
    assert len(answer.objects) == MAX_OBJECTS and answer.refused == [f"more than {MAX_OBJECTS:,} objects"] * 5


@pytest.mark.parametrize(
    ("text", "points", "refused"),
    [
        ('Counting the <points coords="1 1 990 800">x</points> shows a total of 1.', [(990, 800)], 0),
        ('<points label="cup" coords="1 1 010 020 2 911 800"/>', [(10, 20), (911, 800)], 0),
        ('<points coords="1 1 900">x</points>', [], 1),
        ('<points coords="2 1 900 400">x</points>', [], 1),
        ('<points coords="1 1 900 -4">x</points>', [], 1),
        ('<points coords="1 1 9000 400">x</points>', [], 1),
        ('<points coords="1 1 nan 400">x</points>', [], 1),
        ('<points x1="5" y1="6"/> <points coords="1 1 5 6">x</points>', [(5, 6)], 1),
        ("<points " * 20_000, [], 1),
        ('<points coords="' * 10_000, [], 1),
    ],
)
def test_tags_of_points(text, points, refused):
    answer = parse_answer(text, "tags", SIZE)
    assert [item.numbers for item in answer.objects] == points
    assert len(answer.refused) == refused


PIECES = st.sampled_from(
    ['{"bbox_2d": ', '{"point_2d": ', "[", "]", "}", '"label": "', '"', ", ", "1", "-", "1e9", "NaN", "\\", "</think>"]
    + ['<points coords="', '">', "1 1 2 3", "[1, 2, 3, 4]", "[5, 6]", "```json\n"]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=30).map("".join), st.sampled_from(list(PROMPTS)))
def test_whatever_a_model_writes_gives_valid_objects_or_reasons(text, form):
    answer = parse_answer(text, form, (100, 50))
    for item in answer.objects:
        assert len(item.numbers) == (4 if form == "boxes" else 2)
        assert all(-1 <= number <= limit for number, limit in zip(item.numbers, (101, 50.5) * 2, strict=False))
        assert 0 <= item.start < item.stop <= len(text)
    assert all(len(reason) < 300 and reason.isprintable() for reason in answer.refused)

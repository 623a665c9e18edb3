"""OWLv2 and OmDet-Turbo on random weights: what transformers' own processors make of the same."""

from __future__ import annotations

import re

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

from grounded_sam import CheckpointError, ConfigError, ImageError, Vocabulary, VocabularyError, load
from grounded_sam.detectors.florence2 import Florence2
from grounded_sam.detectors.omdet_turbo import OmdetTurbo
from grounded_sam.detectors.owlv2 import Owlv2
from grounded_sam.detectors.sam3 import Sam3
from grounded_sam.media.images import read_image
from grounded_sam.structures.frame import Frame

WORDS = ["car", "a red wheel", "dog's toy"]


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    return checkpoints.owlv2(tmp_path_factory.mktemp("models") / "owlv2")


@pytest.fixture(scope="module")
def omdet(tmp_path_factory):
    return checkpoints.omdet_turbo(tmp_path_factory.mktemp("models") / "omdet")


@pytest.fixture(scope="module")
def frames(photos):
    """Wide, narrow and odd."""
    names = ["coffee.png", "chelsea.png", "orientation/hopper_orientation_2.jpg"]
    pictures = [read_image(photos / name) for name in names]
    pictures[2] = np.ascontiguousarray(pictures[2][:, :77])
    return [Frame(picture, i, str(i)) for i, picture in enumerate(pictures)]


def same(found, theirs, width, height):
    """Boxes as sets of rows, since queries of equal score have no order; ours are cut to the image."""
    boxes = theirs["boxes"].numpy().astype(np.float32)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
    inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    rows = np.column_stack([theirs["labels"].numpy(), theirs["scores"].numpy(), boxes])[inside]
    ours = np.column_stack([found.class_id, found.confidence, found.xyxy])
    assert len(ours) == len(rows) > 0
    order, other = (np.lexsort(table.round(3).T[::-1]) for table in (ours, rows))
    np.testing.assert_allclose(ours[order], rows[other], atol=1e-2)
    np.testing.assert_allclose(ours[order][:, 1], rows[other][:, 1], atol=1e-4)


def test_owlv2_gives_what_its_processor_gives(owlv2, frames):
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    processor, model = Owlv2Processor.from_pretrained(owlv2), Owlv2ForObjectDetection.from_pretrained(owlv2)
    found = Owlv2(str(owlv2), batch_size=3).detect(frames, Vocabulary.parse(WORDS))
    for frame, ours in zip(frames, found, strict=True):
        inputs = processor(text=[WORDS], images=frame.image, return_tensors="pt")
        with torch.inference_mode():
            out = model(**inputs)
        (theirs,) = processor.post_process_grounded_object_detection(out, 0.0, torch.tensor([frame.size_hw]))
        same(ours, theirs, frame.size_hw[1], frame.size_hw[0])
        assert len(set(ours.class_id.tolist())) > 1


def test_omdet_turbo_gives_what_its_processor_gives(omdet, frames):
    from transformers import OmDetTurboForObjectDetection, OmDetTurboProcessor

    processor = OmDetTurboProcessor.from_pretrained(omdet)
    model = OmDetTurboForObjectDetection.from_pretrained(omdet)
    found = OmdetTurbo(str(omdet), batch_size=3).detect(frames, Vocabulary.parse(WORDS))
    for frame, ours in zip(frames, found, strict=True):
        inputs = processor(images=frame.image, text=WORDS, return_tensors="pt")
        with torch.inference_mode():
            out = model(**inputs)
        (theirs,) = processor.post_process_grounded_object_detection(
            out, threshold=0.0, nms_threshold=1.0, target_sizes=[frame.size_hw]
        )
        same(ours, theirs, frame.size_hw[1], frame.size_hw[0])


@pytest.mark.parametrize("kind", [Owlv2, OmdetTurbo])
def test_phrases_make_classes_and_negatives_vanish(kind, owlv2, omdet, frames):
    model = kind(str(owlv2 if kind is Owlv2 else omdet))
    alone = model.detect(frames[:1], Vocabulary.parse(WORDS))[0]
    joined = model.detect(frames[:1], Vocabulary.parse({"thing": WORDS[:2], "toy": WORDS[2]}))[0]
    assert set(joined.data["class_name"]) <= {"thing", "toy"}
    if kind is Owlv2:  # one query, one detection: the best phrase's
        np.testing.assert_array_equal(joined.confidence, alone.confidence)
        np.testing.assert_array_equal(joined.class_id, np.where(alone.class_id < 2, 0, 1))
        negative = model.detect(frames[:1], Vocabulary.parse(WORDS[:2], [WORDS[2]]))[0]
        assert len(negative) == (alone.class_id < 2).sum() > 0
    many = model.detect(frames[:1], Vocabulary.parse([f"thing {i}" for i in range(60)]))[0]
    assert len(many) > 0 and many.class_id.max() < 60
    with pytest.raises(VocabularyError, match="takes 16 of a phrase|longer than the 77 tokens"):
        model.detect(frames[:1], Vocabulary.parse(["x" * 90]))


def test_examples_are_found_like_image_guided_detection_finds_them(owlv2, frames, photos, tmp_path):
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    crop = tmp_path / "cup.png"
    Image.fromarray(frames[0].image[100:300, 150:400]).save(crop)
    examples = {"cup": [str(crop), {"image": str(photos / "coffee.png"), "box": [150, 100, 400, 300]}]}
    model = Owlv2(str(owlv2), examples=examples)
    assert model.vocabulary.classes == ("cup",)
    found = model.detect(frames[1:2], model.vocabulary)[0]
    processor = Owlv2Processor.from_pretrained(owlv2)
    upstream = Owlv2ForObjectDetection.from_pretrained(owlv2)
    inputs = processor(images=frames[1].image, query_images=read_image(crop), return_tensors="pt")
    with torch.inference_mode():
        out = upstream.image_guided_detection(**inputs)
    scores = out.logits[0, :, 0].sigmoid().numpy()
    away = np.abs(found.confidence[:, None] - scores[None]).min(1)  # boxes outside the image are dropped
    assert len(found) > 10 and away.max() < 1e-4
    # Beside words, and through the pipeline without any.
    both = model.detect(frames[1:2], Vocabulary.parse(["dog", "cup"]))[0]
    assert both.confidence.max() >= found.confidence.max() - 1e-6
    words = f"detector.examples={{cup: ['{crop}']}}"
    pipeline = load(words, f"checkpoints.owlv2={owlv2}", "select.score=0", detector="owlv2", segmenter=None)
    assert set(pipeline.detect(frames[1].image).data["class_name"]) == {"cup"}


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ({"cup": [{"image": "x.png"}]}, "expected a picture or"),
        ({"cup": []}, "no example"),
        ({"cup": [{"image": "PHOTO", "box": [900, 900, 950, 950]}]}, "nothing of the box .* 600x400 px"),
    ],
)
def test_what_is_no_example_is_said_before_a_model_loads(examples, says, photos):
    for one in examples["cup"]:
        one["image"] = str(photos / "coffee.png")
    with pytest.raises(ConfigError, match=f"detector.examples.cup.*{says}"):
        Owlv2("no/where", examples=examples)


def test_checkpoints_of_another_family_are_refused(owlv2, omdet):
    with pytest.raises(CheckpointError, match=re.escape(f"{omdet} is a omdet-turbo checkpoint; expected owlv2")):
        Owlv2(str(omdet))
    with pytest.raises(CheckpointError, match="expected omdet-turbo"):
        OmdetTurbo(str(owlv2))


@pytest.fixture(scope="module")
def sam3(tmp_path_factory):
    return checkpoints.sam3(tmp_path_factory.mktemp("models") / "sam3")


def test_sam3_gives_what_its_processor_gives(sam3, frames):
    from transformers import AutoTokenizer, Sam3ImageProcessor, Sam3Model, Sam3Processor

    model = Sam3Model.from_pretrained(sam3)
    processor = Sam3Processor(Sam3ImageProcessor.from_pretrained(sam3), AutoTokenizer.from_pretrained(sam3))
    ours = Sam3(str(sam3), floor=0.0)
    for frame in frames:
        found = ours.detect([frame], Vocabulary.parse(WORDS))[0]
        for class_id, phrase in enumerate(WORDS):
            inputs = processor(images=frame.image, text=phrase, return_tensors="pt")
            with torch.inference_mode():
                out = model(**inputs)
            (theirs,) = processor.post_process_instance_segmentation(out, threshold=0.0, target_sizes=[frame.size_hw])
            mine = found[found.class_id == class_id]
            boxes = theirs["boxes"].numpy().clip(0, np.array([frame.size_hw[1], frame.size_hw[0]] * 2))
            inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            assert len(mine) == inside.sum() > 0
            np.testing.assert_allclose(mine.confidence, theirs["scores"].numpy()[inside], atol=1e-4)
            np.testing.assert_allclose(mine.xyxy, boxes[inside], atol=1e-2)
            assert (mine.mask == theirs["masks"].numpy().astype(bool)[inside]).mean() > 0.9999


def test_sam3_needs_no_segmenter_and_can_have_one(sam3, frames):
    whole = load(f"checkpoints.sam3={sam3}", "select.score=0", "detector.floor=0", preset="shapes", detector="sam3")
    assert whole.segmenter is None
    found = whole.segment(frames[0].image, WORDS)
    assert found.mask.shape == (len(found), *frames[0].size_hw) and "mask_score" not in found.data
    words = (f"checkpoints.sam3={sam3}", "select.score=0", "detector.floor=0", "detector.own_masks=false")
    boxes = load(*words, preset="shapes", detector="sam3")
    assert "mask_score" in boxes.segment(frames[0].image, WORDS[:1]).data
    # A floor leaves out what is less sure; a negative phrase takes what it is surer of.
    all_of_it = Sam3(str(sam3), floor=0.0).detect(frames[:1], Vocabulary.parse(WORDS[:1]))[0]
    middle = float(np.median(all_of_it.confidence))
    above = Sam3(str(sam3), floor=middle).detect(frames[:1], Vocabulary.parse(WORDS[:1]))[0]
    assert len(above) == (all_of_it.confidence > middle).sum() > 0
    left = Sam3(str(sam3), floor=0.0).detect(frames[:1], Vocabulary.parse(WORDS[:1], WORDS[1:]))[0]
    assert len(left) < len(all_of_it)
    with pytest.raises(VocabularyError, match="takes 32 of a phrase"):
        Sam3(str(sam3)).detect(frames[:1], Vocabulary.parse(["x" * 90]))


def test_sam3_takes_exemplar_boxes_as_its_processor_does(sam3, frames):
    from transformers import AutoTokenizer, Sam3ImageProcessor, Sam3Model, Sam3Processor

    model = Sam3Model.from_pretrained(sam3)
    processor = Sam3Processor(Sam3ImageProcessor.from_pretrained(sam3), AutoTokenizer.from_pretrained(sam3))
    frame, other = frames[0], frames[1]
    boxes, labels = [[40, 60, 190, 300], [200, 20, 260, 90]], [1, 0]
    exemplars = [
        {"class": WORDS[0], "box": boxes[0], "image": frame.name},
        {"class": WORDS[0], "box": boxes[1], "image": frame.name, "negative": True},
    ]
    ours = Sam3(str(sam3), floor=0.0, exemplars=exemplars)
    found, plain = (model_.detect([frame], Vocabulary.parse(WORDS))[0] for model_ in (ours, Sam3(str(sam3), floor=0.0)))
    inputs = processor(
        images=frame.image, text=WORDS[0], input_boxes=[boxes], input_boxes_labels=[labels], return_tensors="pt"
    )
    with torch.inference_mode():
        out = model(**inputs)
    (theirs,) = processor.post_process_instance_segmentation(out, threshold=0.0, target_sizes=[frame.size_hw])
    corners = theirs["boxes"].numpy().clip(0, np.array([frame.size_hw[1], frame.size_hw[0]] * 2))
    inside = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    mine = found[found.class_id == 0]
    np.testing.assert_allclose(mine.confidence, theirs["scores"].numpy()[inside], atol=1e-4)
    np.testing.assert_allclose(mine.xyxy, corners[inside], atol=1e-2)
    # They tell, and only in their class and picture.
    assert abs(mine.confidence - plain[plain.class_id == 0].confidence).max() > 1e-4
    np.testing.assert_array_equal(found[found.class_id == 1].xyxy, plain[plain.class_id == 1].xyxy)
    apart = [model_.detect([other], Vocabulary.parse(WORDS[:1]))[0] for model_ in (ours, Sam3(str(sam3), floor=0.0))]
    np.testing.assert_array_equal(apart[0].xyxy, apart[1].xyxy)
    with pytest.raises(ImageError, match="lies outside"):
        Sam3(str(sam3), exemplars=[{"class": "a", "box": [0, 0, 5000, 9]}]).detect([frame], Vocabulary.parse(["a"]))
    with pytest.raises(ConfigError, match="leave out them or tiles.size"):
        load("detector=sam3", "tiles.size=64", "detector.exemplars=[{class: a, box: [0, 0, 9, 9]}]", preset="shapes")
    with pytest.raises(ConfigError, match="exemplars name the classes 'car', which text has not"):
        ours.detect([frame], Vocabulary.parse(["wheel"]))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"class": "cup"}, r"exemplars\[0\]: box is missing"),
        ({"class": "cup", "box": [1, 2, 3]}, r"box must be \[x1"),
        ({"class": "cup", "box": [1, 2, 3, 4], "points": [[1, 2]]}, "unknown key 'points'"),
        ({"class": "cup", "box": [1, 2, 3, 4], "negative": "no"}, "negative must be true or false"),
        ({"box": [1, 2, 3, 4]}, "class is missing"),
        ("cup", "expected a mapping"),
    ],
)
def test_what_is_no_exemplar_is_said_before_a_model_loads(entry, says):
    with pytest.raises(ConfigError, match=says):
        Sam3("no/where", exemplars=[entry])


def test_sam3_refuses_other_checkpoints(owlv2):
    with pytest.raises(CheckpointError, match="is a owlv2 checkpoint; expected sam3"):
        Sam3(str(owlv2))
    with pytest.raises(ConfigError, match="detector.floor"):
        Sam3("no/where", floor=2)


@pytest.fixture(scope="module")
def florence2(tmp_path_factory):
    return checkpoints.florence2(tmp_path_factory.mktemp("models") / "florence2")


@pytest.mark.parametrize("task", ["detection", "grounding"])
def test_florence2_gives_what_its_processor_gives(task, florence2, frames):
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(florence2)
    model = Florence2ForConditionalGeneration.from_pretrained(florence2)
    prompt = {"detection": "<OPEN_VOCABULARY_DETECTION>", "grounding": "<CAPTION_TO_PHRASE_GROUNDING>"}[task]
    ours, boxes = Florence2(str(florence2), task=task, max_new_tokens=60), 0
    for frame in frames:
        height, width = frame.size_hw
        found = ours.detect([frame], Vocabulary.parse(WORDS))[0]
        for class_id, phrase in enumerate(WORDS):
            inputs = processor(images=frame.image, text=prompt + phrase, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=60, num_beams=3, do_sample=False)
            text = processor.batch_decode(out, skip_special_tokens=False)[0]
            theirs = processor.post_process_generation(text, task=prompt, image_size=(width, height))[prompt]
            wanted = np.array(theirs["bboxes"], np.float32).reshape(-1, 4)
            wanted = wanted[(wanted[:, 2] > wanted[:, 0]) & (wanted[:, 3] > wanted[:, 1])]
            np.testing.assert_array_equal(found[found.class_id == class_id].xyxy, wanted)
            boxes += len(wanted)
    assert boxes > 3
    assert (found.confidence == 1).all()


def test_florence2_encodes_an_image_once_and_drops_look_alikes(florence2, frames, monkeypatch):
    ours = Florence2(str(florence2), max_new_tokens=60, beams=1)
    calls = []
    monkeypatch.setattr(ours.model.model.vision_tower, "forward", _counted(ours.model.model.vision_tower, calls))
    found = ours.detect(frames[:1], Vocabulary.parse({"thing": WORDS}))[0]
    assert len(calls) == 1
    assert len(found) > 1
    assert set(found.data["class_name"]) == {"thing"}
    # What a negative phrase answers too goes; "Wheel" and "wheel" would be one phrase to `Vocabulary.parse`.
    assert len(ours.detect(frames[:1], Vocabulary.parse(["wheel"]))[0]) > 0
    monkeypatch.setattr("grounded_sam.detectors.florence2.phrases_of", lambda _: (["wheel", "wheel"], [0, -1]))
    assert len(ours.detect(frames[:1], Vocabulary.parse(["wheel"], ["hub"]))[0]) == 0


def _counted(module, calls):
    forward = module.forward

    def counted(*args, **keys):
        calls.append(1)
        return forward(*args, **keys)

    return counted


def test_a_polygon_of_florence2_gives_its_box(florence2):
    ours = Florence2(str(florence2))
    answer = "</s><s>cup<poly><loc_100><loc_200><loc_300><loc_250><loc_150><loc_400></poly></s>"
    np.testing.assert_array_equal(ours._boxes(answer, (1000, 1000)), [[100, 200, 300, 400]])


def test_florence2_refuses_other_checkpoints_and_wrong_values(owlv2):
    with pytest.raises(CheckpointError, match="is a owlv2 checkpoint; expected florence2"):
        Florence2(str(owlv2))
    with pytest.raises(ConfigError, match="detector.task must be grounding or detection, got 'boxes'"):
        Florence2("no/where", task="boxes")
    with pytest.raises(ConfigError, match="detector.beams"):
        Florence2("no/where", beams=0)

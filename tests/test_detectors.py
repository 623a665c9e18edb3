"""Detectors on random weights, compared with the processors of transformers."""

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
from grounded_sam.detectors.rf_detr import RfDetr
from grounded_sam.detectors.sam3 import Sam3
from grounded_sam.media.images import read_image
from grounded_sam.structures.frame import Frame

PHRASES = ["car", "a red wheel", "dog's toy"]


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    return checkpoints.owlv2(tmp_path_factory.mktemp("models") / "owlv2")


@pytest.fixture(scope="module")
def omdet(tmp_path_factory):
    return checkpoints.omdet_turbo(tmp_path_factory.mktemp("models") / "omdet")


@pytest.fixture(scope="module")
def frames(photos):
    """A wide image, a narrow one, and one of odd width."""
    names = ["coffee.png", "chelsea.png", "orientation/hopper_orientation_2.jpg"]
    images = [read_image(photos / name) for name in names]
    images[2] = np.ascontiguousarray(images[2][:, :77])
    return [Frame(pixels=image, index=i, name=str(i)) for i, image in enumerate(images)]


def clip_boxes(boxes, size_hw):
    """Clip boxes of a processor to the image, as detectors do, and return which ones are not empty then."""
    height, width = size_hw
    clipped = boxes.numpy().astype(np.float32).clip(0, np.array([width, height, width, height], np.float32))
    return clipped, (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def assert_same(detections, expected, size_hw):
    """Compare detections with a processor's as sets, since queries with equal scores have no order."""
    boxes, inside = clip_boxes(expected["boxes"], size_hw)
    rows = np.column_stack([expected["labels"].numpy(), expected["scores"].numpy(), boxes])[inside]
    actual = np.column_stack([detections.class_id, detections.confidence, detections.xyxy])
    assert len(actual) == len(rows) > 0
    order, expected_order = (np.lexsort(table.round(3).T[::-1]) for table in (actual, rows))
    np.testing.assert_allclose(actual[order], rows[expected_order], atol=1e-2)
    np.testing.assert_allclose(actual[order][:, 1], rows[expected_order][:, 1], atol=1e-4)


def test_owlv2_equals_its_processor(owlv2, frames):
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    processor, model = Owlv2Processor.from_pretrained(owlv2), Owlv2ForObjectDetection.from_pretrained(owlv2)
    results = Owlv2(str(owlv2), batch_size=3).detect(frames, Vocabulary.parse(PHRASES))
    for frame, detections in zip(frames, results, strict=True):
        inputs = processor(text=[PHRASES], images=frame.image, return_tensors="pt")
        with torch.inference_mode():
            out = model(**inputs)
        (expected,) = processor.post_process_grounded_object_detection(out, 0.0, torch.tensor([frame.size_hw]))
        assert_same(detections, expected, frame.size_hw)
        assert len(set(detections.class_id.tolist())) > 1


def test_omdet_turbo_equals_its_processor(omdet, frames):
    from transformers import OmDetTurboForObjectDetection, OmDetTurboProcessor

    processor = OmDetTurboProcessor.from_pretrained(omdet)
    model = OmDetTurboForObjectDetection.from_pretrained(omdet)
    results = OmdetTurbo(str(omdet), batch_size=3).detect(frames, Vocabulary.parse(PHRASES))
    for frame, detections in zip(frames, results, strict=True):
        inputs = processor(images=frame.image, text=PHRASES, return_tensors="pt")
        with torch.inference_mode():
            out = model(**inputs)
        (expected,) = processor.post_process_grounded_object_detection(
            out, threshold=0.0, nms_threshold=1.0, target_sizes=[frame.size_hw]
        )
        assert_same(detections, expected, frame.size_hw)


@pytest.mark.parametrize("detector_class", [Owlv2, OmdetTurbo])
def test_phrases_are_merged_to_classes_and_negatives_dropped(detector_class, owlv2, omdet, frames):
    detector = detector_class(str(owlv2 if detector_class is Owlv2 else omdet))
    separate = detector.detect(frames[:1], Vocabulary.parse(PHRASES))[0]
    merged = detector.detect(frames[:1], Vocabulary.parse({"thing": PHRASES[:2], "toy": PHRASES[2]}))[0]
    assert set(merged.data["class_name"]) <= {"thing", "toy"}
    if detector_class is Owlv2:  # each query gives one detection, of its best phrase
        np.testing.assert_array_equal(merged.confidence, separate.confidence)
        np.testing.assert_array_equal(merged.class_id, np.where(separate.class_id < 2, 0, 1))
        positive = detector.detect(frames[:1], Vocabulary.parse(PHRASES[:2], [PHRASES[2]]))[0]
        assert len(positive) == (separate.class_id < 2).sum() > 0
    many = detector.detect(frames[:1], Vocabulary.parse([f"thing {i}" for i in range(60)]))[0]
    assert len(many) > 0 and many.class_id.max() < 60
    with pytest.raises(VocabularyError, match="takes at most 16 per phrase|longer than the 77 tokens"):
        detector.detect(frames[:1], Vocabulary.parse(["x" * 90]))


def test_owlv2_examples_equal_image_guided_detection(owlv2, frames, photos, tmp_path):
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    crop = tmp_path / "cup.png"
    Image.fromarray(frames[0].image[100:300, 150:400]).save(crop)
    examples = {"cup": [str(crop), {"image": str(photos / "coffee.png"), "box": [150, 100, 400, 300]}]}
    detector = Owlv2(str(owlv2), examples=examples)
    assert detector.vocabulary.classes == ("cup",)
    detections = detector.detect(frames[1:2], detector.vocabulary)[0]
    processor = Owlv2Processor.from_pretrained(owlv2)
    upstream = Owlv2ForObjectDetection.from_pretrained(owlv2)
    inputs = processor(images=frames[1].image, query_images=read_image(crop), return_tensors="pt")
    with torch.inference_mode():
        out = upstream.image_guided_detection(**inputs)
    scores = out.logits[0, :, 0].sigmoid().numpy()
    nearest = np.abs(detections.confidence[:, None] - scores[None]).min(1)  # boxes outside the image are dropped
    assert len(detections) > 10 and nearest.max() < 1e-4
    # Together with text, and through the pipeline without any text.
    with_text = detector.detect(frames[1:2], Vocabulary.parse(["dog", "cup"]))[0]
    assert with_text.confidence.max() >= detections.confidence.max() - 1e-6
    override = f"detector.examples={{cup: ['{crop}']}}"
    pipeline = load(override, f"checkpoints.owlv2={owlv2}", "select.score=0", detector="owlv2", segmenter=None)
    assert set(pipeline.detect(frames[1].image).data["class_name"]) == {"cup"}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"cup": [{"image": "PHOTO"}]}, "expected an image or"),
        ({"cup": []}, "no example"),
        ({"cup": [{"image": "PHOTO", "box": [900, 900, 950, 950]}]}, "box .* lies outside .* 600x400 px"),
    ],
)
def test_malformed_examples_are_refused_before_a_model_loads(examples, message, photos):
    examples = {
        name: [{**entry, "image": str(photos / "coffee.png")} for entry in entries]
        for name, entries in examples.items()
    }
    with pytest.raises(ConfigError, match=f"detector.examples.cup.*{message}"):
        Owlv2("no/where", examples=examples)


def test_checkpoints_of_another_family_are_refused(owlv2, omdet):
    with pytest.raises(CheckpointError, match=re.escape(f"{omdet} is a omdet-turbo checkpoint; expected owlv2")):
        Owlv2(str(omdet))
    with pytest.raises(CheckpointError, match="expected omdet-turbo"):
        OmdetTurbo(str(owlv2))


@pytest.fixture(scope="module")
def sam3(tmp_path_factory):
    return checkpoints.sam3(tmp_path_factory.mktemp("models") / "sam3")


def sam3_upstream(folder, kind="Sam3Model"):
    """Return model and processor of transformers."""
    import transformers
    from transformers import AutoTokenizer, Sam3ImageProcessor, Sam3Processor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder)
    return model, Sam3Processor(Sam3ImageProcessor.from_pretrained(folder), tokenizer)


def assert_same_instances(detections, expected, size_hw):
    """Compare detections with SAM 3's processor, and return which of its instances lie inside the image."""
    boxes, inside = clip_boxes(expected["boxes"], size_hw)
    assert len(detections) == inside.sum() > 0
    np.testing.assert_allclose(detections.confidence, expected["scores"].numpy()[inside], atol=1e-4)
    np.testing.assert_allclose(detections.xyxy, boxes[inside], atol=1e-2)
    return inside


@pytest.fixture(scope="module")
def sam3_lite_text(tmp_path_factory):
    return checkpoints.sam3_lite_text(tmp_path_factory.mktemp("models") / "sam3_lite_text")


@pytest.mark.parametrize("kind", ["Sam3Model", "Sam3LiteTextModel"])
def test_sam3_equals_its_processor(kind, sam3, sam3_lite_text, frames):
    folder = sam3 if kind == "Sam3Model" else sam3_lite_text
    model, processor = sam3_upstream(folder, kind)
    detector = Sam3(str(folder), min_score=0.0)
    for frame in frames:
        detections = detector.detect([frame], Vocabulary.parse(PHRASES))[0]
        for class_id, phrase in enumerate(PHRASES):
            inputs = processor(images=frame.image, text=phrase, return_tensors="pt")
            with torch.inference_mode():
                out = model(**inputs)
            (expected,) = processor.post_process_instance_segmentation(out, threshold=0.0, target_sizes=[frame.size_hw])
            actual = detections[detections.class_id == class_id]
            inside = assert_same_instances(actual, expected, frame.size_hw)
            assert (actual.mask == expected["masks"].numpy().astype(bool)[inside]).mean() > 0.9999


def test_sam3_needs_no_segmenter_but_can_use_one(sam3, frames):
    overrides = (f"checkpoints.sam3={sam3}", "select.score=0", "detector.min_score=0")
    pipeline = load(*overrides, preset="shapes", detector="sam3")
    assert pipeline.segmenter is None
    detections = pipeline.segment(frames[0].image, PHRASES)
    assert detections.mask.shape == (len(detections), *frames[0].size_hw) and "mask_score" not in detections.data
    pipeline = load(*overrides, "detector.own_masks=false", preset="shapes", detector="sam3")
    assert "mask_score" in pipeline.segment(frames[0].image, PHRASES[:1]).data


def test_the_choice_sam3_lite_text_runs(sam3_lite_text, frames):
    overrides = (f"checkpoints.sam3_lite_text={sam3_lite_text}", "select.score=0", "detector.min_score=0")
    detections = load(*overrides, detector="sam3_lite_text").segment(frames[0].image, PHRASES)
    assert len(detections) and detections.mask.shape == (len(detections), *frames[0].size_hw)


def test_sam3_drops_low_scores_and_detections_of_negatives(sam3, frames):
    every = Sam3(str(sam3), min_score=0.0).detect(frames[:1], Vocabulary.parse(PHRASES[:1]))[0]
    median = float(np.median(every.confidence))
    above = Sam3(str(sam3), min_score=median).detect(frames[:1], Vocabulary.parse(PHRASES[:1]))[0]
    assert len(above) == (every.confidence > median).sum() > 0
    positive = Sam3(str(sam3), min_score=0.0).detect(frames[:1], Vocabulary.parse(PHRASES[:1], PHRASES[1:]))[0]
    assert len(positive) < len(every)
    with pytest.raises(VocabularyError, match="takes at most 32 per phrase"):
        Sam3(str(sam3)).detect(frames[:1], Vocabulary.parse(["x" * 90]))


def test_sam3_exemplars_equal_its_processor(sam3, frames):
    model, processor = sam3_upstream(sam3)
    frame, other = frames[0], frames[1]
    boxes, labels = [[40, 60, 190, 300], [200, 20, 260, 90]], [1, 0]
    exemplars = [
        {"class": PHRASES[0], "box": boxes[0], "image": frame.name},
        {"class": PHRASES[0], "box": boxes[1], "image": frame.name, "negative": True},
    ]
    detectors = [Sam3(str(sam3), min_score=0.0, exemplars=exemplars), Sam3(str(sam3), min_score=0.0)]
    detections, plain = (detector.detect([frame], Vocabulary.parse(PHRASES))[0] for detector in detectors)
    inputs = processor(
        images=frame.image, text=PHRASES[0], input_boxes=[boxes], input_boxes_labels=[labels], return_tensors="pt"
    )
    with torch.inference_mode():
        out = model(**inputs)
    (expected,) = processor.post_process_instance_segmentation(out, threshold=0.0, target_sizes=[frame.size_hw])
    actual = detections[detections.class_id == 0]
    assert_same_instances(actual, expected, frame.size_hw)
    # They have an effect, and only on their class and image.
    assert abs(actual.confidence - plain[plain.class_id == 0].confidence).max() > 1e-4
    np.testing.assert_array_equal(detections[detections.class_id == 1].xyxy, plain[plain.class_id == 1].xyxy)
    others = [detector.detect([other], Vocabulary.parse(PHRASES[:1]))[0] for detector in detectors]
    np.testing.assert_array_equal(others[0].xyxy, others[1].xyxy)
    with pytest.raises(ConfigError, match="exemplars name classes that are not in text: 'car'; text has 'wheel'"):
        detectors[0].detect([frame], Vocabulary.parse(["wheel"]))


def test_sam3_exemplars_need_whole_images_that_contain_them(sam3, frames):
    with pytest.raises(ImageError, match="lies outside"):
        Sam3(str(sam3), exemplars=[{"class": "a", "box": [0, 0, 5000, 9]}]).detect(frames[:1], Vocabulary.parse(["a"]))
    with pytest.raises(ConfigError, match="tiles.size"):
        load("detector=sam3", "tiles.size=64", "detector.exemplars=[{class: a, box: [0, 0, 9, 9]}]", preset="shapes")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": "cup"}, r"exemplars\[0\]: box is missing"),
        ({"class": "cup", "box": [1, 2, 3]}, r"box must be \[x1"),
        ({"class": "cup", "box": [1, 2, 3, 4], "points": [[1, 2]]}, "unknown key 'points'"),
        ({"class": "cup", "box": [1, 2, 3, 4], "negative": "no"}, "negative must be true or false"),
        ({"box": [1, 2, 3, 4]}, "class is missing"),
        ("cup", "expected a mapping"),
    ],
)
def test_malformed_exemplars_are_refused_before_a_model_loads(entry, message):
    with pytest.raises(ConfigError, match=message):
        Sam3("no/where", exemplars=[entry])


def test_sam3_refuses_other_checkpoints_and_wrong_settings(owlv2):
    with pytest.raises(CheckpointError, match="is a owlv2 checkpoint; expected sam3"):
        Sam3(str(owlv2))
    with pytest.raises(ConfigError, match="detector.min_score"):
        Sam3("no/where", min_score=2)


@pytest.fixture(scope="module")
def florence2(tmp_path_factory):
    return checkpoints.florence2(tmp_path_factory.mktemp("models") / "florence2")


@pytest.mark.parametrize("task", ["detection", "grounding"])
def test_florence2_equals_its_processor(task, florence2, frames):
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(florence2)
    model = Florence2ForConditionalGeneration.from_pretrained(florence2)
    prompt = {"detection": "<OPEN_VOCABULARY_DETECTION>", "grounding": "<CAPTION_TO_PHRASE_GROUNDING>"}[task]
    detector, count = Florence2(str(florence2), task=task, max_new_tokens=24), 0
    for frame in frames:
        height, width = frame.size_hw
        detections = detector.detect([frame], Vocabulary.parse(PHRASES))[0]
        for class_id, phrase in enumerate(PHRASES):
            inputs = processor(images=frame.image, text=prompt + phrase, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=24, num_beams=3, do_sample=False)
            text = processor.batch_decode(out, skip_special_tokens=False)[0]
            expected = processor.post_process_generation(text, task=prompt, image_size=(width, height))[prompt]
            boxes = np.array(expected["bboxes"], np.float32).reshape(-1, 4)
            boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
            np.testing.assert_array_equal(detections[detections.class_id == class_id].xyxy, boxes)
            count += len(boxes)
        assert (detections.confidence == 1).all()
    assert count > 3


def test_florence2_encodes_an_image_once_and_drops_negatives(florence2, frames, monkeypatch):
    detector = Florence2(str(florence2), max_new_tokens=60, beams=1)
    calls, tower = [], detector.model.model.vision_tower
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    detections = detector.detect(frames[:1], Vocabulary.parse({"thing": PHRASES}))[0]
    assert len(calls) == 1
    assert len(detections) > 1
    assert set(detections.data["class_name"]) == {"thing"}
    # `Vocabulary.parse` takes no phrase twice, so the same phrase is made a negative here.
    assert len(detector.detect(frames[:1], Vocabulary.parse(["wheel"]))[0]) > 0
    monkeypatch.setattr("grounded_sam.detectors.florence2.phrases_of", lambda _: (["wheel", "wheel"], [0, -1]))
    assert len(detector.detect(frames[:1], Vocabulary.parse(["wheel"], ["hub"]))[0]) == 0


def test_a_polygon_of_florence2_becomes_the_box_around_it(florence2):
    detector = Florence2(str(florence2))
    text = "</s><s>cup<poly><loc_100><loc_200><loc_300><loc_250><loc_150><loc_400></poly></s>"
    np.testing.assert_array_equal(detector._parse(text, (1000, 1000)), [[100, 200, 300, 400]])


def test_florence2_refuses_other_checkpoints_and_wrong_settings(owlv2):
    with pytest.raises(CheckpointError, match="is a owlv2 checkpoint; expected florence2"):
        Florence2(str(owlv2))
    with pytest.raises(ConfigError, match="detector.task must be grounding or detection, got 'boxes'"):
        Florence2("no/where", task="boxes")
    with pytest.raises(ConfigError, match="detector.beams"):
        Florence2("no/where", beams=0)


@pytest.fixture(scope="module")
def rf_detr(tmp_path_factory):
    return checkpoints.rf_detr(tmp_path_factory.mktemp("models") / "rf_detr")


def test_rf_detr_equals_its_processor(rf_detr, frames):
    from transformers import RfDetrForInstanceSegmentation, RfDetrImageProcessor

    model = RfDetrForInstanceSegmentation.from_pretrained(rf_detr)
    processor = RfDetrImageProcessor.from_pretrained(rf_detr)
    detector = RfDetr(str(rf_detr), min_score=0.0)
    assert detector.vocabulary.classes == ("car", "wheel", "traffic light", "dog")
    for frame in frames:
        detections = detector.detect([frame], detector.vocabulary)[0]
        inputs = processor(images=frame.image, return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs)
        out.logits[..., [0, 4]] = -50  # labels that are no class
        (boxes,) = processor.post_process_object_detection(out, threshold=0.0, target_sizes=[frame.size_hw])
        names = [model.config.id2label[int(label)] for label in boxes["labels"]]
        boxes["labels"] = torch.tensor([detector.vocabulary.classes.index(name) for name in names])
        assert_same(detections, boxes, frame.size_hw)
        (masks,) = processor.post_process_instance_segmentation(
            out, threshold=0.0, target_sizes=[frame.size_hw], return_binary_maps=True
        )
        scores = np.array([info["score"] for info in masks["segments_info"]])  # of those whose mask is not empty
        for mask, confidence in zip(detections.mask, detections.confidence, strict=True):
            if mask.any():
                same = np.flatnonzero(np.abs(scores - confidence) < 1e-5)
                assert any((masks["segmentation"][i].numpy() == mask).mean() > 0.9999 for i in same)


def test_rf_detr_names_the_phrases_that_it_does_not_know(rf_detr, frames, tmp_path):
    detector = RfDetr(str(rf_detr), min_score=0.0)
    words = Vocabulary.parse({"vehicle": ["Car", "truck"], "light": "Traffic  Light", "helmet": "helmet"})
    detections = detector.detect(frames[:1], words)[0]
    assert set(detections.data["class_name"]) == {"vehicle", "light"}
    detector.detect(frames[1:], words)
    (skipped,) = detector.take_refused()
    assert skipped.file == "text" and "does not know 'truck', 'helmet'; its classes are car, wheel" in skipped.reason
    with pytest.raises(ConfigError, match="knows none of 'helmet'; its classes are car, wheel, traffic light, dog"):
        detector.detect(frames[:1], Vocabulary.parse(["helmet"]))
    positive = detector.detect(frames[:1], Vocabulary.parse(["car"], ["dog"]))[0]
    every = detector.detect(frames[:1], Vocabulary.parse(["car"]))[0]
    assert len(positive) < len(every)
    overrides = (f"checkpoints.rf_detr={rf_detr}", "select.score=0", "detector.min_score=0")
    pipeline = load(*overrides, detector="rf_detr")
    assert pipeline.segmenter is None and pipeline.segment(frames[0].image).mask.any()
    boxes = load(*overrides, "detector.own_masks=false", preset="shapes", detector="rf_detr", segmenter="none")
    assert boxes.segment(frames[0].image, ["car"]).mask is None


def test_rf_detr_refuses_other_checkpoints(owlv2):
    with pytest.raises(CheckpointError, match="is a owlv2 checkpoint; expected rf_detr"):
        RfDetr(str(owlv2))

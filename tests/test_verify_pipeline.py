"""The verify stage in the pipeline: selection, presence, sweeps, stores, videos, and exclusive classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from fakes import CLASSES, Fill, Halves, boxes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import Pipeline, Select
from grounded_sam.config.build import build
from grounded_sam.config.compose import compose
from grounded_sam.detectors.stored import StoredDetector
from grounded_sam.errors import ConfigError, VocabularyError
from grounded_sam.formats.store import StoreReader
from grounded_sam.pipeline.images import process_images
from grounded_sam.pipeline.prediction_cache import CachedStages, PredictionCache
from grounded_sam.pipeline.refine import Refine
from grounded_sam.pipeline.runner import Runner
from grounded_sam.pipeline.select import select_detections
from grounded_sam.pipeline.tiles import Tiles
from grounded_sam.sinks.jsonl import JsonLinesSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.stored import StoreSource
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class ByBrightness:
    """A verifier whose score is the mean brightness of the box.

    Attributes:
        judged: Number of detections in each call so far.
    """

    def __init__(self, min_score: float = 0.1) -> None:
        self.min_score, self.judged = min_score, list[int]()

    def verify(
        self, images: Sequence[np.ndarray], detections: Sequence[sv.Detections], vocabulary: Vocabulary
    ) -> list[sv.Detections]:
        results = []
        for image, part in zip(images, detections, strict=True):
            result = select_rows(part, np.arange(len(part)))
            corners = result.xyxy.astype(int).tolist()
            score = np.array([image[y1:y2, x1:x2].mean() / 255 for x1, y1, x2, y2 in corners], np.float32)
            result.data |= {"verify_score": score, "calibrated_score": np.sqrt(score * result.confidence)}
            names = result.data["class_name"]
            result.metadata["presence"] = {str(n): float(score[names == n].max()) for n in np.unique(names)}
            self.judged.append(len(result))
            results.append(result)
        return results


def picture(left: int, right: int, size: int = 20) -> np.ndarray:
    """An image of two halves of these gray levels."""
    image = np.zeros((size, 2 * size, 3), np.uint8)
    image[:, :size], image[:, size:] = left, right
    return image


def model(score: str = "text", select: Select | None = None, **options: object) -> Pipeline:
    verifier = options.pop("verifier", None) or ByBrightness()
    return Pipeline(
        Halves(), Fill(), select or Select(), CLASSES, refine=Refine(score=score), verifier=verifier, **options
    )


def test_scores_are_added_and_thresholded():
    found = model().segment(picture(200, 50))
    np.testing.assert_allclose(found.data["verify_score"], [200 / 255, 50 / 255], atol=1e-6)
    assert found.confidence.tolist() == pytest.approx([0.9, 0.45])
    assert model(select=Select(verify=0.5)).segment(picture(200, 50)).data["class_name"].tolist() == ["a"]
    assert model().segment(picture(200, 50), verify=0.9, score=0.0).confidence.tolist() == []
    assert found.metadata["presence"] == pytest.approx({"a": 200 / 255, "c": 50 / 255})


def test_presence_drops_all_detections_of_an_absent_class():
    kept = model(select=Select(presence=0.5)).segment(picture(200, 50))
    assert kept.data["class_name"].tolist() == ["a"]
    nothing = model(select=Select(presence=0.9)).segment(picture(200, 50))
    assert len(nothing) == 0 and set(nothing.metadata["presence"]) == {"a", "c"}


@pytest.mark.parametrize(("score", "expected"), [("verify", [0.8, 0.2]), ("calibrated", [0.8485, 0.3]), ("text", None)])
def test_the_confidence_may_come_from_the_verifier(score, expected):
    """The detector's order is reversed: its own threshold must not drop what the verifier likes."""
    found = model(score, Select(score=0.0)).segment(picture(51, 204))
    if expected is None:
        assert found.confidence.tolist() == pytest.approx([0.9, 0.45])
        return
    first = expected if score == "verify" else [np.sqrt(0.45 * 0.8), np.sqrt(0.9 * 0.2)]
    assert found.confidence.tolist() == pytest.approx(first, abs=1e-3)
    assert found.data["class_name"].tolist() == ["c", "a"]


def test_only_candidates_of_the_detector_are_judged():
    verifier = ByBrightness(min_score=0.5)
    found = model("verify", Select(score=0.0), verifier=verifier).segment(picture(10, 250))
    assert verifier.judged == [1] and found.data["class_name"].tolist() == ["a"]


def test_a_verified_duplicate_survives_an_unverified_one():
    """NMS comes after verification: the more confident box is wrong, the other one is right."""

    class Twice:
        def detect(self, frames, vocabulary):
            return [boxes((0, 0, 20, 20, 0.9, 0), (0, 0, 19, 20, 0.8, 0), size_hw=(20, 40)) for _ in frames]

    image = picture(250, 0)
    image[:, 19] = 0
    image[:, 20:] = 0
    both = Pipeline(Twice(), Fill(), Select(verify=0.95), CLASSES, verifier=ByBrightness())
    assert both.segment(image).xyxy.tolist() == [[0, 0, 19, 20]]


def test_selection_by_what_nobody_judged_is_an_error():
    plain = boxes((0, 0, 9, 9, 0.9, 0))
    for settings, key in ((Select(verify=0.5), "select.verify"), (Select(presence=0.5), "select.presence")):
        with pytest.raises(ConfigError, match=f"{key} needs .*verify=siglip2"):
            select_detections(plain, settings, CLASSES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["select.verify=0.5"], "select.verify needs a verifier; choose one, e.g. verify=siglip2"),
        (["select.presence=0.5"], "select.presence needs a verifier, or detector=sam3"),
        (["refine.score=calibrated"], "refine.score=calibrated needs a verifier"),
        (["select.verify=2"], "select.verify must be null or a number from 0 to 1"),
        (
            ["verify=siglip2", "detector=none", "segmenter=none", "tracker=sam3_video"],
            "verify judges what a detector finds, and there is none",
        ),
    ],
)
def test_settings_that_need_a_verifier_are_checked_before_weights_are_loaded(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(compose(["text=[a]", *overrides]))


@pytest.mark.parametrize("choice", ["siglip2", "clip", "shapes"])
def test_every_choice_composes(choice):
    cfg = compose([f"verify={choice}"])
    assert cfg.verify._target_.endswith("ImageTextVerifier")
    assert cfg.refine.score == ("calibrated" if choice == "shapes" else "text")
    assert compose([]).verify is None


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    for i, levels in enumerate([(200, 50), (60, 220), (10, 10)]):
        Image.fromarray(picture(*levels)).save(folder / f"{i}.png")
    return folder


def as_rows(result: FrameResult) -> list[tuple]:
    """Everything that a sink could write of a result."""
    packed = result.packed
    columns = [packed.xyxy.tolist(), packed.confidence.tolist(), packed.class_id.tolist()]
    columns += [packed.data[name].tolist() if name in packed.data else [] for name in ("mask_score", "verify_score")]
    columns.append([rle["counts"] for rle in packed.data.get("rle", [])])
    return [result.frame.name, *columns, dict(packed.metadata.get("presence") or {})]


@pytest.mark.parametrize("score", ["text", "verify", "calibrated"])
def test_stored_and_replayed_results_equal_direct_ones(tmp_path, score):
    folder = write_pictures(tmp_path / "in")
    pipeline = model(score, Select(score=0.2))
    direct = list(process_images(iter(ImageSource(folder)), CLASSES, pipeline.stages))
    settings = {"select": {"score": 0.2}}
    Runner(pipeline, ImageSource(folder), [StoreSink(tmp_path / "out", CLASSES, settings)], tmp_path / "out").run()
    reader = StoreReader(tmp_path / "out" / "store")
    stored = [result for key in list(reader.keys()) for result in reader.read(key, CLASSES)]
    assert [as_rows(result) for result in stored] == [as_rows(result) for result in direct]
    # The thresholds of the verifier are applied to stored scores, and nothing is judged again.
    for settings in (Select(score=0.2, verify=0.5), Select(score=0.2, presence=0.5)):
        verifier = ByBrightness()
        replay = Pipeline(StoredDetector(), None, settings, CLASSES, verifier=verifier)
        replayed = list(process_images(iter(StoreSource(tmp_path / "out")), CLASSES, replay.stages))
        again = list(process_images(iter(ImageSource(folder)), CLASSES, model(score, settings).stages))
        assert [as_rows(result) for result in replayed] == [as_rows(result) for result in again]
        assert verifier.judged == []


def test_stored_labels_can_be_verified_later(tmp_path):
    folder = write_pictures(tmp_path / "in")
    plain = Pipeline(Halves(), Fill(), Select(), CLASSES)
    Runner(plain, ImageSource(folder), [StoreSink(tmp_path / "out", CLASSES)], tmp_path / "out").run()
    later = Pipeline(StoredDetector(), None, Select(verify=0.5), CLASSES, verifier=ByBrightness())
    results = process_images(iter(StoreSource(tmp_path / "out")), CLASSES, later.stages)
    assert [list(result.raw.data.get("class_name", [])) for result in results] == [["a"], ["c"], []]


def test_stores_without_verification_keep_their_fingerprint(tmp_path):
    """A store of an earlier version goes on with the same settings: new keys without a value are not recorded."""
    from grounded_sam.formats.store_runs import fingerprint

    before = {"select": {"score": 0.3}, "refine": {"score": "text"}}
    now = {"select": {"score": 0.3, "verify": None, "presence": None}, "refine": {"score": "text"}, "verify": None}
    assert fingerprint(before, CLASSES) == fingerprint(now, CLASSES)
    verified = {**now, "verify": {"_target_": "x.Verifier"}}
    assert fingerprint(verified, CLASSES) != fingerprint(now, CLASSES)


@pytest.mark.parametrize("score", ["text", "calibrated"])
def test_swept_results_equal_direct_ones(tmp_path, score):
    folder = write_pictures(tmp_path / "in")
    jobs = [
        Select(score=0.2, verify=0.5),
        Select(score=0.5, nms=0.3),
        Select(score=0.0, presence=0.3, top_k=1),
        Select(score=0.1, class_agnostic=True),
    ]
    verifier = ByBrightness()
    for number, settings in enumerate(jobs):
        pipeline = model(score, settings, verifier=verifier)
        candidates = pipeline.stages.before_masks()
        cache = PredictionCache(tmp_path / "shared", CLASSES, {}, settings, candidates=candidates)
        pipeline.stages = CachedStages(pipeline.stages, cache, None)
        results: list[FrameResult] = []

        class Keep:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                pass

            def write(self, result, results=results):
                results.append(result)

            def summary(self):
                return ""

        Runner(pipeline, ImageSource(folder), [Keep()], tmp_path / f"out{number}").run()
        direct = process_images(iter(ImageSource(folder)), CLASSES, model(score, settings).stages)
        assert [as_rows(result) for result in results] == [as_rows(result) for result in direct]
        assert cache.replayed == (0 if number == 0 else 3)
    assert sum(verifier.judged) == 6  # two halves of three images, once


def test_the_score_is_written_to_files(tmp_path):
    folder = write_pictures(tmp_path / "in")
    Runner(model(), ImageSource(folder), [JsonLinesSink(tmp_path, CLASSES)], tmp_path).run()
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert first["objects"][0]["verify_score"] == pytest.approx(200 / 255, abs=1e-5)


def test_tiles_are_verified_on_the_whole_image():
    pipeline = model("verify", Select(score=0.0), tiles=Tiles(size=40, overlap=0.0, whole=False))
    found = pipeline.segment(picture(200, 50, size=40))
    assert len(found) and set(found.data) >= {"verify_score", "calibrated_score"}


# Classes that exclude each other

HELMETS = Vocabulary.parse({"classes": ["helmet", "no helmet", "person"], "exclusive": [["helmet", "no helmet"]]})


def helmets(*rows: tuple, verify: Sequence[float] | None = None) -> sv.Detections:
    detections = boxes(*rows)
    detections.data["class_name"] = np.array(HELMETS.classes)[detections.class_id]
    if verify is not None:
        detections.data["verify_score"] = np.array(verify, np.float32)
    return detections


def test_an_object_is_only_one_of_exclusive_classes():
    rows = ((0, 0, 40, 40, 0.9, 0), (0, 0, 40, 38, 0.8, 1), (0, 0, 40, 40, 0.7, 2), (60, 60, 90, 90, 0.6, 1))
    by_score = select_detections(helmets(*rows), Select(), HELMETS)
    assert by_score.class_id.tolist() == [0, 2, 1]
    by_verify = select_detections(helmets(*rows, verify=[0.2, 0.9, 0.5, 0.5]), Select(), HELMETS)
    assert by_verify.class_id.tolist() == [1, 2, 1]
    everything = select_detections(helmets(*rows), Select(), HELMETS.overlapping)
    assert len(everything) == 4


def test_what_a_person_accepted_is_not_excluded():
    detections = helmets((0, 0, 40, 40, 0.9, 0), (0, 0, 40, 38, 0.8, 1))
    detections.data["status"] = np.array(["predicted", "accepted"])
    assert select_detections(detections, Select(), HELMETS).class_id.tolist() == [1]


ROW = st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0.05, 1), st.integers(0, 2), st.floats(0, 1))


@given(st.lists(ROW, max_size=8))
def test_no_two_exclusive_classes_are_on_one_object(rows):
    table = [(10 * x, 10 * y, 10 * x + 35, 10 * y + 35, score, class_id) for x, y, score, class_id, _ in rows]
    settings = Select(score=0.1, nms=0.7)
    selected = select_detections(helmets(*table, verify=[row[4] for row in rows]), settings, HELMETS)
    iou = sv.box_iou_batch(selected.xyxy, selected.xyxy) if len(selected) else np.zeros((0, 0))
    for i, a in enumerate(selected.class_id.tolist()):
        for j, b in enumerate(selected.class_id.tolist()):
            assert {a, b} != {0, 1} or iou[i, j] < 0.5
    again = select_detections(selected, settings, HELMETS)
    assert again.xyxy.tolist() == selected.xyxy.tolist()


@pytest.mark.parametrize(
    ("groups", "message"),
    [([["helmet", "cap"]], "'cap' is no class"), ([["helmet"]], "too short"), ("helmet", "not of type 'array'")],
)
def test_groups_of_unknown_or_single_classes_are_refused(groups, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.parse({"classes": ["helmet", "no helmet"], "exclusive": groups})


def test_groups_survive_files_merging_and_stores(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("classes: [helmet, no helmet]\nexclusive: [[helmet, no helmet]]\n")
    words = Vocabulary.parse(str(path))
    assert words.exclusive == (("helmet", "no helmet"),)
    assert Vocabulary.parse(["person", "Helmet"]).merged_with(words).exclusive == (("Helmet", "no helmet"),)
    detections = helmets((0, 0, 40, 40, 0.9, 0))
    with StoreSink(tmp_path, words) as sink:
        sink.write(
            FrameResult(frame=Frame(pixels=np.zeros((100, 100, 3), np.uint8), name="a.png"), detections=detections)
        )
    assert StoreReader(tmp_path / "store").vocabulary.exclusive == words.exclusive


# Videos


def test_tracks_have_the_mean_verify_score_of_their_keyframes():
    from fakes import ByLevel, Levels

    class OfFrame(ByBrightness):
        """A verifier whose score falls with every call."""

        def verify(self, images, detections, vocabulary):
            results = super().verify(images, detections, vocabulary)
            for result in results:
                result.data["verify_score"][:] = 1 - 0.2 * len(self.judged)
            return results

    from grounded_sam.pipeline.track_settings import TrackSettings

    frames = []
    for i in range(6):
        image = np.zeros((60, 80, 3), np.uint8)
        image[10:40, 10 + 2 * i : 40 + 2 * i] = 50
        frames.append(image)
    settings = TrackSettings(redetect_every=3)
    pipeline = Pipeline(Levels(), None, Select(), CLASSES, tracker=ByLevel(), track=settings, verifier=OfFrame())
    scores = [result.detections.data["verify_score"].tolist() for result in pipeline.track(frames)]
    assert np.array(scores).ravel() == pytest.approx([0.8] * 3 + [0.7] * 3)
    strict = Pipeline(
        Levels(), None, Select(verify=0.9), CLASSES, tracker=ByLevel(), track=settings, verifier=OfFrame()
    )
    assert all(not len(result.detections) for result in strict.track(frames))


# The small model


@pytest.fixture(scope="module")
def scene_images() -> list[tuple[np.ndarray, list]]:
    """Scenes of an independent generator, with their objects."""
    from independent import random_scene

    return [random_scene(np.random.default_rng([71, i]), [], count=4) for i in range(6)]


def test_the_small_model_tells_colors_and_shapes(scene_images):
    """On true boxes and masks: the right pair scores high, those of another color or shape low."""
    from independent import COLORS, SHAPES

    from grounded_sam.structures.detections import make_detections
    from grounded_sam.verifiers.image_text import ImageTextVerifier

    verifier = ImageTextVerifier("builtin:shapes", crops="masked", dim=1.0, score="sigmoid", device="cpu")
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    words = Vocabulary.parse(names)
    right, wrong = [], []
    for image, objects in scene_images:
        for item in objects:
            alike = [i for i, name in enumerate(names) if item.color in name or item.shape in name]
            count = len(alike)
            detections = make_detections(
                [item.box] * count, [0.5] * count, alike, words, image.shape[:2], mask=np.stack([item.mask] * count)
            )
            for i, score in zip(
                alike, verifier.verify([image], [detections], words)[0].data["verify_score"], strict=True
            ):
                (right if names[i] == f"{item.color} {item.shape}" else wrong).append(score)
    assert np.mean(np.array(right) > 0.5) > 0.9
    assert np.mean(np.array(wrong) < 0.5) > 0.9


def test_the_weights_of_the_small_model_are_small_and_load_as_transformers_saves_them():
    from transformers import AutoModel, AutoProcessor, SiglipModel

    from grounded_sam.weights.loading import builtin_path

    folder = builtin_path("shapes", "siglip")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    assert isinstance(AutoModel.from_pretrained(folder), SiglipModel)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.tokenize("red circles") == ["red", "circle", "##s"]
    assert set(AutoModel.from_pretrained(folder).config.verification) == {"calibration", "presence", "examples"}


def test_a_sweep_of_the_command_verifies_once(tmp_path, scene_images):
    """Each job of a sweep over thresholds of the verifier equals a run of its own, and no model runs twice."""
    from command import run_command

    folder = tmp_path / "in"
    folder.mkdir()
    for i, (image, _) in enumerate(scene_images[:3]):
        Image.fromarray(image).save(folder / f"{i}.png")
    names = dict.fromkeys(f"{item.color} {item.shape}" for _, objects in scene_images[:3] for item in objects)
    classes = f"text=[{','.join(names)}]"
    common = ["preset=shapes", "verify=shapes", f"input={folder}", classes, "sink=jsonl", "device=cpu"]
    swept = ["-m", *common, f"output={tmp_path / 's'}", "select.verify=0.3,0.9", "select.score=0.02"]
    process = run_command("grounded_sam.cli.main", swept, tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    for number, threshold in enumerate(("0.3", "0.9")):
        out = tmp_path / threshold
        alone = [*common, f"output={out}", f"select.verify={threshold}", "select.score=0.02"]
        process = run_command("grounded_sam.cli.main", alone, tmp_path)
        assert process.returncode == 0, process.stdout + process.stderr
        one, shared = (
            [json.loads(line)["objects"] for line in (folder_ / "results.jsonl").read_text().splitlines()]
            for folder_ in (out, tmp_path / "s" / str(number))
        )
        assert shared == one
        assert sum(len(objects) for objects in one) > 3 and all("verify_score" in o for objects in one for o in objects)
        record = json.loads((tmp_path / "s" / str(number) / "run.json").read_text())
        assert record["replayed"] == (3 if number else 0)


def test_a_saved_config_verifies_again(tmp_path, scene_images):
    from command import run_command

    Image.fromarray(scene_images[0][0]).save(tmp_path / "a.png")
    overrides = ["preset=shapes", "verify=shapes", "text=[red circle]", f"input={tmp_path / 'a.png'}", "sink=jsonl"]
    overrides += ["verify.margin=1.3", "select.verify=0.4", f"output={tmp_path / 'one'}"]
    assert run_command("grounded_sam.cli.main", overrides, tmp_path).returncode == 0
    again = [f"--config-path={tmp_path / 'one' / '.hydra'}", "--config-name=config", f"output={tmp_path / 'two'}"]
    process = run_command("grounded_sam.cli.main", again, tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "one" / "results.jsonl").read_text() == (tmp_path / "two" / "results.jsonl").read_text()
    assert "margin: 1.3" in (tmp_path / "two" / ".hydra" / "config.yaml").read_text()

"""Sweeps: models run once, every job gives what it would give alone, and a report sums up."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoints import grounding_dino
from fakes import CLASSES, boxes
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import ConfigError, Select, Vocabulary
from grounded_sam.cli.report import write_report
from grounded_sam.config.compose import compose
from grounded_sam.evaluation import agreement
from grounded_sam.pipeline.prediction_cache import LoosestSelection, PredictionCache
from grounded_sam.pipeline.select import select_detections
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks
from grounded_sam.structures.results import FrameResult

COMMAND = Path(sys.executable).with_name("grounded-sam")
CLASS_NAMES = ["red shape", "green shape", "blue shape", "yellow shape"]


@pytest.fixture(scope="module")
def labeled(tmp_path_factory) -> Path:
    """A folder with scenes in `in/` and their ground-truth masks in `truth.json`, as COCO."""
    from grounded_sam.shapes.scenes import make_scene
    from grounded_sam.structures.detections import make_detections
    from grounded_sam.structures.frame import Frame
    from grounded_sam.structures.masks import masks_to_xyxy

    folder = tmp_path_factory.mktemp("sample")
    (folder / "in").mkdir()
    vocabulary = Vocabulary.parse(CLASS_NAMES)
    with CocoSink(folder, vocabulary, file="truth.json") as sink:
        for i in range(5):
            scene = make_scene(np.random.default_rng([77, i]), count=4, size_hw=(160, 200))
            Image.fromarray(scene.image).save(folder / "in" / f"{i}.png")
            names = [f"{color} shape" for color, _ in scene.pairs]
            rows = [k for k, name in enumerate(names) if name in vocabulary.classes]
            masks = np.array([scene.masks[k] for k in rows], bool).reshape(-1, 160, 200)
            ids = [vocabulary.classes.index(names[k]) for k in rows]
            objects = make_detections(masks_to_xyxy(masks), np.ones(len(ids)), ids, vocabulary, (160, 200), masks)
            sink.write(FrameResult(frame=Frame(pixels=scene.image, index=i, name=f"{i}.png"), detections=objects))
    return folder


def run(labeled: Path, output: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command on the labeled scenes; it must end with an exit code."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    text = f"text=[{','.join(CLASS_NAMES)}]"
    given = {override.split("=")[0] for override in overrides}
    settings = ["preset=shapes", f"input={labeled / 'in'}", f"truth={labeled / 'truth.json'}", text, "sink=metrics"]
    process = subprocess.run(
        [str(COMMAND), *flags, *(s for s in settings if s.split("=")[0] not in given), f"output={output}", *overrides],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process


def read_metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def read_records(sweep: Path, count: int) -> list[dict]:
    """Read the `run.json` of each job of a sweep."""
    return [json.loads((sweep / str(i) / "run.json").read_text()) for i in range(count)]


def read_report(sweep: Path) -> list[dict[str, str]]:
    """Read the rows of `sweep.csv`."""
    with (sweep / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_job_of_a_sweep_equals_a_run_of_its_own(labeled, tmp_path):
    out = run(labeled, tmp_path / "s", "-m", "select.score=0.02,0.99", "select.nms=0.3,0.7", "select.top_k=2,null")
    records = read_records(tmp_path / "s", 8)
    assert [job["replayed"] for job in records] == [0] + [5] * 7
    for i in (0, 3, 6):
        selection = [override for override in records[i]["overrides"] if override.startswith("select.")]
        run(labeled, tmp_path / str(i), *selection)
        assert read_metrics(tmp_path / "s" / str(i)) == read_metrics(tmp_path / str(i))
    values = [read_metrics(tmp_path / "s" / str(i))["segm"]["AP"] for i in range(8)]
    assert len(set(values)) > 2
    rows = read_report(tmp_path / "s")
    assert [float(row["metric"]) for row in rows] == sorted(values, reverse=True)
    assert {"select.score", "select.nms", "select.top_k", "f1", "s/image detect", "peak MiB"} <= set(rows[0])
    assert (tmp_path / "s" / "sweep.md").read_text().count("\n") == 10
    assert Image.open(tmp_path / "s" / "sweep.png").size[0] > 600
    assert "8 jobs, the best first" in out.stdout
    assert "…" not in out.stdout  # no name of a setting is cut
    # The best job is a preset.
    best = yaml.safe_load((tmp_path / "s" / "preset" / "best.yaml").read_text())
    assert str(best["select"]["score"]) == rows[0]["select.score"] and best["defaults"] == ["shapes"]
    run(labeled, tmp_path / "again", f"--config-dir={tmp_path / 's'}", "preset=best")
    assert read_metrics(tmp_path / "again")["segm"]["AP"] == max(values)
    # The report can be written again.
    text = write_report(tmp_path / "s")
    assert "8 jobs" in text and "preset=best" in text


def test_jobs_with_other_segmenters_share_boxes(labeled, tmp_path):
    run(labeled, tmp_path / "s", "-m", "segmenter=sam,sam2,none", "select.score=0.3,0.5")
    records = read_records(tmp_path / "s", 6)
    assert [job["boxes_replayed"] for job in records] == [0, 0, 5, 0, 0, 0]
    # Without a segmenter the boxes are the results.
    assert [job["replayed"] for job in records] == [0, 5, 0, 5, 5, 5]
    for i in (2, 3):
        swept = [o for o in records[i]["overrides"] if o.split("=")[0] in ("segmenter", "select.score")]
        run(labeled, tmp_path / str(i), *swept)
        assert read_metrics(tmp_path / "s" / str(i)) == read_metrics(tmp_path / str(i))
    rows = read_report(tmp_path / "s")
    detector_s = {row["s/image detect"] for row in rows if row["segmenter"] != "none"}
    assert len(detector_s) == 1 and float(detector_s.pop()) > 0  # the cost includes that of replayed boxes


def test_results_of_other_inputs_are_not_shared(labeled, tmp_path):
    """Boxes of `detector=stored` depend on the source, which is not part of the detector's settings."""
    for folder, image in (("a", 3), ("b", 2)):
        settings = ["preset=shapes", f"text=[{','.join(CLASS_NAMES)}]", "sink=store", f"output={tmp_path / folder}"]
        command = [str(COMMAND), *settings, f"input={labeled / 'in' / f'{image}.png'}"]
        subprocess.run(command, check=True, capture_output=True)
    inputs = f"input={tmp_path / 'a'},{tmp_path / 'b'}"
    run(labeled, tmp_path / "s", "-m", "source=stored", inputs, "segmenter=sam,sam2", "detector.masks=false")
    records = read_records(tmp_path / "s", 4)
    assert [job["boxes_replayed"] for job in records] == [0] * 4


def test_a_sweep_into_a_used_folder_reports_its_own_jobs(labeled, tmp_path):
    run(labeled, tmp_path / "s", "-m", "select.score=0.2,0.3,0.4")
    out = run(labeled, tmp_path / "s", "-m", "select.score=0.9,1.5", code=1)
    assert "2 jobs, the best first" in out.stdout and "1 of 2 jobs failed" in out.stderr
    assert [row["select.score"] for row in read_report(tmp_path / "s")] == ["0.9", "1.5"]


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_failed_job_is_a_row_with_its_error(labeled, tmp_path, launcher):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the joblib launcher is not installed")
    random_weights = grounding_dino(tmp_path / "random")
    detectors = f"checkpoints.grounding_dino=builtin:shapes,{random_weights},./nowhere"  # instead of sweep=detectors'
    out = run(labeled, tmp_path / "s", "-m", "sweep=detectors", detectors, f"hydra/launcher={launcher}", code=1)
    assert "2 of 6 jobs failed" in out.stderr
    rows = read_report(tmp_path / "s")
    assert [bool(row["metric"]) for row in rows] == [True] * 4 + [False] * 2
    assert all("nowhere" in row["error"] for row in rows[4:])
    assert all(row["checkpoints.grounding_dino"] == "builtin:shapes" for row in rows[:2])
    assert [float(row["metric"]) > 0.4 for row in rows[:4]] == [True, True, False, False]
    assert {row["segmenter"] for row in rows[:2]} == {row["segmenter"] for row in rows[2:4]} == {"sam", "sam2"}
    assert all(float(row[f"s/image {stage}"]) > 0 for row in rows[:2] for stage in ("detect", "segment"))
    assert all(float(row["peak MiB"]) > 100 for row in rows[:4])


@pytest.mark.parametrize("name", ["thresholds", "detectors", "prompts", "redetect"])
def test_predefined_sweeps_set_the_sweeper_parameters(name, labeled, tmp_path):
    cfg = yaml.safe_load((Path(__file__).parents[1] / "conf" / "sweep" / f"{name}.yaml").read_text())
    for key, values in cfg["hydra"]["sweeper"]["params"].items():
        for value in OverridesParser.create().parse_override(f"{key}={values}").sweep_string_iterator():
            compose([f"{key}={value}"])
    if name == "thresholds":
        out = run(labeled, tmp_path / "s", "-m", "sweep=thresholds")
        assert "16 jobs, the best first" in out.stdout
        replayed = [json.loads(path.read_text())["replayed"] for path in (tmp_path / "s").glob("*/run.json")]
        assert sorted(replayed) == [0] + [5] * 15


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["select.score=0.2,0.4"], (True, 0.2, "own", False)),
        (["select.score=interval(0.1,0.6)"], (True, 0.1, "own", False)),
        (["select.nms=0.7,0.3", "text=a"], (True, None, [0.3, 0.7], False)),
        (["select.nms=0.7,null"], (True, None, "any", False)),
        (["select.nms=0.7,1.5", "select.score=-1,0.3"], (True, 0.3, [0.7], False)),
        (["segmenter=glob(sam2)"], (False, None, "any", False)),
        (["select.nms=interval(0.3,0.8)"], (True, None, "any", False)),
        (["select.nms=0.7,0.3", "select.nms_by=box,mask"], (True, None, "any", False)),
        (["segmenter=sam,sam2"], (False, None, "own", False)),
        (["select.class_score.a=0.5,0.05", "select.score=0.3"], (True, 0.05, "own", True)),
    ],
)
def test_the_loosest_selection_of_a_sweep_is_read_from_its_overrides(tmp_path, overrides, expected):
    LoosestSelection.from_overrides(overrides).write(tmp_path)
    loosest = LoosestSelection.read(tmp_path)
    assert (loosest.results, loosest.score, loosest.nms, loosest.by_class) == expected


BOXES = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.integers(0, 60),
        st.integers(5, 39),
        st.integers(5, 39),
        st.floats(0.05, 1),
        st.integers(0, 2),
    ),
    max_size=12,
)


@example(
    [*[(0, 0, 5, 5, 1.0, 0)] * 9, *[(0, 0, 5, 5, 0.5, 0)] * 2, (0, 1, 5, 5, 1.0, 0)], 0.5, 0.3, False, 1, None
)  # equal scores, whose order NumPy does not define
@given(
    BOXES,
    st.floats(0.1, 0.9),
    st.sampled_from([0.3, 0.5, 0.7, None]),
    st.booleans(),
    st.sampled_from([1, 3, None]),
    st.sampled_from([None, {"a": 0.2}, {"a": 0.6, "b": 0.1}]),
)
def test_selecting_from_shared_detections_equals_selecting_directly(
    entries, score, nms, class_agnostic, top_k, class_score
):
    detections = boxes(*((x, y, x + w, y + h, s, c) for x, y, w, h, s, c in entries))
    settings = Select(score=score, nms=nms, class_agnostic=class_agnostic, top_k=top_k, class_score=class_score)
    for swept_nms in ("own", "any", [0.3, 0.5, 0.7]):
        if isinstance(swept_nms, list) and nms is None:
            continue  # not a job of that sweep
        cache = object.__new__(PredictionCache)
        cache.selections = LoosestSelection(score=0.05, nms=swept_nms).selections(settings, CLASSES)
        shared = cache.keep_selectable(detections, CLASSES)
        assert select_detections(shared, settings, CLASSES) == select_detections(detections, settings, CLASSES)
        assert select_detections(pack_masks(shared), settings, CLASSES) == select_detections(
            pack_masks(detections), settings, CLASSES
        )


def test_a_report_on_a_folder_without_jobs_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no job of a sweep"):
        write_report(tmp_path)


# Without ground truth


def test_a_sweep_without_ground_truth_ends_with_what_the_jobs_found(labeled, tmp_path):
    scores = "select.score=0.2,0.6"
    out = run(labeled, tmp_path / "s", "-m", "truth=null", "sink=coco", scores)
    assert "2 jobs, without ground truth" in out.stdout and "best" not in out.stdout
    records, rows = read_records(tmp_path / "s", 2), read_report(tmp_path / "s")
    assert [row["select.score"] for row in rows] == ["0.2", "0.6"] and "metric" not in rows[0]
    for record, row in zip(records, rows, strict=True):
        assert (int(row["images"]), int(row["empty"])) == (5, record["empty"])
        assert int(row["objects"]) == sum(record["objects"].values())
        assert all(int(row[f"count {name}"]) == count for name, count in record["objects"].items())
    few, many = sorted(int(row["objects"]) for row in rows)
    assert [float(row["agreement"]) for row in rows] == [pytest.approx(2 * few / (few + many))] * 2
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert "agreement" in page and "<img" not in page and not (tmp_path / "s" / "preset").exists()
    shards = run(
        labeled, tmp_path / "shards", "-m", "truth=null", "sink=coco", "source.num_shards=2", "source.shard=0,1"
    )
    assert "without ground truth" not in shards.stdout and not (tmp_path / "shards" / "sweep.csv").exists()


def write_jobs(folder: Path, *jobs: list[list[tuple]] | None) -> None:
    """Write what jobs found in images `0.png` and so on, as rows of `fakes.boxes`; None is a job that kept nothing."""
    for number, images in enumerate(jobs):
        output = folder / str(number)
        output.mkdir(parents=True)
        objects: dict[str, int] = {}
        with CocoSink(output, CLASSES) if images else nullcontext() as sink:
            for i, rows in enumerate(images or ()):
                frame = Frame(pixels=np.zeros((100, 100, 3), np.uint8), index=i, name=f"{i}.png")
                sink.write(FrameResult(frame=frame, detections=boxes(*rows)))
                for row in rows:
                    name = CLASSES.classes[row[5]]
                    objects[name] = objects.get(name, 0) + 1
        record = {"overrides": [f"select.nms=0.{number}"], "images": len(images or ()), "seconds": {}}
        record |= {"objects": objects, "empty": sum(not rows for rows in images or ())}
        (output / "run.json").write_text(json.dumps(record))


def test_jobs_agree_on_objects_of_the_same_class_and_place(tmp_path):
    a, near, other, far = (
        (0, 0, 20, 20, 0.9, 0),
        (0, 0, 20, 18, 0.5, 0),
        (0, 0, 20, 20, 0.9, 1),
        (50, 50, 70, 70, 0.9, 0),
    )
    write_jobs(tmp_path, [[a], [a, far], []], [[near], [a], []], [[other], [far], []], None)
    text = write_report(tmp_path)
    assert "4 jobs, without ground truth" in text
    assert "no agreement of job 3, which kept no detections: add coco or store to sink" in text.replace("\n", " ")
    rows = read_report(tmp_path)
    wanted = [(4 / 5 + 2 / 5) / 2, (4 / 5 + 0) / 2, (2 / 5 + 0) / 2]
    assert [float(row["agreement"]) for row in rows[:3]] == pytest.approx(wanted) and rows[3]["agreement"] == ""
    assert [float(row["agrees with 0"] or -1) for row in rows] == pytest.approx([-1, 4 / 5, 2 / 5, -1])
    assert [row["empty"] for row in rows] == ["1", "1", "1", "0"]
    assert [row["count a"] for row in rows] == ["3", "2", "1", "0"]
    (tmp_path / "1" / "annotations.json").write_text("[")
    assert "no agreement of job 1: " in write_report(tmp_path).replace("\n", " ")
    assert [row["agreement"] for row in read_report(tmp_path)] == ["0.4", "", "0.4", ""]


def test_agreement_of_many_images_is_that_of_some(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "MAX_COMPARISONS", 10)
    images = [[(0, 0, 20, 20, 0.9, 0)]] * 40
    write_jobs(tmp_path, images, images)
    assert "the agreement is that of one in 4 images" in write_report(tmp_path).replace("\n", " ")
    assert [float(row["agreement"]) for row in read_report(tmp_path)] == [1.0, 1.0]

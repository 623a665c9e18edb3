"""Sweeps of the command: models run once, every point as a run of its own, one table at the end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
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
from grounded_sam.pipeline.prediction_cache import PredictionCache, read_sweep_floor, sweep_floors, write_sweep_floor
from grounded_sam.pipeline.select import select
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.structures.masks import pack_masks
from grounded_sam.structures.results import FrameResult

COMMAND = Path(sys.executable).with_name("grounded-sam")
CLASSES_ASKED = ["red shape", "green shape", "blue shape", "yellow shape"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Scenes with their true masks as COCO."""
    from grounded_sam.shapes.scenes import make_scene
    from grounded_sam.structures.detections import make_detections
    from grounded_sam.structures.frame import Frame
    from grounded_sam.structures.masks import masks_to_xyxy

    place = tmp_path_factory.mktemp("sample")
    (place / "in").mkdir()
    words = Vocabulary.parse(CLASSES_ASKED)
    with CocoSink(place, words, file="truth.json") as sink:
        for i in range(5):
            scene = make_scene(np.random.default_rng([77, i]), count=4, size_hw=(160, 200))
            Image.fromarray(scene.image).save(place / "in" / f"{i}.png")
            named = [f"{colour} shape" for colour, _ in scene.pairs]
            rows = [k for k, name in enumerate(named) if name in words.classes]
            masks = np.array([scene.masks[k] for k in rows], bool).reshape(-1, 160, 200)
            ids = [words.classes.index(named[k]) for k in rows]
            found = make_detections(masks_to_xyxy(masks), np.ones(len(ids)), ids, words, (160, 200), masks)
            sink.write(FrameResult(Frame(scene.image, i, f"{i}.png"), found))
    return place


def run(labelled: Path, output: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    flags = [word for word in words if word.startswith("-")]
    rest = [word for word in words if not word.startswith("-")]
    asked = f"text=[{','.join(CLASSES_ASKED)}]"
    base = ["preset=shapes", f"input={labelled / 'in'}", f"truth={labelled / 'truth.json'}", asked, "sink=metrics"]
    out = subprocess.run(
        [str(COMMAND), *flags, *base, f"output={output}", *rest],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert out.returncode == code, out.stdout + out.stderr
    assert "Traceback" not in out.stderr
    return out


def measured(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def test_every_point_of_a_sweep_equals_a_run_of_its_own(labelled, tmp_path):
    out = run(labelled, tmp_path / "s", "-m", "select.score=0.2,0.5", "select.nms=0.3,0.7", "select.top_k=2,null")
    about = [json.loads((tmp_path / "s" / str(i) / "run.json").read_text()) for i in range(8)]
    assert [job["replayed"] for job in about] == [0] + [5] * 7
    for i in (0, 3, 6):
        words = [w for w in about[i]["overrides"] if w.startswith("select.")]
        run(labelled, tmp_path / str(i), *words)
        assert measured(tmp_path / "s" / str(i)) == measured(tmp_path / str(i))
    values = [measured(tmp_path / "s" / str(i))["segm"]["AP"] for i in range(8)]
    assert len(set(values)) > 2
    with (tmp_path / "s" / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["metric"]) for line in lines] == sorted(values, reverse=True)
    assert {"select.score", "select.nms", "select.top_k", "f1", "s/image detect", "peak MiB"} <= set(lines[0])
    assert (tmp_path / "s" / "sweep.md").read_text().count("\n") == 10
    assert Image.open(tmp_path / "s" / "sweep.png").size[0] > 600
    assert "8 jobs, the best first" in out.stdout
    # The best is a preset.
    best = yaml.safe_load((tmp_path / "s" / "preset" / "best.yaml").read_text())
    assert str(best["select"]["score"]) == lines[0]["select.score"] and best["defaults"] == ["shapes"]
    again = [f"--config-dir={tmp_path / 's'}", "preset=best"]
    run(labelled, tmp_path / "again", *again)
    assert measured(tmp_path / "again")["segm"]["AP"] == max(values)
    # And the table can be made again.
    text = write_report(tmp_path / "s")
    assert "8 jobs" in text and "preset=best" in text


def test_boxes_are_found_once_for_all_segmenters(labelled, tmp_path):
    words = ["segmenter=sam,sam2,none", "select.score=0.3,0.5"]
    run(labelled, tmp_path / "s", "-m", *words)
    about = [json.loads((tmp_path / "s" / str(i) / "run.json").read_text()) for i in range(6)]
    assert [job["boxes_replayed"] for job in about] == [0, 0, 5, 0, 0, 0]
    # Without a segmenter the boxes are all there is.
    assert [job["replayed"] for job in about] == [0, 5, 0, 5, 5, 5]
    for i in (2, 3):
        direct = [word for word in about[i]["overrides"] if word.split("=")[0] in ("segmenter", "select.score")]
        run(labelled, tmp_path / str(i), *direct)
        assert measured(tmp_path / "s" / str(i)) == measured(tmp_path / str(i))
    with (tmp_path / "s" / "sweep.csv").open(newline="") as file:
        lines = {(line["segmenter"], line["select.score"]): line for line in csv.DictReader(file)}
    looked = {line["s/image detect"] for key, line in lines.items() if key[0] != "none"}
    assert len(looked) == 1 and float(looked.pop()) > 0  # what was saved is part of what it costs


def test_labels_of_other_inputs_are_not_shared(labelled, tmp_path):
    """Boxes of `detector=stored` come from the source, which is not the detector's settings."""
    for part, count in (("a", 3), ("b", 2)):
        words = ["sink=store", f"output={tmp_path / part}", f"input={labelled / 'in' / f'{count}.png'}"]
        base = ["preset=shapes", f"text=[{','.join(CLASSES_ASKED)}]"]
        subprocess.run([str(COMMAND), *base, *words], check=True, capture_output=True)
    words = ["source=stored", f"input={tmp_path / 'a'},{tmp_path / 'b'}", "segmenter=sam,sam2", "detector.masks=false"]
    run(labelled, tmp_path / "s", "-m", *words)
    about = [json.loads((tmp_path / "s" / str(i) / "run.json").read_text()) for i in range(4)]
    assert [job["boxes_replayed"] for job in about] == [0] * 4


def test_a_sweep_into_the_folder_of_another_has_its_own_rows(labelled, tmp_path):
    run(labelled, tmp_path / "s", "-m", "select.score=0.2,0.3,0.4")
    out = run(labelled, tmp_path / "s", "-m", "select.score=0.9,1.5", code=1)
    assert "2 jobs, the best first" in out.stdout and "1 of 2 jobs failed" in out.stderr
    with (tmp_path / "s" / "sweep.csv").open(newline="") as file:
        assert [line["select.score"] for line in csv.DictReader(file)] == ["0.9", "1.5"]


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_job_that_fails_is_a_row_with_its_reason(labelled, tmp_path, launcher):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the joblib launcher is not installed")
    other = grounding_dino(tmp_path / "random")
    detectors = f"checkpoints.grounding_dino=builtin:shapes,{other},./nowhere"  # as sweep=detectors, of these
    out = run(labelled, tmp_path / "s", "-m", "sweep=detectors", detectors, f"hydra/launcher={launcher}", code=1)
    assert "2 of 6 jobs failed" in out.stderr
    with (tmp_path / "s" / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [bool(line["metric"]) for line in lines] == [True] * 4 + [False] * 2
    assert all("nowhere" in line["error"] for line in lines[4:])
    assert all(line["checkpoints.grounding_dino"] == "builtin:shapes" for line in lines[:2])
    assert [float(line["metric"]) > 0.4 for line in lines[:4]] == [True, True, False, False]
    assert {line["segmenter"] for line in lines[:2]} == {line["segmenter"] for line in lines[2:4]} == {"sam", "sam2"}
    assert all(float(line[f"s/image {stage}"]) > 0 for line in lines[:2] for stage in ("detect", "segment"))
    assert all(float(line["peak MiB"]) > 100 for line in lines[:4])


@pytest.mark.parametrize("name", ["thresholds", "detectors", "prompts", "redetect"])
def test_ready_made_sweeps_are_parameters_of_the_sweeper(name, labelled, tmp_path):
    cfg = yaml.safe_load((Path(__file__).parents[1] / "conf" / "sweep" / f"{name}.yaml").read_text())
    for key, values in cfg["hydra"]["sweeper"]["params"].items():
        for word in OverridesParser.create().parse_override(f"{key}={values}").sweep_string_iterator():
            compose([f"{key}={word}"])
    if name == "thresholds":
        out = run(labelled, tmp_path / "s", "-m", "sweep=thresholds")
        assert "16 jobs, the best first" in out.stdout
        replayed = [json.loads(path.read_text())["replayed"] for path in (tmp_path / "s").glob("*/run.json")]
        assert sorted(replayed) == [0] + [5] * 15


@pytest.mark.parametrize(
    ("words", "expected"),
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
def test_what_a_sweep_asks_for_is_read_from_its_words(tmp_path, words, expected):
    write_sweep_floor(tmp_path, words)
    assert tuple(read_sweep_floor(tmp_path)[key] for key in ("shared", "score", "nms", "by_class")) == expected


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
)  # equally confident, and sorted one way or another
@given(
    BOXES,
    st.floats(0.1, 0.9),
    st.sampled_from([0.3, 0.5, 0.7, None]),
    st.booleans(),
    st.sampled_from([1, 3, None]),
    st.sampled_from([None, {"a": 0.2}, {"a": 0.6, "b": 0.1}]),
)
def test_selecting_from_what_was_kept_for_all_is_selecting_at_once(rows, score, nms, across, top_k, by_class):
    found = boxes(*((x, y, x + w, y + h, s, c) for x, y, w, h, s, c in rows))
    settings = Select(score=score, nms=nms, nms_across=across, top_k=top_k, class_score=by_class)
    for several in ("own", "any", [0.3, 0.5, 0.7]):
        if isinstance(several, list) and nms is None:
            continue  # not a point of that sweep
        keep = object.__new__(PredictionCache)
        keep.floors = sweep_floors(settings, CLASSES, {"score": 0.05, "nms": several})
        kept = keep.keep(found, CLASSES)
        assert select(kept, settings, CLASSES) == select(found, settings, CLASSES)
        assert select(pack_masks(kept), settings, CLASSES) == select(pack_masks(found), settings, CLASSES)


def test_a_folder_without_jobs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no job of a sweep"):
        write_report(tmp_path)

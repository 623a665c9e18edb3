"""Runs beside each other and after each other: what a run may write, remove and read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command import run_command
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import ConfigError, Vocabulary
from grounded_sam.files import PendingFile, atomic_write_text, growing_text
from grounded_sam.media.files import find_files
from grounded_sam.output.claim import ClaimedFolder, check_output, claim, read_listing
from grounded_sam.output.paths import STATE
from grounded_sam.segmenters.feature_cache import FeatureCache
from grounded_sam.sinks.masks import MasksSink
from grounded_sam.structures.detections import empty_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import encode_rle
from grounded_sam.structures.results import FrameResult

#: Settings of a run that loads no models and finds a box in each image.
BOX = ("detector=clicks", "detector.prompts=[{class: a, box: [1, 1, 20, 20]}]", "segmenter=none", "tracker=none")
#: Settings of a run that reads its detections from COCO files instead of loading models.
LABELS = ("source=coco", "detector=stored", "segmenter=none", "tracker=none")
ONE, ALL = "input=photos/one.json", "input=photos/all.json"


def run(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run the command; it must end with an exit code, without a traceback. Return what it printed."""
    result = run_command("grounded_sam.cli.main", list(arguments), cwd)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def labels(folder, scenes) -> Path:
    """Write the labels of `0.png` to `one.json`, and of all images to `all.json`, beside the images."""
    names = ("0.png", "1.png", "sub/2.png", "sub/3.png")
    images = [{"id": i, "file_name": name, "width": 260, "height": 200} for i, name in enumerate(names)]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": int(scene.masks[0].sum()), "score": 0.9}
        | {"bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)], "segmentation": encode_rle(scene.masks[0])}
        for i, scene in enumerate(scenes)
        for x1, y1, x2, y2 in [scene.xyxy[0].tolist()]
    ]
    categories = [{"id": 1, "name": "shape"}]
    for name, count in (("one", 1), ("all", 4)):
        content = {"images": images[:count], "annotations": annotations[:count], "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["annotations.json", "run.json", "overlay/0.png.jpg", "skipped.json"])
def test_a_file_of_somebody_else_is_neither_replaced_nor_a_reason_to_lose_results(labels, tmp_path, name):
    mine = tmp_path / "o" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    printed = run(*LABELS, ONE, "output=o", cwd=tmp_path, code=1)
    assert mine.read_text() == "mine" and str(mine) in printed and "move it away" in printed
    if name == "annotations.json":
        mine.rename(tmp_path / "moved")  # as the message says
        for _ in range(2):  # what a run wrote, the next one replaces
            run(*LABELS, ONE, "output=o", cwd=tmp_path)


def test_corrections_by_hand_are_not_overwritten(labels, tmp_path):
    command = (*LABELS, ALL, "output=o", "sink=labelme")
    run(*command, cwd=tmp_path)
    label = tmp_path / "o" / "labelme" / "0.json"
    label.write_text(label.read_text().replace('"flags"', '"flags "'))
    corrected = label.read_text()
    assert "0.json was changed after the run that wrote it" in run(*command, cwd=tmp_path, code=1)
    assert label.read_text() == corrected


def test_nothing_is_written_through_links(labels, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    for name, target in (
        ("overlay", outside),
        (".hydra", outside),
        (STATE, outside),
        ("results.jsonl", outside / "file"),
    ):
        output = tmp_path / f"o-{name}"
        output.mkdir()
        (output / name).symlink_to(target)
        arguments = (ONE, f"output={output}", "sink=[overlay,jsonl]")
        assert name in run(*LABELS, *arguments, cwd=tmp_path, code=1)
        assert [path.name for path in outside.iterdir()] == ["file"] and (outside / "file").read_text() == "mine"


def test_a_sweep_keeps_what_it_did_not_write(labels, tmp_path):
    mine = [tmp_path / "o" / name for name in ("2024/metrics.json", "3/run.json", ".predictions/x", "7/metrics.json")]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    sweep = ("-m", *LABELS, ONE, "select.score=0.4,0.5", "sink=none", "output=o")
    run(*sweep, cwd=tmp_path)
    run(*sweep, cwd=tmp_path)
    assert all(path.read_text() == "{}" for path in mine)
    assert not list((tmp_path / "o" / STATE).glob("predictions*"))  # which the sweep itself made
    multirun = tmp_path / "linked" / "multirun.yaml"
    multirun.parent.mkdir()
    multirun.symlink_to(mine[0])
    assert "multirun.yaml" in run(*sweep[:-1], "output=linked", cwd=tmp_path, code=1)
    assert mine[0].read_text() == "{}"


def test_a_rerun_removes_what_only_the_earlier_run_wrote(labels, tmp_path):
    command = (*LABELS, "output=o", "sink=[overlay,masks,yolo]")
    run(*command, ALL, cwd=tmp_path)
    output = tmp_path / "o"
    (output / "overlay" / "note.txt").write_text("mine")
    changed = output / "overlay" / "1.png.jpg"
    changed.write_bytes(changed.read_bytes() + b"edited")
    assert (output / "overlay" / "sub").is_dir()
    printed = run(*command, ONE, cwd=tmp_path)
    assert "of an earlier run that this one did not write again" in printed
    assert f"kept 1 file of an earlier run, changed since or copies of images, such as {changed}" in printed
    assert sorted(path.name for path in (output / "overlay").iterdir()) == ["0.png.jpg", "1.png.jpg", "note.txt"]
    left = sorted(path.stem for path in (output / "yolo" / "labels" / "train").rglob("*.txt"))
    assert left == ["0", "1", "2", "3"] and (output / "yolo" / "images" / "train" / "0.png").is_file()
    inputs = [*BOX, "input=o/yolo/images/train", "output=o", "sink=yolo"]  # a dataset that is labeled again in place
    run(*inputs, cwd=tmp_path)
    assert (output / "yolo" / "images" / "train" / "0.png").is_file()
    assert [path.name for path in (output / "masks").iterdir()] == ["0.png"]
    assert len(list(labels.rglob("*.png"))) == 4  # the images that were linked


def test_masks_of_others_stay_where_the_sink_is_used_without_a_run(tmp_path):
    vocabulary = Vocabulary.parse(["a"])
    mine = tmp_path / "masks" / "a.png" / "007_mine.png"
    mine.parent.mkdir(parents=True)
    Image.new("L", (4, 4)).save(mine)
    with MasksSink(tmp_path, vocabulary) as sink:
        sink.write(
            FrameResult(
                frame=Frame(pixels=np.zeros((4, 4, 3), np.uint8), name="a.png"), detections=empty_detections(vocabulary)
            )
        )
    assert mine.is_file()


def test_copies_of_images_are_not_removed(labels, tmp_path):
    """The originals may be gone."""
    command = (*LABELS, "output=o", "sink=coco", "sink.coco.images=copy")
    run(*command, ALL, cwd=tmp_path)
    printed = run(*command, ONE, cwd=tmp_path)
    assert len(json.loads((tmp_path / "o" / "annotations.json").read_text())["images"]) == 1
    assert len(list((tmp_path / "o" / "images").rglob("*.png"))) == 4
    assert "kept 3 files of an earlier run" in printed


def test_two_runs_in_one_output(labels, tmp_path):
    with claim(tmp_path / "o"):
        printed = run(*LABELS, ONE, "output=o", cwd=tmp_path, code=1)
        assert "another run is writing to" in printed
        with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="another run is writing"):
            pool.submit(lambda: claim(tmp_path / "o").__enter__()).result()
        with claim(tmp_path / "o"):  # the same run
            pass
    run(*LABELS, ONE, "output=o", cwd=tmp_path)


def test_a_run_that_was_killed_can_be_repeated(tmp_path):
    claimed = ClaimedFolder(tmp_path)
    claimed.record(tmp_path / "grows.jsonl", None)
    (tmp_path / "grows.jsonl").write_text("half")
    claimed._file_lock.release()
    with (tmp_path / STATE / "files.jsonl").open("a") as listing:
        listing.write('["cut')
    with claim(tmp_path), growing_text(tmp_path / "grows.jsonl") as file:
        file.write("whole")
    assert (tmp_path / "grows.jsonl").read_text() == "whole"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ours", "theirs", "edit", "new run"])), max_size=12))
def test_only_what_runs_wrote_is_replaced_or_removed(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("output")
    foreign: dict[str, str] = {}
    for number, (name, step) in enumerate(steps):
        path = folder / "sink" / name
        if step in ("theirs", "edit") and (step == "theirs" or path.exists()):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"theirs {number}")
            foreign[name] = f"theirs {number}"
        with claim(folder) as claimed:
            if step == "ours":
                try:
                    atomic_write_text(path, f"ours {number}")
                except ConfigError:
                    assert name in foreign
            elif step == "new run":
                claimed.remove_stale(folder / "sink")
        for kept, text in foreign.items():
            assert (folder / "sink" / kept).read_text() == text


@pytest.mark.parametrize("name", ["../victim", "/victim", "a/../../victim", "..\\victim"])
def test_a_planted_list_reaches_no_file_outside(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("")
    output = tmp_path / "o"
    (output / STATE).mkdir(parents=True)
    name = str(victim) if name == "/victim" else name
    lines = [
        json.dumps([name, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]),
        "[1]",
        "{}",
        "[1, 2]",
    ]
    (output / STATE / "files.jsonl").write_text("\n".join(lines))
    with claim(output) as claimed:
        assert claimed.remove_stale(output) == ([], [])
    assert victim.exists() and read_listing(output) == {}


def test_files_outside_of_runs_are_written_as_before(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    atomic_write_text(tmp_path / "a.txt", "new")
    check_output(tmp_path / "a.txt")
    PendingFile(tmp_path / "b").discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_an_output_of_another_program_is_refused(labels, tmp_path):
    (tmp_path / "o" / ".hydra").mkdir(parents=True)
    (tmp_path / "o" / ".hydra" / "config.yaml").write_text("mine")
    assert "choose another output" in run(*LABELS, ONE, "output=o", cwd=tmp_path, code=1)
    assert (tmp_path / "o" / ".hydra" / "config.yaml").read_text() == "mine"


def test_outputs_are_no_inputs(folder, tmp_path):
    run(*BOX, "input=photos/0.png", "output=photos", "sink=overlay", cwd=tmp_path)  # beside the images
    run(*BOX, "input=photos/0.png", "output=photos/later", cwd=tmp_path)
    four = {"0.png", "1.png", "2.png", "3.png"}
    for given_input in ("photos", "photos/**", "**/*.png", "photos/**/*.[jp][pn]g"):
        files = find_files(str(tmp_path / given_input))
        assert {path.name for path in files.images} == four
    run(*BOX, "input=**/*.png", "output=o", "sink=coco", cwd=tmp_path)
    assert len(read_json(tmp_path / "o" / "annotations.json")["images"]) == 4
    # An output that is named is an input.
    assert len(find_files(str(tmp_path / "photos" / "overlay")).images) == 1
    assert len(find_files(str(tmp_path / "photos" / "overlay" / "*.jpg")).images) == 1
    # What is left out is said, with a way that works.
    run(*BOX, "input=photos/0.png", "output=p", cwd=tmp_path)
    for given_input in ("p", "p/**/*.jpg"):
        printed = run(*BOX, f"input={given_input}", "output=q", cwd=tmp_path, code=1)
        assert "results of earlier runs in p" in printed and "name their own folder" in printed
    (tmp_path / "list.txt").write_text("p/overlay/0.png.jpg\n")
    run(*BOX, "input=list.txt", "output=q", cwd=tmp_path)


def test_outputs_of_earlier_versions_are_passed_over(folder, tmp_path):
    (folder / "sub" / ".hydra").mkdir()
    assert {path.name for path in find_files(str(folder)).images} == {"0.png", "1.png"}
    assert {path.name for path in find_files(str(folder / "**" / "*.png")).images} == {"0.png", "1.png"}


def test_default_outputs_within_a_second_differ(folder, tmp_path):
    code = "from grounded_sam.config.compose import compose; print(compose([]).output, compose([]).output)"
    first, second = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert first != second and Path(first).parent == Path(second).parent


def test_shards_that_are_started_by_hand_are_kept_apart(folder, tmp_path):
    for shard in range(2):
        shards = (f"source.shard={shard}", "source.num_shards=2")
        printed = run(*BOX, "input=photos", "output=o", "sink=[store,coco]", *shards, cwd=tmp_path)
        assert f"input={tmp_path / 'o'} " in printed  # to export the store
    assert all((tmp_path / "o" / str(shard) / "run.json").is_file() for shard in range(2))
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"0", "1", "store"}
    images = [
        image for shard in range(2) for image in read_json(tmp_path / "o" / str(shard) / "annotations.json")["images"]
    ]
    assert len(images) == 4


@pytest.mark.parametrize("arguments", [(), ("sink=[coco,store]", "select.top_k=1")])
def test_a_saved_config_runs_again_as_it_is(folder, tmp_path, arguments):
    run(*BOX, "input=photos/0.png", "output=o", *arguments, cwd=tmp_path)
    saved = ("--config-path", str(tmp_path / "o" / ".hydra"), "--config-name", "config")
    run(*saved, "output=again", cwd=tmp_path)
    assert (tmp_path / "again" / "annotations.json").read_text() == (tmp_path / "o" / "annotations.json").read_text()
    assert not list(tmp_path.glob("outputs")) and not list(tmp_path.rglob("*.log"))
    saved = ("--config-path", str(tmp_path / "again" / ".hydra"), "--config-name", "config")
    run(*saved, cwd=tmp_path)  # into the same output


def test_paths_are_relative_to_the_start_also_when_hydra_changes_folder(folder, tmp_path):
    run(*BOX, "input=photos/0.png", "output=o", "hydra.job.chdir=true", cwd=tmp_path)
    run("-m", *BOX, "input=photos/0.png", "output=s", "hydra.job.chdir=true", "select.score=0.4,0.5", cwd=tmp_path)
    assert (tmp_path / "o" / "annotations.json").is_file() and (tmp_path / "s" / "1" / "annotations.json").is_file()


def test_a_cache_of_features_keeps_files_of_others(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(1000)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.safetensors").write_text("not one")
    for path in tmp_path.iterdir():
        os.utime(path, ns=(0, 0))
    cache = FeatureCache(tmp_path, gigabytes=1e-6)
    for key in ("a" * 64, "b" * 64):
        cache.put(key, {"x": torch.zeros(1000)})
    assert {path.stem for path in tmp_path.iterdir()} == {"model", "notes", "b" * 64}


def test_a_store_is_not_written_through_a_link(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "store").symlink_to(tmp_path / "outside")
    for flags in ((), ("-m", "source.shard=0,1", "source.num_shards=2")):
        printed = run(*flags, *BOX, "input=photos", "output=o", "sink=store", cwd=tmp_path, code=1)
        assert "remove the link" in printed and not list((tmp_path / "outside").iterdir())


def test_jobs_of_a_sweep_need_folders_of_their_own(labels, tmp_path):
    sweep = ("-m", *LABELS, ONE, "select.score=0.4,0.5", "sink=coco")
    printed = run(*sweep, "output=o", "hydra.sweep.subdir=job", cwd=tmp_path, code=1)
    assert "jobs 0 and 1 of the sweep have the same folder" in printed and "1 of 2 jobs failed" in printed
    run(*sweep, "output=p", "hydra.sweep.subdir=${hydra.job.num}", cwd=tmp_path)  # as the message says
    run(*sweep, "output=q", "hydra.sweep.subdir=a/${hydra.job.override_dirname}", cwd=tmp_path)


def test_a_sweep_in_nested_folders_reports_its_own_jobs(folder, tmp_path):
    truth = {"images": [{"id": 1, "file_name": "0.png", "width": 260, "height": 200}], "annotations": []}
    truth["categories"] = [{"id": 1, "name": "a"}]
    truth["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    sweep = ("-m", *BOX, "input=photos/0.png", "truth=truth.json", "output=o")
    subdir = "hydra.sweep.subdir=jobs/score-${select.score}"
    run(*sweep, subdir, "sink=metrics", "select.score=0.4,0.5,0.6", cwd=tmp_path)
    rows = (tmp_path / "o" / "sweep.csv").read_text().splitlines()[1:]
    assert {row.partition(",")[0] for row in rows} == {f"jobs/score-{score}" for score in (0.4, 0.5, 0.6)}
    # The same folders, but these jobs measure nothing, or fail.
    printed = run(*sweep, subdir, "sink=metrics", "select.score=0.5,1.6", cwd=tmp_path, code=1)
    assert "2 jobs, the best first" in printed and "1 of 2 jobs failed" in printed
    printed = run(*sweep, subdir, "sink=coco", "select.score=0.4,0.5", cwd=tmp_path)
    assert "best first" not in printed
    result = run_command("grounded_sam.cli.report", ["o"], tmp_path)
    assert result.returncode == 0 and "2 jobs" in result.stdout


def test_load_in_several_threads(scenes):
    code = (
        "from concurrent.futures import ThreadPoolExecutor; from grounded_sam import load\n"
        "def work(i): return load(preset='shapes', segmenter=('sam', 'sam2')[i % 2]).detector is not None\n"
        "print(list(ThreadPoolExecutor(4).map(work, range(4))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == "[True, True, True, True]"

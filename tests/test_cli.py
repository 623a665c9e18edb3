"""The command, run from another folder in a new process, as users do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import av
import numpy as np
import pytest
from checkpoints import grounding_dino
from command import run_command
from pycocotools.coco import COCO

from grounded_sam.formats.store import StoreReader

COMMAND = Path(sys.executable).with_name("grounded-sam")


def run(*args: str | Path, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command, check its exit code and that no traceback is printed, and return the process."""
    process = run_command("grounded_sam.cli.main", [str(arg) for arg in args], cwd, env)
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process


def run_installed(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command, which must succeed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(COMMAND), *map(str, args)], cwd=cwd, capture_output=True, text=True, check=True, timeout=600, env=env
    )


def error_line(*args: str | Path, cwd: Path) -> str:
    """Run the command, which must fail, and return the one line of its error message."""
    lines = [line for line in run(*args, cwd=cwd, code=1).stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("grounded-sam: ")
    return lines[0].removeprefix("grounded-sam: ")


def test_help_shows_examples_choices_and_keys(tmp_path):
    text = run("--help", cwd=tmp_path).stdout
    for part in (
        "grounded-sam input=street.jpg 'text=[car, wheel]'",
        "detector: clicks, ensemble, everything, florence2, grounding_dino",
        "score:",
    ):
        assert part in text


def test_help_equals_what_hydra_composes(tmp_path):
    """The command prints a file, which `make help` writes, because composing takes three times as long as the rest."""
    assert run("--help", cwd=tmp_path).stdout == run("--help", "input=null", cwd=tmp_path).stdout


def test_help_imports_no_heavy_library(tmp_path):
    code = "import sys; from grounded_sam.cli.main import main; sys.argv = ['grounded-sam', '--help']; main(); "
    code += "sys.exit(str({'cv2', 'hydra', 'numpy', 'supervision', 'torch', 'transformers'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.stderr.strip() == "set()"


def test_the_demo_runs_in_any_folder(tmp_path):
    out = run_installed("preset=demo", "output=here", cwd=tmp_path)
    assert len(list((tmp_path / "here" / "overlay").glob("*.jpg"))) == 4
    coco = COCO(tmp_path / "here" / "annotations.json")
    stills = [i for i, image in coco.imgs.items() if "video" not in image]
    assert len(stills) == 4
    assert len(coco.getAnnIds(imgIds=stills)) >= 9
    assert "Processed 100 images and frames" in out.stdout
    with av.open(str(tmp_path / "here" / "overlay" / "clip.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 96
        assert video.duration / 1e6 == pytest.approx(4.0, abs=0.1)
    tracks = {}
    for annotation in coco.anns.values():
        if "track_id" in annotation:
            tracks.setdefault(annotation["category_id"], {}).setdefault(annotation["track_id"], []).append(annotation)
    names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    # Each of the five shapes of the clip keeps one id for most of the frames that show it.
    long_tracks = {names[c] for c, ids in tracks.items() if max(map(len, ids.values())) >= 40}
    assert long_tracks >= {"red circle", "yellow triangle", "blue square", "green star", "orange ring"}
    assert str(tmp_path / "here" / "overlay") in out.stdout.replace("\n", "")


def test_a_folder_is_processed_and_its_bad_files_are_listed(tmp_path, folder):
    (folder / "bad.png").write_bytes(b"")
    out = run(
        "preset=shapes",
        f"input={folder}",
        "text=[red shape, blue shape]",
        "output=out",
        "sink=[coco,masks]",
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == [
        {"file": "bad.png", "reason": "the file is empty"}
    ]
    assert "bad.png: the file is empty" in out.stdout
    coco = COCO(tmp_path / "out" / "annotations.json")
    assert {i["file_name"] for i in coco.imgs.values()} == {"0.png", "1.png", "sub/2.png", "sub/3.png"}
    masks = list((tmp_path / "out" / "masks").rglob("*.png"))
    assert len([m for m in masks if m.is_file()]) == len(coco.anns)
    assert (tmp_path / "out" / ".hydra" / "overrides.yaml").is_file()


def test_clicks_and_everything_write_to_the_same_sinks(tmp_path, folder):
    (tmp_path / "clicks.json").write_text(json.dumps([{"class": "thing", "points": [[100, 100]], "image": "0.png"}]))
    run("preset=shapes", "detector=clicks", "detector.prompts=clicks.json", f"input={folder}", "output=a", cwd=tmp_path)
    assert len(COCO(tmp_path / "a" / "annotations.json").anns) == 1
    run(
        "preset=shapes",
        "detector=everything",
        "segmenter=sam",
        "detector.points_per_side=6",
        "detector.pred_iou_thresh=0.5",
        "detector.stability_score_thresh=0.5",
        f"input={folder / '0.png'}",
        "output=b",
        cwd=tmp_path,
    )
    assert len(COCO(tmp_path / "b" / "annotations.json").anns) > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["selct.score=1"], "did you mean 'select.score'?"),
        (["select.scor=0.1"], "did you mean 'select.score'?"),
        (
            ["detector=yolo"],
            "unknown choice detector=yolo; the choices are clicks, ensemble, everything, florence2, grounding_dino",
        ),
        (["text=[a]"], "input is missing"),
        (["input=nowhere.jpg", "text=[a]"], "no such file or folder: nowhere.jpg"),
        (["input=nowhere.mp4", "text=[a]"], "no such file or folder: nowhere.mp4"),
        (["preset=demo", "track.redetect_every=0"], "track.redetect_every must be an integer >= 1"),
        (["preset=demo", "tracker.prompt=word"], "tracker.prompt must be auto, mask or box"),
        (
            ["preset=demo", "tracker=sort"],
            "unknown choice tracker=sort; the choices are boxes, edgetam, none, sam2, sam2_hf",
        ),
        (["input=.", "text=[a]"], "no image and no video in ."),
        (["input=builtin:demo", "preset=shapes"], "text is missing"),
        (["input=builtin:demo", "preset=shapes", "text=[?]"], "without letters"),
        (["input=builtin:demo", "text=[a]"], "weights 'IDEA-Research/grounding-dino-tiny' are not in the cache"),
        (["preset=demo", "checkpoints.sam2=nowhere.pt"], "no weights at 'nowhere.pt'"),
        (["preset=demo", "select.score=2"], "select.score must be a number from 0 to 1, got 2"),
        (["preset=demo", "detector._target_=no.such.Class"], "cannot build detector from no.such.Class"),
        (["preset=demo", "+detector.colour=red"], "cannot build detector from"),
        (["preset=demo", "device=cuda:7"], "torch sees"),
        (["preset=demo", "text={a: [car], b: [car]}"], "belongs to both"),
        (["preset=demo", "output=/proc/no/such/place"], "/proc/no"),
        (["preset=demo", "track.reach=2"], "track.reach was renamed to track.max_center_distance"),
        (["preset=demo", "segmenter.fill_holes=3"], "segmenter.fill_holes was renamed to segmenter.max_hole_area"),
        (["preset=demo", "+phrasing=x"], "phrasing was renamed to prompt_template"),
    ],
)
def test_a_mistake_gives_a_one_line_error(tmp_path, args, message):
    if "device=cuda:7" in args:
        import torch

        if torch.cuda.is_available():
            pytest.skip("a CUDA device is present")
    assert message in error_line(*args, cwd=tmp_path)


def test_a_single_unreadable_image_gives_a_one_line_error(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    assert "a.jpg: not an image" in error_line("preset=shapes", "text=[a]", "input=a.jpg", cwd=tmp_path)


def test_a_sweep_over_thresholds_and_segmenters(tmp_path):
    run(
        "-m", "preset=demo", "select.score=0.3,0.9", "segmenter=sam,sam2", "source=images", "sink=coco",
        "output=sweep", cwd=tmp_path,
    )  # fmt: skip
    counts = {}
    for job in range(4):
        folder = tmp_path / "sweep" / str(job)
        overrides = (folder / ".hydra" / "overrides.yaml").read_text()
        counts["0.9" in overrides, "sam2" in overrides] = len(COCO(folder / "annotations.json").anns)
    assert counts[False, True] > counts[True, True]
    assert counts[False, False] == counts[False, True]


def test_the_command_works_after_sam2_was_imported(tmp_path):
    (tmp_path / "app.py").write_text("import sam2\nfrom grounded_sam.cli.main import main\nmain()\n")
    args = ["preset=demo", "source=images", "sink=none", "output=o"]
    for sweep_args in ([], ["-m", "select.score=0.3,0.4"]):
        command = [sys.executable, "app.py", *sweep_args, *args]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr


def test_custom_stages_are_found_by_config_dir_and_by_search_path(tmp_path, folder):
    """As in the README: a class and a YAML file outside the repository."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            '''
            import numpy as np
            import supervision as sv


            class Center:
                """Detect the center of every image."""

                def __init__(self, fraction: float = 0.5):
                    self.fraction = fraction

                def detect(self, frames, vocabulary):
                    return [self.center(frame.image) for frame in frames]

                def center(self, image):
                    height, width = image.shape[:2]
                    half = np.array([width, height, width, height]) / 2
                    box = half + half * self.fraction * np.array([-1, -1, 1, 1])
                    return sv.Detections(xyxy=box[None], confidence=np.ones(1), class_id=np.zeros(1, int))


            class Fill:
                def segment(self, image, detections):
                    detections.mask = np.zeros((len(detections), *image.shape[:2]), bool)
                    for mask, (x1, y1, x2, y2) in zip(detections.mask, detections.xyxy.astype(int)):
                        mask[y1:y2, x1:x2] = True
                    return detections
            '''
        )
    )
    for group, text in {
        "detector": "_target_: mine.Center\nfraction: 0.5\n",
        "segmenter": "_target_: mine.Fill\n",
    }.items():
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / "mine.yaml").write_text(text)
    args = ["detector=mine", "segmenter=mine", f"input={folder / '0.png'}", "text=center", "sink=coco"]
    run("--config-dir", "my_conf", *args, "output=a", cwd=tmp_path)
    run(f"hydra.searchpath=[file://{tmp_path / 'my_conf'}]", *args, "output=b", "detector.fraction=0.25", cwd=tmp_path)
    half, quarter = (COCO(tmp_path / name / "annotations.json").anns[1] for name in "ab")
    assert half["area"] == 130 * 100
    assert quarter["area"] == 4 * (260 // 8) * (200 // 8) or abs(quarter["area"] - 65 * 50) < 120
    message = error_line("--config-dir", "my_conf", "detector=theirs", cwd=tmp_path)
    assert message.startswith(
        "unknown choice detector=theirs; the choices are clicks, ensemble, everything, florence2, "
    )
    assert ", llmdet, mine, " in message


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_termination_keep_what_was_written(tmp_path, folder, end):
    (tmp_path / "slow.py").write_text(
        "import time, numpy as np, supervision as sv\n"
        "class Slow:\n"
        "    def detect(self, frames, vocabulary):\n"
        "        time.sleep(1.0)\n"
        "        boxes = np.array([[1.0, 1, 9, 9]])\n"
        "        return [sv.Detections(xyxy=boxes, confidence=np.ones(1), class_id=np.zeros(1, int))]\n"
    )
    (tmp_path / "conf" / "detector").mkdir(parents=True)
    (tmp_path / "conf" / "detector" / "slow.yaml").write_text("_target_: slow.Slow\n")
    args = ["--config-dir", "conf", "detector=slow", "segmenter=none", f"input={folder}", "text=a", "output=out"]
    process = subprocess.Popen(
        [str(COMMAND), *args],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore SIGINT
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out" / "overlay").glob("*.jpg"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(end)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Interrupted after" in out
    assert 1 <= len(COCO(tmp_path / "out" / "annotations.json").imgs) < 4


def test_one_run_over_all_unusual_and_malformed_files(tmp_path, data):
    both = tmp_path / "both"
    both.mkdir()
    for name in ("photos", "malformed"):
        (both / name).symlink_to(data / name)
    sinks = "sink=[store,coco,overlay,yolo,voc,labelme,label_studio,cvat,imagefolder,report]"
    args = ["preset=[shapes,label]", "input=both", "text=[red shape]", sinks, "output=out"]
    run(*args, cwd=tmp_path)
    skipped = {s["file"]: s["reason"] for s in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    refused = {
        "truncated_half.jpg", "truncated_header.jpg", "zero_bytes.jpg", "text_renamed.jpg", "html_error.png",
        "png_bad_crc.png", "png_truncated.png", "bomb_header_60000x60000.png", "bomb_real_20000x15000.png",
        "zero_dim_0x10.png", "frames_mixed/14.jpg",
        "audio_only.mp4", "random_bytes.mp4", "truncated_moov_last.mp4", "zero_bytes.mp4",
    }  # fmt: skip
    truncated = {name for name, reason in skipped.items() if "truncated or damaged" in reason}
    assert truncated == {"malformed/corrupt_middle.mp4", "malformed/truncated_moov_first.mp4"}
    in_part = {name for name, reason in skipped.items() if "only the first of several images" in reason}
    assert in_part == {"photos/swan_animated.gif"}
    assert set(skipped) - truncated - in_part == {f"malformed/{name}" for name in refused}
    coco = COCO(tmp_path / "out" / "annotations.json")
    names = {i["file_name"] for i in coco.imgs.values()}
    assert {"photos/truck ütf8 名前 (1).jpg", "photos/tiny_1x1.png", "malformed/jpeg_no_extension"} <= names
    expected = {p.relative_to(data).as_posix() for p in (data / "photos").rglob("*") if p.is_file()}
    assert expected <= names
    images = [image for image in coco.imgs.values() if "video" not in image]
    drawn = [f for f in (tmp_path / "out" / "overlay").rglob("*") if f.is_file()]
    assert len([f for f in drawn if f.suffix != ".mp4"]) == len(images)
    seconds = {
        "corrupt_middle.mp4": None, "hevc_10bit.mp4": 1.0, "mjpeg_6fps.avi.mp4": 1.0, "odd_427x239_yuv444.mp4": 1.0,
        "one_frame.mp4": None, "rotation_90.mp4": 2.0, "truncated_moov_first.mp4": 27 / 24, "vfr.mp4": 1.8,
        "vp9.webm.mp4": 1.0,
    }  # fmt: skip
    assert {f.name for f in drawn if f.suffix == ".mp4"} == set(seconds)
    for name, length in seconds.items():
        with av.open(str(tmp_path / "out" / "overlay" / "malformed" / name)) as video:
            assert length is None or video.duration / 1e6 == pytest.approx(length, abs=0.1), name
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        assert coco.annToMask(annotation).shape == (image["height"], image["width"])
    reader = StoreReader(tmp_path / "out" / "store")
    assert len(reader) == len(coco.imgs)
    assert set(reader.skipped) == set(skipped)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in skipped)
    labels = list((tmp_path / "out" / "yolo" / "labels").rglob("*.txt"))
    assert len(labels) == len(coco.imgs)
    before = {
        f: (tmp_path / "out" / f).read_bytes() for f in ("annotations.json", "cvat.xml", "label_studio/tasks.json")
    }
    rerun = run(*args, cwd=tmp_path)
    assert f"{len(coco.imgs)} from the store" in rerun.stdout
    assert {s["file"] for s in json.loads((tmp_path / "out" / "skipped.json").read_text())} == set(skipped)
    assert before == {f: (tmp_path / "out" / f).read_bytes() for f in before}


def test_random_weights_of_real_size_return_only_the_requested_classes(tmp_path, photos):
    """Swin-T with BERT-base and hiera-tiny from local folders, with the default YAML files and thresholds of 0."""
    from checkpoints import sam2

    grounding_dino(tmp_path / "dino", full=True)
    sam2(tmp_path / "sam2" / "sam2.1_hiera_tiny.pt")
    classes = ["parking entrance sign", "U.S. flag", "T-shirt?", "car", "taxi"]
    run(
        f"input={photos / 'truck.jpg'}",
        f"text=[{', '.join(classes)}]",
        "checkpoints.grounding_dino=./dino",
        "checkpoints.sam2=sam2",
        "select.score=0",
        "select.top_k=20",
        "output=out",
        cwd=tmp_path,
    )
    coco = COCO(tmp_path / "out" / "annotations.json")
    assert 0 < len(coco.anns) <= 20
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == classes
    assert all("segmentation" in a and "mask_score" in a for a in coco.anns.values())


def test_a_folder_of_frames_is_written_as_a_video_in_every_format(tmp_path, data):
    """Files are read back with pycocotools, Pillow and json."""
    from PIL import Image

    frames = data / "vos" / "JPEGImages" / "480p" / "blackswan"
    run(
        "preset=shapes",
        "source=video",
        f"input={frames}",
        "source.stop=12",
        "source.max_side=320",
        "text=[black shape, red shape]",
        "select.score=0.002",
        "track.max_objects=3",
        "sink=[coco,jsonl,youtube_vis,masks]",
        "sink.masks.mode=davis",
        "output=out",
        cwd=tmp_path,
    )
    coco = COCO(tmp_path / "out" / "annotations.json")
    assert [image["file_name"] for image in coco.imgs.values()] == [f"blackswan/{i:05d}.jpg" for i in range(12)]
    assert {image["video"] for image in coco.imgs.values()} == {"blackswan"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(12))
    vis = json.loads((tmp_path / "out" / "youtube_vis.json").read_text())
    assert vis["videos"][0]["length"] == 12 and len(vis["videos"][0]["file_names"]) == 12
    assert coco.anns and {a["track_id"] for a in coco.anns.values()} == {a["track_id"] for a in vis["annotations"]}
    for i, image in coco.imgs.items():
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=i))
        id_map = Image.open(tmp_path / "out" / "masks" / "blackswan" / f"{i - 1:05d}.png")
        assert id_map.mode == "P" and id_map.size == (image["width"], image["height"]) == (320, 180)
        values = np.asarray(id_map)
        assert set(np.unique(values)) - {0} <= {a["track_id"] for a in annotations}
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert not (values[~mask] == annotation["track_id"]).any()
            track = next(a for a in vis["annotations"] if a["track_id"] == annotation["track_id"])
            assert track["segmentations"][i - 1] == annotation["segmentation"]
            assert track["bboxes"][i - 1] == pytest.approx(annotation["bbox"])
            assert track["category_id"] == annotation["category_id"]
        assert [(o["track_id"], o["segmentation"]) for o in lines[i - 1]["objects"]] == [
            (a["track_id"], a["segmentation"]) for a in annotations
        ]


def test_trackers_and_clicks_work_on_the_command_line(tmp_path):
    entry = "{class: thing, points: [[60, 75]], object: 5}"
    run(
        "preset=[demo]", "detector=clicks", f"detector.prompts=[{entry}]", "text=null", "tracker=sam2_hf",
        "input=clip.mp4", "source.stop=4", "output=out", "sink=coco",
        cwd=with_demo_clip(tmp_path),
    )  # fmt: skip
    coco = COCO(tmp_path / "out" / "annotations.json")
    assert [a["track_id"] for a in coco.anns.values()] == [5] * 4
    run(
        "preset=demo", "tracker=none", "input=clip.mp4", "source.stop=2", "output=none", "sink=coco",
        cwd=with_demo_clip(tmp_path),
    )  # fmt: skip
    assert not any("track_id" in a for a in COCO(tmp_path / "none" / "annotations.json").anns.values())
    message = error_line(
        "preset=demo", "tracker=none", "input=clip.mp4", "source.stop=2", "output=y", "sink=youtube_vis", cwd=tmp_path
    )
    assert "sink=youtube_vis needs tracks" in message


def with_demo_clip(folder: Path) -> Path:
    """Copy the clip of the demo into a folder and return the folder."""
    from grounded_sam.weights.loading import BUILTIN_DIR

    (folder / "clip.mp4").write_bytes((BUILTIN_DIR.parent / "examples" / "demo" / "clip.mp4").read_bytes())
    return folder

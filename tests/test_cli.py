"""The installed command, as a user runs it: from another folder, in a process of its own."""

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
from pycocotools.coco import COCO

from grounded_sam.formats.store import StoreReader

COMMAND = Path(sys.executable).with_name("grounded-sam")


def run(*words: str | Path, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code; nobody is ever shown a traceback."""
    out = subprocess.run(
        [str(COMMAND), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )
    assert out.returncode == code, out.stdout + out.stderr
    assert "Traceback" not in out.stderr
    return out


def complaint(*words: str | Path, cwd: Path) -> str:
    """The one line that a mistake is answered with."""
    lines = [line for line in run(*words, cwd=cwd, code=1).stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("grounded-sam: ")
    return lines[0].removeprefix("grounded-sam: ")


def test_help_teaches(tmp_path):
    text = run("--help", cwd=tmp_path).stdout
    for word in (
        "grounded-sam input=street.jpg 'text=[car, wheel]'",
        "detector: clicks, ensemble, everything, florence2, grounding_dino",
        "score:",
    ):
        assert word in text


def test_help_is_what_hydra_makes_of_the_config(tmp_path):
    """It is printed from a file, since composing takes three times as long as the rest; `make help` writes it."""
    assert run("--help", cwd=tmp_path).stdout == run("--help", "input=null", cwd=tmp_path).stdout


def test_help_imports_nothing_heavy(tmp_path):
    code = "import sys; from grounded_sam.cli.main import main; sys.argv = ['grounded-sam', '--help']; main(); "
    code += "sys.exit(str({'cv2', 'hydra', 'numpy', 'supervision', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_the_demo_runs_from_anywhere(tmp_path):
    out = run("preset=demo", "output=here", cwd=tmp_path)
    assert len(list((tmp_path / "here" / "overlay").glob("*.jpg"))) == 4
    coco = COCO(tmp_path / "here" / "annotations.json")
    stills = [i for i, image in coco.imgs.items() if "video" not in image]
    assert len(stills) == 4
    assert len(coco.getAnnIds(imgIds=stills)) >= 9
    assert "looked at 100 pictures and frames" in out.stdout
    with av.open(str(tmp_path / "here" / "overlay" / "clip.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 96
        assert video.duration / 1e6 == pytest.approx(4.0, abs=0.1)
    tracks = {}
    for annotation in coco.anns.values():
        if "track_id" in annotation:
            tracks.setdefault(annotation["category_id"], {}).setdefault(annotation["track_id"], []).append(annotation)
    names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    # Each of the five shapes of the clip has one id for most of the frames it is in.
    lasting = {names[c] for c, ids in tracks.items() if max(map(len, ids.values())) >= 40}
    assert lasting >= {"red circle", "yellow triangle", "blue square", "green star", "orange ring"}
    assert str(tmp_path / "here" / "overlay") in out.stdout.replace("\n", "")


def test_folder_in_results_out_bad_files_listed(tmp_path, folder):
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


def test_clicks_and_everything_go_into_the_same_sinks(tmp_path, folder):
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
    ("words", "says"),
    [
        (["selct.score=1"], "did you mean 'select'?"),
        (["select.scor=0.1"], "did you mean 'select.score'?"),
        (
            ["detector=yolo"],
            "there is no detector=yolo; the choices are clicks, ensemble, everything, florence2, grounding_dino",
        ),
        (["text=[a]"], "input is missing"),
        (["input=nowhere.jpg", "text=[a]"], "no such file or folder: nowhere.jpg"),
        (["input=nowhere.mp4", "text=[a]"], "no such file or folder: nowhere.mp4"),
        (["preset=demo", "track.redetect_every=0"], "track.redetect_every must be a whole number from 1"),
        (["preset=demo", "tracker.prompt=word"], "tracker.prompt must be auto, mask or box"),
        (
            ["preset=demo", "tracker=sort"],
            "there is no tracker=sort; the choices are boxes, edgetam, none, sam2, sam2_hf",
        ),
        (["input=.", "text=[a]"], "no picture and no video in ."),
        (["input=builtin:demo", "preset=shapes"], "text is missing"),
        (["input=builtin:demo", "preset=shapes", "text=[?]"], "without letters"),
        (["input=builtin:demo", "text=[a]"], "cannot get the weights 'IDEA-Research/grounding-dino-tiny'"),
        (["preset=demo", "checkpoints.sam2=nowhere.pt"], "no weights at 'nowhere.pt'"),
        (["preset=demo", "select.score=2"], "select.score must be a number from 0 to 1, got 2"),
        (["preset=demo", "detector._target_=no.such.Class"], "cannot build detector from no.such.Class"),
        (["preset=demo", "+detector.colour=red"], "cannot build detector from"),
        (["preset=demo", "device=cuda:7"], "torch sees"),
        (["preset=demo", "text={a: [car], b: [car]}"], "stands for both"),
        (["preset=demo", "output=/proc/no/such/place"], "/proc/no"),
    ],
)
def test_mistakes_are_answered_with_one_line(tmp_path, words, says):
    if "device=cuda:7" in words:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    assert says in complaint(*words, cwd=tmp_path)


def test_a_single_unreadable_picture_is_one_line(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    assert "a.jpg: not a picture" in complaint("preset=shapes", "text=[a]", "input=a.jpg", cwd=tmp_path)


def test_a_multirun_of_presets_and_thresholds(tmp_path):
    run(
        "-m", "preset=demo", "select.score=0.3,0.9", "segmenter=sam,sam2", "source=images", "sink=coco",
        "output=sweep", cwd=tmp_path,
    )  # fmt: skip
    counts = {}
    for job in range(4):
        folder = tmp_path / "sweep" / str(job)
        words = (folder / ".hydra" / "overrides.yaml").read_text()
        counts["0.9" in words, "sam2" in words] = len(COCO(folder / "annotations.json").anns)
    assert counts[False, True] > counts[True, True]
    assert counts[False, False] == counts[False, True]


def test_sam2_imported_before_the_command(tmp_path):
    (tmp_path / "app.py").write_text("import sam2\nfrom grounded_sam.cli.main import main\nmain()\n")
    words = ["preset=demo", "sink=none", "output=o"]
    for more in ([], ["-m", "select.score=0.3,0.4"]):
        command = [sys.executable, "app.py", *more, *words]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr


def test_stages_from_outside_the_repository(tmp_path, folder):
    """The example of the README: a class and a YAML of one's own, by --config-dir and by search path."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            '''
            import numpy as np
            import supervision as sv


            class Middle:
                """Finds the middle of every picture."""

                def __init__(self, share: float = 0.5):
                    self.share = share

                def detect(self, frames, vocabulary):
                    return [self.one(frame.image) for frame in frames]

                def one(self, image):
                    height, width = image.shape[:2]
                    half = np.array([width, height, width, height]) / 2
                    box = half + half * self.share * np.array([-1, -1, 1, 1])
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
        "detector": "_target_: mine.Middle\nshare: 0.5\n",
        "segmenter": "_target_: mine.Fill\n",
    }.items():
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / "mine.yaml").write_text(text)
    words = ["detector=mine", "segmenter=mine", f"input={folder / '0.png'}", "text=middle", "sink=coco"]
    run("--config-dir", "my_conf", *words, "output=a", cwd=tmp_path)
    run(f"hydra.searchpath=[file://{tmp_path / 'my_conf'}]", *words, "output=b", "detector.share=0.25", cwd=tmp_path)
    one, two = (COCO(tmp_path / name / "annotations.json").anns[1] for name in "ab")
    assert one["area"] == 130 * 100
    assert two["area"] == 4 * (260 // 8) * (200 // 8) or abs(two["area"] - 65 * 50) < 120
    said = complaint("--config-dir", "my_conf", "detector=theirs", cwd=tmp_path)
    assert said.startswith("there is no detector=theirs; the choices are clicks, ensemble, everything, florence2, ")
    assert ", llmdet, mine, " in said


def test_ctrl_c_leaves_what_was_written(tmp_path, folder):
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
    words = ["--config-dir", "conf", "detector=slow", "segmenter=none", f"input={folder}", "text=a", "output=out"]
    process = subprocess.Popen(
        [str(COMMAND), *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a background job ignores it
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out" / "overlay").glob("*.jpg"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted after" in out
    assert 1 <= len(COCO(tmp_path / "out" / "annotations.json").imgs) < 4


def test_all_odd_and_malformed_files_in_one_run(tmp_path, data):
    both = tmp_path / "both"
    both.mkdir()
    for name in ("photos", "malformed"):
        (both / name).symlink_to(data / name)
    sinks = "sink=[store,coco,overlay,yolo,voc,labelme,label_studio,cvat,imagefolder,report]"
    words = ["preset=[shapes,label]", "input=both", "text=[red shape]", sinks, "output=out"]
    run(*words, cwd=tmp_path)
    skipped = {s["file"]: s["reason"] for s in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    refused = {
        "truncated_half.jpg", "truncated_header.jpg", "zero_bytes.jpg", "text_renamed.jpg", "html_error.png",
        "png_bad_crc.png", "png_truncated.png", "bomb_header_60000x60000.png", "bomb_real_20000x15000.png",
        "zero_dim_0x10.png", "frames_mixed/14.jpg",
        "audio_only.mp4", "random_bytes.mp4", "truncated_moov_last.mp4", "zero_bytes.mp4",
    }  # fmt: skip
    cut = {name for name, reason in skipped.items() if "cut or damaged" in reason}
    assert cut == {"malformed/corrupt_middle.mp4", "malformed/truncated_moov_first.mp4"}
    assert set(skipped) - cut == {f"malformed/{name}" for name in refused}
    coco = COCO(tmp_path / "out" / "annotations.json")
    names = {i["file_name"] for i in coco.imgs.values()}
    assert {"photos/truck ütf8 名前 (1).jpg", "photos/tiny_1x1.png", "malformed/jpeg_no_extension"} <= names
    wanted = {p.relative_to(data).as_posix() for p in (data / "photos").rglob("*") if p.is_file()}
    assert wanted <= names
    stills = [image for image in coco.imgs.values() if "video" not in image]
    drawn = [f for f in (tmp_path / "out" / "overlay").rglob("*") if f.is_file()]
    assert len([f for f in drawn if f.suffix != ".mp4"]) == len(stills)
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
    again = run(*words, cwd=tmp_path)
    assert f"{len(coco.imgs)} of them stored before" in again.stdout
    assert {s["file"] for s in json.loads((tmp_path / "out" / "skipped.json").read_text())} == set(skipped)
    assert before == {f: (tmp_path / "out" / f).read_bytes() for f in before}


def test_random_weights_of_real_size_name_only_the_classes_asked_for(tmp_path, photos):
    """Swin-T with BERT-base and hiera-tiny from local folders, through the shipped YAMLs, thresholds at 0."""
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


def test_a_folder_of_frames_as_a_video_in_every_format(tmp_path, data):
    """Read back by the tools of the formats: pycocotools, Pillow, and plain JSON."""
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
    assert [image["file_name"] for image in coco.imgs.values()] == [f"{i:05d}.jpg" for i in range(12)]
    assert {image["video"] for image in coco.imgs.values()} == {"blackswan"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(12))
    vis = json.loads((tmp_path / "out" / "youtube_vis.json").read_text())
    assert vis["videos"][0]["length"] == 12 and len(vis["videos"][0]["file_names"]) == 12
    assert coco.anns and {a["track_id"] for a in coco.anns.values()} == {a["track_id"] for a in vis["annotations"]}
    for i, image in coco.imgs.items():
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=i))
        ids = Image.open(tmp_path / "out" / "masks" / f"{i - 1:05d}.png")
        assert ids.mode == "P" and ids.size == (image["width"], image["height"]) == (320, 180)
        values = np.asarray(ids)
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


def test_trackers_and_clicks_from_the_command_line(tmp_path):
    entry = "{class: thing, points: [[60, 75]], object: 5}"
    run(
        "preset=[demo]", "detector=clicks", f"detector.prompts=[{entry}]", "text=null", "tracker=sam2_hf",
        "input=clip.mp4", "source.stop=4", "output=out", "sink=coco",
        cwd=example(tmp_path),
    )  # fmt: skip
    coco = COCO(tmp_path / "out" / "annotations.json")
    assert [a["track_id"] for a in coco.anns.values()] == [5] * 4
    run(
        "preset=demo", "tracker=none", "input=clip.mp4", "source.stop=2", "output=none", "sink=coco",
        cwd=example(tmp_path),
    )  # fmt: skip
    assert not any("track_id" in a for a in COCO(tmp_path / "none" / "annotations.json").anns.values())
    said = complaint(
        "preset=demo", "tracker=none", "input=clip.mp4", "source.stop=2", "output=y", "sink=youtube_vis", cwd=tmp_path
    )
    assert "sink=youtube_vis needs tracks" in said


def example(folder: Path) -> Path:
    """A folder with the clip of the demo in it."""
    from grounded_sam.weights.loading import BUILTIN_DIR

    (folder / "clip.mp4").write_bytes((BUILTIN_DIR.parent / "examples" / "demo" / "clip.mp4").read_bytes())
    return folder

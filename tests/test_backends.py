"""Image backbones in OpenVINO and ONNX Runtime, against PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

from grounded_sam import CheckpointError, ConfigError, load
from grounded_sam.acceleration import backends
from grounded_sam.acceleration.backends import BackendSettings, convert
from grounded_sam.shapes.scenes import make_clip, make_scene
from grounded_sam.structures.masks import masks_to_xyxy

BACKENDS = ("openvino", "onnxruntime")
WORDS = ["red circle", "blue square", "green star"]

for package in (*BACKENDS, "onnx"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def scene():
    return make_scene(np.random.default_rng(3))


@pytest.fixture(scope="module")
def picture(scene):
    return scene.image


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random checkpoints by the stage that takes them."""
    place = tmp_path_factory.mktemp("weights")
    return {name: str(getattr(checkpoints, name)(place / name)) for name in ("sam_hq", "edgetam", "sam3_tracker")}


@pytest.fixture
def no_export(monkeypatch):
    """Whoever converts now, fails."""

    def fail(*_args, **_told):
        raise AssertionError("converted again")

    monkeypatch.setattr(torch.onnx, "export", fail)


class Backbone(torch.nn.Module):
    """Gives what backbones give: tensors in lists, tuples and mappings."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, pixels, more=False):
        out = self.layer(pixels)
        return {"maps": [out, (out.relu(), out.mean((2, 3)))], **({"more": out * 2} if more else {})}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmenter", ["sam", "sam2", "sam2_hf", "sam_hq", "edgetam", "sam3_tracker"])
def test_masks_are_those_of_torch(segmenter, backend, scene, folders, tmp_path):
    box = {"class": "it", "box": masks_to_xyxy(np.array(scene.masks[:1]))[0].tolist()}
    extra = [f"checkpoints.{segmenter}='{folders[segmenter]}'"] if segmenter in folders else []
    if segmenter in ("edgetam", "sam3_tracker"):
        extra[0] = extra[0].replace("checkpoints.", "segmenter.").replace(segmenter, "checkpoint", 1)

    def made(backend):
        return load(
            *("preset=shapes", f"segmenter={segmenter}", "detector=clicks", "select.min_area=0", *extra),
            **{"device": "cpu", "backend": backend, "exports": str(tmp_path), "detector.prompts": [box]},
        )

    plain, other = made("torch"), made(backend)
    a, b = plain.segment(scene.image), other.segment(scene.image)
    assert a.mask.any() or segmenter in folders  # those of random weights
    assert (a.mask != b.mask).sum() <= 1e-4 * a.mask.size  # logits of zero, but for rounding
    np.testing.assert_allclose(a.data["mask_score"], b.data["mask_score"], atol=1e-4)
    assert len(list(tmp_path.glob("*/backbone.onnx"))) == 1  # which ran


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mm", [False, True], ids=["grounding_dino", "mm_grounding_dino"])
def test_boxes_are_those_of_torch_for_pictures_of_any_size(mm, backend, tmp_path):
    folder, kept = checkpoints.grounding_dino(tmp_path / "dino", mm=mm), tmp_path / "kept"
    words = ["select.score=0", "select.nms=null", "select.min_area=0", "segmenter=none"]
    plain, other = (
        load(f"checkpoints.grounding_dino='{folder}'", f"exports={kept}", *words, device="cpu", backend=b)
        for b in ("torch", backend)
    )
    rng = np.random.default_rng(0)
    for size in ((90, 120), (120, 90), (90, 120)):
        image = rng.integers(0, 255, (*size, 3), np.uint8)
        a, b = (model.segment(image, ["car", "toy wheel"]) for model in (plain, other))
        order = [np.lexsort(np.round(found.xyxy, 1).T) for found in (a, b)]
        assert len(a) == len(b) > 0
        np.testing.assert_allclose(a.xyxy[order[0]], b.xyxy[order[1]], atol=1e-2)
        np.testing.assert_allclose(a.confidence[order[0]], b.confidence[order[1]], atol=1e-4)
    assert len(list(kept.glob("*/backbone.onnx"))) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tracker", ["sam2", "sam2_hf"])
def test_a_clip_is_followed_alike(tracker, backend, tmp_path):
    scenes = make_clip(np.random.default_rng([5, 3]), 4, count=3, size_hw=(180, 260))
    frames, words = [scene.image for scene in scenes], [" ".join(pair) for pair in scenes[0].pairs]
    plain, other = (
        load(f"tracker={tracker}", "segmenter=none", f"exports={tmp_path}", preset="shapes", device="cpu", backend=b)
        for b in ("torch", backend)
    )
    for a, b in zip(plain.track(frames, words), other.track(frames, words), strict=True):
        assert len(a.detections) > 0
        assert a.detections.tracker_id.tolist() == b.detections.tracker_id.tolist()
        both = (a.detections.mask & b.detections.mask).sum((1, 2))
        assert (both >= 0.995 * (a.detections.mask | b.detections.mask).sum((1, 2))).all()
    assert len(list(tmp_path.glob("*/backbone.onnx"))) == 2  # of the detector and of the tracker


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["balanced", "fast"])
def test_low_precision_finds_the_same(precision, backend, picture):
    words = ["red circle", "blue square", "green star", "orange triangle"]
    a, b = (
        load(preset="shapes", device="cpu", backend=x, precision=p).segment(picture, words)
        for x, p in (("torch", "exact"), (backend, precision))
    )
    assert len(a) == len(b) and sorted(a.data["class_name"]) == sorted(b.data["class_name"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_keep_their_form(backend, tmp_path):
    backbone, plain = Backbone().eval(), Backbone().eval()
    convert(backbone, BackendSettings(backend, str(tmp_path / "kept")), "exact")
    pixels = torch.randn(2, 3, 9, 7)
    with torch.inference_mode():
        expected, got = plain(pixels, more=True), backbone(pixels, more=True)
        assert list(got) == ["maps", "more"] and isinstance(got["maps"][1], tuple)
        for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(got), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert list(backbone(pixels)) == ["maps"]  # asked for less
        first = backbone(pixels)["maps"][0].clone()
        kept = backbone(pixels)["maps"][0]
        backbone(pixels + 1)
    torch.testing.assert_close(kept, first)  # the next picture is not written over it


def test_what_was_converted_once_is_found_again_by_both_back_ends(tmp_path, request):
    pixels = torch.randn(1, 3, 8, 8)
    first = Backbone().eval()
    convert(first, BackendSettings("openvino", str(tmp_path)), "exact")
    expected = first(pixels)["maps"][0]
    request.getfixturevalue("no_export")
    for backend in BACKENDS:
        again = Backbone().eval()
        convert(again, BackendSettings(backend, str(tmp_path)), "exact")
        torch.testing.assert_close(again(pixels)["maps"][0], expected, atol=1e-5, rtol=1e-5)
    other = Backbone(seed=1).eval()  # weights of its own, which the file is not for
    convert(other, BackendSettings("openvino", str(tmp_path)), "exact")
    with pytest.raises(CheckpointError, match="converted again"):
        other(pixels)
    assert [path.name.split("-")[:2] for path in tmp_path.iterdir()] == [["Backbone", "1x3x8x8"]]


def test_another_process_that_was_faster_is_not_written_over(tmp_path, monkeypatch):
    pixels = torch.randn(1, 3, 8, 8)
    first, second = Backbone().eval(), Backbone().eval()
    convert(first, BackendSettings("onnxruntime", str(tmp_path)), "exact")
    convert(second, BackendSettings("onnxruntime", str(tmp_path)), "exact")
    export, files = torch.onnx.export, []

    def slow(*args, **told):
        export(*args, **told)
        if not files:
            files.append(None)
            first(pixels)  # has it all done meanwhile
            files.extend((path, path.stat().st_mtime_ns) for path in tmp_path.glob("Backbone*/*.*") if path.is_file())

    monkeypatch.setattr(torch.onnx, "export", slow)
    second(pixels)
    assert len(files) == 3 and all(path.stat().st_mtime_ns == at for path, at in files[1:])
    assert len(list(tmp_path.iterdir())) == 1


def test_conversions_in_memory_are_bounded(monkeypatch):
    backbone = Backbone().eval()
    convert(backbone, BackendSettings("onnxruntime"), "exact")
    made = []
    monkeypatch.setattr(backends, "_write", lambda *args, _plain=backends._write: made.append(1) or _plain(*args))
    for side in (4, 5, 6, 7, 8, 8, 7, 6, 5, 4):  # that of 4 has gone when it comes again
        backbone(torch.zeros(1, 3, side, side))
    assert len(made) == backends.SIZES + 2


@pytest.mark.parametrize("file", ["backbone.onnx", "about.json"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_conversions_are_named(file, backend, tmp_path):
    pixels = torch.randn(1, 3, 8, 8)
    for broken in (False, True):
        backbone = Backbone().eval()
        convert(backbone, BackendSettings(backend, str(tmp_path)), "exact")
        if broken:
            (path,) = tmp_path.glob(f"*/{file}")
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            with pytest.raises(CheckpointError, match=str(path.parent)):
                backbone(pixels)
        else:
            backbone(pixels)


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_conversion_that_is_off_is_not_kept(wrong, tmp_path, monkeypatch):
    backbone = Backbone().eval()
    convert(backbone, BackendSettings("onnxruntime", str(tmp_path)), "exact")
    opened = backends._opened

    def off(*args):
        return lambda x: [*opened(*args)(x)[:-1], opened(*args)(x)[-1] + wrong]

    monkeypatch.setattr(backends, "_opened", off)
    with pytest.raises(CheckpointError, match="Backbone would be off by .* in onnxruntime; say backend=torch"):
        backbone(torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_choices_that_cannot_work_are_refused_before_weights_are_read(monkeypatch):
    with pytest.raises(ConfigError, match="segmenter.backend must be torch, openvino or onnxruntime, got 'tensorrt'"):
        load("segmenter.backend=tensorrt", preset="shapes")
    with pytest.raises(ConfigError, match="detector.backend=openvino is for the CPU, not for cuda; say device=cpu"):
        load(preset="shapes", backend="openvino", device="cuda") if torch.cuda.is_available() else BackendSettings(
            "openvino"
        ).check("cuda", "detector")
    with pytest.raises(ConfigError, match="takes detector.dtype=float32, got bfloat16"):
        load("detector.dtype=bfloat16", preset="shapes", backend="openvino", device="cpu")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"needs openvino: pip install 'grounded_sam\[openvino\]'"):
        load(preset="shapes", backend="openvino", device="cpu")


def run(*words):
    command = [sys.executable, "-m", "grounded_sam.cli.export", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_writes_what_runs_then_take(tmp_path, picture, request):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in (("a", (160, 160)), ("b", (160, 120)), ("c", (160, 160))):
        Image.fromarray(picture).resize(size).save(photos / f"{name}.png")
    words = ["preset=shapes", "device=cpu", "backend=onnxruntime", f"exports={tmp_path / 'made'}"]
    done = run(*words, f"input={photos}")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0] == f"conversions in {tmp_path / 'made'}:"
    assert [line.split("-")[0].strip() for line in told[1:]] == ["Hiera", "ResNetBackbone", "ResNetBackbone"]
    for about in (tmp_path / "made").glob("*/about.json"):
        assert json.loads(about.read_text())["off"] < 1e-4
    request.getfixturevalue("no_export")
    model = load(*words)
    model.segment(photos / "b.png", WORDS)
    found, plain = model.segment(photos / "a.png", WORDS), load(*words[:2]).segment(photos / "a.png", WORDS)
    assert len(found) == len(plain)
    np.testing.assert_allclose(found.xyxy, plain.xyxy, atol=0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["preset=shapes", "input=x"], "say what to convert for: backend=openvino or backend=onnxruntime"),
        (["preset=shapes", "input=x", "backend=openvino"], "say where to put conversions: exports=FOLDER"),
        (["preset=shapes", "backend=openvino", "exports=made"], "say input=PICTURE"),
        (["preset=shapes", "backedn=openvino"], "unknown key 'backedn'; did you mean 'backend'?"),
    ],
)
def test_the_command_says_in_a_line_what_is_wanting(words, said):
    done = run(*words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("grounded-sam-export: ") and said in done.stderr


def test_the_command_teaches():
    done = run("--help")
    assert (
        done.returncode == 0 and "grounded-sam-export backend=openvino exports=exports input=photo.jpg" in done.stdout
    )

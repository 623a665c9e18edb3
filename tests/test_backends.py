"""Image backbones in OpenVINO and ONNX Runtime, compared with PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from command import run_command
from PIL import Image

from grounded_sam import CheckpointError, ConfigError, load
from grounded_sam.acceleration import backends
from grounded_sam.acceleration.backends import BackendSettings, convert_backbone
from grounded_sam.shapes.scenes import make_clip, make_scene
from grounded_sam.structures.masks import masks_to_xyxy

BACKENDS = ("openvino", "onnxruntime")
PHRASES = ["red circle", "blue square", "green star"]

for package in (*BACKENDS, "onnx"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def scene():
    return make_scene(np.random.default_rng(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random checkpoints by the name of their segmenter."""
    folder = tmp_path_factory.mktemp("weights")
    return {name: str(getattr(checkpoints, name)(folder / name)) for name in ("sam_hq", "edgetam", "sam3_tracker")}


@pytest.fixture
def no_export(monkeypatch):
    """Make conversions fail."""

    def fail(*_args, **_kwargs):
        raise AssertionError("converted again")

    monkeypatch.setattr(torch.onnx, "export", fail)


class Backbone(torch.nn.Module):
    """A layer whose outputs are nested in mappings, lists and tuples, as those of backbones are."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, pixels, doubled=False):
        out = self.layer(pixels)
        return {"maps": [out, (out.relu(), out.mean((2, 3)))], **({"doubled": out * 2} if doubled else {})}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmenter", ["sam", "sam2", "sam2_hf", "sam_hq", "edgetam", "sam3_tracker"])
def test_masks_equal_those_of_pytorch(segmenter, backend, scene, folders, tmp_path):
    prompt = {"class": "it", "box": masks_to_xyxy(np.array(scene.masks[:1]))[0].tolist()}
    overrides = [f"checkpoints.{segmenter}='{folders[segmenter]}'"] if segmenter in folders else []
    if segmenter in ("edgetam", "sam3_tracker"):
        overrides[0] = overrides[0].replace("checkpoints.", "segmenter.").replace(segmenter, "checkpoint", 1)

    def load_with(backend):
        return load(
            *("preset=shapes", f"segmenter={segmenter}", "detector=clicks", "select.min_area=0", *overrides),
            **{"device": "cpu", "backend": backend, "export_dir": str(tmp_path), "detector.prompts": [prompt]},
        )

    a, b = load_with("torch").segment(scene.image), load_with(backend).segment(scene.image)
    assert a.mask.any() or segmenter in folders  # random weights may give empty masks
    assert (a.mask != b.mask).sum() <= 1e-4 * a.mask.size  # rounding of logits near zero
    np.testing.assert_allclose(a.data["mask_score"], b.data["mask_score"], atol=1e-4)
    assert len(list(tmp_path.glob("*/backbone.onnx"))) == 1  # it was used


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mm", [False, True], ids=["grounding_dino", "mm_grounding_dino"])
def test_boxes_equal_those_of_pytorch_for_images_of_any_size(mm, backend, tmp_path):
    folder, export_dir = checkpoints.grounding_dino(tmp_path / "dino", mm=mm), tmp_path / "exports"
    overrides = ["select.score=0", "select.nms=null", "select.min_area=0", "segmenter=none"]
    pipelines = [
        load(f"checkpoints.grounding_dino='{folder}'", f"export_dir={export_dir}", *overrides, device="cpu", backend=b)
        for b in ("torch", backend)
    ]
    rng = np.random.default_rng(0)
    for size in ((90, 120), (120, 90), (90, 120)):
        image = rng.integers(0, 255, (*size, 3), np.uint8)
        a, b = (pipeline.segment(image, ["car", "toy wheel"]) for pipeline in pipelines)
        order = [np.lexsort(np.round(detections.xyxy, 1).T) for detections in (a, b)]
        assert len(a) == len(b) > 0
        np.testing.assert_allclose(a.xyxy[order[0]], b.xyxy[order[1]], atol=1e-2)
        np.testing.assert_allclose(a.confidence[order[0]], b.confidence[order[1]], atol=1e-4)
    assert len(list(export_dir.glob("*/backbone.onnx"))) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tracker", ["sam2", "sam2_hf"])
def test_tracks_equal_those_of_pytorch(tracker, backend, tmp_path):
    scenes = make_clip(np.random.default_rng([5, 3]), 4, count=3, size_hw=(180, 260))
    frames, phrases = [scene.image for scene in scenes], [" ".join(pair) for pair in scenes[0].pairs]
    expected, actual = (
        load(f"tracker={tracker}", "segmenter=none", f"export_dir={tmp_path}", preset="shapes", device="cpu", backend=b)
        for b in ("torch", backend)
    )
    for a, b in zip(expected.track(frames, phrases), actual.track(frames, phrases), strict=True):
        assert len(a.detections) > 0
        assert a.detections.tracker_id.tolist() == b.detections.tracker_id.tolist()
        intersection = (a.detections.mask & b.detections.mask).sum((1, 2))
        assert (intersection >= 0.995 * (a.detections.mask | b.detections.mask).sum((1, 2))).all()
    assert len(list(tmp_path.glob("*/backbone.onnx"))) == 2  # of the detector and the tracker


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["balanced", "fast"])
def test_lower_precisions_give_the_same_classes(precision, backend, scene):
    phrases = ["red circle", "blue square", "green star", "orange triangle"]
    a, b = (
        load(preset="shapes", device="cpu", backend=b, precision=p).segment(scene.image, phrases)
        for b, p in (("torch", "exact"), (backend, precision))
    )
    assert len(a) == len(b) and sorted(a.data["class_name"]) == sorted(b.data["class_name"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_keep_their_nesting(backend, tmp_path):
    backbone, original = Backbone().eval(), Backbone().eval()
    convert_backbone(backbone, BackendSettings(backend, str(tmp_path / "exports")), "exact")
    pixels = torch.randn(2, 3, 9, 7)
    with torch.inference_mode():
        expected, actual = original(pixels, doubled=True), backbone(pixels, doubled=True)
        assert list(actual) == ["maps", "doubled"] and isinstance(actual["maps"][1], tuple)
        leaves = torch.utils._pytree.tree_leaves
        for a, b in zip(leaves(expected), leaves(actual), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert list(backbone(pixels)) == ["maps"]  # other arguments, another graph
        first = backbone(pixels)["maps"][0].clone()
        second = backbone(pixels)["maps"][0]
        backbone(pixels + 1)
    torch.testing.assert_close(second, first)  # the next image does not overwrite it


def test_a_conversion_is_reused_by_both_back_ends(tmp_path, request):
    pixels = torch.randn(1, 3, 8, 8)
    first = Backbone().eval()
    convert_backbone(first, BackendSettings("openvino", str(tmp_path)), "exact")
    expected = first(pixels)["maps"][0]
    request.getfixturevalue("no_export")
    for backend in BACKENDS:
        same_weights = Backbone().eval()
        convert_backbone(same_weights, BackendSettings(backend, str(tmp_path)), "exact")
        torch.testing.assert_close(same_weights(pixels)["maps"][0], expected, atol=1e-5, rtol=1e-5)
    other = Backbone(seed=1).eval()  # other weights, which the file is not for
    convert_backbone(other, BackendSettings("openvino", str(tmp_path)), "exact")
    with pytest.raises(CheckpointError, match="converted again"):
        other(pixels)
    assert [path.name.split("-")[:2] for path in tmp_path.iterdir()] == [["Backbone", "1x3x8x8"]]


def test_a_conversion_by_another_process_is_not_overwritten(tmp_path, monkeypatch):
    pixels = torch.randn(1, 3, 8, 8)
    first, second = Backbone().eval(), Backbone().eval()
    convert_backbone(first, BackendSettings("onnxruntime", str(tmp_path)), "exact")
    convert_backbone(second, BackendSettings("onnxruntime", str(tmp_path)), "exact")
    export, calls, modified = torch.onnx.export, [], {}

    def slow_export(*args, **kwargs):
        export(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            first(pixels)  # converts, checks and renames meanwhile
            modified.update(
                (path, path.stat().st_mtime_ns) for path in tmp_path.glob("Backbone*/*.*") if path.is_file()
            )

    monkeypatch.setattr(torch.onnx, "export", slow_export)
    second(pixels)
    assert len(modified) == 2 and all(path.stat().st_mtime_ns == time for path, time in modified.items())
    assert len(list(tmp_path.iterdir())) == 1


def test_the_number_of_loaded_conversions_is_bounded(monkeypatch):
    backbone = Backbone().eval()
    convert_backbone(backbone, BackendSettings("onnxruntime"), "exact")
    calls, write = [], backends._write_conversion
    monkeypatch.setattr(backends, "_write_conversion", lambda *args: calls.append(1) or write(*args))
    for side in (4, 5, 6, 7, 8, 8, 7, 6, 5, 4):  # the conversion for 4 was dropped when it is needed again
        backbone(torch.zeros(1, 3, side, side))
    assert len(calls) == backends.MAX_LOADED_SIZES + 2


@pytest.mark.parametrize("file", ["backbone.onnx", "about.json"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_conversions_are_refused_by_name(file, backend, tmp_path):
    pixels = torch.randn(1, 3, 8, 8)
    for is_damaged in (False, True):
        backbone = Backbone().eval()
        convert_backbone(backbone, BackendSettings(backend, str(tmp_path)), "exact")
        if is_damaged:
            (path,) = tmp_path.glob(f"*/{file}")
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            with pytest.raises(CheckpointError, match=str(path.parent)):
                backbone(pixels)
        else:
            backbone(pixels)


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_conversion_with_other_results_is_not_kept(error, tmp_path, monkeypatch):
    backbone = Backbone().eval()
    convert_backbone(backbone, BackendSettings("onnxruntime", str(tmp_path)), "exact")
    start = backends._start_session

    def start_wrong(*args):
        return lambda pixels: [*start(*args)(pixels)[:-1], start(*args)(pixels)[-1] + error]

    monkeypatch.setattr(backends, "_start_session", start_wrong)
    message = "Backbone in onnxruntime differs from PyTorch by .* of the largest value; use backend=torch"
    with pytest.raises(CheckpointError, match=message):
        backbone(torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_work_are_refused_before_weights_are_read(monkeypatch):
    with pytest.raises(ConfigError, match="segmenter.backend must be torch, openvino or onnxruntime, got 'tensorrt'"):
        load("segmenter.backend=tensorrt", preset="shapes")
    with pytest.raises(ConfigError, match="openvino runs on the CPU only, not on cuda; set device=cpu"):
        if torch.cuda.is_available():
            load(preset="shapes", backend="openvino", device="cuda")
        BackendSettings("openvino").validate("cuda", "detector")
    with pytest.raises(ConfigError, match="needs detector.dtype=float32, got bfloat16"):
        load("detector.dtype=bfloat16", preset="shapes", backend="openvino", device="cpu")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"needs openvino: pip install 'grounded_sam\[openvino\]'"):
        load(preset="shapes", backend="openvino", device="cpu")


def run(*arguments):
    return run_command("grounded_sam.cli.export", list(arguments), Path.cwd())


def test_the_command_writes_conversions_that_runs_reuse(tmp_path, scene, request):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in (("a", (160, 160)), ("b", (160, 120)), ("c", (160, 160))):
        Image.fromarray(scene.image).resize(size).save(photos / f"{name}.png")
    export_dir = tmp_path / "exports"
    overrides = ["preset=shapes", "device=cpu", "backend=onnxruntime", f"export_dir={export_dir}"]
    process = run(*overrides, f"input={photos}")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == f"Conversions in {export_dir}:"
    assert [line.split("-")[0].strip() for line in lines[1:]] == ["Hiera", "ResNetBackbone", "ResNetBackbone"]
    for path in export_dir.glob("*/about.json"):
        assert json.loads(path.read_text())["off"] < 1e-4
    request.getfixturevalue("no_export")
    pipeline = load(*overrides)
    pipeline.segment(photos / "b.png", PHRASES)
    actual = pipeline.segment(photos / "a.png", PHRASES)
    expected = load(*overrides[:2]).segment(photos / "a.png", PHRASES)
    assert len(actual) == len(expected)
    np.testing.assert_allclose(actual.xyxy, expected.xyxy, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preset=shapes", "input=x"], "nothing to convert: set backend=openvino or backend=onnxruntime"),
        (["preset=shapes", "input=x", "backend=openvino"], "export_dir is missing"),
        (["preset=shapes", "backend=openvino", "export_dir=made"], "input is missing"),
        (["preset=shapes", "backedn=openvino"], "unknown key 'backedn'; did you mean 'backend'?"),
    ],
)
def test_the_command_reports_mistakes_in_one_line(arguments, message):
    process = run(*arguments)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("grounded-sam-export: ") and message in process.stderr


def test_the_help_of_the_command_shows_examples():
    process = run("--help")
    assert process.returncode == 0
    assert "grounded-sam-export backend=openvino export_dir=exports input=photo.jpg" in process.stdout

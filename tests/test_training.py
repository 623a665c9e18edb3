"""The trainings run, resume, and write weights that the pipeline can load."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from grounded_sam.shapes.training.loop import learning_rate_factor


def train(module: str, *overrides: str) -> str:
    """Run a training; return its log."""
    command = [sys.executable, "-W", "ignore", "-m", f"grounded_sam.shapes.training.{module}", *overrides]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stderr


def test_the_detector_trains_resumes_and_loads(tmp_path):
    from grounded_sam.detectors.grounding_dino import GroundingDino
    from grounded_sam.structures.frame import Frame
    from grounded_sam.structures.vocabulary import Vocabulary

    overrides = [f"out={tmp_path}", "batch=2", "crops.steps=2", "crops.batch=4", "log_every=1", "calibration_scenes=2"]
    assert "step 2/2" in train("detector", *overrides, "steps=2")
    resumed = train("detector", *overrides, "steps=3")
    assert "resumed" in resumed and "step 3/3" in resumed and "step 2/3" not in resumed
    detector = GroundingDino(str(tmp_path / "model"), device="cpu")
    detections = detector.detect([Frame(pixels=np.zeros((90, 120, 3), np.uint8))], Vocabulary.parse(["red circle"]))
    assert len(detections[0]) > 0
    assert len(detector.calibration) == 4


@pytest.mark.parametrize("model", ["sam", "sam2"])
def test_the_segmenters_train_and_resume(tmp_path, model):
    from safetensors.torch import load_file

    from grounded_sam.weights.loading import builtin_path

    overrides = [f"model={model}", f"out={tmp_path}", "batch=2", "log_every=1", "validation_scenes=2"]
    train("segmenter", *overrides, "steps=1")
    assert "step 2/2" in train("segmenter", *overrides, "steps=2")
    embedded = load_file(builtin_path("shapes", model))
    trained = load_file(tmp_path / f"{model}.safetensors")
    assert {k: v.shape for k, v in embedded.items()} == {k: v.shape for k, v in trained.items()}


def test_the_tracker_trains_its_memory_but_not_its_image_encoder(tmp_path):
    from safetensors.torch import load_file

    from grounded_sam.weights.loading import builtin_path

    start = builtin_path("shapes", "sam2")
    overrides = [
        f"start_from={start}",
        f"out={tmp_path}",
        "batch=2",
        "clips=1",
        "log_every=1",
        "validation_scenes=1",
        "validation_clips=1",
        "steps=3",
    ]
    assert "step 3/3" in train("tracker", *overrides)
    before, after = load_file(start), load_file(tmp_path / "sam2.safetensors")
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert {"memory_attention", "memory_encoder", "sam_mask_decoder"} <= changed
    assert "image_encoder" not in changed


def test_the_verifier_trains_resumes_loads_and_is_calibrated(tmp_path):
    from grounded_sam.shapes.training.verifier_calibration import calibrate_crops, whiten
    from grounded_sam.verifiers.image_text import ImageTextVerifier

    overrides = [f"out={tmp_path}", "objects=120", "outlines=96", "validation=40", "log_every=1"]
    overrides += ["teacher.batch=8", "teacher.groups=2", "student.batch=8", "student.groups=2", "teacher.steps=2"]
    assert "step 1/1" in train("verifier", *overrides, "student.steps=1")
    resumed = train("verifier", *overrides, "student.steps=2")
    assert "resumed" in resumed and "stage student" in resumed and "step 1/2" not in resumed
    folder = tmp_path / "model"
    before = ImageTextVerifier(str(folder), score="sigmoid", device="cpu")
    calibrate_crops(folder, [], 60)
    whiten(folder, [], 120)
    after = ImageTextVerifier(
        str(folder), score="sigmoid", device="cpu", examples={"thing": [np.zeros((9, 9, 3), np.uint8)]}
    )
    assert after.network.bias != before.network.bias
    words, crops = ["red circle", "a star"], [np.full((48, 48, 3), 90, np.uint8)]
    np.testing.assert_allclose(after.network.embed_texts(words), before.network.embed_texts(words), atol=1e-3)
    np.testing.assert_allclose(after.network.embed_crops(crops), before.network.embed_crops(crops), atol=1e-3)
    assert (folder / "whitening.safetensors").stat().st_size < 100_000


def test_the_learning_rate_warms_up_stays_constant_and_decays_to_zero():
    factors = [learning_rate_factor(step, 100, 10, 0.3) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:70] == [1.0] * 60
    assert factors[100] == 0.0
    assert factors[70:] == sorted(factors[70:], reverse=True)


def test_sam_has_settings_of_its_own_and_arguments_override_them():
    code = (
        "from grounded_sam.shapes.training.loop import load_settings\n"
        "cfg = load_settings('segmenter')\nprint(cfg.steps, cfg.batch, cfg.lr)"
    )

    def settings(*arguments: str) -> list[str]:
        command = [sys.executable, "-c", code, "out=x", "device=cpu", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    sam2, sam = settings("model=sam2"), settings("model=sam")
    assert sam[0] != sam2[0] and sam[1] != sam2[1] and sam[2] == sam2[2]
    assert settings("model=sam", "steps=7") == ["7", *sam[1:]]

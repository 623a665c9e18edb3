"""The trainings run, can be interrupted and go on, and write what the pipeline loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grounded_sam.shapes.training.loop import rate


def train(module: str, *words: str | Path) -> str:
    command = [sys.executable, "-W", "ignore", "-m", f"grounded_sam.shapes.training.{module}", *map(str, words)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stderr


def test_the_detector_trains_resumes_and_loads(tmp_path):
    from grounded_sam.detectors.grounding_dino import GroundingDino
    from grounded_sam.structures.frame import Frame
    from grounded_sam.structures.vocabulary import Vocabulary

    few = [f"out={tmp_path}", "batch=2", "crops.steps=2", "crops.batch=4", "log_every=1"]
    assert "step 2/2" in train("detector", *few, "steps=2")
    again = train("detector", *few, "steps=3")
    assert "resumed" in again and "step 3/3" in again and "step 2/3" not in again
    detector = GroundingDino(str(tmp_path / "model"), device="cpu")
    found = detector.detect([Frame(np.zeros((90, 120, 3), np.uint8))], Vocabulary.parse(["red circle"]))
    assert len(found[0]) > 0


@pytest.mark.parametrize("model", ["sam", "sam2"])
def test_the_segmenters_train_and_resume(tmp_path, model):
    from safetensors.torch import load_file

    from grounded_sam.weights.loading import builtin_path

    few = [f"model={model}", f"out={tmp_path}", "batch=2", "log_every=1", "validation_scenes=2"]
    train("segmenter", *few, "steps=1")
    assert "step 2/2" in train("segmenter", *few, "steps=2")
    shipped = load_file(builtin_path("shapes", model))
    trained = load_file(tmp_path / f"{model}.safetensors")
    assert {k: v.shape for k, v in shipped.items()} == {k: v.shape for k, v in trained.items()}


def test_the_memory_trains_on_clips(tmp_path):
    from safetensors.torch import load_file

    from grounded_sam.weights.loading import builtin_path

    start = builtin_path("shapes", "sam2")
    few = [
        f"start_from={start}",
        f"out={tmp_path}",
        "batch=2",
        "clips=1",
        "log_every=1",
        "validation_scenes=1",
        "steps=3",
    ]
    assert "step 3/3" in train("tracker", *few)
    before, after = load_file(start), load_file(tmp_path / "sam2.safetensors")
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert {"memory_attention", "memory_encoder", "sam_mask_decoder"} <= changed
    assert "image_encoder" not in changed


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    rates = [rate(step, 100, 10, 0.3) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:70] == [1.0] * 60
    assert rates[100] == 0.0
    assert rates[70:] == sorted(rates[70:], reverse=True)

"""Levers against the modules that they change, on weights that make every part matter."""

from __future__ import annotations

import copy
import logging

import checkpoints
import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForZeroShotObjectDetection

from grounded_sam import ConfigError, load
from grounded_sam.acceleration import allocator
from grounded_sam.acceleration import grounding_dino as dino
from grounded_sam.acceleration import patching as levers
from grounded_sam.acceleration import sam2 as memory
from grounded_sam.detectors.grounding_dino import GroundingDino
from grounded_sam.segmenters.base import Prompts
from grounded_sam.segmenters.sam2 import Sam2
from grounded_sam.shapes.scenes import make_clip, make_scene
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.trackers.sam2 import Sam2Tracker
from grounded_sam.trackers.sam2_hf import Sam2HfTracker
from grounded_sam.weights.sam2_video import load_video_model

needs_bfloat16 = pytest.mark.skipif(
    not levers.has_bfloat16(torch.device("cpu")), reason="this processor does not multiply in bfloat16"
)


@pytest.fixture(scope="module", params=[False, True], ids=["grounding_dino", "mm_grounding_dino"])
def detector(request, tmp_path_factory):
    """A small model whose layers are no mere zeros, untouched."""
    folder = checkpoints.grounding_dino(tmp_path_factory.mktemp("dino"), mm=request.param)
    return AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()


def ask(size_hw, tokens, batch=1, padded=0):
    """Inputs for pictures of a size and a prompt of so many tokens, in phrases of three."""
    noise = torch.Generator().manual_seed(tokens)
    words = [101, *(1012 if i % 4 == 3 else 1100 + i % 30 for i in range(tokens - 3)), 1012, 102]
    ids = torch.tensor([words] * batch)
    mask = torch.ones(batch, *size_hw, dtype=torch.long)
    if padded:
        mask[-1, :, -padded:] = 0
    return {
        "pixel_values": torch.randn(batch, 3, *size_hw, generator=noise),
        "pixel_mask": mask,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def apart(model, other, inputs):
    """The largest difference of logits (as a share) and of boxes."""
    with torch.no_grad():
        a, b = model(**inputs), other(**inputs)
    finite = a.logits.isfinite()
    assert torch.equal(finite, b.logits.isfinite())
    logits = (a.logits[finite] - b.logits[finite]).abs().max() / a.logits[finite].abs().max()
    assert a.pred_boxes.std() > 0.01  # boxes that are all alike would be equal for nothing
    return float(logits), float((a.pred_boxes - b.pred_boxes).abs().max())


@pytest.mark.parametrize("lever", [dino.fold_fusion, dino.bag_samples, dino.fuse_attention])
@pytest.mark.parametrize(
    ("size_hw", "tokens", "batch", "padded"),
    [((96, 128), 5, 1, 0), ((97, 131), 12, 2, 40), ((96, 96), 40, 1, 0), ((51, 203), 4, 3, 70)],
)
def test_an_exact_lever_changes_nothing(detector, lever, size_hw, tokens, batch, padded):
    """Over odd sizes, padded batches, and so much text that folding does not pay (4 heads times 40 of 32)."""
    changed = copy.deepcopy(detector)
    assert lever(changed) >= 2
    assert max(apart(detector, changed, ask(size_hw, tokens, batch, padded))) < 1e-4


def test_where_folding_does_not_pay_the_original_runs(detector, monkeypatch):
    changed = copy.deepcopy(detector)
    dino.fold_fusion(changed)
    attention = changed.model.encoder.layers[0].fusion_layer.attn
    calls = []
    plain = type(attention).forward
    monkeypatch.setattr(type(attention), "forward", lambda *a, **k: calls.append(1) or plain(*a, **k))
    short = attention.embed_dim // attention.num_heads - 1
    for tokens, expected in ((short, 0), (short + 1, 1)):
        calls.clear()
        attention(torch.randn(1, 9, attention.vision_dim), torch.randn(1, tokens, attention.text_dim))
        assert len(calls) == expected


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    queries=st.sampled_from([1, 7, dino.QUERIES, dino.QUERIES + 3]),
    spread=st.floats(0.5, 50),
    seed=st.integers(0, 99),
)
def test_bags_are_samples_summed(sizes, batch, queries, spread, seed):
    """On maps of one pixel and more, with points far outside."""
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention

    noise = torch.Generator().manual_seed(seed)
    levels, heads, points = len(sizes), 2, 3
    value = torch.randn(batch, sum(h * w for h, w in sizes), heads, 4, generator=noise)
    places = (torch.rand(batch, queries, heads, levels, points, 2, generator=noise) - 0.5) * spread + 0.5
    weights = torch.rand(batch, queries, heads, levels, points, generator=noise)
    module = MultiScaleDeformableAttention()
    told = (value, torch.tensor(sizes), sizes, None, places, weights, 64)
    expected = module(*told)
    starts = [torch.full((batch, queries, levels * points), -0.5) for _ in "xy"]
    offsets = []
    for axis in range(2):
        side = torch.tensor([float(size[1 - axis]) for size in sizes])
        offsets.append((places[..., axis] * side[:, None]).flatten(3))
    got = dino.bagged_samples(value, sizes, offsets, starts, weights.flatten(3))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_what_a_lever_does_not_know_it_leaves_alone(detector, caplog, monkeypatch):
    changed = copy.deepcopy(detector)
    fused = type(changed.model.encoder.layers[0].fusion_layer.attn)
    plain = fused.forward

    def other(self, *args, **kwargs):
        (a, b), text = plain(self, *args, **kwargs)
        return (a * 1.01, b), text

    monkeypatch.setattr(fused, "forward", other)
    with caplog.at_level(logging.WARNING):
        assert dino.fold_fusion(changed) == 0
    assert "fold_fusion leaves" in caplog.text and "it would be off by" in caplog.text
    assert all("forward" not in vars(module) for module in changed.modules())


@pytest.mark.parametrize(("n", "m", "batch"), [(1, 1, 1), (memory.QUERIES + 3, 1500, 1), (256, 1024, 2), (70, 2049, 3)])
def test_attention_by_blocks_is_attention(n, m, batch):
    noise = torch.Generator().manual_seed(n)
    q, k = (torch.randn(batch, size, 32, generator=noise) * 3 for size in (n, m))
    v = torch.randn(batch, m, 8, generator=noise)
    expected = torch.softmax(q.double() @ k.double().transpose(1, 2) / 32**0.5, -1) @ v.double()
    np.testing.assert_allclose(memory.attend(q, k, v), expected, atol=2e-5)


@pytest.mark.parametrize(("n", "m", "batch"), [(1, 1, 1), (memory.LOW_QUERIES + 3, 300, 2)])
def test_attention_in_bfloat16_is_near(n, m, batch):
    noise = torch.Generator().manual_seed(n)
    q, k = (torch.randn(batch, size, 32, generator=noise) for size in (n, m))
    v = torch.randn(batch, m, 8, generator=noise)
    expected = torch.softmax(q.double() @ k.double().transpose(1, 2) / 32**0.5, -1) @ v.double()
    got = memory.attend_low(*(x.bfloat16() for x in (q, k, v)))
    assert float((got - expected).abs().max() / expected.abs().max()) < 0.02


def follow(tracker, images, masks):
    """Masks of objects through a video, by frame."""
    session = tracker.open(images[0].shape[:2])
    out = []
    for t, image in enumerate(images):
        seen = session.step(image)
        if t == 0:
            ids = np.arange(1, len(masks) + 1)
            seen = session.prompt(sv.Detections(xyxy=masks_to_xyxy(masks), mask=masks, tracker_id=ids))
        out.append({int(i): mask for i, mask in zip(seen.tracker_id, seen.mask, strict=True)})
    session.close()
    return out


@pytest.fixture(scope="module")
def clip():
    scenes = make_clip(np.random.default_rng([5, 3]), 12, count=3, size_hw=(180, 260))
    return [scene.image for scene in scenes], np.array(scenes[0].masks[:2])


def worst_iou(a, b):
    pairs = [(x[i], y[i]) for x, y in zip(a, b, strict=True) for i in x]
    return min((p & q).sum() / max(1, (p | q).sum()) for p, q in pairs)


def untouched(tracker):
    """Take all levers off."""
    for module in tracker.model.modules():
        for name in ("forward", "_get_pos_embed"):
            vars(module).pop(name, None)


@pytest.mark.parametrize("kind", [Sam2Tracker, Sam2HfTracker])
def test_memory_is_looked_at_with_the_same_result(kind, clip):
    plain, exact = (kind(checkpoint="builtin:shapes", device="cpu") for _ in range(2))
    untouched(plain)
    attentions = memory.memory_attentions(exact.model)
    assert attentions and all("forward" in vars(module) for module in attentions)
    assert worst_iou(follow(plain, *clip), follow(exact, *clip)) > 0.995


@pytest.mark.parametrize("kind", [Sam2Tracker, Sam2HfTracker])
def test_one_look_into_memory_is_within_a_hundred_thousandth(kind):
    model = kind(checkpoint="builtin:shapes", device="cpu").model
    for module in memory.memory_attentions(model):
        forward = module.forward
        noise = torch.Generator().manual_seed(1)
        kv = module.kv_in_dim
        q = torch.randn(2, 64, module.q_proj.in_features, generator=noise)
        k, v = torch.randn(2, 3 * 64 + 5, kv, generator=noise), torch.randn(2, 3 * 64 + 5, kv, generator=noise)
        told = {"num_k_exclude_rope": 5}
        if kind is Sam2HfTracker:
            angle = torch.randn(64, module.head_dim, generator=noise)
            q, k, v, told["position_embeddings"] = q[None], k[None], v[None], (angle.cos(), angle.sin())
        with torch.no_grad():
            got, expected = forward(q, k, v, **told), type(module).forward(module, q, k, v, **told)
        got, expected = (x[0] if isinstance(x, tuple) else x for x in (got, expected))
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@needs_bfloat16
@pytest.mark.parametrize("kind", [Sam2Tracker, Sam2HfTracker])
def test_fast_video_stays_close(kind, clip):
    exact, fast = (kind(checkpoint="builtin:shapes", device="cpu", precision=p) for p in ("exact", "fast"))
    names = {type(module).__name__ for module in fast.model.modules() if "forward" in vars(module)}
    assert {name.removeprefix("Sam2Video").removeprefix("Sam2") for name in names} >= {"RoPEAttention", "Linear"}
    assert names & {"MultiScaleAttention", "Sam2MultiScaleAttention"}
    attentions = memory.memory_attentions(fast.model, own=True)
    assert len(attentions) == 2 * len(fast.model.memory_attention.layers)
    assert all("forward" in vars(module) for module in attentions)
    assert worst_iou(follow(exact, *clip), follow(fast, *clip)) > 0.9


@needs_bfloat16
@pytest.mark.parametrize("precision", ["balanced", "fast"])
def test_low_precision_finds_the_same(precision):
    models = [load(preset="shapes", device="cpu", precision=p) for p in ("exact", precision)]
    rng = np.random.default_rng(8)
    for _ in range(5):
        scene = make_scene(rng)
        words = sorted({"red circle", "blue square", *(" ".join(pair) for pair in scene.pairs)})
        a, b = (model.segment(scene.image, words) for model in models)
        assert len(a) == len(b)
        assert sorted(a.data["class_name"]) == sorted(b.data["class_name"])
        overlap = sv.mask_iou_batch(a.mask, b.mask)
        assert len(a) == 0 or overlap.max(1).min() > 0.9


@needs_bfloat16
@pytest.mark.parametrize("size_hw", [(96, 128), (131, 97)])
def test_windows_in_bfloat16_give_nearly_the_same_maps(detector, size_hw):
    changed = copy.deepcopy(detector)
    dino.half_backbone(changed)
    attentions = [m for m in changed.modules() if type(m).__name__ == "SwinAttention"]
    assert dino.half_windows(changed) == len(attentions) > 0
    pixels = torch.randn(2, 3, *size_hw, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = [model.model.backbone.conv_encoder.model(pixels).feature_maps for model in (detector, changed)]
    for a, b in zip(*maps, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) < 0.03


@needs_bfloat16
def test_stages_have_precisions_of_their_own():
    model = load("detector.precision=fast", "segmenter.precision=exact", preset="shapes", device="cpu")
    dtypes = {p.dtype for p in model.detector.model.parameters()}
    assert torch.bfloat16 in dtypes
    assert {p.dtype for p in model.segmenter.model.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="tracker.precision must be exact, balanced or fast, got 'quick'"):
        Sam2Tracker(checkpoint="builtin:shapes", device="cpu", precision="quick")


def test_a_tracker_of_another_precision_has_a_model_of_its_own():
    segmenter = Sam2(checkpoint="builtin:shapes", device="cpu", precision="balanced")
    assert Sam2Tracker(segmenter, checkpoint="builtin:shapes", device="cpu", precision="balanced").shared is segmenter
    assert Sam2Tracker(segmenter, checkpoint="builtin:shapes", device="cpu").shared is None


def test_weights_of_16_bits_are_sampled_as_they_come():
    """Whose whole numbers end at 256: rows of a table could not be counted in them."""
    stage = GroundingDino("builtin:shapes", device="cpu", dtype="bfloat16")
    name = "GroundingDinoMultiscaleDeformableAttention"
    sampling = [module for module in stage.model.modules() if type(module).__name__ == name]
    assert sampling and all("forward" not in vars(module) for module in sampling)


def test_without_bfloat16_precision_is_exact_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(dino, "has_bfloat16", lambda device: False)
    with caplog.at_level(logging.WARNING):
        stage = GroundingDino("builtin:shapes", device="cpu", precision="fast")
    assert "precision=fast is exact here" in caplog.text
    assert {p.dtype for p in stage.model.parameters()} == {torch.float32}


def test_what_does_not_compile_goes_on_as_it_was(monkeypatch, caplog):
    def broken(*_args, **_told):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda forward, **_: broken)
    layer = torch.nn.Linear(3, 2)
    x = torch.ones(1, 3)
    expected = layer(x)
    levers.compiled(layer, "the layer", dynamic=True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
    assert caplog.text.count("the layer is not compiled: no C++ compiler") == 1


def test_the_allocator_is_told_once_and_may_be_left_alone():
    import sys

    assert allocator.keep_pages() is sys.platform.startswith("linux")
    with pytest.raises(ConfigError, match="allocator must be keep or system, got 'other'"):
        load("allocator=other", preset="shapes")
    assert load_video_model("builtin:shapes") is not None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    return {name: str(getattr(checkpoints, name)(place / name)) for name in ("sam_hq", "edgetam", "sam3_tracker")}


@pytest.mark.parametrize("clicks", [1, 2, 30], ids=["one", "two", "more than pay"])
@pytest.mark.parametrize("kind", ["sam", "sam2", "sam2_hf", "sam_hq", "edgetam", "sam3_tracker"])
def test_folded_tokens_give_the_same_logits(kind, clicks, folders):
    """On weights that make every part matter: of prompts alone and together, with boxes and without."""
    extra = [f"segmenter.checkpoint='{folders[kind]}'"] if kind in folders else []
    stage = load("preset=shapes", f"segmenter={kind}", "device=cpu", *extra).segmenter
    noise = torch.Generator().manual_seed(1)
    for name, parameter in stage.model.named_parameters():
        if "mask_decoder" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    folded = [module for module in stage.model.modules() if _is_folded(module)]
    # Two in each of two layers, and the last look; and the layers, in the authors' packages.
    assert len(folded) == (7 if kind in ("sam", "sam2") else 5)
    rng = np.random.default_rng(0)
    image = make_scene(rng).image
    height, width = image.shape[:2]
    n = 3
    boxes = np.tile(np.array([[10, 12, 70, 60]], np.float32), (n, 1)) + np.arange(n, dtype=np.float32)[:, None] * 9
    points = (rng.random((n, clicks, 2)) * [width, height]).astype(np.float32)
    given = {"points": points, "labels": rng.integers(0, 2, (n, clicks)), "masks": None}
    prompts = [
        Prompts(rows=np.arange(n), boxes=boxes, points=None, labels=None, masks=None),
        Prompts(rows=np.arange(n), boxes=boxes, **given),
        Prompts(rows=np.arange(n), boxes=None, **given),
    ]
    stage._encode(image)
    found = [stage._decode(prompt) for prompt in prompts]
    for module in folded:
        del module.forward
    for prompt, (_, scores, logits) in zip(prompts, found, strict=True):
        _, expected_scores, expected = stage._decode(prompt)
        assert np.ptp(expected, axis=(-2, -1)).min() > 1e-3
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


def _is_folded(module):
    return getattr(vars(module).get("forward"), "__module__", None) == "grounded_sam.acceleration.mask_decoder"


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["exact", "balanced", "fast"])
def test_on_cuda_the_same_is_found_as_on_the_cpu(precision):
    """The detector under autocast unless `exact`."""
    rng = np.random.default_rng(8)
    scenes = [make_scene(rng) for _ in range(5)]
    words = sorted({" ".join(pair) for scene in scenes for pair in scene.pairs})
    cpu, cuda = (
        load(preset="shapes", device=device, precision=p) for device, p in (("cpu", "exact"), ("cuda", precision))
    )
    for scene in scenes:
        a, b = (model.segment(scene.image, words) for model in (cpu, cuda))
        assert sorted(a.data["class_name"]) == sorted(b.data["class_name"])
        overlap = sv.mask_iou_batch(a.mask, b.mask)
        assert len(a) == 0 or overlap.max(1).min() > 0.9


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [Sam2Tracker, Sam2HfTracker])
def test_on_cuda_a_video_is_followed_as_on_the_cpu(kind, clip):
    cpu, cuda = (
        kind(checkpoint="builtin:shapes", device=device, precision=p)
        for device, p in (("cpu", "exact"), ("cuda", "fast"))
    )
    assert worst_iou(follow(cpu, *clip), follow(cuda, *clip)) > 0.9

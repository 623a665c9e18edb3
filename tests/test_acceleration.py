"""Patches compared with the modules that they replace, on weights with which every part has an effect."""

from __future__ import annotations

import copy
import logging
import sys
import threading

import checkpoints
import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForZeroShotObjectDetection

from grounded_sam import ConfigError, Vocabulary, load
from grounded_sam.acceleration import allocator, patching
from grounded_sam.acceleration import grounding_dino as dino_patches
from grounded_sam.acceleration import sam2 as sam2_patches
from grounded_sam.acceleration.patching import without_tf32
from grounded_sam.acceleration.swin import keep_window_masks
from grounded_sam.detectors.grounding_dino import GroundingDino
from grounded_sam.segmenters.base import Prompts
from grounded_sam.segmenters.sam2 import Sam2
from grounded_sam.shapes.scenes import make_clip, make_scene
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.trackers.sam2 import Sam2Tracker
from grounded_sam.trackers.sam2_hf import Sam2HfTracker
from grounded_sam.weights.sam2_video import load_video_model

needs_bfloat16 = pytest.mark.skipif(
    not patching.has_bfloat16(torch.device("cpu")), reason="this processor has no fast bfloat16 matmul"
)


@pytest.fixture(scope="module", params=[False, True], ids=["grounding_dino", "mm_grounding_dino"])
def detector(request, tmp_path_factory):
    """A small unpatched model whose layers are not initialized to zero."""
    folder = checkpoints.grounding_dino(tmp_path_factory.mktemp("dino"), mm=request.param)
    return AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()


def make_inputs(size_hw, tokens, batch=1, padded=0):
    """Return inputs for images of a size and a prompt of that many tokens, in phrases of three.

    The last `padded` columns of the last image are masked.
    """
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


def output_errors(model, other, inputs):
    """Return the largest difference of logits, relative to the largest one, and of boxes."""
    with torch.no_grad():
        a, b = model(**inputs), other(**inputs)
    finite = a.logits.isfinite()
    assert torch.equal(finite, b.logits.isfinite())
    logits = (a.logits[finite] - b.logits[finite]).abs().max() / a.logits[finite].abs().max()
    assert a.pred_boxes.std() > 0.01  # if all boxes were alike, equality would show nothing
    return float(logits), float((a.pred_boxes - b.pred_boxes).abs().max())


@pytest.mark.parametrize(
    "patch",
    [
        dino_patches.fold_text_projections,
        dino_patches.use_embedding_bag,
        dino_patches.use_fused_attention,
        dino_patches.sample_without_transfers,
        keep_window_masks,
    ],
)
@pytest.mark.parametrize(
    ("size_hw", "tokens", "batch", "padded"),
    [((96, 128), 5, 1, 0), ((97, 131), 12, 2, 40), ((96, 96), 40, 1, 0), ((51, 203), 4, 3, 70)],
)
def test_exact_patches_do_not_change_the_output(detector, patch, size_hw, tokens, batch, padded):
    """With odd sizes, padded batches, and so many tokens that folding is not smaller (4 heads times 40 of 32)."""
    patched = copy.deepcopy(detector)
    assert patch(patched) >= 2
    assert max(output_errors(detector, patched, make_inputs(size_hw, tokens, batch, padded))) < 1e-4


def test_the_original_runs_where_folding_is_not_smaller(detector, monkeypatch):
    patched = copy.deepcopy(detector)
    dino_patches.fold_text_projections(patched)
    attention = patched.model.encoder.layers[0].fusion_layer.attn
    calls = []
    original = type(attention).forward
    monkeypatch.setattr(type(attention), "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    most_tokens = attention.embed_dim // attention.num_heads - 1
    for tokens, expected in ((most_tokens, 0), (most_tokens + 1, 1)):
        calls.clear()
        attention(torch.randn(1, 9, attention.vision_dim), torch.randn(1, tokens, attention.text_dim))
        assert len(calls) == expected


@settings(max_examples=30)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    queries=st.sampled_from([1, 7, dino_patches.QUERY_BLOCK, dino_patches.QUERY_BLOCK + 3]),
    spread=st.floats(0.5, 50),
    seed=st.integers(0, 99),
)
def test_embedding_bags_equal_deformable_attention(sizes, batch, queries, spread, seed):
    """With maps from one pixel up, and points far outside."""
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention

    noise = torch.Generator().manual_seed(seed)
    levels, heads, points = len(sizes), 2, 3
    value = torch.randn(batch, sum(h * w for h, w in sizes), heads, 4, generator=noise)
    locations = (torch.rand(batch, queries, heads, levels, points, 2, generator=noise) - 0.5) * spread + 0.5
    weights = torch.rand(batch, queries, heads, levels, points, generator=noise)
    expected = MultiScaleDeformableAttention()(value, torch.tensor(sizes), sizes, None, locations, weights, 64)
    references = [torch.full((batch, queries, levels * points), -0.5) for _ in "xy"]
    offsets = []
    for axis in range(2):
        side = torch.tensor([float(size[1 - axis]) for size in sizes])
        offsets.append((locations[..., axis] * side[:, None]).flatten(3))
    actual = dino_patches.sample_with_embedding_bag(value, sizes, offsets, references, weights.flatten(3))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_a_patch_is_not_applied_to_a_layer_that_computes_something_else(detector, caplog, monkeypatch):
    patched = copy.deepcopy(detector)
    attention_class = type(patched.model.encoder.layers[0].fusion_layer.attn)
    original = attention_class.forward

    def other(self, *args, **kwargs):
        (a, b), text = original(self, *args, **kwargs)
        return (a * 1.01, b), text

    monkeypatch.setattr(attention_class, "forward", other)
    with caplog.at_level(logging.WARNING):
        assert dino_patches.fold_text_projections(patched) == 0
    assert "fold_text_projections is not applied to" in caplog.text and "its error would be" in caplog.text
    assert all("forward" not in vars(module) for module in patched.modules())


def exact_attention(q, k, v):
    """Return attention in float64."""
    return torch.softmax(q.double() @ k.double().transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v.double()


@pytest.mark.parametrize(
    ("n", "m", "batch"), [(1, 1, 1), (sam2_patches.QUERY_BLOCK + 3, 1500, 1), (256, 1024, 2), (70, 2049, 3)]
)
def test_blockwise_attention_equals_attention(n, m, batch):
    noise = torch.Generator().manual_seed(n)
    q, k = (torch.randn(batch, size, 32, generator=noise) * 3 for size in (n, m))
    v = torch.randn(batch, m, 8, generator=noise)
    np.testing.assert_allclose(sam2_patches.blockwise_attention(q, k, v), exact_attention(q, k, v), atol=2e-5)


@pytest.mark.parametrize(("n", "m", "batch"), [(1, 1, 1), (sam2_patches.BFLOAT16_QUERY_BLOCK + 3, 300, 2)])
def test_bfloat16_attention_is_within_two_percent(n, m, batch):
    noise = torch.Generator().manual_seed(n)
    q, k = (torch.randn(batch, size, 32, generator=noise) for size in (n, m))
    v = torch.randn(batch, m, 8, generator=noise)
    expected = exact_attention(q, k, v)
    actual = sam2_patches.bfloat16_attention(*(x.bfloat16() for x in (q, k, v)))
    assert float((actual - expected).abs().max() / expected.abs().max()) < 0.02


def track_masks(tracker, images, masks):
    """Prompt with masks on the first frame and return the masks of each frame by object id."""
    session = tracker.open(images[0].shape[:2])
    frames = []
    for t, image in enumerate(images):
        detections = session.step(image)
        if t == 0:
            ids = np.arange(1, len(masks) + 1)
            detections = session.prompt(sv.Detections(xyxy=masks_to_xyxy(masks), mask=masks, tracker_id=ids))
        frames.append({int(i): mask for i, mask in zip(detections.tracker_id, detections.mask, strict=True)})
    session.close()
    return frames


@pytest.fixture(scope="module")
def clip():
    scenes = make_clip(np.random.default_rng([5, 3]), 12, count=3, size_hw=(180, 260))
    return [scene.image for scene in scenes], np.array(scenes[0].masks[:2])


def min_iou(a, b):
    """Return the lowest mask IoU of an object between two results of `track_masks`."""
    pairs = [(x[i], y[i]) for x, y in zip(a, b, strict=True) for i in x]
    return min((p & q).sum() / max(1, (p | q).sum()) for p, q in pairs)


def remove_patches(tracker):
    for module in tracker.model.modules():
        for name in ("forward", "_get_pos_embed"):
            vars(module).pop(name, None)


@pytest.mark.parametrize("tracker_class", [Sam2Tracker, Sam2HfTracker])
def test_exact_patches_do_not_change_tracks(tracker_class, clip):
    original, patched = (tracker_class(checkpoint="builtin:shapes", device="cpu") for _ in range(2))
    remove_patches(original)
    layers = sam2_patches.memory_attention_layers(patched.model)
    assert layers and all("forward" in vars(module) for module in layers)
    assert min_iou(track_masks(original, *clip), track_masks(patched, *clip)) > 0.995


@pytest.mark.parametrize("tracker_class", [Sam2Tracker, Sam2HfTracker])
def test_patched_memory_attention_is_within_rounding(tracker_class):
    model = tracker_class(checkpoint="builtin:shapes", device="cpu").model
    for module in sam2_patches.memory_attention_layers(model):
        forward = module.forward
        noise = torch.Generator().manual_seed(1)
        kv_dim = module.kv_in_dim
        q = torch.randn(2, 64, module.q_proj.in_features, generator=noise)
        k, v = torch.randn(2, 3 * 64 + 5, kv_dim, generator=noise), torch.randn(2, 3 * 64 + 5, kv_dim, generator=noise)
        kwargs = {"num_k_exclude_rope": 5}
        if tracker_class is Sam2HfTracker:
            angle = torch.randn(64, module.head_dim, generator=noise)
            q, k, v, kwargs["position_embeddings"] = q[None], k[None], v[None], (angle.cos(), angle.sin())
        with torch.no_grad():
            actual, expected = forward(q, k, v, **kwargs), type(module).forward(module, q, k, v, **kwargs)
        actual, expected = (x[0] if isinstance(x, tuple) else x for x in (actual, expected))
        assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


@needs_bfloat16
@pytest.mark.parametrize("tracker_class", [Sam2Tracker, Sam2HfTracker])
def test_fast_tracks_stay_close_to_exact_ones(tracker_class, clip):
    exact, fast = (tracker_class(checkpoint="builtin:shapes", device="cpu", precision=p) for p in ("exact", "fast"))
    names = {type(module).__name__ for module in fast.model.modules() if "forward" in vars(module)}
    assert {name.removeprefix("Sam2Video").removeprefix("Sam2") for name in names} >= {"RoPEAttention", "Linear"}
    assert names & {"MultiScaleAttention", "Sam2MultiScaleAttention"}
    layers = sam2_patches.memory_attention_layers(fast.model, include_self=True)
    assert len(layers) == 2 * len(fast.model.memory_attention.layers)
    assert all("forward" in vars(module) for module in layers)
    assert min_iou(track_masks(exact, *clip), track_masks(fast, *clip)) > 0.9


@needs_bfloat16
@pytest.mark.parametrize("precision", ["balanced", "fast"])
def test_lower_precisions_give_the_same_detections(precision):
    pipelines = [load(preset="shapes", device="cpu", precision=p) for p in ("exact", precision)]
    rng = np.random.default_rng(8)
    for _ in range(5):
        scene = make_scene(rng)
        phrases = sorted({"red circle", "blue square", *(" ".join(pair) for pair in scene.pairs)})
        a, b = (pipeline.segment(scene.image, phrases) for pipeline in pipelines)
        assert len(a) == len(b)
        assert sorted(a.data["class_name"]) == sorted(b.data["class_name"])
        iou = sv.mask_iou_batch(a.mask, b.mask)
        assert len(a) == 0 or iou.max(1).min() > 0.9


@needs_bfloat16
@pytest.mark.parametrize("size_hw", [(96, 128), (131, 97)])
def test_bfloat16_window_attention_gives_nearly_the_same_features(detector, size_hw):
    patched = copy.deepcopy(detector)
    patching.use_bfloat16_linears(patched.model.backbone)
    layers = [m for m in patched.modules() if type(m).__name__ == "SwinAttention"]
    assert dino_patches.use_bfloat16_window_attention(patched) == len(layers) > 0
    pixels = torch.randn(2, 3, *size_hw, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = [model.model.backbone.conv_encoder.model(pixels).feature_maps for model in (detector, patched)]
    for a, b in zip(*maps, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) < 0.03


@needs_bfloat16
def test_each_stage_can_have_its_own_precision():
    pipeline = load("detector.precision=fast", "segmenter.precision=exact", preset="shapes", device="cpu")
    dtypes = {p.dtype for p in pipeline.detector.model.parameters()}
    assert torch.bfloat16 in dtypes
    assert {p.dtype for p in pipeline.segmenter.model.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="tracker.precision must be exact, balanced or fast, got 'quick'"):
        Sam2Tracker(checkpoint="builtin:shapes", device="cpu", precision="quick")


def test_a_tracker_with_another_precision_does_not_share_the_model():
    segmenter = Sam2(checkpoint="builtin:shapes", device="cpu", precision="balanced")
    assert Sam2Tracker(segmenter, checkpoint="builtin:shapes", device="cpu", precision="balanced").shared is segmenter
    assert Sam2Tracker(segmenter, checkpoint="builtin:shapes", device="cpu").shared is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_16_bits_detect_the_same_on_the_cpu(dtype):
    """PyTorch's own sampling on the CPU returns NaN in bfloat16."""
    exact, rounded = (GroundingDino("builtin:shapes", device="cpu", dtype=d) for d in ("float32", dtype))
    assert {p.dtype for p in rounded.model.model.encoder.parameters()} == {getattr(torch, dtype)}
    rng, overlaps, changes = np.random.default_rng(8), [], []
    for _ in range(4):
        scene = make_scene(rng)
        vocabulary = Vocabulary.parse(sorted({"red circle", *(" ".join(pair) for pair in scene.pairs)}))
        a, b = (detector.detect([Frame(pixels=scene.image)], vocabulary)[0] for detector in (exact, rounded))
        a = a[a.confidence > 0.3].with_nms(0.5)  # the best of several queries on an object
        if len(a):
            iou = sv.box_iou_batch(a.xyxy, b.xyxy)
            overlaps += iou.max(1).tolist()
            is_same = (iou > 0.7) & (a.class_id[:, None] == b.class_id)
            changes += abs(np.where(is_same, b.confidence, 0).max(1) - a.confidence).tolist()
    assert len(overlaps) >= 4
    assert np.mean(overlaps) > 0.96 and min(overlaps) > 0.8
    assert np.mean(changes) < 0.03


def test_without_fast_bfloat16_precision_falls_back_to_exact(monkeypatch, caplog):
    monkeypatch.setattr(dino_patches, "has_bfloat16", lambda device: False)
    with caplog.at_level(logging.WARNING):
        stage = GroundingDino("builtin:shapes", device="cpu", precision="fast")
    assert "precision=fast runs as exact" in caplog.text
    assert {p.dtype for p in stage.model.parameters()} == {torch.float32}


def test_a_module_that_cannot_be_compiled_runs_eagerly(monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda forward, **_: broken)
    layer = torch.nn.Linear(3, 2)
    x = torch.ones(1, 3)
    expected = layer(x)
    patching.compile_forward(layer, "the layer", dynamic=True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
    assert caplog.text.count("the layer is not compiled: no C++ compiler") == 1


def test_the_allocator_keeps_freed_memory_on_linux():
    assert allocator.keep_freed_memory() is sys.platform.startswith("linux")
    with pytest.raises(ConfigError, match="allocator must be keep or system, got 'other'"):
        load("allocator=other", preset="shapes")
    assert load_video_model("builtin:shapes") is not None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {name: str(getattr(checkpoints, name)(folder / name)) for name in ("sam_hq", "edgetam", "sam3_tracker")}


@pytest.mark.parametrize("clicks", [1, 2, 30], ids=["one", "two", "too many to fold"])
@pytest.mark.parametrize("name", ["sam", "sam2", "sam2_hf", "sam_hq", "edgetam", "sam3_tracker"])
def test_folded_token_projections_give_the_same_logits(name, clicks, folders):
    """With noise on all weights of the decoder: of clicks and boxes alone and together."""
    overrides = [f"segmenter.checkpoint='{folders[name]}'"] if name in folders else []
    segmenter = load("preset=shapes", f"segmenter={name}", "device=cpu", *overrides).segmenter
    noise = torch.Generator().manual_seed(1)
    for key, parameter in segmenter.model.named_parameters():
        if "mask_decoder" in key:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    patched = [module for module in segmenter.model.modules() if _is_patched(module)]
    # Two attentions in each of two layers, and the final one; in the authors' packages also the two layers.
    assert len(patched) == (7 if name in ("sam", "sam2") else 5)
    rng = np.random.default_rng(0)
    image = make_scene(rng).image
    height, width = image.shape[:2]
    n = 3
    boxes = np.tile(np.array([[10, 12, 70, 60]], np.float32), (n, 1)) + np.arange(n, dtype=np.float32)[:, None] * 9
    points = (rng.random((n, clicks, 2)) * [width, height]).astype(np.float32)
    labels = rng.integers(0, 2, (n, clicks))
    prompts = [
        Prompts(rows=np.arange(n), boxes=boxes),
        Prompts(rows=np.arange(n), boxes=boxes, points=points, labels=labels),
        Prompts(rows=np.arange(n), points=points, labels=labels),
    ]
    segmenter._set_image(image)
    outputs = [segmenter._decode(prompt) for prompt in prompts]
    for module in patched:
        del module.forward
    for prompt, actual in zip(prompts, outputs, strict=True):
        expected = segmenter._decode(prompt)
        assert np.ptp(expected.logits, axis=(-2, -1)).min() > 1e-3
        np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-4 * np.abs(expected.logits).max())
        np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-4)


def _is_patched(module):
    return getattr(vars(module).get("forward"), "__module__", None) == "grounded_sam.acceleration.mask_decoder"


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["exact", "balanced", "fast"])
def test_detections_on_cuda_equal_those_on_the_cpu(precision):
    """Except for `exact`, the detector has weights in bfloat16 on CUDA."""
    rng = np.random.default_rng(8)
    scenes = [make_scene(rng) for _ in range(5)]
    phrases = sorted({" ".join(pair) for scene in scenes for pair in scene.pairs})
    cpu, cuda = (
        load(preset="shapes", device=device, precision=p) for device, p in (("cpu", "exact"), ("cuda", precision))
    )
    for scene in scenes:
        a, b = (pipeline.segment(scene.image, phrases) for pipeline in (cpu, cuda))
        assert sorted(a.data["class_name"]) == sorted(b.data["class_name"])
        iou = sv.mask_iou_batch(a.mask, b.mask)
        assert len(a) == 0 or iou.max(1).min() > 0.9


@pytest.mark.cuda
@pytest.mark.parametrize("tracker_class", [Sam2Tracker, Sam2HfTracker])
def test_tracks_on_cuda_are_close_to_those_on_the_cpu(tracker_class, clip):
    cpu, cuda = (
        tracker_class(checkpoint="builtin:shapes", device=device, precision=p)
        for device, p in (("cpu", "exact"), ("cuda", "fast"))
    )
    assert min_iou(track_masks(cpu, *clip), track_masks(cuda, *clip)) > 0.9


def test_tf32_stays_off_until_the_last_thread_needs_it_off_no_more():
    switch = torch.backends.cuda.matmul
    before, switch.allow_tf32 = switch.allow_tf32, True
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with without_tf32():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    try:
        with without_tf32():
            thread.start()
            entered.wait(10)
        assert not switch.allow_tf32
        leave.set()
        thread.join()
        assert switch.allow_tf32
    finally:
        switch.allow_tf32 = before

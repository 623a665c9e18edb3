"""SAM 2 on several images and several objects at once, compared with one at a time and with the authors' code."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trackers import click_detections, mask_detections, memory_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from grounded_sam import ConfigError
from grounded_sam.acceleration import sam2 as patches
from grounded_sam.acceleration.transfer import Download, pack_bits, unpack_bits
from grounded_sam.segmenters import base
from grounded_sam.segmenters.sam import Sam
from grounded_sam.segmenters.sam2 import Sam2
from grounded_sam.shapes.scenes import make_clip, make_scene
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.protocols import BatchSegmenter, EncodesAhead
from grounded_sam.trackers.sam2 import Sam2Tracker


@pytest.fixture(scope="module")
def segmenter():
    return Sam2("builtin:shapes", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def tracker(segmenter):
    return Sam2Tracker(segmenter, "builtin:shapes", device="cpu")


@pytest.fixture(scope="module")
def images():
    """Four images of different sizes with their detections; the third has none."""
    scenes = [
        make_scene(np.random.default_rng([9, i]), count=3, size_hw=(150 + 30 * i, 260 - 20 * i)) for i in range(4)
    ]
    found = [sv.Detections(xyxy=scene.xyxy.astype(np.float32), class_id=np.arange(len(scene.xyxy))) for scene in scenes]
    found[2] = found[2][:0]
    return [scene.image for scene in scenes], found


@pytest.fixture(scope="module")
def clip():
    scenes = make_clip(np.random.default_rng([5, 7]), 14, count=4, size_hw=(120, 170))
    assert all(len(scene.masks) >= 3 for scene in scenes)
    return scenes


def with_options(segmenter, **options):
    other = copy.copy(segmenter)
    other.options = replace(segmenter.options, **options)
    return other


def with_chunk(tracker, chunk, **attributes):
    """Return a tracker with the same model that batches that many objects."""
    other = copy.copy(tracker)
    other.chunk = chunk
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    np.testing.assert_array_equal(actual.mask, expected.mask)
    np.testing.assert_array_equal(actual.xyxy, expected.xyxy)
    np.testing.assert_allclose(actual.data["mask_score"], expected.data["mask_score"], atol=1e-5)


# Segmenter


@pytest.mark.parametrize("options", [{}, {"multimask": True}, {"chunk": 2}, {"max_hole_area": 50}, {"rounds": 2}])
def test_a_batch_gives_the_masks_of_each_image_alone(segmenter, images, options):
    other = with_options(segmenter, **options)
    pixels, found = images
    batch = other.segment_batch(pixels, found)
    assert batch[2].mask.shape == (0, *pixels[2].shape[:2])
    for image, detections, actual in zip(pixels, found, batch, strict=True):
        assert_same(actual, other.segment(image, detections))
        np.testing.assert_array_equal(actual.class_id, detections.class_id)


def test_clicks_may_be_among_the_images_of_a_batch(segmenter, images):
    pixels, found = images
    clicks = click_detections(1, [[60, 50], [5, 5]], [1, 0])
    mixed = [found[0], clicks, found[2], found[3]]
    for image, detections, actual in zip(pixels, mixed, segmenter.segment_batch(pixels, mixed), strict=True):
        assert_same(actual, segmenter.segment(image, detections))


def test_images_of_a_batch_are_encoded_together_and_masks_upsampled_in_parts(segmenter, images, monkeypatch):
    pixels, found = images
    expected = segmenter.segment_batch(pixels, found)
    sizes = []
    hook = segmenter.model.image_encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(base, "CHUNK_BYTES", 1)
    actual = segmenter.segment_batch(pixels, found)
    smaller = copy.copy(segmenter)
    smaller.batch_size = 2
    smaller.segment_batch(pixels, found)
    hook.remove()
    assert sizes == [3, 2, 1]  # an image without detections is not encoded
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


def test_a_batch_reads_the_features_of_each_image_from_the_cache(segmenter, images, tmp_path):
    from grounded_sam.segmenters.feature_cache import FeatureCache

    pixels, found = images
    cached, cache = copy.copy(segmenter), FeatureCache(tmp_path)
    cached.use_feature_cache(cache)
    results = [cached.segment_batch(pixels, found) for _ in range(2)]
    assert (cache.misses, cache.hits) == (3, 3)
    for batch in results:
        for actual, expected in zip(batch, segmenter.segment_batch(pixels, found), strict=True):
            assert_same(actual, expected)


def test_the_stages_say_what_they_can_do(segmenter, tracker):
    assert isinstance(segmenter, BatchSegmenter) and segmenter.batch_size == 4
    assert not isinstance(Sam("builtin:shapes", device="cpu"), BatchSegmenter)
    assert Sam2("builtin:shapes", device="cpu").batch_size == 1
    assert isinstance(tracker.open((10, 10)), EncodesAhead)
    with pytest.raises(ConfigError, match=r"segmenter\.batch_size must be"):
        Sam2("builtin:shapes", device="cpu", batch_size=0)


def test_fixed_encodings_are_computed_once_and_equal_the_original(segmenter):
    encoder = segmenter.model.sam_prompt_encoder
    assert encoder.get_dense_pe() is encoder.get_dense_pe()
    assert torch.equal(encoder.get_dense_pe(), type(encoder).get_dense_pe(encoder))
    sine = segmenter.model.image_encoder.neck.position_encoding
    x = torch.zeros(2, 3, 5, 7)
    assert torch.equal(sine(x), type(sine).forward(sine, x))
    assert sine(x).data_ptr() == sine(x).data_ptr()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 99))
def test_bits_are_unpacked_as_they_were_packed(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask).numpy()
    np.testing.assert_array_equal(bits, np.packbits(mask.numpy()))
    np.testing.assert_array_equal(unpack_bits(bits, tuple(mask.shape)), mask.numpy())


# Attention to memories of different lengths


@settings(max_examples=25)
@given(st.lists(st.integers(1, 1100), min_size=1, max_size=3), st.integers(0, 9))
def test_attention_ignores_what_is_beyond_the_length_of_a_row(lengths, seed):
    noise = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(lengths), n, 8, generator=noise) for n in (5, max(lengths) + 3, max(lengths) + 3))
    blank, counts = (torch.arange(k.shape[1]) >= torch.tensor(lengths)[:, None])[..., None], torch.tensor(lengths)
    nan, zero = ([x.masked_fill(blank, value) for x in (k, v)] for value in (float("nan"), 0.0))
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        expected = patches.blockwise_attention(q[row], k[row, :length], v[row, :length])[0]
        np.testing.assert_allclose(patches.blockwise_attention(q, *nan, counts)[i], expected, atol=1e-5)
        np.testing.assert_allclose(patches.masked_attention(q, *zero, counts)[i], expected, atol=1e-5)
        low = patches.bfloat16_attention(q.bfloat16(), *(x.bfloat16() for x in nan), counts)
        np.testing.assert_allclose(low[i].float(), expected, atol=0.05)


def make_memory(model, lengths, seed=0):
    """Return a frame, its positions, memories of three maps and up to two pointers, and their positions."""
    noise = torch.Generator().manual_seed(seed)
    hw, n = 16**2, len(lengths)
    most = 3 * hw + 2 * (model.hidden_dim // model.mem_dim)
    shapes = [(1, hw, model.hidden_dim)] * 2 + [(n, most, model.mem_dim)] * 2
    frame, positions, memory, memory_positions = (torch.randn(shape, generator=noise) for shape in shapes)
    blank = (torch.arange(most) >= torch.tensor(lengths)[:, None])[..., None]
    return frame, positions, memory.masked_fill(blank, 0), memory_positions.masked_fill(blank, 0)


def test_memory_attention_equals_the_authors_for_each_object(tracker):
    module, tokens = tracker.model.memory_attention, tracker.objects.pointer_tokens
    lengths = [3 * 256 + 2 * tokens, 3 * 256 + tokens]
    frame, positions, memory, memory_positions = make_memory(tracker.model, lengths)
    inputs = frame, positions, memory, memory_positions, 2 * tokens
    with torch.inference_mode():
        together = patches.attend_to_memory(module, *inputs, torch.tensor(lengths))
        for i, length in enumerate(lengths):
            alone = module(
                curr=frame.transpose(0, 1),
                curr_pos=positions.transpose(0, 1),
                memory=memory[i : i + 1, :length].transpose(0, 1),
                memory_pos=memory_positions[i : i + 1, :length].transpose(0, 1),
                num_obj_ptr_tokens=length - 3 * 256,
            )[:, 0]
            np.testing.assert_allclose(together[i], alone, atol=1e-5 * float(alone.abs().max()))


def test_what_cuda_runs_equals_the_patch_for_the_cpu():
    """The fused kernels exist on the CPU too; in bfloat16 with all weights cast."""
    exact, fused, low = (Sam2("builtin:shapes", device="cpu").model for _ in range(3))
    patches.speed_up_memory(exact, "exact")
    assert patches.fuse_memory_attention(fused) == len(fused.memory_attention.layers)
    for layer in patches.memory_attention_layers(low, include_self=True):
        assert patches._patch_memory_attention(layer, patches._fused_bfloat16_attention, "low", 2e-2)
    low.memory_attention.to(torch.bfloat16)
    lengths = [3 * 256 + 4, 3 * 256 + 2]
    inputs = *make_memory(exact, lengths), 4, torch.tensor(lengths)
    with torch.inference_mode():
        expected, same, close = (patches.attend_to_memory(m.memory_attention, *inputs) for m in (exact, fused, low))
    assert float((same - expected).abs().max() / expected.abs().max()) < 1e-5
    assert close.dtype == torch.float32
    assert float((close - expected).abs().max() / expected.abs().max()) < 0.05


def test_sam2_with_all_weights_in_bfloat16_gives_nearly_the_same_masks(segmenter, images):
    """As on CUDA, with `balanced` and `fast`."""
    low = Sam2("builtin:shapes", device="cpu")
    for module in low.model.modules():
        vars(module).pop("forward", None)
    patches.use_bfloat16_model(low.model)
    pixels, found = images
    for image, detections in zip(pixels[:2], found[:2], strict=True):
        a, b = (stage.segment(image, detections).mask for stage in (segmenter, low))
        assert ((a & b).sum((1, 2)) / (a | b).sum((1, 2))).min() > 0.9


# Objects of a video


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompt", ["none", "points", "points and logits"])
def test_decoding_objects_equals_the_authors(tracker, clip, multimask, prompt):
    model, objects = tracker.model, tracker.objects
    noise = torch.Generator().manual_seed(3)
    session = tracker.open(clip[0].image.shape[:2])
    features = session.image_features(clip[0].image)
    fused = features[-1] + 0.3 * torch.randn(3, *features[-1].shape[1:], generator=noise)
    points, logits = None, None
    if prompt != "none":
        points = torch.rand(3, 2, 2, generator=noise) * 256, torch.tensor([[2, 3], [1, 0], [1, 1]], dtype=torch.int32)
    if prompt == "points and logits":
        logits = torch.randn(3, 1, 64, 64, generator=noise)
    inputs = None if points is None else {"point_coords": points[0], "point_labels": points[1]}
    with torch.inference_mode():
        low, raw, iou, presence, pointers = objects.decode(features, fused, multimask, points, logits)
        fine = [level.expand(3, -1, -1, -1) for level in features[:-1]]
        _, _, ious, expected, _, obj_ptr, score = model._forward_sam_heads(fused, inputs, logits, fine, multimask)
    for a, b in ((low, expected), (iou, ious.max(1).values), (presence, score), (pointers, obj_ptr)):
        np.testing.assert_allclose(a, b, atol=1e-4)
    present = presence[:, 0] > 0
    np.testing.assert_array_equal(raw[present], low[present])
    assert (low[~present] == -1024).all() and not (raw[~present] == -1024).any()


def run_history(tracker, clip, one_by_one, ahead=False):
    """Track objects with late starts, corrections, resets and removals; return the results of each call."""
    session = tracker.open(clip[0].image.shape[:2])
    results = []

    def prompt(detections):
        rows = [[i] for i in range(len(detections))] if one_by_one else [list(range(len(detections)))]
        parts = [session.prompt(detections[row]) for row in rows]
        results.append({int(i): mask for part in parts for i, mask in zip(part.tracker_id, part.mask, strict=True)})

    for t, scene in enumerate(clip):
        if ahead and t + 1 < len(clip):
            session.encode_ahead(clip[t + 1].image)
        seen = session.step(scene.image)
        results.append(dict(zip(seen.tracker_id.tolist(), seen.mask, strict=True)))
        lost = session.predict_lost([1, 3, 8])
        results.append(dict(zip(lost.tracker_id.tolist(), lost.mask, strict=True)))
        masks = np.array(scene.masks)
        if t == 0:
            prompt(mask_detections(masks[:2]))
        if t == 3:  # a mask and two boxes, of which one corrects
            prompt(mask_detections(masks[2:3], [3]))
            prompt(sv.Detections(xyxy=masks_to_xyxy(masks[:2]), tracker_id=np.array([8, 2])))
        if t == 6:
            prompt(mask_detections(masks[:3], [1, 2, 3]))
            session.reset_memory(2)
        if t == 9:
            session.remove(1)
            prompt(click_detections(3, [[20, 30]], [0]))
        if t == 12:
            prompt(sv.Detections(xyxy=masks_to_xyxy(masks[:2]), tracker_id=np.array([8, 3])))
    return results


@pytest.fixture(scope="module")
def history(tracker, clip):
    return run_history(with_chunk(tracker, 1), clip, one_by_one=True)


def assert_same_history(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert list(a) == list(b)
        for i, mask in a.items():
            assert (mask != b[i]).mean() < 1e-4


def test_objects_with_different_histories_get_the_masks_of_one_at_a_time(tracker, clip, history):
    batches = []
    batched = with_chunk(tracker, 8)
    batched.objects = copy.copy(tracker.objects)
    propagate = tracker.objects._propagate
    batched.objects.propagate = lambda *x: batches.append((len(x[4]), x[3:])) or propagate(*x)
    assert_same_history(run_history(batched, clip, one_by_one=False), history)
    assert max(n for n, _ in batches) == 3
    padded = [
        len(maps) // len(pointers) + pointers.shape[1] < numbers.shape[1] for _, (maps, pointers, numbers) in batches
    ]
    assert any(padded) and not all(padded)  # some have different numbers of pointers


def test_objects_that_cannot_be_padded_are_grouped_by_their_pointers(tracker, clip, history):
    assert_same_history(run_history(with_chunk(tracker, 8, pads=False), clip, one_by_one=False), history)


def test_encoding_ahead_changes_nothing_and_encodes_each_frame_once(tracker, clip, history):
    passes = []
    hook = tracker.model.image_encoder.register_forward_hook(lambda *_: passes.append(1))
    assert_same_history(run_history(with_chunk(tracker, 8, encodes_ahead=True), clip, False, ahead=True), history)
    assert len(passes) == len(clip)
    passes.clear()
    session = with_chunk(tracker, 8, encodes_ahead=True).open(clip[0].image.shape[:2])
    session.step(clip[0].image)
    session.prompt(mask_detections(np.array(clip[0].masks[:2])))
    session.encode_ahead(clip[2].image)
    session.step(clip[1].image)
    assert len(passes) == 3 and session.image_features(clip[1].image) is session.image_features(clip[1].image)
    session.step(clip[2].image)
    assert len(passes) == 3
    session.close()
    passes.clear()
    session = tracker.open(clip[0].image.shape[:2])  # on the CPU frames are encoded when they are needed
    session.encode_ahead(clip[1].image)
    session.step(clip[0].image)
    hook.remove()
    assert not passes


def test_memories_that_are_not_numbers_do_not_spread_to_other_objects(tracker, clip):
    results = []
    for broken in (False, True):
        session = with_chunk(tracker, 8).open(clip[0].image.shape[:2])
        session.step(clip[0].image)
        session.prompt(mask_detections(np.array(clip[0].masks[:2])))
        session.step(clip[1].image)
        session.prompt(mask_detections(np.array(clip[1].masks[2:3]), [3]))
        if broken:
            memory = session.memories[1].prompted
            memory[0] = tuple(torch.full_like(tensor, float("nan")) for tensor in memory[0])
        masks = {}
        for scene in clip[2:5]:
            seen = session.step(scene.image)
            masks |= {(session.frame, int(i)): m for i, m in zip(seen.tracker_id, seen.mask, strict=True) if i != 1}
        results.append(masks)
    assert results[0] and results[0].keys() == results[1].keys()
    for key, mask in results[0].items():
        np.testing.assert_array_equal(results[1][key], mask)


def test_the_memory_of_batched_objects_does_not_grow(tracker, clip):
    session, sizes = with_chunk(tracker, 8, encodes_ahead=True).open(clip[0].image.shape[:2]), []
    for t in range(26):
        scene = clip[t % len(clip)]
        session.encode_ahead(clip[(t + 1) % len(clip)].image)
        session.step(scene.image)
        if t % 3 == 0:
            session.prompt(mask_detections(np.array(scene.masks[:3])))
        sizes.append(memory_bytes(session))
    assert sizes[-1] > 0 and max(sizes[22:]) <= 1.02 * max(sizes[18:22])
    session.close()
    assert memory_bytes(session) == 0


def test_no_value_is_read_back_while_objects_are_propagated(tracker, clip):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names = []
    session = with_chunk(tracker, 8).open(clip[0].image.shape[:2])
    session.step(clip[0].image)
    session.prompt(mask_detections(np.array(clip[0].masks[:3])))
    session.step(clip[1].image)
    session._start_frame(clip[2].image)
    features = session.image_features(clip[2].image)
    with torch.inference_mode(), Names():
        session.objects.propagate(*features, *session._join_memories([1, 2, 3]))
    assert len(names) > 100
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique"} & set(names)


# On CUDA


def min_iou(a, b):
    """Return the lowest IoU of masks that are in both results of `run_history`, and of those in one alone 0."""
    pairs = [(x.get(i), y.get(i)) for x, y in zip(a, b, strict=True) for i in {*x, *y}]
    return np.array([0.0 if p is None or q is None else (p & q).sum() / (p | q).sum() for p, q in pairs])


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "lowest"), [("exact", 0.98), ("balanced", 0.85), ("fast", 0.85)])
def test_batches_on_cuda_are_close_to_images_on_the_cpu(segmenter, images, precision, lowest):
    cuda = Sam2("builtin:shapes", device="cuda", precision=precision)
    assert cuda.batch_size == 8
    pixels, found = images
    expected = segmenter.segment_batch(pixels, found)
    for _ in range(5):  # the last ones replay a graph
        for a, b in zip(cuda.segment_batch(pixels, found), expected, strict=True):
            if len(a):
                assert ((a.mask & b.mask).sum((1, 2)) / (a.mask | b.mask).sum((1, 2))).min() > lowest
    assert cuda.encode._graphs


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_graphs_give_what_eager_code_gives(clip, precision):
    tracker = Sam2Tracker(checkpoint="builtin:shapes", device="cuda", precision=precision)
    first, later = (run_history(tracker, clip, one_by_one=False) for _ in range(2))
    for _ in range(2):
        later = run_history(tracker, clip, one_by_one=False, ahead=True)
    assert tracker.encode._graphs and tracker.objects.propagate._graphs
    assert min_iou(later, first).mean() > 0.99
    eager = with_chunk(tracker, tracker.chunk, encode=tracker.encode.function)
    eager.objects = copy.copy(tracker.objects)
    eager.objects.propagate = tracker.objects._propagate
    assert min_iou(later, run_history(eager, clip, one_by_one=False)).mean() > 0.99


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "lowest"), [("exact", 0.98), ("balanced", 0.9), ("fast", 0.9)])
def test_tracks_on_cuda_are_close_to_those_on_the_cpu(history, clip, precision, lowest):
    tracker = Sam2Tracker(checkpoint="builtin:shapes", device="cuda", precision=precision)
    assert min_iou(run_history(tracker, clip, one_by_one=False, ahead=True), history).mean() > lowest


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_device_before_its_results(clip):
    tracker = Sam2Tracker(checkpoint="builtin:shapes", device="cuda", precision="fast")
    session = tracker.open(clip[0].image.shape[:2])
    session.step(clip[0].image)
    session.prompt(mask_detections(np.array(clip[0].masks[:3])))
    for t in range(1, 40):  # beyond this the number of memories is constant
        session.step(clip[t % len(clip)].image)
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.step(clip[0].image)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_the_varlen_kernel_equals_masked_attention():
    device, noise = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    if not patches._has_varlen(device, 256):
        pytest.skip("this version of torch has no such kernel for this device")
    q, k, v = (torch.randn(3, n, 256, generator=noise, device=device).bfloat16() for n in (4096, 9000, 9000))
    lengths = torch.tensor([9000, 4100, 8191], device=device)
    expected, actual = patches.masked_attention(q, k, v, lengths), patches.varlen_attention(q, k, v, lengths)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 0.02


@pytest.mark.cuda
def test_downloads_from_cuda_equal_copies():
    download = Download()
    mask = torch.rand(3, 21, 19, device="cuda") < 0.5
    values = torch.rand(4, device="cuda")
    download.add(mask)
    download.add(values)
    bits, floats = download.wait()
    np.testing.assert_array_equal(bits, mask.cpu())
    np.testing.assert_array_equal(floats, values.cpu())

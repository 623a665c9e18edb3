"""The network in parts compared with the forward pass of transformers, on weights with which every part matters."""

from __future__ import annotations

import copy
import logging

import checkpoints
import numpy as np
import pytest
import supervision as sv
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForZeroShotObjectDetection

from grounded_sam import Vocabulary
from grounded_sam.acceleration import grounding_dino as patches
from grounded_sam.acceleration.dino_network import MAX_SIZES, DinoNetwork, WholeModel, network_of
from grounded_sam.acceleration.patching import without_tf32
from grounded_sam.acceleration.swin import keep_window_masks
from grounded_sam.detectors.grounding_dino import GroundingDino
from grounded_sam.shapes.scenes import make_scene
from grounded_sam.structures.frame import Frame

IDS = [101, 1100, 1101, 1012, 1102, 1012, 1103, 1104, 1105, 1012, 102]
OTHER_IDS = [101, 1106, 1012, 1103, 1012, 102]


@pytest.fixture(scope="module", params=[False, True], ids=["grounding_dino", "mm_grounding_dino"])
def model(request, tmp_path_factory):
    """A small model in float32 as transformers loads it."""
    folder = checkpoints.grounding_dino(tmp_path_factory.mktemp("dino"), mm=request.param)
    return AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def patched(model):
    """The same model with the patches for CUDA, which also run on the CPU."""
    patched = copy.deepcopy(model)
    assert patches.sample_without_transfers(patched) == 4
    assert keep_window_masks(patched.model.backbone) == 4
    assert patches.fold_text_projections(patched) == 2
    assert patches.use_fused_attention(patched) == 6
    return patched


def make_pixels(b, height, width):
    return torch.randn(b, 3, height, width, generator=torch.Generator().manual_seed(height))


def predict(network, pixels, ids=IDS):
    with torch.inference_mode(), without_tf32():
        return network.predict(network.encode_images(pixels), network.encode_text(ids))


def assert_equal_predictions(actual, expected, tolerance=1e-5):
    largest = float(expected.logits.abs().max())
    np.testing.assert_allclose(actual.logits.cpu(), expected.logits.cpu(), atol=tolerance * largest)
    np.testing.assert_allclose(actual.pred_boxes.cpu(), expected.pred_boxes.cpu(), atol=tolerance)
    assert expected.pred_boxes.std() > 0.01  # if all boxes were alike, equality would show nothing


@pytest.mark.parametrize("size", [(1, 96, 128), (3, 97, 131), (2, 51, 203)])
@pytest.mark.parametrize("kind", ["original", "patched"])
def test_predictions_equal_those_of_transformers(model, patched, kind, size):
    network = network_of({"original": model, "patched": patched}[kind])
    assert isinstance(network, DinoNetwork)
    pixels = make_pixels(*size)
    with torch.no_grad():
        expected = model(pixel_values=pixels, input_ids=torch.tensor([IDS] * size[0]))
    assert expected.logits[..., len(IDS) :].isinf().all()
    expected.logits = expected.logits[..., : len(IDS)]
    assert_equal_predictions(predict(network, pixels), expected)


def test_text_features_are_bit_equal(model):
    network = DinoNetwork(model)
    seen = []
    hook = model.model.encoder.layers[0].fusion_layer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["text_features"]), with_kwargs=True
    )
    with torch.no_grad():
        model(pixel_values=make_pixels(2, 96, 96), input_ids=torch.tensor([IDS] * 2))
    hook.remove()
    with torch.inference_mode():
        features = network.encode_text(IDS).features
    assert torch.equal(features.expand(2, -1, -1), seen[0])


def test_images_are_encoded_once_for_several_prompts(model):
    pixels = make_pixels(2, 64, 96)
    for network in (DinoNetwork(model), WholeModel(model)):
        with torch.inference_mode():
            images = network.encode_images(pixels)
            for ids in (IDS, OTHER_IDS, IDS):
                actual = network.predict(images, network.encode_text(ids))
                assert_equal_predictions(actual, predict(WholeModel(model), pixels, ids))


def test_images_with_fewer_positions_than_queries_use_all_positions(model):
    positions = 2 * 9 + 5 + 3 + 2
    assert positions < model.config.num_queries
    pixels = make_pixels(2, 12, 70)
    smaller = copy.deepcopy(model)
    smaller.config.num_queries = positions
    queries = smaller.model.query_position_embeddings
    queries.weight = torch.nn.Parameter(queries.weight[:positions])
    assert_equal_predictions(predict(DinoNetwork(model), pixels), predict(WholeModel(smaller), pixels))


def test_what_depends_on_the_size_alone_is_kept_for_the_latest_sizes(model):
    network = DinoNetwork(model)
    sizes = [(32 * (2 + i), 96) for i in range(MAX_SIZES + 2)]
    first = [predict(network, make_pixels(1, *size)) for size in sizes]
    assert len(network._constants) == MAX_SIZES
    for size, expected in zip(sizes, first, strict=True):
        assert_equal_predictions(predict(network, make_pixels(1, *size)), expected, 1e-6)


class _Operations(TorchDispatchMode):
    """Record the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


#: Reads of a value, shapes that depend on values, and uploads of Python numbers.
NOT_CAPTURED = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "lift_fresh_copy", "equal", "unique"}


def test_no_step_reads_a_value_back(model, patched):
    network, pixels = network_of(patched), make_pixels(2, 96, 128)
    predict(network, pixels)
    with torch.inference_mode():
        text = network.encode_text(IDS)
        with _Operations() as recorded:
            network.predict(network.encode_images(pixels), text)
        with _Operations() as original:
            model(pixel_values=pixels, input_ids=torch.tensor([IDS] * 2))
    assert "lift_fresh" in original.names  # the recorder sees what it should
    assert not NOT_CAPTURED & set(recorded.names)
    assert len(recorded.names) < 0.7 * len(original.names)


def test_another_forward_pass_is_kept_as_it_is(model, caplog, monkeypatch):
    class_name = type(model).__name__
    layer = type(model.model.decoder.layers[0])
    original = layer.forward
    monkeypatch.setattr(type(model), "forward", _with_other_boxes(type(model).forward))
    with caplog.at_level(logging.WARNING):
        network = network_of(model)
    assert isinstance(network, WholeModel)
    assert f"{class_name} runs as a whole, and without CUDA graphs: its error would be" in caplog.text
    assert layer.forward is original


def _with_other_boxes(forward):
    def other(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.pred_boxes = output.pred_boxes * 0.99
        return output

    return other


def test_weights_in_bfloat16_leave_boxes_scores_and_text_in_float32():
    detector = GroundingDino("builtin:shapes", device="cpu", dtype="bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in detector.model.named_parameters()}
    assert dtypes["model.encoder.layers.0.deformable_layer.fc1.weight"] == torch.bfloat16
    assert dtypes["model.level_embed"] == torch.bfloat16
    exact = [name for name, dtype in dtypes.items() if dtype == torch.float32]
    assert exact and all("bbox_embed" in name or "text" in name for name in exact)
    frame = Frame(pixels=make_scene(np.random.default_rng(3)).image)
    _, output = next(iter(detector.forward([frame], Vocabulary.parse(["red circle"]))))
    assert output.logits.dtype == output.pred_boxes.dtype == torch.float32


def test_tf32_is_off_inside_and_as_before_outside(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with without_tf32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.cuda
def test_exact_predictions_on_cuda_equal_those_on_the_cpu(model):
    """The queries of a batch may change places where their scores are alike, so only their set is compared."""
    pixels = make_pixels(2, 96, 128)
    expected = predict(network_of(model), pixels)
    network = network_of(_patched_for_cuda(model))
    assert isinstance(network, DinoNetwork)
    actual = predict(network, pixels.cuda())
    largest = float(expected.logits.abs().max())
    for a, b in zip(_by_query(actual), _by_query(expected), strict=True):
        nearest = torch.cdist(b, a).min(1).values
        assert float(nearest.max()) < 1e-3 * max(largest, 1)


def _by_query(predictions):
    """Return logits and box of each query of each image."""
    return torch.cat((predictions.logits.cpu(), predictions.pred_boxes.cpu()), -1)


def _patched_for_cuda(model):
    patched = copy.deepcopy(model).cuda()
    assert patches.sample_without_transfers(patched) == 4
    assert keep_window_masks(patched.model.backbone) == 4
    patches.fold_text_projections(patched)
    patches.use_fused_attention(patched)
    return patched


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_graphs_give_what_eager_calls_give(model, dtype):
    network = network_of(_patched_for_cuda(model))
    network.to_dtype(dtype)
    inputs = [make_pixels(2, 96, 128).cuda().to(dtype) * (1 + 0.1 * i) for i in range(3)]
    eager = [predict(network, pixels, IDS) for pixels in inputs[:1]]
    for _ in range(4):
        last = predict(network, inputs[0], IDS)
    others = [predict(network, pixels, IDS) for pixels in inputs[1:]]
    assert len(network._predict._graphs) == 1 and not network._predict._failed
    assert len(network._encode_images._graphs) == 1 and not network._encode_images._failed
    assert_equal_predictions(last, eager[0])
    for pixels, replayed in zip(inputs[1:], others, strict=True):
        with torch.inference_mode(), without_tf32():
            maps, text = network._backbone(pixels), network.encode_text(IDS)
            constants = network._constants_of(tuple((x.shape[2], x.shape[3]) for x in maps))
            logits, boxes = network._transformer(*maps, *constants, text.features, text.mask, text.positions)
        assert torch.allclose(replayed.logits, logits, atol=1e-4) and torch.allclose(
            replayed.pred_boxes, boxes, atol=1e-4
        )


@pytest.mark.cuda
def test_fast_detections_on_cuda_are_near_the_exact_ones():
    exact, fast = (GroundingDino("builtin:shapes", device="cuda", precision=p) for p in ("exact", "fast"))
    scenes = [make_scene(np.random.default_rng([8, i]), size_hw=(200, 260)) for i in range(10)]
    vocabulary = Vocabulary.parse(sorted({" ".join(pair) for scene in scenes for pair in scene.pairs}))
    frames = [Frame(pixels=scene.image) for scene in scenes]
    found = 0
    for _ in range(4):  # eager, then as graphs
        for a, b in zip(exact.detect(frames, vocabulary), fast.detect(frames, vocabulary), strict=True):
            sure = a[a.confidence > 0.3]
            iou = sv.box_iou_batch(sure.xyxy, b.xyxy)
            assert len(sure) == 0 or iou.max(1).min() > 0.9
            found += len(sure)
    assert found > 10

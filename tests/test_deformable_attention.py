"""The kernel of deformable attention in Triton's interpreter, compared with transformers' module."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from grounded_sam.acceleration import deformable_attention
from grounded_sam.acceleration.deformable_attention import kernel_error, run_kernel, sample_maps, sample_with_pytorch

triton = pytest.importorskip("triton")


def make_inputs(sizes, coordinates, b=1, q=5, heads=1, points=2, width=8, device="cpu"):
    noise = torch.Generator().manual_seed(len(sizes))
    count, levels = sum(h * w for h, w in sizes), len(sizes)
    value = torch.randn(b, count, heads, width, generator=noise)
    offsets = 2 * torch.randn(b, q, heads * levels * points * 2, generator=noise)
    logits = torch.randn(b, q, heads * levels * points, generator=noise)
    references = torch.rand(b, q, levels, coordinates, generator=noise) * 1.6 - 0.3
    return [x.to(device) for x in (value, offsets, logits, references)]


def transformers_sampling(value, sizes, offsets, logits, references):
    """Sample as `GroundingDinoMultiscaleDeformableAttention` does between its projections."""
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention

    b, _, heads, _ = value.shape
    q, levels = offsets.shape[1], len(sizes)
    shapes = torch.tensor(sizes)
    offsets = offsets.view(b, q, heads, levels, -1, 2)
    points = offsets.shape[4]
    weights = logits.view(b, q, heads, -1).softmax(-1).view(b, q, heads, levels, points)
    references = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        locations = references + offsets / shapes.flip(1)[None, None, None, :, None]
    else:
        locations = references[..., :2] + offsets / points * references[..., 2:] * 0.5
    return MultiScaleDeformableAttention()(value, shapes, sizes, None, locations, weights, 64)


CASES = [
    ([(5, 3)], 2, {"b": 2, "heads": 2}),
    ([(5, 3), (1, 4)], 4, {"b": 3, "q": 1, "points": 1}),
    ([(4, 7), (1, 1), (2, 3)], 2, {"q": 35, "points": 1}),  # two blocks of queries
    ([(2, 3), (1, 1), (1, 2), (3, 1)], 4, {"points": 3, "width": 5}),  # no powers of two
]
FAR_POSITIONS = [1e4, -1e9, 1e30, float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize(("sizes", "coordinates", "shape"), CASES)
def test_sampling_with_pytorch_equals_transformers(sizes, coordinates, shape):
    value, *rest = make_inputs(sizes, coordinates, **shape)
    expected = transformers_sampling(value, sizes, *rest)
    torch.testing.assert_close(sample_maps(value, sizes, torch.tensor(sizes), *rest), expected, atol=1e-5, rtol=0)


def test_the_kernel_equals_transformers_in_the_interpreter():
    """In a process of its own, since Triton decides at its import whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["equal"] * (len(CASES) + 3)


def compare_in_interpreter():
    """Print `equal` for each comparison that succeeds."""
    for sizes, coordinates, shape in CASES:
        value, *rest = make_inputs(sizes, coordinates, **shape)
        actual = run_kernel(value, torch.tensor(sizes), *rest)
        torch.testing.assert_close(actual, transformers_sampling(value, sizes, *rest), atol=1e-5, rtol=0)
        print("equal")

    sizes = [(5, 7)]
    value, offsets, logits, references = make_inputs(sizes, 2, q=len(FAR_POSITIONS) + 1)
    for i, far in enumerate(FAR_POSITIONS):
        offsets[0, i, :] = far  # all points of the query
    actual = run_kernel(value, torch.tensor(sizes), offsets, logits, references)
    assert actual[0, :-1].abs().max() == 0  # positions outside of the map count as zero
    expected = transformers_sampling(value, sizes, offsets[:, -1:], logits[:, -1:], references[:, -1:])
    torch.testing.assert_close(actual[:, -1:], expected, atol=1e-5, rtol=0)
    print("equal")

    sizes = [(4, 3), (2, 2)]
    value, offsets, logits, _ = make_inputs(sizes, 4, b=2)
    boxes = torch.rand(1, 5, 1, 4).expand(2, -1, 2, -1)  # strides of zero, as the network passes them
    actual = run_kernel(value, torch.tensor(sizes), offsets, logits, boxes)
    torch.testing.assert_close(actual, sample_with_pytorch(value, sizes, offsets, logits, boxes), atol=1e-5, rtol=0)
    print("equal")

    rounded = [x.bfloat16() for x in (value, offsets, logits)]
    actual = run_kernel(rounded[0], torch.tensor(sizes), *rounded[1:], boxes)
    assert actual.dtype == torch.bfloat16
    expected = sample_with_pytorch(rounded[0].float(), sizes, *rounded[1:], boxes)
    torch.testing.assert_close(actual.float(), expected, atol=1e-2, rtol=1e-2)
    print("equal")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_an_h100(dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = {"heads": 8, "levels": 4, "points": 4, "sample_block": 16, "channels": 32, "channel_block": 32}
    constants = sizes | {"boxes": True, "block": deformable_attention.QUERY_BLOCK}
    pointers = {"value": dtype, "shapes": "i64", "offsets": dtype, "logits": dtype, "references": "fp32", "out": dtype}
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("num_queries", "num_pixels", "stride_b", "stride_q", "stride_l"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    names = deformable_attention.deformable_kernel().arg_names
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(
        fn=deformable_attention.deformable_kernel(), signature=signature, constexprs=places, attrs=aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
    assert "ld.global.v4" in compiled.asm["ptx"]  # values are loaded 16 bytes at a time


def test_a_kernel_that_does_not_run_is_reported_once(caplog):
    device = torch.device("cpu")
    deformable_attention.kernel_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not deformable_attention.kernel_works(device)  # Triton has no CPU driver
        assert not deformable_attention.kernel_works(device)
    assert caplog.text.count("deformable attention runs without its kernel: ") == 1
    deformable_attention.kernel_works.cache_clear()


@pytest.mark.cuda
@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_kernel_equals_pytorch_on_the_device(coordinates):
    device = torch.device("cuda")
    assert deformable_attention.kernel_works(device)
    assert kernel_error(device, None, coordinates) < 1e-5
    assert kernel_error(device, "bfloat16", coordinates) < 1e-2
    sizes = [(100, 167), (50, 84), (25, 42), (13, 21)]
    inputs = make_inputs(sizes, coordinates, b=2, q=900, heads=8, points=4, width=32, device=device)
    actual = sample_maps(inputs[0], sizes, torch.tensor(sizes, device=device), *inputs[1:])
    torch.testing.assert_close(actual, sample_with_pytorch(inputs[0], sizes, *inputs[1:]), atol=1e-4, rtol=0)


if __name__ == "__main__":
    compare_in_interpreter()

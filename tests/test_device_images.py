"""Images prepared on a device, compared with Pillow, torchvision, sam2 and transformers on the CPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2.functional import resize_image
from transformers import GroundingDinoImageProcessor

from grounded_sam.acceleration import device_images, resizing, uploads
from grounded_sam.acceleration.resizing import resize_like_pillow, resize_like_torchvision
from grounded_sam.structures.frame import Frame
from grounded_sam.trackers.prompting import to_pixels

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIZES = [  # height and width before and after
    ((1, 1), (1, 1)), ((1, 1), (5, 7)), ((1, 40), (3, 9)), ((40, 1), (7, 6)), ((3000, 30), (64, 64)),
    ((30, 3000), (64, 64)), ((50, 40), (40, 50)), ((50, 40), (50, 20)), ((50, 40), (20, 40)), ((97, 61), (96, 62)),
]  # fmt: skip
sides = st.integers(1, 60)


def noise(size_hw, seed=0, extreme=False):
    """Return random pixels; extreme ones are 0 or 255, so that the bicubic filter overshoots."""
    values = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)
    return np.where(values > 127, 255, 0).astype(np.uint8) if extreme else values


def resized_by_pillow(image, size_hw, kind):
    return np.array(Image.fromarray(image).resize((size_hw[1], size_hw[0]), FILTERS[kind]))


def resized_by_torchvision(image, size_hw):
    planes = torch.from_numpy(image).permute(2, 0, 1)
    if size_hw != (1, 1):  # where torch 2.14 fails on an assertion of its own
        planes = planes.contiguous()
    return resize_image(planes, list(size_hw), antialias=True).permute(1, 2, 0).numpy()


def assert_same_resizes(image, size_hw, device="cpu"):
    pixels = torch.from_numpy(image).to(device)
    for kind in FILTERS:
        expected = resized_by_pillow(image, size_hw, kind)
        np.testing.assert_array_equal(resize_like_pillow(pixels, size_hw, kind).cpu(), expected)
    np.testing.assert_array_equal(
        resize_like_torchvision(pixels, size_hw).cpu(), resized_by_torchvision(image, size_hw)
    )


@pytest.mark.parametrize(("size_hw", "new_hw"), SIZES)
def test_resizes_equal_the_libraries(size_hw, new_hw):
    assert_same_resizes(noise(size_hw), new_hw)
    assert_same_resizes(noise(size_hw, extreme=True), new_hw)


@given(sides, sides, sides, sides, st.integers(0, 99), st.booleans())
def test_resizes_equal_the_libraries_at_any_size(height, width, new_height, new_width, seed, extreme):
    assert_same_resizes(noise((height, width), seed, extreme), (new_height, new_width))


@pytest.mark.parametrize("name", ["truck.jpg", "chelsea.png"])
def test_resizes_of_photos_equal_the_libraries(photos, name):
    image = np.array(Image.open(photos / name).convert("RGB"))
    pixels = torch.from_numpy(image)
    expected = resized_by_pillow(image, (1024, 1024), "bicubic")
    np.testing.assert_array_equal(resize_like_pillow(pixels, (1024, 1024), "bicubic"), expected)
    expected = resized_by_torchvision(image, (800, 1200))
    np.testing.assert_array_equal(resize_like_torchvision(pixels, (800, 1200)), expected)


def test_batches_are_resized_like_their_images():
    batch = torch.from_numpy(np.stack([noise((20, 30), seed) for seed in range(3)]))
    for resize in (partial(resize_like_pillow, kind="bicubic"), resize_like_torchvision):
        assert torch.equal(resize(batch, (30, 20)), torch.stack([resize(image, (30, 20)) for image in batch]))


def test_the_installed_libraries_are_recognized():
    assert resizing.equals_pillow() and resizing.equals_torchvision()


def test_another_pillow_is_noticed(monkeypatch, caplog):
    monkeypatch.setattr("PIL.__version__", "12.1.0")  # which always resized rows first
    assert not resizing.equals_pillow.__wrapped__()
    assert "this version of Pillow computes something else" in caplog.text


TRITON = """
import numpy as np, torch
from grounded_sam.acceleration import resizing
noise = np.random.default_rng(0)
for size, n_out, kind, int16 in (((4, 9, 3), 20, "bicubic", False), ((1, 41, 12), 7, "bilinear", True)):
    image = torch.from_numpy(noise.integers(0, 2, size, np.uint8) * 255)
    taps = resizing.filter_taps(size[1], n_out, kind, int16)
    tensors = torch.from_numpy(np.stack([taps.indices, taps.weights]))
    expected = resizing.resample_with_torch(image, tensors, taps.bits)
    assert 0 < expected.float().mean() < 255
    assert torch.equal(resizing.resample_with_triton(image, tensors, taps.bits), expected)
"""


def test_the_triton_kernel_equals_pytorch():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", TRITON], check=True, env=environment, cwd=Path(__file__).parents[1])


def test_the_triton_kernel_compiles_for_a_gpu():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"image": "*u8", "taps": "*i32", "resized": "*u8", "BLOCK": "constexpr"}
    kernel = resizing.resample_kernel()
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs={"BLOCK": resizing.BLOCK})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.parametrize(("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)])
@pytest.mark.parametrize("size_hw", [(1, 1), (3, 90), (48, 48), (120, 50), (50, 120)])
def test_pixels_of_trackers_equal_those_of_sam2(size_hw, mean, std):
    image = noise(size_hw)
    mean, std = np.array(mean, np.float32), np.array(std, np.float32)
    square = np.array(Image.fromarray(image).resize((48, 48)), np.float32) / 255  # as in `load_video_frames`
    expected = torch.from_numpy((square - mean) / std).permute(2, 0, 1)[None]
    on_device = device_images.square_input(image, 48, "cpu", mean, std)
    for pixels in (to_pixels(image, 48, "cpu", mean, std), on_device):
        assert torch.equal(pixels, expected)
        assert pixels.dtype == torch.float32 and pixels.stride() == expected.stride()


@pytest.mark.parametrize("size_hw", [(1, 1), (3, 90), (64, 64), (120, 50), (64, 200)])
def test_images_of_segmenters_equal_those_of_sam2(size_hw):
    from sam2.utils.transforms import SAM2Transforms

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates scripts
        transforms = SAM2Transforms(64, 0.0)
    image = noise(size_hw)
    expected = transforms(image)[None]
    pixels = device_images.sam2_image_input(image, 64, "cpu")
    assert torch.equal(pixels, expected) and pixels.stride()[1:] == expected.stride()[1:]


def processor(**settings):
    return GroundingDinoImageProcessor(**{"size": {"shortest_edge": 48, "longest_edge": 80}} | settings)


def pixel_values(images, processor):
    return processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]


BATCHES = [
    [(48, 60)],
    [(30, 40)],
    [(100, 70), (100, 70)],
    [(31, 200), (200, 31), (48, 48), (5, 7)],
]


@pytest.mark.parametrize("sizes", BATCHES)
@pytest.mark.parametrize("on_device", [False, True])
def test_images_of_detectors_equal_those_of_transformers(sizes, on_device, monkeypatch):
    if on_device:
        monkeypatch.setattr(device_images, "dino_image_on_cpu", device_images.dino_image_on_device)
    for settings in ({}, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 1 / 128}):
        images = [noise(size, seed) for seed, size in enumerate(sizes)]
        expected = pixel_values(images, processor(**settings))
        pixels = device_images.grounding_dino_input(images, processor(**settings), "cpu")
        assert torch.equal(pixels, expected) and pixels.stride() == expected.stride()


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
def test_sizes_for_detectors_are_those_of_transformers(sizes):
    prepare = processor()
    found = [device_images.grounding_dino_size(prepare, size) for size in sizes]
    if None not in found:
        images = [noise(size) for size in sizes]
        pixels = prepare(images, input_data_format="channels_last", return_tensors="pt")
        assert [(int(m[:, 0].sum()), int(m[0].sum())) for m in pixels["pixel_mask"]] == found
        assert torch.equal(device_images.grounding_dino_input(images, prepare, "cpu"), pixels["pixel_values"])


@pytest.mark.parametrize("name", ["truck.jpg", "chelsea.png"])
def test_photos_of_detectors_equal_those_of_transformers(photos, name):
    image, prepare = np.array(Image.open(photos / name).convert("RGB")), GroundingDinoImageProcessor()
    expected = pixel_values([image], prepare)
    assert torch.equal(device_images.grounding_dino_input([image], prepare, "cpu"), expected)
    size = device_images.grounding_dino_size(prepare, image.shape[:2])
    assert torch.equal(device_images.dino_image_on_device(image, size, prepare, "cpu"), expected[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 3},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_resize": False},
        {"size": {"height": 50, "width": 60}},
        {"pad_size": {"height": 90, "width": 90}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_unusual_processors_prepare_images_themselves(settings):
    image, prepare = noise((40, 50)), processor(**settings)
    assert device_images.grounding_dino_size(prepare, (40, 50)) is None
    assert torch.equal(device_images.grounding_dino_input([image], prepare, "cpu"), pixel_values([image], prepare))


def test_images_that_vanish_are_left_to_the_processor():
    assert device_images.grounding_dino_size(processor(), (1, 3000)) is None


@pytest.mark.filterwarnings("error")
def test_arrays_of_any_kind_are_uploaded():
    image = noise((20, 30))
    image.flags.writeable = False
    for array in (image, image[::-1], image[:, ::2], np.asfortranarray(image)):
        assert np.array_equal(uploads.upload(array, "cpu").numpy(), array)
        copy = np.ascontiguousarray(array)
        for prepare in (to_pixels, device_images.sam2_image_input):
            assert torch.equal(prepare(array, 16, "cpu"), prepare(copy, 16, "cpu"))
        inputs = [device_images.grounding_dino_input([image], processor(), "cpu") for image in (array, copy)]
        assert torch.equal(*inputs)


def frozen(seed):
    """Return a picture whose copy on the CPU does not share its memory."""
    image = noise((8, 8), seed)
    image.flags.writeable = False
    return image


def test_a_picture_is_uploaded_once_while_it_lives():
    pictures, cpu, image = uploads.PictureUploads(), torch.device("cpu"), frozen(0)
    first = pictures.get(image, cpu, keep=True)
    assert pictures.get(image, cpu, keep=False) is first and len(pictures) == 1
    assert pictures.get(image.view(), cpu, keep=False) is not first and len(pictures) == 1
    del image
    gc.collect()
    assert len(pictures) == 0 and first.sum() > 0


def test_pictures_do_not_pile_up():
    cpu, images = torch.device("cpu"), [frozen(seed) for seed in range(6)]
    by_number, by_size = uploads.PictureUploads(max_kept=2), uploads.PictureUploads(max_bytes=3 * images[0].nbytes)
    for pictures, limit in ((by_number, 2), (by_size, 3)):
        copies = [pictures.get(image, cpu, keep=True) for image in images]
        assert len(pictures) == limit
        again = [pictures.get(image, cpu, keep=False) for image in images]
        assert [a is b for a, b in zip(again, copies, strict=True)] == [False] * (6 - limit) + [True] * limit
        assert all(np.array_equal(a, image) for a, image in zip(again, images, strict=True))


def test_threads_upload_at_once():
    pictures, images = uploads.PictureUploads(max_kept=4), [frozen(seed) for seed in range(8)]
    wrong = []

    def work(offset):
        for i in range(200):
            image = images[(i * 3 + offset) % 8] if i % 2 else frozen(i)
            if not np.array_equal(pictures.get(image, torch.device("cpu"), keep=True).numpy(), image):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(pictures) <= 4


def test_frames_of_the_same_memory_are_different_pictures():
    memory = noise((4, 4))
    frames = Frame(pixels=memory), Frame(pixels=memory), Frame(pixels=lambda: memory)
    images = [frame.image for frame in frames]
    assert len({id(image) for image in images}) == 3 and all(np.shares_memory(image, memory) for image in images)
    assert all(frame.image is image for frame, image in zip(frames, images, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize(("size_hw", "new_hw"), SIZES)
def test_resizes_on_cuda_equal_the_libraries(size_hw, new_hw):
    assert_same_resizes(noise(size_hw, extreme=True), new_hw, "cuda")


@pytest.mark.cuda
def test_triton_resizes_on_cuda():
    assert resizing._triton_works("cuda:0")


@pytest.mark.cuda
def test_inputs_on_cuda_equal_those_on_the_cpu():
    images = [noise(size, seed) for seed, size in enumerate([(600, 800), (800, 600), (600, 800)])]
    prepare = GroundingDinoImageProcessor()
    for _ in range(2):  # the second time from the copies that are kept
        pixels = device_images.grounding_dino_input(images, prepare, "cuda")
        assert torch.equal(pixels.cpu(), pixel_values(images, prepare))
        for image in images:
            pixels, expected = to_pixels(image, 512, "cuda"), to_pixels(image, 512)
            assert torch.equal(pixels.cpu(), expected) and pixels.stride() == expected.stride()
            expected = device_images.sam2_image_input(image, 512, "cpu")
            torch.testing.assert_close(device_images.sam2_image_input(image, 512, "cuda").cpu(), expected)


@pytest.mark.cuda
def test_page_locked_memory_is_reused_after_the_copies():
    images = [noise((1080, 1920), seed) for seed in range(4)]
    wait = torch.randn(4096, 4096, device="cuda")
    copies = []
    for i in range(40):
        for _ in range(3):
            wait = wait @ wait  # copies are queued behind it, so that memory cannot be reused at once
            wait /= wait.norm()
        copies.append(uploads.upload(images[i % 4], "cuda"))
    for i, copy in enumerate(copies):
        assert np.array_equal(copy.cpu().numpy(), images[i % 4])


@pytest.mark.cuda
def test_streams_wait_for_copies_of_each_other():
    images = [noise((1080, 1920), seed) for seed in range(4)]
    sums, expected = [], [int(image.sum(dtype=np.int64)) for image in images] * 8

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(32):
                sums.append((i, int(uploads.upload(images[i % 4], "cuda", keep=True).sum(dtype=torch.int64))))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sums) == 96 and all(total == expected[i] for i, total in sums)

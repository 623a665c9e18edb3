from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import ImageError, read_image
from grounded_sam.media.deep import black_and_white, to_8_bits
from grounded_sam.media.images import displayed_size
from grounded_sam.structures.frame import Frame, to_frame


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean absolute difference of two images."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize(
    ("name", "size_wh"),
    [
        ("flies_10mp_exif6.jpeg", (2592, 3888)),
        ("exif_landscape_6.jpg", (1800, 1200)),
        ("dice_rgba.png", (200, 150)),
        ("chelsea_palette.png", (451, 300)),
        ("coffee_1bit.png", (600, 400)),
        ("hopper_16bit.pgm", (128, 128)),
        ("groceries_cmyk.jpg", (800, 534)),
        ("swan_animated.gif", (214, 120)),
        ("frozenpond.mpo", (640, 480)),
        ("tiny_1x1.png", (1, 1)),
        ("strip_3000x30.jpg", (3000, 30)),
        ("truck ütf8 名前 (1).jpg", (900, 600)),
    ],
)
def test_unusual_images_are_read_as_upright_rgb(photos, name, size_wh):
    image = read_image(photos / name)
    assert image.dtype == np.uint8
    assert image.shape == (size_wh[1], size_wh[0], 3)


def test_exif_orientation_is_applied(photos):
    upright, rotated = read_image(photos / "exif_landscape_1.jpg"), read_image(photos / "exif_landscape_6.jpg")
    assert mean_difference(upright, rotated) < 6


@pytest.mark.parametrize("orientation", range(2, 9))
def test_all_eight_orientations_give_the_same_portrait(photos, orientation):
    reference = read_image(photos / "orientation" / "hopper_orientation_2.jpg")
    assert mean_difference(reference, read_image(photos / "orientation" / f"hopper_orientation_{orientation}.jpg")) < 6


def test_an_avif_with_mirror_and_rotation_properties_is_read(photos):
    assert read_image(photos / "field_rot7.avif").ndim == 3


def test_cmyk_is_converted_to_the_colors_of_the_rgb_original(photos):
    assert mean_difference(read_image(photos / "groceries.jpg"), read_image(photos / "groceries_cmyk.jpg")) < 12


def test_sixteen_bit_images_are_scaled_and_not_clipped(photos):
    color = read_image(photos / "coffee.png")[::2, ::2]
    assert mean_difference(color, read_image(photos / "coffee_rgb16.png")) < 2
    gray = read_image(photos / "coins_gray8.png")
    assert mean_difference(gray, read_image(photos / "coins_gray12in16.png")) < 3


def test_palette_indices_are_converted_to_their_colors(photos):
    assert mean_difference(read_image(photos / "chelsea.png"), read_image(photos / "chelsea_palette.png")) < 12


def test_transparent_images_are_composited_over_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 10, 10, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert (image[:2] == (200, 10, 10)).all()
    assert (image[2:] == 255).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated_half.jpg", "damaged"),
        ("truncated_header.jpg", "damaged|not an image"),
        ("zero_bytes.jpg", "empty"),
        ("text_renamed.jpg", "not an image"),
        ("html_error.png", "not an image"),
        ("png_bad_crc.png", "damaged"),
        ("png_truncated.png", "damaged"),
        ("bomb_header_60000x60000.png", "60000x60000 px is more than|not an image|exceeds"),
        ("bomb_real_20000x15000.png", "20000x15000 px is more than|exceeds"),
        ("zero_dim_0x10.png", "."),
        ("no_such_file.png", "no such file"),
    ],
)
def test_an_unusable_file_gives_an_error_of_one_line_that_names_it(data, name, message):
    with pytest.raises(ImageError, match=message) as error:
        read_image(data / "malformed" / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(data):
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ImageError):
        read_image(data / "malformed" / "bomb_real_20000x15000.png")
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["png_named.jpg", "jpeg_no_extension"])
def test_a_wrong_or_missing_suffix_does_not_matter(data, name):
    assert read_image(data / "malformed" / name).shape[2] == 3


def test_arrays_and_pil_images_are_converted_to_frames(photos):
    path = photos / "chelsea.png"
    array = read_image(path)
    assert np.array_equal(to_frame(Image.open(path)).image, array)
    assert np.array_equal(to_frame(array).image, array)
    assert to_frame(array[..., 0]).image.shape == array.shape
    assert to_frame(str(path)).name == "chelsea.png"
    frame = Frame(pixels=array)
    assert to_frame(frame) is frame


@pytest.mark.parametrize(
    "value", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), 7, None]
)
def test_a_value_that_is_not_an_image_is_refused(value):
    with pytest.raises(ImageError, match="expected"):
        to_frame(value)


def test_postscript_is_refused_even_with_the_suffix_of_an_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="not an image"):
        read_image(tmp_path / "a.jpg")


def test_the_limit_on_pixels_can_be_raised_and_lowered(tmp_path):
    Image.new("1", (15000, 13000)).save(tmp_path / "a.png")  # more than Pillow's limit
    assert read_image(tmp_path / "a.png", max_pixels=200_000_000).shape == (13000, 15000, 3)
    with pytest.raises(ImageError, match="more than the 1,000 pixels"):
        read_image(tmp_path / "a.png", max_pixels=1000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_damaged_pil_image_is_an_image_error(data):
    with pytest.raises(ImageError, match="damaged"), Image.open(data / "malformed" / "truncated_half.jpg") as image:
        to_frame(image)


def test_a_folder_is_refused_as_a_directory(tmp_path):
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


#: From black to 220 of 255.
RAMP = np.tile(np.linspace(0, 220 / 255, 64), (48, 1))
RAMP_RGB = np.repeat(RAMP[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("suffix", "values"),
    [
        ("tif", RAMP.astype(np.float32)),
        ("tif", (RAMP * 65535).astype(np.float32)),
        ("tif", RAMP_RGB.astype(np.float32)),
        ("tif", RAMP_RGB.astype(np.float64)),
        ("tif", np.where(RAMP > 2, np.nan, RAMP).astype(np.float32)),
        ("tif", np.where(RAMP == 0, np.inf, RAMP).astype(np.float32)),
        ("tif", (RAMP_RGB * 2047).astype(np.uint16)),
        ("png", (RAMP_RGB * 2047).astype(np.uint16)),
        ("png", (RAMP_RGB * 4095).astype(np.uint16)),
        ("png", (RAMP_RGB * 65535).astype(np.uint16)),
        ("png", (RAMP * 1023).astype(np.uint16)),
        ("tif", (RAMP * 20000 - 10000).astype(np.int16)),
        ("tif", (RAMP - 0.4).astype(np.float32)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}-{value.ndim}-{np.nanmax(value):.4g}",
)
def test_deep_colors_have_the_brightness_of_8_bits(tmp_path, suffix, values):
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), values[..., ::-1] if values.ndim == 3 else values)
    assert abs(float(read_image(path).mean()) - RAMP.mean() * 255) < 20


def test_32_bit_numbers_without_sign_are_not_negative(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", (RAMP * (2**32 - 1)).astype(np.uint32))
    assert abs(float(read_image(tmp_path / "a.tif").mean()) - RAMP.mean() * 255) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_colors_are_upright(tmp_path, orientation):
    tifffile = pytest.importorskip("tifffile")
    image = np.zeros((40, 60, 3), np.uint16)
    image[:20, :30, 0] = 4095
    for bits, values in ((16, image), (8, (image // 16).astype(np.uint8))):
        tags = [(274, 3, 1, orientation, True)]
        tifffile.imwrite(tmp_path / f"{bits}.tif", values, photometric="rgb", extratags=tags)
    rgb = read_image(tmp_path / "16.tif")
    assert np.array_equal(rgb, read_image(tmp_path / "8.tif"))
    assert displayed_size(tmp_path / "16.tif") == displayed_size(tmp_path / "8.tif") == rgb.shape[:2]


def test_deep_images_that_are_transparent_are_composited_over_white(tmp_path):
    image = np.full((4, 4, 4), 65535, np.uint16)
    image[..., :3] = 0
    image[:2, :, 3] = 0
    assert cv2.imwrite(str(tmp_path / "a.png"), image)
    assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == [255, 255, 0, 0]


def test_an_image_without_a_finite_value_and_one_with_planes_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((8, 8), np.nan, np.float32))
    with pytest.raises(ImageError, match="no finite value"):
        read_image(tmp_path / "nan.tif")
    tifffile.imwrite(tmp_path / "p.tif", np.ones((3, 8, 8), np.uint16), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="plane per color"):
        read_image(tmp_path / "p.tif")


def test_a_truncated_deep_image_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 65535, (64, 64, 3)).astype(np.uint16)
    for suffix in ("png", "tif"):
        path = tmp_path / f"a.{suffix}"
        cv2.imwrite(str(path), noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ImageError, match="damaged|not an image"):
            read_image(path)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
@settings(max_examples=50)
def test_scaling_keeps_the_order_of_values(values):
    array = np.array(values)
    scaled = to_8_bits(array, *black_and_white([array]))
    order = np.argsort(array, kind="stable")
    assert (np.diff(scaled[order].astype(int)) >= 0).all()


def test_the_brightest_integer_is_never_nearly_black():
    for brightest in (255, 256, 300, 1500, 4000, 40000, 70000, 2**31):
        _, white = black_and_white([np.array([0, brightest])])
        assert 0.24 < brightest / white <= 1


def test_large_16_bit_images_take_little_memory(tmp_path):
    Image.fromarray(np.zeros((6000, 6000), np.uint16)).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import resource, sys; from grounded_sam import read_image; from PIL import Image; Image.init(); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; read_image(sys.argv[1]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    kib = int(subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "a.png")]))
    assert kib * 1024 < 10 * 36_000_000  # 5 of them for the image and its RGB; it was 29 bytes per pixel


def test_pixels_of_many_bytes_count_for_more(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 100, 3), np.uint16))
    with pytest.raises(ImageError, match=r"100x100 px of 6 bytes count as 15,000, .*source.max_pixels") as error:
        read_image(tmp_path / "a.png", max_pixels=10_000)
    assert "15,000" in str(error.value)
    assert read_image(tmp_path / "a.png", max_pixels=15_000).shape == (100, 100, 3)
    with pytest.raises(ImageError, match=r"count as 15,000"):
        displayed_size(tmp_path / "a.png", max_pixels=10_000)


@pytest.mark.parametrize(("suffix", "package"), [("heic", "pillow_heif"), ("jxl", "pillow_jxl")])
def test_heic_and_jpeg_xl_are_read_with_the_extra(tmp_path, suffix, package):
    pytest.importorskip(package)
    from grounded_sam.media.images import safe_formats

    safe_formats()
    Image.fromarray((RAMP_RGB * 255).astype(np.uint8)).save(tmp_path / f"a.{suffix}", quality=95)
    assert abs(float(read_image(tmp_path / f"a.{suffix}").mean()) - RAMP.mean() * 255) < 3


@pytest.mark.parametrize("suffix", ["NEF", "dng", "svg", "dcm", "exr"])
def test_formats_that_are_not_read_are_refused_with_a_way_out(tmp_path, suffix):
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}", format="TIFF")  # the thumbnail inside many RAW files
    with pytest.raises(ImageError, match="not read; (develop|export|save)"):
        read_image(tmp_path / f"a.{suffix}")

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from grounded_sam import ImageError, read_image
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

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from grounded_sam import ImageError, read_image
from grounded_sam.structures.frame import Frame, to_frame


def close(a: np.ndarray, b: np.ndarray) -> float:
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
def test_odd_pictures_come_upright_as_rgb(photos, name, size_wh):
    image = read_image(photos / name)
    assert image.dtype == np.uint8
    assert image.shape == (size_wh[1], size_wh[0], 3)


def test_exif_orientation_is_applied(photos):
    upright, turned = read_image(photos / "exif_landscape_1.jpg"), read_image(photos / "exif_landscape_6.jpg")
    assert close(upright, turned) < 6


@pytest.mark.parametrize("turn", range(2, 9))
def test_all_eight_orientations_show_one_portrait(photos, turn):
    reference = read_image(photos / "orientation" / "hopper_orientation_2.jpg")
    assert close(reference, read_image(photos / "orientation" / f"hopper_orientation_{turn}.jpg")) < 6


def test_avif_mirrored_and_rotated_by_its_own_properties_is_read(photos):
    assert read_image(photos / "field_rot7.avif").ndim == 3


def test_cmyk_looks_like_its_rgb_original(photos):
    assert close(read_image(photos / "groceries.jpg"), read_image(photos / "groceries_cmyk.jpg")) < 12


def test_sixteen_bits_are_scaled_not_clipped(photos):
    colour = read_image(photos / "coffee.png")[::2, ::2]
    assert close(colour, read_image(photos / "coffee_rgb16.png")) < 2
    gray = read_image(photos / "coins_gray8.png")
    assert close(gray, read_image(photos / "coins_gray12in16.png")) < 3


def test_palette_indices_are_not_taken_as_gray(photos):
    assert close(read_image(photos / "chelsea.png"), read_image(photos / "chelsea_palette.png")) < 12


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 10, 10, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert (image[:2] == (200, 10, 10)).all()
    assert (image[2:] == 255).all()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("truncated_half.jpg", "damaged"),
        ("truncated_header.jpg", "damaged|not a picture"),
        ("zero_bytes.jpg", "empty"),
        ("text_renamed.jpg", "not a picture"),
        ("html_error.png", "not a picture"),
        ("png_bad_crc.png", "damaged"),
        ("png_truncated.png", "damaged"),
        ("bomb_header_60000x60000.png", "60000x60000 px is more than|not a picture|exceeds"),
        ("bomb_real_20000x15000.png", "20000x15000 px is more than|exceeds"),
        ("zero_dim_0x10.png", "."),
        ("no_such_file.png", "no such file"),
    ],
)
def test_bad_files_are_refused_in_words_that_name_them(data, name, says):
    with pytest.raises(ImageError, match=says) as error:
        read_image(data / "malformed" / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bomb_is_refused_before_it_is_decoded(data):
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ImageError):
        read_image(data / "malformed" / "bomb_real_20000x15000.png")
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["png_named.jpg", "jpeg_no_extension"])
def test_a_wrong_or_missing_suffix_does_not_matter(data, name):
    assert read_image(data / "malformed" / name).shape[2] == 3


def test_arrays_and_pil_images_are_frames_too(photos):
    path = photos / "chelsea.png"
    array = read_image(path)
    assert np.array_equal(to_frame(Image.open(path)).image, array)
    assert np.array_equal(to_frame(array).image, array)
    assert to_frame(array[..., 0]).image.shape == array.shape
    assert to_frame(str(path)).name == "chelsea.png"
    frame = Frame(array)
    assert to_frame(frame) is frame


@pytest.mark.parametrize(
    "what", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), 7, None]
)
def test_what_is_no_picture_is_refused(what):
    with pytest.raises(ImageError, match="expected"):
        to_frame(what)


def test_postscript_is_not_run_whatever_its_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="not a picture"):
        read_image(tmp_path / "a.jpg")


def test_the_limit_on_pixels_can_be_raised_and_lowered(tmp_path):
    Image.new("1", (15000, 13000)).save(tmp_path / "a.png")  # more than Pillow's own limit
    assert read_image(tmp_path / "a.png", max_pixels=200_000_000).shape == (13000, 15000, 3)
    with pytest.raises(ImageError, match="more than the 1,000 pixels"):
        read_image(tmp_path / "a.png", max_pixels=1000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_damaged_pil_image_is_an_image_error(data):
    with pytest.raises(ImageError, match="damaged"), Image.open(data / "malformed" / "truncated_half.jpg") as picture:
        to_frame(picture)


def test_a_folder_is_no_damaged_picture(tmp_path):
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)

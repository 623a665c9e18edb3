from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounded_sam import ConfigError, ImageError
from grounded_sam.sources.images import ImageSource


def write_image(path: Path) -> Path:
    """Write a small gray image and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), 90, np.uint8)).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    for name in ("b/10.png", "b/2.png", "a.jpg", "b/.hidden.png", ".cache/x.png", "b/UPPER.JPG"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    (tmp_path / "b" / "broken.png").write_bytes(b"")
    return tmp_path


def test_a_folder_is_searched_in_natural_order(tree):
    source = ImageSource(tree)
    assert [frame.name for frame in source] == ["a.jpg", "b/2.png", "b/10.png", "b/UPPER.JPG"]
    assert [frame.index for frame in source] == [0, 1, 2, 3]


def test_unusable_files_and_videos_are_listed_and_the_others_are_read(tree):
    source = ImageSource(tree)
    assert len(list(source)) == 4
    assert {s.file: s.reason for s in source.skipped} == {
        "clip.mp4": "a video; source=images reads images",
        "b/broken.png": "the file is empty",
    }


def test_a_file_a_glob_and_a_list_of_paths_are_read(tree, tmp_path, monkeypatch):
    assert [f.name for f in ImageSource(tree / "a.jpg")] == ["a.jpg"]
    assert [f.name for f in ImageSource(f"{tree}/**/*.png") if "broken" not in f.name] == ["2.png", "10.png"]
    listing = tmp_path / "list.txt"
    listing.write_text("a.jpg\n\n# a comment\nb/10.png\n", encoding="utf-8")
    assert [f.name for f in ImageSource(listing)] == ["a.jpg", "b/10.png"]
    monkeypatch.chdir(tree)
    assert [f.name for f in ImageSource("*.jpg")] == ["a.jpg"]


def test_files_with_the_same_name_in_two_folders_have_different_names(tmp_path):
    first, second = write_image(tmp_path / "x" / "same.png"), write_image(tmp_path / "y" / "same.png")
    listing = tmp_path / "list.txt"
    listing.write_text(f"{first}\n{second}\n")
    assert [f.name for f in ImageSource(listing)] == ["x/same.png", "y/same.png"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "input is missing"),
        ("nowhere", "no such file or folder: nowhere"),
        ("nowhere/*.jpg", "no file matches nowhere"),
        ("clip.mp4", "only videos; use source=auto or source=video"),
        ("empty", "no image in empty"),
        ("builtin:nothing", "available: builtin:demo"),
    ],
)
def test_an_input_without_images_is_refused(tree, monkeypatch, given, message):
    (tree / "empty").mkdir()
    monkeypatch.chdir(tree)
    with pytest.raises(ConfigError, match=message):
        ImageSource(given)


def test_a_single_unusable_file_is_an_error(tree):
    with pytest.raises(ImageError, match="empty"):
        list(ImageSource(tree / "b" / "broken.png"))


def test_images_are_decoded_only_when_they_are_needed(tree):
    source = iter(ImageSource(tree))
    (tree / "b" / "10.png").write_bytes(b"")
    assert [frame.name for frame in source] == ["a.jpg", "b/2.png", "b/UPPER.JPG"]


def test_links_are_followed_without_loops_and_old_outputs_are_left_out(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "far.png")
    (tree / "link").symlink_to(elsewhere)
    (tree / "b" / "loop").symlink_to(tree)
    (tree / "run" / ".hydra").mkdir(parents=True)
    write_image(tree / "run" / "overlay" / "a.jpg")
    assert [f.name for f in ImageSource(tree)] == ["a.jpg", "b/2.png", "b/10.png", "b/UPPER.JPG", "link/far.png"]


def test_names_that_are_not_ascii_or_not_utf8_are_kept(tmp_path):
    write_image(tmp_path / "1²3.png")
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "1²3.png").read_bytes())
    except OSError:
        pytest.skip("this file system allows only UTF-8 names")
    names = {f.name for f in ImageSource(tmp_path)}
    assert names == {"1²3.png", "caf\\xe9.png"}
    for name in names:
        name.encode()

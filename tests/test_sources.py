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
        "clip.mp4": "a video; source=auto reads both",
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
        ("builtin:demo/nothing.mp4", "the files of that folder are scene-1.png"),
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


def test_files_that_are_not_read_are_named_with_the_way_out(tmp_path, monkeypatch):
    from grounded_sam.media import files
    from grounded_sam.sources.auto import AutoSource

    monkeypatch.setattr(files, "safe_formats", lambda: ["PNG", "TIFF"])  # as without the extra
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.HEIC", "c.nef", "sub/d.jxl", "e.svg", "labels.txt"):
        (tmp_path / name).write_bytes(b"x")
    expected = {"b.HEIC": "[formats]", "c.nef": "develop it", "sub/d.jxl": "[formats]", "e.svg": "export it"}
    for source in (AutoSource(tmp_path), ImageSource(tmp_path)):
        assert [frame.name for frame in source] == ["a.png"]
        assert {s.file: part in s.reason for s in source.skipped for part in [expected[s.file]]} == dict.fromkeys(
            expected, True
        )
    shards = [AutoSource(tmp_path, shard=i, num_shards=3) for i in range(3)]
    assert sorted(s.file for shard in shards for s in shard.skipped) == sorted(expected)  # each once
    with pytest.raises(ConfigError, match=r"1 file is not read: d.jxl: .*pip install 'grounded_sam\[formats\]'"):
        AutoSource(tmp_path / "sub")


def test_folders_that_a_pattern_matches_are_named_and_a_double_star_reads_them(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = ImageSource(str(tmp_path / "*"))
    assert [frame.name for frame in source] == ["a.png"]
    assert [(s.file, "**" in s.reason) for s in source.skipped] == [("sub", True)]
    source = ImageSource(str(tmp_path / "**"))
    assert [frame.name for frame in source] == ["a.png", "sub/b.png"]
    assert not source.skipped


def test_a_listed_file_whose_name_begins_with_a_hash_is_no_comment(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "#1.png")
    (tmp_path / "list.txt").write_text("# a comment\n#1.png\nmissing.png\nsub\n")
    (tmp_path / "sub").mkdir()
    source = ImageSource(tmp_path / "list.txt")
    assert [frame.name for frame in source] == ["#1.png"]
    assert {s.file: s.reason for s in source.skipped} == {
        "missing.png": "no such file",
        "sub": "is a directory; name the files in it",
    }


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    import os

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    walk = os.walk

    def closed(top, onerror=None, **options):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "sub")))
        return walk(top, **options)

    monkeypatch.setattr(os, "walk", closed)
    source = ImageSource(tmp_path)
    assert [(s.file, "Permission denied" in s.reason) for s in source.skipped] == [("sub", True)]


def test_further_pages_are_named_and_the_advice_reads_them(tmp_path):
    from grounded_sam.sources.video import VideoSource

    pages = [Image.new("RGB", (8, 6), (60 * i, 0, 0)) for i in range(3)]
    small = Image.new("RGB", (4, 3))
    for name in ("a.tif", "b.gif", "c.webp", "d.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    Image.new("RGB", (8, 6)).save(tmp_path / "e.tif")
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "f.tif") as out:  # a smaller copy is no page
        out.write(np.asarray(pages[0]), photometric="rgb")
        out.write(np.asarray(small), photometric="rgb", subfiletype=1)
    source = ImageSource(tmp_path)
    assert len(list(source)) == 6
    assert [s.file for s in source.skipped] == ["a.tif", "b.gif", "c.webp", "d.png"]
    for skipped in source.skipped:
        path = skipped.reason.partition("input='")[2].partition("'")[0]
        frames = [frame.image[0, 0, 0] for frame in VideoSource(path)]
        assert np.abs(np.array(frames, int) - [0, 60, 120]).max() < 12

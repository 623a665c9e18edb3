"""Files that are not what their names say: no other program starts, no other file or host is opened, nothing hangs."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from grounded_sam import ConfigError, ImageError
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.store_runs import file_digest
from grounded_sam.media.containers import CONTAINERS, redirect_target
from grounded_sam.media.files import VIDEO_SUFFIXES, find_files
from grounded_sam.media.images import displayed_size, read_image, read_label_map
from grounded_sam.media.video import VideoDecoder
from grounded_sam.sources.auto import AutoSource

XML = (
    "<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size><object><name>cat</name>"
    "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"


def voc(folder: Path, xml: str = XML) -> Path:
    """Make a Pascal VOC dataset of one image, and return the path of its mask."""
    for name in ("Annotations", "SegmentationObject"):
        (folder / name).mkdir()
    (folder / "Annotations" / "a.xml").write_text(xml)
    return folder / "SegmentationObject" / "a.png"


def write_bomb(path: Path) -> None:
    """Write a small PNG that declares 60000x60000 px."""
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def test_masks_of_voc_pass_the_same_guard_as_images(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail(f"started {args}"))
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **options: pytest.fail(f"started {args}"))
    mask = voc(tmp_path)
    mask.write_bytes(EPS)
    with pytest.raises(ConfigError, match=r"a.png: not an image that Pillow can read"):
        read_ground_truth(tmp_path)
    write_bomb(mask)
    with pytest.raises(ConfigError, match=r"60000x60000 px is more than .*source.max_pixels"):
        read_ground_truth(tmp_path)
    Image.new("RGB", (40, 30)).save(mask)
    with pytest.raises(ConfigError, match="must have one channel or a palette, got mode RGB"):
        read_ground_truth(tmp_path)
    Image.fromarray(np.pad(np.ones((9, 9), np.uint8), ((0, 21), (0, 31)))).save(mask)
    assert len(read_ground_truth(tmp_path).images) == 1


@pytest.mark.parametrize(
    "xml",
    [
        XML.replace("<annotation>", '<?xml version="1.0" encoding="foo-99"?><annotation>', 1),
        XML.replace("40", "inf"),
        XML.replace("<annotation>", '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + "".join(
            f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 30}">' for i in range(12)
        ) + "]><annotation>&m;", 1),
    ],
    ids=["encoding", "size", "entities"],
)  # fmt: skip
def test_damaged_voc_is_named(tmp_path, xml):
    voc(tmp_path, xml)
    with pytest.raises(ConfigError, match=r"a.xml: not a Pascal VOC annotation"):
        read_ground_truth(tmp_path)


@pytest.mark.parametrize("read", [read_image, read_label_map, displayed_size])
def test_whatever_a_decoder_raises_is_a_bad_file(tmp_path, monkeypatch, read):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")

    def fail(*args, **options):
        raise RuntimeError("odd\nexception")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "_open", fail)
    with pytest.raises(ImageError, match=r"a.png: damaged image \(odd exception\)"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a", "a.mp4"])
def test_pipes_and_devices_do_not_hang(tmp_path, name):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    os.mkfifo(tmp_path / name)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    source = AutoSource(tmp_path)
    assert [frame.name for frame in source] == ["good.png"]
    reasons = {skipped.file: skipped.reason for skipped in source.skipped}
    assert "not a file, but a pipe" in reasons["zero.png"]
    assert name == "a" or name in reasons
    with pytest.raises(OSError, match="not a file, but a pipe"):
        file_digest([tmp_path / name])
    assert len(find_files(str(tmp_path)).images) >= 2


@pytest.fixture
def clip(tmp_path) -> Path:
    """Write a small video as `real.mp4` in an empty folder."""
    import av

    with av.open(str(tmp_path / "real.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return tmp_path / "real.mp4"


def test_the_formats_of_all_suffixes_of_videos_are_opened():
    import av

    allowed = set(CONTAINERS.split(","))
    assert not allowed & {"concat", "hls", "dash", "sdp", "image2", "image2pipe", "tee", "lavfi"}
    for name in av.formats_available:
        with suppress(ValueError):  # a format that is only written
            container = av.ContainerFormat(name, "r")
            if VIDEO_SUFFIXES & {f".{extension}" for extension in container.extensions}:
                assert set(container.name.split(",")) & allowed, name


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile real.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_named_like_a_video_opens_no_other_file(clip, kind):
    assert len(list(VideoDecoder(clip))) == 5
    playlist = clip.with_name("list.mp4")
    playlist.write_text(PLAYLISTS[kind])
    with pytest.raises(ImageError, match="cannot be opened as a video"):
        list(VideoDecoder(playlist))
    source = AutoSource(clip.parent)
    assert len(list(source)) == 5 and [skipped.file for skipped in source.skipped] == ["list.mp4"]


def test_one_byte_of_a_video_ends_no_run(clip):
    whole = clip.read_bytes()
    damaged = clip.with_name("damaged.mp4")
    for position in range(0, len(whole), 9):
        damaged.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        decoder = VideoDecoder(damaged)
        with suppress(TypeError):  # unknown
            assert len(decoder) >= 0
        try:
            list(decoder)
        except ImageError as error:
            assert "\n" not in str(error)


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `/same` redirects on the host, `/other` to another one."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        targets = {"/same": "/real.mp4", "/other": f"http://127.0.0.1:{port}/real.mp4", "/file": "file:///etc/passwd"}
        if self.path in targets:
            self.send_response(302)
            self.send_header("Location", targets[self.path])
            self.end_headers()
        else:
            super().do_GET()


def test_redirects_are_followed_on_the_host_alone(clip):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(clip.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_address[1]}"
    try:
        assert len(list(VideoDecoder(f"{address}/real.mp4"))) == 5
        assert len(list(VideoDecoder(f"{address}/same"))) == 5
        with pytest.raises(ImageError, match=r"redirects to another host, http://127.0.0.1:\d+, which is not followed"):
            list(VideoDecoder(f"{address}/other"))
        assert redirect_target(f"{address}/file") is None
        assert redirect_target(f"{address}/real.mp4") is None
        clip.with_name("list.mp4").write_text(PLAYLISTS["hls"])
        with pytest.raises(ImageError, match="cannot be opened as a video"):
            list(VideoDecoder(f"{address}/list.mp4"))
    finally:
        server.shutdown()
        server.server_close()

"""Videos as sources: every kind of file, cut and damaged ones, folders, globs, a file server."""

from __future__ import annotations

import functools
import http.server
import itertools
import threading

import av
import numpy as np
import pytest
from PIL import Image

from grounded_sam import ConfigError, ImageError
from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.media.prefetch import prefetch
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.video import VideoSource


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """20 frames of 48x64 px whose gray says which frame it is."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    video = Mp4Writer(path, crf=5)
    for i in range(20):
        video.write(np.full((48, 64, 3), 10 * i + 20, np.uint8), i / 10)
    video.close()
    return path


def grays(frames):
    return [round((frame.image.mean() - 20) / 10) for frame in frames]


def test_frames_come_in_order_with_numbers_times_and_names(clip):
    video = VideoSource(clip)
    frames = list(video)
    assert len(video) == len(frames) == 20
    assert grays(frames) == [frame.index for frame in frames] == list(range(20))
    assert [frame.time_s for frame in frames] == pytest.approx([i / 10 for i in range(20)])
    assert frames[3].name == "clip.mp4/000003"
    assert {frame.video for frame in frames} == {"clip.mp4"}


def test_start_stop_stride_and_size(clip):
    video = VideoSource(clip, start=4, stop=15, stride=3, max_side=32)
    frames = list(video)
    assert grays(frames) == [frame.index for frame in frames] == [4, 7, 10, 13]
    assert len(video) == 4
    assert frames[0].image.shape == (24, 32, 3)
    assert frames[0].time_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"stride": 0}, "source.stride"),
        ({"start": 5, "stop": 5}, "source.stop"),
        ({"max_side": 2}, "source.max_side"),
        ({"fps": 0}, "source.fps"),
    ],
)
def test_numbers_out_of_range_name_their_key(clip, keys, says):
    with pytest.raises(ConfigError, match=says):
        VideoSource(clip, **keys)


def test_an_input_that_is_none_is_refused(tmp_path):
    for given, says in (
        ("nowhere.mp4", "no such video"),
        ("file:///etc/passwd", "a URL must begin with"),
        (None, "missing"),
    ):
        with pytest.raises(ConfigError, match=says):
            VideoSource(given)
    with pytest.raises(ConfigError, match="no frame in"):
        VideoSource(tmp_path)


#: Of every video file of the test data: frames, size, and what is said of it.
FILES = {
    "corrupt_middle.mp4": (20, (240, 426), "cut or damaged"),
    "hevc_10bit.mp4": (24, (240, 426), None),
    "mjpeg_6fps.avi": (6, (240, 426), None),
    "odd_427x239_yuv444.mp4": (24, (239, 427), None),
    "one_frame.mp4": (1, (240, 426), None),
    "rotation_90.mp4": (48, (426, 240), None),
    "truncated_moov_first.mp4": (20, (240, 426), "27 frames of the 48"),
    "vfr.mp4": (13, (240, 426), None),
    "vp9.webm": (24, (240, 426), None),
}


@pytest.mark.parametrize("name", FILES)
def test_every_codec_and_damage(data, name):
    least, size, says = FILES[name]
    video = VideoSource(data / "malformed" / name)
    frames = list(video)
    assert len(frames) >= least
    assert says is not None or len(frames) == least
    assert {frame.size_hw for frame in frames} == {size}
    times = [frame.time_s for frame in frames]
    assert times[0] == 0 and all(a < b for a, b in itertools.pairwise(times))
    assert (says is None) == (not video.skipped)
    if says:
        assert says in video.skipped[0].reason


@pytest.mark.parametrize("name", ["audio_only.mp4", "random_bytes.mp4", "truncated_moov_last.mp4", "zero_bytes.mp4"])
def test_what_is_no_video_is_refused_in_words(data, name):
    with pytest.raises(ImageError, match=name):
        list(VideoSource(data / "malformed" / name))


def test_rotation_is_applied_the_right_way_round(data):
    import cv2

    path = data / "malformed" / "rotation_90.mp4"
    ours = next(iter(VideoSource(path))).image
    theirs = cv2.VideoCapture(str(path)).read()[1][..., ::-1]
    assert np.abs(ours.astype(int) - theirs).mean() < 3


def test_a_varying_frame_rate_keeps_its_times(data):
    times = np.array([frame.time_s for frame in VideoSource(data / "malformed" / "vfr.mp4")])
    assert np.diff(times).min() == pytest.approx(1 / 24, abs=1e-3)
    assert np.diff(times).max() == pytest.approx(7 / 24, abs=1e-3)


def test_a_folder_of_frames_leaves_out_what_does_not_fit(data):
    video = VideoSource(data / "malformed" / "frames_mixed")
    assert [frame.name for frame in video] == ["1.jpg", "2.jpg", "10.jpg", "13.JPG", "frame_12.jpg"]
    reasons = {skipped.file: skipped.reason for skipped in video.skipped}
    assert "120x67" in reasons["11.jpg"] and "damaged" in reasons["14.jpg"]


def test_a_glob_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(tmp_path / f"f{i}.png")
    frames = list(VideoSource(f"{tmp_path}/f*.png", fps=2))
    assert [frame.name for frame in frames] == ["f1.png", "f2.png", "f10.png"]
    assert [frame.time_s for frame in frames] == [0, 0.5, 1.0]


def test_a_url(clip):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clip.parent))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        video = VideoSource(f"http://127.0.0.1:{server.server_port}/clip.mp4")
        assert grays(video) == list(range(20))
        with pytest.raises(TypeError):
            len(video)
        with pytest.raises(ImageError, match="not a video that can be opened"):
            list(VideoSource(f"http://127.0.0.1:{server.server_port}/nothing.mp4"))
        server.shutdown()


def test_a_huge_frame_is_refused_before_it_is_decoded(clip):
    with pytest.raises(ImageError, match="more than the 1,000 pixels"):
        list(VideoSource(clip, max_pixels=1000))


def test_decoding_is_ahead_but_bounded_and_ends_when_closed():
    made, closed = [], []

    def work():
        try:
            for i in range(1000):
                made.append(i)
                yield i
        finally:
            closed.append(True)

    items = prefetch(work(), 3)
    assert [next(items) for _ in range(5)] == list(range(5))
    items.close()
    assert closed == [True]
    assert len(made) <= 5 + 3 + 2
    assert not [t for t in threading.enumerate() if t.name == "decode"]


def test_an_error_of_the_decoder_arrives():
    def work():
        yield 1
        raise ImageError("broken")

    items = prefetch(work(), 2)
    assert next(items) == 1
    with pytest.raises(ImageError, match="broken"):
        next(items)


def test_pictures_and_videos_of_one_folder(clip, tmp_path):
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.full((20, 20, 3), 9, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "sub" / "b.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    source = AutoSource(tmp_path, stop=3)
    assert len(AutoSource(clip)) == 20
    assert [(frame.name, frame.video) for frame in source] == [
        ("a.png", None),
        ("sub/b.mp4/000000", "sub/b.mp4"),
        ("sub/b.mp4/000001", "sub/b.mp4"),
        ("sub/b.mp4/000002", "sub/b.mp4"),
    ]
    assert [(s.file, "not a video" in s.reason) for s in source.skipped] == [("bad.mp4", True)]
    with pytest.raises(ImageError, match="not a video"):
        list(AutoSource(tmp_path / "bad.mp4"))


def test_an_mp4_keeps_times_and_pads_odd_sizes(tmp_path):
    video = Mp4Writer(tmp_path / "x.mp4")
    times = [1.0, 1.1, 1.5, 1.6]
    for time_s in times:
        video.write(np.full((31, 45, 3), 90, np.uint8), time_s)
    assert not (tmp_path / "x.mp4").exists()
    video.close()
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        got = [float(frame.time) for frame in container.decode(stream)]
        assert (stream.width, stream.height, stream.codec_context.name) == (46, 32, "h264")
        assert got == pytest.approx([0, 0.1, 0.5, 0.6], abs=1e-3)
        assert container.duration / 1e6 == pytest.approx(0.7, abs=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


@pytest.fixture(scope="session")
def loud(tmp_path_factory):
    """A video of 3 s whose sound, a tone, is louder by the second."""
    path = tmp_path_factory.mktemp("sound") / "loud.mp4"
    with av.open(str(path), "w") as out:
        picture = out.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("aac", rate=48000)
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i, np.uint8), format="rgb24")
            out.mux(picture.encode(frame))
        t = np.arange(3 * 48000) / 48000
        tone = (np.sin(2 * np.pi * 440 * t) * np.floor(1 + t) / 4).astype(np.float32)
        for start in range(0, len(tone), 1024):
            piece = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            piece.rate, piece.pts = 48000, start
            out.mux(sound.encode(piece))
        out.mux(picture.encode())
        out.mux(sound.encode())
    return path


def test_sound_is_kept_from_the_first_frame_to_the_last(loud, tmp_path):
    video = Mp4Writer(tmp_path / "x.mp4", sound_from=str(loud))
    for frame in VideoSource(loud, start=10, stop=30):
        video.write(frame.image, frame.time_s)
    video.close()
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(2.0, abs=0.1)
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert len(sound) / 48000 == pytest.approx(2.0, abs=0.1)
    peaks = [np.abs(sound[int(a * 48000) : int(b * 48000)]).max() for a, b in ((0.2, 0.8), (1.2, 1.8))]
    assert peaks[1] / peaks[0] == pytest.approx(0.75 / 0.5, abs=0.15)  # the tone of the second and third second


def test_the_annotated_video_of_a_run_has_the_length_and_sound_of_its_source(loud, tmp_path):
    from fakes import Halves

    from grounded_sam import Pipeline, Vocabulary
    from grounded_sam.sinks.overlay import OverlaySink

    vocabulary = Vocabulary.parse(["a", "b"])
    sink = OverlaySink(tmp_path, vocabulary, sound_from=str(loud.parent))
    Pipeline(Halves()).run(AutoSource(loud.parent), [sink], tmp_path, vocabulary)
    with av.open(str(tmp_path / "overlay" / "loud.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(3.0, abs=0.1)
        assert len(container.streams.audio) == 1
        assert sum(1 for _ in container.decode(video=0)) == 30


def test_a_camera_that_is_not_there_is_named():
    with pytest.raises(ImageError, match="camera 97 cannot be opened"):
        next(iter(VideoSource(97)))

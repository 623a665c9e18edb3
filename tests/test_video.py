"""Video sources: files of many codecs, truncated and damaged ones, folders, globs and URLs."""

from __future__ import annotations

import functools
import http.server
import itertools
import shutil
import threading
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from grounded_sam import ConfigError, ImageError
from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.media.prefetch import Prefetch
from grounded_sam.media.video_pixels import VideoLook, read_look
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.video import VideoSource, open_videos


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Write a video of 20 frames of 48x64 px whose gray level is the frame number."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    video = Mp4Writer(path, crf=5)
    for i in range(20):
        video.write(np.full((48, 64, 3), 10 * i + 20, np.uint8), i / 10)
    video.close()
    return path


def frame_numbers(frames):
    """Return the frame numbers that the gray levels of `clip` encode."""
    return [round((frame.image.mean() - 20) / 10) for frame in frames]


def test_frames_are_in_order_with_numbers_times_and_names(clip):
    video = VideoSource(clip)
    frames = list(video)
    assert len(video) == len(frames) == 20
    assert frame_numbers(frames) == [frame.index for frame in frames] == list(range(20))
    assert [frame.time_s for frame in frames] == pytest.approx([i / 10 for i in range(20)])
    assert frames[3].name == "clip.mp4/000003"
    assert {frame.video for frame in frames} == {"clip.mp4"}


def test_start_stop_stride_and_max_side_select_and_scale_frames(clip):
    video = VideoSource(clip, start=4, stop=15, stride=3, max_side=32)
    frames = list(video)
    assert frame_numbers(frames) == [frame.index for frame in frames] == [4, 7, 10, 13]
    assert len(video) == 4
    assert frames[0].image.shape == (24, 32, 3)
    assert frames[0].time_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "source.stride"),
        ({"start": 5, "stop": 5}, "source.stop"),
        ({"max_side": 2}, "source.max_side"),
        ({"fps": 0}, "source.fps"),
    ],
)
def test_a_setting_out_of_range_gives_an_error_with_its_key(clip, settings, message):
    with pytest.raises(ConfigError, match=message):
        VideoSource(clip, **settings)


def test_an_input_that_is_not_a_video_is_refused(tmp_path):
    for given, message in (
        ("nowhere.mp4", "no such video"),
        ("file:///etc/passwd", "a URL must begin with"),
        (None, "missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            VideoSource(given)
    with pytest.raises(ConfigError, match="no frame in"):
        VideoSource(tmp_path)


#: Number of frames, size and reported problem of every video file of the test data.
FILES = {
    "corrupt_middle.mp4": (20, (240, 426), "truncated or damaged"),
    "hevc_10bit.mp4": (24, (240, 426), None),
    "mjpeg_6fps.avi": (6, (240, 426), None),
    "odd_427x239_yuv444.mp4": (24, (239, 427), None),
    "one_frame.mp4": (1, (240, 426), None),
    "rotation_90.mp4": (48, (426, 240), None),
    "truncated_moov_first.mp4": (20, (240, 426), "27 of 48 frames"),
    "vfr.mp4": (13, (240, 426), None),
    "vp9.webm": (24, (240, 426), None),
}


@pytest.mark.parametrize("name", FILES)
def test_videos_of_all_codecs_and_damaged_ones_are_decoded(data, name):
    minimum, size, message = FILES[name]
    video = VideoSource(data / "malformed" / name)
    frames = list(video)
    assert len(frames) >= minimum
    assert message is not None or len(frames) == minimum
    assert {frame.size_hw for frame in frames} == {size}
    times = [frame.time_s for frame in frames]
    assert times[0] == 0 and all(a < b for a, b in itertools.pairwise(times))
    assert (message is None) == (not video.skipped)
    if message:
        assert message in video.skipped[0].reason


@pytest.mark.parametrize("name", ["audio_only.mp4", "random_bytes.mp4", "truncated_moov_last.mp4", "zero_bytes.mp4"])
def test_a_file_without_a_video_gives_an_error_that_names_it(data, name):
    with pytest.raises(ImageError, match=name):
        list(VideoSource(data / "malformed" / name))


def test_rotation_is_applied_in_the_direction_of_opencv(data):
    import cv2

    path = data / "malformed" / "rotation_90.mp4"
    image = next(iter(VideoSource(path))).image
    expected = cv2.VideoCapture(str(path)).read()[1][..., ::-1]
    assert np.abs(image.astype(int) - expected).mean() < 3


def test_times_of_a_variable_frame_rate_are_kept(data):
    times = np.array([frame.time_s for frame in VideoSource(data / "malformed" / "vfr.mp4")])
    assert np.diff(times).min() == pytest.approx(1 / 24, abs=1e-3)
    assert np.diff(times).max() == pytest.approx(7 / 24, abs=1e-3)


def test_frames_of_another_size_and_damaged_ones_are_left_out(data):
    video = VideoSource(data / "malformed" / "frames_mixed")
    names = ["1.jpg", "2.jpg", "10.jpg", "13.JPG", "frame_12.jpg"]
    assert [frame.name for frame in video] == [f"frames_mixed/{name}" for name in names]
    reasons = {skipped.file.removeprefix("frames_mixed/"): skipped.reason for skipped in video.skipped}
    assert "120x67" in reasons["11.jpg"] and "damaged" in reasons["14.jpg"]


def test_a_glob_of_frames_is_read_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(tmp_path / f"f{i}.png")
    frames = list(VideoSource(f"{tmp_path}/f*.png", fps=2))
    assert [frame.name for frame in frames] == [f"{tmp_path.name}/{name}" for name in ("f1.png", "f2.png", "f10.png")]
    assert [frame.time_s for frame in frames] == [0, 0.5, 1.0]


@pytest.fixture
def clips(tmp_path, clip):
    """Write two folders of frames, an empty one, and a video file beside them."""
    for name, values in (("b2", (3, 4)), ("b10", (7, 8, 9)), ("x/c", (5,))):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i, value in enumerate(values):
            image = Image.new("RGB", (20, 20), (value,) * 3)
            image.save(tmp_path / "clips" / name / f"{i:03d}.png")
    (tmp_path / "clips" / "empty").mkdir()
    shutil.copy(clip, tmp_path / "clips" / "a.mp4")
    return tmp_path / "clips"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {"a.mp4": 20, "b2": 2, "b10": 3, "x/c": 1}),
        ("b*", {"b2": 2, "b10": 3}),
        ("*", {"a.mp4": 20, "b2": 2, "b10": 3}),
        ("b*/*1.png", {"b2": 1, "b10": 1}),
        ("**/*.png", {"b2": 2, "b10": 3, "x/c": 1}),
        ("x/*", {"c": 1}),
        ("x", {"c": 1}),
        ("b2", {"b2": 2}),
        ("b2/*.png", {"b2": 2}),
    ],
)
def test_folders_of_frames_are_a_video_each(clips, given, expected):
    source = open_videos(f"{clips}/{given}".rstrip("/"))
    frames = list(source)
    assert Counter(frame.video for frame in frames) == expected
    assert list(dict.fromkeys(frame.video for frame in frames)) == list(expected)
    assert all(frame.name.startswith(f"{frame.video}/") for frame in frames) and len(source) == len(frames)
    assert [frame.index for frame in frames if frame.video == "b10"] == list(range(expected.get("b10", 0)))


def test_one_bad_folder_of_frames_does_not_stop_the_others(clips):
    (clips / "b2" / "000.png").write_bytes(b"bad")
    (clips / "b2" / "001.png").write_bytes(b"bad")
    source = open_videos(clips)
    assert {frame.video for frame in source} == {"a.mp4", "b10", "x/c"}
    assert {skipped.file for skipped in source.skipped} == {"b2/000.png", "b2/001.png"}


def test_folders_beside_frames_are_named(clips):
    Image.new("RGB", (20, 20)).save(clips / "0.png")
    source = open_videos(clips)
    assert [frame.name for frame in source] == ["clips/0.png"]
    assert "b10" in {skipped.file for skipped in source.skipped}
    (clips / "0.png").unlink()
    with pytest.raises(ConfigError, match="no frame in .*clips itself, but in .*b2; give one such folder"):
        VideoSource(clips)
    with pytest.raises(ConfigError, match="no frame and no video in"):
        open_videos(clips / "empty")


def test_a_video_is_read_from_a_url(clip):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clip.parent))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        video = VideoSource(f"http://127.0.0.1:{server.server_port}/clip.mp4")
        assert frame_numbers(video) == list(range(20))
        with pytest.raises(TypeError):
            len(video)
        with pytest.raises(ImageError, match="cannot be opened as a video"):
            list(VideoSource(f"http://127.0.0.1:{server.server_port}/nothing.mp4"))
        server.shutdown()


def test_a_huge_frame_is_refused_before_it_is_decoded(clip):
    with pytest.raises(ImageError, match="more than the 1,000 pixels"):
        list(VideoSource(clip, max_pixels=1000))


def test_prefetching_is_bounded_and_stops_when_closed():
    produced, closed = [], []

    def produce():
        try:
            for i in range(1000):
                produced.append(i)
                yield i
        finally:
            closed.append(True)

    items = Prefetch(produce(), 3)
    assert [next(items) for _ in range(5)] == list(range(5))
    items.close()
    assert closed == [True]
    assert len(produced) <= 5 + 3 + 2
    assert not [t for t in threading.enumerate() if t.name == "decode"]


def test_an_error_of_the_decoding_thread_is_raised():
    def produce():
        yield 1
        raise ImageError("broken")

    items = Prefetch(produce(), 2)
    assert next(items) == 1
    with pytest.raises(ImageError, match="broken"):
        next(items)


def test_images_and_videos_of_a_folder_are_read_together(clip, tmp_path):
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
    assert [(s.file, "cannot be opened as a video" in s.reason) for s in source.skipped] == [("bad.mp4", True)]
    with pytest.raises(ImageError, match="cannot be opened as a video"):
        list(AutoSource(tmp_path / "bad.mp4"))


def test_a_written_mp4_has_the_times_and_odd_sizes_are_padded(tmp_path):
    video = Mp4Writer(tmp_path / "x.mp4")
    times = [1.0, 1.1, 1.5, 1.6]
    for time_s in times:
        video.write(np.full((31, 45, 3), 90, np.uint8), time_s)
    assert not (tmp_path / "x.mp4").exists()
    video.close()
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        written = [float(frame.time) for frame in container.decode(stream)]
        assert (stream.width, stream.height, stream.codec_context.name) == (46, 32, "h264")
        assert written == pytest.approx([0, 0.1, 0.5, 0.6], abs=1e-3)
        assert container.duration / 1e6 == pytest.approx(0.7, abs=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


@pytest.fixture(scope="session")
def loud(tmp_path_factory):
    """Write a video of 3 s with a tone that gets louder every second."""
    path = tmp_path_factory.mktemp("sound") / "loud.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("aac", rate=48000)
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i, np.uint8), format="rgb24")
            out.mux(video.encode(frame))
        t = np.arange(3 * 48000) / 48000
        tone = (np.sin(2 * np.pi * 440 * t) * np.floor(1 + t) / 4).astype(np.float32)
        for start in range(0, len(tone), 1024):
            chunk = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            chunk.rate, chunk.pts = 48000, start
            out.mux(sound.encode(chunk))
        out.mux(video.encode())
        out.mux(sound.encode())
    return path


def test_the_sound_between_the_first_and_last_frame_is_copied(loud, tmp_path):
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


def test_an_annotated_video_has_the_length_and_sound_of_its_source(loud, tmp_path):
    from fakes import Halves

    from grounded_sam import Pipeline, Vocabulary
    from grounded_sam.sinks.overlay import OverlaySink

    vocabulary = Vocabulary.parse(["a", "b"])
    sink = OverlaySink(tmp_path, vocabulary, sound_from=str(loud.parent))
    Runner(Pipeline(Halves(), vocabulary=vocabulary), AutoSource(loud.parent), [sink], tmp_path).run()
    with av.open(str(tmp_path / "overlay" / "loud.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(3.0, abs=0.1)
        assert len(container.streams.audio) == 1
        assert sum(1 for _ in container.decode(video=0)) == 30


def test_a_missing_camera_gives_an_error_with_its_index():
    with pytest.raises(ImageError, match="camera 97 cannot be opened"):
        next(iter(VideoSource(97)))


def moving(count=30, size_wh=(64, 48)):
    """Return frames with a red square in the upper left quarter, which moves to the right."""
    frames = np.full((count, size_wh[1], size_wh[0], 3), 128, np.uint8)
    for i, frame in enumerate(frames):
        frame[4:16, 4 + i % 16 : 16 + i % 16] = (220, 40, 40)
    return frames


def write_clip(path, codec="libx264", frames=None, pix_fmt="yuv420p", sound=None, metadata=(), **settings):
    """Write a video at 25 frames per second; `settings` are those of the codec context."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        frames = moving() if frames is None else frames
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], pix_fmt
        stream.metadata.update(metadata)
        for key, value in settings.items():
            setattr(stream.codec_context, key, value)
        audio = None if sound is None else out.add_stream(sound, rate=8000, layout="mono")
        for image in frames:
            layout = "rgba" if image.shape[2] == 4 else "rgb24"
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=layout)))
        out.mux(stream.encode())
        if audio is not None:
            tone = (np.sin(np.arange(8000 * len(frames) // 25) / 3) * 9000).astype(np.int16)
            samples = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            samples.rate, samples.pts = 8000, 0
            resampler = av.AudioResampler(audio.codec_context.format, "mono", 8000, audio.codec_context.frame_size or 0)
            for part in [*resampler.resample(samples), *resampler.resample(None), None]:
                out.mux(audio.encode(part))
    return path


CONTAINERS = [
    ("mts", "libx264"), ("m2ts", "libx264"), ("ts", "libx264"), ("3gp", "libx264"), ("flv", "libx264"),
    ("wmv", "wmv2"), ("vob", "mpeg2video"), ("mxf", "mpeg2video"), ("mkv", "libx264"), ("webm", "libvpx-vp9"),
    ("avi", "libx264"), ("mov", "libx264"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_videos_of_all_suffixes_are_found_whole_with_times_that_rise(tmp_path, suffix, codec):
    clip = write_clip(tmp_path / f"a.{suffix}", codec)
    source = AutoSource(tmp_path)
    frames = list(source)
    assert [frame.name for frame in frames] == [f"a.{suffix}/{i:06d}" for i in range(30)]
    assert [frame.time_s for frame in frames] == pytest.approx([i / 25 for i in range(30)], abs=0.002)
    assert source.skipped == [], clip


@pytest.mark.parametrize(("suffix", "codec"), [c for c in CONTAINERS if c[0] in {"mkv", "webm", "ts", "m2ts", "wmv"}])
@pytest.mark.parametrize("percent", [40, 70, 93])
def test_files_cut_short_are_named(tmp_path, suffix, codec, percent):
    path = write_clip(tmp_path / f"a.{suffix}", codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * percent // 100])
    source = AutoSource(path)
    try:
        list(source)
    except ImageError:  # not a single frame is left
        return
    assert [(s.file, "truncated or damaged" in s.reason) for s in source.skipped] == [(f"a.{suffix}", True)]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "metadata"),
    [
        ("a.mov", "prores_ks", "yuva444p10le", {}),
        ("a.mov", "qtrle", "argb", {}),
        ("a.mkv", "ffv1", "bgra", {}),
        ("a.webm", "libvpx-vp9", "yuva420p", {"alpha_mode": "1"}),
    ],
)
def test_transparent_videos_are_composited_over_white(tmp_path, name, codec, pix_fmt, metadata):
    rgba = np.dstack([moving(1)[0], np.full((48, 64), 255, np.uint8)])
    rgba[:, 40:, 3] = 0
    write_clip(tmp_path / name, codec, [rgba] * 3, pix_fmt, metadata=metadata)
    image = next(iter(VideoSource(tmp_path / name))).image.astype(int)
    assert np.abs(image[:, 46:] - 255).max() < 6
    assert np.abs(image[24:, :34] - 128).max() < 6


def test_the_display_matrix_turns_and_mirrors_as_ffmpeg_does():
    from grounded_sam.media.video_pixels import turn_upright

    image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    for quarter in range(4):  # counter-clockwise
        angle = np.deg2rad(90 * quarter)
        turn = np.round([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]).astype(int)
        assert np.array_equal(turn_upright(image, turn), np.rot90(image, quarter))
        mirrored = np.array([[-1, 0], [0, 1]]) @ turn
        assert np.array_equal(turn_upright(image, mirrored), np.rot90(image, quarter)[:, ::-1])


def annotate(path, output):
    """Annotate a video with nothing on it; return its stream and the summary of the run."""
    from fakes import Halves

    from grounded_sam import Pipeline, Vocabulary
    from grounded_sam.sinks.overlay import OverlaySink

    vocabulary = Vocabulary.parse(["a", "b"])
    sink = OverlaySink(output, vocabulary, masks=False, boxes=False, labels=False, sound_from="input", crf=5)
    summary = Runner(Pipeline(Halves(), vocabulary=vocabulary), AutoSource(path), [sink], output).run()
    return sorted((output / "overlay").rglob("*.mp4")), summary


@pytest.mark.parametrize(
    "look",
    [
        VideoLook(None, matrix=1, primaries=1, transfer=1),
        VideoLook(Fraction(64, 45), matrix=6, primaries=6, transfer=6),
        VideoLook(None, matrix=9, primaries=9, transfer=1, is_full_range=True),
        VideoLook(None, matrix=2, primaries=2, transfer=2),
    ],
)
def test_annotated_videos_look_as_their_source(tmp_path, look):
    source, copy = tmp_path / "a.mp4", tmp_path / "copy.mp4"
    settings = {
        "colorspace": look.matrix, "color_primaries": look.primaries, "color_trc": look.transfer,
        "color_range": 2 if look.is_full_range else 1,
    }  # fmt: skip
    if look.pixel_aspect:
        settings["sample_aspect_ratio"] = look.pixel_aspect
    write_clip(source, frames=moving(5), pix_fmt="yuv444p", **settings)
    assert read_look(source) == look
    video = Mp4Writer(copy, look=look, crf=5)
    frames = [frame.image.astype(int) for frame in VideoSource(source)]
    for i, frame in enumerate(frames):
        video.write(frame.astype(np.uint8), i / 25)
    video.close()
    assert read_look(copy) == look
    written = next(iter(VideoSource(copy))).image.astype(int)
    assert np.abs(written - frames[0])[20:].max() <= 4  # below the square, where chroma is constant


@pytest.mark.parametrize(
    ("name", "sound"),
    [("a.avi", "pcm_alaw"), ("a.mov", "pcm_s16le"), ("a.mkv", "libopus"), ("a.mkv", "aac"), ("a.mkv", "flac")],
)
def test_sound_of_all_codecs_is_in_the_annotated_video(tmp_path, name, sound):
    clip = write_clip(tmp_path / "in" / name if (tmp_path / "in").mkdir() is None else None, sound=sound)
    (tmp_path / "list.txt").write_text(f"in/{name}\n")
    for i, given in enumerate([clip, clip.parent, f"{clip.parent}/*", tmp_path / "list.txt"]):
        (video,), summary = annotate(given, tmp_path / f"out{i}")
        with av.open(str(video)) as container:
            seconds = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
        assert seconds == pytest.approx(1.2, abs=0.15)
        assert summary.skipped == []


def test_sound_that_is_missing_is_named(tmp_path):
    from grounded_sam import Vocabulary
    from grounded_sam.sinks.overlay import OverlaySink

    vocabulary = Vocabulary.parse(["a"])
    with pytest.raises(ConfigError, match="no such file or folder; input takes"):
        OverlaySink(tmp_path, vocabulary, sound_from=str(tmp_path / "nothing"))
    (tmp_path / "sounds").mkdir()
    reasons = []
    video = Mp4Writer(tmp_path / "x.mp4", sound_from=str(tmp_path / "bad.mp4"), report=reasons.append)
    assert not reasons  # there is no such file
    video.close()
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    Mp4Writer(tmp_path / "x.mp4", sound_from=str(tmp_path / "bad.mp4"), report=reasons.append).close()
    assert len(reasons) == 1 and "sink.overlay.sound_from=FILE" in reasons[0]


def test_a_text_that_is_not_utf8_and_a_codec_without_decoder_end_no_run(tmp_path):
    path = write_clip(tmp_path / "a.mkv", frames=moving(3), metadata={"title": "TITLE"})
    path.write_bytes(path.read_bytes().replace(b"TITLE", b"\xff\xfe\xff\xfe\xff"))
    assert len(list(VideoSource(path))) == 3
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XXX"))
    with pytest.raises(ImageError, match="no decoder for its codec"):
        list(VideoSource(path))

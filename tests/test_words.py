"""The words of a command line: each is checked by itself, and the advice for one that cannot be read works."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from grounded_sam import CheckpointError, ConfigError, GroundedSamError, Vocabulary, read_image
from grounded_sam.config.build import load
from grounded_sam.config.compose import compose
from grounded_sam.config.words import FLAGS, SYNONYMS, quote_word, read_words
from grounded_sam.detectors.clicks import ClickDetector
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.store import find_store
from grounded_sam.media.files import find_files
from grounded_sam.sources.video import VideoSource as Video
from grounded_sam.weights.loading import BUILTIN_DIR

CLIP = BUILTIN_DIR.parent / "examples" / "demo" / "clip.mp4"


def obey(words: list[str]) -> list[str]:
    """Return the words that the message for some words says to write; fail if there is no error or no advice."""
    with pytest.raises(ConfigError) as error:
        read_words(words)
    message = str(error.value)
    assert "\n" not in message
    advice = re.search(r"(?:write|for the shell,) ([\"']?[\w.]+=.*)", message)
    assert advice, message
    return shlex.split(advice[1])


def value_of(words: list[str]):
    """Return the value that the only word sets, which must be readable."""
    (word,) = read_words(words)
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["input=a (1).jpg"], "input", "a (1).jpg"),
        (["input=epoch=1-step=2.mp4"], "input", "epoch=1-step=2.mp4"),
        (["input=[1].png"], "input", "[1].png"),
        (["input=a#b.png"], "input", "a#b.png"),
        (["input=a,b.jpg"], "input", "a,b.jpg"),
        (["input=it's here.jpg"], "input", "it's here.jpg"),
        (["input=C:\\my dir\\(1)\\"], "input", "C:\\my dir\\(1)\\"),
        (["input=2024_01_05"], "input", "2024_01_05"),
        (["output=1e3"], "output", "1e3"),
        (["text=true"], "text", "true"),
        (["text=[driver's license, green star]"], "text", ["driver's license", "green star"]),
        (["text=[#1 bolt, nut]"], "text", ["#1 bolt", "nut"]),
        (["text=[a, b"], "text", ["a", "b"]),
        (["text=[a, b]]"], "text", ["a", "b"]),
        (["text={vehicle: [car, driver's bus]}"], "text", {"vehicle": ["car", "driver's bus"]}),
        (["text=car, wheel"], "text", "car, wheel"),
        (["text=[red", "car,", "blue", "bus]"], "text", ["red car", "blue bus"]),
        (["text=red", "car"], "text", "red car"),
        (["input=my", "photo.jpg"], "input", "my photo.jpg"),
        (["clip.mp4"], "input", "clip.mp4"),
        (["my (1) clip.mp4", "text=car"], "input", "my (1) clip.mp4"),
        (["rtsp://camera/live"], "input", "rtsp://camera/live"),
        (["~/photos/a.jpg"], "input", "~/photos/a.jpg"),
        (["red", "car"], "text", "red car"),
        (["--text=[car, wheel]"], "text", ["car", "wheel"]),
        (["--input", "clip.mp4", "--text", "car"], "input", "clip.mp4"),
        (["-i", "clip.mp4"], "input", "clip.mp4"),
        (["--box-threshold", "0.3"], "select.score", 0.3),
        (["select.score", "=", "0.3"], "select.score", 0.3),
        (["select.score = 0.3"], "select.score", 0.3),
    ],
)
def test_the_advice_for_a_word_that_cannot_be_read_works(words, key, value):
    written = obey(words)
    assert written[0].partition("=")[0] == key
    assert value_of(written) == value


def test_a_home_folder_that_cannot_be():
    assert Vocabulary.parse("~\0 a").classes == ("~\0 a",)


@pytest.mark.parametrize("url", ["http://x.y/z?a=1&b=$2", "rtsp://a:b=c@host/live", "https://x.y/z?t=a,b"])
def test_urls_are_read_as_they_are(url):
    assert value_of([f"input={url}"]) == url


@given(st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=12))
@example("a\\'b")
@example("{a: b")
@example("'a' b")
def test_any_path_can_be_written(path):
    """A path is read as it is, without quotes around it and escapes, or refused with a word that gives it."""
    word = f"input={path}"
    try:
        read_words([word])
        value = value_of([word])
    except ConfigError:
        value = value_of(obey([word]))
    if isinstance(value, str):  # rather than a number, null, a list or a mapping
        unescaped = re.sub(r"\\([^\w'\"])", r"\1", path)
        as_given = (path.strip(), path.strip().strip("'\""), unescaped.strip(), unescaped)
        assert value in as_given or path.strip()[:1] in ("'", '"', "[", "{")


@given(st.text(min_size=1).filter(lambda text: "\0" not in text))
def test_the_shell_reads_a_quoted_word_as_it_is(word):
    assert shlex.split(quote_word(word)) == [word]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["input=x", "text=[driver's license]", "output=o"], 'cannot read "text=[driver\'s license]"'),
        (["select.score=0.2,0.3"], "select.score=0.2,0.3 has several values; for a job with each of them add -m"),
        (["select.score=range(0,3)"], "for a job with each of them add -m"),
        (["text={car: a, dog: b, car: c}"], "text has the key 'car' twice"),
        (["input=a.jpg", "b.jpg"], "one input; for several paths, write them into a .txt file"),
        (["a.jpg", "b.jpg"], "one input; for several paths"),
        (["input=[a.jpg, b.jpg]"], "input takes one path, got a list"),
        (["--multrun"], "unknown flag '--multrun'; did you mean --multirun?"),
        (["--verbose"], "unknown flag '--verbose': settings are written key=value, without dashes; --help shows"),
    ],
)
def test_a_word_that_cannot_be_read_is_named(words, message):
    with pytest.raises(ConfigError) as error:
        read_words(words)
    assert message in str(error.value) and "a b.jpg" not in str(error.value)


def test_words_that_hydra_reads_stay_as_they_are():
    words = ["-m", "--config-dir", "my", "select.score=0.2,0.3", "~text", "+a=1", "--cfg", "job", "source@x=images"]
    assert read_words(words) == words


def test_the_home_folder_is_found_in_folders_that_hydra_makes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert read_words(["output='~/my out'", "text='~'"]) == ["output='/home/somebody/my out'", "text='~'"]
    assert read_words(["hydra.run.dir='~'"]) == ["hydra.run.dir='/home/somebody'"]
    assert read_words(["output='~nobody at all/x'"]) == ["output='~nobody at all/x'"]


def test_the_flags_are_those_of_hydra():
    options = {}
    for action in get_args_parser()._actions:
        options |= dict.fromkeys(action.option_strings, action.nargs != 0)
    assert options.pop("-i")  # short for --info, which is refused because it looks like an input
    assert options == FLAGS


@pytest.mark.parametrize("name", ["score", "threshold", "conf", "iou", "model", "classes", "prompt", "gpu", "batch"])
@pytest.mark.parametrize("form", ["{}", "detector.{}"])
def test_keys_of_other_tools_lead_to_those_of_this_one(name, form):
    with pytest.raises(ConfigError, match=f"did you mean '{SYNONYMS[name]}'") as error:
        compose([f"{form.format(name)}=1"])
    assert "\n" not in str(error.value)


def test_keys_are_found_in_the_group_that_they_are_in():
    for word, meant in [("top_k=3", "'select.top_k'"), ("stride=2", "'source.stride'")]:
        with pytest.raises(ConfigError, match=rf"did you mean {meant}\?"):
            compose([word])
    with pytest.raises(ConfigError, match=r"did you mean 'detector.checkpoint'"):
        compose(["checkpoint=x"])


def test_every_synonym_is_a_key():
    cfg = compose([])
    for name, key in SYNONYMS.items():
        assert OmegaConf.select(cfg, key, default="missing") != "missing" or key in ("input", "text", "truth"), key
        assert name not in cfg
    assert {"input", "text", "truth"} <= set(cfg)


def test_home_folders_are_found_and_other_tildes_are_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "~b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert len(find_files("~/a.png").images) == len(find_files("~/*.png").images[:1]) == 1
    assert read_image("~/a.png").shape == (4, 6, 3)
    monkeypatch.chdir(tmp_path)
    assert len(find_files("~b.png").images) == 1
    for use in (find_files, read_ground_truth, Video, ClickDetector, find_store):
        with pytest.raises(GroundedSamError):
            use("~nobody by this name/a.json")


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30:05.mp4").write_bytes(CLIP.read_bytes())
    assert next(iter(Video("12:30:05.mp4", stop=1))).name == "12:30:05.mp4/000000"


@pytest.mark.parametrize(
    ("line", "name"),
    [("#1.png", "#1.png"), ('"c d.png"', "c d.png"), ("sub\\b.png", "sub/b.png")],
)
def test_lists_of_paths_name_files_in_the_ways_of_other_tools(line, name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text(f"\ufeff# a comment\n{line}\n#\n", encoding="utf-8")
    assert find_files(str(tmp_path / "list.txt")).images == [tmp_path / name]


def test_missing_weights_name_a_key_that_exists():
    with pytest.raises(CheckpointError, match=r"give a local copy with detector\.checkpoint=PATH") as error:
        load("detector.checkpoint=nobody/nothing", preset="shapes", segmenter="none")
    key = re.search(r"with (\S+)=PATH", str(error.value))[1]
    assert compose([f"{key}=builtin:shapes"]).detector.checkpoint == "builtin:shapes"

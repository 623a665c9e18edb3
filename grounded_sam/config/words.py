"""Check the words of a command line one by one, and say how to write those that cannot be read."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from grounded_sam.errors import ConfigError

#: Hydra's flags, and whether the next word is their value. `-i`, short for `--info`, is more likely to mean `input`.
FLAGS = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"), False),
    **dict.fromkeys(("--multirun", "-m", "--shell-completion", "-sc"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"), True),
    **dict.fromkeys(("--config-dir", "-cd", "--experimental-rerun", "--info"), True),
}
#: Keys that other tools have, and keys of this one that do the same.
SYNONYMS = {
    **dict.fromkeys(("score", "confidence", "conf", "threshold", "thresh", "box_threshold"), "select.score"),
    **dict.fromkeys(("text_threshold", "confidence_threshold", "score_threshold", "conf_thres"), "select.score"),
    **dict.fromkeys(("iou", "nms_threshold", "nms_iou", "iou_threshold", "iou_thres"), "select.nms"),
    **dict.fromkeys(("classes", "class", "labels", "label", "names", "prompt", "prompts", "t"), "text"),
    **dict.fromkeys(("text_prompt", "caption", "phrases", "query", "queries"), "text"),
    **dict.fromkeys(("image", "images", "video", "source_path", "path", "file", "folder", "img", "i"), "input"),
    **dict.fromkeys(("out", "out_dir", "output_dir", "save_dir", "project", "o"), "output"),
    **dict.fromkeys(("gpu", "cuda", "cpu"), "device"),
    **dict.fromkeys(("batch", "bs"), "detector.batch_size"),
    **dict.fromkeys(("imgsz", "img_size", "image_size", "resize"), "source.max_side"),
    **dict.fromkeys(("max_det", "max_detections", "limit"), "select.top_k"),
    **dict.fromkeys(("half", "fp16", "dtype", "amp"), "precision"),
    **dict.fromkeys(("gt", "ground_truth", "annotations"), "truth"),
    **dict.fromkeys(("model", "model_name", "architecture"), "detector"),
    **dict.fromkeys(("weights", "ckpt"), "detector.checkpoint"),
    **dict.fromkeys(("format", "export", "save"), "sink"),
}
#: Keys whose value is one path.
_PATH_KEYS = {"input", "output", "truth"}
_SEVERAL_PATHS = "for several paths, write them into a .txt file, one per line, and input=FILE.txt"
#: Folders that Hydra makes itself.
_FOLDER_KEYS = {"output", "hydra.run.dir", "hydra.sweep.dir"}


def read_words(words: Sequence[str]) -> list[str]:
    """Check the words of a command line, flags and overrides, and replace `~` in the folders that Hydra makes.

    Args:
        words: The words after the name of the command.

    Raises:
        ConfigError: If a word cannot be read; the message names it, and says how to write it.

    >>> read_words(["-m", "select.score=0.2,0.3", "--cfg", "job"])
    ['-m', 'select.score=0.2,0.3', '--cfg', 'job']
    """
    words = list(words)
    overrides = []  # their positions
    is_value = False
    for i, word in enumerate(words):
        name = word.partition("=")[0]
        if not is_value and word.startswith("-") and name not in FLAGS:
            raise ConfigError(_unknown_flag(word, words[i + 1 : i + 2]))
        if is_value and "=" not in word:
            is_value, words[i] = False, os.path.expanduser(word)
        elif word.startswith("-"):
            is_value = FLAGS[name] and name == word
            if FLAGS[name] and not is_value:
                words[i] = f"{name}={os.path.expanduser(word[len(name) + 1 :])}"
        else:
            is_value = False
            overrides.append(i)
    for i in overrides:
        words[i] = _with_quoted_url(words[i])
    is_sweep = bool({"-m", "--multirun"} & set(words))
    check_overrides([words[i] for i in overrides], is_sweep)
    for i in overrides:
        words[i] = _with_home(words[i])
    return words


def check_overrides(overrides: Sequence[str], is_sweep: bool = False) -> None:
    """Check overrides one by one.

    Args:
        overrides: `key=value`, or another form of Hydra's.
        is_sweep: Whether a value may be several, `a,b`, each for a job of its own.

    Raises:
        ConfigError: If one cannot be read; the message names it, and says how to write it.

    >>> check_overrides(["select.score=0.2", "text=[car, wheel]"])
    >>> check_overrides(["text=[driver's license]"])
    Traceback (most recent call last):
    grounded_sam.errors.ConfigError: cannot read "text=[driver's license]": quote ... "text=['driver\\'s license']"
    """
    for i, word in enumerate(overrides):
        if "=" not in word and not re.fullmatch(r"~[\w@.]+", word):
            raise ConfigError(_without_key(overrides, i))
        parsed = _parse(word)
        if parsed is None:
            whole = " ".join([word, *_until_key(overrides[i + 1 :])])
            raise ConfigError(f"cannot read {_shown(word)}: {_how_to_write(whole)}")
        if parsed.is_sweep_override():
            if not is_sweep:
                raise ConfigError(_several_values(word))
            continue
        value, (key, _, raw) = parsed.value(), word.partition("=")
        if key in _PATH_KEYS - {"truth"} and isinstance(value, list):
            raise ConfigError(f"{word}: {key} takes one path, got a list; {_SEVERAL_PATHS}")
        if key in {*_PATH_KEYS, "text"} and isinstance(value, bool | int | float) and str(value) != raw.strip():
            kind = "true or false" if isinstance(value, bool) else f"the number {value}"
            raise ConfigError(f"{word} would be read as {kind}: {_how_to_write(word)}")
        if raw.startswith("{"):
            _check_keys_are_unique(raw, key)


def _until_key(words: Sequence[str]) -> Iterator[str]:
    """Yield the words up to the first one of the form `key=value`."""
    for word in words:
        if re.match(r"[+~]*[\w.@/]+=", word):
            return
        yield word


@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _parse(word: str) -> Any:
    """Parse an override as Hydra does; None if it cannot be parsed."""
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(word)
    except HydraException:
        return None


def _check_keys_are_unique(raw: str, key: str) -> None:
    """Check that a mapping has no key twice, of which Hydra would keep the last."""
    import yaml

    try:
        node = yaml.compose(raw, yaml.BaseLoader)
    except yaml.YAMLError:  # Hydra's grammar is another one
        return
    names = [name.value for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{key} has the key {twice!r} twice; put both values under one: {{{twice}: [a, b]}}")


def _unknown_flag(word: str, following: Sequence[str]) -> str:
    """Return the message for a flag that there is not."""
    name, equals, value = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if not equals and following and "=" not in following[0] and not following[0].startswith("-"):
        equals, value = "=", following[0]
    close = difflib.get_close_matches(name, FLAGS, 1, 0.8) if name.startswith("--") and not equals else []
    if close:
        return f"unknown flag {_shown(name)}; did you mean {close[0]}?"
    example = f"write {quote_word(override_for(SYNONYMS.get(key, key), value))}" if equals else "--help shows examples"
    return f"unknown flag {_shown(name)}: settings are written key=value, without dashes; {example}"


def _without_key(overrides: Sequence[str], i: int) -> str:
    """Return the message for the word at position `i`, which is not `key=value`."""
    word = overrides[i]
    start = f"cannot read {_shown(word)}: expected key=value"
    bare = [word, *_until_key(overrides[i + 1 :])]
    before = overrides[i - 1] if i else ""
    spaced = re.fullmatch(r"([\w.]+)\s*=\s*(.*)", " ".join(overrides[i : i + 3]))
    if spaced and "=" not in word and len(overrides) > i + 1 and overrides[i + 1].startswith("="):
        return f"{start} without spaces; write {quote_word(override_for(spaced[1], spaced[2].split(' ')[0]))}"
    paths = [name for name in bare if _is_path(name)]
    if "=" in before and not (paths and _is_path(before.partition("=")[2])):
        key, _, value = before.partition("=")
        joined = " ".join([value, *bare])
        return f"{start}; if it belongs to {key}, {_how_to_write(f'{key}={joined}')}"
    if len(paths) > 1 or (paths and any(other.startswith("input=") for other in overrides)):
        return f"{start}, and one input; {_SEVERAL_PATHS}"
    if paths:
        return f"{start}; write {quote_word(override_for('input', word))}"
    return f"{start}; for a class to look for, write {quote_word(override_for('text', ' '.join(bare)))}"


def _is_path(word: str) -> bool:
    """Return whether a word looks like an input."""
    from grounded_sam.media.files import is_media_name

    return os.path.exists(os.path.expanduser(word)) or "://" in word or is_media_name(word)


def _several_values(word: str) -> str:
    """Return the message for an override with several values outside of a sweep."""
    raw = word.partition("=")[2]
    start = f"{word} has several values; for a job with each of them add -m"
    numbers = re.fullmatch(r"[\d.,\seE+-]*", raw)
    return start if numbers or re.match(r"\w+\(", raw) else f"{start}, for one value {_how_to_write(word)}"


def _how_to_write(word: str) -> str:
    """Say how to write an override that Hydra reads differently or not at all."""
    key, _, value = word.partition("=")
    written = override_for(key, value)
    if _parse(written) is None:
        return "it is not in the grammar of overrides, see https://hydra.cc/docs/advanced/override_grammar/basic"
    if written.count("'") == word.count("'"):
        return f"write {quote_word(written)}"
    return f"quote the value inside quotes for the shell, {quote_word(written)}"


def override_for(key: str, value: str) -> str:
    """Return an override that sets a key to what a value says, quoted where Hydra's grammar needs it.

    Args:
        key: The key.
        value: What was typed. Where it is a list or mapping, only the items in it are quoted.

    >>> override_for("input", "a (1).png"), override_for("text", "[#1 bolt, nut]"), override_for("text", "['a', b]")
    ("input='a (1).png'", "text=['#1 bolt',nut]", "text=['a', b]")
    """
    key, value = key.strip(), value.strip()
    plain = f"{key}={value}"
    if _reads_as(plain, value) or (value[:1] in ("[", "{", "'", '"') and _parse(plain) is not None):
        return plain
    for items in _items(value) if value[:1] in ("[", "{") and key not in _PATH_KEYS else ():
        override = f"{key}={_flow(items)}"
        if _parse(override) is not None:
            return override
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1].replace(f"\\{value[0]}", value[0])
    return f"{key}={quoted(value)}"


def _reads_as(override: str, value: str) -> bool:
    """Return whether an override gives one value, which is written as it was typed."""
    parsed = _parse(override)
    return parsed is not None and not parsed.is_sweep_override() and str(parsed.value()) == value


def _items(value: str) -> Iterator[Any]:
    """Yield what the text of a list or mapping may mean."""
    import yaml

    closing = {"[": "]", "{": "}"}[value[0]]
    complete = value if value.endswith(closing) else value + closing
    with suppress(yaml.YAMLError):
        yield yaml.load(complete, Loader=yaml.BaseLoader)
    if closing == "]":
        yield [item for part in complete[1:-1].split(",") if (item := _without_lone_brackets(part.strip()))]


def _without_lone_brackets(item: str) -> str:
    """Remove a bracket at an end of an item that has no partner in it."""
    item = item[1:] if item.startswith("[") and item.count("[") > item.count("]") else item
    return item[:-1] if item.endswith("]") and item.count("]") > item.count("[") else item


def _flow(value: Any) -> str:
    """Write strings, lists and mappings of them in Hydra's grammar, and quote the strings that need it."""
    if isinstance(value, list):
        return f"[{','.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{escape_key(str(key))}:{_flow(item)}' for key, item in value.items())}}}"
    parsed = _parse(f"x=[{value}]")
    is_plain = parsed is not None and [str(item) for item in parsed.value()] == [value]
    return str(value) if is_plain else quoted(str(value))


def escape_key(key: str) -> str:
    """Write a key of a mapping in Hydra's grammar, which does not allow quotes around keys."""
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key)


def quoted(text: str) -> str:
    """Write a string in Hydra's grammar, where a backslash escapes only in front of a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def quote_word(word: str) -> str:
    """Quote a word for the shell, in the form that is easiest to read.

    >>> print(quote_word("input=a.png"), quote_word("text=[a, b]"), quote_word("input='a b'"))
    input=a.png 'text=[a, b]' "input='a b'"
    """
    if "'" not in word:
        return shlex.quote(word)
    plain_in_double_quotes = not re.search(r'["$`!]|\\\\|\\$', word)
    return f'"{word}"' if plain_in_double_quotes else shlex.quote(word)


def _shown(word: str) -> str:
    """Return a word in quotes, for a message."""
    return f'"{word}"' if "'" in word else f"'{word}'"


def _with_quoted_url(word: str) -> str:
    """Quote a URL that Hydra cannot read as it is, such as one with a query."""
    match = re.fullmatch(r"([\w.]+)=([A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+)", word)
    return word if match is None or _parse(word) is not None else f"{match[1]}={quoted(match[2])}"


def _with_home(word: str) -> str:
    """Replace `~` in an override of a folder that Hydra makes."""
    key, _, _ = word.partition("=")
    if key.lstrip("+") not in _FOLDER_KEYS:
        return word
    parsed = _parse(word)
    value = None if parsed is None or parsed.is_sweep_override() else parsed.value()
    if not isinstance(value, str) or not value.startswith("~"):
        return word
    return f"{key}={quoted(os.path.expanduser(value))}"

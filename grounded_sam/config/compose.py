"""Compose a config from overrides, and explain what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grounded_sam.config.hydra import conf_dir
from grounded_sam.config.secrets import VARIABLE
from grounded_sam.config.words import SYNONYMS, check_overrides, escape_key, quoted
from grounded_sam.errors import ConfigError
from grounded_sam.formats.store_migrations import GROUP_KEYS, STAGE_KEYS
from grounded_sam.hydra_state import preserve_hydra_state

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: Config groups, whose overrides name a choice instead of a value.
GROUPS = ("source", "detector", "segmenter", "verify", "tracker", "sink", "engine", "preset")
#: Keys that were renamed after version 0.1.0, outside of stages: old to new.
RENAMED = {"phrasing": "prompt_template", "exports": "export_dir"} | {
    f"{group}.{old}": f"{group}.{new}" for group, keys in GROUP_KEYS.items() for old, new in keys.items()
}
#: Keys that only some choices have, which people look for with others.
KEYS_OF_CHOICES = {
    "detector.examples": "detector=owlv2 or detector=prototypes",
    "detector.negative_examples": "detector=owlv2 or detector=prototypes",
    "detector.exemplars": "detector=sam3",
    "detector.prompts": "detector=clicks",
}
_STAGE_KEY = re.compile(r"(detector|segmenter|verify|tracker)\.(.*\.)?(\w+)")


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the config for some overrides, as the command does.

    Raises:
        ConfigError: If a key or choice is unknown, in one line.

    >>> compose(["select.score=0.2"]).select.score
    0.2
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with preserve_hydra_state():
        GlobalHydra.instance().clear()
        try:
            check_overrides(overrides)
            with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="grounded_sam"):
                return hydra.compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(explain(error, overrides)) from error


def renamed_key(key: str) -> str | None:
    """Return the current name of a key that was renamed; None for any other key.

    >>> renamed_key("track.lost_patience")
    'track.max_lost_frames'
    """
    if key in RENAMED:
        return RENAMED[key]
    match = _STAGE_KEY.fullmatch(key)
    if match is None or match[3] not in STAGE_KEYS:
        return None
    return key.removesuffix(match[3]) + STAGE_KEYS[match[3]]


def check_renamed(cfg: DictConfig) -> None:
    """Check that no config file or `+key` sets a key under its old name or a synonym, where it would be ignored.

    Raises:
        ConfigError: If one does, with the present name.
    """
    from omegaconf import OmegaConf

    for key in cfg:
        if str(key) in SYNONYMS:
            raise ConfigError(f"unknown key {str(key)!r}; did you mean {SYNONYMS[str(key)]!r}?")

    for old, new in RENAMED.items():
        parent, _, key = old.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if node is not None and key in node:
            raise ConfigError(f"{old} was renamed to {new}")


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """Turn an error of Hydra or OmegaConf into one line that says what is allowed.

    Args:
        error: The error.
        overrides: Overrides of the command, so that the keys listed are those of the choices made.
    """
    text = str(error)
    missing = re.search(
        r"Could not find '([^']+)'.*?Available options in '([^']+)':\s*(.*?)(?:Config search path|$)", text, re.S
    )
    if missing:
        choice, group, options = missing.groups()
        return f"unknown choice {group}={choice.split('/')[-1]}; the choices are {', '.join(options.split())}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown.group(1)
        if (new := renamed_key(key)) is not None:
            return f"{key} was renamed to {new}"
        return f"unknown key {key!r}; {_suggest(key, overrides)}"
    if (variable := re.search(rf"Environment variable '({VARIABLE}\d+)' not found", text)) is not None:
        return (
            f"this config was saved without the secret of a URL; put it into the environment variable {variable[1]}, "
            "or give the URL again, such as input=URL"
        )
    if "Config group override must be" in text:
        return "a stage cannot be null; to run without it set segmenter=none, tracker=none or sink=none"
    return " ".join(text.split())


def _suggest(key: str, overrides: Sequence[str]) -> str:
    """Suggest the key that was probably meant, and list its siblings."""
    from omegaconf import DictConfig

    groups = "|".join((*GROUPS, "serve"))
    choices = [w for w in overrides if re.fullmatch(rf"\+?({groups})=[\w\[\], ]+", w)]
    if choices == list(overrides):  # these alone fail to compose, so the error is in a config file
        choices = []
    try:
        whole = compose(choices)
    except ConfigError:  # a choice is unknown as well
        whole = compose([])
    node: Any = whole
    parent, _, last = key.rpartition(".")
    for part in parent.split(".") if parent else []:
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    if not isinstance(node, DictConfig):
        node, parent, last = whole, "", key.split(".", maxsplit=1)[0]
    known = [str(k) for k in node if k != "_target_"]
    close = [".".join(filter(None, [parent, name])) for name in difflib.get_close_matches(last, known, 1, 0.7)]
    elsewhere = _synonym(whole, key.rpartition(".")[2]) or _keys_named(whole, last)
    meant = (close or elsewhere) if parent else (elsewhere or close)
    hint = f"did you mean {' or '.join(map(repr, meant[:3]))}? " if meant else ""
    if key in KEYS_OF_CHOICES:
        hint = f"it is a key of {KEYS_OF_CHOICES[key]}; "
    return f"{hint}the keys of {parent or 'the config'} are {', '.join(sorted(known))}"


def _synonym(cfg: DictConfig, name: str) -> list[str]:
    """Return the key of a config that other tools call by some name; none if there is none for the choices made."""
    from omegaconf import OmegaConf

    parent, _, last = SYNONYMS.get(name.lower(), "").rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return [SYNONYMS[name.lower()]] if last and node is not None and last in node else []


def _keys_named(node: Any, name: str, parent: str = "") -> list[str]:
    """Return the paths of all keys of a name below a node of a config."""
    from omegaconf import DictConfig, OmegaConf

    found = []
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        path = f"{parent}.{key}" if parent else key
        found += [path] if key == name and parent else []
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            found += _keys_named(node[key], name, path)
    return found


def to_override(value: Any) -> str:
    """Write a Python value in the grammar of Hydra's overrides.

    >>> to_override({"cup": ["mug", None]})
    "{cup:['mug',null]}"
    """
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(to_override(item) for item in value)}]"
    if isinstance(value, dict):
        items = (f"{escape_key(str(key))}:{to_override(item)}" for key, item in value.items())
        return f"{{{','.join(items)}}}"
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return quoted(str(value))

"""From words on the command line to stages: the config folder, composing, building."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grounded_sam.config.hydra import conf_dir
from grounded_sam.errors import ConfigError
from grounded_sam.hydra_state import preserve_hydra_state

if TYPE_CHECKING:
    from omegaconf import DictConfig


#: Config groups, whose overrides are choices and not values.
GROUPS = ("source", "detector", "segmenter", "tracker", "sink", "preset")


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config for some overrides, as the command would compose it.

    Raises:
        ConfigError: for an unknown key or choice, in one line.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with preserve_hydra_state():
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="grounded_sam"):
                return hydra.compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(explain(error, overrides)) from error


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """What Hydra or OmegaConf say of a bad config, as one line with what would have been possible.

    Args:
        error: what was raised.
        overrides: the words of the command, so that keys are listed for the choices made.
    """
    text = str(error)
    missing = re.search(
        r"Could not find '([^']+)'.*?Available options in '([^']+)':\s*(.*?)(?:Config search path|$)", text, re.S
    )
    if missing:
        choice, group, options = missing.groups()
        return f"there is no {group}={choice.split('/')[-1]}; the choices are {', '.join(options.split())}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown.group(1)
        return f"unknown key {key!r}; {_likely(key, overrides)}"
    if "Ambiguous value" in text or "LexerNoViableAlt" in text or "mismatched input" in text or "token recog" in text:
        word = next((w for w in overrides if w in text or w.partition("=")[2][:12] in text), "input=a b.jpg")
        key, _, value = word.partition("=")
        quoted = value.strip("'\"").replace("'", "\\'")
        return f"cannot read {word!r}: put the value in quotes of its own, \"{key}='{quoted}'\""
    if "Config group override must be" in text:
        return "a stage cannot be null; to do without one say segmenter=none, tracker=none or sink=none"
    return " ".join(text.split())


def _likely(key: str, overrides: Sequence[str]) -> str:
    """A hint at the keys that a misspelt one may have meant."""
    from omegaconf import DictConfig

    choices = [w for w in overrides if re.fullmatch(rf"({'|'.join(GROUPS)})=[\w\[\], ]+", w)]
    if choices == list(overrides):  # a file of one's own does not compose
        choices = []
    try:
        whole = compose(choices)
    except ConfigError:  # the choices are wrong as well
        whole = compose([])
    here: Any = whole
    parent, _, last = key.rpartition(".")
    for part in parent.split(".") if parent else []:
        here = here.get(part) if isinstance(here, DictConfig) and part in here else None
    if not isinstance(here, DictConfig):
        here, parent, last = whole, "", key.split(".", maxsplit=1)[0]
    known = [str(k) for k in here if k != "_target_"]
    close = difflib.get_close_matches(last, known, 1, 0.6)
    meant = f"did you mean {'.'.join(filter(None, [parent, close[0]]))!r}? " if close else ""
    return f"{meant}the keys of {parent or 'the config'} are {', '.join(sorted(known))}"


def to_override(value: Any) -> str:
    """A Python value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(to_override(v) for v in value)}]"
    if isinstance(value, dict):
        # Hydra's grammar has no quotes around keys.
        keys = [re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(key)) for key in value]
        return f"{{{','.join(f'{key}:{to_override(v)}' for key, v in zip(keys, value.values(), strict=True))}}}"
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    # Backslashes are escapes in front of a quote only.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(value)) + "'"

"""From words on the command line to stages: the config folder, composing, building."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.errors import ConfigError, GroundedSamError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from grounded_sam.pipeline import Pipeline
    from grounded_sam.stages import Sink, Source
    from grounded_sam.vocabulary import Vocabulary


def conf_dir() -> Path:
    """The folder of our YAML files: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())


@contextmanager
def undisturbed_hydra() -> Iterator[None]:
    """Leave Hydra's global state as it was: importing `sam2` seizes it, composing needs it free.

    So a Hydra app may follow on `load`. Who wants `sam2.build_sam.build_sam2` after `load`, which
    counts on the state that the import leaves, says `hydra.initialize_config_module("sam2")` first.
    """
    from hydra.core.global_hydra import GlobalHydra

    held = GlobalHydra.instance().hydra
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = held


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config for some overrides, as the command would compose it.

    Raises:
        ConfigError: for an unknown key or choice, in one line.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with undisturbed_hydra():
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="grounded_sam"):
                return hydra.compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error


def explain(error: BaseException) -> str:
    """What Hydra or OmegaConf say of a bad config, as one line with what would have been possible."""
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
        return f"unknown key {key!r}; {_likely(key)}"
    return " ".join(text.split())


def _likely(key: str) -> str:
    """A hint at the keys that a misspelt one may have meant."""
    from omegaconf import DictConfig, OmegaConf

    here: Any = compose([])
    known: list[str] = []
    parent, _, last = key.rpartition(".")
    for part in parent.split(".") if parent else []:
        here = here.get(part) if isinstance(here, DictConfig) and part in here else None
        if here is None:
            break
    prefix = parent
    if not isinstance(here, DictConfig):
        here, prefix, last = compose([]), "", key.split(".", maxsplit=1)[0]
    known = [str(k) for k in here if k != "_target_" and not OmegaConf.is_missing(here, k)]
    close = difflib.get_close_matches(last, known, 1, 0.6)
    meant = f"did you mean {'.'.join(filter(None, [prefix, close[0]]))!r}? " if close else ""
    return f"{meant}the keys of {prefix or 'the config'} are {', '.join(sorted(known))}"


def make(cfg: DictConfig, key: str, **extra: Any) -> Any:
    """Build what `cfg[key]` describes; its `_target_` is the registry.

    Raises:
        ConfigError: if the class cannot be imported or does not take the keys given.
    """
    from hydra.errors import HydraException, InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.select(cfg, key)
    target = node.get("_target_")
    if target is None:
        raise ConfigError(f"{key} has no _target_, so there is nothing to build; keys: {', '.join(map(str, node))}")
    try:
        # Partial, since Hydra would turn `extra` into configs.
        return instantiate(node, _convert_="all", _partial_=True)(**extra)
    except GroundedSamError:
        raise
    except (HydraException, ImportError, AttributeError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GroundedSamError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from error
        reason = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        raise ConfigError(f"cannot build {key} from {target}: {' '.join(str(reason).split())}") from error


def vocabulary_of(cfg: DictConfig) -> Vocabulary | None:
    """What `text` and `negative` ask for; None if `text` is not given."""
    from omegaconf import OmegaConf

    from grounded_sam.vocabulary import Vocabulary

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    if plain["text"] is None or plain["text"] == []:
        return None
    return Vocabulary.parse(plain["text"], plain["negative"] or ())


def build(cfg: DictConfig) -> Pipeline:
    """The pipeline that a config describes, models loaded.

    Raises:
        ConfigError: for choices that cannot work together; CheckpointError: for missing weights.
    """
    from grounded_sam.pipeline import Pipeline
    from grounded_sam.select import Select

    vocabulary = vocabulary_of(cfg)
    settings = make(cfg, "select")
    if not isinstance(settings, Select):
        raise ConfigError(f"select._target_ must be a grounded_sam.select.Select, got {type(settings).__name__}")
    detector = make(cfg, "detector")
    # A detector that took the segmenter into its own hands gives masks itself.
    own = cfg.segmenter is None or "segmenter" in cfg.detector
    segmenter = None if own else make(cfg, "segmenter")
    return Pipeline(detector, segmenter, settings, vocabulary)


def build_source(cfg: DictConfig) -> Source:
    """The source that a config describes."""
    return make(cfg, "source")


def build_sinks(cfg: DictConfig, output: Path, vocabulary: Vocabulary) -> list[Sink]:
    """The sinks that a config describes, in its order."""
    return [make(cfg, f"sink.{name}", output=output, vocabulary=vocabulary) for name in cfg.sink or {}]


def load(*overrides: str, **choices: Any) -> Pipeline:
    """Build a pipeline in Python, with the words of the command line.

    >>> model = load(detector="grounding_dino", segmenter="sam2")          # doctest: +SKIP
    >>> model = load("select.score=0.2", "segmenter.size=large")           # doctest: +SKIP
    >>> model = load(preset="shapes")                                      # doctest: +SKIP
    >>> found = model.segment("street.jpg", ["car", "wheel"])              # doctest: +SKIP

    Args:
        overrides: `key=value`, as on the command line.
        choices: group choices and top-level keys: `detector`, `segmenter`, `preset`, `device`, `text`.

    Raises:
        ConfigError: for an unknown key or choice; CheckpointError: for missing weights.
    """
    text = choices.pop("text", None)
    words = [f"{key}={_word(value)}" for key, value in choices.items()]
    pipeline = build(compose([*words, *overrides]))
    if text is not None:
        pipeline.vocabulary = pipeline.ask(text)
    return pipeline


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(_word(v) for v in value)}]"
    return str(value)

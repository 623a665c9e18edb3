"""From words on the command line to stages: the config folder, composing, building."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.config.compose import GROUPS, compose, to_override
from grounded_sam.errors import ConfigError, GroundedSamError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from grounded_sam.pipeline.pipeline import Pipeline
    from grounded_sam.structures.protocols import Sink, Source
    from grounded_sam.structures.vocabulary import Vocabulary


def build_node(cfg: DictConfig, key: str, **extra: Any) -> Any:
    """Build what `cfg[key]` describes; its `_target_` is the registry.

    Raises:
        ConfigError: if the class cannot be imported or does not take the keys given.
    """
    from hydra.errors import HydraException, InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.select(cfg, key)
    target = None if node is None else node.get("_target_")
    if target is None:
        raise ConfigError(f"{key} has no _target_, so there is nothing to build; it is {node}")
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


def _plain(cfg: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def vocabulary_from_config(cfg: DictConfig) -> Vocabulary | None:
    """What `text`, `negative` and `phrasing` ask for; None if `text` is not given."""
    from grounded_sam.structures.vocabulary import Vocabulary

    plain = _plain(cfg)
    if plain["text"] is None or plain["text"] == []:
        return None
    return Vocabulary.parse(plain["text"], plain["negative"] or ()).phrased(str(plain["phrasing"]))


def build(cfg: DictConfig, kept: dict[str, tuple[Any, Any]] | None = None) -> Pipeline:
    """The pipeline that a config describes, models loaded.

    Args:
        cfg: the config.
        kept: stages of an earlier job in this process, which are used again if their settings are the same.

    Raises:
        ConfigError: for choices that cannot work together; CheckpointError: for missing weights.
    """
    from grounded_sam.acceleration.allocator import keep_pages
    from grounded_sam.pipeline.pipeline import Pipeline
    from grounded_sam.pipeline.select import Select
    from grounded_sam.segmenters.feature_cache import FeatureCache

    if cfg.allocator not in ("keep", "system"):
        raise ConfigError(f"allocator must be keep or system, got {cfg.allocator!r}")
    if cfg.allocator == "keep":
        keep_pages()
    vocabulary = vocabulary_from_config(cfg)
    settings = build_node(cfg, "select")
    if not isinstance(settings, Select):
        raise ConfigError(
            f"select._target_ must be a grounded_sam.pipeline.select.Select, got {type(settings).__name__}"
        )
    # A detector that takes the segmenter into its own hands gives masks itself, or has a say in it.
    masks_itself = "segmenter" in (cfg.detector or {}) or (cfg.detector or {}).get("own_masks") is True
    masks = cfg.segmenter is not None or masks_itself or (cfg.detector or {}).get("masks") is True
    if cfg.detector is None:
        if not _finds_itself(cfg.tracker):
            raise ConfigError("detector=none needs a tracker that finds things by itself, such as tracker=sam3_video")
        masks = True
    if settings.nms_by == "mask" and not masks:
        raise ConfigError("select.nms_by=mask needs masks; choose a segmenter, or select.nms_by=box")
    if cfg.segmenter is not None and (cfg.detector or {}).get("masks") is True:
        raise ConfigError(
            "the detector gives masks, so a segmenter has nothing to do; to make new ones say detector.masks=false"
        )
    by_hand = "prompts" in (cfg.detector or {}) or cfg.track.get("clicks") is not None
    if (cfg.tracker or {}).get("prompt") == "mask" and not (masks or by_hand):
        raise ConfigError(
            "tracker.prompt=mask needs masks, which neither segmenter=none nor this detector gives (one that does says "
            "own_masks: true in its YAML); choose a segmenter, or tracker.prompt=box"
        )
    tiles, refine = build_node(cfg, "tiles"), build_node(cfg, "refine")
    if refine.changes and (cfg.segmenter is None or masks_itself):
        raise ConfigError(
            "refine changes what a segmenter's masks belong to, and none runs here; choose a segmenter, or leave out "
            "refine.boxes and refine.score"
        )
    members = [cfg.detector or {}, *((cfg.detector or {}).get("detectors") or {}).values()]
    if tiles.size is not None and any(member.get("exemplars") for member in members):
        raise ConfigError(
            "detector.exemplars are boxes in the whole picture and would be in every tile; leave out them or tiles.size"
        )
    detector = None if cfg.detector is None else _made(cfg, "detector", kept)
    segmenter = None if cfg.segmenter is None or masks_itself else _made(cfg, "segmenter", kept)
    if cfg.cache.folder is not None:
        if segmenter is None or not hasattr(segmenter, "embeddings"):
            raise ConfigError("cache.folder keeps what a segmenter makes of pictures, and none does here")
        segmenter.embeddings = FeatureCache(cfg.cache.folder, cfg.cache.gigabytes)
    tracking = build_node(cfg, "track")
    tracker = None if cfg.tracker is None else partial(build_node, cfg, "tracker", segmenter=segmenter)
    plain = _plain(cfg)
    negatives, phrasing = plain["negative"] or (), str(plain["phrasing"])
    return Pipeline(detector, segmenter, settings, vocabulary, negatives, tracker, tracking, phrasing, tiles, refine)


def _finds_itself(tracker: Any) -> bool:
    """Whether the class of a tracker's config says that it needs no detector."""
    from hydra.errors import HydraException
    from hydra.utils import get_object

    try:
        return tracker is not None and not getattr(get_object(tracker.get("_target_")), "needs_detector", True)
    except (HydraException, ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot build tracker from {tracker.get('_target_')}: {error}") from error


def _made(cfg: DictConfig, key: str, kept: dict[str, tuple[Any, Any]] | None) -> Any:
    """`make`, or what was made last for `key` if its settings were the same; one of a kind is kept."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.select(cfg, key), resolve=True)
    if kept is not None and key in kept and kept[key][0] == settings:
        return kept[key][1]
    if kept is not None:
        kept.pop(key, None)  # so that two models need not fit into memory
    stage = build_node(cfg, key)
    if kept is not None:
        kept[key] = settings, stage
    return stage


def share_predictions(cfg: DictConfig, pipeline: Pipeline, vocabulary: Vocabulary, sweep: Path) -> None:
    """Let a pipeline share what its models find with the other jobs of a sweep, if those ask the same of them."""
    from grounded_sam.pipeline.prediction_cache import PredictionCache, read_sweep_floor

    note = read_sweep_floor(sweep)
    from grounded_sam.detectors.stored import StoredDetector

    if "store" in (cfg.sink or {}) or isinstance(pipeline.detector, StoredDetector):  # whose boxes are the source's
        return
    # What is selected decides which pieces are joined, or masks change what is selected by.
    if pipeline.tiles.size is not None or pipeline.refine.changes:
        return
    plain = _plain(cfg)
    settings = {"detector": plain["detector"], "max_side": plain["source"].get("max_side")}
    if note.get("boxes") and pipeline.segmenter is not None:
        pipeline.boxes = PredictionCache(sweep, vocabulary, {**settings, "segmenter": None}, pipeline.settings)
    if note.get("shared"):
        settings["segmenter"] = plain["segmenter"]
        pipeline.predictions = PredictionCache(sweep, vocabulary, settings, pipeline.settings)


def build_source(cfg: DictConfig) -> Source:
    """The source that a config describes."""
    return build_node(cfg, "source")


def build_sinks(cfg: DictConfig, output: Path, vocabulary: Vocabulary) -> list[Sink]:
    """The sinks that a config describes, in its order, the store first.

    Args:
        cfg: the config.
        output: folder of the run. The store of all shards is one, so it is under the `output` of the sweep.
        vocabulary: of the run.
    """
    from omegaconf import OmegaConf

    shards = OmegaConf.select(cfg, "source.num_shards") or 1
    sinks: dict[str, Sink] = {}
    for name in sorted(cfg.sink or {}, key=lambda name: name != "store"):
        place = output
        if shards > 1 and name == "store":
            place = Path(cfg.output)
        elif shards > 1 and output == Path(cfg.output):  # shards that are started by hand
            place = output / str(cfg.source.shard)
        sinks[name] = build_node(cfg, f"sink.{name}", output=place, vocabulary=vocabulary)
        # With resume=extend the store may have classes that this run does not ask for.
        vocabulary = getattr(sinks[name], "classes", vocabulary) if name == "store" else vocabulary
    return list(sinks.values())


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
    words = []
    for key, value in choices.items():
        if key in GROUPS:  # choices are names, not values
            names = [str(v) for v in value] if isinstance(value, list | tuple) else str(value or "none")
            words.append(f"{key}=[{','.join(names)}]" if isinstance(names, list) else f"{key}={names}")
        else:
            words.append(f"{key}={to_override(value)}")
    pipeline = build(compose([*words, *overrides]))
    if text is not None:
        pipeline.vocabulary = pipeline.ask(text)
    return pipeline

"""Build a pipeline, a source and sinks from a config."""

from __future__ import annotations

import inspect
import pydoc
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.checks import check_choice
from grounded_sam.config.compose import GROUPS, check_renamed, compose, renamed_key, to_override
from grounded_sam.errors import CheckpointError, ConfigError, GroundedSamError, MissingWeightsError
from grounded_sam.formats.output_classes import OutputClasses
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.progress import ProgressBar
from grounded_sam.output.paths import OutputPath, RemotePath, output_path
from grounded_sam.structures.protocols import (
    CachesFeatures,
    DeclaresTraits,
    DetectorTraits,
    NeedsMasks,
    NumbersClasses,
    ResultStore,
    Sink,
    Source,
    TakesAddress,
    TakesOptions,
    TextTracker,
)
from grounded_sam.structures.vocabulary import Vocabulary

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from grounded_sam.pipeline.pipeline import Pipeline
    from grounded_sam.pipeline.select import Select


#: Held while a stage is built: transformers and TorchScript cannot load models in several threads at once.
_BUILDING = threading.RLock()


def build_node(cfg: DictConfig, key: str, **extra: Any) -> Any:
    """Build the object that `cfg[key]` describes: call its `_target_` with its other keys.

    Args:
        cfg: The config.
        key: Which part, such as `sink.coco`.
        extra: More arguments.

    Raises:
        ConfigError: If the class cannot be imported, or does not take the keys.
    """
    from hydra.errors import HydraException, InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.select(cfg, key)
    target = None if node is None else node.get("_target_")
    if target is None:
        raise ConfigError(f"{key} has no _target_, so nothing can be built from it; it is {node}")
    try:
        with _BUILDING:
            # Partial, because Hydra would convert `extra` to configs.
            return instantiate(node, _convert_="all", _partial_=True)(**extra)
    except MissingWeightsError as error:
        raise CheckpointError(f"{error}; {_local_copy_advice(cfg, key, error.repo)}") from error
    except GroundedSamError:
        raise
    except (HydraException, ImportError, AttributeError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GroundedSamError):
            cause = cause.__cause__
        if isinstance(cause, MissingWeightsError):
            raise CheckpointError(f"{cause}; {_local_copy_advice(cfg, key, cause.repo)}") from error
        if cause is not None:
            raise cause from error
        reason = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(reason))
        if unexpected:
            if (new := renamed_key(f"{key}.{unexpected[1]}")) is not None:
                raise ConfigError(f"{key}.{unexpected[1]} was renamed to {new}") from error
            names = ", ".join(sorted(argument_names(_class_of(node, key)) - set(extra)))
            reason = f"unknown key {unexpected[1]!r}; the keys are {names}"
        raise ConfigError(f"cannot build {key} from {target}: {' '.join(str(reason).split())}") from error


def _local_copy_advice(cfg: DictConfig, key: str, repo: str) -> str:
    """Say how to use weights that were copied to this machine, for the part of a config that needs them."""
    settings = [f"{key}.checkpoint"] if "checkpoint" in cfg[key] else []
    settings += [f"checkpoints.{name}" for name, value in cfg.checkpoints.items() if value == repo]
    advice = f"give a local copy with {settings[0]}=PATH, or " if settings else ""
    return f"{advice}use preset=shapes, whose weights ship with the package"


def _class_of(node: Any, key: str) -> Any:
    """Import the class that a part of the config names; None if there is no such part.

    Raises:
        ConfigError: If it cannot be imported.
    """
    if not node or node.get("_target_") is None:
        return None
    target = str(node.get("_target_"))
    try:
        cls = pydoc.locate(target)  # Hydra's own function would log what it cannot import
    except pydoc.ErrorDuringImport as error:
        raise ConfigError(f"cannot build {key} from {target}: {' '.join(str(error).split())}") from error
    if cls is None:
        raise ConfigError(f"cannot build {key} from {target}: no such class, or its module is not installed")
    return cls


def argument_names(cls: Any) -> set[str]:
    """Return the names of the arguments of a stage's class, with the fields of its options.

    Args:
        cls: The class, or a function.

    >>> from grounded_sam.segmenters.sam2 import Sam2
    >>> "size" in argument_names(Sam2) and "multimask" in argument_names(Sam2)
    True
    """
    parameters = inspect.signature(cls).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return names | {field.name for field in fields(cls.OPTIONS)} if isinstance(cls, TakesOptions) else names


def detector_traits(node: Any) -> DetectorTraits:
    """Return the traits of the detector of a config, without loading its weights.

    Args:
        node: The part `detector` of a config, or None.
    """
    cls = _class_of(node, "detector")
    if isinstance(cls, type) and issubclass(cls, DeclaresTraits):
        return cls.traits(dict(node))
    return DetectorTraits()


def _nested_detectors(node: Any) -> Iterator[Any]:
    """Yield the config of a detector and of the detectors in it."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node
        for inner in node.values():
            yield from _nested_detectors(inner)


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """Convert a config to dicts and lists, with interpolations resolved."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def vocabulary_from_config(cfg: DictConfig) -> Vocabulary | None:
    """Return the vocabulary of `text`, `negative` and `prompt_template`; None if there is no `text`."""
    plain = to_plain(cfg)
    if plain["text"] is None or plain["text"] == []:
        return None
    vocabulary = Vocabulary.parse(plain["text"], plain["negative"] or ())
    return vocabulary.with_prompt_template(str(plain["prompt_template"]))


def build(cfg: DictConfig, reuse: dict[str, tuple[Any, Any]] | None = None) -> Pipeline:
    """Build the pipeline that a config describes, and load its models.

    Args:
        cfg: The config.
        reuse: Stages of an earlier job in this process by config group, each with its settings; a stage with the same
            settings is used again, and new ones are added.

    Raises:
        ConfigError: If choices do not work together.
        CheckpointError: If weights are missing or damaged.
    """
    from grounded_sam.acceleration.allocator import keep_freed_memory
    from grounded_sam.pipeline.pipeline import Pipeline
    from grounded_sam.pipeline.select import Select
    from grounded_sam.segmenters.feature_cache import FeatureCache

    check_renamed(cfg)
    check_choice("allocator", cfg.allocator, ("keep", "system"))
    if cfg.allocator == "keep":
        keep_freed_memory()
    vocabulary = vocabulary_from_config(cfg)
    select = build_node(cfg, "select")
    if not isinstance(select, Select):
        raise ConfigError(f"select._target_ must be grounded_sam.pipeline.select.Select, got {type(select).__name__}")
    tiles, refine = build_node(cfg, "tiles"), build_node(cfg, "refine")
    traits = detector_traits(cfg.detector)
    _check_choices(cfg, select, traits, refines=refine.changes, tiled=tiles.size is not None)
    _check_verify(cfg, select, refine.verifies)
    groups = [] if cfg.detector is None else ["detector"]
    if cfg.segmenter is not None and not traits.replaces_segmenter:
        groups.append("segmenter")
    if cfg.verify is not None:
        groups.append("verify")
    stages: dict[str, Any] = {}
    with ProgressBar("Loading models", len(groups)) as bar:
        for number, group in enumerate(groups):
            bar.update(number, f"Loading {cfg[group].get('_target_', group).rpartition('.')[2]}")
            stages[group] = _build_or_reuse(cfg, group, reuse)
        bar.update(len(groups), "Loaded models")
    detector, segmenter = stages.get("detector"), stages.get("segmenter")
    if cfg.cache.folder is not None:
        if not isinstance(segmenter, CachesFeatures):
            raise ConfigError("cache.folder needs a segmenter whose image features can be cached")
        segmenter.use_feature_cache(FeatureCache(cfg.cache.folder, cfg.cache.gigabytes))
    plain = to_plain(cfg)
    return Pipeline(
        detector,
        segmenter,
        select=select,
        vocabulary=vocabulary,
        negatives=plain["negative"] or (),
        tracker=None if cfg.tracker is None else partial(build_node, cfg, "tracker", segmenter=segmenter),
        track=build_node(cfg, "track"),
        prompt_template=str(plain["prompt_template"]),
        tiles=tiles,
        refine=refine,
        verifier=stages.get("verify"),
    )


def _check_verify(cfg: DictConfig, select: Select, verifies: bool) -> None:
    """Check that what needs a verifier has one, and that the verifier has something to judge.

    Raises:
        ConfigError: If not, with the keys to change.
    """
    from grounded_sam.detectors.sam3 import Sam3
    from grounded_sam.detectors.stored import StoredDetector

    if cfg.verify is not None:
        if cfg.detector is None:
            raise ConfigError("verify judges what a detector finds, and there is none; choose one, or verify=none")
        return
    detector = _class_of(cfg.detector, "detector")
    is_stored = isinstance(detector, type) and issubclass(detector, StoredDetector)
    estimates = is_stored or (isinstance(detector, type) and issubclass(detector, Sam3))
    choose = "choose one, e.g. verify=siglip2"
    if verifies and not is_stored:  # what a store has keeps its confidence
        raise ConfigError(f"refine.score={cfg.refine.score} needs a verifier; {choose}")
    if select.verify is not None and not is_stored:
        raise ConfigError(f"select.verify needs a verifier; {choose}")
    if select.presence is not None and not estimates:
        raise ConfigError(f"select.presence needs a verifier, or detector=sam3; {choose}")


def _check_choices(cfg: DictConfig, select: Select, traits: DetectorTraits, refines: bool, tiled: bool) -> None:
    """Check that the choices of a config work together, before weights are loaded.

    Raises:
        ConfigError: If they do not, with the keys to change.
    """
    from grounded_sam.detectors.stored import StoredDetector

    tracker = _class_of(cfg.tracker, "tracker")
    has_masks = cfg.segmenter is not None or traits.masks or traits.replaces_segmenter
    if cfg.detector is None:
        if not (isinstance(tracker, type) and issubclass(tracker, TextTracker)):
            raise ConfigError("detector=none needs a tracker that finds objects itself, such as tracker=sam3_video")
        has_masks = True
    detector = _class_of(cfg.detector, "detector")
    if select.status is not None and not (isinstance(detector, type) and issubclass(detector, StoredDetector)):
        raise ConfigError("select.status needs objects that somebody reviewed: use source=stored, or remove it")
    if select.nms_by == "mask" and not has_masks:
        raise ConfigError("select.nms_by=mask needs masks; choose a segmenter, or select.nms_by=box")
    if cfg.segmenter is not None and traits.masks and not traits.replaces_segmenter:
        raise ConfigError(
            "the detector returns masks, so the segmenter has nothing to do; to make new masks set detector.masks=false"
        )
    has_clicks = traits.clicks or cfg.track.get("clicks") is not None
    needs_masks = (
        isinstance(tracker, type) and issubclass(tracker, NeedsMasks) and tracker.needs_masks(dict(cfg.tracker))
    )
    if needs_masks and not (has_masks or has_clicks):
        raise ConfigError(
            "tracker.prompt=mask needs masks, which neither the segmenter nor the detector provides; choose a "
            "segmenter, or tracker.prompt=box (a detector class with masks declares them in `traits`)"
        )
    if refines and (cfg.segmenter is None or traits.replaces_segmenter):
        raise ConfigError(
            "refine.boxes and refine.score use the masks of a segmenter, but none is active; choose a segmenter, or "
            "remove these settings"
        )
    if tiled and any(detector_traits(node).image_prompts for node in _nested_detectors(cfg.detector)):
        raise ConfigError(
            "detector.exemplars are boxes in whole images, which cannot be tiled; remove them, or tiles.size"
        )


def _build_or_reuse(cfg: DictConfig, key: str, reuse: dict[str, tuple[Any, Any]] | None) -> Any:
    """Build a stage, or reuse the last one of its group if its settings are the same."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.select(cfg, key), resolve=True)
    if reuse is None:
        return build_node(cfg, key)
    if key not in reuse or reuse[key][0] != settings:
        reuse.pop(key, None)  # freed first, so that two models need not fit into memory
        reuse[key] = settings, build_node(cfg, key)
    return reuse[key][1]


def share_predictions(cfg: DictConfig, pipeline: Pipeline, vocabulary: Vocabulary, folder: Path) -> None:
    """Share the predictions of a pipeline with the jobs of a sweep that run the same models with the same settings.

    Args:
        cfg: Config of the job.
        pipeline: Its pipeline, which is changed.
        vocabulary: Classes of the run.
        folder: Folder of the predictions of the sweep.
    """
    from grounded_sam.detectors.stored import StoredDetector
    from grounded_sam.pipeline.images import DetectThenSegment
    from grounded_sam.pipeline.prediction_cache import CachedStages, LoosestSelection, PredictionCache

    stages = pipeline.stages
    assert isinstance(stages, DetectThenSegment)
    if has_store(cfg) or isinstance(pipeline.detector, StoredDetector):  # their detections come from elsewhere
        return
    candidates = None if stages.verifier is None else stages.before_masks()
    if stages.tiles.size is not None or (stages.refine.changes and candidates is None):
        return  # what is selected depends on more than thresholds
    loosest, plain = LoosestSelection.read(folder), to_plain(cfg)
    settings = {"detector": plain["detector"], "max_side": plain["source"].get("max_side")}
    max_pixels = plain["source"].get("max_pixels", MAX_PIXELS)
    boxes = results = None
    if loosest.boxes and pipeline.segmenter is not None:
        of_boxes = {**settings, "segmenter": None}
        boxes = PredictionCache(folder, vocabulary, of_boxes, pipeline.select, max_pixels, candidates)
    if loosest.results:
        settings["segmenter"] = plain["segmenter"]
        if candidates is not None:
            settings |= {"verify": plain["verify"], "refine": plain["refine"]}
        results = PredictionCache(folder, vocabulary, settings, pipeline.select, max_pixels, candidates)
    if boxes is not None or results is not None:
        pipeline.stages = CachedStages(stages, results, boxes)


def build_source(cfg: DictConfig) -> Source:
    """Build the source that a config describes.

    Raises:
        ConfigError: If the input is missing, or a setting is out of range.
    """
    source: Source = build_node(cfg, "source")
    return source


def _is_store(node: Any, name: str) -> bool:
    """Return whether a sink reads back what earlier runs wrote."""
    cls = _class_of(node, f"sink.{name}")
    return isinstance(cls, type) and issubclass(cls, ResultStore)


def check_output_address(cfg: DictConfig, output: OutputPath) -> None:
    """Check that the sinks can write to the output, before models are loaded.

    Args:
        cfg: The config.
        output: Output of the run.

    Raises:
        ConfigError: If it is an address, and a sink writes to folders of this machine only.
    """
    if not isinstance(output, RemotePath):
        return
    classes = {str(name): _class_of(node, f"sink.{name}") for name, node in (cfg.sink or {}).items()}
    local = [name for name, cls in classes.items() if not isinstance(cls, TakesAddress)]
    if local:
        names = ",".join(local)
        raise ConfigError(
            f"sink={names if len(local) == 1 else f'[{names}]'} cannot write to {output}, only store, coco, report, "
            f"metrics and jsonl can; use sink=store there, then 'source=stored input={output} sink={names} "
            "output=FOLDER'"
        )


def has_store(cfg: DictConfig) -> bool:
    """Return whether a sink of a config reads back what earlier runs wrote."""
    return any(_is_store(node, str(name)) for name, node in (cfg.sink or {}).items())


def build_sinks(
    cfg: DictConfig, output: OutputPath, vocabulary: Vocabulary, classes: OutputClasses | None = None
) -> list[Sink]:
    """Build the sinks that a config describes, in its order, the store first.

    Args:
        cfg: The config.
        output: Folder or address of the run. All shards share one store, in the `output` of the sweep.
        vocabulary: Classes of the run.
        classes: Classes of the output, to which those of the run are appended, and which the runner needs too; None to
            number the classes as in `vocabulary`, for an output of one run.
    """
    from omegaconf import OmegaConf

    num_shards = OmegaConf.select(cfg, "source.num_shards") or 1
    stores = {name: _is_store(node, str(name)) for name, node in (cfg.sink or {}).items()}
    sinks: list[Sink] = []
    for name in sorted(stores, key=lambda name: not stores[name]):
        folder = output
        if num_shards > 1 and stores[name]:
            folder = output_path(str(cfg.output))
        cls = _class_of(cfg.sink[name], f"sink.{name}")
        numbers = isinstance(cls, type) and issubclass(cls, NumbersClasses)
        words = classes.vocabulary if numbers and classes is not None else vocabulary
        sink = build_node(cfg, f"sink.{name}", output=folder, vocabulary=words)
        if isinstance(sink, ResultStore):  # with resume=extend it may have classes that this run did not request
            vocabulary = sink.output_classes()
            if classes is not None:
                classes.append(vocabulary)
        sinks.append(sink)
    return sinks


def load(*overrides: str, **choices: Any) -> Pipeline:
    """Build a pipeline from Python, with the same overrides as on the command line.

    >>> model = load(detector="grounding_dino", segmenter="sam2")          # doctest: +SKIP
    >>> model = load("select.score=0.2", "segmenter.size=large")           # doctest: +SKIP
    >>> model = load(preset="shapes")                                      # doctest: +SKIP
    >>> detections = model.segment("street.jpg", ["car", "wheel"])         # doctest: +SKIP

    Args:
        overrides: `key=value`, as on the command line.
        choices: Choices of config groups (`detector`, `segmenter`, `preset`...) and top-level keys (`device`, `text`).

    Raises:
        ConfigError: If a key or choice is unknown, or choices do not work together.
        CheckpointError: If weights are missing or damaged.
    """
    text = choices.pop("text", None)
    pipeline = build(compose([*_choice_overrides(choices), *overrides]))
    if text is not None:
        pipeline.vocabulary = pipeline.parse_text(text)
    return pipeline


def _choice_overrides(choices: Mapping[str, Any]) -> Sequence[str]:
    """Convert keyword arguments to overrides; those of config groups are names, not values."""
    overrides = []
    for key, value in choices.items():
        if key not in GROUPS:
            overrides.append(f"{key}={to_override(value)}")
        elif isinstance(value, list | tuple):
            overrides.append(f"{key}=[{','.join(map(str, value))}]")
        else:
            overrides.append(f"{key}={value or 'none'}")
    return overrides

"""Which weights a config loads, found without loading them."""

from __future__ import annotations

import pydoc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounded_sam.config.compose import explain
from grounded_sam.config.hydra import conf_dir
from grounded_sam.config.words import check_overrides
from grounded_sam.errors import ConfigError, GroundedSamError
from grounded_sam.files import home_path
from grounded_sam.hydra_state import preserve_hydra_state
from grounded_sam.weights.hub import HubFile, WeightsSpec
from grounded_sam.weights.loading import find_file, find_folder

#: Config groups whose choices load weights.
STAGES = ("detector", "segmenter", "verify", "tracker")


@dataclass(frozen=True)
class _StageConfig:
    """Choice and settings of a config group."""

    choice: str
    node: Any


@contextmanager
def _hydra() -> Iterator[None]:
    """Initialize Hydra, to compose several times."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with preserve_hydra_state():
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="grounded_sam"):
            yield


def _compose_stages(overrides: Sequence[str], stages: Sequence[str] = STAGES) -> dict[str, _StageConfig]:
    """Return the choice and settings of each stage as plain values; call it inside `_hydra`.

    Raises:
        ConfigError: If a key or choice is unknown, in one line.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_overrides(overrides)
    try:
        cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
        choices = cfg.hydra.runtime.choices
        nodes = {stage: cfg[stage] for stage in stages}
        return {
            stage: _StageConfig(
                str(choices[stage]), node if node is None else OmegaConf.to_container(node, resolve=True)
            )
            for stage, node in nodes.items()
        }
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides)) from error


def _class_of(node: Any) -> type | None:
    """Return the class of a node; None if there is none, or it cannot be imported here.

    Weights can also be listed on a machine that lacks a package or a user-defined module.
    """
    if not isinstance(node, dict) or node.get("_target_") is None:
        return None
    try:
        cls = pydoc.locate(node["_target_"])  # Hydra's own function would log what it cannot import
    except pydoc.ErrorDuringImport:
        return None
    return cls if isinstance(cls, type) else None


def _hub_file(node: Mapping[str, Any]) -> HubFile | None:
    """Return the single file that the class of a node loads; None for a transformers checkpoint."""
    from grounded_sam.structures.protocols import LoadsOneFile

    cls = _class_of(node)
    return cls.hub_file(node) if cls is not None and issubclass(cls, LoadsOneFile) else None


def _replaces_segmenter(detector: Any) -> bool:
    """Return whether the detector of a node makes a segmenter unnecessary."""
    from grounded_sam.structures.protocols import DeclaresTraits

    cls = _class_of(detector)
    return cls is not None and issubclass(cls, DeclaresTraits) and cls.traits(detector).replaces_segmenter


def _weights_in(stage: str, choice: str, node: Any, key: str) -> Iterator[WeightsSpec]:
    """Yield the weights of a stage and of the stages inside it: nodes with `_target_` and `checkpoint`."""
    if isinstance(node, dict):
        if node.get("_target_") is not None and "checkpoint" in node:
            file = _hub_file(node)
            if node["checkpoint"] is not None or file is not None:
                yield _locate(stage, choice, key, node, file)
        for name, inner in node.items():
            yield from _weights_in(stage, choice, inner, f"{key}.{name}")
    elif isinstance(node, list):
        for i, inner in enumerate(node):
            yield from _weights_in(stage, choice, inner, f"{key}.{i}")


def _locate(stage: str, choice: str, key: str, node: Mapping[str, Any], file: HubFile | None) -> WeightsSpec:
    """Find out where the weights of a node are, on the hub or on this machine.

    Raises:
        CheckpointError: If the checkpoint is neither a hub id nor an existing path.
    """
    checkpoint = str(node["checkpoint"] if file is None else file.repo)
    # Hub ids and paths are told apart as in `find_file` and `find_folder`.
    is_local = checkpoint.startswith(("builtin:", "/", ".", "~")) or home_path(checkpoint).exists()
    if not is_local and checkpoint.count("/") == 1 and not checkpoint.endswith((".safetensors", ".pt", ".pth")):
        if file is None:
            return WeightsSpec(stage, choice, key, checkpoint, repo=checkpoint)
        sha256 = node.get("sha256") or file.sha256
        return WeightsSpec(stage, choice, key, checkpoint, repo=checkpoint, file=file.name, sha256=sha256)
    if file is not None:
        return WeightsSpec(stage, choice, key, checkpoint, path=find_file(checkpoint, file.kind))
    role = next(part for part in reversed(key.split(".")) if part in STAGES)  # a detector may contain a segmenter
    kind = {"detector": "detector", "verify": "siglip"}.get(role, "sam2")
    return WeightsSpec(stage, choice, key, checkpoint, path=Path(find_folder(checkpoint, kind)))


def required_weights(overrides: Sequence[str]) -> tuple[list[WeightsSpec], list[str]]:
    """Return the weights that a run loads.

    Args:
        overrides: `key=value`, as for `grounded-sam`.

    Returns:
        The weights, and a line for each stage that loads none.

    Raises:
        ConfigError: If a key or choice is unknown.
        CheckpointError: If a local checkpoint does not exist.
    """
    with _hydra():
        stages = _compose_stages(overrides)
    detector = stages["detector"]
    replaces_segmenter = _replaces_segmenter(detector.node)
    weights, notes = [], []
    for stage, config in stages.items():
        if stage == "segmenter" and config.node is not None and replaces_segmenter:
            notes.append(f"segmenter={config.choice}: not loaded, since detector={detector.choice} replaces it")
            continue
        specs = list(_weights_in(stage, config.choice, config.node, stage))
        weights += specs
        if not specs:
            notes.append(f"{stage}={config.choice}: loads no weights")
    return weights, notes


def all_weights(extra: Sequence[str] = ()) -> tuple[list[WeightsSpec], list[str]]:
    """Return the weights of every choice of every stage.

    Args:
        extra: Overrides for each, such as a folder of user-defined choices.

    Returns:
        The weights, and a line for each choice that cannot be composed.
    """
    from hydra.core.global_hydra import GlobalHydra

    weights, errors = [], []
    with _hydra():
        loader = GlobalHydra.instance().config_loader()
        for stage in STAGES:
            for choice in loader.get_group_options(stage, config_name="config", overrides=list(extra)):
                try:
                    config = _compose_stages([*extra, f"{stage}={choice}"], [stage])[stage]
                    weights += list(_weights_in(stage, choice, config.node, stage))
                except GroundedSamError as error:
                    errors.append(f"{stage}={choice}: {error}")
    return weights, errors

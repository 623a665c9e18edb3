"""The command `grounded-sam-models`: which weights the stages take, fetching them ahead, and where they lie."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grounded_sam.config.compose import explain
from grounded_sam.config.hydra import conf_dir
from grounded_sam.errors import ConfigError, GroundedSamError
from grounded_sam.hydra_state import preserve_hydra_state
from grounded_sam.weights.hub import (
    Weights,
)
from grounded_sam.weights.loading import find_file, find_folder

#: Config groups whose choices take weights.
STAGES = ("detector", "segmenter", "tracker")


#: Classes that load one file of a repository. Their `hub_file` says which, in the module of this name under
#: `segmenters`, which is also the kind of their `builtin:` weights. Others load a transformers checkpoint.
ONE_FILE = {
    "grounded_sam.segmenters.sam.Sam": "sam",
    "grounded_sam.segmenters.sam2.Sam2": "sam2",
    "grounded_sam.trackers.sam2.Sam2Tracker": "sam2",
}


@contextmanager
def _hydra() -> Iterator[None]:
    """A place to compose in, several times; mistakes become `ConfigError`s of one line."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with preserve_hydra_state():
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="grounded_sam"):
            yield


def _stages(words: Sequence[str], only: Sequence[str] = STAGES) -> dict[str, tuple[str, Any]]:
    """Choice and settings of each stage, as plain values; inside `_hydra`.

    Raises:
        ConfigError: for an unknown key or choice, in one line.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        cfg = hydra.compose("config", overrides=list(words), return_hydra_config=True)
        chosen = cfg.hydra.runtime.choices
        plain = {stage: cfg[stage] for stage in only}
        return {
            stage: (str(chosen[stage]), node if node is None else OmegaConf.to_container(node, resolve=True))
            for stage, node in plain.items()
        }
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, words)) from error


def _weights(stage: str, choice: str, node: Any, key: str) -> Iterator[Weights]:
    """Every checkpoint in the settings of a stage, however deep: what has a `_target_` and a `checkpoint`."""
    if isinstance(node, dict):
        target, checkpoint = node.get("_target_"), node.get("checkpoint")
        if target is not None and "checkpoint" in node and (checkpoint is not None or ONE_FILE.get(target) == "sam2"):
            yield _located(stage, choice, key, node)
        for name, inner in node.items():
            yield from _weights(stage, choice, inner, f"{key}.{name}")
    elif isinstance(node, list):
        for i, inner in enumerate(node):
            yield from _weights(stage, choice, inner, f"{key}.{i}")


def _located(stage: str, choice: str, key: str, node: dict[str, Any]) -> Weights:
    """Where one checkpoint lies, on the hub or here.

    Raises:
        CheckpointError: if it is neither a hub id nor something that exists; ConfigError: for an unknown size.
    """
    kind = ONE_FILE.get(node["_target_"])
    checkpoint, file, sha256 = node["checkpoint"], None, None
    if kind is not None:
        sized = {"size": node["size"]} if "size" in node else {}
        module = importlib.import_module(f"grounded_sam.segmenters.{kind}")
        checkpoint, file, known = module.hub_file(checkpoint, **sized)
        sha256 = node.get("sha256") or known
    checkpoint = str(checkpoint)
    about = (stage, choice, key, checkpoint)
    # As `find_file` and `find_folder` tell a hub id from a path.
    here = checkpoint.startswith(("builtin:", "/", ".", "~")) or Path(checkpoint).expanduser().exists()
    if not here and checkpoint.count("/") == 1 and not checkpoint.endswith((".safetensors", ".pt", ".pth")):
        return Weights(*about, repo=checkpoint, file=file, sha256=sha256)
    if kind is not None:
        return Weights(*about, place=find_file(checkpoint, kind))
    kind = "detector" if ".detectors." in node["_target_"] else "sam2"
    return Weights(*about, place=Path(find_folder(checkpoint, kind)))


def needed(words: Sequence[str]) -> tuple[list[Weights], list[str]]:
    """What a run of `grounded-sam` with these words loads, and of the stages that load nothing why.

    Raises:
        ConfigError: for an unknown key or choice; CheckpointError: for a local checkpoint that is not there.
    """
    with _hydra():
        stages = _stages(words)
    found, without = [], []
    detector, settings = stages["detector"]
    for stage, (choice, node) in stages.items():
        if stage == "segmenter" and node is not None and (settings or {}).get("own_masks") is True:
            without.append(f"segmenter={choice}: not loaded, since detector={detector} gives masks of its own")
            continue
        here = list(_weights(stage, choice, node, stage))
        found += here
        if not here:
            without.append(f"{stage}={choice}: takes no weights")
    return found, without


def every_choice(extra: Sequence[str] = ()) -> tuple[list[Weights], list[str]]:
    """The weights of every choice of every stage, and which choices cannot be composed.

    Args:
        extra: words for each, such as a folder of one's own choices.
    """
    from hydra.core.global_hydra import GlobalHydra

    found, wrong = [], []
    with _hydra():
        loader = GlobalHydra.instance().config_loader()
        for stage in STAGES:
            for choice in loader.get_group_options(stage, config_name="config", overrides=list(extra)):
                try:
                    node = _stages([*extra, f"{stage}={choice}"], [stage])[stage][1]
                    found += list(_weights(stage, choice, node, stage))
                except GroundedSamError as error:
                    wrong.append(f"{stage}={choice}: {error}")
    return found, wrong

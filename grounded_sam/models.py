"""The command `grounded-sam-models`: which weights the stages take, fetching them ahead, and where they lie."""

from __future__ import annotations

import argparse
import glob
import hashlib
import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from grounded_sam.checkpoints import BUILTIN, find_file, find_folder
from grounded_sam.config import conf_dir, explain, undisturbed_hydra, word_of
from grounded_sam.errors import CheckpointError, ConfigError, GroundedSamError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

#: Config groups whose choices take weights.
STAGES = ("detector", "segmenter", "tracker")
#: Classes that load one file of a repository. Their `hub_file` says which, in the module of this name under
#: `segmenters`, which is also the kind of their `builtin:` weights. Others load a transformers checkpoint.
ONE_FILE = {
    "grounded_sam.segmenters.sam.Sam": "sam",
    "grounded_sam.segmenters.sam2.Sam2": "sam2",
    "grounded_sam.trackers.sam2.Sam2Tracker": "sam2",
}
#: What weights of a transformers checkpoint are called, and what is loaded if there are several of them.
WEIGHTS = (
    r"model\.safetensors",
    r"model-\d+-of-(\d+)\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-(\d+)\.bin",
)
COMMANDS = ("list", "fetch", "path")
HELP = """\
The weights of the stages: which there are, fetching them ahead, and where they lie.

  grounded-sam-models list                                     every choice that takes weights
  grounded-sam-models list detector=owlv2 segmenter=sam        what these words load
  grounded-sam-models fetch                                    what `grounded-sam` loads by default
  grounded-sam-models fetch detector=sam3 tracker=none
  grounded-sam-models fetch segmenter=sam2 segmenter.size=large tracker.size=large
  HF_HUB_OFFLINE=1 grounded-sam-models path segmenter=sam      a path per line, for scripts
  grounded-sam-models list --json > weights.json

The words are those of `grounded-sam`; what they leave open is as the config has it. To see what is fetched, `list`
the same words before.
"""
COMMANDS_HELP = """\
list    stage, choice, repository on the Hugging Face hub (and the file in it, where one is all that is loaded),
        size to fetch, licence, whether it is gated, and how much of it lies in the hub's cache. What neither the hub
        nor the package knows is `unknown`
fetch   brings into the hub's cache what is not there yet, only the files that are loaded, and compares each with the
        digest that the cache keeps of it; a damaged file is fetched anew. Again, to check what is there
path    the folder or file of each, from the cache alone; exit code 1 if one is missing

Gated models need an account that has been given access: accept the licence on the model's page, then `hf auth login`
or HF_TOKEN. HF_HOME says where the cache is, HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 asks none.
"""


@dataclass(frozen=True)
class Weights:
    """What a stage loads: of the hub a file or a repository, or a place on this machine.

    Attributes:
        stage: `detector`, `segmenter` or `tracker`.
        choice: of that group.
        key: of the part of the config that names the checkpoint: `detector`, `detector.detectors.first`.
        checkpoint: as it is named there, or stands for null.
        repo: on the hub; None if the checkpoint lies here.
        file: in `repo`; None for a transformers checkpoint.
        sha256: what that file's SHA-256 has to be, if known.
        place: of what lies here.
    """

    stage: str
    choice: str
    key: str
    checkpoint: str
    repo: str | None = None
    file: str | None = None
    sha256: str | None = None
    place: Path | None = None

    def __str__(self) -> str:
        inside = self.key.removeprefix(self.stage).lstrip(".")
        return f"{self.stage}={self.choice}" + (f" ({inside})" if inside else "")


@dataclass(frozen=True)
class Cached:
    """What the hub's cache has of something.

    Attributes:
        folder: of the snapshot; None if there is none.
        files: names that are loaded, and their sizes; None where not known.
        present: bytes of them that are there.
        whole: whether all of them are.
    """

    folder: Path | None
    files: dict[str, int | None]
    present: int
    whole: bool

    @property
    def size(self) -> int | None:
        """Bytes of all files; None if not known."""
        sizes = [size for size in self.files.values() if size is not None]
        return sum(sizes) if self.files and len(sizes) == len(self.files) else None

    def place(self, weights: Weights) -> Path:
        """The folder, or the file in it."""
        assert self.folder is not None
        return self.folder / weights.file if weights.file is not None else self.folder


@contextmanager
def _hydra() -> Iterator[None]:
    """A place to compose in, several times; mistakes become `ConfigError`s of one line."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with undisturbed_hydra():
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


def loaded(names: Iterable[str], file: str | None) -> list[str]:
    """Those files of a repository that a stage loads: `file`, or what a transformers checkpoint is read from.

    Of several formats of the same weights that is one, safetensors before others; never code.
    """
    names = list(names)
    if file is not None:
        return [name for name in names if name == file]
    top = [name for name in names if "/" not in name]
    texts = [n for n in top if n.endswith((".json", ".txt", ".jinja", ".model")) and not n.endswith(".index.json")]
    for form in WEIGHTS:
        weights = [name for name in top if re.fullmatch(form, name)]
        if weights:
            index = f"{weights[0].split('-')[0]}{Path(weights[0]).suffix}.index.json"
            return sorted([*texts, *weights, *([index] if index in top and len(weights) > 1 else [])])
    return sorted(texts)


def _has_weights(names: Iterable[str], file: str | None) -> bool:
    """Whether nothing that is loaded is wanting, as far as names tell."""
    names = list(names)
    if file is not None:
        return file in names
    weights = [match for name in names for form in WEIGHTS if (match := re.fullmatch(form, name))]
    parts = {int(match.group(1)) if match.re.groups else 1 for match in weights}
    return "config.json" in names and parts == {len(weights)}


def snapshot(repo: str) -> Path | None:
    """The folder of the hub's cache from which a repository is loaded when nothing is asked of the hub."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    place = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repo, repo_type="model")
    try:
        commit = (place / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = place / "snapshots" / commit
    return folder if re.fullmatch("[0-9a-f]{40}", commit) and folder.is_dir() else None


def _listing(repo: str) -> dict[str, int | None]:
    """What the cache knows of the files of a cached repository, without the hub: names and sizes."""
    try:
        from huggingface_hub import get_cached_repo_tree  # older clients keep no listing

        return {file.path: file.size for file in get_cached_repo_tree(repo)}
    except Exception:  # nor is there one of files that came one by one
        return {}


def cached(repo: str, file: str | None, info: ModelInfo | None = None) -> Cached:
    """What the cache has of a repository or of one file in it.

    Args:
        repo: on the hub.
        file: in it; None for a transformers checkpoint.
        info: what the hub says of it.
    """
    folder = snapshot(repo)
    files: dict[str, int | None] = {}
    if info is not None and (folder is None or info.sha == folder.name):
        files = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    elif folder is not None:
        files = _listing(repo)
    listed = bool(files)
    if folder is not None and not listed:
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    files = {name: files[name] for name in loaded(files, file)}
    if folder is None:
        return Cached(None, files, 0, False)
    present = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
    whole = _has_weights(present, file) and len(present) == len(files)
    if not whole and not listed:  # what else there is of it is not known
        files = dict.fromkeys(files)
    return Cached(folder, files, sum(present.values()), whole)


def unreachable() -> str | None:
    """Why the hub cannot be asked, found out within seconds; None if it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        return f"{constants.ENDPOINT}: {_reason(error)}"
    return None


def _reason(error: Exception) -> str:
    """What the hub's client says, in one line.

    Raises:
        Exception: the error itself if it is none of those that hubs, networks and disks cause.
    """
    clients = ("httpx", "httpcore", "requests", "huggingface_hub", "hf_xet")
    if not isinstance(error, OSError | ValueError | RuntimeError) and not type(error).__module__.startswith(clients):
        raise error
    return " ".join(str(error).split()).split(" For more ")[0][:200] or type(error).__name__


def _refused(repo: str, error: Exception, file: str | None = None) -> str:
    """Why the hub did not give something, and what a user can do about it, in one line."""
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, and when access is given "
            "log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no {repo}, or it is private and HF_TOKEN or `hf auth login` is wanting"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} on the hub has no {file or 'such file'}"
    return f"cannot get {repo} from the hub: {_reason(error)}"


def _asked(repos: Iterable[str]) -> dict[str, ModelInfo | str]:
    """What the hub says of each repository, or why it does not."""
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    def ask(repo: str) -> ModelInfo | str:
        try:
            return HfApi().model_info(repo, files_metadata=True, timeout=10)
        except Exception as error:
            return _refused(repo, error)

    unique = list(dict.fromkeys(repos))
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(unique, pool.map(ask, unique), strict=True))


def known() -> dict[str, dict[str, Any]]:
    """Licence and gating of repositories, as far as the package knows them without the hub."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))


def table(found: Sequence[Weights]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each of the weights, with None for what is not known, and what could not be found out."""
    repos = [weights.repo for weights in found if weights.repo is not None]
    why = unreachable() if repos else None
    infos = _asked(repos) if why is None else {}
    notes = [f"the hub is not asked ({why}); this is what the cache and the package know"] if why else []
    notes += [info for info in infos.values() if isinstance(info, str)]
    facts = known()
    rows = []
    for weights in found:
        row: dict[str, Any] = {"stage": weights.stage, "choice": weights.choice, "key": weights.key}
        row |= {"checkpoint": weights.checkpoint, "repo": weights.repo, "file": weights.file}
        if weights.repo is None:
            assert weights.place is not None
            licence = "apache-2.0" if weights.place.is_relative_to(BUILTIN) else None  # the package's own
            row |= {"size": 0, "licence": licence, "gated": False, "cached": None, "cached_size": None}
            rows.append(row | {"path": str(weights.place)})
            continue
        info = infos.get(weights.repo)
        info = None if isinstance(info, str) else info
        have = cached(weights.repo, weights.file, info)
        fact = facts.get(weights.repo, {})
        card = getattr(info, "card_data", None) or {}
        licence = card.get("license")
        licence = card.get("license_name") or licence if licence == "other" else licence
        gated = None if info is None or info.gated is None else bool(info.gated)
        row |= {"size": have.size, "licence": licence or fact.get("licence")}
        row |= {"gated": fact.get("gated") if gated is None else gated}
        row |= {"cached": "whole" if have.whole else "part" if have.present else "no", "cached_size": have.present}
        rows.append(row | {"path": str(have.place(weights)) if have.whole else None})
    return rows, notes


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    def said(value: Any) -> str:
        return "unknown" if value is None else {True: "yes", False: "no"}.get(value, str(value))

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "choice", "weights", "to fetch", "licence", "gated", "in the cache"):
        shown.add_column(column, overflow="fold", justify="right" if column == "to fetch" else "left")
    for row in rows:
        inside = row["key"].removeprefix(row["stage"]).lstrip(".")
        choice = row["choice"] + (f"\n{inside}" if inside else "")
        if row["repo"] is None:
            place = "part of the package" if Path(row["path"]).is_relative_to(BUILTIN) else f"lies in {row['path']}"
            shown.add_row(row["stage"], choice, row["checkpoint"], "nothing", said(row["licence"]), "no", place)
            continue
        size = "unknown" if row["size"] is None else decimal(row["size"])
        there = {"whole": "yes", "no": "no"}.get(row["cached"], f"{decimal(row['cached_size'])} of {size}")
        name = row["repo"] + (f"\n{row['file']}" if row["file"] else "")
        shown.add_row(row["stage"], choice, name, size, said(row["licence"]), said(row["gated"]), there)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)  # so that scripts see whole lines
    console.print(shown)


def blob(path: Path, repo: Path) -> Path | None:
    """The blob that a file of a snapshot stands for, whose name is its digest; None where the cache keeps none.

    Args:
        path: of the file.
        repo: folder of the repository in the cache; a link that leads out of it is not followed.
    """
    if not path.is_symlink():
        return None
    target = path.parent / path.readlink()
    if target.parent.resolve() != (repo / "blobs").resolve():
        return None
    return target if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", target.name) else None


def digest(path: Path, length: int) -> str:
    """What the hub names a file by: the SHA-256 of large ones (64 digits), git's SHA-1 of others (40)."""
    hashed = hashlib.sha256() if length == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            hashed.update(chunk)
    return hashed.hexdigest()


def check(have: Cached, sha256: str | None) -> tuple[list[Path], list[Path]]:
    """Compare each file with the digest that the cache keeps of it.

    Returns:
        Files that are damaged, and files that cannot be checked: without symlinks the cache keeps no digests.

    Raises:
        CheckpointError: if a single file is whole, but not the one that its stage expects.
    """
    assert have.folder is not None
    damaged, unchecked = [], []
    for name in have.files:
        path = have.folder / name
        stored = blob(path, have.folder.parent.parent)
        expected = stored.name if stored is not None else sha256
        if expected is None:
            unchecked.append(path)
        elif digest(path, len(expected)) != expected.lower():
            damaged.append(path)
        elif sha256 is not None and expected.lower() != sha256.lower() and digest(path, 64) != sha256.lower():
            raise CheckpointError(f"{path} is as the hub has it, but its SHA-256 is not {sha256}, which is expected")
    return damaged, unchecked


def drop(path: Path, repo: Path) -> None:
    """Take a damaged file out of the cache, so that it is fetched anew."""
    from huggingface_hub import constants

    stored = blob(path, repo)
    if stored is None:
        path.unlink()
        return
    payload = stored.resolve()  # in newer caches perhaps shared with other repositories, for which it is damaged too
    stored.unlink()
    if payload.is_relative_to(Path(constants.HF_HUB_CACHE).expanduser().resolve()):
        payload.unlink(missing_ok=True)


def download(repo: str, file: str | None) -> None:
    """Bring into the hub's cache what a stage loads of a repository and is not there yet.

    Raises:
        CheckpointError: if the hub has it not, or does not give it; in one line with what to do.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if file is not None:
            hf_hub_download(repo, file)
            return
        info = HfApi().model_info(repo, files_metadata=True, timeout=10)
        names = loaded([sibling.rfilename for sibling in info.siblings or []], None)
        if _has_weights(names, None):
            snapshot_download(repo, allow_patterns=[glob.escape(name) for name in names])
            return
    except Exception as error:
        raise CheckpointError(_refused(repo, error, file)) from error
    raise CheckpointError(f"{repo} on the hub is no transformers checkpoint: config.json or weights are wanting")


def fetch(repo: str, file: str | None, sha256: str | None, why: str | None) -> tuple[Cached, list[Path]]:
    """Bring something into the cache and check it; what is damaged is fetched anew.

    Args:
        repo: on the hub.
        file: in it; None for a transformers checkpoint.
        sha256: that the file must have.
        why: the hub cannot be asked; None if it can.

    Returns:
        What there is, and which files could not be checked.

    Raises:
        CheckpointError: if it cannot be had, or is still damaged.
    """
    refused = None
    if why is None:
        try:
            download(repo, file)
        except CheckpointError as error:
            refused = error
    have = cached(repo, file)
    if not have.whole:
        raise refused or CheckpointError(f"{repo} is not in the cache, and the hub is not asked ({why})")
    damaged, unchecked = check(have, sha256)
    if not damaged:
        return have, unchecked
    said = ", ".join(map(str, damaged))
    if refused is not None or why is not None:
        raise CheckpointError(f"damaged in the cache: {said}; it cannot be fetched anew ({refused or why})")
    print(f"grounded-sam-models: damaged in the cache, fetched anew: {said}", file=sys.stderr)
    assert have.folder is not None
    for path in damaged:
        drop(path, have.folder.parent.parent)
    download(repo, file)
    have = cached(repo, file)
    damaged, unchecked = check(have, sha256)
    if damaged or not have.whole:
        raise CheckpointError(f"damaged again after it was fetched anew: {', '.join(map(str, damaged)) or repo}")
    return have, unchecked


def run_list(words: Sequence[str], extra: Sequence[str], as_json: bool) -> None:
    """What `grounded-sam-models list` does."""
    without: list[str] = []
    wrong: list[str] = []
    if words:
        found, without = needed([*extra, *words])
    else:
        found, wrong = every_choice(extra)
    rows, notes = table(found)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    else:
        if rows:
            show(rows)
        print(*without, sep="\n", end="\n" if without else "")
    for line in [*wrong, *notes]:
        print(f"grounded-sam-models: {line}", file=sys.stderr)


def run_fetch(words: Sequence[str]) -> None:
    """What `grounded-sam-models fetch` does.

    Raises:
        CheckpointError: for what could not be had, after everything else was.
    """
    from rich.filesize import decimal

    found, without = needed(words)
    for line in without:
        print(line)
    for weights in found:
        if weights.repo is None:
            part = weights.place is not None and weights.place.is_relative_to(BUILTIN)
            place = "is part of the package" if part else f"lies in {weights.place}"
            print(f"{weights}: {weights.checkpoint} {place}, there is nothing to fetch")
    wanted: dict[tuple[str, str | None, str | None], list[Weights]] = {}
    for weights in found:
        if weights.repo is not None:
            wanted.setdefault((weights.repo, weights.file, weights.sha256), []).append(weights)
    why = unreachable() if wanted else None
    failed = []
    for (repo, file, sha256), users in wanted.items():
        whose = ", ".join(map(str, users))
        try:
            have, unchecked = fetch(repo, file, sha256, why)
        except CheckpointError as error:
            failed.append(f"{whose}: {error}")
            continue
        checked = f"{len(have.files) - len(unchecked)} of {len(have.files)} digests right" if have.files else ""
        if unchecked:
            checked += "; the rest cannot be checked: without symlinks the cache keeps no digests"
        print(f"{whose}: {repo}, {decimal(have.present)}, {checked}, in {have.place(users[0])}")
    if failed:
        raise CheckpointError("\ngrounded-sam-models: ".join(failed))


def run_path(words: Sequence[str], typed: Sequence[str]) -> None:
    """What `grounded-sam-models path` does.

    Raises:
        CheckpointError: if something is not in the cache, with the command that fetches it.
    """
    found, _ = needed(words)
    missing = []
    for weights in found:
        if weights.repo is None:
            print(weights.place)
            continue
        have = cached(weights.repo, weights.file)
        if have.whole:
            print(have.place(weights))
        else:
            missing.append(f"{weights.repo} of {weights}")
    if missing:
        command = shlex.join(["grounded-sam-models", "fetch", *typed])
        raise CheckpointError(f"not in the cache: {', '.join(missing)}; get it with: {command}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows examples")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Command, words and options.

    Raises:
        ConfigError: for a command or an option that there is not.
    """
    parser = Parser(
        prog="grounded-sam-models",
        description=HELP,
        epilog=COMMANDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", metavar="list|fetch|path")
    parser.add_argument("words", nargs="*", help="key=value, as for grounded-sam")
    parser.add_argument("--json", action="store_true", help="with list: the same for scripts; null is unknown")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="FOLDER", help="of choices of your own")
    given = parser.parse_intermixed_args(arguments)
    if given.command is None:
        raise ConfigError(f"say {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}; --help shows examples")
    if given.command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(given.command, COMMANDS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"there is no command {given.command!r}; {meant}the commands are {', '.join(COMMANDS)}")
    if given.json and given.command != "list":
        raise ConfigError(f"--json goes with list, not with {given.command}")
    if given.config_dir is not None and not given.config_dir.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {given.config_dir}")
    return given


def main() -> None:
    """Entry point of `grounded-sam-models`: a user's mistake ends in one line and exit code 1."""
    try:
        given = parsed(sys.argv[1:])
        typed, extra = list(given.words), []
        if given.config_dir is not None:
            typed = [f"--config-dir={given.config_dir}", *typed]
            extra = [f"hydra.searchpath=[{word_of(f'file://{given.config_dir.resolve()}')}]"]
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the client's advice is not what was asked for
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if given.command == "list":
            run_list(given.words, extra, given.json)
        elif given.command == "fetch":
            run_fetch([*extra, *given.words])
        else:
            run_path([*extra, *given.words], typed)
    except (GroundedSamError, OSError) as error:
        sys.exit(f"grounded-sam-models: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

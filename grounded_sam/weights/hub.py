"""The command `grounded-sam-models`: which weights the stages take, fetching them ahead, and where they lie."""

from __future__ import annotations

import glob
import hashlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


#: What weights of a transformers checkpoint are called, and what is loaded if there are several of them.
WEIGHTS = (
    r"model\.safetensors",
    r"model-\d+-of-(\d+)\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-(\d+)\.bin",
)


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

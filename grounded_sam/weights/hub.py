"""The Hugging Face hub and its cache: what a stage loads, what is cached, downloading, verifying."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.errors import CheckpointError
from grounded_sam.files import home_path

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

#: Names of the weights of a transformers checkpoint, in the order of preference.
WEIGHT_FILES = (
    r"model\.safetensors",
    r"model-\d+-of-(\d+)\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-(\d+)\.bin",
)


@dataclass(frozen=True)
class HubFile:
    """A single file of weights on the hub.

    Attributes:
        repo: Hub id of the repository, or the local path or `builtin:NAME` that was given instead.
        name: Path of the file in the repository.
        sha256: SHA-256 of the file; None if unknown.
        kind: Kind of the model, for `builtin:`.
    """

    repo: str
    name: str
    sha256: str | None
    kind: str


@dataclass(frozen=True)
class WeightsSpec:
    """Weights that a stage loads, from the hub or from this machine.

    Attributes:
        stage: `detector`, `segmenter` or `tracker`.
        choice: Choice of that config group.
        key: Key of the config that names the checkpoint, such as `detector` or `detector.detectors.first`.
        checkpoint: The checkpoint, as it is named there.
        repo: Repository on the hub; None for local weights.
        file: File in `repo`; None for a transformers checkpoint.
        sha256: SHA-256 that the file must have; None if unknown.
        path: Path of local weights.
    """

    stage: str
    choice: str
    key: str
    checkpoint: str
    repo: str | None = None
    file: str | None = None
    sha256: str | None = None
    path: Path | None = None

    def __str__(self) -> str:
        inner = self.key.removeprefix(self.stage).lstrip(".")
        return f"{self.stage}={self.choice}" + (f" ({inner})" if inner else "")


@dataclass(frozen=True)
class CacheStatus:
    """State of a repository, or of one file in it, in the cache of the hub.

    Attributes:
        folder: Folder of the snapshot; None if there is none.
        files: Sizes in bytes of the files that are loaded, by name; None where unknown.
        cached_bytes: Bytes of them that are in the cache.
        is_complete: Whether all of them are in the cache.
    """

    folder: Path | None
    files: dict[str, int | None]
    cached_bytes: int
    is_complete: bool

    @property
    def size(self) -> int | None:
        """Bytes of all files; None if unknown."""
        sizes = [size for size in self.files.values() if size is not None]
        return sum(sizes) if self.files and len(sizes) == len(self.files) else None

    def path(self, file: str | None) -> Path:
        """Return the folder of the snapshot, or the path of a file in it."""
        assert self.folder is not None
        return self.folder / file if file is not None else self.folder


def files_to_load(names: Iterable[str], file: str | None) -> list[str]:
    """Select the files of a repository that a stage loads.

    If the weights exist in several formats, only one is selected, safetensors first; code is never selected.

    Args:
        names: All files of the repository.
        file: The only file needed; None for a transformers checkpoint.

    >>> files_to_load(["config.json", "model.safetensors", "pytorch_model.bin", "modeling.py"], None)
    ['config.json', 'model.safetensors']
    """
    names = list(names)
    if file is not None:
        return [name for name in names if name == file]
    top = [name for name in names if "/" not in name]
    texts = [n for n in top if n.endswith((".json", ".txt", ".jinja", ".model")) and not n.endswith(".index.json")]
    for pattern in WEIGHT_FILES:
        weights = [name for name in top if re.fullmatch(pattern, name)]
        if weights:
            index = f"{weights[0].split('-')[0]}{Path(weights[0]).suffix}.index.json"
            return sorted([*texts, *weights, *([index] if index in top and len(weights) > 1 else [])])
    return sorted(texts)


def _is_loadable(names: Iterable[str], file: str | None) -> bool:
    """Return whether these files are enough to load the model, as far as their names tell."""
    names = list(names)
    if file is not None:
        return file in names
    matches = [match for name in names for pattern in WEIGHT_FILES if (match := re.fullmatch(pattern, name))]
    num_parts = {int(match.group(1)) if match.re.groups else 1 for match in matches}
    return "config.json" in names and num_parts == {len(matches)}


def snapshot_folder(repo: str) -> Path | None:
    """Return the folder of the cache that a repository is loaded from offline; None if there is none."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = home_path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch("[0-9a-f]{40}", commit) and snapshot.is_dir() else None


def _cached_listing(repo: str) -> dict[str, int | None]:
    """Return the sizes of all files of a cached repository by name, as far as the cache knows them offline."""
    try:
        from huggingface_hub import get_cached_repo_tree  # missing in older clients

        return {file.path: file.size for file in get_cached_repo_tree(repo)}
    except Exception:  # there is no listing for files that were downloaded one by one
        return {}


def cache_status(repo: str, file: str | None, info: ModelInfo | None = None) -> CacheStatus:
    """Return the state of a repository, or of one file in it, in the cache.

    Args:
        repo: Hub id.
        file: File in the repository; None for a transformers checkpoint.
        info: Response of the hub for the repository; None if the hub was not contacted.
    """
    folder = snapshot_folder(repo)
    files: dict[str, int | None] = {}
    if info is not None and (folder is None or info.sha == folder.name):
        files = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    elif folder is not None:
        files = _cached_listing(repo)
    is_listed = bool(files)
    if folder is not None and not is_listed:
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    files = {name: files[name] for name in files_to_load(files, file)}
    if folder is None:
        return CacheStatus(None, files, 0, False)
    cached = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
    is_complete = _is_loadable(cached, file) and len(cached) == len(files)
    if not is_complete and not is_listed:  # there may be more files, of unknown size
        files = dict.fromkeys(files)
    return CacheStatus(folder, files, sum(cached.values()), is_complete)


def why_unreachable() -> str | None:
    """Return within seconds why the hub cannot be reached; None if it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        return f"{constants.ENDPOINT}: {_one_line(error)}"
    return None


def _one_line(error: Exception) -> str:
    """Return the message of a hub, network or disk error in one line.

    Raises:
        Exception: The error itself, if it is of another kind.
    """
    clients = ("httpx", "httpcore", "requests", "huggingface_hub", "hf_xet")
    if not isinstance(error, OSError | ValueError | RuntimeError) and not type(error).__module__.startswith(clients):
        raise error
    return " ".join(str(error).split()).split(" For more ")[0][:200] or type(error).__name__


def _explain_failure(repo: str, error: Exception, file: str | None = None) -> str:
    """Explain in one line why the hub did not return something, and what the user can do."""
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: accept its license at https://huggingface.co/{repo}, and when access is granted "
            "run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"repository {repo} not found; if it is private, set HF_TOKEN or run `hf auth login`"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} on the hub has no {file or 'such file'}"
    return f"cannot download {repo} from the hub: {_one_line(error)}"


def model_infos(repos: Iterable[str]) -> dict[str, ModelInfo | str]:
    """Ask the hub about repositories, in parallel; return for each the answer, or why there is none."""
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    def ask(repo: str) -> ModelInfo | str:
        try:
            return HfApi().model_info(repo, files_metadata=True, timeout=10)
        except Exception as error:
            return _explain_failure(repo, error)

    unique = list(dict.fromkeys(repos))
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(unique, pool.map(ask, unique), strict=True))


def known_models() -> dict[str, dict[str, Any]]:
    """Return license and gating by repository, as far as the package knows them offline.

    >>> known_models()["facebook/sam3"]["gated"]
    True
    """
    import yaml

    return yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))


def blob_path(path: Path, repo: Path) -> Path | None:
    """Return the blob that a file of a snapshot links to, whose name is its digest; None if there is none.

    Args:
        path: The file.
        repo: Folder of the repository in the cache; links that leave it are not followed.
    """
    if not path.is_symlink():
        return None
    target = path.parent / path.readlink()
    if target.parent.resolve() != (repo / "blobs").resolve():
        return None
    return target if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", target.name) else None


def hub_digest(path: Path, length: int) -> str:
    """Return the digest that the hub names a file by: SHA-256 for large files (64 digits), git's SHA-1 else (40)."""
    digest = hashlib.sha256() if length == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def verify_cache(status: CacheStatus, sha256: str | None) -> tuple[list[Path], list[Path]]:
    """Compare each file with the digest that the cache keeps of it.

    Args:
        status: What is in the cache.
        sha256: SHA-256 that a single file must have; None if unknown.

    Returns:
        Damaged files, and files that cannot be verified: without symlinks the cache keeps no digests.

    Raises:
        CheckpointError: If a single file is intact, but not the one that its stage expects.
    """
    assert status.folder is not None
    damaged, unverified = [], []
    for name in status.files:
        path = status.folder / name
        blob = blob_path(path, status.folder.parent.parent)
        expected = blob.name if blob is not None else sha256
        if expected is None:
            unverified.append(path)
        elif hub_digest(path, len(expected)) != expected.lower():
            damaged.append(path)
        elif sha256 is not None and expected.lower() != sha256.lower() and hub_digest(path, 64) != sha256.lower():
            raise CheckpointError(f"{path} matches the hub, but its SHA-256 is not the expected {sha256}")
    return damaged, unverified


def delete_from_cache(path: Path, repo: Path) -> None:
    """Delete a damaged file from the cache, so that it is downloaded again.

    Args:
        path: File of a snapshot.
        repo: Folder of the repository in the cache.
    """
    from huggingface_hub import constants

    blob = blob_path(path, repo)
    if blob is None:
        path.unlink()
        return
    payload = blob.resolve()  # newer caches may share it between repositories, for which it is damaged too
    blob.unlink()
    if payload.is_relative_to(home_path(constants.HF_HUB_CACHE).resolve()):
        payload.unlink(missing_ok=True)


def download_to_cache(repo: str, file: str | None) -> None:
    """Download the files of a repository that a stage loads and that are not in the cache.

    Raises:
        CheckpointError: If the hub does not have the files or denies access; the message says what to do.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if file is not None:
            hf_hub_download(repo, file)
            return
        info = HfApi().model_info(repo, files_metadata=True, timeout=10)
        names = files_to_load([sibling.rfilename for sibling in info.siblings or []], None)
        if _is_loadable(names, None):
            snapshot_download(repo, allow_patterns=[glob.escape(name) for name in names])
            return
    except Exception as error:
        raise CheckpointError(_explain_failure(repo, error, file)) from error
    raise CheckpointError(f"{repo} on the hub is not a transformers checkpoint: config.json or weights are missing")


def fetch_weights(
    repo: str,
    file: str | None,
    sha256: str | None,
    unreachable: str | None,
    on_damaged: Callable[[list[Path]], None],
) -> tuple[CacheStatus, list[Path]]:
    """Download weights to the cache and verify them; damaged files are downloaded again.

    Args:
        repo: Hub id.
        file: File in the repository; None for a transformers checkpoint.
        sha256: SHA-256 that the file must have; None if unknown.
        unreachable: Why the hub cannot be reached; None if it can.
        on_damaged: Called with damaged files before they are downloaded again.

    Returns:
        What is in the cache, and which files could not be verified.

    Raises:
        CheckpointError: If the weights cannot be downloaded, or are still damaged.
    """
    failure = None
    if unreachable is None:
        try:
            download_to_cache(repo, file)
        except CheckpointError as error:
            failure = error
    status = cache_status(repo, file)
    if not status.is_complete:
        raise failure or CheckpointError(f"{repo} is not in the cache, and the hub was not contacted ({unreachable})")
    damaged, unverified = verify_cache(status, sha256)
    if not damaged:
        return status, unverified
    if failure is not None or unreachable is not None:
        paths = ", ".join(map(str, damaged))
        raise CheckpointError(f"damaged in the cache: {paths}; cannot be downloaded again ({failure or unreachable})")
    on_damaged(damaged)
    assert status.folder is not None
    for path in damaged:
        delete_from_cache(path, status.folder.parent.parent)
    download_to_cache(repo, file)
    status = cache_status(repo, file)
    damaged, unverified = verify_cache(status, sha256)
    if damaged or not status.is_complete:
        raise CheckpointError(f"damaged again after a new download: {', '.join(map(str, damaged)) or repo}")
    return status, unverified

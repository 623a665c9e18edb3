"""Cache of image features on disk, for later runs on the same images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_number
from grounded_sam.files import atomic_write, home_path

if TYPE_CHECKING:
    from torch import Tensor


class FeatureCache:
    """On-disk LRU cache of image features, at most `gigabytes` large.

    Keys combine the pixels of the image with the weights and the precision of the model, so several models can share a
    folder. Files are safetensors, about 17 MB each for SAM 2. A file that cannot be read is deleted and counts as a
    miss. Several processes may share a folder.

    Args:
        folder: Folder of the files, created when the first one is written.
        gigabytes: Maximum total size in GB. The newest file is kept even if it alone exceeds the limit.

    Attributes:
        folder: As above.
        max_bytes: Largest total size in bytes.
        hits: Number of features that were read from the cache.
        misses: Number of features that were not in the cache.

    Raises:
        ConfigError: If `gigabytes` is not a positive number.
    """

    def __init__(self, folder: str | Path, gigabytes: float = 10.0) -> None:
        check_number("cache.gigabytes", gigabytes, 0, above=True)
        self.folder, self.max_bytes = home_path(folder), int(gigabytes * 1e9)
        self.hits = self.misses = 0

    def get(self, key: str, device: Any) -> Any:
        """Return the features stored under a key, or None.

        Args:
            key: Key of the features; see `feature_key`.
            device: Device of their tensors.
        """
        from safetensors import safe_open

        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                features = _unflatten(json.loads(file.metadata()["tree"]), tensors)
            os.utime(path)
        except Exception as error:  # damaged files make safetensors raise many kinds of error
            if not isinstance(error, FileNotFoundError):
                path.unlink(missing_ok=True)
            self.misses += 1
            return None
        self.hits += 1
        return features

    def put(self, key: str, features: Any) -> None:
        """Store features under a key, and delete old files if the cache has become too large.

        Args:
            key: Key of the features; see `feature_key`.
            features: Tensors in nested lists, tuples and mappings, which may also hold numbers, bools and None.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_flatten(features, tensors))
        with atomic_write(self.folder / f"{key}.safetensors", shared=True) as path:
            save_file(tensors, path, metadata={"tree": structure})
        self._evict(key)

    def _evict(self, newest: str) -> None:
        """Delete the least recently used files until the total size is within the limit, but never the newest file."""
        files = []
        for path in self.folder.glob("*.safetensors"):
            try:
                stat = path.stat()
            except OSError:  # another process has deleted it
                continue
            files.append((path.stem == newest, stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for is_newest, _, size, path in sorted(files, key=lambda file: file[:2]):
            if total <= self.max_bytes or is_newest:
                break
            if _has_features(path):  # else it is a file of somebody else, such as weights
                path.unlink(missing_ok=True)
                total -= size


def _has_features(path: Path) -> bool:
    """Return whether a file was written by the cache."""
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            return "tree" in (file.metadata() or {})
    except Exception:  # damaged files make safetensors raise many kinds of error
        return False


def _flatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Convert nested features to JSON types, and add their tensors to `tensors`."""
    import torch

    if isinstance(node, torch.Tensor):
        tensors[str(len(tensors))] = node.detach().contiguous().clone()
        return {"tensor": len(tensors) - 1}
    if isinstance(node, Mapping):
        return {"mapping": [[key, _flatten(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {type(node).__name__: [_flatten(value, tensors) for value in node]}
    return node


def _unflatten(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild features from the output of `_flatten`."""
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[str(value)]
    if kind == "mapping":
        return {key: _unflatten(item, tensors) for key, item in value}
    items = [_unflatten(item, tensors) for item in value]
    return items if kind == "list" else tuple(items)


def feature_key(image: NDArray[np.uint8], model: str) -> str:
    """Return the cache key of an image and a model, a SHA-256 digest.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        model: Description of the model and its settings.

    >>> len(feature_key(np.zeros((2, 2, 3), np.uint8), "sam2"))
    64
    """
    digest = hashlib.sha256(f"{model} {image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()

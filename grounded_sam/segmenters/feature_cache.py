"""What a segmenter makes of a picture before it is prompted, kept: in memory for a session, on disk for later runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class FeatureCache:
    """A folder of image features, within a bound: what was not used for longest goes first.

    Features are told by the pixels of the picture, the weights that made them and their precision, so that one folder
    serves all of these. Files are safetensors, of some 17 MB each for SAM 2. What cannot be read is as
    good as not there. Several processes may share a folder.

    Args:
        folder: made if it is not there.
        gigabytes: of files that are kept; what comes over it by one file may stay until the next is written.

    Raises:
        ConfigError: for a bound that is no positive number.
    """

    def __init__(self, folder: str | Path, gigabytes: float = 10.0) -> None:
        if isinstance(gigabytes, bool) or not isinstance(gigabytes, int | float) or not gigabytes > 0:
            raise ConfigError(f"cache.gigabytes must be a number above 0, got {gigabytes!r}")
        self.folder, self.most = Path(folder).expanduser(), int(gigabytes * 1e9)
        self.hits = self.misses = 0

    def get(self, key: str, device: Any) -> Any:
        """What was put under a key, or None."""
        from safetensors import safe_open

        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                tree = _planted(json.loads(file.metadata()["tree"]), tensors)
            os.utime(path)
        except Exception as error:  # damaged files make safetensors raise all sorts
            if not isinstance(error, FileNotFoundError):
                path.unlink(missing_ok=True)
            self.misses += 1
            return None
        self.hits += 1
        return tree

    def put(self, key: str, tree: Any) -> None:
        """Keep tensors, in lists, tuples and mappings with numbers and truths beside them."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        text = json.dumps(_felled(tree, tensors))
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{key}.{os.getpid()}.part"  # another process may be writing the same
        try:
            save_file(tensors, part, metadata={"tree": text})
            os.replace(part, self.folder / f"{key}.safetensors")
        finally:
            part.unlink(missing_ok=True)
        self._shrink(key)

    def _shrink(self, newest: str) -> None:
        """Drop files until the bound holds, those used last and the one just written last of all."""
        known = []
        for path in self.folder.glob("*.safetensors"):
            try:
                about = path.stat()
            except OSError:  # another process was faster
                continue
            known.append((path.stem == newest, about.st_mtime_ns, about.st_size, path))
        size = sum(entry[2] for entry in known)
        for new, _, bytes_, path in sorted(known, key=lambda entry: entry[:2]):
            if size <= self.most or new:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


def _felled(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON has it; its tensors go into `tensors`."""
    import torch

    if isinstance(tree, torch.Tensor):
        tensors[str(len(tensors))] = tree.detach().contiguous().clone()
        return {"tensor": len(tensors) - 1}
    if isinstance(tree, Mapping):
        return {"mapping": [[key, _felled(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_felled(value, tensors) for value in tree]}
    return tree


def _planted(text: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_felled` was given."""
    if not isinstance(text, dict):
        return text
    ((kind, value),) = text.items()
    if kind == "tensor":
        return tensors[str(value)]
    if kind == "mapping":
        return {key: _planted(item, tensors) for key, item in value}
    grown = [_planted(item, tensors) for item in value]
    return grown if kind == "list" else tuple(grown)


def feature_key(image: NDArray[np.uint8], weights: str) -> str:
    """A name for the features of a picture."""
    total = hashlib.sha256(f"{weights} {image.shape}".encode())
    total.update(np.ascontiguousarray(image).data)
    return total.hexdigest()

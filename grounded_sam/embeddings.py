"""What a segmenter makes of a picture before it is prompted, kept: in memory for a session, on disk for later runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.frames import Frame

if TYPE_CHECKING:
    from torch import Tensor

    from grounded_sam.segmenters.prompts import PromptedSegmenter


class Embeddings:
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


def digest(weights: Mapping[str, Any]) -> str:
    """A name for weights: the SHA-256 of their names, dtypes and bytes."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def key_of(image: NDArray[np.uint8], weights: str) -> str:
    """A name for the features of a picture."""
    total = hashlib.sha256(f"{weights} {image.shape}".encode())
    total.update(np.ascontiguousarray(image).data)
    return total.hexdigest()


class SegmentSession:
    """One picture, encoded once, and any number of prompts on it.

    >>> with model.session("cup.jpg") as session:                               # doctest: +SKIP
    ...     found = session.segment([{"class": "cup", "points": [[320, 200]]}])
    ...     found = session.segment([{"class": "cup", "points": [[320, 200], [300, 90]], "labels": [1, 0]}])

    Several may be open on one model, of the same picture or of others. Closing one frees its features.

    Args:
        segmenter: `sam`, `sam2`, `sam2_hf`, `sam_hq` and their kin.
        frame: the picture.
    """

    def __init__(self, segmenter: PromptedSegmenter, frame: Frame) -> None:
        self.segmenter, self.frame = segmenter, frame
        self._features: Any = segmenter.encoded(frame.image)

    def segment(self, prompts: Sequence[Mapping[str, Any]]) -> sv.Detections:
        """Masks of objects that someone points at.

        Args:
            prompts: entries as `detectors.clicks.Clicks` has them.

        Returns:
            As many detections in the same order, with `mask` and `data["mask_score"]`.

        Raises:
            ConfigError: if an entry is wrong; ImageError: if one lies outside the picture; ValueError: after `close`.
        """
        from grounded_sam.detectors.clicks import Clicks

        clicks = Clicks(prompts)
        return self.cut(clicks.detect([self.frame], clicks.vocabulary)[0])

    def cut(self, found: sv.Detections) -> sv.Detections:
        """Masks of boxes that a detector found in the picture.

        Raises:
            ValueError: after `close`.
        """
        if self._features is None:
            raise ValueError("the session is closed")
        return self.segmenter.cut(self.frame.image.shape[:2], found, self._features)  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of the features."""
        self._features = None

    def __enter__(self) -> SegmentSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

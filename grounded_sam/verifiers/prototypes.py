"""Prototypes: the mean embedding of a few example crops stands for a class, in place of words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.media.images import read_image
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.verifiers.crops import crop_square, dim_surroundings
from grounded_sam.verifiers.embedding import ImageTextModel

#: Margin of example crops around a box, as a multiple of its longer side.
MARGIN = 1.25
#: File beside the weights with the mean and the whitening of embeddings.
WHITENING = "whitening.safetensors"


@dataclass(frozen=True)
class _Example:
    """An image of an object.

    Attributes:
        image: RGB, `(H, W, 3) uint8`.
        box: Box of the object, xyxy in pixels, `(4,)`.
        mask: Its mask, `(H, W) bool`; None where it is unknown.
    """

    image: NDArray[np.uint8]
    box: NDArray[np.float64]
    mask: NDArray[np.bool_] | None = None


class Prototypes:
    """The prototypes of some classes.

    Embeddings are whitened first where the checkpoint has `whitening.safetensors`: what differs between objects of one
    class, such as their color, then counts less. The logit of a crop and a class is `scale * cosine + offset`.

    Args:
        network: Model that embeds the crops.
        settings: `scale`, `offset` and `turns` (whether examples are also used turned by 90, 180 and 270 degrees and
            mirrored), as the config of the checkpoint has them; None for those of no checkpoint, 20 and -14 and false,
            which are not fitted to anything.
        examples: By class a list of examples: an image (a path, or an RGB array), or
            `{image: a.jpg, box: [40, 60, 90, 300], mask: mask.png}`, where the last two may be left out.
        negative_examples: A list of examples of look-alikes.

    Attributes:
        classes: Names of the classes with examples.

    Raises:
        CheckpointError: If the settings of the checkpoint are malformed.
        ConfigError: If an example is malformed.
        ImageError: If the image of an example cannot be read.
    """

    def __init__(
        self,
        network: ImageTextModel,
        settings: Any = None,
        examples: Mapping[str, Any] | None = None,
        negative_examples: Any = None,
    ) -> None:
        if examples is not None and not isinstance(examples, Mapping):
            raise ConfigError(f"verify.examples must map classes to lists of images, got {examples!r}")
        self._network = network
        self.classes = tuple(map(str, examples or {}))
        if not self.classes and negative_examples:
            raise ConfigError("verify.negative_examples are compared with verify.examples, of which there are none")
        self._scale, self._offset, self._turns = _read_settings(settings)
        if not self.classes:
            return
        self._mean, self._whitening = self._read_whitening()
        means = [
            self._prototype(_read_examples(entries, f"verify.examples.{name}"))
            for name, entries in examples.items()  # type: ignore[union-attr]
        ]
        self._prototypes = np.stack(means)
        others = _read_examples(negative_examples, "verify.negative_examples") if negative_examples else []
        self._negatives = np.stack([self._prototype([example]) for example in others]) if others else None

    def check_classes(self, vocabulary: Vocabulary) -> None:
        """Check that all classes with examples are looked for.

        Raises:
            ConfigError: If the vocabulary lacks one.
        """
        unknown = [name for name in self.classes if vocabulary.index(name) is None]
        if unknown:
            raise ConfigError(
                f"verify.examples names classes that are not in text: {', '.join(map(repr, unknown))}; "
                f"text has {', '.join(map(repr, vocabulary.classes))}"
            )

    def logits(self, embeddings: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compare crops with the prototypes.

        Args:
            embeddings: Of the crops, `(n, d)`.

        Returns:
            Logits of each class, `(n, k)`, and of the most similar negative example or 0 if that is larger, `(n,)`.
        """
        whitened = self._whiten(embeddings)
        classes = self._scale * (whitened @ self._prototypes.T) + self._offset
        if self._negatives is None or not len(embeddings):
            return classes, np.zeros(len(embeddings))
        return classes, np.maximum((self._scale * (whitened @ self._negatives.T) + self._offset).max(1), 0.0)

    def _prototype(self, examples: list[_Example]) -> NDArray[np.float64]:
        """Return the normalized mean of the embeddings of examples, `(d,)`."""
        crops = [crop for example in examples for crop in self._crops(example)]
        mean = self._whiten(self._network.embed_crops(crops)).mean(0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-9), np.float64)

    def _crops(self, example: _Example) -> list[NDArray[np.uint8]]:
        """Return the crop of an example, and its turned and mirrored copies."""
        size = self._network.size
        crop = crop_square(example.image, example.box, MARGIN, size)
        if example.mask is not None:
            crop = dim_surroundings(crop, crop_square(example.mask, example.box, MARGIN, size, fill=0), 1.0)
        if not self._turns:
            return [crop]
        turned = [np.rot90(crop, k) for k in range(4)]
        return [np.ascontiguousarray(part) for part in (*turned, *(part[:, ::-1] for part in turned))]

    def _whiten(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Whiten and normalize embeddings."""
        whitened = (embeddings.astype(np.float64) - self._mean) @ self._whitening
        return np.asarray(whitened / np.linalg.norm(whitened, axis=1, keepdims=True).clip(1e-9), np.float64)

    def _read_whitening(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        size, folder = self._network.embedding_size, self._network.folder
        if folder is None or not (folder / WHITENING).is_file():
            return np.zeros(size), np.eye(size)
        from safetensors.numpy import load_file

        try:
            arrays = load_file(folder / WHITENING)
            mean, matrix = (np.asarray(arrays[name], np.float64) for name in ("mean", "matrix"))
            if mean.shape != (size,) or matrix.shape != (size, size) or not np.isfinite(matrix).all():
                raise ValueError(f"expected shapes {(size,)} and {(size, size)}, got {mean.shape} and {matrix.shape}")
        except Exception as error:  # damaged files make safetensors raise many kinds of error
            raise CheckpointError(f"cannot load {folder / WHITENING}: {' '.join(str(error).split())[:200]}") from error
        return mean, matrix


def _read_settings(settings: Any) -> tuple[float, float, bool]:
    """Read `scale`, `offset` and `turns`."""
    if settings is None:
        return 20.0, -14.0, False
    try:
        scale, offset = float(settings["scale"]), float(settings["offset"])
        if not (math.isfinite(scale + offset) and scale > 0):
            raise ValueError
        return scale, offset, bool(settings.get("turns", False))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"verification.examples in config.json must have a scale > 0 and an offset, got {settings!r}"
        ) from None


def _read_examples(entries: Any, where: str) -> list[_Example]:
    """Read example images.

    Args:
        entries: One or a list of: a path, an RGB array, or a mapping of `image` and optionally `box` and `mask`.
        where: Key that they come from, for messages.

    Raises:
        ConfigError: If an entry is malformed, or there is none.
        ImageError: If an image cannot be read.

    >>> _read_examples(np.zeros((8, 6, 3), np.uint8), "verify.examples.cup")[0].box.tolist()
    [0.0, 0.0, 6.0, 8.0]
    """
    listed = entries if isinstance(entries, list | tuple) else [entries]
    if not len(listed) or entries is None:
        raise ConfigError(f"{where} has no example")
    return [_read_example(entry, f"{where}[{i}]") for i, entry in enumerate(listed)]


def _read_example(entry: Any, where: str) -> _Example:
    fields = dict(entry) if isinstance(entry, Mapping) else {"image": entry}
    unknown = sorted(set(fields) - {"image", "box", "mask"})
    if unknown or fields.get("image") is None:
        problem = f"unknown key {unknown[0]!r}" if unknown else "image is missing"
        raise ConfigError(f"{where}: {problem}; expected an image, or its keys image, box and mask")
    image = _pixels(fields["image"])
    height, width = image.shape[:2]
    mask = None
    if fields.get("mask") is not None:
        given = fields["mask"]
        mask = given if isinstance(given, np.ndarray) else _pixels(given).max(2) > 127
        if mask.shape != (height, width) or not mask.any():
            raise ConfigError(f"{where}: expected a mask of {width}x{height} px that is not empty, got {mask.shape}")
        mask = np.asarray(mask, bool)
    box = fields.get("box")
    if box is None:
        return _Example(image, _box_of(mask) if mask is not None else np.array([0.0, 0, width, height]), mask)
    try:
        xyxy = np.array([float(value) for value in box])
    except (TypeError, ValueError):
        xyxy = np.full(1, np.nan)
    if xyxy.shape != (4,) or not np.isfinite(xyxy).all() or xyxy[0] >= xyxy[2] or xyxy[1] >= xyxy[3]:
        raise ConfigError(f"{where}: expected a box [x1, y1, x2, y2], got {box!r}")
    if xyxy[2] <= 0 or xyxy[3] <= 0 or xyxy[0] >= width or xyxy[1] >= height:
        raise ConfigError(f"{where}: the box {list(box)} lies outside its image, which is {width}x{height} px")
    return _Example(image, xyxy, mask)


def _box_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _pixels(image: Any) -> NDArray[np.uint8]:
    return image if isinstance(image, np.ndarray) else read_image(image)

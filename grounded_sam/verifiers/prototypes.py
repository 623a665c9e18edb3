"""Prototypes: the mean embedding of a few example crops stands for a class, in place of words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.formats.examples import read_example_classes
from grounded_sam.structures.examples import Example
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.verifiers.crops import crop_square, dim_surroundings
from grounded_sam.verifiers.embedding import ImageTextModel

#: Margin of example crops around a box, as a multiple of its longer side.
MARGIN = 1.25
#: File beside the weights with the mean and the whitening of embeddings.
WHITENING = "whitening.safetensors"


class Prototypes:
    """The prototypes of some classes.

    Embeddings are whitened first where the checkpoint has `whitening.safetensors`: what differs between objects of one
    class, such as their color, then counts less. The logit of a crop and a class is `scale * cosine + offset`.

    Args:
        network: Model that embeds the crops.
        settings: `scale`, `offset` and `turns` (whether examples are also used turned by 90, 180 and 270 degrees and
            mirrored), as the config of the checkpoint has them; None for those of no checkpoint, 20 and -14 and false,
            which are not fitted to anything.
        examples: Examples by class, see `formats.examples`; None for none.
        negative_examples: Examples of look-alikes; None for none.

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
        examples: Any = None,
        negative_examples: Any = None,
    ) -> None:
        self._network = network
        found = read_example_classes(examples, negative_examples, "verify.examples")
        self.classes = tuple(found.classes)
        self._scale, self._offset, self._turns = _read_settings(settings)
        if not self.classes:
            return
        self._mean, self._whitening = self._read_whitening()
        self._prototypes = np.stack([self._prototype(members) for members in found.classes.values()])
        others = [self._prototype([example]) for example in found.negatives]
        self._negatives = np.stack(others) if others else None

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

    def _prototype(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Return the normalized mean of the embeddings of examples, `(d,)`."""
        crops = [crop for example in examples for crop in self._crops(example)]
        mean = self._whiten(self._network.embed_crops(crops)).mean(0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-9), np.float64)

    def _crops(self, example: Example) -> list[NDArray[np.uint8]]:
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

"""Find images that look alike."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

#: Bits of the hash, split into bands of bits.
BANDS = (13, 13, 13, 13, 12)
#: Largest Hamming distance between the hashes of two near-duplicates; below the number of bands, so one band is equal.
MAX_BITS = 4
#: Largest mean difference of their thumbnails, in gray levels of 255.
MAX_GRAY_DIFFERENCE = 4


class NearDuplicates:
    """Group images by their difference hash (Krawetz 2013), confirmed by a thumbnail of 16x16 gray pixels.

    Two images are near-duplicates if their 64-bit hashes differ in at most 4 bits and their thumbnails by at most 4
    gray levels on average. It keeps 264 bytes and the name of each image.

    >>> duplicates = NearDuplicates()
    >>> image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    >>> for name, pixels in (("a", image), ("b", 255 - image), ("c", image)):
    ...     duplicates.add(name, pixels)
    >>> duplicates.groups()
    [['a', 'c']]
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._hashes: list[int] = []
        self._thumbnails: list[NDArray[np.uint8]] = []

    def add(self, name: str, image: NDArray[np.uint8]) -> None:
        """Add an image, RGB `(H, W, 3) uint8`."""
        import cv2

        small = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA)
        gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        cells = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA)
        bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
        self._names.append(name)
        self._hashes.append(int.from_bytes(np.packbits(bits).tobytes(), "big"))
        self._thumbnails.append(np.asarray(gray, np.uint8))

    def groups(self) -> list[list[str]]:
        """Return the names of near-duplicates, in groups of at least two.

        Hashes that differ in at most 4 bits are equal in at least one of five bands of bits, so only images with an
        equal band are compared.
        """
        groups = _DisjointSets(len(self._names))
        shift = 0
        for band in BANDS:
            buckets: dict[int, list[int]] = defaultdict(list)
            for i, code in enumerate(self._hashes):
                buckets[(code >> shift) & ((1 << band) - 1)].append(i)
            shift += band
            for members in buckets.values():
                self._join_alike(members, groups)
        by_root: dict[int, list[str]] = defaultdict(list)
        for i, name in enumerate(self._names):
            by_root[groups.root(i)].append(name)
        return [names for names in by_root.values() if len(names) > 1]

    def _join_alike(self, members: list[int], groups: _DisjointSets) -> None:
        """Join the near-duplicates among some images."""
        codes = np.array([self._hashes[i] for i in members], np.uint64)
        thumbnails = np.array([self._thumbnails[i] for i in members], np.int16)
        remaining = np.ones(len(members), bool)  # one image of a group is compared for all of it
        for k, i in enumerate(members):
            if not remaining[k]:
                continue
            near = np.flatnonzero(remaining & (np.bitwise_count(codes ^ codes[k]) <= MAX_BITS))
            near = near[np.abs(thumbnails[near] - thumbnails[k]).mean((1, 2)) <= MAX_GRAY_DIFFERENCE]
            remaining[near] = False
            for j in near:
                groups.join(members[j], i)


class _DisjointSets:
    """Union-find over `0, ..., size - 1`."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def root(self, i: int) -> int:
        """Return the representative of an element's set."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """Join the sets of two elements; the representative is that of `j`."""
        self._parent[self.root(i)] = self.root(j)

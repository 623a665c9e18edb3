"""Split an input between processes."""

from __future__ import annotations

import zlib
from typing import TypeVar

from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError

T = TypeVar("T")


def check_shard(shard: int, num_shards: int) -> None:
    """Check that `shard` is a valid index for `num_shards` shards.

    Raises:
        ConfigError: If it is not.
    """
    check_int("source.num_shards", num_shards, 1)
    check_int("source.shard", shard, 0)
    if shard >= num_shards:
        raise ConfigError(f"source.shard must be below source.num_shards={num_shards}, got {shard}")


def shard_of(items: list[T], shard: int, num_shards: int) -> list[T]:
    """Return a contiguous part of a list, so that a store written by several shards can be read in order.

    >>> shard_of([1, 2, 3, 4, 5], 1, 2)
    [3, 4, 5]
    """
    return items[len(items) * shard // num_shards : len(items) * (shard + 1) // num_shards]


def in_shard(name: str, shard: int, num_shards: int) -> bool:
    """Return whether a file is in a shard, which its name decides where the number of files is not known.

    >>> [in_shard("a.png", shard, 2) for shard in range(2)].count(True)
    1
    """
    return num_shards == 1 or zlib.crc32(name.encode("utf-8", "surrogatepass")) % num_shards == shard

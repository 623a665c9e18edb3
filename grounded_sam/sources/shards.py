"""Pictures from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

from grounded_sam.errors import ConfigError
from grounded_sam.media.prefetch import T


def check_shard(shard: int, num_shards: int) -> None:
    """Raise a ConfigError unless `shard` is one of `num_shards`."""
    for key, value, least in (("num_shards", num_shards, 1), ("shard", shard, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"source.{key} must be a whole number from {least}, got {value!r}")
    if shard >= num_shards:
        raise ConfigError(f"source.shard must be below source.num_shards={num_shards}, got {shard}")


def shard_of(items: list[T], shard: int, num_shards: int) -> list[T]:
    """One of so many parts of a list, in a row, so that what is stored by shards can be read in order."""
    return items[len(items) * shard // num_shards : len(items) * (shard + 1) // num_shards]

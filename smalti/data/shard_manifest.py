"""The list of shards that webdataset's tools write beside them (`index.json`): which there are, and their sizes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from smalti.data.shard_index import ShardIndex
from smalti.errors import DataError, StorageError
from smalti.storage.objects import ByteStore, MissingObjectError

MANIFEST = "index.json"
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Promise:
    """What a manifest says of one shard; None where it says nothing."""

    bytes: int | None
    examples: int | None


def read_manifest(store: ByteStore) -> dict[str, Promise] | None:
    """What is promised of each shard by name; None where there is no manifest.

    Raises:
        DataError: there is a file of that name that lists shards in a way that makes no sense.
    """
    try:
        if store.size(MANIFEST) > _MAX_BYTES:
            return None
        content = json.loads(store.read(MANIFEST))
    except (MissingObjectError, StorageError):
        # Some stores forbid what is not there. Where nothing at all can be read, the shards have said so before.
        return None
    except (ValueError, RecursionError):
        raise DataError(f"{store.place}: {MANIFEST} is no JSON; remove it or make it again") from None
    if not isinstance(content, dict) or "shardlist" not in content:
        return None
    promises: dict[str, Promise] = {}
    for row in content["shardlist"] if isinstance(content["shardlist"], list) else [None]:
        name = row.get("url") if isinstance(row, dict) else None
        numbers = [row.get(key) for key in ("filesize", "nsamples")] if isinstance(row, dict) else []
        if not isinstance(name, str) or not all(n is None or (type(n) is int and n >= 0) for n in numbers):
            raise DataError(f"{store.place}: {MANIFEST} has a shard {row!r}; expected url, filesize and nsamples")
        promises[name.rpartition("/")[2]] = Promise(*numbers)
    return promises


def check_manifest(store: ByteStore, shards: Sequence[ShardIndex], *, whole: bool) -> None:
    """Compare shards with what is promised of them, if anything is.

    Args:
        whole: all shards were asked for, so a promised one that is not there is missing.

    Raises:
        DataError: a shard is missing, or of another size or number of examples.
    """
    promises = read_manifest(store)
    if promises is None:
        return
    found = {shard.shard: shard for shard in shards}
    missing = [name for name in promises if name not in found]
    if whole and missing:
        raise DataError(
            f"{store.place}: {len(missing)} of {len(promises)} shards that {MANIFEST} lists are missing, such as "
            f"{missing[0]!r}; copy them again"
        )
    for name, promise in promises.items():
        shard = found.get(name)
        if shard is None:
            continue
        if promise.bytes is not None and promise.bytes != shard.bytes:
            raise DataError(
                f"{store.place}: {name!r} has {shard.bytes:,} bytes, {MANIFEST} says {promise.bytes:,}; copy it again"
            )
        # With rejected files, how many examples there are meant to be is for their own message to say.
        whole_shard = all(r.other for r in shard.rejected)
        if promise.examples is not None and whole_shard and promise.examples != len(shard):
            raise DataError(
                f"{store.place}: {name!r} has {len(shard):,} images, {MANIFEST} says {promise.examples:,}; make it "
                "again"
            )

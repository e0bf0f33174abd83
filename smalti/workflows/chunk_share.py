"""A process's share of a set that is made in chunks: which ones, and what it says if it ends before the set."""

from collections.abc import Sequence
from pathlib import Path

from smalti.errors import ConfigError, PreemptedError
from smalti.sampling.record import seeds_text
from smalti.storage.chunks import ChunkStore
from smalti.training.stop import StopRequest


def read_chunk_range(text: str, *, chunks: int, count: int, chunk_size: int) -> range:
    """`a:b` as chunk numbers, b not included; either may be left out. "" = all of them.

    Args:
        chunks: how many there are, of `count` images, `chunk_size` in each.

    Raises:
        ConfigError: not of that form, or no chunk of the set is in it.
    """
    if not text:
        return range(chunks)
    first, colon, last = text.partition(":")
    if not colon or any(part and not (part.isascii() and part.isdigit()) for part in (first, last)):
        raise ConfigError(f"--chunks {text!r}: expected a range of chunk numbers such as 0:8, 8: or :8")
    chosen = range(int(first or 0), min(int(last or chunks), chunks))
    if not chosen:
        raise ConfigError(
            f"--chunks {text}: there is no such chunk; these {count:,} images are cut into chunks of {chunk_size}, "
            f"numbered 0 to {chunks - 1}"
        )
    return chosen


def others_missing(wanted: range, missing: Sequence[int], chunks: int) -> str:
    """What a process with `--chunks` says when others have not made theirs."""
    return (
        f"chunks {wanted.start}:{wanted.stop} are stored; of all {chunks}, {len(missing)} are missing: "
        f"{seeds_text(list(missing))}. Whoever stores the last one finishes the set"
    )


def heed(stop: StopRequest, store: ChunkStore, out: Path) -> None:
    """End the work on `out` if that was asked for.

    Raises:
        PreemptedError: it was.
    """
    if stop.received is not None:
        stored = store.count - len(store.missing())
        raise PreemptedError(
            f"stopped by {stop.received.name}; {stored} of {store.count} chunks are stored, the same command continues "
            f"{out}"
        )

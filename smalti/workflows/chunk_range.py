"""Which chunks of a set a process is to make, as users of job arrays say it."""

from smalti.errors import ConfigError


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

"""The type checker behind the shape annotations; jaxtyping's pytest plugin is told of it in pyproject.toml."""

from beartype import BeartypeConf, beartype

# `int` where `float` is written is fine, as it is for mypy and Python's own rules (PEP 484, "the numeric tower").
_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """Check every call, except that configs are left alone: tests give them wrong values to see their own message."""
    return function if "Config." in function.__qualname__ else _typed(function)

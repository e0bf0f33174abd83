"""The type checker behind the shape annotations; jaxtyping's pytest plugin is told of it in pyproject.toml."""

from beartype import BeartypeConf, beartype

# `int` where `float` is written is fine, as it is for mypy and Python's own rules (PEP 484, "the numeric tower").
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

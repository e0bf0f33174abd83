"""Frozen dataclasses to plain dicts and back, strictly: an unknown key or a wrong type stops with a suggestion.

A field typed by an abstract config (one with a `kinds()` table) is stored as a dict with the key `kind`; that string,
never a Python class name, is what files contain.
"""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from smalti.errors import ConfigError

T = TypeVar("T")


LISTED = 24


class Kinds:
    """Base of abstract configs: a choice between several dataclasses, told apart by their `kind`."""

    kind: ClassVar[str]

    @classmethod
    def kinds(cls) -> dict[str, type]:
        """Every choice by its kind. Overridden once, by the abstract config, next to the table of its members."""
        raise NotImplementedError(f"{cls.__name__} has no table of kinds")


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, else the list; of a long one its beginning."""
    known = list(known)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    more = f", ... ({len(known)} in all)" if len(known) > LISTED else ""
    return f"; choose from {', '.join(known[:LISTED]) or 'nothing: none exist'}{more}"


def to_dict(config: Any) -> Any:
    """Plain dicts, lists, strings and numbers, ready for JSON or YAML."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        head = {"kind": config.kind} if isinstance(config, Kinds) else {}
        return head | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(cls: type[T], data: Any, where: str = "config") -> T:
    """Build `cls` from what `to_dict` made.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type; `where` names the place.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a table of settings, got {data!r}")
    data = dict(data)
    if issubclass(cls, Kinds):
        cls = _choose_kind(cls, data, where)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise ConfigError(f"{where}: unknown setting {name!r}{did_you_mean(str(name), fields)}")
    hints = typing.get_type_hints(cls)
    values = {name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing setting {', '.join(map(repr, missing))}")
    return cls(**values)


def replace(config: T, where: str = "override", **changes: Any) -> T:
    """`dataclasses.replace` with strict names and types, for values typed by a user."""
    hints = typing.get_type_hints(type(config))
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise ConfigError(f"{where}: unknown setting {name!r}{did_you_mean(name, names)}")
    return dataclasses.replace(config, **{n: _read(hints[n], v, f"{where} {n}") for n, v in changes.items()})  # type: ignore[type-var]


def _choose_kind(cls: Any, data: dict[str, Any], where: str) -> Any:
    own = getattr(cls, "kind", None)
    kind = data.pop("kind", own)
    table = {own: cls} if own is not None else cls.kinds()
    if kind is None:
        raise ConfigError(f"{where}: missing 'kind'; choose from {', '.join(table)}")
    if not isinstance(kind, str) or kind not in table:
        raise ConfigError(f"{where}: unknown kind {kind!r}{did_you_mean(str(kind), table)}")
    return table[kind]


def _read(hint: Any, value: Any, where: str) -> Any:
    """One value as its type hint asks; ints become floats, lists become tuples, nothing else is bent."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return _read(args[0], value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _read_union(args, value, where)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):  # True == 1, but is no choice for 1
            raise ConfigError(f"{where}: got {value!r}{did_you_mean(str(value), map(str, args))}")
        return value
    if origin in (tuple, list):
        return _read_sequence(origin, args, value, where)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Kinds)):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    right = isinstance(value, hint) and not (isinstance(value, bool) and hint in (int, float))
    if not right:
        raise ConfigError(f"{where}: expected {_name(hint)}, got {value!r}{_advice((hint,), value)}")
    return value


def _read_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    inside = []  # the value had one of the forms, with something wrong in it: that is what the user wants to hear
    for arg in args:
        try:
            return _read(arg, value, where)
        except ConfigError as error:
            if not str(error).startswith(f"{where}: expected ") and get_origin(arg) is not Literal:
                inside.append(error)
    if inside:
        raise inside[0]
    raise ConfigError(f"{where}: expected {' or '.join(map(_name, args))}, got {value!r}{_advice(args, value)}")


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is not None:
        return str(hint)
    return "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _advice(hints: tuple[Any, ...], value: Any) -> str:
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", value, re.IGNORECASE)
    return "; YAML reads 1e-4 as text: write 1.0e-4" if float in hints and number else ""


def _read_sequence(origin: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}: {list(value)!r}")
        return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    items = [_read(args[0] if args else Any, v, f"{where}[{i}]") for i, v in enumerate(value)]
    return tuple(items) if origin is tuple else items

"""One rule to choose between a reference and its twins: the first twin that does not refuse, else the reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Plain globals, because a compiler can read and guard them, which it cannot with context variables.
_forced = "auto"
_watcher: "Watcher | None" = None
whole: frozenset[str] = frozenset()  # set by `smalti.ops.whole.keep_whole`


@dataclass(frozen=True)
class Op:
    """A function with one meaning and several implementations.

    Args:
        reference: the definition; slow is fine.
        fast: twins in order of preference.
        refuses: "" when the named twin takes these inputs, else the reason why not.
        example: `example(tokens, dtype, seed)` makes inputs for tests and benchmarks.
        macs: multiply-adds of one call by kind of work ("attention", "fft", "scan", "kernel"), from the shapes alone:
            it gets the tensors and no options, and the tensors may hold no numbers.
        batched: positions of the arguments whose first dimension is the batch; None = all of them.
    """

    name: str
    reference: Callable[..., Tensor]
    fast: dict[str, Callable[..., Tensor]]
    refuses: Callable[[str, tuple[Tensor, ...]], str]
    example: Callable[..., tuple[Tensor, ...]]
    macs: Callable[..., dict[str, int]]
    batched: tuple[int, ...] | None = None

    def __call__(self, *args: Tensor, impl: str = "auto", **options: Any) -> Tensor:
        """Run one implementation.

        Args:
            impl: "auto", "reference" or a twin's name; `force()` sets it for a whole stretch of code.
            options: plain numbers that the op takes by name, such as the size of a shift.

        Raises:
            ValueError: there is no such implementation, or it cannot take these inputs.
        """
        if _watcher is not None:
            return _watcher(self, args, options)
        if self.name in whole and torch.compiler.is_compiling():
            text = "{" + ", ".join(f"{name!r}: {value!r}" for name, value in options.items()) + "}"
            return torch.ops.smalti.whole(self.name, args, text)
        asked_for = impl != "auto" or _forced != "auto"
        impl = self.choice(*args) if impl == "auto" else impl
        if impl == "reference":
            return self.reference(*args, **options)
        if impl not in self.fast:
            raise ValueError(
                f"op {self.name!r} has no implementation {impl!r}; choose from {['auto', 'reference', *self.fast]}"
            )
        if asked_for and (reason := self.refuses(impl, args)):  # what "auto" chose was asked already
            raise ValueError(f"op {self.name!r}: {impl!r} cannot take these inputs: {reason}")
        return self.fast[impl](*args, **options)

    def choice(self, *args: Tensor) -> str:
        """What "auto" means for these inputs, for a caller that keeps something for one twin; "" inside `watch`."""
        if _watcher is not None:
            return ""
        if _forced != "auto":
            return _forced
        return next((name for name in self.fast if not self.refuses(name, args)), "reference")


Watcher = Callable[[Op, tuple[Tensor, ...], dict[str, Any]], Tensor]


@contextmanager
def watch(watcher: Watcher | None) -> Iterator[None]:
    """Hand every call of an op to `watcher(op, args, options)` while the `with` lasts; what it returns is the result.

    For those who count instead of compute. None lets ops run as usual, also inside another `watch`.
    """
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


@contextmanager
def force(impl: str) -> Iterator[None]:
    """Make every op of the process, in all threads, use one implementation while the `with` lasts."""
    global _forced
    before, _forced = _forced, impl
    try:
        yield
    finally:
        _forced = before

"""Millions of names as a sequence that makes each when it is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import overload


class MadeNames(Sequence[str], ABC):
    """A sequence of names of which only one at a time is a string."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name at an index of `range(len(self))`."""

    @abstractmethod
    def spelled(self) -> Iterator[bytes | memoryview]:
        """The bytes of each name, as `os.fsencode` spells it in UTF-8."""

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self.name(i) for i in range(len(self))[index]]
        return self.name(range(len(self))[index])

    def __iter__(self) -> Iterator[str]:
        return (str(name, "utf-8", "surrogateescape") for name in self.spelled())

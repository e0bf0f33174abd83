"""From images to features: what a feature network is, and the one pass that fills a feature set."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from smalti.errors import DataError
from smalti.evaluation.moments import Moments

# What a network may put out, one row an image: `pool` (the vector before the classifier), `spatial` (a flattened piece
# of an early map) and `logits` (before the softmax).
KINDS = ("pool", "spatial", "logits")

_ROOM_NUMBERS = 1 << 24  # 64 MiB of float32: large enough that its memory goes back to the system at once


@dataclass(frozen=True)
class NetworkIdentity:
    """What makes features what they are; part of the protocol of every number.

    Attributes:
        name: `inception`, `lite0` or what the user calls a network; it appears in the names of numbers: FD-lite0.
        weights: SHA-256 of them.
        resize: how images come to the network's size, in words, as "299, bilinear as TensorFlow 1".
        numerics: dtype and device, as "float32 on cpu".
    """

    name: str
    weights: str
    resize: str
    numerics: str = "float32 on cpu"


@runtime_checkable
class FeatureNetwork(Protocol):
    """A network that sees finished images as 8-bit pixels and resizes them itself."""

    @property
    def identity(self) -> NetworkIdentity: ...

    @property
    def widths(self) -> Mapping[str, int]:
        """The kinds of features it makes, and the length of each."""

    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Mapping[str, Tensor]:
        """float32 (B, width) on the CPU for each kind."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of a set of images, one row an image and always in the same order; or statistics of them only.

    Attributes:
        features: float32 (N, width) by kind; may be empty.
        stated: moments that came as such, from a file of reference statistics; they stand before those of `features`.
    """

    features: Mapping[str, Tensor]
    stated: Mapping[str, Moments] = field(default_factory=dict)
    _computed: dict[str, Moments] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """Images with features; 0 when there are statistics only."""
        return len(next(iter(self.features.values()), ()))

    def moments(self, kind: str) -> Moments:
        """Mean and covariance of one kind.

        Raises:
            DataError: this set has no such features.
        """
        if kind in self.stated:
            return self.stated[kind]
        if kind not in self._computed:
            self._computed[kind] = Moments.of(self.rows(kind))
        return self._computed[kind]

    def rows(self, kind: str) -> Tensor:
        """float32 (N, width) of one kind.

        Raises:
            DataError: this set has none, or only statistics of them.
        """
        if kind not in self.features:
            have = ", ".join(self.features) or "none"
            raise DataError(
                f"this needs the {kind} features of every image, the set has {have}"
                + ("; statistics alone do not do, give images" if kind in self.stated else "")
            )
        return self.features[kind]

    def subset(self, indices: Sequence[int] | Tensor) -> "FeatureSet":
        """The same for some of the images; what was stated for all of them is left out."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return FeatureSet({kind: rows[chosen] for kind, rows in self.features.items()})


def extract(
    images: Iterable[Tensor],
    network: FeatureNetwork,
    *,
    kinds: Iterable[str] | None = None,
    micro_batch: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Features of a stream of images, in order.

    The network always sees `micro_batch` rows, the last batch padded with copies, so that features do not depend on
    how the stream is cut.

    Args:
        images: uint8 (B, 3, H, W) pieces, B as it comes; checked here, because they come from anywhere.
        kinds: which to keep; None = all that the network makes.
        on_batch: told how many images are done.

    Raises:
        DataError: no image, an image that is not 8-bit RGB, images of several sizes, or a feature that is not finite.
    """
    wanted = tuple(network.widths) if kinds is None else tuple(dict.fromkeys(kinds))
    if missing := [kind for kind in wanted if kind not in network.widths]:
        raise DataError(f"{network.identity.name} makes {', '.join(network.widths)}, not {', '.join(missing)}")
    gathered = {kind: _Gathered() for kind in wanted}
    done = 0
    for batch in _rebatched(images, micro_batch):
        real = len(batch)
        if real < micro_batch:
            batch = torch.cat([batch, batch[:1].expand(micro_batch - real, -1, -1, -1)])
        found = network(batch)
        for kind in wanted:
            rows = found[kind][:real]
            _refuse_non_finite(rows, done, kind, network.identity.name)
            gathered[kind].add(rows)
        done += real
        if on_batch is not None:
            on_batch(done)
    if not done:
        raise DataError("there is no image to look at; give a source that holds some")
    # One kind after the other: two copies of everything would not fit.
    return FeatureSet({kind: gathered.pop(kind).joined() for kind in wanted})


class _Gathered:
    """Rows that come in small batches, kept in rooms that grow.

    Small tensors of several kinds lie between one another in memory, and what one kind leaves free when it is joined
    does not go back to the system until the others are gone too: twice the memory at the end.
    """

    def __init__(self) -> None:
        self._rooms: list[Tensor] = []
        self._used = 0  # rows of the last room

    def add(self, rows: Tensor) -> None:
        while len(rows):
            if not self._rooms or self._used == len(self._rooms[-1]):
                # As large as all before it, so that few images take little.
                size = max(len(rows), min(sum(map(len, self._rooms)), _ROOM_NUMBERS // max(1, rows.shape[1])))
                self._rooms.append(rows.new_empty(size, *rows.shape[1:]))
                self._used = 0
            here = rows[: len(self._rooms[-1]) - self._used]
            self._rooms[-1][self._used : self._used + len(here)] = here
            self._used, rows = self._used + len(here), rows[len(here) :]

    def joined(self) -> Tensor:
        *full, last = self._rooms
        return torch.cat([*full, last[: self._used]])


def _rebatched(images: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The same images in batches of `rows`, the last one shorter."""
    waiting: list[Tensor] = []
    size: tuple[int, ...] | None = None
    count = seen = 0
    for batch in images:
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
            raise DataError(
                f"expected 8-bit RGB images (B, 3, H, W), got {batch.dtype} {tuple(batch.shape)}; convert them first"
            )
        size = size or tuple(batch.shape[2:])
        if tuple(batch.shape[2:]) != size:
            raise DataError(
                f"image {seen} is {batch.shape[2]} x {batch.shape[3]} pixels, those before it {size[0]} x {size[1]}; "
                "give images of one size"
            )
        seen += len(batch)
        waiting.append(batch)
        count += len(batch)
        if count >= rows:
            everything = torch.cat(waiting)
            whole = count // rows * rows
            yield from everything[:whole].split(rows)
            waiting, count = [everything[whole:]], count - whole
    if count:
        yield torch.cat(waiting)


def _refuse_non_finite(rows: Tensor, done: int, kind: str, network: str) -> None:
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        first = done + int(bad.nonzero()[0])
        raise DataError(
            f"{network}: the {kind} features of image {first} are not finite; its weights are damaged or the network "
            "overflows in this precision"
        )

"""Which image comes when, and which images training never sees: pure functions of a seed, with no state to save."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from smalti.data.grouping import equal_rows, in_parts, text_digests
from smalti.data.image_set import Catalogue
from smalti.errors import ConfigError, DataError
from smalti.streams import ORDER, SPLIT, key, permute, splitmix64

_MASK = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class Split:
    """Indices of an image set, int64 and rising; the two have no `split_name` in common."""

    train: np.ndarray
    validation: np.ndarray


def split(image_set: Catalogue, validation_fraction: float, seed: int, *, allow_empty: bool = False) -> Split:
    """Set images aside by name, so that all images of one name (skin tones, styles, twins) fall on the same side.

    Names are ranked by a key of (seed, name) and the first ones go to validation. Each name's key depends on no other
    name: adding images to a folder moves at most the names near the cut.

    Args:
        validation_fraction: of the names, in [0, 1); exactly `round(fraction * names)` names are set aside.
        allow_empty: accept classes all of whose images are set aside.

    Raises:
        ConfigError: the fraction is outside [0, 1).
        DataError: nothing is left to train on, a fraction above 0 sets nothing aside, or a class has images for
            validation only.
    """
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation fraction {validation_fraction} is outside [0, 1)")
    names = image_set.split_names
    parts = in_parts(text_digests(names, len(names)))
    again, first = equal_rows(parts)
    ranks = np.concatenate([np.zeros(0, np.uint64), *(_ranks(part[:, 0], seed) for part in parts)])
    del parts
    different = len(ranks) - len(again)
    count = round(validation_fraction * different)
    if count == different or (validation_fraction > 0 and count == 0):
        raise DataError(
            f"{image_set.name}: a validation fraction of {validation_fraction} sets {count} of {different} names "
            f"aside; choose another fraction or add images"
        )
    is_held_out = _first_by_rank(ranks, again, names, count)
    is_held_out[again] = is_held_out[first]
    train, validation = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if image_set.class_names and not allow_empty:
        classes = len(image_set.class_names)
        held = np.bincount(image_set.class_labels[validation], minlength=classes)
        unseen = np.flatnonzero((held > 0) & (held == np.bincount(image_set.class_labels, minlength=classes))).tolist()
        if unseen:
            shown = ", ".join(repr(image_set.class_names[label]) for label in unseen[:5])
            raise DataError(
                f"{image_set.name}: {len(unseen)} classes have no image left to train on ({shown}); add images to "
                f"them, choose another validation fraction or split seed, or set allow_empty"
            )
    return Split(train=train, validation=validation)


def _ranks(digests: np.ndarray, seed: int) -> np.ndarray:
    """`key(seed, SPLIT, id of the name)` for many names at once; Python's integers take minutes for millions.

    Args:
        digests: the first 8 bytes of the SHA-256 of each name.
    """
    state = splitmix64(splitmix64(splitmix64(seed & _MASK)) ^ splitmix64(SPLIT))
    return splitmix64_of(np.uint64(splitmix64(state)) ^ splitmix64_of(digests))


def _first_by_rank(ranks: np.ndarray, again: np.ndarray, names: Sequence[str], count: int) -> np.ndarray:
    """Which are the first `count` names when sorted by (rank, name).

    Args:
        again: those that come earlier already, and are not counted.
    """
    chosen = np.zeros(len(ranks), dtype=bool)
    if count == 0:
        return chosen
    different = np.delete(ranks, again)
    different.partition(count - 1)
    cut = different[count - 1]
    missing = count - int((different < cut).sum())
    chosen[ranks < cut] = True
    at_the_cut = np.setdiff1d(np.flatnonzero(ranks == cut), again).tolist()
    chosen[sorted(at_the_cut, key=lambda place: names[place])[:missing]] = True
    return chosen


def splitmix64_of(numbers: np.ndarray) -> np.ndarray:
    """`smalti.streams.splitmix64` of each of many uint64."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def permutation(size: int, permutation_key: int) -> np.ndarray:
    """`smalti.streams.permute` of 0, 1, ..., size - 1 at once, int64: the blocks of 14 million images are 200,000."""
    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    places, walking = np.arange(size, dtype=np.uint64), np.arange(size if size > 1 else 0)
    while len(walking):
        left, right = places[walking] >> half_bits, places[walking] & half_mask
        for round_index in range(12 if half_bits <= 2 else 6):
            mixed = splitmix64_of(np.uint64(permutation_key) ^ splitmix64_of(np.uint64(round_index << 60) | right))
            left, right = right, left ^ (mixed & half_mask)
        places[walking] = (left << half_bits) | right
        walking = walking[places[walking] >= size]
    return places.astype(np.int64)


@runtime_checkable
class Order(Protocol):
    """The endless sequence of training samples, with random access."""

    def __len__(self) -> int:
        """Samples per epoch: the number of training images."""
        ...

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index of the image) of the sample at a position, which is 0 or larger."""
        ...

    def replacement(self, index: int, attempt: int) -> int:
        """An image to take the place of one that cannot be read: from the same order, so never from validation."""
        ...


@runtime_checkable
class Blocked(Protocol):
    """A catalogue whose examples lie in blocks, and are read faster when those of a block come near to each other."""

    @property
    def block_starts(self) -> np.ndarray:
        """int64, rising from 0: the first example of each block."""

    @property
    def wants_blocks(self) -> bool:
        """Whether jumping about all of it would be slow, as in a store far away."""


def named_examples(catalogue: Catalogue, order: Order, positions: Sequence[int], *, listed: int = 5) -> str:
    """The examples at these positions, by name, for a message: the first few, and how many there are."""
    names = [repr(catalogue.item_names[order.at(position)[1]]) for position in positions[:listed]]
    return f"{len(positions)} examples: {', '.join(names)}{', ...' if len(positions) > listed else ''}"


def training_order(
    catalogue: Catalogue,
    train_indices: np.ndarray | Sequence[int],
    seed: int,
    *,
    class_balanced: bool = False,
    shuffle: str = "auto",
    window: int = 16,
) -> Order:
    """The order in which a run sees its training examples.

    Args:
        shuffle: full, blocks, or auto: blocks where the catalogue wants them.
        window: blocks that are mixed with each other.

    Raises:
        ConfigError: blocks of a catalogue that has none or together with `class_balanced`, or class-balanced order
            without classes.
        DataError: there is no image to draw from.
    """
    blocked = catalogue if isinstance(catalogue, Blocked) else None
    if shuffle == "blocks" and blocked is None:
        raise ConfigError(f"{catalogue.name} has no blocks to shuffle by; leave out --data.shuffle blocks")
    if shuffle == "blocks" and class_balanced:
        raise ConfigError("class-balanced order draws from everywhere; leave out --data.shuffle blocks")
    if (
        blocked is not None
        and not class_balanced
        and (shuffle == "blocks" or (shuffle == "auto" and blocked.wants_blocks))
    ):
        return BlockOrder(train_indices, blocked.block_starts, seed, window)
    labels = catalogue.class_labels if catalogue.class_names else None
    return SampleOrder(train_indices, seed, class_balanced=class_balanced, class_labels=labels)


class SampleOrder:
    """The endless sequence of training samples: each epoch a new permutation, with random access.

    Nothing is stored per epoch, so a resumed run asks for the next position and gets what it would have got.
    """

    def __init__(
        self,
        train_indices: np.ndarray | Sequence[int],
        seed: int,
        class_balanced: bool = False,
        class_labels: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            train_indices: images to draw from.
            class_balanced: draw every class equally often instead of every image. An epoch then is as long as before;
                images of small classes come several times in it, and those of large classes come in later epochs.
            class_labels: those of the *whole* image set; needed for `class_balanced` only.

        Raises:
            ConfigError: class-balanced order without labels.
            DataError: there is no image to draw from.
        """
        self._indices = np.asarray(train_indices, dtype=np.int64)
        self._seed = seed
        self._classes: list[np.ndarray] = []
        self._last_epoch = (-1, 0)
        if not len(self._indices):
            raise DataError("no training image to draw from; give a smaller validation fraction or more images")
        if class_balanced:
            if class_labels is None or not len(class_labels):
                raise ConfigError("class-balanced order was asked for, but the image set has no classes; turn it off")
            # One sort for all classes: a look at all labels for each class takes minutes for the 21,841 of ImageNet.
            # Of two bytes it is one of counting.
            labels = np.asarray(class_labels)
            labels = labels.astype(np.min_scalar_type(int(labels.max())))[self._indices]
            by_label = np.argsort(labels, kind="stable")
            labels, members = labels[by_label], self._indices[by_label]
            del by_label
            self._classes = np.split(members, np.flatnonzero(labels[1:] != labels[:-1]) + 1)

    def __len__(self) -> int:
        """Samples per epoch: the number of training images."""
        return len(self._indices)

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index of the image) of the sample at a position, which is 0 or larger."""
        epoch, place = divmod(position, len(self._indices))
        if not self._classes:
            # Only a shortcut: a fifth of a batch's time goes into recomputing a key that changes once an epoch.
            known = self._last_epoch
            if known[0] != epoch:
                known = self._last_epoch = (epoch, key(self._seed, ORDER, epoch))
            return epoch, int(self._indices[permute(place, len(self._indices), known[1])])
        # Rounds of all classes, each round in its own order, so that any stretch of the sequence is nearly balanced.
        classes = len(self._classes)
        round_number, turn = divmod(position, classes)
        label = permute(turn, classes, key(self._seed, ORDER, -1, round_number))
        # The class is drawn once a round: its r-th draw belongs to pass r // size through the class.
        members = self._classes[label]
        class_pass, rank = divmod(round_number, len(members))
        return epoch, int(members[permute(rank, len(members), key(self._seed, ORDER, class_pass, label))])

    def replacement(self, index: int, attempt: int) -> int:
        """An image to take the place of one that cannot be read: from the same order, so never from validation."""
        return int(self._indices[key(self._seed, ORDER, -2, index, attempt) % len(self._indices)])


class BlockOrder:
    """The endless sequence of training samples for examples that lie in blocks: near in the file, near in time.

    Each epoch lays the blocks in a new order, and mixes all examples of each `window` blocks that follow one another.
    So any batch touches the blocks of one window, or of two where it lies across their border. All of it is a function
    of (seed, epoch, position); what is kept is a table of blocks for the epoch asked for last.

    Args:
        train_indices: images to draw from, rising.
        block_starts: rising from 0: the first image of each block, of the *whole* set.
        window: how many blocks are mixed; all of them = as mixed as `SampleOrder`.

    Raises:
        ConfigError: the window is below 1.
        DataError: there is no image to draw from.
    """

    def __init__(
        self, train_indices: np.ndarray | Sequence[int], block_starts: np.ndarray, seed: int, window: int = 16
    ) -> None:
        self._indices = np.asarray(train_indices, dtype=np.int64)
        if window < 1:
            raise ConfigError(f"data.shuffle_window must be at least 1, got {window}")
        if not len(self._indices):
            raise DataError("no training image to draw from; give a smaller validation fraction or more images")
        if np.any(self._indices[1:] <= self._indices[:-1]):
            raise ValueError("the training images of an order of blocks must rise")
        first = np.searchsorted(self._indices, block_starts)
        sizes = np.diff(np.append(first, len(self._indices)))
        self._first, self._sizes = first[sizes > 0], sizes[sizes > 0]
        self._seed, self._window = seed, window
        self._last_epoch = (-1, self._first, self._first)

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self._indices))
        laid, ends = self._blocks_of(epoch)
        window = int(np.searchsorted(ends, place, side="right")) // self._window
        low, high = window * self._window, min((window + 1) * self._window, len(laid))
        start, stop = int(ends[low - 1]) if low else 0, int(ends[high - 1])
        mixed = start + permute(place - start, stop - start, key(self._seed, ORDER, -4, epoch, window))
        block = int(np.searchsorted(ends, mixed, side="right"))
        inside = mixed - (int(ends[block - 1]) if block else 0)
        return epoch, int(self._indices[self._first[laid[block]] + inside])

    def replacement(self, index: int, attempt: int) -> int:
        return int(self._indices[key(self._seed, ORDER, -2, index, attempt) % len(self._indices)])

    def _blocks_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in their order of an epoch, and how many examples there are up to the end of each."""
        # One tuple, read once: threads may ask for two epochs at the same time.
        known = self._last_epoch
        if known[0] != epoch:
            count, epoch_key = len(self._first), key(self._seed, ORDER, -3, epoch)
            laid = permutation(count, epoch_key)
            known = self._last_epoch = (epoch, laid, np.cumsum(self._sizes[laid]))
        return known[1:]

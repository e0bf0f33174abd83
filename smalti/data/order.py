"""Which image comes when, and which images training never sees: pure functions of a seed, with no state to save."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smalti.data.image_set import Catalogue
from smalti.errors import ConfigError, DataError
from smalti.streams import ORDER, SPLIT, key, permute


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
    names = set(image_set.split_names)
    count = round(validation_fraction * len(names))
    if count == len(names) or (validation_fraction > 0 and count == 0):
        raise DataError(
            f"{image_set.name}: a validation fraction of {validation_fraction} sets {count} of {len(names)} names "
            f"aside; choose another fraction or add images"
        )
    ranked = sorted(names, key=lambda name: (key(seed, SPLIT, _name_id(name)), name))
    held_out = set(ranked[:count])
    is_held_out = np.fromiter((name in held_out for name in image_set.split_names), dtype=bool, count=len(image_set))
    train, validation = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if image_set.class_names and not allow_empty:
        unseen = sorted({*image_set.class_labels[validation]} - {*image_set.class_labels[train]})
        if unseen:
            shown = ", ".join(repr(image_set.class_names[label]) for label in unseen[:5])
            raise DataError(
                f"{image_set.name}: {len(unseen)} classes have no image left to train on ({shown}); add images to "
                f"them, choose another validation fraction or split seed, or set allow_empty"
            )
    return Split(train=train, validation=validation)


def _name_id(name: str) -> int:
    # Python's own hash of a string differs between processes.
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


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
        self._indices = [int(i) for i in train_indices]
        self._seed = seed
        self._classes: list[list[int]] = []
        self._last_epoch = (-1, 0)
        if not self._indices:
            raise DataError("no training image to draw from; give a smaller validation fraction or more images")
        if class_balanced:
            if class_labels is None or not len(class_labels):
                raise ConfigError("class-balanced order was asked for, but the image set has no classes; turn it off")
            members: dict[int, list[int]] = {}
            for index in self._indices:
                members.setdefault(int(class_labels[index]), []).append(index)
            self._classes = [members[label] for label in sorted(members)]

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
            return epoch, self._indices[permute(place, len(self._indices), known[1])]
        # Rounds of all classes, each round in its own order, so that any stretch of the sequence is nearly balanced.
        classes = len(self._classes)
        round_number, turn = divmod(position, classes)
        label = permute(turn, classes, key(self._seed, ORDER, -1, round_number))
        # The class is drawn once a round: its r-th draw belongs to pass r // size through the class.
        members = self._classes[label]
        class_pass, rank = divmod(round_number, len(members))
        return epoch, members[permute(rank, len(members), key(self._seed, ORDER, class_pass, label))]

    def replacement(self, index: int, attempt: int) -> int:
        """An image to take the place of one that cannot be read: from the same order, so never from validation."""
        return self._indices[key(self._seed, ORDER, -2, index, attempt) % len(self._indices)]

"""What a network is trained on, whether images or latents: x0 of one shape, by place in the order of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from smalti.data.batch import load_batch
from smalti.data.image_set import Catalogue, ImageSet
from smalti.data.order import Order
from smalti.data.pixels import read_images
from smalti.latents import CodecFacts


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """Examples with everything that is known about them.

    Attributes:
        x0: images in [-1, 1], or latents scaled to about unit variance.
        class_labels: `None` when the set has no classes.
        indices: which examples of the set these are; where one could not be read, its replacement.
    """

    x0: Float[Tensor, "B C H W"]
    class_labels: Int[Tensor, "B"] | None
    indices: Int[Tensor, "B"]


@runtime_checkable
class Examples(Protocol):
    """A catalogue, and the way from its entries to x0."""

    @property
    def catalogue(self) -> Catalogue: ...

    @property
    def codec(self) -> CodecFacts:
        """Of the space that x0 lies in."""
        ...

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of x0."""
        ...

    @property
    def can_flip(self) -> bool:
        """Whether mirrored examples can be had."""
        ...

    def load(self, order: Order, positions: Sequence[int], *, flip: bool, seed: int) -> ExampleBatch:
        """The examples at these places of a run, each a pure function of (seed, position).

        Args:
            flip: mirror half of the images left to right, keyed by (seed, epoch, index).

        Raises:
            DataError: what cannot be read is more than can be replaced.
        """
        ...

    def x0(self, indices: Iterable[int]) -> Float[Tensor, "N C H W"]:
        """Whole examples by index, unmirrored; of latents the mean of the posterior.

        Raises:
            DataError: one of them cannot be read any more.
        """
        ...


@dataclass(frozen=True, eq=False)
class PixelExamples:
    """Images as they are."""

    images: ImageSet

    @property
    def codec(self) -> CodecFacts:
        return CodecFacts()

    @property
    def can_flip(self) -> bool:
        return True

    @property
    def catalogue(self) -> Catalogue:
        return self.images

    @cached_property
    def sample_shape(self) -> tuple[int, int, int]:
        return (3, *self.images.image_size)

    def load(self, order: Order, positions: Sequence[int], *, flip: bool, seed: int) -> ExampleBatch:
        batch = load_batch(self.images, order, positions, flip=flip, seed=seed)
        return ExampleBatch(batch.images, batch.class_labels, batch.indices)

    def x0(self, indices: Iterable[int]) -> Float[Tensor, "N C H W"]:
        return read_images(self.images, indices)

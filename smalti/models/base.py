"""What every backbone promises: a signature and a few shared settings, no shared code."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.config import Kinds
from smalti.errors import ConfigError
from smalti.nn.layers import Grid


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Kinds):
    """Settings that all backbones share."""

    sample_size: tuple[int, int] = (32, 32)  # rows and columns of the latents it is made for
    in_channels: int = 4
    num_classes: int = 1000  # 0 = unconditional
    null_class: bool = True  # one more label row, which label dropout and guidance need
    learned_variance: bool = True  # 2 C output channels: prediction, then variance fraction

    @classmethod
    def kinds(cls) -> dict[str, type]:
        from smalti.models import BACKBONES  # here, because the table imports every member and each imports this file

        return {kind: entry.config for kind, entry in BACKBONES.items()}

    @property
    def label_tables(self) -> int:
        """How many tables look the class up; `class_labels` may then be (B, tables), one label for each."""
        return 1

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)

    def __post_init__(self) -> None:
        rows, columns = self.sample_size
        if min(rows, columns, self.in_channels) < 1 or self.num_classes < 0:
            raise ConfigError(
                f"sample_size {rows}x{columns}, in_channels {self.in_channels} and num_classes {self.num_classes}: "
                "sizes must be at least 1 and num_classes at least 0"
            )


class Backbone(Protocol):
    """A network that looks at noisy latents and says what it was asked to predict."""

    config: BackboneConfig

    def __call__(
        self,
        latents: Float[Tensor, "B C H W"],
        timesteps: Float[Tensor, "B"] | Int[Tensor, "B"],
        class_labels: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B O H W"]: ...

    def iter_blocks(self) -> Iterator[nn.Module]:
        """The repeated parts, for whoever wraps, counts or compiles them one by one.

        Each has `branches()`: its modules whose output is added to the residual stream, perhaps behind a gate.
        """
        ...


@runtime_checkable
class Fusable(Protocol):
    """A network with another form of the same function for inference, in fewer numbers."""

    def fuse(self) -> nn.Module:
        """A new module; the network itself is left as it is."""
        ...


def patch_grid(latents: Tensor, in_channels: int, patch_size: int) -> Grid:
    """The grid of patches that latents are cut into.

    Raises:
        ValueError: latents have other dimensions or channels, or a side that the patch size does not divide.
    """
    p = patch_size
    if latents.ndim != 4 or latents.shape[1] != in_channels or latents.shape[2] % p or latents.shape[3] % p:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)}: expected (B, {in_channels}, H, W) "
            f"with H and W divisible by the patch size {p}"
        )
    return Grid(latents.shape[2] // p, latents.shape[3] // p)


def check_timesteps(timesteps: Tensor, latents: Tensor) -> None:
    """One timestep for all would broadcast, and hide a slip.

    Raises:
        ValueError: there is not one timestep for each image.
    """
    if timesteps.shape != latents.shape[:1]:
        raise ValueError(f"timesteps of shape {tuple(timesteps.shape)}: expected one per image, {len(latents)} in all")


def check_patches(sample_size: tuple[int, int], patch_size: int) -> None:
    """Refuse a patch size that does not cut latents of this size evenly.

    Raises:
        ConfigError: as it says.
    """
    rows, columns = sample_size
    if patch_size < 1 or rows % patch_size or columns % patch_size:
        raise ConfigError(
            f"latents of {rows}x{columns} cannot be cut into patches of {patch_size}: "
            "choose a patch_size that divides both"
        )

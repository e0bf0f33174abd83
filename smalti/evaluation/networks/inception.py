"""The Inception network that FID, sFID and the Inception Score are defined by: TensorFlow's graph of 2015-12-05.

The blocks are those of Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision",
arXiv:1512.00567, sec. 6 and figures 5 to 7. Layers are called as in the graph and its well-known conversion to PyTorch:
the network is foreign and frozen, its files are the only weights it will ever have, and a second set of names would
have to be learnt beside theirs.

Batch norm is folded into the convolutions when weights are loaded, so the network has no other mode than inference.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import CheckpointError, ConfigError, DataError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.networks.inception_weights import (
    find_inception_weights,
    progress_on_terminal,
    read_inception_weights,
)
from smalti.evaluation.networks.resize import resize_tf1
from smalti.ops.float32 import whole_float32
from smalti.storage.tensors import differences, load_tensors, shapes_of, tensors_digest

SIZE = 299
WIDTHS = {"pool": 2048, "spatial": 17 * 17 * 7, "logits": 1008}
# Averages of earlier maps, which pytorch-fid offers as --dims; only for those who ask.
EARLY_WIDTHS = {"feat64": 64, "feat192": 192, "feat768": 768}

_BATCH_NORM_EPSILON = 0.001
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


class Convolution(nn.Conv2d):
    """Convolution, batch norm folded into it, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        same: bool = True,
    ) -> None:
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if same else (0, 0)
        super().__init__(in_channels, out_channels, (rows, columns), stride=stride, padding=padding)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O rows columns"]:
        return super().forward(x).relu_()


class PoolBranch(Convolution):
    """Average over 3 x 3 places, then 1 x 1 convolution; done in the other order, on fewer channels.

    The two commute because averages at the border are taken over the places that exist, so their weights add up to 1
    and the bias passes.
    """

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O H W"]:
        # PARITY: border-averages. The graph does not count padding, though many reimplementations do.
        return F.avg_pool2d(self._conv_forward(x, self.weight, self.bias), 3, 1, 1, count_include_pad=False).relu_()


class MixedA(nn.Module):
    """35 x 35: figure 5."""

    def __init__(self, in_channels: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(in_channels, 64)
        self.branch5x5_1 = Convolution(in_channels, 48)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(in_channels, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = PoolBranch(in_channels, pool_channels)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(x)], dim=1)


class MixedB(nn.Module):
    """35 x 35 to 17 x 17: figure 10."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(in_channels, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = Convolution(in_channels, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], dim=1)


class MixedC(nn.Module):
    """17 x 17, with 7 x 7 convolutions taken apart: figure 6."""

    def __init__(self, in_channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(in_channels, 192)
        self.branch7x7_1 = Convolution(in_channels, inner)
        self.branch7x7_2 = Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(in_channels, inner)
        self.branch7x7dbl_2 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Convolution(inner, 192, (1, 7))
        self.branch_pool = PoolBranch(in_channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(x)], dim=1)


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(in_channels, 192)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = Convolution(in_channels, 192)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], dim=1)


class MixedE(nn.Module):
    """8 x 8, with 3 x 3 convolutions spread out: figure 7."""

    def __init__(self, in_channels: int, pool: Literal["average", "maximum"]) -> None:
        super().__init__()
        self.branch1x1 = Convolution(in_channels, 320)
        self.branch3x3_1 = Convolution(in_channels, 384)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(in_channels, 448)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        average = pool == "average"
        self.branch_pool = PoolBranch(in_channels, 192) if average else Convolution(in_channels, 192)
        self.pool = nn.Identity() if average else nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(parts, dim=1)


class InceptionFID(nn.Module):
    """The network, from images resized to 299 pixels and scaled to about -1 to 1, to every kind of features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, same=False)
        self.Mixed_5b = MixedA(192, pool_channels=32)
        self.Mixed_5c = MixedA(256, pool_channels=64)
        self.Mixed_5d = MixedA(288, pool_channels=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, inner=128)
        self.Mixed_6c = MixedC(768, inner=160)
        self.Mixed_6d = MixedC(768, inner=160)
        self.Mixed_6e = MixedC(768, inner=192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, pool="average")
        # PARITY: last-pool-maximum. The same block before it averages; the graph takes the maximum here.
        self.Mixed_7c = MixedE(2048, pool="maximum")
        self.fc = nn.Linear(2048, WIDTHS["logits"])
        self.requires_grad_(False)

    def forward(self, x: Float[Tensor, "B 3 299 299"], early: Sequence[str] = ()) -> dict[str, Tensor]:
        """`pool`, `spatial` and `logits`, each (B, width), and those of `EARLY_WIDTHS` that are asked for."""
        found: dict[str, Tensor] = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        if "feat64" in early:
            found["feat64"] = x.mean(dim=(2, 3))
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)  # (B, 192, 35, 35)
        if "feat192" in early:
            found["feat192"] = x.mean(dim=(2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # (B, 768, 17, 17)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        # The graph's tensor mixed_6/conv is the first branch of this block, and the graph lays channels out last.
        found["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(x)
        if "feat768" in early:
            found["feat768"] = x.mean(dim=(2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        found["pool"] = x.mean(dim=(2, 3))
        # PARITY: logits-without-bias. The Inception Score's first code left it out, and all suites since.
        found["logits"] = F.linear(found["pool"], self.fc.weight)
        return found


class InceptionNetwork:
    """`InceptionFID` as a feature network: 8-bit images of any size in, float32 features on the CPU out.

    Args:
        tensors: weights under the names of the conversion to PyTorch.
        name: `inception` for the published weights, which alone give numbers called FID; otherwise another name.
        kinds: what to give, of `pool`, `spatial`, `logits`, `feat64`, `feat192` and `feat768`.
        device: cpu, cuda, cuda:N or mps. Always float32; settings that shorten it (TF32, bfloat16 products) and
            autocast are off while it runs, and as they were afterwards.
        where: what the weights are called in messages.

    Raises:
        CheckpointError: the tensors are not exactly those of this network.
        ConfigError: no such kind.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        name: str = "inception-custom",
        kinds: Sequence[str] = tuple(WIDTHS),
        device: str | torch.device = "cpu",
        where: str = "these weights",
    ) -> None:
        every = WIDTHS | EARLY_WIDTHS
        for kind in kinds:
            if kind not in every:
                raise ConfigError(
                    f"Inception has no features {kind!r}{did_you_mean(kind, every)}; it has {list(every)}"
                )
        self._widths = {kind: every[kind] for kind in kinds}
        self._device = torch.device(device)
        with torch.device("meta"):
            model = InceptionFID()
        folded = fold_batch_norm(tensors, model, where)
        model = model.float().to_empty(device="cpu")  # whatever the default dtype of the process is
        load_tensors(model, folded, where)
        # torch's own signature of `to` leaves the memory format out.
        self._model = model.to(device=self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._identity = NetworkIdentity(
            name=name,
            weights=tensors_digest(_without_counters(tensors)),
            resize=f"{SIZE}, bilinear as TensorFlow 1, (x - 128) / 128",
            numerics=f"float32 on {self._device.type}",
        )

    @property
    def identity(self) -> NetworkIdentity:
        """`weights` is the digest of the tensors, without counters of training: the same in every kind of file."""
        return self._identity

    @property
    def widths(self) -> Mapping[str, int]:
        """The kinds of features it makes, and the length of each."""
        return self._widths

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """Features of uint8 (B, 3, H, W).

        Raises:
            DataError: images of another form.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise DataError(f"expected 8-bit RGB images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        early = [kind for kind in self._widths if kind in EARLY_WIDTHS]
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False), whole_float32():
            found = self._model(inception_input(images.to(self._device)), early)
            kept = {kind: found[kind].cpu() for kind in self._widths}
        # Outside, so that these are ordinary tensors, which whoever gets them may change.
        return {kind: rows.clone() for kind, rows in kept.items()}


def build_inception(rest: str, device: str) -> InceptionNetwork:
    """The network that `inception` or `inception:PATH` names.

    It is called inception only when the file is the published one, byte for byte: a conversion of that file to another
    form gives the same features under the name inception-custom, because nothing says that it is what it claims.

    Raises:
        ConfigError: something else stands behind the name.
        CheckpointError: the weights are missing, damaged, or not of this network.
    """
    if rest and (not rest.startswith(":") or len(rest) == 1):
        raise ConfigError(f"'inception{rest}': expected inception, or inception:PATH with the file of its weights")
    path = find_inception_weights(Path(rest[1:]) if rest else None, on_progress=progress_on_terminal)
    weights = read_inception_weights(path)
    name = "inception" if weights.published else "inception-custom"
    return InceptionNetwork(weights.tensors, name=name, device=device, where=str(path))


def inception_input(images: Tensor) -> Float[Tensor, "B 3 299 299"]:
    """8-bit images as the network takes them: resized, then (x - 128) / 128."""
    # PARITY: centre-128. Black becomes -1 and white 0.9922; images scaled evenly to -1 to 1 give another FID.
    resized = resize_tf1(images, SIZE).sub_(128).div_(128)
    return resized.contiguous(memory_format=torch.channels_last)


def fold_batch_norm(tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> dict[str, Tensor]:
    """Weights of the conversion, which has batch norms, as those of `InceptionFID`, which has none.

    Computed in float64. `num_batches_tracked`, a counter of training that some files have, is left out.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or not floating point, or not finite.
    """
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, Convolution)}
    expected = {"fc.weight": (WIDTHS["logits"], WIDTHS["pool"]), "fc.bias": (WIDTHS["logits"],)}
    for name, layer in convolutions.items():
        expected[f"{name}.conv.weight"] = tuple(layer.weight.shape)
        expected |= {f"{name}.bn.{part}": (layer.out_channels,) for part in _BATCH_NORM}
    tensors = _without_counters(tensors)
    if table := differences(expected, shapes_of(tensors)):
        raise CheckpointError(f"{where}: not the weights of the FID Inception network: {' '.join(table.split())[:300]}")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where}: {key} ({tensor.dtype}) is not made of finite numbers; fetch the file anew")
    folded = {key: tensors[key].float() for key in ("fc.weight", "fc.bias")}
    for name in convolutions:
        weight, bias, mean, variance = (tensors[f"{name}.bn.{part}"].double() for part in _BATCH_NORM)
        if bool((variance < 0).any()):
            raise CheckpointError(f"{where}: {name}.bn.running_var has values below 0; fetch the file anew")
        scale = weight / (variance + _BATCH_NORM_EPSILON).sqrt()
        kernel = tensors[f"{name}.conv.weight"].double()
        folded[f"{name}.weight"] = (kernel * scale[:, None, None, None]).float()
        folded[f"{name}.bias"] = (bias - mean * scale).float()
    return folded


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}

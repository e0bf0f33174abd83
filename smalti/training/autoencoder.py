"""Training a small `AutoencoderKL`: what is learned, step by step, and the network as it is handed on.

The released autoencoders add a discriminator and a perceptual network; here is neither, so that it runs in minutes on a
processor. What they are for, sharp edges, is asked for by comparing differences between neighbouring pixels.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smalti import streams
from smalti.checkpoints.shards import StoredCheckpoint
from smalti.data.examples import Examples
from smalti.data.order import SampleOrder
from smalti.errors import CheckpointError, ConfigError, NumericError
from smalti.latents.vae import CLASS, CONFIG, WEIGHTS, network_class
from smalti.storage.filesystem import LocalFileSystem
from smalti.storage.replacing import replace_file
from smalti.storage.tensors import file_pieces
from smalti.training.config import OptimizerConfig
from smalti.training.optim import learning_rate

_SCALES = 3  # at which edges are compared: full size, a half, a quarter
_ROWS = 64  # images at once where nothing is learned


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """One autoencoder: the same settings give the same bits, and the same command again continues it.

    Args:
        out: folder for the autoencoder in diffusers' layout, log, checkpoints and a picture of reconstructions.
        data: image set or folder of images, as in `smalti train`.
        image_size: side in pixels; None = the set's own.
        flip: mirror half of the images.
        validation_fraction: share of the images that it never sees. The same as in `smalti train` by default, so that
            images that a diffusion model is validated on are unknown to both.
        widths: channels of each stage; each after the first halves rows and columns.
        layers_per_block: residual blocks of each stage.
        latent_channels: of what it encodes to.
        steps: optimizer steps.
        batch_size: images per step.
        learning_rate: its peak; it rises for the first fiftieth of the steps and then falls to 0 by a cosine.
        kl_weight: of the posterior's distance from a unit normal variable, in nats per latent value.
        edge_weight: of differences between neighbouring pixels, beside the pixels' own.
        clip_norm: limit on the global gradient norm.
        log_every, validate_every, checkpoint_every: in steps.
    """

    out: Path = Path("runs/autoencoder")
    data: str = "emoji32"
    image_size: int | None = None
    flip: bool = False
    validation_fraction: float = 0.125
    seed: int = 0
    widths: tuple[int, ...] = (16, 32, 64)
    layers_per_block: int = 1
    latent_channels: int = 4
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 3e-3
    kl_weight: float = 1e-4
    edge_weight: float = 0.5
    clip_norm: float = 1.0
    device: str = "auto"
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "layers_per_block", "latent_channels", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("kl_weight", "edge_weight", "validate_every"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1 or any(width % self.norm_groups for width in self.widths):
            raise ConfigError(f"widths must be multiples of 8 (or all the same multiple of 4), got {self.widths}")

    @property
    def factor(self) -> int:
        """Pixels per latent, along rows and along columns."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def norm_groups(self) -> int:
        """Of each normalisation."""
        return 8 if all(width % 8 == 0 for width in self.widths) else 4


@dataclass(frozen=True)
class AutoencoderReport:
    """One finished step; the loss is pixels + edge_weight * edges + kl_weight * kl."""

    step: int
    loss: float
    pixels: float
    edges: float
    kl: float
    grad_norm: float
    learning_rate: float


@dataclass
class AutoencoderState:
    """Everything that changes."""

    network: Any
    optimizer: torch.optim.AdamW
    step: int = 0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups of named tensors, as `CheckpointStore.save` takes them."""
        optimizer = {
            f"{name}.{key}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {"model": self.network.state_dict(), "optimizer": optimizer}

    def restore(self, stored: StoredCheckpoint) -> None:
        """Become what was stored.

        Raises:
            CheckpointError: the checkpoint belongs to another network.
        """
        try:
            self.network.load_state_dict(stored.tensors["model"])
            for name, parameter in self.network.named_parameters():
                state = self.optimizer.state[parameter]
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    value = stored.tensors["optimizer"][f"{name}.{key}"]
                    # With the strides of the parameter: the fused kernel walks through the memory of both.
                    like = parameter.detach() if key != "step" else value.to(parameter.device)
                    state[key] = torch.empty_like(like).copy_(value)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{stored.path} is a checkpoint of another network: {reason}") from error
        self.step = stored.step


def new_autoencoder(config: AutoencoderConfig, image_size: tuple[int, int], device: torch.device) -> AutoencoderState:
    """Step 0: weights drawn from the run's seed.

    Raises:
        ConfigError: diffusers is not installed, or it does not build such a network.
    """
    stages = len(config.widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.key(config.seed, streams.INIT) & (2**63 - 1))
        network = network_class()(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=tuple(config.widths),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            sample_size=image_size[0],
            scaling_factor=1.0,  # `normalised` sees to it
            mid_block_add_attention=False,
        )
    network = network.train().to(device=device, memory_format=torch.channels_last)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=fused
    )
    return AutoencoderState(network, optimizer)


def autoencoder_steps(
    state: AutoencoderState, examples: Examples, order: SampleOrder, config: AutoencoderConfig
) -> Iterator[AutoencoderReport]:
    """Train from `state.step` to `config.steps`, changing `state` in place; every choice is a function of the step.

    Raises:
        NumericError: a loss or gradient is not finite; the weights are those before it.
    """
    schedule = OptimizerConfig(
        learning_rate=config.learning_rate, warmup_steps=config.steps // 50, decay="cosine", clip_norm=config.clip_norm
    )
    parameters = list(state.network.parameters())
    device = parameters[0].device
    while state.step < config.steps:
        rate = learning_rate(schedule, state.step, config.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        positions = range(state.step * config.batch_size, (state.step + 1) * config.batch_size)
        images = examples.load(order, positions, flip=config.flip, seed=config.seed).x0
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        mean, log_variance = _posterior(state.network, images)
        eps = torch.empty(mean.shape)
        for row, position in zip(eps, positions, strict=True):
            row.normal_(generator=streams.generator(config.seed, streams.POSTERIOR, position))
        reconstructed = state.network.decode(mean + torch.exp(0.5 * log_variance) * eps.to(device)).sample
        pixels, edges = (reconstructed - images).abs().mean(), edge_distance(reconstructed, images)
        kl = kl_divergence(mean, log_variance)
        loss = pixels + config.edge_weight * edges + config.kl_weight * kl
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        values = torch.stack([loss, pixels, edges, kl, norm]).tolist()
        if not all(map(math.isfinite, values)):
            raise NumericError(
                f"step {state.step + 1}: loss {values[0]}, gradient norm {values[4]}; lower --learning-rate and start "
                "again, which continues from the last checkpoint"
            )
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        loss_value, pixels_value, edges_value, kl_value, norm_value = values
        yield AutoencoderReport(state.step, loss_value, pixels_value, edges_value, kl_value, norm_value, rate)


def edge_distance(images: Float[Tensor, "B C H W"], reference: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Mean distance of the differences between neighbours, at full size, a half and a quarter."""
    found = []
    for scale in range(_SCALES):
        if scale:
            images, reference = F.avg_pool2d(images, 2), F.avg_pool2d(reference, 2)
        error = images - reference
        found += [error.diff(dim=axis).abs().mean() for axis in (-1, -2) if error.shape[axis] > 1]
    return torch.stack(found).mean()


def kl_divergence(mean: Float[Tensor, "B C H W"], log_variance: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """From the posterior to unit normal variables, in nats per latent value.

    Source: Kingma & Welling 2013, arXiv:1312.6114, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


@torch.no_grad()
def normalise(network: Any, examples: Examples, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Change the latents, channel by channel, to mean 0 and standard deviation 1 over these images.

    The last layer of the encoder and the first of the decoder are 1 x 1 convolutions: what is subtracted and divided by
    in the one is undone in the other, so images are reconstructed as before.

    Returns:
        Mean and standard deviation of each channel as they were, the spread of the posteriors included.
    """
    device = next(network.parameters()).device
    total, squares, count = torch.zeros(0), torch.zeros(0), 0
    for start in range(0, len(indices), _ROWS):
        mean, log_variance = _posterior(network, examples.x0(indices[start : start + _ROWS]).to(device))
        mean, variance = mean.double().cpu(), log_variance.double().exp().cpu()
        total = mean.sum((0, 2, 3)) + (total if count else 0)
        squares = (mean.square() + variance).sum((0, 2, 3)) + (squares if count else 0)
        count += mean[:, 0].numel()
    mean = total / count
    std = (squares / count - mean.square()).sqrt()
    channels = len(mean)
    shift, scale = mean.to(device), std.to(device)
    encoder, decoder = network.quant_conv, network.post_quant_conv
    weight, bias = encoder.weight.double(), encoder.bias.double()
    weight[:channels] /= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) / scale
    bias[channels:] -= 2 * scale.log()
    encoder.weight.copy_(weight)
    encoder.bias.copy_(bias)
    weight = decoder.weight.double()
    decoder.bias.copy_(decoder.bias.double() + (weight[:, :, 0, 0] @ shift))
    decoder.weight.copy_(weight * scale[:, None, None])
    return mean, std


def save_autoencoder(folder: Path, network: nn.Module) -> None:
    """Write `config.json` and the weights as diffusers does.

    Raises:
        OSError: the disk is full or refuses.
    """
    settings = {name: value for name, value in dict(network.config).items() if not name.startswith("_")}  # type: ignore[arg-type]
    config = {"_class_name": CLASS, "_diffusers_version": "0.36.0", **settings}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    replace_file(LocalFileSystem(), folder / WEIGHTS, file_pieces(tensors))
    replace_file(LocalFileSystem(), folder / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])


def _posterior(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance, within the bounds of diffusers' own."""
    mean, log_variance = network.encode(images).latent_dist.parameters.chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)

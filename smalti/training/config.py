"""The settings of a training run. What a user would not set by hand is not a field."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import ConfigError
from smalti.sampling import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from.

    Args:
        path: emoji32 (shipped), emoji64 (`smalti data build emoji64`), or a folder of images, one sub-folder per
            class or none.
        image_size: side in pixels; None = the set's own size. Folders need one.
        flip: mirror half of the images; wrong where sides mean something, as in flags and letters.
        class_balanced: draw every class equally often instead of every image.
        skip_unreadable: leave out files that cannot be read instead of stopping.
        validation_fraction: share of the images, split by name, that training never sees.
    """

    path: str = "emoji32"
    image_size: int | None = None
    flip: bool = False
    class_balanced: bool = False
    skip_unreadable: bool = False
    validation_fraction: float = 0.125


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate over time.

    Args:
        learning_rate: its peak.
        warmup_steps: linear rise from 0 to the peak.
        decay: constant (the papers) or cosine, down to 0 at the last step.
        clip_norm: limit on the global gradient norm; None = off.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {self.betas}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0 (or left out), got {self.clip_norm}")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError("warmup_steps and weight_decay must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Samples of the averaged weights, measured against the training images while the run goes on.

    Always the same seeds, drawn as `preview` says: numbers of one run compare with one another, and with nothing else.

    Args:
        every: in steps, and at the end of the run; 0 = never.
        images: samples per look; below some thousand, kid is the number to trust.
        metrics: names as in `smalti evaluate`.
        features: feature network: inception, lite0, lite0@96, dinov2.
        reference_images: how many training images stand for all of them.
    """

    every: int = 0
    images: int = 500
    metrics: tuple[str, ...] = ("kid",)
    features: str = "inception"
    reference_images: int = 10_000

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"quality.every must be 0 (never) or more, got {self.every}")
        if min(self.images, self.reference_images) < 2:
            raise ConfigError("quality.images and quality.reference_images must be at least 2: one has no spread")
        if not self.metrics:
            raise ConfigError("quality.metrics is empty: name at least one, such as kid")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: the same settings give the same bits, and the same command again continues it.

    Args:
        out: run folder: settings, log, checkpoints, samples and the finished model.
        model: preset name (`smalti presets` lists them).
        override: changes to the preset, as name=value: `--override depth=6 patch_size=4`.
        steps: optimizer steps.
        batch_size: images per step.
        micro_batch: images per forward pass; gradients of a step are summed over them. None = the whole batch.
        precision: fp32, or bf16 autocast around fp32 weights.
        stochastic_depth: share of images that leave out the residual branches of the deepest blocks in training, less
            for earlier ones; 0 = none. Diffusion-RWKV's released training uses 0.1.
        ema_decay: None = suited to `steps`; see docs/guide/train.md.
        seed: of everything random in the run.
        device: auto = cuda, else mps, else cpu.
        log_every, validate_every, sample_every: in steps, and at the end of the run; 0 = never.
        checkpoint_every: likewise; the end is always stored.
        keep_checkpoints: how many of the newest stay.
        preview: how the sample grids of the run are drawn.
        quality: metrics while training.
    """

    out: Path = Path("runs/train")
    model: str = "dit-emoji32"
    override: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 10_000
    batch_size: int = 64
    micro_batch: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    stochastic_depth: float = 0.0
    ema_decay: float | None = None
    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    validate_every: int = 500
    sample_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    preview: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(sampler="dpm-solver++", num_inference_steps=25, guidance_scale=2.0)
    )
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise ConfigError(f"micro_batch {self.micro_batch} must be between 1 and batch_size {self.batch_size}")
        if not 0 <= self.stochastic_depth < 1:
            raise ConfigError(f"stochastic_depth must be in [0, 1), got {self.stochastic_depth}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name in ("log_every", "validate_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 (never) or more, got {getattr(self, name)}")


# A run with other values of these is another run: its samples, noise or weights would not follow from the stored ones.
IDENTITY = (
    "model",
    "override",
    "data",
    "objective",
    "optimizer",
    "batch_size",
    "seed",
    "stochastic_depth",
    "ema_decay",
)

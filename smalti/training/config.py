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
        path: emoji32 (shipped), emoji64 (`smalti data build emoji64`), a folder of images, one sub-folder per class
            or none, tar shards, or latents made by `smalti encode`; shards and latents may lie behind a URL.
        image_size: side in pixels; None = the set's own size. Folders need one.
        flip: mirror half of the images; wrong where sides mean something, as in flags and letters.
        class_balanced: draw every class equally often instead of every image.
        skip_unreadable: leave out files that cannot be read instead of stopping.
        validation_fraction: share of the images, split by name, that training never sees.
        posterior: of latents, train on samples of what an image is encoded as, fresh in every epoch, or on its mean.
        shuffle: full = any example may follow any other; blocks = examples near to each other in their files come near
            to each other in time, for shards that are slow to jump about in; auto = blocks where a set asks for it.
        shuffle_window: blocks that are mixed with each other.
        workers: processes that read ahead; 0 = none. They change no bit of the run.
    """

    path: str = "emoji32"
    image_size: int | None = None
    flip: bool = False
    class_balanced: bool = False
    skip_unreadable: bool = False
    validation_fraction: float = 0.125
    posterior: Literal["sample", "mean"] = "sample"
    shuffle: Literal["auto", "full", "blocks"] = "auto"
    shuffle_window: int = 16
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"data.workers must be 0 (none) or more, got {self.workers}")
        if self.shuffle_window < 1:
            raise ConfigError(f"data.shuffle_window must be at least 1, got {self.shuffle_window}")


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
        reference: other images to measure against, as `smalti evaluate --reference` takes them; "" = the training
            images, which of latents are decoded ones.
    """

    every: int = 0
    images: int = 500
    metrics: tuple[str, ...] = ("kid",)
    features: str = "inception"
    reference_images: int = 10_000
    reference: str = ""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"quality.every must be 0 (never) or more, got {self.every}")
        if min(self.images, self.reference_images) < 2:
            raise ConfigError("quality.images and quality.reference_images must be at least 2: one has no spread")
        if not self.metrics:
            raise ConfigError("quality.metrics is empty: name at least one, such as kid")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes that `torchrun` started share a run; for a single process, only what saves memory or time.

    Args:
        strategy: ddp = each holds the whole state; fsdp = each holds a part of it; hsdp = parts within groups of
            `shard_size` processes, copies between the groups; auto = ddp for several processes.
        shard_size: of hsdp; None = the processes of one machine.
        reshard: give gathered weights up between forward and backward; False takes memory for less communication.
        activation_checkpointing: what the backward pass computes again instead of keeping it: nothing, all but matrix
            products and mixers (selective), or whole blocks (full).
        compile: torch.compile, each block alone.
        timeout_minutes: how long a process waits for the others before the run ends and says who is missing.
    """

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    shard_size: int | None = None
    reshard: bool = True
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.shard_size is not None and (self.shard_size < 1 or self.strategy != "hsdp"):
            raise ConfigError(
                f"parallel.shard_size {self.shard_size} must be at least 1 and goes with strategy hsdp, not "
                f"{self.strategy}"
            )
        if not self.timeout_minutes > 0:
            raise ConfigError(f"parallel.timeout_minutes must be above 0, got {self.timeout_minutes}")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What becomes of steps that would harm the weights. A loss or gradient that is not finite is always skipped.

    Args:
        skip_budget: the run stops when more than this many of the last 1000 steps were skipped.
        spike_factor: also skip steps whose gradient norm is above this many running medians; None = only log the norm.
        spike_floor: norms below this are never a spike.
        on_spike: skip the step, or rewind: go back to the newest checkpoint and leave out the batch of the spike.
    """

    skip_budget: int = 10
    spike_factor: float | None = None
    spike_floor: float = 0.0
    on_spike: Literal["skip", "rewind"] = "skip"

    def __post_init__(self) -> None:
        if self.skip_budget < 0:
            raise ConfigError(f"guard.skip_budget must be 0 or more, got {self.skip_budget}")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ConfigError(f"guard.spike_factor must be above 1 (or left out), got {self.spike_factor}")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Checkpoints beyond the newest ones, and how they are written.

    Args:
        keep_every: checkpoints of steps divisible by this stay for good; None = only the newest.
        keep_best: the one with the lowest validation loss stays, too.
        wait: stand still until a checkpoint is on the disk, instead of copying it in memory and training on.
        mirror: URL (s3://, gs://, ...) of a folder to copy each checkpoint to; a run that finds none on its disk
            continues from there.
    """

    keep_every: int | None = None
    keep_best: bool = False
    wait: bool = False
    mirror: str = ""

    def __post_init__(self) -> None:
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"store.keep_every must be at least 1 (or left out), got {self.keep_every}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: the same settings give the same bits, and the same command again continues it.

    Args:
        out: run folder: settings, log, checkpoints, samples and the finished model.
        model: preset name (`smalti presets` lists them).
        override: changes to the preset, as name=value: `--override depth=6 patch_size=4`.
        steps: optimizer steps.
        batch_size: images per step.
        micro_batch: images per forward pass and process; gradients of a step are summed over them. None = all of the
            process's share. Halved by itself where memory does not suffice.
        precision: fp32; tf32, in which CUDA rounds the factors of products to 10 bits, forward and backward, and other
            devices do as in fp32; or bf16 autocast around fp32 weights. Previews in tf32 are drawn in fp32.
        stochastic_depth: share of images that leave out the residual branches of the deepest blocks in training, less
            for earlier ones; 0 = none. Diffusion-RWKV's released training uses 0.1.
        ema_decay: None = suited to `steps`; see docs/guide/train.md.
        seed: of everything random in the run.
        device: auto = cuda, else mps, else cpu.
        log_every: steps between two lines in the log; the end of the run has one, too; 0 = never.
        validate_every: steps between two measurements of the validation loss; 0 = at the end alone.
        sample_every: steps between two preview pictures; the end of the run has one, too; 0 = never.
        checkpoint_every: steps between two checkpoints; 0 = none but that of the end, which is always stored.
        keep_checkpoints: how many of the newest stay.
        preview: how the sample grids of the run are drawn.
        store: more about checkpoints.
        guard: what is done about steps that would harm the weights.
        parallel: several processes, memory and compilation.
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
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
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
    store: StoreConfig = field(default_factory=StoreConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
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
    "guard",
)
# Parts of the above that change no sample, noise or weight.
INCIDENTAL = ("data.workers",)

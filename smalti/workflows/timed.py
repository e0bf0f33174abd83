"""A network that is ready to be timed: inputs of the right shape, a forward as in sampling, a step as in training."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smalti import streams
from smalti.cost import Gemm, count_macs, measure_interleaved, peak_memory, peak_memory_refusal
from smalti.diffusion import LevelBatch, ObjectiveConfig, build_schedule
from smalti.errors import ConfigError
from smalti.models import BackboneConfig, InferenceForm, InferenceMode, build_backbone, compile_refusal, inference_form
from smalti.training import EMA, RunConfig, TrainState, train_steps
from smalti.training.batches import BatchSource, TrainBatch
from smalti.training.device import autocast
from smalti.training.optim import build_optimizer

Precision = Literal["fp32", "bf16", "bf16-weights"]
Mode = InferenceMode
Work = Literal["forward", "training"]

TRAINING_FORWARDS = 3  # the backward pass has two products for each one of the forward


@dataclass(frozen=True)
class WorkTime:
    """Measured seconds, bytes and floors of one piece of work.

    Args:
        floors: seconds as multiples of the work's multiply-adds at this machine's rate of a large matrix product in
            the dtype of the work, timed in turns with it; a training step is three forwards.
        fp32_floors: the same with the float32 rate, which compares all precisions.
        peak_added_bytes: None where memory cannot be read.
    """

    seconds: float
    fastest: float
    floors: float
    fp32_floors: float
    gemm_gmacs_per_second: float
    fp32_gemm_gmacs_per_second: float
    peak_added_bytes: int | None
    peak_bytes: int | None


def matrix_dtype(precision: str) -> torch.dtype:
    """What the matrix products of a precision compute in."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def refusal(precision: str, mode: str, work: str) -> str:
    """ "" when this combination means something, else the reason why not."""
    if work == "training" and mode == "frozen":
        return "frozen weights cannot be trained"
    if work == "training" and precision == "bf16-weights":
        return "training keeps float32 weights"
    return ""


class TimedNetwork:
    """A freshly built network with inputs.

    Args:
        precision: fp32; bf16 = autocast around float32 weights; bf16-weights = the inference form in bfloat16.
        mode: of the inference form, and "compiled" also of training.
    """

    def __init__(
        self, config: BackboneConfig, batch: int, precision: Precision, device: torch.device, mode: Mode = "eager"
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._model = build_backbone(config).to(device)
            _move_from_zero(self._model)
        normal = partial(torch.randn, generator=streams.generator(0, streams.NOISE))
        x0 = normal(batch, config.in_channels, *config.sample_size)
        labels = torch.arange(batch) % config.num_classes if config.num_classes else None
        levels: LevelBatch = build_schedule("linear").at((torch.arange(batch) + 0.5) / batch)
        self._latents, self._timesteps = x0.to(device), levels.timesteps.float().to(device)
        self._labels = None if labels is None else labels.to(device)
        eps = normal(*x0.shape)
        self._batches = FixedBatches(TrainBatch(x0, labels, eps, levels, range(batch)))
        self._precision, self._mode, self._device = precision, mode, device
        self._inference: InferenceForm | None = None
        self._steps: Any = None

    def forward(self) -> Tensor:
        """As in sampling with an inference form.

        Raises:
            ConfigError: nothing can be compiled here, and the mode asks for it.
        """
        if self._inference is None:
            dtype = torch.bfloat16 if self._precision == "bf16-weights" else torch.float32
            self._inference = inference_form(self._model, dtype=dtype, mode=self._mode)
            if self._inference.mode != self._mode:
                raise ConfigError(f"mode {self._mode!r}: {compile_refusal(self._device)}")
        with autocast(self._device, self._precision):
            return self._inference(self._latents, self._timesteps, self._labels)

    def training_step(self) -> object:
        """One turn of the loop that `smalti train` runs, without reading images.

        Raises:
            ConfigError: this precision or mode is for inference only.
        """
        if reason := refusal(self._precision, self._mode, "training"):
            raise ConfigError(reason)
        if self._steps is None:
            precision: Literal["fp32", "bf16"] = "fp32" if self._precision == "fp32" else "bf16"
            run = RunConfig(steps=10**9, batch_size=len(self._batches.batch), precision=precision)
            state = TrainState(self._model, EMA(self._model, 0.999), build_optimizer(self._model, run.optimizer))
            if self._mode == "compiled":
                self._model.compile(dynamic=False)
            self._steps = train_steps(state, self._batches, run)
        return next(self._steps)


class FixedBatches(BatchSource):
    """Always the same batch, so that only the step itself is timed."""

    batch: TrainBatch

    def __init__(self, batch: TrainBatch) -> None:
        object.__setattr__(self, "batch", batch)  # the base is frozen
        object.__setattr__(self, "objective", ObjectiveConfig())

    def at(self, start: int, count: int) -> TrainBatch:
        return self.batch


def time_work(
    config: BackboneConfig,
    work: Work,
    *,
    batch: int,
    precision: Precision,
    device: torch.device,
    mode: Mode = "eager",
    repeats: int = 5,
    memory: bool = True,
) -> WorkTime:
    """Build a network and time it, the yardstick in turns with it, so that a machine that slows down slows both."""
    network = TimedNetwork(config, batch, precision, device, mode)
    run = network.forward if work == "forward" else network.training_step
    gemms = {f"gemm {dtype}": Gemm(dtype, device) for dtype in (torch.float32, matrix_dtype(precision))}
    times = measure_interleaved({work: run, **gemms}, device=device, repeats=repeats, warmup=2)
    rates = {name: gemm.macs / times[name].median for name, gemm in gemms.items()}
    own, fp32 = rates[f"gemm {matrix_dtype(precision)}"], rates[f"gemm {torch.float32}"]
    macs = count_macs(config, fused=True).of_batch(batch) * (TRAINING_FORWARDS if work == "training" else 1)
    seconds = times[work].median
    peak = peak_memory(run, device) if memory and not peak_memory_refusal(device) else None
    return WorkTime(
        seconds=seconds,
        fastest=times[work].fastest,
        floors=seconds * own / macs,
        fp32_floors=seconds * fp32 / macs,
        gemm_gmacs_per_second=own / 1e9,
        fp32_gemm_gmacs_per_second=fp32 / 1e9,
        peak_added_bytes=None if peak is None else peak.added,
        peak_bytes=None if peak is None else peak.peak,
    )


@torch.no_grad()
def _move_from_zero(model: nn.Module) -> None:
    """Networks start by saying zero; zeros must not make the timed products cheaper."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)

"""From seeds and labels to latents, in micro-batches of one fixed size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.diffusion.guidance import BackboneFunction, check_labels, guided_denoiser
from smalti.diffusion.levels import Schedule
from smalti.diffusion.prediction import Denoise
from smalti.errors import ConfigError
from smalti.sampling.config import SamplingConfig, run_sampler
from smalti.sampling.noise import SeededNoise


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Finished samples: scaled latents (or pixels in [-1, 1]), with the label and seed of each row."""

    latents: Float[Tensor, "B C H W"]
    class_labels: Int[Tensor, "B"] | None
    seeds: tuple[int, ...]


# (steps done over all micro-batches, steps in all, latents of the current micro-batch without its padding)
StepCallback = Callable[[int, int, Tensor], None]


def sample_latents(
    backbone: BackboneFunction,
    seeds: Sequence[int],
    class_labels: Sequence[int] | Int[Tensor, "N"] | None,
    *,
    sample_shape: tuple[int, int, int],
    schedule: Schedule,
    config: SamplingConfig,
    prediction: str = "eps",
    learned_variance: bool = False,
    null_class: int | None = None,
    micro_batch: int = 8,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    on_step: StepCallback | None = None,
) -> Iterator[SampleBatch]:
    """Draw one sample per seed, and yield them in order, micro-batch by micro-batch.

    A sample depends on its seed, its label, the settings and `micro_batch`, and on nothing else: the backbone always
    sees `micro_batch` rows (twice that where guidance acts), because matrix products round differently for different
    numbers of rows; a short last batch is padded with copies of its first row, which are thrown away. So any order and
    any split of the seeds gives the same bits, on the same device with the same number of threads.

    Args:
        backbone: in evaluation mode, on `device`.
        class_labels: one per seed, or None for samples without a class.
        sample_shape: channels, rows, columns of one sample.
        prediction, learned_variance: what the backbone was trained to put out.
        null_class: `num_classes` of a backbone trained with label dropout, else None.
        autocast: run the backbone in this dtype.
        on_step: called after each step; an exception from it stops the sampling.

    Raises:
        ConfigError: label counts or ranges do not fit, or a setting is impossible for this schedule. Raised by the
            call itself, before the first sample is asked for.
    """
    seeds = tuple(int(seed) for seed in seeds)
    labels = None if class_labels is None else torch.as_tensor(class_labels, dtype=torch.int64)
    if labels is not None:
        if labels.shape != (len(seeds),):
            raise ConfigError(f"got {labels.numel()} class labels for {len(seeds)} seeds; give one per seed")
        check_labels(labels, null_class)
    if config.guidance_channels != "all" and config.guidance_channels > sample_shape[0]:
        raise ConfigError(f"guidance_channels {config.guidance_channels} is more than the {sample_shape[0]} channels")
    if micro_batch < 1:
        raise ConfigError(f"micro_batch must be at least 1, got {micro_batch}")
    levels = schedule.levels(config.num_inference_steps, spacing=config.spacing, shift=config.shift)
    steps_in_all = -(-len(seeds) // micro_batch) * (len(levels) - 1)

    def denoiser(batch_labels: Tensor | None) -> Denoise:
        return guided_denoiser(
            backbone,
            batch_labels,
            prediction=prediction,
            learned_variance=learned_variance,
            null_class=null_class,
            guidance_scale=config.guidance_scale,
            guidance_interval=config.guidance_interval,
            guidance_channels=config.guidance_channels,
            num_train_timesteps=schedule.num_train_timesteps,
            clip_x0=config.clip_x0,
            autocast=autocast,
        )

    denoiser(labels)  # says now what is wrong with the settings

    def batches() -> Iterator[SampleBatch]:
        done = 0
        for start in range(0, len(seeds), micro_batch):
            rows = list(range(start, min(start + micro_batch, len(seeds))))
            padded = rows + rows[:1] * (micro_batch - len(rows))
            noise = SeededNoise([seeds[row] for row in padded])
            denoise = denoiser(None if labels is None else labels[padded].to(device))
            start_noise = noise(torch.empty(micro_batch, *sample_shape, device=device))
            for x in run_sampler(config, denoise, start_noise, levels, randn_like=noise):
                done += 1
                if on_step is not None:
                    on_step(done, steps_in_all, x[: len(rows)])
            batch_labels = None if labels is None else labels[rows]
            yield SampleBatch(x[: len(rows)], batch_labels, tuple(seeds[row] for row in rows))

    return batches()

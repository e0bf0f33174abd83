"""How a training run is looked at on the way: samples, validation, lines to compare with."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from smalti import streams
from smalti.data import to_uint8
from smalti.evaluation.metric import Estimate
from smalti.latents import decode_batches
from smalti.models import config_of
from smalti.report.images import save_grid
from smalti.sampling import sample_latents
from smalti.training.baselines import Baselines, baselines, example_moments
from smalti.training.device import autocast_dtype
from smalti.training.state import TrainState
from smalti.training.validation import StrataLoss, validate, validation_unit
from smalti.workflows.train_setup import Run

PREVIEW_ROWS, PREVIEW_COLUMNS = 10, 4
_PIECE = 32  # samples drawn at once: fixed, so that their bits depend on nothing else


def save_preview(run: Run, model: nn.Module, path: Path) -> None:
    """A grid of samples with fixed seeds, one row per class (the first ten), or four rows of one kind; each process
    draws its share."""
    classes = min(PREVIEW_ROWS, len(run.catalogue.class_names)) if run.batches.conditional else 0
    labels = [k for k in range(classes) for _ in range(PREVIEW_COLUMNS)] if classes else None
    count = len(labels) if labels is not None else PREVIEW_COLUMNS**2
    images = list(_draw(run, model, range(count), labels))
    rows, columns = run.codec.facts.image_size(run.examples.sample_shape[1:])
    own = torch.cat(images) if images else torch.empty(0, 3, rows, columns)
    found = run.world.gather({"images": own.flatten(1)})
    if found is not None:
        save_grid(found["images"].view(-1, 3, rows, columns), path, columns=PREVIEW_COLUMNS)


def quality_samples(run: Run, model: nn.Module) -> Iterator[Tensor]:
    """8-bit samples of the same seeds at every look, so that the curve shows the network and not the draw; this
    process's share of them."""
    seeds = range(run.config.quality.images)
    classes = len(run.catalogue.class_names) if run.batches.conditional else 0
    labels = [streams.key(seed, streams.SAMPLE_LABEL) % classes for seed in seeds] if classes else None
    return (to_uint8(images) for images in _draw(run, model, seeds, labels))


def quality_values(found: Mapping[str, Estimate]) -> dict[str, float]:
    """One log line: each number, and its standard error where there is one."""
    errors = {f"{name}_error": e.standard_error for name, e in found.items() if e.standard_error is not None}
    return {name: estimate.value for name, estimate in found.items()} | errors


def _draw(run: Run, model: nn.Module, seeds: Sequence[int], labels: Sequence[int] | None) -> Iterator[Tensor]:
    """This process's share of samples as `preview` says, decoded, (B, 3, H, W) pieces on the CPU.

    Of a network in parts every process draws all of them, because each step is one of all together, and decodes its
    share. The pieces are those of a single process, whatever the number of processes.
    """
    share = run.world.share(len(seeds), _PIECE)
    all_together = run.parallel.mesh is not None
    drawn = range(len(seeds)) if all_together else share
    if not drawn:
        return iter(())
    batches = sample_latents(
        model,
        seeds=seeds[drawn.start : drawn.stop],
        class_labels=None if labels is None else labels[drawn.start : drawn.stop],
        sample_shape=run.examples.sample_shape,
        schedule=run.schedule,
        config=run.config.preview,
        prediction=run.config.objective.prediction,
        learned_variance=config_of(model).learned_variance,
        null_class=run.batches.null_class,
        micro_batch=_PIECE,
        device=run.device,
        autocast=autocast_dtype(run.config.precision),
    )
    starts = itertools.count(drawn.start, _PIECE)
    own = (batch.latents for start, batch in zip(starts, batches, strict=False) if start in share)
    return decode_batches(run.codec, own)


def validation_of(run: Run, state: TrainState) -> StrataLoss:
    """Loss of the averaged weights on the examples set aside; all processes take part."""
    assert run.triples is not None
    objective = run.config.objective
    return validate(
        state.ema.model,
        run.triples,
        objective.prediction,
        unit=validation_unit(objective),
        precision=run.config.precision,
        world=run.world,
    )


def baselines_of(run: Run) -> Baselines:
    """Losses of the best constant and the best linear denoiser on the same examples."""
    assert run.triples is not None
    moments = example_moments(run.examples, run.split.train.tolist())
    return baselines(moments, run.triples, validation_unit(run.config.objective))

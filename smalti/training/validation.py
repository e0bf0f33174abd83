"""Validation loss: the same held-out images, noise and levels every time, split by eighths of the noise range."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti import streams
from smalti.data.examples import Examples
from smalti.diffusion.levels import LevelBatch, Schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.diffusion.prediction import add_noise, training_target, x0_weights
from smalti.training.device import autocast
from smalti.world import World

STRATA = 8
MAX_TRIPLES = 1024
BATCH = 64  # fixed, so that the digits depend neither on memory nor on the number of processes


@dataclass(frozen=True, eq=False)
class Triples:
    """Fixed (image, noise, level) triples. Levels are stratified: a stratum is an eighth of the noise range.

    Args:
        strata: which eighth each triple belongs to, 0 = nearly clean.
    """

    x0: Float[Tensor, "N C H W"]
    class_labels: Int[Tensor, "N"] | None
    eps: Float[Tensor, "N C H W"]
    levels: LevelBatch
    strata: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class StrataLoss:
    """Mean squared error of the prediction target: over all triples, and per eighth of the noise range."""

    mean: float
    strata: tuple[float, ...]


def make_triples(
    examples: Examples, indices: list[int], schedule: Schedule, seed: int, *, conditional: bool = True
) -> Triples:
    """Each image meets as many of the eight strata as fit into MAX_TRIPLES triples; neighbours meet different ones.

    The uniform spread over the noise range is on purpose also where training prefers some levels.

    Args:
        conditional: False leaves the labels out, for a network without classes.
    """
    rounds = max(1, min(STRATA, MAX_TRIPLES // len(indices)))
    count = min(len(indices), MAX_TRIPLES)
    chosen = [indices[k * len(indices) // count] for k in range(count)]  # from end to end: sets are sorted by class
    rows = [
        (place, image, (place + r * (STRATA // rounds)) % STRATA)
        for r in range(rounds)
        for place, image in enumerate(chosen)
    ]
    picked = [image for _, image, _ in rows]
    x0 = examples.x0(picked)
    eps = torch.empty_like(x0)
    for row, (noise, (place, _, stratum)) in enumerate(zip(eps, rows, strict=True)):
        noise.normal_(generator=streams.generator(seed, streams.VALIDATION, place, stratum, row))
    within = [streams.uniform(seed, streams.VALIDATION, place, stratum) for place, _, stratum in rows]
    strata = torch.tensor([stratum for _, _, stratum in rows])
    levels = schedule.at((strata + torch.tensor(within, dtype=torch.float64)) / STRATA)
    labelled = conditional and examples.catalogue.class_names
    labels = torch.from_numpy(examples.catalogue.class_labels[picked]) if labelled else None
    return Triples(x0, labels, eps, levels, strata)


def validation_unit(objective: ObjectiveConfig) -> str:
    """What the error of a run is measured as: x0 on the flow path, else what the network predicts.

    On the flow path an error of x0 is at most that of the velocity, and stays finite for denoisers that do not look at
    nearly clean images closely; on the others it would count the noisiest levels thousands of times.
    """
    return "x0" if objective.schedule == "flow" else objective.prediction


@torch.no_grad()
def validate(
    model: nn.Module,
    triples: Triples,
    prediction: str,
    *,
    unit: str | None = None,
    precision: str = "fp32",
    batch_size: int = BATCH,
    world: World | None = None,
) -> StrataLoss:
    """The loss of a network on the triples, unweighted, run in the given precision; `unit` as in `loss_of`.

    Args:
        world: the processes that share the work, and hold the network together or each a copy; all get the result.
    """
    world = World() if world is None else world
    device = next(model.parameters()).device
    x_t = add_noise(triples.x0, triples.eps, triples.levels)
    share = world.share(len(triples), batch_size)
    outputs = [triples.x0[:0]]
    # Equally many forward passes for all, of which each may be one of all together.
    for k in range(-(-len(triples) // (batch_size * world.size))):
        start = share.start + k * batch_size
        counts = start < share.stop
        part = slice(start, min(start + batch_size, share.stop)) if counts else slice(0, 1)
        labels = None if triples.class_labels is None else triples.class_labels[part].to(device)
        timesteps = triples.levels.timesteps[part].float().to(device)
        with autocast(device, precision):
            output = model(x_t[part].to(device), timesteps, labels)
        if counts:
            outputs.append(output[:, : triples.x0.shape[1]].float().cpu())
    rows = world.gather({"output": torch.cat(outputs).flatten(1)})
    found: list[Any] = []
    if rows is not None:
        loss = loss_of(rows["output"].view_as(triples.x0), triples, prediction, unit=unit)
        found = [loss.mean, loss.strata]
    mean, strata = world.broadcast_object(found)
    return StrataLoss(mean, tuple(strata))


def loss_of(
    output: Float[Tensor, "N C H W"], triples: Triples, prediction: str, *, unit: str | None = None
) -> StrataLoss:
    """The loss of given predictions for all triples.

    Args:
        unit: measure the error as that of another prediction (x0, eps, v, velocity), to compare networks that predict
            different things; None = of `prediction` itself.
    """
    target = training_target(prediction, triples.x0, triples.eps, triples.levels)
    errors = (output - target).square().flatten(1).double().mean(1)
    if unit is not None:
        own, other = (x0_weights(name, triples.levels.alpha, triples.levels.sigma)[1] for name in (prediction, unit))
        errors *= (own / other) ** 2
    return by_stratum(errors, triples)


def by_stratum(errors: Float[Tensor, "N"], triples: Triples) -> StrataLoss:
    """The mean of one error per triple, over all and over each stratum."""
    return StrataLoss(errors.mean().item(), tuple(errors[triples.strata == k].mean().item() for k in range(STRATA)))

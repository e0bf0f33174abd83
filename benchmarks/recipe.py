"""What the demo's recipe was chosen against: short runs that differ from it in one setting, with equal images seen.

The loss is that of x0 on the demo's validation triples, whatever a variant predicts, so that all rows compare.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.models import BACKBONES
from smalti.training.baselines import baselines, example_moments
from smalti.training.config import RunConfig
from smalti.training.loop import train_steps
from smalti.training.validation import validate
from smalti.workflows.demo import recipe
from smalti.workflows.train_setup import new_state, prepare_run


def variants(base: RunConfig) -> dict[str, RunConfig]:
    """The recipe, and what else was tried; each keeps steps x batch_size."""

    def rate(value: float) -> RunConfig:
        return replace(base, optimizer=replace(base.optimizer, learning_rate=value))

    # What depth and width mean differs from network to network; DiT's were varied.
    shapes = {
        "two blocks more": replace(base, override=("depth=8",)),
        "wider, 384": replace(base, override=("hidden_size=384", "num_heads=6")),
    }
    shapes = shapes if base.model.startswith("dit") else {}
    x0 = replace(base.objective, prediction="x0")
    return {
        "the recipe": base,
        "x0, weighed as velocity": replace(base, objective=replace(x0, loss_weighting="velocity")),
        "x0, not weighed": replace(base, objective=x0),
        "levels around the middle": replace(base, objective=replace(base.objective, logit_mean=0.0)),
        "half the learning rate": rate(base.optimizer.learning_rate / 2),
        "twice the learning rate": rate(base.optimizer.learning_rate * 2),
        "batch twice as large": replace(base, batch_size=base.batch_size * 2, steps=base.steps // 2),
    } | shapes


def main(arguments: list[str]) -> int:
    """Train every variant (or those named) and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks recipe", description=__doc__)
    parser.add_argument("--steps", type=positive, default=400, help="of the recipe's batch size (default 400)")
    parser.add_argument("--network", choices=BACKBONES, default="dit", help="which of the demo's (default dit)")
    parser.add_argument("--only", nargs="+", help="names of variants, as printed")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    device = prepare(options)
    recorder = Recorder("recipe", device, options.out)
    with tempfile.TemporaryDirectory() as folder:
        base = replace(
            recipe(options.network, Path(folder), seed=0),
            steps=options.steps,
            precision=options.precision[0],
            device=str(device),
        )
        for name, config in variants(base).items():
            if options.only and name not in options.only:
                continue
            run, model = prepare_run(config)
            assert run.triples is not None
            state, started = new_state(run, model), time.perf_counter()
            for _ in train_steps(state, run.batches, config):
                pass
            seconds = time.perf_counter() - started
            loss = validate(state.ema.model, run.triples, config.objective.prediction, unit="x0")
            lines = baselines(example_moments(run.examples, run.split.train.tolist()), run.triples, "x0")
            recorder.add(
                variant=name,
                images=config.steps * config.batch_size,
                loss=loss.mean,
                strata=list(loss.strata),
                linear=lines.linear.mean,
                images_per_second=config.steps * config.batch_size / seconds,
            )
    rows = [
        (row["variant"], row["images"], f"{row['loss']:.4f}", f"{row['images_per_second']:.0f}")
        for row in recorder.rows
    ]
    sys.stdout.write(f"\nbest linear denoiser {recorder.rows[0]['linear']:.4f}\n" if rows else "no such variant\n")
    sys.stdout.write(table(("variant", "images seen", "x0 loss", "images/s"), rows))
    return 0 if rows else 64

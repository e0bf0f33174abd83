"""The demo's networks, each trained with several seeds for equal steps: how far apart seeds lie, and networks.

A seed decides everything random: which images are held out, their order, noise, levels and the first weights. Within a
seed all networks meet the same, so that differences between them are paired.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.cost.macs import count_macs
from smalti.models import BACKBONES
from smalti.training.baselines import baselines, example_moments
from smalti.training.loop import train_steps
from smalti.training.validation import validate, validation_unit
from smalti.workflows.demo import recipe
from smalti.workflows.train_setup import new_state, prepare_run


def main(arguments: list[str]) -> int:
    """Train every network with every seed, print a line for each run and a table of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks seeds", description=__doc__)
    parser.add_argument("--steps", type=positive, default=300, help="of the demo's batch size (default 300)")
    parser.add_argument("--seeds", type=positive, default=3, help="how many, from 0 (default 3)")
    parser.add_argument("--networks", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--batch-size", type=positive, help="instead of the demo's")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    device = prepare(options)
    recorder = Recorder("seeds", device, options.out)
    for seed in range(options.seeds):
        for network in options.networks:
            with tempfile.TemporaryDirectory() as folder:
                config = replace(
                    recipe(network, Path(folder), seed),
                    steps=options.steps,
                    precision=options.precision[0],
                    device=str(device),
                )
                if options.batch_size:
                    config = replace(config, batch_size=options.batch_size)
                run, model = prepare_run(config)
                assert run.triples is not None
                unit = validation_unit(config.objective)
                state, started = new_state(run, model), time.perf_counter()
                for _ in train_steps(state, run.batches, config):
                    pass
                seconds = time.perf_counter() - started
                loss = validate(state.ema.model, run.triples, config.objective.prediction, unit=unit)
                lines = baselines(example_moments(run.examples, run.split.train.tolist()), run.triples, unit)
            recorder.add(
                network=network,
                seed=seed,
                steps=config.steps,
                images=config.steps * config.batch_size,
                macs=count_macs(model, batch_size=config.batch_size).total,
                loss=loss.mean,
                strata=list(loss.strata),
                linear=lines.linear.mean,
                constant=lines.constant.mean,
                skipped=len(state.skipped),
                seconds_per_step=seconds / config.steps,
            )
    rows = []
    for network in options.networks:
        own = [row for row in recorder.rows if row["network"] == network]
        losses = [row["loss"] for row in own]
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
        seconds_per_step = statistics.median(row["seconds_per_step"] for row in own)
        rows.append(
            (
                network,
                f"{own[0]['macs'] / 1e6:.1f}",
                *(f"{loss:.4f}" for loss in losses),
                f"{statistics.mean(losses):.4f}",
                spread,
                f"{seconds_per_step:.3f}",
            )
        )
    by_seed = {row["seed"]: row for row in recorder.rows}
    for name in ("linear", "constant"):
        values = [by_seed[seed][name] for seed in range(options.seeds)]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        rows.append((name, "-", *(f"{v:.4f}" for v in values), f"{statistics.mean(values):.4f}", spread, "-"))
    seeds = tuple(f"seed {seed}" for seed in range(options.seeds))
    sys.stdout.write("\n" + table(("network", "M MACs", *seeds, "mean", "std", "s/step"), rows))
    beaten = all(row["loss"] < row["constant"] for row in recorder.rows)
    sys.stdout.write(f"every run is {'' if beaten else 'NOT '}below the mean image\n")
    return 0 if beaten else 1

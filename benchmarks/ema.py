"""How long the weight average should remember: one short run, several decays beside each other.

The run is the demo's recipe with fewer steps. Every decay sees the same weights at every step; decays are given as the
share of the run that the average remembers, and as the 0.9999 of the papers.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.training.ema import EMA, HORIZON, default_decay
from smalti.training.loop import train_steps
from smalti.training.validation import validate, validation_unit
from smalti.workflows.demo import recipe
from smalti.workflows.train_setup import new_state, prepare_run

SHARES = (0.01, 0.02, 0.04, 0.08, 0.16)
PAPERS = 0.9999


def main(arguments: list[str]) -> int:
    """Train once, print one line per decay and one for the weights themselves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ema", description=__doc__)
    parser.add_argument("--steps", type=positive, default=400, help="length of the run (default 400)")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    device = prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(recipe("dit", Path(folder), seed=0), steps=options.steps, precision=options.precision[0])
        run, model = prepare_run(replace(config, device=str(device)))
        assert run.triples is not None
        state = new_state(run, model)
        decays = {f"{share:g} of the run": 1 - 1 / max(1.0, share * options.steps) for share in SHARES}
        averages = {name: EMA(state.model, decay) for name, decay in (decays | {"the papers'": PAPERS}).items()}
        # The released update has no warm-up: it begins at the initial weights and keeps 0.9999 of them at each step.
        averages["the papers', no warm-up"] = EMA(state.model, PAPERS)
        recorder = Recorder("ema", device, options.out)
        prediction, unit = config.objective.prediction, validation_unit(config.objective)
        losses: dict[str, list[float]] = {}
        for report in train_steps(state, run.batches, config):
            for name, average in averages.items():
                average.update(state.model, sys.maxsize if name.endswith("no warm-up") else report.step - 1)
            # Half-way the learning rate is still high and the weights jump about; at the end it has gone to 0.
            if report.step in (options.steps // 2, options.steps):
                networks = {"none": state.model} | {name: average.model for name, average in averages.items()}
                for name, network in networks.items():
                    loss = validate(network, run.triples, prediction, unit=unit, precision=config.precision).mean
                    losses.setdefault(name, []).append(loss)
        for name, (half_way, end) in losses.items():
            decay = averages[name].decay if name in averages else 0.0
            recorder.add(average=name, decay=decay, steps=options.steps, half_way=half_way, loss=end)
    chosen = f"default for {options.steps} steps: {default_decay(options.steps):.5f} ({HORIZON:g} of the run)"
    sys.stdout.write(f"\n{chosen}\n")
    rows = [(r["average"], f"{r['decay']:.5f}", f"{r['half_way']:.4f}", f"{r['loss']:.4f}") for r in recorder.rows]
    sys.stdout.write(table(("average over", "decay", "loss half-way", "at the end"), rows))
    return 0

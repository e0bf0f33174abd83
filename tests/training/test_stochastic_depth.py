"""Stochastic depth from outside: which branches are left out is a function of counters, and nothing stays behind."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import scramble

from smalti.errors import ConfigError
from smalti.presets import create_model
from smalti.training import RunConfig
from smalti.training.stochastic_depth import stochastic_depth


@pytest.fixture
def network():
    made = create_model("dit-emoji32", depth=4, hidden_size=16, num_heads=2, sample_size=8, patch_size=2)
    scramble(made)
    return made.double()


def run(network, rate, positions=range(6), seed=0):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64).expand(len(positions), -1, -1, -1)
    labels = torch.zeros(len(positions), dtype=torch.int64)
    with torch.no_grad(), stochastic_depth(network, rate, seed, positions):
        return network(latents, torch.full((len(positions),), 300.0), labels)


def branch_factors(network, rate, positions):
    """(block, branch) -> what each image's branch was multiplied by."""
    before, after, hooks = {}, {}, []
    branches = {(i, j): m for i, block in enumerate(network.iter_blocks()) for j, m in enumerate(block.branches())}

    def watch(seen):
        for place, branch in branches.items():
            hooks.append(
                branch.register_forward_hook(lambda m, a, out, place=place: seen.update({place: out.flatten(1)[:, 0]}))
            )

    watch(before)  # hooks run in the order in which they were made
    with torch.no_grad(), stochastic_depth(network, rate, 0, positions):
        watch(after)
        latents = torch.randn(len(positions), 3, 8, 8, dtype=torch.float64)
        network(latents, torch.zeros(len(positions)), torch.zeros(len(positions), dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    return {place: after[place] / before[place] for place in branches}


def test_rate_zero_changes_nothing_and_leaves_no_hook(network):
    with torch.no_grad():
        plain = run(network, 0.0)
    assert torch.equal(run(network, 0.0), plain)
    run(network, 0.5)
    assert torch.equal(run(network, 0.0), plain)
    assert not any(m._forward_hooks for m in network.modules())


def test_hooks_go_even_when_the_forward_fails(network):
    with pytest.raises(ValueError, match="latents of shape"), stochastic_depth(network, 0.5, 0, range(2)):
        network(torch.zeros(2, 3, 7, 8).double(), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert not any(m._forward_hooks for m in network.modules())


def test_the_fate_of_an_image_does_not_depend_on_its_batch(network):
    whole = run(network, 0.5, range(8))
    parts = torch.cat([run(network, 0.5, range(3)), run(network, 0.5, range(3, 8))])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(network, 0.5, range(8), seed=1), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) > 4  # equal inputs, different fates


def test_the_rate_grows_evenly_with_depth_and_what_is_kept_keeps_its_mean(network):
    factors = branch_factors(network, 0.8, range(4000))
    for (i, j), values in factors.items():
        dropped = 0.8 * i / 4
        kept = 1 / (1 - dropped)
        assert ((values == 0) | ((values - kept).abs() < 1e-5)).all(), (i, j)
        spread = 5 * (dropped * (1 - dropped) / 4000) ** 0.5
        assert abs((values == 0).double().mean().item() - dropped) <= spread, (i, j)
    both = (factors[3, 0] == 0) & (factors[3, 1] == 0)
    assert both.double().mean().item() == pytest.approx(0.36, abs=5 * (0.36 * 0.64 / 4000) ** 0.5)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ConfigError, match=r"stochastic_depth must be in \[0, 1\)"):
        replace(RunConfig(), stochastic_depth=rate)

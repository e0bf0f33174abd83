"""Whole sampling runs: the same bits in any order and split, settings, and what goes wrong."""

import random

import pytest
import torch
from torch import nn

from smalti import streams
from smalti.config import from_dict, to_dict
from smalti.diffusion import build_schedule
from smalti.errors import ConfigError
from smalti.sampling import SAMPLERS, SamplingConfig, SeededNoise, sample_latents

SHAPE = (3, 6, 5)


class Network(nn.Module):
    """Convolution, matrix products on (B, D) and on tokens: what a batch's size can change in the last bits."""

    def __init__(self, learned_variance=True):
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Conv2d(3, 48, 3, padding=1)
        self.label = nn.Embedding(11, 48)
        self.modulate = nn.Linear(48, 96)
        self.token = nn.Linear(48, 48)
        self.out = nn.Linear(48, 6 if learned_variance else 3)
        with torch.no_grad():
            self.out.weight.mul_(0.2)  # an untrained variance must not overflow
        self.rows = []

    def forward(self, latents, timesteps, class_labels):
        self.rows.append(len(latents))
        cond = self.label(class_labels) + torch.sin(timesteps / 50)[:, None]
        shift, scale = self.modulate(nn.functional.silu(cond)).chunk(2, dim=1)
        h = self.into(latents).flatten(2).transpose(1, 2)
        h = h * (1 + scale[:, None]) + shift[:, None]
        h = h + nn.functional.gelu(self.token(h))
        return self.out(h).transpose(1, 2).reshape(len(latents), -1, *latents.shape[2:])


SETTINGS = {"sample_shape": SHAPE, "learned_variance": True, "null_class": 10, "micro_batch": 4}


def config(**changes):
    return SamplingConfig(
        **{"num_inference_steps": 5, "guidance_scale": 2.0, "guidance_interval": (0.2, 1.0)} | changes
    )


def by_seed(seeds, labels, sampling, network=None, **changes):
    """Latents of each (seed, label)."""
    options = SETTINGS | {"schedule": build_schedule("linear"), "config": sampling} | changes
    return {
        (seed, int(label)): latents
        for batch in sample_latents(network or Network(), seeds, labels, **options)
        for seed, label, latents in zip(batch.seeds, batch.class_labels, batch.latents, strict=True)
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_order_and_any_split_of_the_seeds_gives_the_same_bits(sampler, dtype):
    pairs = [(seed, seed % 10) for seed in range(100, 111)]
    sampling = config(sampler=sampler)
    whole = by_seed(*zip(*pairs, strict=True), sampling, autocast=dtype)
    assert len(whole) == 11
    assert all(latents.isfinite().all() for latents in whole.values())
    shuffler = random.Random(3)
    for parts in (1, 2, 3):
        shuffled = shuffler.sample(pairs, len(pairs))
        for part in range(parts):
            for key, latents in by_seed(*zip(*shuffled[part::parts], strict=True), sampling, autocast=dtype).items():
                assert torch.equal(latents, whole[key]), key
    alone = by_seed([105], [5], sampling, autocast=dtype)
    assert torch.equal(alone[105, 5], whole[105, 5])


def test_the_network_sees_one_batch_size_and_twice_that_where_guidance_acts():
    network = Network()
    by_seed(range(5), [1] * 5, config(), network)
    # Levels 999, 749, 500, 250 are guided, level 0 is outside the interval; 5 seeds are one full and one padded batch.
    assert network.rows == [8, 8, 8, 8, 4] * 2


def test_seed_and_label_matter_and_nothing_repeats():
    got = by_seed([1, 2, 1], [3, 3, 4], config())
    assert len({tuple(latents.flatten().tolist()) for latents in got.values()}) == 3


def test_noise_of_a_row_is_a_function_of_its_seed_and_the_number_of_the_draw():
    noise = SeededNoise([5, 7])
    like = torch.empty(2, *SHAPE)
    first, second = noise(like), noise(like)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    other = SeededNoise([7, 9, 11])
    assert torch.equal(other(torch.empty(3, *SHAPE))[0], first[1])
    assert torch.equal(other(torch.empty(3, *SHAPE))[0], second[1])
    expected = torch.randn(SHAPE, generator=streams.generator(5, streams.SAMPLE_NOISE, 1))
    assert torch.equal(second[0], expected)


def test_seeded_noise_is_unit_normal_and_has_the_dtype_that_is_asked_for():
    noise = SeededNoise(range(64))(torch.empty(64, 4, 32, 32, dtype=torch.float64))
    assert noise.dtype == torch.float64
    # Five standard errors of 262,144 numbers.
    assert noise.mean().abs() < 5 / 512
    assert (noise.var() - 1).abs() < 5 * 2**0.5 / 512
    with pytest.raises(ValueError, match="2 seeds cannot make noise for 3 rows"):
        SeededNoise([1, 2])(torch.empty(3, 4))


def test_sampling_leaves_the_global_random_state_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    network_free = lambda x, timesteps, labels: x * 0.1  # noqa: E731
    list(
        sample_latents(
            network_free, [1, 2], None, sample_shape=SHAPE, schedule=build_schedule("cosine"), config=SamplingConfig()
        )
    )
    assert torch.equal(torch.rand(3), expected)


def test_steps_are_reported_over_all_batches_without_padding():
    seen = []
    by_seed(range(6), [0] * 6, config(), on_step=lambda done, total, latents: seen.append((done, total, len(latents))))
    assert seen == [(i, 10, 4 if i <= 5 else 2) for i in range(1, 11)]


def test_a_callback_can_stop_the_run():
    class CancelledError(Exception):
        pass

    def stop(done, total, latents):
        if done == 3:
            raise CancelledError

    network = Network()
    with pytest.raises(CancelledError):
        by_seed(range(6), [0] * 6, config(), network, on_step=stop)
    assert len(network.rows) == 3


def test_batches_come_as_they_are_finished():
    network = Network()
    stream = sample_latents(network, range(8), [0] * 8, **SETTINGS, schedule=build_schedule("linear"), config=config())
    assert network.rows == []
    batch = next(stream)
    assert batch.seeds == (0, 1, 2, 3)
    assert batch.latents.shape == (4, *SHAPE)
    assert len(network.rows) == 5
    assert not batch.latents.requires_grad


def test_unconditional_networks_sample_without_labels():
    def backbone(latents, timesteps, class_labels):
        assert class_labels is None
        return latents * 0.5

    options = {"sample_shape": SHAPE, "schedule": build_schedule("flow"), "prediction": "velocity"}
    (batch,) = sample_latents(
        backbone, [1], None, config=SamplingConfig(sampler="heun", num_inference_steps=4), **options
    )
    assert batch.class_labels is None
    assert batch.latents.shape == (1, *SHAPE)


def test_no_seeds_make_no_batches():
    assert by_seed([], [], config()) == {}


def test_the_config_survives_a_file():
    sampling = config(sampler="ddim", eta=0.5, guidance_channels=3, spacing="ddim")
    assert from_dict(SamplingConfig, to_dict(sampling)) == sampling
    assert from_dict(SamplingConfig, {"guidance_channels": "all"}) == SamplingConfig()
    with pytest.raises(ConfigError, match=r"did you mean 'dpm-solver\+\+'"):
        from_dict(SamplingConfig, {"sampler": "dpm-solver"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "at least 1"),
        ({"eta": 0.5}, "it belongs to ddim"),
        ({"sampler": "ddim", "eta": 2.0}, "between 0"),
    ],
)
def test_impossible_settings_say_what_to_do(changes, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**changes)


@pytest.mark.parametrize(
    ("seeds", "labels", "changes", "message"),
    [
        ([1, 2], [0], {}, "got 1 class labels for 2 seeds"),
        ([1, 2], [0, 10], {}, "class label 10 is out of range; this model knows 0 to 9"),
        ([1, 2], [0, -1], {}, "class label -1 is out of range"),
        ([1], [0], {"micro_batch": 0}, "micro_batch must be at least 1"),
        ([1], [0], {"config": SamplingConfig(num_inference_steps=2000)}, "use 1 to 1000"),
        ([1], None, {}, "needs class labels"),
        ([1], [0], {"config": SamplingConfig(guidance_interval=(0.9, 0.1))}, "low <= high"),
    ],
)
def test_impossible_runs_stop_before_the_first_step(seeds, labels, changes, message):
    options = SETTINGS | {"schedule": build_schedule("linear"), "config": config()} | changes
    with pytest.raises(ConfigError, match=message):
        sample_latents(Network(), seeds, labels, **options)

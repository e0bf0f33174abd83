import numpy as np
import pytest
import torch
from tiny_runs import array_images, scramble, write_set

from smalti import streams
from smalti.data import load_image_set, split
from smalti.data.examples import PixelExamples
from smalti.data.pixels import read_images
from smalti.diffusion.levels import LevelBatch, build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.diffusion.prediction import PREDICTIONS, add_noise, per_sample, training_target
from smalti.presets import create_model
from smalti.training.validation import (
    MAX_TRIPLES,
    STRATA,
    Triples,
    loss_of,
    make_triples,
    validate,
    validation_unit,
)


def noise_images(count, side=2):
    return array_images(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def columns(triples):
    levels = triples.levels
    return [triples.x0, triples.class_labels, triples.eps, levels.timesteps, levels.alpha, levels.sigma, triples.strata]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_image_set(write_set(tmp_path_factory.mktemp("set")))


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
def test_the_triples_are_fixed_by_the_seed_and_nothing_else(tiny, kind):
    schedule, indices = build_schedule(kind, 1000), split(tiny, 0.125, 0).validation.tolist()
    first = make_triples(PixelExamples(tiny), indices, schedule, seed=3)
    torch.manual_seed(99)
    torch.rand(17)
    make_triples(PixelExamples(tiny), indices[:2], schedule, seed=4)
    again = make_triples(PixelExamples(tiny), indices, schedule, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(columns(first), columns(again), strict=True))
    other = make_triples(PixelExamples(tiny), indices, schedule, seed=4)
    assert not torch.equal(first.eps, other.eps)
    assert not torch.equal(first.levels.timesteps, other.levels.timesteps)
    assert torch.equal(first.x0, other.x0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
def test_every_level_lies_in_its_eighth_of_the_noise_range(tiny, kind):
    triples = make_triples(PixelExamples(tiny), list(range(40)), build_schedule(kind, 1000), seed=0)
    times = triples.levels.timesteps.double() / 1000
    assert ((triples.strata / STRATA - 1e-3 <= times) & (times <= (triples.strata + 1) / STRATA)).all()
    means = torch.stack([triples.levels.sigma[triples.strata == k].double().mean() for k in range(STRATA)])
    assert (means.diff() > 0).all()


@pytest.mark.parametrize("count", [1, 7, 128, 200, 238, 300, 700, 1500, MAX_TRIPLES, MAX_TRIPLES + 1, 5000])
def test_the_strata_are_of_nearly_equal_size_whatever_the_number_of_images(count):
    """They differ by at most one image's rounds; where there is room for it, every image meets all eight."""
    triples = make_triples(PixelExamples(noise_images(count)), list(range(count)), build_schedule("flow", 1000), seed=0)
    sizes = torch.bincount(triples.strata, minlength=STRATA)
    rounds = max(1, min(STRATA, MAX_TRIPLES // count))
    assert len(triples) == rounds * min(count, MAX_TRIPLES) <= MAX_TRIPLES
    assert (sizes.max() - sizes.min()).item() <= rounds
    if rounds == STRATA:
        assert sizes.max() == sizes.min() == count


def test_an_image_meets_different_strata_and_noise_in_each_round(tiny):
    triples = make_triples(PixelExamples(tiny), [5, 9], build_schedule("flow", 1000), seed=0)
    for pixels in read_images(tiny, [5, 9]):
        mine = (triples.x0 == pixels).flatten(1).all(1)
        assert sorted(triples.strata[mine].tolist()) == list(range(STRATA))
    assert len(torch.unique(triples.eps.flatten(1), dim=0)) == len(triples)


def test_of_a_large_set_the_triples_show_images_from_end_to_end():
    images = noise_images(5000)
    triples = make_triples(PixelExamples(images), list(range(5000)), build_schedule("flow", 1000), seed=0)
    shown = [(triples.x0 == pixels).flatten(1).all(1).any().item() for pixels in read_images(images, range(5000))]
    parts = [sum(shown[k : k + 500]) for k in range(0, 5000, 500)]
    assert sum(parts) == MAX_TRIPLES
    assert max(parts) - min(parts) <= 1


def test_labels_go_with_their_images_and_are_never_hidden(tiny):
    indices = split(tiny, 0.125, 0).validation.tolist()
    triples = make_triples(PixelExamples(tiny), indices, build_schedule("flow", 1000), seed=0)
    assert triples.class_labels.tolist() == [int(tiny.class_labels[i]) for i in indices] * STRATA
    plain = make_triples(PixelExamples(noise_images(3)), [0, 1, 2], build_schedule("flow", 1000), seed=0)
    assert plain.class_labels is None


def test_validation_noise_is_not_the_training_noise(tiny):
    triples = make_triples(PixelExamples(tiny), [0], build_schedule("flow", 1000), seed=0)
    training = torch.empty_like(triples.eps[0]).normal_(generator=streams.generator(0, streams.NOISE, 0))
    assert all(not torch.equal(noise, training) for noise in triples.eps)


def by_hand():
    """Two triples a stratum; x0 = 2, eps = 3, alpha = 0.8, sigma = 0.6 everywhere."""
    n = 2 * STRATA
    full = lambda value: torch.full((n, 1, 1, 2), float(value))  # noqa: E731
    levels = LevelBatch(*(torch.full((n,), v, dtype=torch.float64) for v in (500.0, 0.8, 0.6)))
    return Triples(full(2), None, full(3), levels, torch.arange(n) % STRATA)


@pytest.mark.parametrize(
    ("prediction", "target"), [("eps", 3.0), ("x0", 2.0), ("v", 0.8 * 3 - 0.6 * 2), ("velocity", 1)]
)
def test_the_loss_is_the_mean_square_of_what_is_missing_to_the_target(prediction, target):
    triples = by_hand()
    # the two triples of stratum k are wrong by k on one pixel and by k + 1 on both
    wrong = torch.stack([torch.tensor([[[k % STRATA, 0.0]]]) for k in range(len(triples))])
    wrong[STRATA:] = torch.arange(1.0, STRATA + 1).view(-1, 1, 1, 1)
    loss = loss_of(target + wrong, triples, prediction)
    expected = [(k**2 / 2 + (k + 1) ** 2) / 2 for k in range(STRATA)]
    assert loss.strata == pytest.approx(expected, rel=1e-6)
    assert loss.mean == pytest.approx(sum(expected) / STRATA, rel=1e-6)
    perfect = loss_of(torch.full_like(triples.x0, target), triples, prediction)
    assert perfect.mean == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("learned_variance", [False, True])
def test_validation_is_the_loss_of_the_network_s_prediction_channels(tiny, prediction, learned_variance):
    network = create_model(
        "dit-emoji32", depth=1, hidden_size=16, num_heads=2, learned_variance=learned_variance
    ).eval()
    scramble(network)
    triples = make_triples(PixelExamples(tiny), list(range(5)), build_schedule("linear", 1000), seed=0)
    with torch.no_grad():
        x_t = add_noise(triples.x0, triples.eps, triples.levels)
        output = network(x_t, triples.levels.timesteps.float(), triples.class_labels)[:, :3]
    target = training_target(prediction, triples.x0, triples.eps, triples.levels)
    expected = (output.double() - target.double()).square().mean().item()
    for batch_size in (64, 7):
        loss = validate(network, triples, prediction, batch_size=batch_size)
        assert loss.mean == pytest.approx(expected, rel=1e-5)
        assert sum(loss.strata) / STRATA == pytest.approx(loss.mean, rel=1e-9)


def test_losses_of_different_predictions_compare_in_one_unit(tiny):
    schedule = build_schedule("flow", 1000)
    triples = make_triples(PixelExamples(tiny), list(range(16)), schedule, seed=0)
    x_t = add_noise(triples.x0, triples.eps, triples.levels)
    alpha, sigma = (per_sample(t, x_t).float() for t in (triples.levels.alpha, triples.levels.sigma))
    guess = torch.zeros_like(triples.x0)
    velocity = (x_t - alpha * guess) / sigma - guess
    as_x0 = loss_of(guess, triples, "x0")
    as_velocity = loss_of(velocity, triples, "velocity", unit="x0")
    assert as_velocity.strata == pytest.approx(as_x0.strata, rel=1e-4)
    assert validation_unit(ObjectiveConfig(schedule="flow", prediction="velocity")) == "x0"
    assert validation_unit(ObjectiveConfig()) == "eps"

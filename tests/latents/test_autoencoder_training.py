"""`smalti autoencoder`: a folder that diffusers reads, the same bits after every interruption."""

import json
import math
from dataclasses import replace

import pytest
import tiny_vae
import torch
from PIL import Image

from smalti import streams
from smalti.cli import main
from smalti.data import SampleOrder, load_image_set, split
from smalti.data.examples import PixelExamples
from smalti.data.pixels import read_images
from smalti.errors import ConfigError, NumericError
from smalti.latents import load_codec
from smalti.training.autoencoder import (
    AutoencoderConfig,
    autoencoder_steps,
    edge_distance,
    kl_divergence,
    new_autoencoder,
    normalise,
)
from smalti.training.log import read_log
from smalti.workflows.autoencoder import psnr, train_autoencoder

TINY = AutoencoderConfig(
    widths=(4, 4),
    steps=8,
    batch_size=4,
    validation_fraction=0.02,
    validate_every=4,
    checkpoint_every=3,
    log_every=1,
    device="cpu",
)


class StoppedError(Exception):
    pass


def files(out):
    return {name: (out / name).read_bytes() for name in ("config.json", "diffusion_pytorch_model.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder") / "whole"
    return train_autoencoder(replace(TINY, out=out))


def test_what_is_stored_is_what_diffusers_reads(whole):
    from diffusers import AutoencoderKL

    with open(whole.out / "config.json") as file:
        config = json.load(file)
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 1.0)
    assert set(config) == {"_class_name", "_diffusers_version"} | {
        name for name in tiny_vae.network().config if not name.startswith("_")
    }
    theirs = AutoencoderKL.from_pretrained(whole.out, low_cpu_mem_usage=False).eval()
    x = read_images(load_image_set("emoji32"), range(3))
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(x).latent_dist.mode().contiguous()).sample
    codec = load_codec(whole.out, rows=3)
    assert torch.equal(codec.decode(codec.encode(x).mean), expected)


def test_latents_of_the_training_images_have_mean_0_and_standard_deviation_1_in_each_channel(whole):
    images = load_image_set("emoji32")
    chosen = split(images, TINY.validation_fraction, TINY.seed).train.tolist()
    mean, std = load_codec(whole.out).encode(read_images(images, chosen))
    variance = mean.double().var((0, 2, 3), correction=0) + std.double().square().mean((0, 2, 3))
    # Weights and products are rounded to 2^-24, and means of a hundred thousand such values are taken.
    assert mean.double().mean((0, 2, 3)).abs().max() < 1e-5
    assert (variance - 1).abs().max() < 1e-5
    assert 0 < whole.spread < 1


def test_normalising_leaves_reconstructions_as_they_are():
    network, examples = tiny_vae.network(scaling_factor=1.0), PixelExamples(load_image_set("emoji32"))
    x = examples.x0(range(20))
    with torch.no_grad():
        before = network.decode(network.encode(x).latent_dist.mode()).sample
        mean, std = normalise(network, examples, list(range(100)))
        latent = network.encode(x).latent_dist
        after = network.decode(latent.mode()).sample
    assert std.min() > 0
    assert mean.abs().max() > 1e-3
    # Some tens of float32 roundings of values near 1, each 2^-24, amplified by the decoder's gain of a few.
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_stopped_anywhere_the_same_command_ends_in_the_same_bits(whole, tmp_path):
    config = replace(TINY, out=tmp_path / "run")
    for stop in (2, 5, 8):

        def dying(report, stop=stop):
            if report.step == stop:
                raise StoppedError

        with pytest.raises(StoppedError):
            train_autoencoder(config, on_step=dying)
    result = train_autoencoder(config)
    assert files(result.out) == files(whole.out)
    assert result.psnr == whole.psnr
    steps = [line["step"] for line in read_log(result.out) if line["event"] == "train"]
    assert steps == list(range(1, 9))
    again = train_autoencoder(config)  # it is finished, so only what is told of it is computed
    assert files(again.out) == files(whole.out)


def test_another_seed_gives_another_network_and_is_not_mixed_with_this_one(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"holds another autoencoder \(seed: 0 -> 1\)"):
        train_autoencoder(replace(TINY, out=whole.out, seed=1))
    a = new_autoencoder(TINY, (32, 32), torch.device("cpu")).network.state_dict()
    b = new_autoencoder(replace(TINY, seed=1), (32, 32), torch.device("cpu")).network.state_dict()
    assert not torch.equal(a["encoder.conv_in.weight"], b["encoder.conv_in.weight"])


def test_it_learns(whole):
    lines = [line for line in read_log(whole.out) if line["event"] == "train"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    found = [line["psnr"] for line in read_log(whole.out) if line["event"] == "validation"]
    assert found[-1] > found[0]
    assert math.isclose(found[-1], whole.psnr, abs_tol=0.01)  # normalised since, which moves a pixel by a level at most
    with Image.open(whole.picture) as picture:
        assert min(picture.size) > 100


def test_psnr_is_20_log10_of_255_for_an_error_of_one_level_and_the_mean_over_images():
    reference = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    images = reference.clone()
    images[0] += 1
    images[1] += 10
    assert psnr(images[:1], reference[:1]) == pytest.approx(20 * math.log10(255))
    assert psnr(images, reference) == pytest.approx(20 * math.log10(255) - 10)
    assert psnr(reference, reference) == pytest.approx(100)


def test_edges_are_differences_of_neighbours_at_three_sizes():
    plain, step = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1
    assert edge_distance(plain, plain + 1) == 0  # only differences count
    # one of 7, 3 and 1 neighbouring pairs along the columns differs by 1, none along the rows
    assert edge_distance(step, plain) == pytest.approx((1 / 7 + 1 / 3 + 1) / 6)


def test_the_divergence_is_that_of_normal_variables():
    posterior = torch.distributions.Normal(torch.tensor(0.7), torch.tensor(0.4))
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    mean, log_variance = torch.full((1, 2, 3, 3), 0.7), torch.full((1, 2, 3, 3), 2 * math.log(0.4))
    assert kl_divergence(mean, log_variance) == pytest.approx(float(expected))


def test_a_step_weighs_three_losses_of_latents_drawn_by_seed_and_position():
    config = replace(TINY, steps=100, edge_weight=0.7, kl_weight=0.3)
    state, order = new_autoencoder(config, (32, 32), torch.device("cpu")), SampleOrder(range(10), config.seed)
    examples, positions = PixelExamples(load_image_set("emoji32")), range(4, 8)
    state.step = 1
    x = examples.load(order, positions, flip=config.flip, seed=config.seed).x0
    with torch.no_grad():
        latent = state.network.encode(x).latent_dist
        eps = torch.empty(latent.mean.shape)
        for row, position in zip(eps, positions, strict=True):
            row.normal_(generator=streams.generator(config.seed, streams.POSTERIOR, position))
        again = state.network.decode(latent.mean + latent.std * eps).sample
    report = next(autoencoder_steps(state, examples, order, config))
    kl, edges, pixels = kl_divergence(latent.mean, latent.logvar), edge_distance(again, x), (again - x).abs().mean()
    # Means of thousands of values after some tens of roundings of 2^-24 each.
    assert report.loss == pytest.approx(float(pixels + 0.7 * edges + 0.3 * kl), rel=1e-5)
    assert report.learning_rate == pytest.approx(config.learning_rate * 2 / 3)  # the second of two steps of warm-up


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_harmed():
    state = new_autoencoder(TINY, (32, 32), torch.device("cpu"))
    examples = PixelExamples(load_image_set("emoji32"))
    with torch.no_grad():
        state.network.decoder.conv_out.bias[0] = float("inf")
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    with pytest.raises(NumericError, match="lower --learning-rate"):
        next(autoencoder_steps(state, examples, SampleOrder(range(10), 0), TINY))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.network.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"widths": (6, 8)}, "widths must be multiples of 8"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"kl_weight": -1.0}, "must be 0 or more"),
    ],
)
def test_wrong_settings_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **changes)


def test_images_that_cannot_be_halved_so_often_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="30x30 is no multiple of 4"):
        train_autoencoder(replace(TINY, out=tmp_path / "x", image_size=30, widths=(4, 4, 4)))


def test_the_command_says_what_it_made(tmp_path, capsys):
    arguments = ["autoencoder", "--out", str(tmp_path / "x"), "--widths", "4", "4", "--steps", "1", "--batch-size", "2"]
    assert main([*arguments, "--validation-fraction", "0.01", "--device", "cpu"]) == 0
    assert "dB on images set aside; originals and reconstructions in" in capsys.readouterr().out

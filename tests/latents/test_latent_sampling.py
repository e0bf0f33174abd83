"""Models of latents, sampled and measured through their codec; each image is one result whatever it is drawn with."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_vae
import torch
from PIL import Image
from tiny_models import CLASSES, write_tiny_model

from smalti.checkpoints import load_model, save_model
from smalti.cli import main
from smalti.config import to_dict
from smalti.data import to_uint8
from smalti.errors import CheckpointError, ConfigError
from smalti.latents import CodecFacts, load_codec
from smalti.sampling import SamplingConfig
from smalti.sampling.record import read_record
from smalti.workflows.evaluate_sources import Drawing, open_measured
from smalti.workflows.sample import load_source, read_classes, sample
from smalti.workflows.sample_request import SampleSettings
from smalti.workflows.sample_set import sample_set

CPU = torch.device("cpu")
SAMPLING = SamplingConfig(sampler="ddim", num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_vae.saved(tmp_path_factory.mktemp("vae"), scaling_factor=0.7, shift_factor=0.1)


@pytest.fixture(scope="module")
def model(vae, tmp_path_factory):
    """Latents of 4 x 8 x 8, images of 16 x 16; it says which codec they are of."""
    plain = write_tiny_model(tmp_path_factory.mktemp("models") / "plain", in_channels=4)
    extra = {"objective": {"prediction": "x0"}, "class_names": list(CLASSES)}
    codec = to_dict(load_codec(vae).facts)
    return save_model(plain.parent / "latent", load_model(plain), extra=extra | {"codec": codec})


@pytest.fixture(scope="module")
def converted(model):
    """The same as released weights come: nothing is known of the codec."""
    extra = {"objective": {"prediction": "x0"}, "converted_from": {"weights": "ema"}}
    return save_model(model.parent / "converted", load_model(model), extra=extra)


def drawn(source, seeds, **options):
    labels = [seed % 10 for seed in seeds]
    return torch.cat([batch.images for batch in sample(source, seeds, labels, SAMPLING, **options)])


def test_samples_are_decoded_latents(model, vae):
    source = load_source(model, CPU)
    assert source.image_size == (16, 16)
    assert source.decoder == load_codec(vae).facts.label
    found = drawn(source, range(5))
    assert found.shape == (5, 3, 16, 16)
    latents = drawn(replace(source, codec=None), range(5))
    assert latents.shape == (5, 4, 8, 8)
    assert torch.equal(found, load_codec(vae).decode(latents))


def test_an_image_is_the_same_whatever_it_is_drawn_with(model):
    source = load_source(model, CPU)
    whole = drawn(source, range(7), micro_batch=4)
    assert torch.equal(drawn(source, [5, 2], micro_batch=4), whole[[5, 2]])


def test_a_set_of_samples_says_its_decoder_and_has_the_size_of_the_images(model, vae, tmp_path):
    settings = SampleSettings(model=model, out=tmp_path / "out", sampling=SAMPLING, seeds="0-5", device="cpu")
    sample_set(replace(settings, save=("png", "npz")))
    identity = read_record(tmp_path / "out").identity
    assert identity.image_size == (16, 16)
    assert identity.decoder == load_codec(vae).facts.label
    with np.load(tmp_path / "out" / "samples.npz") as stored:
        assert stored["arr_0"].shape == (6, 16, 16, 3)
    with Image.open(tmp_path / "out" / "000003.png") as image:
        assert image.size == (16, 16)


def test_released_weights_are_drawn_from_with_a_codec_and_refused_without(converted, vae, tmp_path, capsys):
    flags = ["--out", str(tmp_path / "out"), "--seeds", "0-3", "--device", "cpu", "--classes", "1"]
    flags += ["--sampling.sampler", "ddim", "--sampling.num-inference-steps", "2"]
    assert main(["sample", str(converted), *flags]) == 64
    assert "makes latents of 4 channels, not images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["sample", str(converted), *flags, "--codec", str(vae)]) == 0
    assert read_record(tmp_path / "out").identity.decoder == load_codec(vae).facts.label


def test_a_codec_of_factor_8_makes_images_eight_times_as_large(converted, tmp_path):
    eight = tiny_vae.saved(tmp_path, block_out_channels=(4, 4, 4, 4), norm_num_groups=2)
    source = load_source(converted, CPU, codec=str(eight))
    assert source.image_size == (64, 64)
    assert drawn(source, [0]).shape == (1, 3, 64, 64)


def test_a_codec_of_other_channels_is_refused(converted, tmp_path):
    eight = tiny_vae.saved(tmp_path, latent_channels=8)
    with pytest.raises(ConfigError, match=r"has latents of 8 channels, .* makes 4"):
        load_source(converted, CPU, codec=str(eight))


def test_another_codec_than_the_models_own_is_refused(model, vae, tmp_path):
    other = tiny_vae.saved(tmp_path / "other", seed=1, scaling_factor=0.7, shift_factor=0.1)
    with pytest.raises(CheckpointError, match="is not the codec that is needed"):
        load_source(model, CPU, codec=str(other))
    moved = shutil.copytree(vae, tmp_path / "moved")
    assert load_source(model, CPU, codec=str(moved)).decoder == load_source(model, CPU).decoder


def test_another_decoder_is_taken_if_it_is_said_and_the_record_says_which(model, vae, tmp_path):
    def tuned(network):
        for parameter in [*network.decoder.parameters(), *network.post_quant_conv.parameters()]:
            parameter.data += 0.02
        return network

    made = tiny_vae.network(scaling_factor=0.7, shift_factor=0.1)
    other = tiny_vae.save(tmp_path / "other", tuned(made))
    settings = SampleSettings(model=model, out=tmp_path / "out", sampling=SAMPLING, seeds="0-1", device="cpu")
    with pytest.raises(CheckpointError, match="--other-decoder"):
        sample_set(replace(settings, codec=str(other)))
    sample_set(replace(settings, codec=str(other), other_decoder=True))
    assert read_record(tmp_path / "out").identity.decoder == load_codec(other).facts.label
    with pytest.raises(ConfigError, match=r"holds another set of samples \(decoder: "):
        sample_set(settings)


def test_a_model_of_images_takes_no_codec(tmp_path, vae):
    plain = write_tiny_model(tmp_path / "plain")
    assert load_source(plain, CPU).decoder == "pixels"
    with pytest.raises(ConfigError, match="these are images and not latents"):
        load_source(plain, CPU, codec=str(vae))


def test_what_is_measured_are_the_images_and_the_protocol_says_the_decoder(model, vae, converted):
    drawing = Drawing(images=4, micro_batch=2, sampling=SAMPLING)
    measured = open_measured(str(model), drawing, CPU, {})
    assert measured.known["image_size"] == (16, 16)
    assert measured.known["decoder"] == load_codec(vae).facts.label
    read = torch.cat(list(measured.read(range(4), lambda text: None)))
    source = load_source(model, CPU)
    labels = read_classes(source, (), 4, range(4))
    expected = torch.cat([b.images for b in sample(source, range(4), labels, SAMPLING, micro_batch=2)])
    assert torch.equal(read, to_uint8(expected))
    with pytest.raises(ConfigError, match="makes latents of 4 channels"):
        open_measured(str(converted), drawing, CPU, {})
    given = open_measured(str(converted), replace(drawing, codec=str(vae)), CPU, {})
    assert given.known["decoder"] == measured.known["decoder"]
    assert "--codec" in replace(drawing, codec=str(vae)).changed


def test_facts_of_pixels_are_written_and_read_as_any_others(tmp_path):
    plain = write_tiny_model(tmp_path / "plain")
    extra = {"objective": {"prediction": "x0"}, "codec": to_dict(CodecFacts())}
    assert load_source(save_model(tmp_path / "said", load_model(plain), extra=extra), CPU).decoder == "pixels"

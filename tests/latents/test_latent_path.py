"""From images to numbers in the space of an autoencoder, through the commands that users type."""

import shutil

import pytest
import tiny_vae
import yaml
from PIL import Image
from tiny_runs import write_set

from smalti.checkpoints import load_bundle
from smalti.cli import main
from smalti.data.latent_set import open_latents
from smalti.evaluation.results import read_result
from smalti.latents import load_codec
from smalti.sampling.record import read_record


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def train_flags(place, *more):
    tiny = ["--override", "depth=1", "hidden_size=16", "num_heads=2", "patch_size=2", "--batch-size", "8"]
    often = ["--log-every", "1", "--validate-every", "3", "--checkpoint-every", "2", "--device", "cpu"]
    preview = ["--preview.num-inference-steps", "2"]
    data = ["train", "--out", str(place / "run"), "--data.path", str(place / "latents"), "--data.flip"]
    return [*data, *tiny, *often, *preview, *more]


@pytest.mark.long
def test_from_images_to_numbers_in_latent_space(tmp_path, capsys):
    images, vae, latents, run = (tmp_path / name for name in ("images", "vae", "latents", "run"))
    write_set(images)
    stages = ["--widths", "4", "4", "--steps", "4", "--batch-size", "4", "--device", "cpu"]
    assert main(["autoencoder", "--data", str(images), "--out", str(vae), *stages]) == 0
    encoding = ["encode", str(images), "--codec", str(vae), "--out", str(latents), "--flips", "stored"]
    assert main([*encoding, "--device", "cpu"]) == 0
    assert open_latents(latents).record.identity.latent_shape == (4, 16, 16)

    assert main(train_flags(tmp_path, "--steps", "4", "--sample-every", "4")) == 0
    assert main(train_flags(tmp_path, "--steps", "6", "--sample-every", "4")) == 0  # goes on
    facts = load_codec(vae).facts
    assert load_bundle(run).extra["codec"]["sha256"] == facts.sha256
    assert load_bundle(run).model.config.in_channels == 4
    with Image.open(run / "samples" / "step-0000004.png") as preview:
        assert preview.width > 4 * 32  # images, not latents
    with open(run / "resolved.yaml") as file:
        assert yaml.safe_load(file)["data"]["fingerprint"] == open_latents(latents).fingerprint

    samples = tmp_path / "samples"
    drawing = ["--device", "cpu", "--sampling.sampler", "ddim", "--sampling.num-inference-steps", "2"]
    assert main(["sample", str(run), "--out", str(samples), "--seeds", "0-19", *drawing]) == 0
    identity = read_record(samples).identity
    assert (identity.image_size, identity.decoder) == ((32, 32), facts.label)

    measuring = ["evaluate", str(run), "--features", "lite0@32", "--metrics", "kid", "--images", "20", *drawing]
    capsys.readouterr()
    assert main([*measuring, "--out", str(tmp_path / "results")]) == 0
    (result,) = (tmp_path / "results").glob("*.json")
    protocol = read_result(result).protocol
    assert (protocol.decoder, protocol.image_size) == (facts.label, (32, 32))
    assert protocol.reference.name.startswith("tiny#train")  # the images, and not their latents
    assert "KID" in capsys.readouterr().out

    shutil.move(vae, tmp_path / "moved")
    assert main(["sample", str(run), "--out", str(tmp_path / "more"), "--seeds", "0-1", *drawing]) == 65
    assert "lies now with --codec" in capsys.readouterr().err
    moved = ["--codec", str(tmp_path / "moved")]
    assert main(["sample", str(run), "--out", str(tmp_path / "more"), "--seeds", "0-1", *drawing, *moved]) == 0
    assert (tmp_path / "more" / "000001.png").read_bytes() == (samples / "000001.png").read_bytes()


def test_a_run_on_latents_without_mirrors_is_refused_before_it_starts(tmp_path, capsys):
    vae = tiny_vae.saved(tmp_path / "vae")
    encoding = ["encode", str(write_set(tmp_path / "images", 16)), "--codec", str(vae), "--out"]
    assert main([*encoding, str(tmp_path / "latents"), "--device", "cpu"]) == 0
    assert main(train_flags(tmp_path, "--steps", "2", "--sample-every", "0")) == 64
    assert "--flips stored" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()

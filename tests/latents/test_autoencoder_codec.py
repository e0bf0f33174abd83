"""The autoencoder of Stable Diffusion as a codec, beside diffusers' own class with the same weights."""

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import tiny_vae
import torch
from safetensors.torch import load_file, save_file

from smalti.errors import CheckpointError, ConfigError
from smalti.latents import CodecFacts, PixelCodec, codec_of, decode_batches, load_codec
from smalti.latents.vae import CONFIG, WEIGHTS


@pytest.fixture(scope="module")
def theirs():
    return tiny_vae.network(scaling_factor=0.7, shift_factor=0.3)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return tiny_vae.save(tmp_path_factory.mktemp("vae"), theirs)


def images(count=5, rows=16, columns=24):
    return torch.rand(count, 3, rows, columns, generator=torch.Generator().manual_seed(1)) * 2 - 1


def edited(folder, to, **settings):
    """A copy of a codec's folder with other settings; None takes one out."""
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text()) | settings
    (to / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))
    return to


def rewritten(folder, to, change):
    """A copy of a codec's folder with other weights."""
    shutil.copytree(folder, to)
    save_file(change(load_file(to / WEIGHTS)), to / WEIGHTS)
    return to


def test_encoding_is_diffusers_own_with_shift_and_scale(folder, theirs):
    codec, x = load_codec(folder, rows=5), images()
    with torch.no_grad():
        latent = theirs.encode(x).latent_dist
    found = codec.encode(x)
    assert torch.equal(found.mean, (latent.mean - 0.3) * 0.7)
    assert torch.equal(found.std, latent.std * 0.7)
    assert found.mean.shape == (5, *codec.facts.latent_shape((16, 24))) == (5, 4, 8, 12)


def test_decoding_is_diffusers_own_with_shift_and_scale(folder, theirs):
    codec = load_codec(folder, rows=5)
    latents = codec.encode(images()).mean.contiguous()
    with torch.no_grad():
        expected = theirs.decode(latents / 0.7 + 0.3).sample
    assert torch.equal(codec.decode(latents), expected)


def test_an_image_has_one_result_whatever_it_is_batched_with(folder):
    codec, x = load_codec(folder), images(9)
    whole = codec.encode(x)
    again = codec.decode(whole.mean)
    for start, stop in ((0, 1), (3, 8), (8, 9)):
        part = codec.encode(x[start:stop])
        assert torch.equal(part.mean, whole.mean[start:stop])
        assert torch.equal(part.std, whole.std[start:stop])
        assert torch.equal(codec.decode(part.mean), again[start:stop])
    pieces = list(decode_batches(codec, [whole.mean[:2], whole.mean[2:]]))
    assert torch.equal(torch.cat(pieces), again)


def test_bf16_is_close_and_comes_out_in_float32(folder):
    exact, rounded = load_codec(folder).encode(images()), load_codec(folder, dtype=torch.bfloat16).encode(images())
    assert rounded.mean.dtype == torch.float32
    # Some thirty products of 8 bits of precision, one after the other.
    assert (rounded.mean - exact.mean).abs().max() < 30 * 2**-8 * exact.mean.abs().max()
    assert not torch.equal(rounded.mean, exact.mean)


def test_facts_are_those_of_the_folder_and_a_network_without_scale_has_stable_diffusions(folder, tmp_path):
    facts = load_codec(folder).facts
    assert (facts.kind, facts.channels, facts.factor, facts.scale, facts.shift) == ("autoencoder-kl", 4, 2, 0.7, 0.3)
    assert facts.source == str(folder)
    plain = edited(folder, tmp_path / "plain", scaling_factor="gone", shift_factor="gone")
    found = load_codec(plain).facts
    assert (found.scale, found.shift, found.sha256) == (0.18215, 0.0, facts.sha256)


def test_the_factor_follows_the_stages(tmp_path):
    codec = load_codec(tiny_vae.saved(tmp_path, block_out_channels=(4, 4, 4, 4), norm_num_groups=2))
    assert codec.facts.factor == 8
    assert codec.encode(images(1, 16, 24)).mean.shape == (1, 4, 2, 3)


def test_a_folder_vae_inside_is_found_and_old_names_are_read(folder, tmp_path):
    def old(tensors):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in names.items():
            tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()}
        assert any("proj_attn" in name for name in tensors)
        return tensors

    rewritten(folder, tmp_path / "pipeline" / "vae", old)
    found = load_codec(tmp_path / "pipeline")
    assert found.facts.sha256 == load_codec(folder).facts.sha256
    assert torch.equal(found.encode(images()).mean, load_codec(folder).encode(images()).mean)


def test_pixels_are_a_codec_too():
    assert isinstance(load_codec("pixels"), PixelCodec)
    assert isinstance(codec_of(CodecFacts()), PixelCodec)
    with pytest.raises(ConfigError, match="these are images and not latents"):
        codec_of(CodecFacts(), "runs/vae")


def test_a_codec_is_opened_again_and_another_one_is_refused(folder, tmp_path):
    facts = load_codec(folder).facts
    assert codec_of(facts).facts == facts
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert codec_of(facts, moved).facts.sha256 == facts.sha256
    other = tiny_vae.saved(tmp_path / "other", seed=1, scaling_factor=0.7, shift_factor=0.3)
    with pytest.raises(CheckpointError, match=r"is not the codec that is needed: its weights are .*, expected"):
        codec_of(facts, other)
    with pytest.raises(CheckpointError, match=r"scale 1.0, expected 0.7"):
        codec_of(facts, edited(folder, tmp_path / "scaled", scaling_factor=1.0))
    with pytest.raises(CheckpointError, match=r"say where the codec .* lies now with --codec"):
        codec_of(replace(facts, source=str(tmp_path / "gone")))


def test_another_decoder_of_the_same_latents_is_taken_only_when_it_is_said(folder, tmp_path):
    def decoder(tensors):
        return {n: t + 0.01 if n.startswith(("decoder.", "post_quant_conv.")) else t for n, t in tensors.items()}

    facts, tuned = load_codec(folder).facts, rewritten(folder, tmp_path / "tuned", decoder)
    with pytest.raises(CheckpointError, match="add --other-decoder"):
        codec_of(facts, tuned)
    assert codec_of(facts, tuned, other_decoder=True).facts.label != facts.label
    half = rewritten(tuned, tmp_path / "half", lambda tensors: {n: t.half() for n, t in tensors.items()})
    assert codec_of(facts, half, other_decoder=True).facts.encoder_sha256 == facts.encoder_sha256
    other = tiny_vae.saved(tmp_path / "other", seed=1, scaling_factor=0.7, shift_factor=0.3)
    with pytest.raises(CheckpointError, match="its encoder is another one as well"):
        codec_of(facts, other, other_decoder=True)


def nan(tensors):
    tensors["decoder.conv_out.bias"][1] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f, to: to, "neither a folder nor a repository"),
        (lambda f, to: to.mkdir() or to, "holds no codec"),
        (lambda f, to: shutil.copytree(f, to, ignore=lambda *_: [WEIGHTS]), f"has {CONFIG} but no {WEIGHTS}"),
        (lambda f, to: edited(f, to, _class_name="DiTTransformer2DModel"), "describes 'DiTTransformer2DModel'"),
        (lambda f, to: edited(f, to, latent_chanels=4), "did you mean 'latent_channels'"),
        (lambda f, to: edited(f, to, latents_mean=[0.0] * 4), "channel by channel"),
        (lambda f, to: edited(f, to, in_channels=1), "in_channels is 1"),
        (lambda f, to: edited(f, to, latent_channels=8), "another network than its config.json says: .*of another"),
        (lambda f, to: edited(f, to, norm_num_groups=3), "no network that diffusers can build"),
        (lambda f, to: rewritten(f, to, nan), "decoder.conv_out.bias has values that are not finite"),
        (lambda f, to: rewritten(f, to, lambda t: {n: t[n] for n in t if "conv_in" not in n}), "tensors missing"),
        (lambda f, to: rewritten(f, to, lambda t: t | {"extra": torch.zeros(1)}), "1 unexpected"),
    ],
)
def test_what_is_no_codec_is_refused_in_one_line(folder, tmp_path, make, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        load_codec(make(folder, tmp_path / "it"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


def test_a_pickle_is_refused_without_being_opened(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "it")
    (tmp_path / "it" / WEIGHTS).rename(tmp_path / "it" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle, which can run any code"):
        load_codec(tmp_path / "it")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_codec(tmp_path / "it" / "diffusion_pytorch_model.bin")


def test_cut_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "it")
    whole = (tmp_path / "it" / WEIGHTS).read_bytes()
    (tmp_path / "it" / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError):
        load_codec(tmp_path / "it")


def test_without_diffusers_it_is_said_what_to_install(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'smalti\[vae\]'"):
        load_codec(folder)


def test_sizes_that_are_no_multiple_are_refused(folder):
    with pytest.raises(ConfigError, match="15x16 is no multiple of 2"):
        load_codec(folder).encode(images(1, 15, 16))


@pytest.mark.parametrize("below", ["", "vae"])
def test_a_codec_comes_from_the_hub_as_safetensors_of_one_commit(folder, tmp_path, monkeypatch, below):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--vae" / "snapshots" / commit
    shutil.copytree(folder, snapshot / below)
    asked = []

    def download(repo_id, filename, *, revision=None, **_):
        asked.append((repo_id, filename, revision))
        path = snapshot / filename
        if not path.is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {filename}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = load_codec("owner/vae")
    assert found.facts == replace(load_codec(folder).facts, source="owner/vae")
    assert asked[-1] == ("owner/vae", str(Path(below, WEIGHTS)), commit)
    assert all(name.endswith((".json", ".safetensors")) for _, name, _ in asked)


def test_what_is_not_on_the_hub_is_said_in_one_line(monkeypatch):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"there is no folder owner/vae, and no config.json"):
        load_codec("owner/vae")

"""`--data.posterior mean` reaches the training: what the posteriors' spread is then changes no bit of the network."""

import pytest
import tiny_vae
import torch

from smalti.checkpoints import load_bundle
from smalti.cli import main
from smalti.data.latent_set import LatentSet
from smalti.workflows.encode import EncodeSettings, encode


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    place = tmp_path_factory.mktemp("mean")
    vae = tiny_vae.saved(place / "vae")
    encode(EncodeSettings(source="emoji32", codec=str(vae), out=place / "latents", limit=40, device="cpu", threads=1))
    return place / "latents"


def trained(latents, out, posterior):
    tiny = ["--override", "depth=1", "hidden_size=16", "num_heads=2", "patch_size=2", "--batch-size", "4"]
    data = ["--data.path", str(latents), "--data.posterior", posterior, "--data.validation-fraction", "0.25"]
    assert main(["train", "--out", str(out), *data, *tiny, "--steps", "2", "--device", "cpu"]) == 0
    return load_bundle(out).model.state_dict()


@pytest.mark.parametrize(("posterior", "same"), [("mean", True), ("sample", False)])
def test_only_a_run_on_means_does_not_see_the_spread(latents, tmp_path, monkeypatch, capsys, posterior, same):
    first = trained(latents, tmp_path / "first", posterior)
    moments = LatentSet.moments

    def wider(self, indices, views, **kw):
        return moments(self, indices, views, **kw) * torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1, 1)

    monkeypatch.setattr(LatentSet, "moments", wider)
    second = trained(latents, tmp_path / "second", posterior)
    assert all(torch.equal(first[name], second[name]) for name in first) is same

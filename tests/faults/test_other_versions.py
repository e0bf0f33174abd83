"""Files of another smalti: those of a newer one are refused in a line that says so, those of an older one are read."""

from pathlib import Path

import pytest
import tiny_vae
import torch
import yaml
from made_up_results import made_up, number
from tiny_runs import tiny_config, write_set

from smalti.data.latent_record import RECORD as LATENTS
from smalti.data.latent_set import open_latents
from smalti.errors import ConfigError
from smalti.evaluation.cache import FeatureCache
from smalti.evaluation.features import FeatureSet, NetworkIdentity
from smalti.evaluation.results import read_result, write_result
from smalti.sampling import SamplingConfig
from smalti.sampling.record import RECORD as SAMPLES
from smalti.sampling.record import LabelRule, ModelFacts, SampleIdentity, SampleRecord, read_record, record_bytes
from smalti.storage.sealed import NewerFormatError, seal, smalti_version, unseal
from smalti.training.config import GuardConfig
from smalti.training.guard import REWINDS, Guard
from smalti.workflows.encode import EncodeSettings, encode
from smalti.workflows.run_folder import CONFIG, RESOLVED, check_config, write_config
from smalti.workflows.run_identity import identity_of, refuse_another_run
from smalti.workflows.train_setup import prepare_run

pytestmark = pytest.mark.faults


def latents(folder):
    vae = tiny_vae.saved(folder / "vae")
    encode(EncodeSettings(source="emoji32", codec=str(vae), out=folder / "set", limit=4, device="cpu", threads=1))
    return folder / "set" / LATENTS, lambda: open_latents(folder / "set").record


def samples(folder):
    labels, facts = LabelRule(rule="none", num_classes=0), {"weights_sha256": "a" * 64, "config_sha256": "b" * 64}
    bits = {"micro_batch": 2, "precision": "fp32", "inference": "none", "device": "cpu", "threads": 1, "torch": "2.13"}
    what = {"seeds": "0-3", "count": 4, "image_size": (32, 32), "chunk_size": 2, "save": ("png",)}
    identity = SampleIdentity(label_rule=labels, sampling=SamplingConfig(), **facts, **bits, **what)
    model = ModelFacts(path="runs/dit", kind="dit", weights="ema", schedule="linear", learned_variance=True)
    record = SampleRecord(identity=identity, model=model, device_name="a CPU", smalti="0.1.0")
    (folder / SAMPLES).write_bytes(record_bytes(record))
    return folder / SAMPLES, lambda: read_record(folder)


def result(folder):
    write_result(made_up("dit", [number("fid", 12.5, 0.5)]), folder / "fid.json")
    return folder / "fid.json", lambda: read_result(folder / "fid.json")


def rewinds(folder):
    (folder / REWINDS).write_bytes(seal({"format": "smalti-rewinds", "version": 1, "smalti": "0.1.0", "steps": [3]}))
    return folder / REWINDS, lambda: Guard(GuardConfig(), folder).rewinds


@pytest.mark.parametrize("made", [latents, samples, result, rewinds])
def test_a_newer_record_is_refused_by_both_versions_and_one_of_an_older_smalti_is_read(tmp_path, made):
    path, read = made(tmp_path)
    here, body = read(), unseal(path.read_bytes(), "")
    path.write_bytes(seal(body | {"version": body["version"] + 1, "smalti": "9.9"}))
    with pytest.raises(NewerFormatError) as caught:
        read()
    said = str(caught.value)
    assert "\n" not in said
    for part in (str(path.name), "is of format version 2, written by smalti 9.9", "reads up to version 1: update it"):
        assert part in said
    path.write_bytes(seal(body | {"smalti": "0.0.1"}))
    assert read() == here


def test_kept_features_of_a_newer_smalti_are_made_anew_and_said_to_be(tmp_path):
    notes = []
    cache, network = FeatureCache(tmp_path, notes.append), NetworkIdentity("lite0", "abc", "96")
    cache.keep("images", network, ["pool"], FeatureSet({"pool": torch.ones(3, 2)}))
    (path,) = tmp_path.glob("*.json")
    body = unseal(path.read_bytes(), "")
    assert cache.load("images", network, ["pool"]) is not None
    path.write_bytes(seal(body | {"version": 2, "smalti": "9.9"}))
    assert cache.load("images", network, ["pool"]) is None
    assert "is of format version 2, written by smalti 9.9" in notes[-1]
    assert "made anew" in notes[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    config = tiny_config(folder / "run", write_set(folder / "set"))
    config.out.mkdir()
    prepared, model = prepare_run(config)
    return config, prepared.catalogue, model


def edited(path: Path, edit):
    document = yaml.safe_load(path.read_text())
    edit(document)
    path.write_text(yaml.safe_dump(document))


def test_settings_of_a_run_that_a_newer_smalti_wrote_are_refused_by_both_versions(run):
    config, catalogue, model = run
    write_config(config, catalogue, model)
    edited(config.out / CONFIG, lambda d: d["data"].update(holograms=True))
    with pytest.raises(ConfigError, match="unknown setting 'holograms'") as caught:
        check_config(config, catalogue)
    assert "it was written by" not in str(caught.value)  # by this one, and somebody has changed the file
    edited(config.out / RESOLVED, lambda d: d.update(smalti="9.9"))
    with pytest.raises(ConfigError, match="unknown setting 'holograms'") as caught:
        check_config(config, catalogue)
    assert f"; it was written by smalti 9.9, and this is {smalti_version()}: use that version" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_of_an_older_smalti_that_knew_fewer_settings_goes_on(run):
    config, catalogue, model = run
    write_config(config, catalogue, model)
    edited(config.out / CONFIG, lambda d: (d.pop("guard"), d["data"].pop("posterior")))
    edited(config.out / RESOLVED, lambda d: d.pop("smalti"))
    assert check_config(config, catalogue) == []


def test_the_identity_in_a_checkpoint_follows_the_same_rules(run):
    config, catalogue, _ = run
    mine = identity_of(config, catalogue)
    older = {
        "settings": {k: v for k, v in mine["settings"].items() if k != "guard"},
        "fingerprint": mine["fingerprint"],
    }
    for identity in (None, mine, older):
        refuse_another_run(identity, config, catalogue, "step-6")
    newer = mine | {"settings": mine["settings"] | {"holograms": True}, "smalti": "9.9"}
    for identity, said in ((newer, "unknown setting 'holograms'"), ({"smalti": "9.9"}, "step-6")):
        with pytest.raises(ConfigError, match=said) as caught:
            refuse_another_run(identity, config, catalogue, "step-6")
        assert f"; it was written by smalti 9.9, and this is {smalti_version()}: use that version" in str(caught.value)

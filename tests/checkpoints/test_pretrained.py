"""Backbones as users of huggingface_hub know them. There is no hub here: its client is replaced, its cache is made."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelHubMixin

import smalti
from smalti.checkpoints import load_bundle, load_model, save_model
from smalti.errors import CheckpointError, ConfigError
from smalti.models import BACKBONES, DiT, DiTConfig, build_backbone
from smalti.models.pretrained import Pretrained
from smalti.nn.mixers import AttentionConfig

ROOT = Path(__file__).parents[2]
CONFIG = DiTConfig(
    hidden_size=16, depth=2, mixer=AttentionConfig(num_heads=2), sample_size=(8, 4), in_channels=3, num_classes=5
)
FILES = ["README.md", "config.json", "model.safetensors"]


def network(seed=0):
    model = build_backbone(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def same(a, b):
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_can_save_itself_and_be_found(kind):
    assert issubclass(BACKBONES[kind].module, Pretrained)


def test_what_save_pretrained_writes_is_the_format_of_save_model_and_a_card(tmp_path):
    model = network()
    assert model.save_pretrained(tmp_path / "a", extra={"objective": {"schedule": "flow"}}) is None
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == FILES
    save_model(tmp_path / "b", model, extra={"objective": {"schedule": "flow"}})
    for name in FILES[1:]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for found in (
        load_model(tmp_path / "a"),
        smalti.from_pretrained(tmp_path / "b"),
        DiT.from_pretrained(tmp_path / "a"),
    ):
        assert same(found, model)
        assert not found.training


def test_what_was_stored_with_a_model_is_stored_with_it_again(tmp_path):
    network().save_pretrained(tmp_path / "a", extra={"class_names": ["x"]})
    smalti.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert load_bundle(tmp_path / "b").extra == {"class_names": ["x"]}
    smalti.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c", extra={})
    assert load_bundle(tmp_path / "c").extra == {}
    assert network().stored_with == {}


def test_a_model_comes_in_the_type_asked_for_from_a_run_folder_too(tmp_path):
    network().save_pretrained(tmp_path / "run" / "model")
    found = smalti.from_pretrained(str(tmp_path / "run"), dtype=torch.float64)
    assert {p.dtype for p in found.parameters()} == {torch.float64}


def test_the_card_is_what_the_hub_reads_and_one_that_is_there_stays(tmp_path):
    kwargs = {"license": "apache-2.0", "tags": ["emoji", "dit"]}
    network().save_pretrained(tmp_path, model_card_kwargs=kwargs)
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "library_name": "smalti",
        "tags": ["smalti", "diffusion", "dit", "emoji"],
        "license": "apache-2.0",
    }
    assert "smalti.from_pretrained(" in text
    (tmp_path / "README.md").write_text("mine")
    network().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(ConfigError, match="unknown entry 'licence'; did you mean 'license'"):
        network().save_pretrained(tmp_path / "b", model_card_kwargs={"licence": "x"})


def test_the_keywords_are_those_that_users_of_the_hub_know():
    for name, left_out in {
        "save_pretrained": {"config", "push_to_hub_kwargs"},  # a backbone has one config; we list what is handed on
        "from_pretrained": {"model_kwargs"},
        "push_to_hub": {"config"},
    }.items():
        theirs = set(inspect.signature(getattr(ModelHubMixin, name)).parameters)
        ours = set(inspect.signature(getattr(DiT, name)).parameters)
        assert theirs - ours == left_out, name
    assert set(inspect.signature(smalti.from_pretrained).parameters) == set(
        inspect.signature(DiT.from_pretrained).parameters
    )


# --- the hub, replaced


class Api:
    """Takes what HfApi takes, by the same names, and keeps what was uploaded."""

    def __init__(self, calls, **options):
        inspect.signature(huggingface_hub.HfApi.__init__).bind(None, **options)
        self.calls = calls
        calls.append(("api", options))

    def create_repo(self, **options):
        inspect.signature(REAL.create_repo).bind(None, **options)
        self.calls.append(("create_repo", options))
        name = options["repo_id"]
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, **options):
        inspect.signature(REAL.upload_folder).bind(None, **options)
        folder = Path(options.pop("folder_path"))
        model = smalti.from_pretrained(folder)
        self.calls.append(("upload", options, sorted(p.name for p in folder.iterdir()), model))
        return "https://hub/commit/1"


REAL = huggingface_hub.HfApi


@pytest.fixture
def hub(monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: Api(calls, **options))
    return calls


def test_push_to_hub_makes_the_repository_and_uploads_all_in_one_commit(hub):
    model = network()
    assert model.push_to_hub("thing", private=True, token="t", branch="b", commit_message="m") == "https://hub/commit/1"
    (_, api), (_, repository), (_, upload, names, pushed) = hub
    assert api["token"] == "t"
    assert repository == {"repo_id": "thing", "private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/thing"
    assert (upload["revision"], upload["commit_message"], upload["repo_type"]) == ("b", "m", "model")
    assert names == FILES
    assert same(pushed, model)


def test_save_pretrained_pushes_when_asked_under_the_folder_s_name(hub, tmp_path):
    assert network().save_pretrained(tmp_path / "mine", push_to_hub=True, token="t") == "https://hub/commit/1"
    assert hub[1][1]["repo_id"] == "mine"
    network().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="you/yours")
    assert hub[-1][1]["repo_id"] == "you/yours"


def cached(cache, name, fill, commit="a" * 40):
    """A repository as huggingface_hub keeps it: blobs, and links to them under the name of a commit."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    fill(blobs)
    for i, path in enumerate(sorted(blobs.iterdir())):
        blob = blobs / f"{i:040d}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(blob)
    return cache


def test_a_repository_in_the_cache_is_found_without_the_network(tmp_path):
    model = network()
    cache = cached(tmp_path, "me/thing", model.save_pretrained)
    for revision in (None, "main", "a" * 40):
        found = smalti.from_pretrained("me/thing", cache_dir=cache, local_files_only=True, revision=revision)
        assert same(found, model)


def test_a_repository_of_something_else_is_refused_before_its_weights_are_fetched(tmp_path):
    cache = cached(tmp_path, "me/other", lambda blobs: (blobs / "config.json").write_text('{"_class_name": "UNet"}'))
    with pytest.raises(CheckpointError, match=r"me/other holds no model of this smalti.*'UNet'"):
        smalti.from_pretrained("me/other", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("name", ["me/nothing", "nothing", "../nothing", "a/b/c"])
def test_what_is_not_there_is_one_line(tmp_path, name):
    with pytest.raises(CheckpointError) as caught:
        smalti.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert len(str(caught.value).splitlines()) == 1
    assert name in str(caught.value)


def test_a_model_of_another_kind_is_refused_with_its_own(tmp_path):
    class Other(DiT):
        pass

    network().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a DiT, not a Other: load it with DiT\.from_pretrained"):
        Other.from_pretrained(tmp_path)


def test_the_hub_s_library_is_imported_only_for_a_repository(tmp_path):
    network().save_pretrained(tmp_path)
    code = (
        "import sys, smalti, smalti.cli, smalti.models, smalti.workflows.convert; smalti.from_pretrained(sys.argv[1]); "
    )
    code += "print('huggingface_hub' in sys.modules, 'diffusers' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False", "False"]

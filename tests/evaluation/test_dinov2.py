"""DINOv2 through transformers: its class token, from a folder or the hub, and one line for everything else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smalti.errors import CheckpointError, ConfigError
from smalti.evaluation.networks import build_network

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small DINOv2 with random weights, and its folder as transformers stores it; its positions are for 70 pixels."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2)  # by default many are 0 or 1, which would hide a wrong order
    folder = tmp_path_factory.mktemp("dinov2")
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bar:
        transformers.utils.logging.enable_progress_bar()
    return model, folder


@pytest.fixture
def folder(released, tmp_path):
    """A copy to break."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((released[1] / name).read_bytes())
    return tmp_path


def _images(count, size):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_are_the_normed_class_token_of_transformers(released):
    model, folder = released
    network = build_network(f"dinov2:{folder}")
    images = _images(3, 224)
    images[1] //= 8
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        scaled = (images / 255 - mean[:, None, None]) / std[:, None, None]
        expected = model(pixel_values=scaled).pooler_output
    assert network.identity.name == "dinov2"
    assert network.identity.resize.startswith("224, bicubic")
    assert network.widths == {"pool": 32}
    # Images differ by a rounding of what was divided by 255 first or last; two blocks in float32 make it a few times
    # larger, and the norm at the end makes features of order 1.
    torch.testing.assert_close(network(images)["pool"], expected, rtol=0, atol=2e-5)
    assert "torchvision" not in sys.modules
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_loading_is_silent_and_leaves_the_settings_of_transformers_alone(released, capfd):
    import transformers

    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    build_network(f"dinov2:{released[1]}")
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_the_hash_is_that_of_the_weights_in_the_file(released, folder):
    same = build_network(f"dinov2:{folder}").identity
    assert same == build_network(f"dinov2:{released[1]}").identity
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.bias"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert build_network(f"dinov2:{folder}").identity.weights != same.weights


def _without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _with_one_more(folder):
    tensors = load_file(folder / "model.safetensors") | {"more": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _of_another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def _of_another_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))


def _with_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "code.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this ran')")


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


BROKEN = {
    "a tensor is missing": (_without_a_tensor, "missing keys layernorm.bias"),
    "a tensor too many": (_with_one_more, "unexpected keys more"),
    "another width": (_of_another_width, "does not hold the DINOv2|cannot load it"),
    "another type": (_of_another_type, "a model of type 'vit', not dinov2"),
    "code beside it": (_with_code, "a model of type 'mine', not dinov2"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no table": (lambda f: (f / "config.json").write_text("[]"), "a model of type None"),
    "large": (lambda f: (f / "config.json").write_bytes(b" " * (2 << 20)), "which no config has"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors: only safetensors"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "has no model.safetensors"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "safetensors",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_with_something_else_is_refused_in_one_line(folder, what, capfd):
    change, says = BROKEN[what]
    change(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        build_network(f"dinov2:{folder}")
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("place", ["nothing", "a/b/c", "./a", "/no/such", "~/none-such", "owner/"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(place, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=r"there is no folder .* give dinov2:FOLDER"):
        build_network(f"dinov2:{place}")


def test_without_a_network_one_line_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"facebook/dinov2-large, and the .* give dinov2:FOLDER") as said:
        build_network("dinov2")
    assert len(str(said.value).splitlines()) == 1


def test_what_the_hub_has_sent_before_is_used_without_asking_it_again(released, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(released[1] / file))
    assert build_network("dinov2:owner/name").widths == {"pool": 32}


@pytest.mark.parametrize("spec", ["dinov2@96", "dinov2:"])
def test_a_size_or_an_empty_place_is_refused(spec):
    with pytest.raises(ConfigError, match="give dinov2, dinov2:FOLDER or dinov2:OWNER/NAME"):
        build_network(spec)


def test_without_transformers_one_line_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'smalti\[dinov2\]'"):
        build_network("dinov2")


def test_importing_the_networks_imports_no_transformers():
    code = "import sys, smalti.evaluation.networks.dinov2 as d; print('transformers' in sys.modules, d.DEFAULT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "facebook/dinov2-large"]

"""Recipes are the papers' settings: held against a table of facts that was not made from them."""

import dataclasses
import fnmatch
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

from smalti.cli import main
from smalti.config import from_dict, to_dict
from smalti.cost import count_parameters, on_meta
from smalti.cost.plan import PlanRequest
from smalti.errors import ConfigError
from smalti.presets.published import published
from smalti.training.config import RunConfig
from smalti.workflows.recipes import FOLDER, find_recipe, load_settings, recipe_lines, recipe_names

ROOT = Path(__file__).parents[2]
IMAGENET, CIFAR10, CELEBA = 1_281_167, 50_000, 202_599

# name: (network's parameters as counted on released classes or, for DiffuSSM, by the sum of its parts; images in all
# that the source trains on, None where it is silent; batch; latents or pixels; classes)
TOTALS = {
    "dit-xl-2-imagenet256": (675_129_632, 1_792_000_000, 256, (4, 32), 1000),
    "dit-xl-2-imagenet512": (676_014_368, 768_000_000, 256, (4, 64), 1000),
    "dit-l-2-imagenet256": (458_102_816, 102_400_000, 256, (4, 32), 1000),
    "dit-b-2-imagenet256": (130_512_416, 102_400_000, 256, (4, 32), 1000),
    "dit-s-2-imagenet256": (32_963_360, 102_400_000, 256, (4, 32), 1000),
    "diffussm-xl-imagenet256": (673_107_848, 660_000_000, 256, (4, 32), 1000),
    "diffussm-xl-imagenet512": (673_107_848, 302_000_000, 256, (4, 64), 1000),
    # without the table of 1001 labels, 1152 wide
    "diffussm-xl-lsun-church256": (673_107_848 - 1001 * 1152, None, 256, (4, 32), 0),
    "diffussm-xl-lsun-bedroom256": (673_107_848 - 1001 * 1152, None, 256, (4, 32), 0),
    "drwkv-h-2-imagenet256": (780_313_632, None, 128, (4, 32), 1000),
    "drwkv-h-2-imagenet512": (781_100_064, None, 128, (4, 64), 1000),
    "drwkv-l-2-imagenet256": (439_352_096, None, 128, (4, 32), 1000),
    "drwkv-b-2-imagenet256": (74_793_632, None, 128, (4, 32), 1000),
    "drwkv-s-2-cifar10": (38_934_552, None, 128, (3, 32), 0),
    "drwkv-l-2-celeba64": (439_163_928, None, 128, (3, 64), 0),
    "udit-s-imagenet256": (58_896_568, 102_400_000, 256, (4, 32), 1000),
    "udit-b-imagenet256": (231_251_304, 102_400_000, 256, (4, 32), 1000),
    "udit-l-imagenet256": (916_335_304, 102_400_000, 256, (4, 32), 1000),
    "udit-b-imagenet512": (231_251_304, 102_400_000, 256, (4, 64), 1000),
}

# Settings by family; every recipe has all of them.
FACTS = {
    "*": {
        "objective.schedule": "linear",
        "objective.num_train_timesteps": 1000,
        "objective.prediction": "eps",
        "objective.timestep_sampling": "uniform",
        "objective.loss_weighting": "none",
        "objective.variational_weight": 1.0,
        "optimizer.learning_rate": 1e-4,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.0,
        "ema_decay": 0.9999,
        "data.flip": True,
        "data.validation_fraction": 0.0,
        "data.posterior": "sample",
    },
    "dit-*": {"precision": "tf32", "optimizer.decay": "constant", "optimizer.warmup_steps": 0, "stochastic_depth": 0.0},
    "diffussm-*": {"precision": "bf16", "optimizer.decay": "constant", "optimizer.warmup_steps": 0},
    "udit-*": {
        "precision": "bf16",
        "optimizer.decay": "constant",
        "optimizer.warmup_steps": 0,
        "stochastic_depth": 0.0,
    },
    "[du]i*": {"optimizer.clip_norm": None},
    "*-imagenet*": {"objective.label_dropout": 0.1},
    "drwkv-*": {
        "precision": "tf32",
        "optimizer.decay": "cosine",
        "optimizer.clip_norm": 1.0,
        "stochastic_depth": 0.1,
        "seed": 420,
    },
    "drwkv-*-imagenet*": {"optimizer.warmup_steps": round(5 * IMAGENET / 128)},
    "drwkv-*-cifar10": {"optimizer.warmup_steps": round(5 * CIFAR10 / 128), "data.image_size": 32},
    "drwkv-*-celeba64": {"optimizer.warmup_steps": round(5 * CELEBA / 128), "data.image_size": 64},
    "[!u]*": {"objective.label_drop": "shared"},
    "udit-*-*": {"objective.label_drop": "independent"},
}

# What no source says, and a recipe must not pass off as published.
UNKNOWN = {
    "diffussm-*": {"optimizer.learning_rate", "ema_decay", "data.flip"},
    "diffussm-*lsun*": {"steps", "model"},
    "drwkv-*": {"steps", "batch_size"},
    "udit-*": {"precision"},
}

EACH = pytest.mark.parametrize("name", recipe_names())


def value_of(config, dotted):
    found = to_dict(config)
    for part in dotted.split("."):
        found = found[part]
    return found


def of(table, name):
    return [entry for pattern, entry in table.items() if fnmatch.fnmatch(name, pattern)]


def test_the_recipes_are_those_of_the_table():
    assert recipe_names() == sorted(TOTALS)


@EACH
def test_a_recipe_states_the_facts(name):
    recipe = find_recipe(name)
    facts = {key: value for part in of(FACTS, name) for key, value in part.items()}
    assert {key: value_of(recipe.config, key) for key in facts} == facts
    _, images, batch, _, classes = TOTALS[name]
    assert recipe.config.batch_size == batch
    if images is not None:
        assert recipe.config.steps == -(-images // batch)
        assert "steps" not in recipe.unknown
    if not classes:
        assert recipe.config.objective.label_dropout == 0.0


@EACH
def test_what_is_not_published_is_said_to_be_unknown(name):
    recipe = find_recipe(name)
    assert set().union(*of(UNKNOWN, name)) <= set(recipe.unknown)
    for dotted, why in recipe.unknown.items():
        value_of(recipe.config, dotted)  # it is a setting
        assert len(why) > 3
    assert (TOTALS[name][1] is None) == ("steps" in recipe.unknown)


@EACH
def test_a_recipe_builds_the_published_network(name):
    total, _, _, (channels, side), classes = TOTALS[name]
    network = find_recipe(name).network
    assert count_parameters(on_meta(network)).total == total
    assert (network.in_channels, network.sample_size, network.num_classes) == (channels, (side, side), classes)
    assert network.learned_variance


@EACH
def test_what_the_repository_knows_of_the_published_run_agrees(name):
    """A second source: the table of printed results says steps and batch, too."""
    recipe = find_recipe(name)
    resolution = int(re.search(r"(\d+)$", name)[1])
    rows = [row for row in published() if row.preset == recipe.config.model and row.resolution == resolution]
    known = {(row.steps, row.batch_size) for row in rows if row.steps is not None and row.batch_size is not None}
    if "steps" in recipe.unknown or not known:
        assert (recipe.config.steps, recipe.config.batch_size) not in known - {(400_000, 256)}
    else:
        assert any(
            abs(steps - recipe.config.steps) <= 1 and batch == recipe.config.batch_size for steps, batch in known
        )


@EACH
def test_every_setting_stands_in_the_file_beside_its_source(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    data = yaml.safe_load(text)
    assert data["out"] == f"runs/{name}"
    about = data["about"]
    assert set(about) == {"title", "source", "data", "differs", "unknown"}
    assert re.search(r"arXiv:\d{4}\.\d{5}", about["source"])
    if TOTALS[name][3][0] == 4:
        assert "0.18215" in about["data"]
        assert "sd-vae-ft-ema" in about["data"]
    body = text.split("\nout: ")[1].split("log_every")[0]
    bare = [line for line in body.splitlines()[1:] if not line.endswith(":") and "  # " not in line]
    assert bare == []
    named = re.findall(r"see (differs|unknown)", body)
    assert not named or about["differs"] or about["unknown"]


def test_a_copy_of_a_recipe_is_a_settings_file(tmp_path, monkeypatch):
    text = (FOLDER / "dit-s-2-imagenet256.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("seed: 0 ", "seed: 7 "))
    assert load_settings(str(tmp_path / "mine.yaml")) == dataclasses.replace(
        find_recipe("dit-s-2-imagenet256").config, seed=7
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dit-s-2-imagenet256").write_text("seed: 3\n")
    assert load_settings("dit-s-2-imagenet256") == RunConfig(seed=3)  # a path wins over a name


@pytest.mark.parametrize("name", ["dit-xl-2-imagenet256", "DiT-XL-2-ImageNet256", "dit_xl_2_imagenet256"])
def test_a_recipe_is_found_in_the_usual_spellings(name):
    assert load_settings(name).model == "dit-xl-2"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("dit-xl-2-imagnet256", "no recipe 'dit-xl-2-imagnet256'; did you mean 'dit-xl-2-imagenet256'?"),
        ("runs/none/config.yaml", "runs/none/config.yaml does not exist; give the path of a YAML file with settings"),
        ("none.yml", "does not exist"),
    ],
)
def test_a_name_that_is_none_is_told_the_nearest(asked, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_settings(asked)


@pytest.mark.parametrize(("text", "said"), [("about: 3", "expected a table"), ("[1]", "expected a table of settings")])
def test_a_file_of_another_form_is_refused(text, said, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_settings(str(tmp_path / "x.yaml"))


def test_the_command_lists_recipes_and_prints_one(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", out, re.MULTILINE) for name in recipe_names())
    assert all(len(line) <= 120 for line in out.splitlines())
    assert main(["recipes", "udit-*"]) == 0
    assert capsys.readouterr().out.count("arXiv:2405.02730\n") == 4
    assert main(["recipes", "udit-b-imagenet256"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    printed.pop("about")
    assert from_dict(RunConfig, printed) == find_recipe("udit-b-imagenet256").config
    with pytest.raises(ConfigError, match="no recipe matches"):
        list(recipe_lines("nothing*"))


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_recipe_whose_data_are_missing_says_how_they_are_made(more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "udit-b-imagenet256", "--device", "cpu", *more]) == 65
    said = capsys.readouterr().err
    assert "'latents/imagenet256' is neither an image set" in said
    assert "`smalti recipes udit-b-imagenet256` says how its data are made" in said
    assert list(tmp_path.iterdir()) == []


def test_data_that_no_recipe_names_are_not_told_of_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "udit-b-imagenet256", "--data.path", "elsewhere", "--device", "cpu"]) == 65
    assert "smalti recipes" not in capsys.readouterr().err


def test_the_recipes_are_in_the_package_that_is_installed():
    """Hatch takes what lies in the folder and git does not ignore."""
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["smalti"]}
    assert FOLDER.relative_to(ROOT / "smalti")
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert not [line for line in ignored if fnmatch.fnmatch("x.yaml", line) or line.strip("/") == "recipes"]


# --- the page


@pytest.fixture(scope="module")
def pages():
    """tools/recipes_page.py as a module."""
    spec = importlib.util.spec_from_file_location("recipes_page", ROOT / "tools" / "recipes_page.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(pages, name):
    recipe = find_recipe(name)
    plan = pages.planned(recipe)
    assert isinstance(plan.request, PlanRequest)
    text = pages.PAGE.read_text()
    assert "\n".join(pages.section(recipe, plan)) in text, "run `python tools/recipes_page.py`"
    assert pages.row(recipe, plan) in text.splitlines()


def test_the_page_shows_the_plan_as_it_is_made_now(pages):
    check(pages, "dit-s-2-imagenet256")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"dit-s-2-imagenet256"}))
def test_the_page_shows_every_plan_as_it_is_made_now(name, pages):
    check(pages, name)


def test_the_page_has_every_recipe_once(pages):
    text = pages.PAGE.read_text()
    assert text.startswith(pages.HEAD)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == recipe_names()

"""One concept, one name; no file for odds and ends; every module says what it is for."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "smalti").rglob("*.py"))
EACH = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))

# The glossary's other spellings, with the word to use. Released names may stand where released code is translated.
OTHER_SPELLINGS = {
    "y": "class_labels",
    "labels": "class_labels",
    "t": "timesteps",
    "ts": "timesteps",
    "z": "latents",
    "imgs": "images",
    "pred_xstart": "x0",
    "noise_pred": "eps",
    "iters": "steps",
    "num_steps": "num_inference_steps",
    "cfg": "guidance_scale or config",
    "cfg_scale": "guidance_scale",
    "omega": "guidance_scale",
    "w": "guidance_scale",
    "emb": "cond",
    "beta": "shift",
    "embed_dim": "hidden_size",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_head": "num_heads",
    "n_layer": "depth",
    "patch_resolution": "grid",
    "learn_sigma": "learned_variance",
    "lr": "learning_rate",
    "bs": "batch_size",
    "ref": "reference",
    "fake": "ours",
    "feats": "features",
    "net": "network",
}
TRANSLATORS = {"smalti/checkpoints/official.py"}


def is_public(name):
    return not name.startswith("_") or name == "__init__"


def public_names(tree):
    """Parameters of public functions and annotated fields of public classes, each with where it stands."""
    todo = [(node, "") for node in tree.body]
    while todo:
        node, inside = todo.pop()
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            todo += [(child, f"{node.name}.") for child in node.body]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node.name):
            a = node.args
            for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs):
                yield argument.arg, f"{inside}{node.name}"
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and inside:
            yield node.target.id, inside.rstrip(".")


@EACH
def test_public_names_are_those_of_the_glossary(path):
    name = str(path.relative_to(ROOT))
    if name in TRANSLATORS or "/maps/" in name:
        return
    for used, where in public_names(ast.parse(path.read_text())):
        assert used not in OTHER_SPELLINGS, f"{where}({used}): say {OTHER_SPELLINGS[used]}"


def test_the_walk_over_public_names_sees_parameters_and_fields():
    tree = ast.parse(
        "def f(a, *, b): ...\ndef _g(c): ...\nclass K:\n  d: int\n  def __init__(self, e): ...\n  def _h(self, i): ..."
    )
    assert {name for name, _ in public_names(tree)} == {"a", "b", "d", "self", "e"}


@EACH
def test_constructors_alone_may_call_their_config_c(path):
    for used, where in public_names(ast.parse(path.read_text())):
        assert used != "c" or where.endswith("__init__"), where


def test_there_is_no_file_for_odds_and_ends():
    names = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
    assert [p for p in (ROOT / "smalti").rglob("*") if p.stem.lower() in names] == []


@EACH
def test_every_module_says_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "no docstring"
    assert docstring.splitlines()[0].endswith((".", ":")) or len(docstring.splitlines()) > 1


@EACH
def test_every_public_function_and_class_says_what_it_is_for(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@EACH
def test_a_file_of_more_than_400_lines_says_why_at_its_top(path):
    text = path.read_text()
    if len(text.splitlines()) > 400:
        docstring = (ast.get_docstring(ast.parse(text)) or "").lower()
        assert "lines" in docstring or "long" in docstring, f"{len(text.splitlines())} lines and no word about it"


def test_presets_hold_data_and_no_networks():
    # The layer contract lets presets import what is below; the house allows them config classes only.
    for path in (ROOT / "smalti" / "presets").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not any("Module" in ast.unparse(base) for base in node.bases), f"{path.name}: {node.name}"

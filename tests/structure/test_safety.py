"""Nothing runs code from a file, nothing happens on import, nothing falls back in silence."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "smalti").rglob("*.py"))
EACH = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))

# Calls that run what a file says, or write where an archive says.
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "torch.hub.load",
    "shelve.open",
    "joblib.load",
}
FORBIDDEN_METHODS = {"extractall", "extract"}
FORBIDDEN_KEYWORDS = {("weights_only", False), ("allow_pickle", True), ("shell", True), ("trust_remote_code", True)}
# Calls that change the whole process; at import they would do so behind the user's back.
GLOBAL_CALLS = {
    "torch.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.set_num_threads",
    "torch.set_default_dtype",
    "torch.set_default_device",
    "torch.use_deterministic_algorithms",
    "torch.set_float32_matmul_precision",
    "torch.cuda.is_available",
    "torch.cuda.device_count",
    "torch.compile",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
    "os.environ.get",
    "os.getenv",
    "warnings.filterwarnings",
    "warnings.simplefilter",
    "logging.basicConfig",
    "signal.signal",
}


def problems_of(tree):
    """What in a module reads files as code; empty when nothing does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            yield from (
                f"imports {name}" for name in names if name in ("pickle", "dill", "joblib", "marshal", "shelve")
            )
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS):
            yield f"calls {called}"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in FORBIDDEN_KEYWORDS:
                yield f"passes {keyword.arg}={value}"
        if called == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}:
            yield "calls torch.load without weights_only=True"


def at_import(tree):
    """Calls that run when the module is imported."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
            continue
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        if isinstance(node, ast.Subscript):
            yield ast.unparse(node.value)
        todo += list(ast.iter_child_nodes(node))


@pytest.mark.faults
@EACH
def test_no_module_runs_what_a_file_says(path):
    assert list(problems_of(ast.parse(path.read_text()))) == []


@EACH
def test_no_module_changes_or_asks_the_machine_when_it_is_imported(path):
    called = set(at_import(ast.parse(path.read_text())))
    assert called & (GLOBAL_CALLS | {"os.environ"}) == set()


@EACH
def test_no_module_swallows_an_error(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            kind = ast.unparse(node.type) if node.type else ""
            silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            assert kind, f"line {node.lineno}: a bare except"
            assert not (silent and kind in ("Exception", "BaseException", "ImportError")), f"line {node.lineno}"


@EACH
def test_no_network_is_loaded_with_keys_left_over(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_state_dict"):
            values = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert values.get("strict", "True") == "True", f"line {node.lineno}"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("torch.load(f, weights_only=False)", "weights_only=False"),
        ("torch.load(f)", "without weights_only"),
        ("import pickle", "imports pickle"),
        ("from pickle import load", "imports pickle"),
        ("np.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("yaml.load(f)", "calls yaml.load"),
        ("eval(text)", "calls eval"),
        ("archive.extractall(folder)", "calls archive.extractall"),
        ("subprocess.run(text, shell=True)", "shell=True"),
    ],
)
def test_the_walk_over_calls_sees_what_it_looks_for(code, problem):
    assert any(problem in found for found in problems_of(ast.parse(code)))
    assert list(problems_of(ast.parse("torch.load(f, weights_only=True); yaml.safe_load(f); model.eval()"))) == []


def test_the_walk_at_import_sees_defaults_and_decorators_and_not_bodies():
    tree = ast.parse(
        "a = f()\n@g()\ndef h(x=i()):\n  return j()\nclass K:\n  l = m()\n  def n(self): o()\nos.environ['p']"
    )
    assert set(at_import(tree)) == {"f", "g", "i", "m", "os.environ"}


PROGRAM = """
import json, os, sys

asked = []


class Watched(dict):
    def __getitem__(self, name):
        asked.append(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        asked.append(name)
        return super().get(name, default)


os.environ = Watched(os.environ)
import {module}

cuda = sys.modules["torch"].cuda.is_initialized() if "torch" in sys.modules else False
print(json.dumps(dict(modules=sorted(sys.modules), asked=asked, cuda=cuda)))
"""
HEAVY = {
    "triton",
    "torchvision",
    "matplotlib",
    "tensorboard",
    "scipy",
    "pandas",
    "sklearn",
    "transformers",
    "diffusers",
}


def imported(module):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return json.loads(run.stdout)


def test_importing_smalti_starts_nothing_reads_no_variable_and_touches_no_gpu():
    seen = imported("smalti")
    assert {name.split(".")[0] for name in seen["modules"]} & (HEAVY | {"torch", "numpy"}) == set()
    assert [name for name in seen["asked"] if "SMALTI" in name or "CUDA" in name] == []
    assert seen["cuda"] is False


def test_importing_everything_below_the_command_line_starts_no_compiler_and_no_plots():
    seen = imported("smalti.workflows, smalti.models, smalti.presets, smalti.sampling, smalti.training, smalti.data")
    ours = {name for name in seen["modules"] if name.split(".")[0] == "smalti"}
    assert "smalti.ops.attention.sdpa" in ours
    assert {name.split(".")[0] for name in seen["modules"]} & HEAVY == set()
    assert "torch._dynamo" not in seen["modules"] or seen["cuda"] is False
    assert [name for name in seen["asked"] if name.startswith("SMALTI")] == []


def test_importing_what_measures_images_brings_no_library_of_networks_and_nothing_above_it():
    seen = imported("smalti.evaluation, smalti.data")
    ours = {name.split(".")[1] for name in seen["modules"] if name.startswith("smalti.")}
    assert {name.split(".")[0] for name in seen["modules"]} & HEAVY == set()
    assert "evaluation" in ours
    assert ours & {"models", "sampling", "training", "presets", "report", "workflows", "cli"} == set()
    assert [name for name in seen["asked"] if name.startswith("SMALTI")] == []

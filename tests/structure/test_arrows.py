"""Arrows point down, and a reader who starts at a backbone is soon at the bottom."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from smalti.models import BACKBONES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "smalti"


def test_import_linter_finds_no_arrow_that_points_up():
    run = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 kept, 0 broken" in run.stdout


def test_every_package_has_a_place_in_the_layers():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    placed = {name.strip(" ()") for layer in contract["layers"] for name in layer.split("|")}
    there = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    there |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert there == placed
    assert not any("(" in layer for layer in contract["layers"]), "a package that exists needs no parentheses"


def test_the_linter_would_see_an_arrow_that_points_up(tmp_path):
    # The same contract over a copy with one wrong import: a check that cannot fail checks nothing.
    copy = tmp_path / "smalti"
    for path in PACKAGE.rglob("*.py"):
        target = copy / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    with (copy / "nn" / "layers.py").open("a") as file:
        file.write("\nimport smalti.diffusion.levels\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    run = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert run.returncode == 1
    assert "smalti.nn.layers -> smalti.diffusion.levels" in run.stdout


def file_of(module):
    """The file of a module of ours, or None."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((c for c in candidates if module.split(".")[0] == "smalti" and c.exists()), None)


def imports_of(path):
    """(file, names taken from it) of module-level imports; those inside functions are off the reader's way."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from ((file_of(alias.name), set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = file_of(f"{node.module}.{alias.name}")
                yield (module, set()) if module else (file_of(node.module), {alias.name})


def reached_from(path):
    """Files on the way down. The way through a table (`__init__.py`) leads to the entries asked for, not to all.

    An op is read by its reference, which is its definition; its twins are held against that by tests.
    """
    reached, todo = set(), [(path, frozenset())]
    while todo:
        step = current, names = todo.pop()
        if current is None or step in reached:
            continue
        if current.with_name("reference.py").exists():
            current, steps = current.with_name("reference.py"), imports_of(current.parent.parent / "__init__.py")
            steps = [(file, taken) for file, taken in steps if file and file.name == "dispatch.py"]
        else:
            steps = list(imports_of(current))
        reached |= {step, (current, names)}
        if current.name == "__init__.py":
            steps = [(file, taken) for file, taken in steps if taken & names]
        todo += [(file, frozenset(taken)) for file, taken in steps]
    return {file for file, _ in reached if not file.with_name("reference.py").exists() or file.name == "reference.py"}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_is_read_in_at_most_25_files_and_2500_lines(kind):
    start = file_of(BACKBONES[kind].module.__module__)
    files = reached_from(start)
    lines = sum(len(path.read_text().splitlines()) for path in files)
    names = sorted(str(path.relative_to(ROOT)) for path in files)
    assert "smalti/ops/dispatch.py" in names, "the walk does not reach the bottom: is it still a walk?"
    assert len(files) <= 25, names
    assert lines <= 2500, names

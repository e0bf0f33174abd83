"""What the documents point to exists, and the examples run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(document):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_every_documentation_page_that_code_names_exists():
    sources = [*(ROOT / "smalti").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "Makefile"]
    named = {page for source in sources for page in re.findall(r"docs/[\w/.-]+\.md", source.read_text())}
    assert named  # the pattern still finds what it is for
    assert not [page for page in named if not (ROOT / page).exists()]


def test_what_pages_import_is_there_to_import():
    shown = []
    for document in DOCUMENTS:
        for block in re.findall(r"^```python\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL):
            lines = re.findall(r"^(?:from smalti[\w.]* )?import [\w, .]+$", block, flags=re.MULTILINE)
            shown += [(document.name, line) for line in lines if "smalti" in line]
    assert len(shown) > 5  # the pattern still finds what it is for
    for document, line in shown:
        try:
            exec(line, {})
        except ImportError as error:
            pytest.fail(f"{document}: {line}: {error}")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_and_is_short(example, tmp_path):
    arguments = [str(tmp_path / "run")] if example.name.startswith("02") else []
    done = subprocess.run(
        [sys.executable, str(example), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert len(example.read_text().splitlines()) <= 45


def test_the_python_of_the_readme_names_things_that_exist():
    import smalti

    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"smalti\.([a-z_]+)\(", text))
    assert {"create_model", "list_models", "load_model", "from_official"} <= used
    assert not [name for name in used if not hasattr(smalti, name)]


SHOWN = [
    "README.md",
    *(f"docs/guide/{name}.md" for name in ("evaluate", "sample", "train", "latents", "data", "plan", "launch")),
]


@pytest.mark.parametrize("document", SHOWN)
def test_every_flag_in_a_command_that_is_shown_is_a_flag(document, capsys):
    from smalti.cli import main

    text = (ROOT / document).read_text().replace("\\\n", " ")
    verbs = "train|sample|evaluate|compare|encode|autoencoder|plan|launch|data check"
    commands = re.findall(rf"^(?:torchrun .* -m )?smalti ({verbs})\b([^#\n]*)", text, flags=re.MULTILINE)
    launched = re.findall(rf"^smalti launch .* -- ({verbs})\b([^#\n]*)", text, flags=re.MULTILINE)
    commands = [(verb, flags.partition(" -- ")[0]) for verb, flags in commands] + launched
    assert commands
    for verb, flags in commands:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        help_text = capsys.readouterr().out
        for flag in re.findall(r"--[\w.-]+", flags):
            assert flag in help_text, f"smalti {verb} has no {flag}"

"""What `smalti evaluate` prints of one source, of several that share a table, and of several that do not."""

import pytest
from made_up_results import made_up, number

import smalti.cli.evaluate as command
from smalti.cli import main
from smalti.evaluation.results import write_result


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """Run the command with these results in place of an evaluation, and return its lines."""

    def lines(*results):
        found = [(tmp_path / f"{result.source.name}.json", result) for result in results]
        for path, result in found:
            write_result(result, path)
        monkeypatch.setattr(command, "evaluate", lambda *_, **__: found)
        assert main(["evaluate", "whatever"]) == 0
        return capsys.readouterr().out.splitlines()

    return lines


def result(name, value=10.0, **changes):
    return made_up(name, [number("fid", value, 0.1, caution="few images")], sentence="No copies.", **changes)


def test_one_source_is_told_whole(show):
    lines = show(result("dit"))
    assert lines[0] == "dit (runs/dit)"
    assert any("95 % interval" in line for line in lines)
    assert lines.count("  FID: few images") == lines.count("  No copies.") == 1


def test_several_sources_get_a_line_each_one_protocol_and_a_table(show):
    lines = show(result("dit"), result("udit", 9.0))
    assert lines[:2] == ["dit (runs/dit)", "udit (runs/udit)"]
    assert sum(line.startswith("  protocol ") for line in lines) == 1
    assert [line.split()[0] for line in lines if "±" in line][:2] == ["udit", "dit"]
    assert lines.count("all rows, FID: few images") == lines.count("all rows: No copies.") == 1
    assert sum("95 % interval" in line for line in lines) == 1  # what ± means


def test_a_held_out_real_set_stands_beside_a_run(show):
    drawn = ("class_labels", "sampling", "ema", "precision", "inference", "decoder")
    lines = show(result("dit"), result("emoji32#validation", 2.0, **dict.fromkeys(drawn), real=True))
    assert [line.split()[0] for line in lines if "±" in line][:2] == ["emoji32#validation", "dit"]
    assert "emoji32#validation: real images, which no model drew; the mark of the best leaves them out." in lines


def test_sources_that_cannot_share_a_table_are_told_one_by_one_with_the_reason(show):
    lines = show(result("dit"), result("udit", count=10))
    assert lines[0] == "dit (runs/dit)"
    assert "udit (runs/udit)" in lines
    assert sum("95 % interval" in line for line in lines) == 2
    assert "count: 5000 in dit, 10 in udit" in lines[-1]
    assert lines[-1].endswith("--allow count")

"""Numbers stand in one column only if they were made alike; the answer to everything else is one line."""

import json
import re

import pytest
from made_up_results import SAMPLING, made_up, number

from smalti.cli import main
from smalti.errors import CheckpointError, ConfigError, DataError
from smalti.evaluation.protocol import Reference
from smalti.evaluation.results import write_result
from smalti.report.quality import as_text
from smalti.workflows.compare import compare, write_comparison


@pytest.fixture
def write(tmp_path):
    """Store a made-up result as RUN/evaluation/NAME.json, and return the run folder."""

    def store(name, *numbers, file="quality", **changes):
        result = made_up(name, numbers or [number("fid", 10.0, 0.1)], **changes)
        write_result(result, tmp_path / name / "evaluation" / f"{file}.json")
        return tmp_path / name

    return store


def names(comparison):
    return [row.name for row in comparison.table.rows]


def test_rows_are_sorted_by_the_number_asked_for_best_first(write):
    paths = [
        write("a", number("fid", 12.0, 0.1), number("recall", 0.5, 0.01)),
        write("b", number("fid", 10.0, 0.1), number("recall", 0.4, 0.01)),
        write("c", number("fid", 11.0, 0.1), number("recall", 0.6, 0.01)),
    ]
    assert names(compare(paths)) == ["b", "c", "a"]
    assert names(compare(paths, sort="Recall")) == names(compare(paths, sort="recall")) == ["c", "a", "b"]
    with pytest.raises(ConfigError, match="--sort fit: no result has this number; did you mean 'fid'"):
        compare(paths, sort="fit")


def test_the_best_is_marked_only_where_its_interval_is_clear_of_the_next(write):
    close = [write("a", number("fid", 10.0, 0.1)), write("b", number("fid", 10.2, 0.1))]
    far = [close[0], write("c", number("fid", 11.0, 0.1))]
    unsure = [close[0], write("d", number("fid", 20.0, None))]
    assert [compare(paths).table.columns[0].best for paths in (close, far, unsure, close[:1])] == ["", "a", "", ""]
    higher = [write("e", number("recall", 0.5, 0.01)), write("f", number("recall", 0.6, 0.01))]
    assert compare(higher).table.columns[0].best == "f"


def test_without_more_knowledge_a_difference_is_told_with_both_errors_added_as_independent(write):
    found = compare([write("a", number("fid", 10.0, 0.3)), write("b", number("fid", 12.0, 0.4))])
    said = found.table.statements
    assert said[0] == "FID: a is better than b by 2.0 ± 1.1."
    assert said[1] == "A difference adds the errors of both rows as independent."
    assert "reference is common" in said[2]
    assert [pair.rule for pair in found.pairs] == ["independent"]
    said = compare([write("a", number("fid", 10.0, 0.3)), write("b", number("fid", 11.0, 0.4))]).table.statements
    assert said[0] == "FID: a and b differ by 1.0 ± 1.1, which is within the uncertainty."
    said = compare([write("c", number("inception_score", 9.0, 0.3)), write("d", number("inception_score", 8.0, None))])
    assert said.table.statements[0].startswith("IS: c and d cannot be told apart without errors of both")
    assert "reference" not in said.table.statements[-1]


def drawn(value, error, shared, tilt=0.0):
    """A number whose luck lies in its groups: `shared` is that of the seeds, `tilt` its own."""
    without = tuple(value + shared * (-1) ** k + tilt * (k - 4.5) / 4.5 for k in range(10))
    return number("fid", value, error, without=without)


def test_rows_of_equally_many_images_are_compared_group_by_group_which_takes_out_what_seeds_share(write):
    a, b = write("a", drawn(10.0, 0.9, shared=0.3)), write("b", drawn(11.0, 0.9, shared=0.3, tilt=0.02))
    found = compare([a, b])
    # The differences without each group are 1 + 0.02 (k - 4.5) / 4.5, whose squares around 1 sum to 0.0016296.
    reach = 2.262157 * (0.9 * 0.0016296) ** 0.5
    assert found.pairs[0].rule == "groups"
    assert found.pairs[0].gap.high - found.pairs[0].gap.value == pytest.approx(reach, rel=1e-4)
    assert found.table.statements[0] == "FID: a is better than b by 1.000 ± 0.087."
    assert "what rows of the same seeds share, noise and labels, cancels" in found.table.statements[1]
    assert not any("independent" in said for said in found.table.statements)


@pytest.mark.parametrize("changes", [{"count": 10}, {"count": None}])
def test_groups_of_other_sizes_are_never_paired(write, changes):
    paths = [write("a", drawn(10.0, 0.9, shared=0.3)), write("b", drawn(11.0, 0.9, shared=0.3), **changes)]
    found = compare(paths, allow=["count"])
    assert [pair.rule for pair in found.pairs] == ["independent"]
    assert not any("seeds share" in said for said in found.table.statements)
    both = compare([*paths, write("c", drawn(12.0, 0.9, shared=0.3))], allow=["count"])
    assert sorted(pair.rule for pair in both.pairs) == ["groups", "independent", "independent"]
    assert "A difference adds the errors of both rows as independent where their counts differ, or a file has no " in (
        "\n".join(both.table.statements)
    )


def test_beyond_three_rows_neighbours_get_a_sentence_and_the_json_has_every_pair(write):
    paths = [write(f"m{k}", number("fid", 10.0 + k, 0.1)) for k in range(6)]
    found = compare(paths)
    assert sum(" is better than " in s for s in found.table.statements) == 5
    assert len(found.pairs) == 15


def test_two_protocols_are_refused_in_one_line_that_names_the_difference_and_the_way_out(write):
    a, b = write("a"), write("b", sampling=SAMPLING | {"guidance_scale": 4.0})
    with pytest.raises(ConfigError) as caught:
        compare([a, b])
    said = str(caught.value)
    assert "\n" not in said
    assert "sampling.guidance_scale: 1.5 in a, 4.0 in b. " in said
    assert said.endswith("--allow sampling.guidance_scale")
    assert "FID of these results cannot stand in one column" in said


def test_what_the_refusal_says_to_allow_is_enough(write):
    changes = {"ema": False, "precision": "bf16", "decoder": None, "reference": Reference("faces", "c" * 64, 10)}
    paths = [write("a"), write("b", **changes)]
    with pytest.raises(
        ConfigError, match=r"; and 2 more: reference.digest, reference.count; decoder: unknown in b\."
    ) as caught:
        compare(paths)
    allow = str(caught.value).rpartition("--allow ")[2].split(",")
    assert allow[-1] == "unknown"
    with pytest.raises(ConfigError, match=r"--allow ema,precision,"):  # what was allowed already is not forgotten
        compare(paths, allow=["ema"])
    (note,) = [note for note in compare(paths, allow=allow).table.notes if "as allowed" in note]
    assert note.startswith("Not alike in FID, as allowed: ema is yes (a), no (b); precision is fp32 (a), bf16 (b); ")
    assert "; decoder is pixels (a), unknown (b); " in note
    assert len(note.split("; ")) == 5


def test_what_differs_in_some_columns_only_has_a_footnote_of_its_own_and_rows_alike_stand_together(write):
    numbers = [number("fid", 9.0, 0.1), number("inception_score", 9.0, 0.1)]
    other = {"ema": False, "reference": Reference("faces", "c" * 64, 1906)}
    paths = [write("a", *numbers), write("b", *numbers, **other), write("c", *numbers, **other)]
    notes = compare(paths, allow=["ema", "reference"]).table.notes
    assert notes == [
        "Not alike in FID, IS, as allowed: ema is yes (a), no (b, c).",
        "Not alike in FID, as allowed: reference.digest is bbbbbbbbbbbb (a), cccccccccccc (b, c).",
    ]


DRAWN = ("class_labels", "sampling", "ema", "precision", "inference", "decoder")


def test_images_of_unknown_origin_are_refused_in_a_few_words(write):
    a, b = write("a"), write("png", **dict.fromkeys(DRAWN))
    with pytest.raises(ConfigError) as caught:
        compare([a, b])
    assert str(caught.value) == (
        "FID of these results cannot stand in one column: class_labels, ema, precision, inference, decoder, sampling: "
        "unknown in png. Measure them alike, or say what may differ, for a footnote: --allow unknown"
    )


def test_real_images_stand_beside_models_without_asking_and_without_the_mark(write):
    real = write("held-out", number("fid", 2.0, 0.1), **dict.fromkeys(DRAWN), real=True)
    models = [write("a", number("fid", 10.0, 0.1)), write("b", number("fid", 20.0, 0.1))]
    found = compare([*models, real])
    assert names(found) == ["held-out", "a", "b"]
    assert found.waived == ()
    assert found.table.columns[0].best == "a"
    assert "FID: held-out is better than a by 8.00 ± 0.32." in found.table.statements
    assert found.table.notes == ["held-out: real images, which no model drew; the mark of the best leaves them out."]
    with pytest.raises(ConfigError, match="count: 5000 in a, 10 in few"):
        compare([*models, write("few", **dict.fromkeys(DRAWN), real=True, count=10)])
    assert compare([real]).table.notes == []


def test_unknown_parts_stand_alone_unless_waived_and_hide_no_known_difference(write):
    a, b = write("a", ema=None), write("b", ema=None)
    with pytest.raises(ConfigError, match=r"ema: unknown in a, b\. .*--allow unknown$"):
        compare([a, b])
    assert names(compare([a, b], allow=["unknown"])) == ["a", "b"]
    others = [write("c", ema=True), write("d", ema=False)]
    with pytest.raises(ConfigError, match=r"ema: yes in .*no in "):
        compare([a, *others], allow=["unknown"])


def test_a_metric_is_compared_in_what_bears_on_it_only(write):
    reference = {"reference": Reference("faces", "c" * 64, 10)}
    numbers = [number("inception_score", 9.0, 0.1)]
    compare([write("a", *numbers), write("b", *numbers, **reference)])
    with pytest.raises(ConfigError, match=r"^FID of these"):
        compare([write("c", number("fid", 9.0, 0.1), *numbers), write("d", number("fid", 9.0, 0.1), **reference)])


def test_numbers_of_two_names_need_not_agree_and_leave_gaps(write):
    paths = [write("a", number("fid", 9.0, 0.1)), write("b", number("recall", 0.5, 0.1), count=10)]
    lines = as_text(compare(paths).table).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["images", lines[1], "a", "b"]
    assert lines[2].split()[-1] == "-"


def test_clean_images_get_one_row_where_the_floors_agree_and_two_where_they_do_not(write):
    a, b = write("a", number("fid", 9.0, 0.1, floor=1.5)), write("b", number("fid", 8.0, 0.1, floor=1.5))
    c = write("c", number("fid", 7.0, 0.1, floor=1.6))
    assert [row.name for row in compare([a, b]).table.clean] == ["clean images"]
    assert [row.name for row in compare([a, c]).table.clean] == ["clean images beside c", "clean images beside a"]
    assert compare([write("d")]).table.clean == []


def test_cautions_and_what_was_memorised_are_footnotes(write):
    path = write("a", number("fid", 9.0, 0.1, caution="2,000 images are few"), sentence="3 of 5,000 may be copies.")
    notes = compare([path]).table.notes
    assert notes == ["a, FID: 2,000 images are few", "a: 3 of 5,000 may be copies."]


def test_what_is_said_of_several_rows_or_columns_is_said_once(write):
    few, rank, safe = "2,000 images are few", "no full rank", "No sign of memorisation."
    paths = [
        write(name, number("fid", 9.0, 0.1, caution=rank), number("recall", 0.5, 0.1, caution=few), sentence=said)
        for name, said in (("a", safe), ("b", safe), ("c", "3 may be copies."))
    ]
    alone = write("d", number("fid", 9.5, 0.1, caution=few), number("recall", 0.5, 0.1, caution=few))
    assert compare(paths).table.notes == [
        "all rows, FID: no full rank",
        "all rows, Recall: 2,000 images are few",
        "a, b: No sign of memorisation.",
        "c: 3 may be copies.",
    ]
    notes = compare([*paths, alone]).table.notes
    assert notes[:3] == [
        "a, b, c, FID: no full rank",
        "a, b, c, Recall: 2,000 images are few",
        "d, FID, Recall: 2,000 images are few",
    ]


def test_results_of_one_name_are_told_apart_by_file_then_by_path(write, tmp_path):
    write("run", file="early")
    run = write("run", file="late", ema=True)
    assert sorted(names(compare([run]))) == ["run (early)", "run (late)"]
    copy = tmp_path / "copy" / "late.json"
    copy.parent.mkdir()
    copy.write_bytes((run / "evaluation" / "late.json").read_bytes())
    assert str(copy) in names(compare([run, copy.parent]))
    assert len(names(compare([run, run, run / "evaluation" / "late.json"]))) == 2


def test_published_numbers_stand_apart_with_what_their_paper_states(write):
    found = compare([write("a")], published_of=["dit-xl-2", "DiT-XL/2"])
    text = as_text(found.table)
    measured, quoted = text.split("published, not measured here:")
    assert "2.27" not in measured
    told = " ".join(quoted.split())
    assert re.search(
        r"DiT-XL/2 .*guidance 1.5 \(3 channels\), ddpm 250, ft-EMA decoder .*2.27 .*printed in its", quoted
    )
    assert "these rows record images, image_size, sampler" in told
    assert "Not recorded are class_labels, precision, feature weights, reference, code" in told
    assert len(set(found.quoted)) == len(found.quoted)
    assert found.table.columns[0].best == ""
    with pytest.raises(ConfigError, match="nothing is published here about 'gpt'"):
        compare([write("a")], published_of=["gpt"])


def test_the_json_holds_everything_and_is_strict(write, tmp_path):
    found = compare([write("a"), write("b", ema=False)], allow=["ema"], published_of=["udit-s"])
    write_comparison(found, tmp_path / "c.json")

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads((tmp_path / "c.json").read_text(), parse_constant=refuse)
    assert [row["result"]["numbers"][0]["estimate"]["value"] for row in document["rows"]] == [10.0, 10.0]
    assert document["waived"] == [
        {
            "label": "FID",
            "part": "ema",
            "values": ["yes", "no"],
            "files": [str(tmp_path / name / "evaluation" / "quality.json") for name in "ab"],
        }
    ]
    assert {len(row["protocol_digest"]) for row in document["rows"]} == {64}
    assert document["published"][0]["fid"] == 31.51
    assert document["pairs"][0]["gap"]["value"] == 0.0


def test_folders_without_results_and_files_of_something_else_are_one_line(write, tmp_path):
    with pytest.raises(ConfigError, match="name at least one result"):
        compare([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no result"):
        compare([tmp_path / "empty"])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not written by smalti"):
        compare([tmp_path / "x.json"])
    with pytest.raises(ConfigError, match="--allow guidance: no protocol has such a part"):
        compare([write("a")], allow=["guidance"])


# --- the command


def test_the_command_prints_the_table_and_writes_what_the_ending_says(write, tmp_path, capsys):
    runs = [str(write("a", number("fid", 9.0, 0.1))), str(write("b", number("fid", 8.0, 0.1), count=10))]
    holds = {".md": "| **8.00 ± 0.23** |", ".html": "<svg", ".json": '"pairs"', ".txt": "8.00 ± 0.23 *"}
    for ending, expected in holds.items():
        out = tmp_path / f"table{ending}"
        assert main(["compare", *runs, "--allow", "count,ema", "--sort", "fid", "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert "8.00 ± 0.23 *" in shown
        assert "count is 10 (b), 5000 (a)." in shown or "count is 5000 (a), 10 (b)." in shown
        assert expected in out.read_text()


def test_the_command_refuses_two_protocols_with_64_and_one_line(write, capsys):
    assert main(["compare", str(write("a")), str(write("b", count=10))]) == 64
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "count: 5000 in " in captured.err


def test_the_command_refuses_an_unknown_ending_before_it_reads(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none"), "--out", "table.pdf"]) == 64
    assert "--out table.pdf: a comparison is written as .md, .html, .json, .txt" in capsys.readouterr().err

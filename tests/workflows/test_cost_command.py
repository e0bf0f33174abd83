"""`smalti cost` as a user meets it, and the parts of it that a picture or a table could hide."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from PIL import Image

from smalti.cli import main
from smalti.cost import count_macs
from smalti.nn.mixers import MIXERS
from smalti.presets import preset_config
from smalti.workflows import cost as workflow
from smalti.workflows.cost import cost
from smalti.workflows.cost_crossovers import find_crossovers
from smalti.workflows.cost_report import Measuring
from smalti.workflows.cost_text import say

SMALL = ["--override", "depth=1", "hidden_size=32", "num_heads=2"]
FAST = ["--repeats", "1"]


@pytest.fixture
def refused(capsys):
    """Run a command that must fail: its one line."""

    def run(*arguments):
        assert main(["cost", *arguments]) == 64
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        return captured.err.removeprefix("smalti: ").rstrip("\n")

    return run


def run_json(capsys, *arguments):
    assert main(["cost", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # one object and nothing else


def test_counts_of_a_paper_s_network_are_printed_without_measuring(capsys):
    assert main(["cost", "DiT-XL/2", "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert "674,834,720" in out
    assert "118.621" in out
    assert "measured" not in out
    assert max(map(len, out.splitlines())) <= 160


def test_json_holds_counts_that_add_up_and_times_in_floors(capsys):
    report = run_json(capsys, "dit-s-8", *SMALL, "--sizes", "32,16", *FAST)
    assert [row["sample_size"] for row in report["rows"]] == [[16, 16], [32, 32]]
    for row in report["rows"]:
        macs = row["macs"]
        assert sum(macs["by_part"].values()) == sum(macs["by_kind"].values()) == macs["total"]
        assert row["tokens"] == (row["sample_size"][0] // 8) ** 2
        assert row["left_out"] == []
        for work, forwards in (("forward", 1), ("training", 3)):
            time = row["measured"][work]
            floor = forwards * macs["total"] / 1e9 / time["gemm_gmacs_per_second"]
            assert time["floors"] == pytest.approx(time["seconds"] / floor)
        assert row["mixer_seconds"] < row["measured"]["forward"]["seconds"] < row["measured"]["training"]["seconds"]
    assert report["crossovers"] == []
    assert report["measuring"]["threads"] == 1


def test_patterns_name_several_presets_and_each_comes_once(capsys):
    report = run_json(capsys, "dit-s-?", "DiT-S/8", "--no-measure")
    assert [row["network"] for row in report["rows"]] == ["dit-s-8", "dit-s-4", "dit-s-2"]


def test_every_mixer_is_put_into_the_same_network_and_compared_with_attention(capsys):
    report = run_json(capsys, "dit-s-2", *SMALL, "--sizes", "16,64", "--mixers", "all", "--no-measure")
    assert {row["mixer"] for row in report["rows"]} == set(MIXERS)
    rows = {(row["mixer"], row["sample_size"][0]): row["macs"]["by_part"] for row in report["rows"]}
    for (_, side), parts in rows.items():
        assert parts | {"mixer": 0} == rows["attention", side] | {"mixer": 0}
    found = {(c["mixer"], c["what"], c["unit"]) for c in report["crossovers"]}
    assert found == {
        (kind, what, "multiply-adds") for kind in set(MIXERS) - {"attention"} for what in ("mixer", "network")
    }


@pytest.mark.parametrize("kind", sorted(set(MIXERS) - {"attention"}))
def test_a_counted_crossover_is_the_first_size_that_is_cheaper(kind):
    report = cost(["dit-s-2"], override=tuple(SMALL[1:]), sizes="128", mixers=f"attention,{kind}")
    (found,) = [c for c in report.crossovers if c.what == "network"]
    ours, theirs = (
        workflow.swap_mixer(preset_config("dit-s-2", depth=1, hidden_size=32, num_heads=2), k)
        for k in (kind, "attention")
    )

    def cheaper(side):
        return count_macs(ours, sample_size=(side, side)).total < count_macs(theirs, sample_size=(side, side)).total

    assert found.tokens is not None
    side = 2 * math.isqrt(found.tokens)
    assert cheaper(side)
    assert found.tokens == found.smallest or not cheaper(side - 8)


def test_a_measured_crossover_lies_between_the_sizes_around_it_and_is_never_called_exact():
    report = cost(["dit-s-2"], override=tuple(SMALL[1:]), sizes="16,32,64", mixers="attention,bi_wkv")
    seconds = {"attention": (1.0, 4.0, 16.0), "bi_wkv": (2.0, 4.0 * 2**0.5, 8.0)}
    rows = []
    for kind, times in seconds.items():
        mine = [row for row in report.rows if row.mixer == kind]
        rows += [replace(row, mixer_seconds=time) for row, time in zip(mine, times, strict=True)]
    variants = [("dit-s-2", kind, [preset_config("dit-s-2")]) for kind in seconds]
    (found,) = [c for c in find_crossovers(variants, rows) if c.unit == "seconds"]
    # Ratios 2, sqrt(2), 1/2 at 64, 256, 1,024 tokens: a third of the way, in logarithms, from the second to the third.
    assert (found.tokens, found.exact, found.what) == (round(256 * 4 ** (1 / 3)), False, "mixer")
    assert say(found) == "  dit-s-2 with bi_wkv, the mixer alone, in seconds: from about 406 tokens on"
    never = [replace(row, mixer_seconds=5.0 if row.mixer == "bi_wkv" else 1.0) for row in rows]
    (found,) = [c for c in find_crossovers(variants, never) if c.unit == "seconds"]
    assert say(found).endswith("at none of 64 to 1,024 tokens")


def test_what_would_take_too_long_or_too_much_memory_is_left_out_with_its_reason(capsys):
    huge = ["dit-s-2", *SMALL, "--sizes", "512", "--max-seconds", "0.001", *FAST]
    row = run_json(capsys, *huge)["rows"][0]
    assert row["measured"] == {}
    assert row["mixer_seconds"] is None
    assert [reason.split(":")[0] for reason in row["left_out"]] == ["forward", "training"]
    assert "more than --max-seconds 0.001" in row["left_out"][0]
    assert main(["cost", "dit-s-2", *SMALL, "--max-gib", "0.000001", *FAST]) == 0
    out = capsys.readouterr().out
    assert "not measured: dit-s-2 with attention, 32x32, training: about 0.0 GiB, more than --max-gib 1e-06" in out


def test_bf16_weights_are_timed_forward_and_say_why_not_in_training(capsys):
    row = run_json(capsys, "dit-s-8", *SMALL, "--precision", "bf16-weights", *FAST)["rows"][0]
    assert row["measured"].keys() == {"forward"}
    assert row["left_out"] == ["training step: it keeps float32 weights"]


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.parametrize("mixers", ["own", "all"])
def test_the_plot_is_a_picture_with_every_name_in_it(tmp_path, capsys, ending, mixers):
    path = tmp_path / f"cost.{ending}"
    names = ["dit-s-2"] if mixers == "all" else ["dit-s-2", "dit-s-4"]
    code = main(["cost", *names, *SMALL, "--sizes", "16,32", "--mixers", mixers, "--no-measure", "--plot", str(path)])
    assert code == 0
    if ending == "png":
        with Image.open(path) as image:
            assert image.size[0] >= 1000
            assert len(image.getcolors(10**6)) > 10
        return
    texts = " ".join(element.text or "" for element in ElementTree.parse(path).iter() if element.tag.endswith("text"))
    assert all(name in texts for name in (MIXERS if mixers == "all" else names))
    assert "multiply-adds" in texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name at least one preset"),
        (["dit-s-3"], "no preset 'dit-s-3'; did you mean 'dit-s-"),
        (["dot-*"], "no preset matches 'dot-*'"),
        (["dit-s-2", "--sizes", "33"], "latents of 33x33 cannot be cut into patches of 2"),
        (["dit-s-2", "--sizes", "32;64"], "sizes '32;64': expected sides of latents with commas between them"),
        (["dit-s-2", "--sizes", "0"], "sizes '0'"),
        (["dit-s-2", "--sizes", "32", "--override", "sample_size=16"], "give the size of the latents once"),
        (["dit-s-2", "--mixers", "atention"], "no mixer 'atention'; did you mean 'attention'?"),
        (["dit-s-2", "--override", "dept=1"], "unknown setting 'dept'; did you mean 'depth'?"),
        (["dit-s-2", "--batch", "0"], "must be at least 1"),
        (["dit-s-2", "--max-gib", "0"], "must be above 0"),
        (["dit-s-2", "--plot", "x.pdf", "--sizes", "32,64"], "ends with .svg or .png"),
        (["dit-s-2", "--plot", "x.png"], "give at least two"),
        (["dit-s-2", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_what_cannot_be_done_is_one_line(refused, arguments, said):
    assert said in refused(*arguments)


def test_a_size_that_only_the_mixer_refuses_is_one_line_too(refused):
    line = refused("dit-s-2", *SMALL, "--sizes", "6", "--mixers", "downsampled_attention", "--no-measure")
    assert line.startswith("dit-s-2 with mixer downsampled_attention: ")


def test_measuring_leaves_the_threads_of_the_process_as_they_were():
    import torch

    before = torch.get_num_threads()
    measuring = Measuring(threads=before + 1, repeats=1)
    cost(["dit-s-8"], override=tuple(SMALL[1:]), sizes="16", measuring=measuring)
    assert torch.get_num_threads() == before

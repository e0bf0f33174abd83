"""One rule chooses: forced, else the first twin that does not refuse, else the reference."""

import threading

import pytest
import torch

from smalti.ops import Op, force


def returns(number):
    return lambda x: torch.full_like(x, number)


def refuses(impl, args):
    (x,) = args
    if impl == "picky" and x.numel() > 2:
        return f"it takes at most 2 numbers, got {x.numel()}"
    return "it never can" if impl == "never" else ""


def no_macs(x):
    return {}


OP = Op(
    "toy",
    returns(0),
    {"never": returns(1), "picky": returns(2), "plain": returns(3)},
    refuses,
    lambda tokens, dtype: (),
    no_macs,
)
LONELY = Op("lonely", returns(0), {"never": returns(1)}, refuses, lambda tokens, dtype: (), no_macs)
SMALL, LARGE = torch.zeros(2), torch.zeros(3)


def ran(x, op=OP, **options):
    return op(x, **options).max().item()


def test_the_first_twin_that_does_not_refuse_runs():
    assert ran(SMALL) == 2
    assert ran(LARGE) == 3


def test_the_reference_runs_when_every_twin_refuses():
    assert ran(SMALL, LONELY) == 0


def test_a_named_implementation_runs_even_when_another_is_preferred():
    assert ran(SMALL, impl="plain") == 3
    assert ran(SMALL, impl="reference") == 0


def test_a_named_twin_that_cannot_says_why_and_nothing_takes_its_place():
    with pytest.raises(
        ValueError, match="op 'toy': 'picky' cannot take these inputs: it takes at most 2 numbers, got 3"
    ):
        OP(LARGE, impl="picky")


def test_an_unknown_implementation_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"op 'toy' has no implementation 'trition'; choose from \['auto', 'reference', "
    ):
        OP(SMALL, impl="trition")


def test_force_holds_inside_its_block_only_and_nests():
    with force("plain"):
        assert ran(SMALL) == 3
        with force("reference"):
            assert ran(SMALL) == 0
        assert ran(SMALL) == 3
        with force("auto"):
            assert ran(SMALL) == 2
    assert ran(SMALL) == 2


def test_an_explicit_implementation_beats_a_forced_one():
    with force("reference"):
        assert ran(SMALL, impl="plain") == 3


def test_a_forced_twin_that_cannot_is_an_error_too():
    with force("picky"), pytest.raises(ValueError, match="cannot take these inputs"):
        OP(LARGE)


def test_force_ends_with_its_block_even_when_that_fails():
    with pytest.raises(ZeroDivisionError), force("reference"):
        raise ZeroDivisionError
    assert ran(SMALL) == 2


def test_force_holds_in_other_threads_too_such_as_those_of_the_backward_pass():
    seen = []
    with force("plain"):
        thread = threading.Thread(target=lambda: seen.append(ran(SMALL)))
        thread.start()
        thread.join()
    assert seen == [3]


def test_an_error_inside_a_twin_is_an_error_and_no_fallback():
    def breaks(x):
        raise ImportError("no such kernel")

    op = Op("breaks", returns(0), {"broken": breaks}, lambda impl, args: "", lambda tokens, dtype: (), no_macs)
    with pytest.raises(ImportError, match="no such kernel"):
        op(SMALL)

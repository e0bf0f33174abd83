"""Counter-based randomness, against an independent numpy implementation and by its own laws."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from smalti import streams

ROOT = Path(__file__).parents[2]
INCREMENT, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(x):
    """splitmix64 on whole arrays; numpy's uint64 wraps by itself."""
    x = np.atleast_1d(np.asarray(x, dtype=np.uint64)) + INCREMENT  # arrays wrap silently, scalars would warn
    x = (x ^ (x >> np.uint64(30))) * FIRST
    x = (x ^ (x >> np.uint64(27))) * SECOND
    return x ^ (x >> np.uint64(31))


def chained(*numbers):
    state = mixed(np.array([numbers[0]], dtype=np.uint64))
    for number in numbers[1:]:
        state = mixed(mixed(state) ^ mixed(np.array([number], dtype=np.uint64)))
    return int(state[0])


def test_splitmix64_gives_the_published_sequence():
    # The first outputs of the generator seeded with 1234567, as the reference C program prints them.
    state, outputs = 1234567, []
    for _ in range(5):
        outputs.append(streams.splitmix64(state))
        state = (state + int(INCREMENT)) % 2**64
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_splitmix64_equals_an_independent_implementation():
    numbers = [0, 1, 2**63, 2**64 - 1, *range(2, 200), *(7919**k % 2**64 for k in range(1, 60))]
    assert [streams.splitmix64(n) for n in numbers] == mixed(np.array(numbers, dtype=np.uint64)).tolist()


def test_keys_equal_an_independent_implementation():
    for seed, stream, step, position in itertools.product((0, 1, 2**63 + 5), (1, 9), (0, 10**6), (0, 31)):
        assert streams.key(seed, stream, step, position) == chained(seed, stream, step, position)


def test_keys_are_frozen_because_stored_runs_depend_on_them():
    assert streams.key(0, streams.NOISE, 0, 0) == 0x8A0F18BC24D20BB6
    assert streams.key(1234, streams.ORDER, 7) == 0xF65DB7BAE21BF7B8
    assert streams.uniform(3, streams.TIMESTEP, 4, 5) == 0.8532027136789763


def test_stream_ids_are_never_renumbered():
    ids = [
        "ORDER",
        "AUGMENT",
        "NOISE",
        "TIMESTEP",
        "LABEL_DROP",
        "SAMPLE_NOISE",
        "SAMPLE_LABEL",
        "SPLIT",
        "INIT",
        "VALIDATION",
    ]
    assert [getattr(streams, name) for name in ids] == list(range(1, 11))
    appended = {name: value for name, value in vars(streams).items() if name.isupper() and name not in ids}
    appended.pop("_MASK")
    assert all(value > 10 for value in appended.values()), "new ids go to the end"
    assert len(set(appended.values())) == len(appended)


def test_a_key_depends_on_every_argument_on_their_order_and_on_their_number():
    keys = [
        streams.key(*arguments)
        for arguments in [(0, 1), (0, 1, 0), (0, 1, 0, 0), (1, 0), (1, 0, 0), (0, 2), (0, 1, 2), (0, 2, 1), (2, 1, 0)]
    ]
    assert len(set(keys)) == len(keys)


def test_seed_and_stream_do_not_change_places():
    pairs = list(itertools.product(range(200), repeat=2))
    assert len({streams.key(seed, stream) for seed, stream in pairs}) == len(pairs)
    assert len({streams.key(7, 3, first, second) for first, second in pairs}) == len(pairs)


def test_keys_of_near_counters_do_not_collide():
    keys = {streams.key(seed, 3, step, place) for seed in range(4) for step in range(100) for place in range(100)}
    assert len(keys) == 40_000


def test_negative_and_very_large_seeds_are_taken_modulo_2_64():
    assert streams.key(-1, 1) == streams.key(2**64 - 1, 1)
    assert streams.key(2**64 + 5, 1) == streams.key(5, 1)
    assert isinstance(streams.generator(-1, 1), torch.Generator)


def test_uniform_numbers_are_uniform():
    numbers = np.array([streams.uniform(0, streams.TIMESTEP, step) for step in range(20_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers * 2**53 == np.floor(numbers * 2**53)).all()
    # Chi-square over 100 cells: mean 99, standard deviation 14; six of them is one failure in a billion seeds.
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert abs(((counts - 200) ** 2 / 200).sum() - 99) < 6 * 14.1


def test_every_bit_of_the_input_flips_half_of_the_output():
    flips = np.zeros(64)
    for bit in range(64):
        for start in range(200):
            difference = streams.splitmix64(start) ^ streams.splitmix64(start ^ (1 << bit))
            flips[bit] += difference.bit_count() / 200
    assert abs(flips - 32).max() < 6 * 4 / 200**0.5  # a fair coin per bit: standard deviation 4 per number


def test_generators_of_a_key_repeat_and_those_of_another_differ():
    def draw(*ids):
        return torch.randn(8, generator=streams.generator(5, streams.NOISE, *ids))

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(2, 1))


def test_generators_leave_the_global_one_alone():
    before = torch.random.get_rng_state()
    torch.randn(4, generator=streams.generator(0, streams.NOISE))
    assert torch.equal(before, torch.random.get_rng_state())


def feistel(position, size, key):
    """The permutation again, with divisions instead of bit masks."""
    if size == 1:
        return 0
    side = 2
    while side * side < size:
        side *= 2
    while True:
        left, right = divmod(position, side)
        for number in range(6 if side > 4 else 12):
            mixed_right = int(mixed(np.uint64(key) ^ mixed(number * 2**60 + right))[0])
            left, right = right, left ^ (mixed_right % side)
        position = left * side + right
        if position < size:
            return position


@pytest.mark.parametrize("size", [*range(1, 70), 100, 127, 128, 129, 255, 256, 257, 1000, 1906, 4096, 4097])
def test_permute_is_a_bijection(size):
    for permutation_key in (0, 1, streams.key(3, streams.ORDER, 0)):
        assert sorted(streams.permute(i, size, permutation_key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17, 100, 257])
def test_permute_equals_an_independent_implementation(size):
    permutation_key = streams.key(11, streams.ORDER, size)
    assert [streams.permute(i, size, permutation_key) for i in range(size)] == [
        feistel(i, size, permutation_key) for i in range(size)
    ]


def test_permute_reaches_far_into_sizes_that_no_list_could_hold():
    size = 10**12 + 39
    places = {streams.permute(i, size, 77) for i in range(1000)}
    assert len(places) == 1000
    assert all(0 <= place < size for place in places)
    assert np.mean(list(places)) == pytest.approx(size / 2, rel=6 * 0.577 / 1000**0.5)


@pytest.mark.parametrize("size", [3, 5, 10])
def test_each_position_goes_everywhere_equally_often(size):
    keys = 3000
    counts = np.zeros((size, size))
    for number in range(keys):
        permutation_key = streams.key(number, streams.ORDER)
        for position in range(size):
            counts[position, streams.permute(position, size, permutation_key)] += 1
    # Each cell is binomial; five deviations, because there are up to 100 cells.
    expected, deviation = keys / size, (keys / size * (1 - 1 / size)) ** 0.5
    assert abs(counts - expected).max() < 5 * deviation


def test_each_key_gives_its_own_order():
    orders = {
        tuple(streams.permute(i, 50, streams.key(0, streams.ORDER, epoch)) for i in range(50)) for epoch in range(50)
    }
    assert len(orders) == 50


@pytest.mark.parametrize(("position", "size"), [(-1, 4), (4, 4), (0, 0)])
def test_positions_outside_the_range_are_refused(position, size):
    with pytest.raises(ValueError, match=f"position {position} is outside range\\({size}\\)"):
        streams.permute(position, size, 0)


def test_numbers_do_not_depend_on_the_process():
    program = "from smalti import streams; print(streams.key(1, 2, 3), streams.permute(5, 1906, 4))"
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert elsewhere.stdout == f"{streams.key(1, 2, 3)} {streams.permute(5, 1906, 4)}\n"

"""Radii and nearest neighbours, tile by tile, against the plain computation."""

import pytest
import torch

import smalti.evaluation.neighbours as module
from smalti.errors import DataError
from smalti.evaluation.neighbours import Exact, nearest, neighbour_radii, pieces
from smalti.evaluation.precision_recall import Half


def _rows(count, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 3.0


def _plain_radii(rows, k):
    return (
        torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
        .square()
        .sort()
        .values[:, k]
    )


@pytest.fixture(params=[7, 1280])
def tile(request, monkeypatch):
    monkeypatch.setattr(module, "_TILE", request.param)
    return request.param


def test_pieces_cover_every_row_once_and_none_crosses_a_group():
    found = pieces([5, 0, 9, 1], largest=4)
    assert [row for cut, _ in found for row in range(cut.start, cut.stop)] == list(range(15))
    assert all(cut.stop - cut.start <= 4 for cut, _ in found)
    bounds = {0: (0, 5), 2: (5, 14), 3: (14, 15)}
    assert all(bounds[group][0] <= cut.start and cut.stop <= bounds[group][1] for cut, group in found)


def test_radii_are_the_distances_to_the_third_nearest_other_point(tile):
    rows = _rows(50)
    arithmetic = Exact(rows.double().mean(dim=0))
    found = neighbour_radii(arithmetic, arithmetic.points(rows), 3)
    assert found.shape == (50, 1)
    torch.testing.assert_close(found[:, 0], _plain_radii(rows, 3), rtol=1e-12, atol=1e-12)


def test_radii_without_a_group_are_those_of_the_other_points(tile):
    # Groups that are clusters: most of a point's neighbours go when its own group goes, and none when another does.
    sizes = [12, 9, 15]
    rows = torch.cat([_rows(size, seed=i) + 5.0 * i for i, size in enumerate(sizes)])
    own = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    for arithmetic in (Exact(rows.double().mean(dim=0)), Half()):
        found = neighbour_radii(arithmetic, arithmetic.points(rows), 3, sizes)
        for group in range(3):
            left = own != group
            plain = neighbour_radii(arithmetic, arithmetic.points(rows[left]), 3)[:, 0]
            torch.testing.assert_close(found[left, 1 + group], plain, rtol=1e-12, atol=1e-12)
            assert (found[~left, 1 + group] == -torch.inf).all()


def test_copies_have_radius_zero(tile):
    rows = _rows(6).repeat_interleave(4, dim=0)
    arithmetic = Half()
    assert (neighbour_radii(arithmetic, arithmetic.points(rows), 3) == 0).all()


def test_too_few_points_for_their_neighbours_are_refused():
    arithmetic = Half()
    with pytest.raises(DataError, match="each needs 3 others"):
        neighbour_radii(arithmetic, arithmetic.points(_rows(3)), 3)


@pytest.mark.parametrize("same", [False, True])
def test_nearest_neighbours_are_those_of_all_pairs_in_float64(tile, same):
    base = _rows(60) + 100.0
    queries = base if same else _rows(31, seed=9) + 100.0
    plain = torch.cdist(queries.double(), base.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if same:
        plain.fill_diagonal_(torch.inf)
    distances, indices = nearest(queries, base, same=same)
    torch.testing.assert_close(distances, plain.min(dim=1).values, rtol=1e-12, atol=0)
    assert torch.equal(indices, plain.argmin(dim=1))


def test_a_copy_far_from_the_origin_is_found_at_distance_zero():
    base = _rows(200, width=64) + 1000.0
    distances, indices = nearest(base[[17, 3]], base)
    assert distances.tolist() == [0.0, 0.0]
    assert indices.tolist() == [17, 3]


def test_one_point_far_away_does_not_blur_the_others():
    base, queries = _rows(300, width=40), _rows(50, width=40, seed=9)
    plain = torch.cdist(queries.double(), base.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances, indices = nearest(queries, torch.cat([torch.full((1, 40), 1e10), base]))
    torch.testing.assert_close(distances, plain.min(dim=1).values, rtol=1e-12, atol=0)
    assert torch.equal(indices, plain.argmin(dim=1) + 1)


def test_points_whose_squares_are_too_large_are_refused():
    with pytest.raises(DataError, match="beyond float32"):
        nearest(_rows(4), _rows(9) * 1e20)


@pytest.mark.parametrize(("count", "width", "same"), [(1, 6, True), (0, 6, False), (5, 7, False)])
def test_nobody_to_be_near_to_is_refused(count, width, same):
    with pytest.raises(DataError):
        nearest(_rows(4), _rows(count, width), same=same)

"""Moments against numpy in float64, and merged in any grouping."""

import numpy as np
import pytest
import torch

from smalti.errors import DataError
from smalti.evaluation.moments import Moments


def _features(count, width=7, seed=0):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return rows @ torch.randn(width, width, generator=torch.Generator().manual_seed(1)) + 100.0


def test_moments_are_those_of_numpy_in_float64():
    rows = _features(9000)
    moments = Moments.of(rows)
    exact = rows.double().numpy()
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False), rtol=1e-11, atol=1e-12)
    assert moments.count == 9000


@pytest.mark.parametrize("cuts", [[3000, 3000, 3000], [2, 8996, 2], [9000]])
def test_moments_merged_from_parts_are_those_of_the_whole(cuts):
    rows = _features(9000)
    merged = Moments.merged(Moments.of(part) for part in rows.split(cuts))
    whole = Moments.of(rows)
    scale = whole.covariance.abs().max()
    assert (merged.mean - whole.mean).abs().max() <= 1e-12 * whole.mean.abs().max()
    assert (merged.covariance - whole.covariance).abs().max() <= 1e-10 * scale


def test_order_of_the_images_does_not_matter():
    rows = _features(5000)
    shuffled = rows[torch.randperm(5000, generator=torch.Generator().manual_seed(3))]
    a, b = Moments.of(rows), Moments.of(shuffled)
    assert (a.covariance - b.covariance).abs().max() <= 1e-11 * a.covariance.abs().max()


def test_what_is_left_without_a_part_has_the_moments_of_what_is_left():
    rows = _features(1000)
    left = Moments.of(rows).without(Moments.of(rows[:100]))
    exact = Moments.of(rows[100:])
    assert left.count == 900
    assert (left.mean - exact.mean).abs().max() <= 1e-12 * 100
    assert (left.covariance - exact.covariance).abs().max() <= 1e-10 * exact.covariance.abs().max()


def test_one_image_has_no_covariance_and_says_so():
    with pytest.raises(DataError, match="1 images have no covariance"):
        Moments.of(torch.zeros(1, 3))


def test_statistics_that_hide_their_count_cannot_be_merged():
    unknown = Moments(None, torch.zeros(3).double(), torch.eye(3).double())
    with pytest.raises(DataError, match="number of images"):
        Moments.merged([unknown, unknown])

"""Files of reference statistics: ours, ADM's and those of other tools; and what is refused in one line."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from smalti.data.npz import write_images
from smalti.data.sources import open_images
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.moments import Moments
from smalti.evaluation.reference import holds, read_statistics, write_statistics

NETWORK = NetworkIdentity("inception", "ab" * 32, "299, bilinear as TensorFlow 1")
WIDTHS = {"pool": 12, "spatial": 5, "logits": 3}


def moments(width, count=40, seed=0):
    return Moments.of(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 3)


BOTH = {"pool": moments(12), "spatial": moments(5)}


def foreign(width=12, spatial=0, dtype=np.float64):
    """As other tools write them."""
    rows = np.random.default_rng(0).normal(size=(50, width + spatial))
    found = {"mu": rows[:, :width].mean(axis=0), "sigma": np.cov(rows[:, :width], rowvar=False)}
    if spatial:
        found |= {"mu_s": rows[:, width:].mean(axis=0), "sigma_s": np.cov(rows[:, width:], rowvar=False)}
    return {key: values.astype(dtype) for key, values in found.items()}


def test_what_we_write_comes_back_to_the_last_bit_with_its_origin(tmp_path):
    path = tmp_path / "new" / "x.npz"
    record = write_statistics(path, BOTH, NETWORK, "fp" * 32, 40)
    found = read_statistics(path, NETWORK, WIDTHS)
    assert (found.name, found.digest, found.count) == ("x.npz", record.sha256, 40)
    assert (found.identity, found.images) == (NETWORK, "fp" * 32)
    assert set(found.moments) == {"pool", "spatial"}
    for kind, written in BOTH.items():
        assert torch.equal(found.moments[kind].mean, written.mean)
        assert torch.equal(found.moments[kind].covariance, (written.covariance + written.covariance.T) / 2)
        assert found.moments[kind].count == 40
    again = write_statistics(tmp_path / "y.npz", BOTH, NETWORK, "fp" * 32, 40)
    assert again == record


def test_other_tools_read_what_we_write(tmp_path):
    write_statistics(tmp_path / "x.npz", BOTH, NETWORK, "images", 40)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file.files == ["mu", "sigma", "mu_s", "sigma_s", "count", "smalti"]
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_array_equal(file["sigma_s"], BOTH["spatial"].covariance.numpy())
        assert int(file["count"]) == 40
        assert json.loads(str(file["smalti"]))["network"]["resize"] == NETWORK.resize


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("spatial", "dtype"), [(0, np.float64), (5, np.float64), (5, np.float32), (0, ">f8")])
def test_statistics_of_other_tools_are_read_and_their_count_is_unknown(tmp_path, save, spatial, dtype):
    arrays = foreign(12, spatial, dtype)
    save(tmp_path / "x.npz", **arrays)
    found = read_statistics(tmp_path / "x.npz", NETWORK, WIDTHS)
    assert (found.count, found.identity, found.images) == (None, None, "")
    for kind, key in (("pool", "sigma"), ("spatial", "sigma_s"))[: 1 + bool(spatial)]:
        covariance = found.moments[kind].covariance
        assert covariance.dtype == torch.float64
        assert torch.equal(covariance, covariance.T)
        np.testing.assert_allclose(covariance, arrays[key], rtol=0, atol=1e-6 * np.abs(arrays[key]).max())
    assert len(found.moments) == 1 + bool(spatial)


def test_a_reference_batch_of_adm_is_both_images_and_statistics(tmp_path):
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "batch.npz", arr_0=pixels, **foreign(12, 5))
    np.savez(tmp_path / "statistics.npz", **foreign())
    write_images(tmp_path / "images.npz", [pixels], count=3, image_size=(4, 4))
    assert [holds(tmp_path / f"{name}.npz") for name in ("batch", "statistics", "images")] == [
        "both",
        "statistics",
        "images",
    ]
    assert set(read_statistics(tmp_path / "batch.npz", NETWORK, WIDTHS).moments) == {"pool", "spatial"}
    assert open_images(tmp_path / "batch.npz").count == 3


def test_kinds_that_the_network_does_not_make_are_left_out(tmp_path):
    np.savez(tmp_path / "x.npz", **foreign(12, 5))
    assert set(read_statistics(tmp_path / "x.npz", None, {"pool": 12}).moments) == {"pool"}
    np.savez(tmp_path / "y.npz", **{key: foreign(12, 5)[key] for key in ("mu_s", "sigma_s")})
    with pytest.raises(DataError, match="spatial features only, which this feature network does not make"):
        read_statistics(tmp_path / "y.npz", None, {"pool": 12})


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (replace(NETWORK, name="lite0"), r"made with the feature network 'inception', and 'lite0' is in use; make"),
        (replace(NETWORK, weights="cd" * 32), r"weights of inception 'abababababab', and 'cdcdcdcdcdcd' is in use"),
        (replace(NETWORK, resize="224, bicubic"), r"resize of inception '299, .*', and '224, bicubic' is in use"),
    ],
)
def test_statistics_of_another_feature_network_are_refused(tmp_path, other, line):
    write_statistics(tmp_path / "x.npz", BOTH, NETWORK, "images", 40)
    with pytest.raises(DataError, match=line):
        read_statistics(tmp_path / "x.npz", other, WIDTHS)
    assert read_statistics(tmp_path / "x.npz", replace(NETWORK, numerics="float32 on cuda"), WIDTHS).count == 40


def spoilt(**changes):
    return foreign() | changes


def crooked():
    covariance = foreign()["sigma"].copy()
    covariance[0, 1] += 1e-5 * np.abs(covariance).max()
    return covariance


NOTE = {"format": "smalti-statistics", "version": 1, "network": {"name": "a", "weights": "b", "resize": "c"}}
REFUSED = [
    ({"arr_0": np.zeros(3, np.uint8)}, r"holds no statistics: expected mu and sigma, its keys are: arr_0"),
    ({"mu": np.zeros(3)}, r"holds no statistics: expected mu and sigma, its keys are: mu"),
    (spoilt(mu=np.zeros(11)), r"mu is \(11,\) and sigma \(12, 12\); expected \(D,\) and \(D, D\)"),
    (spoilt(mu=np.zeros((1, 12))), r"mu is \(1, 12\)"),
    (spoilt(sigma=np.zeros(12)), r"sigma \(12,\)"),
    (spoilt(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"mu is \(0,\)"),
    (foreign(7), r"mu has 7 values, and the pool features of inception have 12; give statistics made with the same"),
    (foreign(384), r"mu has 384 values, .*; it seems made for dinov2; give"),
    (spoilt(sigma=crooked()), r"sigma is not symmetric, so it is no covariance"),
    (spoilt(sigma=-np.eye(12)), r"sigma has negative variances"),
    (spoilt(sigma=np.full((12, 12), np.nan)), r"sigma has values that are not finite"),
    (spoilt(mu=np.full(12, np.inf)), r"mu has values that are not finite"),
    (spoilt(mu=np.zeros(12, np.float16)), r"mu is float16 \(12,\); expected float64"),
    (spoilt(mu=np.zeros(12, np.int64)), r"mu is int64 \(12,\); expected float64"),
    (spoilt(mu=np.array([{}] * 12, dtype=object)), r"mu holds pickled Python objects, which are never read"),
    (spoilt(count=np.array(1)), r"count is 1; expected one whole number from 2 on"),
    (spoilt(count=np.zeros(3)), r"count is float64 \(3,\); expected"),
    (spoilt(smalti=np.zeros(3)), r"the note of smalti is float64 \(3,\), expected one text"),
    (spoilt(smalti=np.array("[")), r"the note of smalti cannot be read"),
    (spoilt(smalti=np.array("{}")), r"its format is not smalti-statistics"),
    (spoilt(smalti=np.array(json.dumps(NOTE | {"images": "", "version": 2}))), r"version 2, and this smalti reads 1"),
    (spoilt(smalti=np.array(json.dumps(NOTE | {"images": "", "network": {"name": 3}}))), r"note of smalti cannot be"),
]


@pytest.mark.parametrize(("arrays", "line"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_are_no_statistics_is_refused_in_one_line(tmp_path, arrays, line):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=line) as caught:
        read_statistics(tmp_path / "x.npz", NETWORK, WIDTHS)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


def test_a_file_that_is_neither_is_refused_with_its_keys(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(DataError, match=r"neither images \(arr_0\) nor statistics .* its keys are: images, labels"):
        holds(tmp_path / "x.npz")
    with pytest.raises(DataError, match="no such file"):
        holds(tmp_path / "y.npz")


def test_no_flipped_bit_changes_statistics_unseen(tmp_path):
    path = tmp_path / "x.npz"
    write_statistics(path, {"pool": moments(2)}, NETWORK, "images", 40)
    whole, right = path.read_bytes(), read_statistics(path, NETWORK)
    refused = 0
    for at in range(0, len(whole), 2):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            found = read_statistics(path, NETWORK)
        except DataError:
            refused += 1
            continue
        # What is left are names of entries, time stamps and unused fields.
        assert torch.equal(found.moments["pool"].covariance, right.moments["pool"].covariance)
        assert torch.equal(found.moments["pool"].mean, right.moments["pool"].mean)
    assert refused > len(whole) / 4


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"statistics are stored as .npz"):
        write_statistics(tmp_path / "x.npy", BOTH, NETWORK, "images", 40)
    for wrong, count in (({}, 40), ({"logits": moments(3)}, 40), (BOTH, 41)):
        with pytest.raises(
            DataError, match=r"expected statistics of the kinds pool or spatial, of 4. images each, got"
        ):
            write_statistics(tmp_path / "x.npz", wrong, NETWORK, "images", count)
    assert os.listdir(tmp_path) == []

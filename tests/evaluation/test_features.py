"""The pass from images to features: fixed batches, and one line for what cannot be used."""

import pytest
import torch

from smalti.errors import DataError
from smalti.evaluation import features
from smalti.evaluation.features import NetworkIdentity, extract


class Means:
    """Mean and spread of each channel, and a note of the batch sizes that came."""

    identity = NetworkIdentity("means", "none", "none")
    widths = {"pool": 3, "logits": 1}  # noqa: RUF012

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(len(images))
        values = images.float()
        return {"pool": values.mean(dim=(2, 3)), "logits": values.std(dim=(1, 2, 3))[:, None]}


def _images(count, size=(4, 5)):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cuts", [[23], [1] * 23, [5, 1, 12, 5], [8, 8, 7]])
def test_features_do_not_depend_on_how_the_stream_is_cut(cuts):
    images, network = _images(23), Means()
    found = extract(images.split(cuts), network, micro_batch=8)
    assert network.seen == [8, 8, 8]
    assert found.count == 23
    assert torch.equal(found.rows("pool"), images.float().mean(dim=(2, 3)))


@pytest.mark.parametrize("room", [1, 5, 30, 1000])
def test_rows_are_whole_and_in_order_however_small_the_rooms_that_they_wait_in(monkeypatch, room):
    monkeypatch.setattr(features, "_ROOM_NUMBERS", room)
    images = _images(23)
    found = extract(images.split(7), Means(), micro_batch=4)
    assert torch.equal(found.rows("pool"), images.float().mean(dim=(2, 3)))
    assert torch.equal(found.rows("logits"), images.float().std(dim=(1, 2, 3))[:, None])


def test_only_the_kinds_asked_for_are_kept():
    assert set(extract([_images(3)], Means(), kinds=["pool"]).features) == {"pool"}


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ([], "no image"),
        ([_images(2), _images(2, (4, 6))], "image 2 is 4 x 6 pixels, those before it 4 x 5"),
        ([_images(2)[:, :1]], "8-bit RGB"),
        ([_images(2).float()], "8-bit RGB"),
    ],
)
def test_a_stream_that_cannot_be_used_gets_one_line(stream, says):
    with pytest.raises(DataError, match=says):
        extract(stream, Means())


def test_features_that_are_not_finite_name_the_image():
    with pytest.raises(DataError, match="image 5 are not finite"):
        extract([_images(4), _images(4)], type("Broken", (Means,), {"__call__": _nan_at_five()})(), micro_batch=4)


def _nan_at_five():
    calls = []

    def call(self, images):
        found = Means.__call__(self, images)
        if calls:
            found["pool"][1] = torch.nan
        calls.append(1)
        return found

    return call


def test_statistics_stand_before_what_the_features_say_and_a_missing_kind_is_named():
    found = extract([_images(5)], Means(), kinds=["pool"])
    with pytest.raises(DataError, match="needs the logits features"):
        found.rows("logits")
    assert found.subset([0, 2]).count == 2

"""The digest of weights says which weights they are, and nothing of how they were stored."""

import pytest
import torch

from smalti.storage.tensors import tensors_digest

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def test_the_digest_knows_nothing_of_order_strides_or_gradients():
    other = {"b": torch.tensor(3), "a": torch.arange(6.0).reshape(2, 3).T.contiguous().T.requires_grad_()}
    assert tensors_digest(other) == tensors_digest(WEIGHTS)
    # A number that is written down in protocols must not change with a version of this code.
    assert tensors_digest(WEIGHTS) == "938e8a961b329c7c1aff597afe77bf7b07c336b1871bcdefc76ce4157544182c"


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.arange(6.0).reshape(3, 2)},
        {"a": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)},
        {"a": torch.arange(6.0).reshape(2, 3).nextafter(torch.ones(()))},
        {"c": torch.zeros(0)},
    ],
    ids=["shape", "type", "last bit", "one more"],
)
def test_the_digest_changes_with_a_shape_a_type_a_bit_or_a_name(change):
    assert tensors_digest(WEIGHTS | change) != tensors_digest(WEIGHTS)

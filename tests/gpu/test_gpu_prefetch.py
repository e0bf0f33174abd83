"""Batches in page-locked memory, copied while the next ones come."""

import pytest
import torch

from smalti.training.prefetch import prefetched


def load(step):
    return {"x": torch.full((64, 3, 64, 64), float(step)), "labels": torch.arange(64) + step}


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_arrive_whole_when_copied_without_waiting(device, workers):
    with prefetched(load, 0, 40, workers=workers, pin=True) as made:
        copies = []
        for batch in made:
            assert batch["x"].is_pinned()
            assert batch["labels"].is_pinned()
            torch.cuda._sleep(1_000_000)  # the copy is still to come when the batch is forgotten
            copies.append((batch["x"].to(device, non_blocking=True), batch["labels"].to(device, non_blocking=True)))
    for step, (x, labels) in enumerate(copies):
        assert (x == step).all()
        assert labels.tolist() == list(range(step, step + 64))

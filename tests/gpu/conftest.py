"""What the CUDA tests share: the device, and small networks that do not start at zero."""

import pytest
import torch

from smalti.models import DiTConfig, build_backbone
from smalti.nn.mixers import AttentionConfig


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.fixture
def make_dit():
    """`make_dit(**changes)`: a DiT of two blocks in float32 on the CPU, with random numbers where it starts at zero."""

    def make(**changes):
        settings = {
            "hidden_size": 96,
            "depth": 2,
            "mixer": AttentionConfig(num_heads=2),
            "patch_size": 2,
            "sample_size": (16, 16),
            "in_channels": 3,
            "num_classes": 5,
        }
        torch.manual_seed(0)
        model = build_backbone(DiTConfig(**settings | changes))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def pytest_collection_modifyitems(items):
    """All tests of this folder need CUDA; elsewhere they are skipped and say why."""
    here = [item for item in items if item.path.parent.name == "gpu"]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run `make gpu` where there is one"))

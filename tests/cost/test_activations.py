"""Activations counted without memory, against hand counts and against what a process really needs."""

import pytest
import torch
from torch import nn

from smalti.cost import count_activations, peak_memory, peak_memory_refusal
from smalti.models import BackboneConfig
from smalti.ops import attention
from smalti.presets import create_model, preset_config


class Net(nn.Module):
    """Two linear layers around a ReLU, on 6 pixels of 4 channels."""

    config = BackboneConfig(sample_size=(2, 3), in_channels=4, num_classes=0)

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 40), nn.Linear(40, 4)

    def iter_blocks(self):
        return iter(())

    def forward(self, latents, timesteps, class_labels):
        x = latents.flatten(2).transpose(1, 2).contiguous()
        return self.narrow(self.wide(x).relu())


def test_a_forward_holds_what_lives_at_once_and_training_what_the_backward_needs():
    pixel = 6 * 4
    tokens, wide = 4 * pixel, 40 * pixel
    counted = count_activations(Net())
    # At the ReLU: the latents, their copy, one timestep, and the wide layer before and after.
    assert counted.forward == 2 * tokens + 4 + 2 * wide
    assert counted.training == tokens + wide  # the copy of the input, and the output of the ReLU that two layers share


class OneOp(Net):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, latents, timesteps, class_labels):
        x = latents.flatten(2).transpose(1, 2).contiguous()
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, dim=-1))
        return attention(q, k, v).sum(dim=1)


def test_an_op_keeps_its_inputs_and_its_output_and_never_its_scores():
    pixel = 6 * 4
    assert count_activations(OneOp()).training == 4 * pixel + 12 * pixel + 4 * pixel


def test_the_count_grows_with_the_size_and_needs_no_memory():
    config = preset_config("dit-s-2")
    small, large = (count_activations(config, sample_size=(side, side)) for side in (32, 512))
    assert large.training / small.training == pytest.approx(256, rel=0.01)
    assert large.training > 20e9


@pytest.mark.skipif(bool(peak_memory_refusal("cpu")), reason=peak_memory_refusal("cpu") or "peak memory can be read")
def test_the_count_is_what_a_process_needs():
    model = create_model("dit-s-2", depth=3)
    inputs = torch.randn(16, 4, 32, 32), torch.rand(16), torch.zeros(16, dtype=torch.int64)
    kept = []

    def forward():
        with torch.no_grad():
            model(*inputs)

    forward()
    counted = count_activations(model)
    # The allocator keeps some of what was freed, which is much beside the little that a forward holds.
    assert 0.7 * counted.forward < peak_memory(forward, "cpu").added / 16 < 2.5 * counted.forward
    assert peak_memory(lambda: kept.append(model(*inputs)), "cpu").added / 16 == pytest.approx(
        counted.training, rel=0.15
    )

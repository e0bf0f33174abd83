"""Add a mixer from outside the package: one class, one line, one field of a config."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor, nn

import smalti
from smalti.models import DiTConfig, build_backbone
from smalti.nn.layers import Grid
from smalti.nn.mixers import ALONE, MIXERS, MixerConfig, Place


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig(MixerConfig):
    kind: ClassVar[str] = "gated_linear_attention"
    num_heads: int = 2


class GatedLinearAttention(nn.Module):
    def __init__(self, config: GatedLinearAttentionConfig, hidden_size: int, place: Place = ALONE) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv, self.gate, self.out = (nn.Linear(hidden_size, n * hidden_size) for n in (3, 1, 1))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads)
        summary = k.softmax(dim=2).mT @ v  # of all tokens, in a matrix whose size does not depend on their number
        return self.out(self.gate(x).sigmoid() * (q.softmax(dim=3) @ summary).transpose(1, 2).flatten(2))


MIXERS["gated_linear_attention"] = (GatedLinearAttentionConfig, GatedLinearAttention)

model = build_backbone(DiTConfig(hidden_size=32, depth=2, mixer=GatedLinearAttentionConfig(num_heads=4)))
latents, timesteps, class_labels = torch.randn(2, 4, 32, 32), torch.tensor([10.0, 900.0]), torch.tensor([1, 7])
loss = (model(latents, timesteps, class_labels)[:, :4] - latents).square().mean()
loss.backward()
torch.optim.AdamW(model.parameters(), lr=1e-3).step()
print(f"loss {loss.item():.4f}")
with TemporaryDirectory() as folder:
    again = smalti.load_model(smalti.save_model(Path(folder), model))
assert torch.equal(again(latents, timesteps, class_labels), model(latents, timesteps, class_labels))

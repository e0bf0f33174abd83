"""Build a network by name, change it, and call it on noise."""

import torch

import smalti

print(smalti.list_models("dit-s-*"))

model = smalti.create_model("DiT-S/2", in_channels=3, num_classes=9, sample_size=(32, 16), depth=2)
latents = torch.randn(2, 3, 32, 16)
output = model(latents, timesteps=torch.tensor([10.0, 900.0]), class_labels=torch.tensor([3, 9]))  # 9 = no class
print(tuple(output.shape), "prediction and variance, three channels each")

meta = smalti.create_model("dit-xl-2", device="meta")  # shapes only, no memory
print(f"{sum(p.numel() for p in meta.parameters()):,} parameters")

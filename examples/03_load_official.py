"""Load weights in the released DiT layout and draw with the released settings. Usage: 03_load_official.py WEIGHTS

WEIGHTS is a state dict of facebookresearch/DiT saved as safetensors. Without one, made-up weights of a tiny network
show the way.
"""

import sys

from safetensors.torch import load_file

import smalti
from smalti.checkpoints import to_official
from smalti.diffusion import build_schedule
from smalti.sampling import SamplingConfig, sample_latents

sizes = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
if len(sys.argv) > 1:
    state_dict = load_file(sys.argv[1])
else:
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2}
    state_dict = to_official(smalti.create_model("dit-s-2", **sizes), "facebookresearch/DiT")

settings = {"input_size": 32, "patch_size": 2, "in_channels": 4, "mlp_ratio": 4.0, "num_classes": 1000}
model = smalti.from_official(
    "facebookresearch/DiT", state_dict, **sizes, **settings, class_dropout_prob=0.1, learn_sigma=True
)
config = SamplingConfig(sampler="ddpm", num_inference_steps=4, guidance_scale=1.5, guidance_channels=3)
batches = sample_latents(
    model, [0, 1], [207, 360], sample_shape=(4, 32, 32), schedule=build_schedule("linear"), config=config,
    learned_variance=True, null_class=1000, micro_batch=2,
)  # fmt: skip
print(next(batches).latents.shape)

"""Train a tiny model on the shipped emoji for a few steps, then draw from it. Usage: 02_train_and_sample.py [FOLDER]"""

import sys
from pathlib import Path

import torch

from smalti.diffusion import ObjectiveConfig
from smalti.sampling import SamplingConfig
from smalti.training import RunConfig
from smalti.workflows.sample import load_source, sample
from smalti.workflows.train import train

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
result = train(
    RunConfig(
        out=out,
        override=("depth=2", "hidden_size=32", "num_heads=2"),
        objective=ObjectiveConfig(schedule="flow", prediction="velocity"),
        steps=20,
        batch_size=8,
        sample_every=0,
    )
)
print("validation", result.validation, "linear denoiser", result.baselines.linear)

source = load_source(out, torch.device("cpu"))
config = SamplingConfig(sampler="heun", num_inference_steps=4, guidance_scale=1.5)
for batch in sample(source, seeds=range(4), class_labels=[0, 2, 2, 6], config=config, micro_batch=4):
    print(tuple(batch.images.shape), [source.class_names[k] for k in batch.class_labels.tolist()])

"""Autoencoders of diffusers' class, small enough for tests, with weights that are the same everywhere."""

import json

import torch
from safetensors.torch import save_file

SMALL = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4}


def network(seed=0, **settings):
    """diffusers' `AutoencoderKL`, 3 x H x W to 4 x H/2 x W/2 unless told otherwise."""
    from diffusers import AutoencoderKL

    channels = settings.get("block_out_channels", SMALL["block_out_channels"])
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }
    made = AutoencoderKL(**(SMALL | {"sample_size": 16} | kinds | settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15 + (parameter.dim() == 1) * 0.5
    return made.eval()


def save(folder, made):
    """As diffusers stores it; by hand, because its own way takes a second."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in dict(made.config).items() if not name.startswith("_")}
    head = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1"}
    (folder / "config.json").write_text(json.dumps(head | config))
    tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def saved(folder, seed=0, **settings):
    """A folder with such a network."""
    return save(folder, network(seed, **settings))

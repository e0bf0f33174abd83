"""Random weights for the FID Inception network, the same everywhere: one numpy seed for each name."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

KEYS = Path(__file__).parents[1] / "data" / "parity" / "key_map_inception.json"


def recipe_weights():
    """The 566 tensors of the conversion, counters of training included, as `index_inception.json` describes them."""
    return {key: _tensor(key, shape) for key, shape in json.loads(KEYS.read_text())["keys"].items()}


def _tensor(key, shape):
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    normal = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("conv.weight"):
        normal *= math.sqrt(2 / math.prod(shape[1:]))
    elif key == "fc.weight":
        normal *= math.sqrt(1 / 2048)
    elif key.endswith("bn.weight"):
        normal = 1 + 0.1 * normal
    elif key.endswith("running_var"):
        normal = np.exp(0.2 * normal)
    else:
        normal *= 0.1
    return torch.from_numpy(normal.astype(np.float32))

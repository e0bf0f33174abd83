"""Compile the first block of the backbone whose config comes as JSON, and compare it with the same block uncompiled.

A program of its own, because the compiler cannot look through the shape checks that the test run puts around every
function.
"""

import json
import sys

import torch

from smalti.config import from_dict
from smalti.models import BackboneConfig, build_backbone


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = from_dict(BackboneConfig, json.loads(sys.argv[1]))
    network = build_backbone(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    block, seen = next(network.iter_blocks()), []
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args))
    labels = torch.tensor([0, 1]) if config.num_classes else None
    network(torch.randn(2, config.in_channels, *config.sample_size), torch.rand(2), labels)
    hook.remove()
    args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in seen[0]]
    leaves = [a for a in args if isinstance(a, torch.Tensor)] + [p for p in block.parameters() if p.requires_grad]
    runs = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        output = function(*args)
        gradients = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
        runs.append([output, *(g for g in gradients if g is not None)])
    for plain, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    print(f"{len(runs[0])} tensors agree")


if __name__ == "__main__":
    main()

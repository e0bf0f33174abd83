"""Compile a call of Bi-WKV before any other call, each way, and compare it with the call as it is.

A program of its own, because the compiler cannot look through the shape checks that the test run puts around every
function.
"""

import sys

import torch

from smalti.ops import bi_wkv


def main() -> None:
    torch.set_num_threads(1)
    count = 0
    for impl in ("auto", "prefix", "reference"):
        args = bi_wkv.example(70, torch.float32)

        def call(*args: torch.Tensor, impl: str = impl) -> torch.Tensor:
            return 2 * bi_wkv(*args, impl=impl) + 1

        runs = []
        for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
            output = function(*args)
            runs.append([output, *torch.autograd.grad(output.square().sum(), args)])
        for compiled, plain in zip(*runs, strict=True):
            torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
            count += 1
    sys.stdout.write(f"{count} tensors agree\n")


if __name__ == "__main__":
    main()

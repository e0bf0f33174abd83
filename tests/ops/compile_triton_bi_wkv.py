"""Compile the Triton kernels of Bi-WKV for an H100 or H200, which need not be there: sizes of the code as JSON.

A program of its own, because the interpreter of the neighbouring one replaces the compiler for the whole process.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smalti.ops.bi_wkv import triton_kernels

FLOATS = {"mean", "lse", "carry", "grad_decay", "grad_bonus"}


def code_of(kernel, constants):
    """Machine code for bfloat16 inputs."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        kind = "i32" if name in ("tokens", "channels") else "*fp32" if name in FLOATS else "*bf16"
        signature[name] = "constexpr" if name in constants else kind
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): x for name, x in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2}).asm["cubin"]


def main():
    sizes = {}
    for chunks in (1, 2):
        for way in ("forward", "backward"):
            constants = {"CHUNKS": chunks, "N": 16, "C": 16, "SAVE": True, "ROUNDED": True}
            sizes[f"{way}, {chunks} chunks"] = len(code_of(getattr(triton_kernels, way), constants))
    json.dump(sizes, sys.stdout)


if __name__ == "__main__":
    main()

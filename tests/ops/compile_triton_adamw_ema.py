"""Compile the Triton kernel of AdamW and average for an H100 or H200, which need not be there: its code as JSON.

A program of its own, because the interpreter of the neighbouring one replaces the compiler for the whole process.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smalti.ops.adamw_ema import triton as twin
from smalti.ops.adamw_ema.triton_kernels import update

KINDS = {"addresses": "*i64", "sizes": "*i64", "owners": "*i32", "pieces": "*i32", "rates": "*fp64", "count": "i32"}


def code(aligned):
    constants = {"PIECE": twin.PIECE, "BLOCK": twin.BLOCK, "ALIGNED": aligned}
    signature = {name: KINDS.get(name, "constexpr") for name in update.arg_names}
    source = ASTSource(update, signature, {(update.arg_names.index(name),): x for name, x in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


def main():
    json.dump({"aligned": code(True), "unaligned": code(False)}, sys.stdout)


if __name__ == "__main__":
    main()

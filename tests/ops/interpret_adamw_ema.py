"""The Triton kernel of AdamW and average on a CPU, under Triton's interpreter: errors beside float64, as JSON.

A program of its own, because the interpreter must be chosen before triton is imported, and for the whole process.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from smalti.ops.adamw_ema import Operands, Rates, Table, adamw_ema_reference, adamw_ema_triton
from smalti.ops.adamw_ema import triton as twin

RESULTS = ("weight", "moment", "square", "average")
SHAPES = ((3, 5), (1,), (0,), (100,), (257,), (64, 3))
CASES = {
    "usual": ((0.9, 0.999), 1e-2, 1e-4, 1),
    "average takes it whole": ((0.9, 0.999), 0.0, 1.0, 3),
    "far step, small first beta": ((0.3, 0.95), 0.1, 0.9, 1000),
    "no memory": ((0.0, 0.0), 0.0, 0.5, 2),
}


def operands_of(first_step, offset):
    """Tensors cut out of larger ones from `offset` numbers on: 1 is an address that is no multiple of 16."""
    generator = torch.Generator().manual_seed(0)

    def made(shape):
        size = torch.Size(shape).numel()
        return torch.randn(size + offset, generator=generator)[offset:].view(shape)

    columns = [[made(shape) for shape in SHAPES] for _ in range(5)]
    columns[3] = [x.square() for x in columns[3]]
    return Operands(*columns, [torch.tensor(float(first_step - 1)) for _ in SHAPES])


def errors(case, offset):
    """By result: largest error of the kernel and of the reference in float32, relative to the largest exact value."""
    betas, weight_decay, average, step = case
    rates = Rates(learning_rate=1e-2, betas=betas, epsilon=1e-8, weight_decay=weight_decay, average=average)
    operands = operands_of(step, offset)
    rows = [[x.clone() for x in row[:5]] for row in zip(*operands, strict=True)]
    adamw_ema_triton(Table(operands), rates)
    assert all(x.item() == step for x in operands.steps)
    found = dict.fromkeys(RESULTS, (0.0, 0.0))
    for k, row in enumerate(rows):
        exact = adamw_ema_reference(*(x.double() for x in row), step, rates)
        plain = adamw_ema_reference(*row, step, rates)
        fast = [operands[n][k] for n in (0, 2, 3, 4)]
        assert torch.equal(operands.gradients[k], row[1])
        for name, e, p, f in zip(RESULTS, exact, plain, fast, strict=True):
            if e.numel():
                pair = [((x.double() - e).abs().max() / e.abs().max()).item() for x in (f, p)]
                found[name] = tuple(map(max, found[name], pair))
    return found


def main():
    torch.set_num_threads(1)
    twin.PIECE, twin.BLOCK = 128, 32  # so that small tensors have several pieces
    versions = operands_of(1, 0)
    before = [x._version for row in versions for x in row]
    adamw_ema_triton(
        Table(versions), Rates(learning_rate=1e-2, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0, average=0.5)
    )
    changed = [now > then for now, then in zip([x._version for row in versions for x in row], before, strict=True)]
    count = len(SHAPES)
    found = {
        "errors": [(name, offset, errors(case, offset)) for name, case in CASES.items() for offset in (0, 1)],
        "versions": all(changed[:count] + changed[2 * count :]) and not any(changed[count : 2 * count]),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

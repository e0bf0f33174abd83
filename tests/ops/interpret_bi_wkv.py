"""The Triton kernels of Bi-WKV on a CPU, under Triton's interpreter: errors of each case, and more, as JSON.

A program of its own, because the interpreter must be chosen before triton is imported, and for the whole process.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime.interpreter import ScanOps

from smalti.ops.bi_wkv.reference import bi_wkv_reference
from smalti.ops.bi_wkv.triton import _forward, bi_wkv_triton

RESULTS = ("output", "decay", "bonus", "key", "value")
# Name: tokens, channels, batch, range of the total decay, largest bonus, then either deviation of keys or "extreme".
ORDINARY = {
    f"{tokens} tokens, {channels} channels": (tokens, channels, batch, (-5.0, 3.0), 1.0, 1.0)
    for tokens, channels, batch in [
        *((tokens, channels, 3) for tokens in (1, 2, 63) for channels in (5, 16, 40)),
        (257, 5, 2),
        (257, 40, 2),
        (1025, 16, 1),
        (1025, 5, 2),
    ]
}
EXTREME = {
    "fading and growing": (257, 16, 2, (-300.0, 300.0), 1.0, 1.0),
    "fading and growing, wide keys": (257, 16, 2, (-300.0, 300.0), 1.0, 20.0),
    "fading and growing, keys of 60": (63, 16, 2, (-200.0, 200.0), 1.0, "extreme"),
    "all fade": (257, 5, 2, (100.0, 300.0), 1.0, 1.0),
    "all grow": (257, 5, 2, (-300.0, -100.0), 1.0, 1.0),
    "moderate decay, keys of 60": (63, 16, 2, (-20.0, 20.0), 1.0, "extreme"),
    "large bonus, keys of 60": (63, 16, 2, (-5.0, 3.0), 200.0, "extreme"),
    "two tokens that fade and grow": (2, 16, 2, (-200.0, 200.0), 60.0, "extreme"),
    "several chunks, fading and growing": (1025, 5, 1, (-300.0, 300.0), 1.0, 20.0),
    "several chunks, keys of 60": (1025, 5, 1, (-5.0, 3.0), 60.0, "extreme"),
}

CASES = [(name, torch.float32) for name in ORDINARY | EXTREME]
CASES += [(name, torch.bfloat16) for name in ORDINARY | EXTREME if "16 channels" not in name]
CASES += [("63 tokens, 16 channels", torch.float16)]


def inputs_of(tokens, channels, batch, decays, bonus, keys, dtype):
    generator = torch.Generator().manual_seed(tokens * 100 + channels)
    decay = torch.linspace(*decays, channels) / tokens
    bonuses = torch.linspace(-bonus, bonus, channels)[torch.randperm(channels, generator=generator)]
    key, value = torch.randn(2, batch, tokens, channels, generator=generator)
    key = 60 * torch.sign(key) * (key.abs() > 1) if keys == "extreme" else keys * key
    return [x.to(dtype) for x in (decay, bonuses, key, value)]


def run(function, inputs):
    """Output and all gradients, under a random gradient from above."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    above = torch.randn(output.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    gradients = torch.autograd.grad(output, inputs, above.to(inputs[2].dtype).to(output.dtype))
    return dict(zip(RESULTS, [output.detach(), *gradients], strict=True))


def errors(case, dtype):
    """By result: error of the kernels and of the reference in the same dtype, relative to the largest exact value."""
    inputs = inputs_of(*case, dtype)
    exact = run(bi_wkv_reference, [x.double() for x in inputs])
    plain, fast = run(bi_wkv_reference, inputs), run(bi_wkv_triton, inputs)
    assert all(fast[name].dtype == dtype for name in RESULTS)
    largest = max(exact[name].abs().max() for name in RESULTS)
    found = {}
    for name, truth in exact.items():
        scale = truth.abs().max()
        scale = scale if scale > 1e-6 * largest else largest  # with one token, all but value have no gradient
        found[name] = [((x[name].double() - truth).abs().max() / scale).item() for x in (fast, plain)]
    return found


def scan_by_doubling(self, inputs):
    """The interpreter's scan over rows in log steps; its own calls the kernel once for each number, which takes hours.

    Like a GPU, and unlike a loop, it joins segments of many lengths.
    """
    arrays, step = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs], 1
    while step < len(arrays[0]):
        before = [self.to_tensor(np.roll(a, step, axis=0), x.dtype) for a, x in zip(arrays, inputs, strict=True)]
        own = [self.to_tensor(a, x.dtype) for a, x in zip(arrays, inputs, strict=True)]
        joined = self.combine_fn.fn(*before, *own)
        arrays = [np.concatenate([a[:step], j.handle.data[step:]]) for a, j in zip(arrays, joined, strict=True)]
        step *= 2
    return [self.to_tensor(np.moveaxis(a, 0, self.axis), x.dtype) for a, x in zip(arrays, inputs, strict=True)]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in RESULTS)


def main():
    torch.set_num_threads(1)
    tiny = (3, 2, 1, (-100.0, 100.0), 1.0, "extreme")
    found = [("the interpreter's own scan", 3, 161, "float32", errors(tiny, torch.float32))]
    ScanOps.generic_scan = scan_by_doubling
    for name, dtype in CASES:
        case = (ORDINARY | EXTREME)[name]
        tokens, _, _, decays, bonus, keys = case
        exponent = max(map(abs, decays)) + bonus + (60 if keys == "extreme" else 4 * keys)
        found.append((name, tokens, exponent, str(dtype).removeprefix("torch."), errors(case, dtype)))

    inputs = inputs_of(63, 20, 3, (-5.0, 3.0), 1.0, 1.0, torch.float32)
    strided = [x.mT.contiguous().mT if x.ndim == 3 else torch.stack([x, x], dim=1)[:, 0] for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    plain = run(bi_wkv_triton, inputs)
    compiled = torch.compile(lambda *args: 2 * bi_wkv_triton(*args), fullgraph=True, backend="aot_eager")
    facts = {
        "repeats": same(plain, run(bi_wkv_triton, inputs)),
        "strided": same(plain, run(bi_wkv_triton, strided)),
        "compiles": same(run(lambda *args: 2 * bi_wkv_triton(*args), inputs), run(compiled, inputs)),
        "without gradients": torch.equal(plain["output"], bi_wkv_triton(*inputs)),
        "saved without gradients": sum(x.numel() for x in _forward(*inputs, False)[1:]),
        "checks": torch.library.opcheck(_forward, (*(x.requires_grad_() for x in inputs), True)),
    }
    json.dump({"errors": found, "facts": facts}, sys.stdout)


if __name__ == "__main__":
    main()

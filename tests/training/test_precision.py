"""TF32 is a setting of the process: on for the products of a step on CUDA, and as before at once after it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smalti.cost.plan_devices import DEVICES
from smalti.training.device import autocast, autocast_dtype, products

ROOT = Path(__file__).parents[2]
CHOICES = {
    "nothing": "",
    "the old way": "torch.set_float32_matmul_precision('medium')",
    "the new way": "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "a mixture": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}
PROGRAM = """
import torch
from smalti.training.device import autocast, products

b = torch.backends
rules = (b.cudnn.conv, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul)

def old():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's word on a mixture of old and new
        return "mixed"

def state():
    return [old(), *(rule.fp32_precision for rule in rules)]

{choice}
before = state()
for context in (products, autocast):
    with context(torch.device("cuda"), "tf32"), products(torch.device("cuda"), "tf32"):
        print(b.cuda.matmul.fp32_precision, end=" ")
        torch.ones(8, 8) @ torch.ones(8, 8)
    print(state() == before, end=" ")
    with context(torch.device("cpu"), "tf32"):
        print(state() == before, end=" ")
    with context(torch.device("cuda"), "fp32"):
        print([rule.fp32_precision for rule in rules] == ["ieee"] * 4, end=" ")
    print(state() == before, end=" ")
"""


@pytest.mark.parametrize("choice", CHOICES)
def test_on_cuda_tf32_and_fp32_are_what_they_say_and_whatever_was_chosen_before_comes_back(choice):
    # In a process of its own: some of these choices cannot be undone.
    code = PROGRAM.format(choice=CHOICES[choice])
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["tf32", "True", "True", "True", "True"] * 2, done.stderr


def test_what_is_kept_in_tf32_is_float32():
    assert autocast_dtype("tf32") is None
    with autocast(torch.device("cpu"), "tf32"):
        assert not torch.is_autocast_enabled("cpu")
    with products(torch.device("cpu"), "tf32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


@pytest.mark.parametrize("device", [x for x in DEVICES.values() if x.name != "cpu"], ids=lambda x: x.name)
def test_peaks_rise_from_fp32_over_tf32_to_bf16(device):
    assert device.peak("fp32") <= device.peak("tf32") <= device.peak("bf16") / 2
    assert replace(device, tf32_flops=1.0).peak("tf32") == 1.0

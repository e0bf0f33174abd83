"""Any module as a feature network: it stays as it is, and what it does wrong is one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureNetwork, extract
from smalti.evaluation.networks.module import ModuleNetwork

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide" / "features.md"
SETTINGS = {"size": 8, "mean": 0.5, "std": 0.25}


class Small(nn.Module):
    """Something with parameters, buffers, and two layers that training mode would make random or changing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.norm(self.conv(images))).mean(dim=(2, 3))


class Returns(nn.Module):
    """Whatever a test wants it to."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


def _small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


def _images(count=4, size=(8, 8)):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _means(images):
    return images.mean(dim=(2, 3))


def test_features_are_what_the_module_makes_of_the_images_it_expects():
    module, images = _small(), _images()
    network = ModuleNetwork(module, "mine", **SETTINGS)
    expected = module.eval()((images.float() / 255 - 0.5) / 0.25)
    assert isinstance(network, FeatureNetwork)
    assert network.widths == {"pool": 5}
    # Dividing by 255 before or after: a rounding of each pixel, of values up to 2.
    torch.testing.assert_close(network(images)["pool"], expected.detach(), rtol=0, atol=1e-6)


def test_the_module_itself_is_left_as_it_was():
    module = _small().double().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = ModuleNetwork(module, "mine", **SETTINGS)
    network(_images())
    assert module.training
    assert module.norm.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float64 for parameter in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    first = network(_images())["pool"]
    with torch.no_grad():
        module.conv.weight.zero_()
    assert torch.equal(network(_images())["pool"], first)  # nor does the copy follow what happens to it later


def test_training_around_it_changes_no_feature_and_features_are_ordinary_tensors():
    network = ModuleNetwork(_small(), "mine", **SETTINGS)
    alone = network(_images())["pool"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network(_images())["pool"]
    assert torch.equal(inside, alone)
    assert inside.dtype == torch.float32
    inside += 1
    (torch.ones(5, requires_grad=True) * inside).sum().backward()


CHOICES = {
    "the old way": "torch.set_float32_matmul_precision('medium')",
    "the new way": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}
PROGRAM = """
import torch
from smalti.ops.float32 import whole_float32

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
with whole_float32():
    print([rule.fp32_precision for rule in rules] == ["ieee"] * 4, end=" ")
    torch.ones(8, 8) @ torch.ones(8, 8)
print(state() == before)
"""


@pytest.mark.parametrize("choice", CHOICES)
def test_whatever_rounding_was_chosen_features_are_made_without_and_the_choice_stays(choice):
    # In a process of its own: some of these choices cannot be undone.
    code = PROGRAM.format(choice=CHOICES[choice])
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_images_of_another_size_are_resized_without_leaving_what_8_bits_can_hold():
    network = ModuleNetwork(Returns(lambda x: x.flatten(1)), "pixels", size=8, mean=0, std=1 / 255)
    edge = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    edge[..., 2:] = 255  # bicubic overshoots here
    found = network(edge)["pool"]
    assert found.min() == 0
    assert found.max() == pytest.approx(255)
    shrunk = network(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))["pool"]
    assert shrunk.std() < 40  # antialiased: noise of a deviation of 74 is averaged, picked pixels would keep it
    assert "8, bicubic (a = -0.5), antialiased" in network.identity.resize


def test_resizing_is_that_of_pillow_in_floating_point():
    import numpy as np
    from PIL import Image

    network = ModuleNetwork(Returns(lambda x: x.flatten(1)), "pixels", size=24, mean=0, std=1 / 255)
    image = _images(1, (40, 17))
    ours = network(image)["pool"].reshape(3, 24, 24)
    for channel in range(3):
        theirs = Image.fromarray(image[0, channel].numpy().astype(np.float32)).resize(
            (24, 24), Image.Resampling.BICUBIC
        )
        expected = torch.from_numpy(np.array(theirs)).clamp(0, 255)
        torch.testing.assert_close(ours[channel], expected, rtol=0, atol=255 * 1e-5)


def test_the_identity_changes_with_weights_buffers_and_settings():
    def identity(module, **changes):
        return ModuleNetwork(module, "mine", **SETTINGS | changes).identity

    module, other, moved = _small(), _small(), _small()
    with torch.no_grad():
        other.conv.bias[0] += 1e-3
        moved.norm.running_mean[0] += 1e-3
    assert identity(module) == identity(_small())
    assert len({identity(m).weights for m in (module, other, moved)}) == 3
    assert identity(module, mean=0.4).resize != identity(module).resize
    assert identity(module, std=(0.25, 0.25, 0.2)).resize != identity(module).resize
    assert identity(module, resize="bilinear").resize != identity(module).resize
    assert identity(module).numerics == "float32 on cpu"


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (_means(x), x[:, :1].flatten(1)),
        lambda x: {"spatial": x[:, :1].flatten(1), "pool": _means(x), "no": 3},
    ],
    ids=["tuple", "mapping"],
)
def test_several_kinds_come_as_a_tuple_or_by_name(make):
    network = ModuleNetwork(Returns(make), "mine", kinds=("pool", "spatial"), **SETTINGS)
    assert network.widths == {"pool": 3, "spatial": 64}
    found = extract([_images(5)], network, micro_batch=2)
    assert found.rows("spatial").shape == (5, 64)
    assert found.rows("pool").shape == (5, 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: x, r"pool of 2 images is \(2, 3, 8, 8\); expected \(2, width\)"),
        (lambda x: x.mean(dim=(0, 2, 3))[None], r"is \(1, 3\); expected \(2, width\)"),
        (lambda x: x.flatten(1)[:, :0], r"is \(2, 0\)"),
        (lambda x: _means(x) / 0, "pool features of noise are not finite"),
        (lambda x: _means(x).long(), "pool is torch.int64; expected a tensor of floating-point"),
        (lambda x: (_means(x), _means(x)), "returned 2 things; expected one tensor each"),
        (lambda x: {"embedding": _means(x)}, "returned embedding, not pool"),
        (lambda x: None, "returned a NoneType"),
        (lambda x: x @ torch.zeros(3, 3), r"cannot take float images \(2, 3, 8, 8\): RuntimeError"),
    ],
)
def test_a_module_that_does_something_else_is_refused_in_one_line(make, says):
    with pytest.raises(ConfigError, match=says) as caught:
        ModuleNetwork(Returns(make), "mine", **SETTINGS)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 8.0}, r"size is 8\.0"),
        ({"size": True}, "size is True"),
        ({"mean": (0.5, 0.5)}, "mean is"),
        ({"mean": float("nan")}, "mean is nan"),
        ({"std": 0}, "must be positive"),
        ({"std": (1, 1, -1)}, "must be positive"),
        ({"resize": "cubic"}, "did you mean 'bicubic'"),
        ({"device": "nothing"}, "cannot compute on the device 'nothing'"),
        ({"device": "cuda:99"}, "cannot compute on the device 'cuda:99'"),
        ({"kinds": ()}, "give one or more of pool"),
        ({"kinds": ("pool", "pool")}, "each once"),
        ({"kinds": ("pools",)}, "did you mean 'pool'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(changes, says, no_shape_checks):
    with pytest.raises(ConfigError, match=says) as caught:
        ModuleNetwork(Returns(_means), "mine", **SETTINGS | changes)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["inception", "Inception", "", "a b", "x" * 65, "a\nb"])
def test_a_name_that_would_pass_for_inception_or_break_a_table_is_refused(name):
    with pytest.raises(ConfigError, match=r"call yours something else|cannot be called"):
        ModuleNetwork(Returns(_means), name, **SETTINGS)


def test_what_is_no_module_or_cannot_be_copied_is_refused(no_shape_checks):
    with pytest.raises(ConfigError, match=r"expected an nn\.Module, got a function"):
        ModuleNetwork(_means, "mine", **SETTINGS)
    module = Returns(_means)
    module.history = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(ConfigError, match="cannot be copied"):
        ModuleNetwork(module, "mine", **SETTINGS)


def test_images_that_are_not_8_bit_rgb_are_refused():
    network = ModuleNetwork(Returns(_means), "mine", **SETTINGS)
    with pytest.raises(DataError, match="expected 8-bit RGB images"):
        network(_images().float())
    with pytest.raises(DataError, match="expected 8-bit RGB images"):
        network(_images()[:, :1])


def test_a_width_that_changes_is_noticed():
    calls = []

    def grows(images):
        calls.append(1)
        return images.flatten(1)[:, : len(calls)]

    network = ModuleNetwork(Returns(grows), "mine", **SETTINGS)
    with pytest.raises(ConfigError, match=r"were \{'pool': 1\}, and now are \{'pool': 2\}"):
        network(_images())


def test_the_example_of_the_guide_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    with torch.random.fork_rng(devices=[]):
        exec(compile(example, str(GUIDE), "exec"), {})
    assert capsys.readouterr().out.strip()

"""Features and numbers on CUDA: those of a CPU up to rounding, in whole float32 whatever the process has set."""

import copy
import math

import pytest
import torch
from inception_recipe import recipe_weights

from smalti.evaluation.features import extract
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.metric import measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks.inception import InceptionNetwork, inception_input
from smalti.evaluation.networks.lite0 import Lite0
from smalti.evaluation.networks.module import ModuleNetwork

EPS = torch.finfo(torch.float32).eps


def images(count, size=32, seed=0):
    """Noise around greys of their own: no two images alike."""
    generator = torch.Generator().manual_seed(seed)
    grey = torch.randint(64, 192, (count, 3, 1, 1), generator=generator)
    return (grey + torch.randint(-64, 64, (count, 3, size, size), generator=generator)).to(torch.uint8)


def scaled_lite0():
    """Lite0 with random weights that keep activations from fading: the test needs no package with the real ones."""
    model = Lite0()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = math.prod(parameter.shape[1:])
        size = math.sqrt(2 / fan_in) if parameter.ndim > 1 else 0.1
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return model


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def limit(own, layers, terms):
    """What features may be off: twice a CPU's own error, and a sum of `terms` numbers rounded anew in each layer.

    Errors of sums and of layers are independent and grow by roots. TensorFloat-32 rounds each factor 4096 times as
    coarsely as float32 rounds a result, which is seen.
    """
    return 2 * own + math.sqrt(layers * terms) * EPS


@pytest.fixture
def shortened():
    """The process wants its products and convolutions in TF32, as training on CUDA often does."""
    rules = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    before = [rule.fp32_precision for rule in rules]
    for rule in rules:
        rule.fp32_precision = "tf32"
    yield rules
    assert [rule.fp32_precision for rule in rules] == ["tf32", "tf32"]
    for rule, precision in zip(rules, before, strict=True):
        rule.fp32_precision = precision


def test_inception_on_cuda_is_in_whole_float32_although_the_process_is_not(device, shortened):
    weights, batch = recipe_weights(), images(4)
    cpu, cuda = InceptionNetwork(weights), InceptionNetwork(weights, device=device)
    with torch.inference_mode():
        exact = copy.deepcopy(cpu._model).double()(inception_input(batch).double())
    on_cpu, on_cuda = cpu(batch), cuda(batch)
    # 48 convolutions in a row at most, with 448 x 9 terms in the longest sum.
    limits = {kind: limit(relative(on_cpu[kind], exact[kind]), 48, 448 * 9) for kind in exact}
    assert max(limits.values()) < 1e-4
    assert {kind: e for kind in exact if not (e := relative(on_cuda[kind], exact[kind])) <= limits[kind]} == {}
    assert {rows.device.type for rows in on_cuda.values()} == {"cpu"}
    assert cuda.identity.numerics == f"float32 on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        with torch.inference_mode():  # the same network as the process would have it: the limit tells the two apart
            short = cuda._model(inception_input(batch.to(device)))["pool"].cpu()
        assert relative(short, exact["pool"]) > limits["pool"]


def test_any_module_on_cuda_is_in_whole_float32_although_the_process_is_not(device, shortened):
    module, batch = scaled_lite0(), images(4, size=64)
    settings = {"size": 64, "mean": 0.5, "std": 0.5, "kinds": ("pool", "logits")}
    cpu = ModuleNetwork(module, "random", **settings)
    cuda = ModuleNetwork(module, "random", device=str(device), **settings)
    assert cuda.identity.weights == cpu.identity.weights
    with torch.inference_mode():
        exact = copy.deepcopy(cpu._module).double()(cpu._prepared(batch).double())
    on_cpu, on_cuda = cpu(batch), cuda(batch)
    for kind in exact:
        # 47 convolutions in a row, with 1152 terms in the longest sum.
        assert relative(on_cuda[kind], exact[kind]) <= limit(relative(on_cpu[kind], exact[kind]), 47, 1152), kind


def test_features_on_cuda_do_not_depend_on_how_the_stream_is_cut(device):
    network = InceptionNetwork(recipe_weights(), device=device)
    batch = images(10)
    whole = extract([batch], network, micro_batch=4)
    for cuts in ([1] * 10, [3, 4, 3], [9, 1]):
        found = extract(batch.split(cuts), network, micro_batch=4)
        assert all(torch.equal(found.rows(kind), rows) for kind, rows in whole.features.items())


def test_numbers_from_features_of_cuda_are_those_of_a_cpu(device):
    settings = {"size": 32, "mean": 0.5, "std": 0.5}
    networks = [ModuleNetwork(scaled_lite0(), "random", device=str(where), **settings) for where in ("cpu", device)]
    ours, real = images(60, seed=1), images(50, seed=2)
    sets = [(extract([ours], n, kinds=["pool"]), extract([real], n, kinds=["pool"])) for n in networks]
    (my_cpu, real_cpu), (my_cuda, real_cuda) = sets
    # Features that are off by e of their length move means by e, covariances by 2 e, of the largest second moment.
    e = max(relative(a.rows("pool"), b.rows("pool").double()) for a, b in ((my_cuda, my_cpu), (real_cuda, real_cpu)))
    assert e <= limit(limit(0, 47, 1152), 47, 1152)  # both are off
    size = float(my_cpu.rows("pool").double().square().sum(dim=1).mean())
    a, b = my_cpu.moments("pool"), my_cuda.moments("pool")
    assert float((a.mean - b.mean).norm()) <= e * size**0.5 * 1.1
    assert float((a.covariance - b.covariance).norm()) <= 2 * e * size * 1.1
    # Coupling each image with itself bounds the distance of the two Gaussians by the mean square of the change.
    assert frechet_distance(a, b) <= (e**2 + 2e-8) * size * 1.1
    numbers = [measure(*pair, ("fd", "precision", "recall"), METRICS, network="random") for pair in sets]
    root = [n["fd"].value ** 0.5 for n in numbers]
    assert abs(root[0] - root[1]) <= 2 * e * size**0.5 * 1.1 + 1e-6 * root[0]  # a metric: the triangle inequality
    for name in ("precision", "recall"):
        # Float16 rounds the same distances; one on the edge of a ball may fall to either side.
        count = len(ours if name == "precision" else real)
        assert numbers[0][name].value == pytest.approx(numbers[1][name].value, abs=1.5 / count)
        assert 0.5 < numbers[0][name].value < 1

"""Feature networks: images per second, resize included and alone, beside the time of as many multiply-adds.

A floor is the multiply-adds of the network divided by the rate of a large matrix product, measured in turns with it.
Inception runs with random weights, which are as fast as the published ones and always there.
"""

import argparse
import math
import sys
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.cost import Gemm, clock_name, measure_interleaved
from smalti.evaluation.features import FeatureNetwork
from smalti.evaluation.networks import build_network
from smalti.evaluation.networks.inception import Convolution, InceptionFID, InceptionNetwork, inception_input


def main(arguments: list[str]) -> int:
    """One JSON line per network, image size and batch, then the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks features", description=__doc__)
    parser.add_argument("networks", nargs="*", default=["inception"], help="as in --features (default inception)")
    parser.add_argument("--image-size", nargs="+", type=positive, default=[32, 256], help="pixels (default 32 256)")
    parser.add_argument(
        "--batch", nargs="+", type=positive, default=[32], help="images at once (default 32, as evaluation has it)"
    )
    add_common_options(parser, precisions=["fp32"])
    options = parser.parse_args(arguments)
    device = prepare(options)
    recorder = Recorder("features", device, options.out)
    for spec in options.networks:
        network = random_inception(device) if spec == "inception" else build_network(spec, device=str(device))
        for size in options.image_size:
            for batch in options.batch:
                _measure(recorder, spec, network, size, batch, options.repeats, device)
    sys.stdout.write("\n" + _table(recorder))
    return 0


def random_inception(device: torch.device) -> InceptionNetwork:
    """Inception with random weights of the size that keeps activations from growing."""
    with torch.device("meta"):
        model = InceptionFID()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"fc.{name}": torch.zeros(tuple(p.shape)) for name, p in model.fc.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, Convolution):
            shape, channels = tuple(layer.weight.shape), layer.out_channels
            tensors[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) / math.sqrt(
                math.prod(shape[1:]) / 2
            )
            ones, zeros = torch.ones(channels), torch.zeros(channels)
            parts = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
            tensors |= {f"{name}.bn.{part}": value for part, value in parts.items()}
    return InceptionNetwork(tensors, device=device)


def macs_of(network: FeatureNetwork, images: Tensor) -> int:
    """Multiply-adds of one call: products and convolutions, a resize by products among them."""
    with FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops() // 2


def _measure(
    recorder: Recorder, spec: str, network: FeatureNetwork, size: int, batch: int, repeats: int, device: torch.device
) -> None:
    images = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    gemm = Gemm(torch.float32, device)
    runs = {"network": partial(network, images), "gemm": gemm}
    if isinstance(network, InceptionNetwork):
        runs["resize"] = partial(_resize, images.to(device))
    times = measure_interleaved(runs, device=device, repeats=repeats, min_seconds=0.005)
    macs, rate = macs_of(network, images[:1]), gemm.macs / times["gemm"].median
    resize = times.get("resize")
    recorder.add(
        network=spec,
        image_size=size,
        batch=batch,
        precision="fp32",
        gmacs=macs / 1e9,
        seconds=times["network"].median,
        fastest=times["network"].fastest,
        images_per_second=batch / times["network"].median,
        floors=times["network"].median * rate / (macs * batch),
        resize_images_per_second=resize and batch / resize.median,
        gemm_gmacs_per_second=rate / 1e9,
        clock=clock_name(device),
    )


def _resize(images: Tensor) -> Tensor:
    with torch.inference_mode():
        return inception_input(images)


def _table(recorder: Recorder) -> str:
    header = ("network", "image size", "batch", "GMACs", "images/s", "x floor", "resize images/s")
    rows = [
        (
            row["network"],
            row["image_size"],
            row["batch"],
            f"{row['gmacs']:.2f}",
            f"{row['images_per_second']:.1f}",
            f"{row['floors']:.2f}",
            f"{row['resize_images_per_second']:.0f}" if row["resize_images_per_second"] else "-",
        )
        for row in recorder.rows
    ]
    return table(header, rows) + "images/s: from 8-bit images to features, resize included.\n"

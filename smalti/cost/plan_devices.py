"""What kinds of devices can do at best, as their makers print it: the table behind `smalti plan`."""

import os
from dataclasses import dataclass

from smalti.config import did_you_mean
from smalti.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """One device of a kind. Rates are peaks that no training run reaches; a plan multiplies them by a utilisation.

    Args:
        bf16_flops, tf32_flops, fp32_flops: operations per second of dense matrix products, sums in float32. Float32 is
            without TensorFloat-32. 0 = measured here when a plan asks.
        memory: bytes that a process can see. 0 = as much as this machine has.
        memory_rate: bytes per second of its memory; 0 = not stated.
        inside_rate: bytes per second, one way, between two devices of a node.
        between_rate: bytes per second, one way, that a device has towards other nodes.
        source: where the numbers are from.
    """

    name: str
    bf16_flops: float
    tf32_flops: float
    fp32_flops: float
    memory: int
    memory_rate: float
    inside_rate: float
    between_rate: float
    source: str

    def peak(self, precision: str) -> float:
        """Operations per second of the matrix products of a run in this precision."""
        return {"bf16": self.bf16_flops, "tf32": self.tf32_flops, "fp32": self.fp32_flops}[precision]


def _card(
    name: str,
    bf16: float,
    tf32: float,
    fp32: float,
    memory: float,
    rate: float,
    inside: float,
    between: float,
    source: str,
) -> DeviceKind:
    """TFLOP/s, GiB and GB/s, as data sheets print them."""
    return DeviceKind(
        name=name,
        bf16_flops=bf16 * 1e12,
        tf32_flops=tf32 * 1e12,
        fp32_flops=fp32 * 1e12,
        memory=round(memory * GIB),
        memory_rate=rate * 1e9,
        inside_rate=inside * 1e9,
        between_rate=between * 1e9,
        source=source,
    )


_EIGHT = "links of the maker's own machine of eight"
DEVICES: dict[str, DeviceKind] = {
    device.name: device
    for device in (
        _card(
            "a100-40", 312, 156, 19.5, 39.4, 1555, 300, 25, f"NVIDIA A100 data sheet, SXM4 40 GB; {_EIGHT}, 200 Gb/s"
        ),
        _card(
            "a100-80", 312, 156, 19.5, 79.2, 2039, 300, 25, f"NVIDIA A100 data sheet, SXM4 80 GB; {_EIGHT}, 200 Gb/s"
        ),
        _card(
            "h100", 989.4, 494.7, 66.9, 79.2, 3350, 450, 50, f"NVIDIA H100 data sheet, SXM5, dense; {_EIGHT}, 400 Gb/s"
        ),
        _card(
            "h200", 989.4, 494.7, 66.9, 139.8, 4800, 450, 50, f"NVIDIA H200 data sheet, SXM, dense; {_EIGHT}, 400 Gb/s"
        ),
        _card("b200", 2250, 1125, 75, 178, 8000, 900, 50, f"NVIDIA HGX B200 data sheet, dense; {_EIGHT}, 400 Gb/s"),
        _card(
            "4090",
            165.2,
            82.6,
            82.6,
            23.5,
            1008,
            25,
            3.1,
            "NVIDIA Ada whitepaper, dense, float32 sums; links by our guess: PCIe 4.0 x16, 25 Gb/s Ethernet",
        ),
        _card("cpu", 0, 0, 0, 0, 0, 5, 1.25, "this machine, measured; links by our guess, 10 Gb/s Ethernet"),
    )
}


def find_device(name: str) -> DeviceKind:
    """A row of the table.

    Raises:
        ConfigError: there is no such kind.
    """
    if name not in DEVICES:
        raise ConfigError(f"no device kind {name!r}{did_you_mean(name, DEVICES)}")
    return DEVICES[name]


def machine_memory() -> int:
    """Bytes of memory of this machine.

    Raises:
        ConfigError: the system does not tell.
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise ConfigError("this system does not say how much memory it has: give --memory-gib") from error

"""What a plan is asked about, and what one measured run tells it."""

from dataclasses import dataclass
from typing import Literal

from smalti.cost.plan_devices import find_device
from smalti.errors import ConfigError
from smalti.models import BackboneConfig

Strategy = Literal["single", "ddp", "fsdp", "hsdp"]
CheckpointPolicy = Literal["none", "selective", "full"]
UTILISATIONS = (0.2, 0.3, 0.4)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The speed of a real run, from which a plan takes its utilisation.

    Args:
        images_per_second: of all devices together, trained.
        low, high: a range that most of the run's readings lie in; None = 10 % to both sides.
        device: kind of device. devices: how many.
        precision: of its matrix products.
        network: what was trained; None = the network of the plan.
        source: where the number is from, for the reader.
    """

    images_per_second: float
    device: str
    low: float | None = None
    high: float | None = None
    devices: int = 1
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    activation_checkpointing: CheckpointPolicy = "none"
    network: BackboneConfig | None = None
    peak_tflops: float | None = None
    source: str = "a measured run"

    def __post_init__(self) -> None:
        find_device(self.device)
        rates = (self.low or self.images_per_second, self.images_per_second, self.high or self.images_per_second)
        if not 0 < rates[0] <= rates[1] <= rates[2]:
            raise ConfigError(f"images_per_second {rates} of {self.source}: expected rates above 0, smallest first")
        if self.devices < 1:
            raise ConfigError(f"a run on {self.devices} devices: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A training run that nobody has started yet.

    Args:
        network: with the size of the latents that it shall see.
        name: of the network, for the reader.
        batch_size: images of one optimizer step, of all processes together.
        micro_batch: images of one forward pass of one process; None = its whole share of the batch.
        nodes, gpus_per_node: the world; one process drives one device.
        strategy: single (one process), ddp (copies), fsdp (one copy split over all), hsdp (copies of split ones).
        shard_size: processes that share one copy under hsdp; None = those of a node.
        reshard: fsdp and hsdp drop the gathered weights of a block after its forward.
        activation_checkpointing: none; selective = elementwise work of a block is done again, products are kept; full =
            the whole block is done again.
        steps: optimizer steps.
        device: a kind of `DEVICES`.
        utilisation: shares of the device's peak that are assumed, smallest first; a measured run replaces them.
        peak_tflops, memory_gib: of one device, instead of the table's.
        inside_gb_per_second, between_gb_per_second: of one device's links, one way, instead of the table's.
        price_per_hour: of one device, in any currency; None = no costs are printed, because prices age.
        fused_optimizer: False = an optimizer that needs room for one more copy of the trained weights.
        write_gb_per_second: of storage, all processes together.
        copy_gb_per_second: from one device to its host, which is what an asynchronous save waits for.
        sample_images, sample_steps, guidance_scale: a set of samples to be drawn with the trained network.
        measured: one real run to calibrate from.

    Raises:
        ConfigError: a number out of its range, or settings that do not go together.
    """

    network: BackboneConfig
    name: str = ""
    batch_size: int = 256
    micro_batch: int | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    nodes: int = 1
    gpus_per_node: int = 1
    strategy: Strategy = "single"
    shard_size: int | None = None
    reshard: bool = True
    activation_checkpointing: CheckpointPolicy = "none"
    steps: int = 400_000
    device: str = "h100"
    utilisation: tuple[float, ...] = UTILISATIONS
    peak_tflops: float | None = None
    memory_gib: float | None = None
    inside_gb_per_second: float | None = None
    between_gb_per_second: float | None = None
    price_per_hour: float | None = None
    fused_optimizer: bool = True
    write_gb_per_second: float = 1.0
    copy_gb_per_second: float = 10.0
    sample_images: int = 50_000
    sample_steps: int = 250
    guidance_scale: float = 1.5
    measured: Measured | None = None

    def __post_init__(self) -> None:
        find_device(self.device)
        for name in ("batch_size", "nodes", "gpus_per_node", "steps", "sample_images", "sample_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("write_gb_per_second", "copy_gb_per_second"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("peak_tflops", "memory_gib", "inside_gb_per_second", "between_gb_per_second", "price_per_hour"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 (or left out), got {getattr(self, name)}")
        if not self.utilisation or not 0 < min(self.utilisation) <= max(self.utilisation) <= 1:
            raise ConfigError(f"utilisation {self.utilisation}: expected shares of the peak above 0 and at most 1")
        if self.strategy == "single" and self.ranks > 1:
            raise ConfigError(f"strategy 'single' is one process, got {self.nodes} x {self.gpus_per_node}: choose ddp")
        if self.shard_size is not None and self.strategy != "hsdp":
            raise ConfigError(f"shard_size is for strategy 'hsdp', got {self.strategy!r}: leave it out")
        if self.ranks % self.shards:
            raise ConfigError(f"shard_size {self.shards} must divide the {self.ranks} processes")
        if self.batch_size < self.ranks:
            raise ConfigError(f"batch_size {self.batch_size} is less than one image for each of {self.ranks} processes")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.local_batch:
            raise ConfigError(
                f"micro_batch {self.micro_batch} must be between 1 and {self.local_batch}, the share of one process"
            )

    @property
    def ranks(self) -> int:
        """Processes, each with one device."""
        return self.nodes * self.gpus_per_node

    @property
    def shards(self) -> int:
        """Processes that hold one copy of the weights together."""
        if self.strategy == "fsdp":
            return self.ranks
        if self.strategy == "hsdp":
            return self.shard_size or self.gpus_per_node
        return 1

    @property
    def local_batch(self) -> int:
        """Images of one step and process, of the one that has most."""
        return -(-self.batch_size // self.ranks)

    @property
    def images_at_once(self) -> int:
        """Images of one forward pass of one process."""
        return self.micro_batch or self.local_batch

    @property
    def micro_batches(self) -> int:
        """Forward passes of one process in one step."""
        return -(-self.local_batch // self.images_at_once)

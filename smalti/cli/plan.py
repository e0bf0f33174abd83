"""`smalti plan`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smalti.config import to_dict
from smalti.cost.plan_request import UTILISATIONS, CheckpointPolicy
from smalti.training.config import RunConfig
from smalti.workflows.plan import make_plan, plan_request
from smalti.workflows.recipes import load_settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training run needs, before it is started: operations, memory, disk, communication, time, cost.

    Settings may come from a run's file, `--config run.yaml`, or a recipe's name; flags change them. A preset alone is
    planned as its paper trained it: 256 images a step, 400,000 steps, bf16.
    """

    preset: Annotated[str | None, tyro.conf.Positional] = None
    """Network (`smalti presets` lists them); with --config, that of the file."""
    override: tuple[str, ...] = ()
    """Changes to the preset, as name=value: --override depth=6."""
    sample_size: int | None = None
    """Side of square latents; None = what the preset is made for."""
    image_size: int | None = None
    """Side of square images instead; latents have one number for --factor pixels."""
    factor: int = 8
    """Pixels to a side of one latent: 8 for Stable Diffusion's codec, 1 for networks on pixels."""
    batch_size: int | None = None
    """Images of one step, of all processes together."""
    micro_batch: int | None = None
    """Images of one forward pass of one process; None = its whole share."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    nodes: int = 1
    gpus_per_node: int = 1
    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp"] | None = None
    """auto = single for one process, ddp for several in one node, hsdp across nodes."""
    shard_size: int | None = None
    """Processes that share one copy of the weights under hsdp; None = those of a node."""
    reshard: bool | None = None
    """Give gathered weights up between forward and backward."""
    activation_checkpointing: CheckpointPolicy | None = None
    steps: int | None = None
    device: str = "h100"
    """a100-40, a100-80, h100, h200, b200, 4090, or cpu: this machine."""
    utilisation: tuple[float, ...] = UTILISATIONS
    """Shares of the device's peak to assume."""
    measured: Path | None = None
    """A run folder, or a JSON file with images_per_second and device, to take the utilisation from."""
    measured_device: str | None = None
    """Kind of the devices that a run folder was trained on; None = --device."""
    peak_tflops: float | None = None
    """Of one device, instead of the table's."""
    memory_gib: float | None = None
    """Of one device, instead of the table's."""
    inside_gb_per_second: float | None = None
    """Of one device to its neighbours in a node, one way."""
    between_gb_per_second: float | None = None
    """Of one device to other nodes, one way."""
    price_per_hour: float | None = None
    """Of one device, in any currency."""
    write_gb_per_second: float = 1.0
    """Of storage, all processes together."""
    sample_images: int = 50_000
    sample_steps: int = 250
    guidance_scale: float = 1.5
    json: bool = False
    """One JSON object instead of text."""
    run_config: tyro.conf.Suppress[RunConfig | None] = None

    @classmethod
    def from_file(cls, path: str) -> "Plan":
        return cls(run_config=load_settings(path))

    def run(self) -> None:
        asked = {name: value for name, value in vars(self).items() if name not in ("json", "run_config")}
        made = make_plan(plan_request(run=self.run_config, **asked))
        print(json.dumps(to_dict(made)) if self.json else "\n".join(made.lines()))

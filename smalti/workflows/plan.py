"""`plan`: presets, run files and run folders turned into what `smalti.cost.plan` is asked."""

import json
import statistics
from pathlib import Path
from typing import Any, Literal

import yaml

from smalti.config import from_dict
from smalti.cost.plan import Plan, plan
from smalti.cost.plan_request import UTILISATIONS, CheckpointPolicy, Measured, PlanRequest, Strategy
from smalti.data.latent_record import RECORD, read_record
from smalti.errors import ConfigError
from smalti.models import BackboneConfig
from smalti.presets import find_preset, parse_overrides, preset_config
from smalti.storage.objects import open_store
from smalti.training.config import RunConfig
from smalti.training.distributed import apply_activation_checkpointing
from smalti.training.log import read_log
from smalti.workflows.run_folder import CONFIG, RESOLVED, load_config

# As the papers trained; what a preset alone is planned for.
PAPER_BATCH, PAPER_STEPS = 256, 400_000
PIXEL_CHANNELS = 3  # of networks on images; those on latents are given another size by their codec
WARM_LINES = 2  # of a log, in which caches fill and kernels compile


def make_plan(request: PlanRequest) -> Plan:
    """The plan of a request, with activation checkpointing as `smalti train` does it.

    Raises:
        ConfigError: the request does not go together, or the network refuses its size.
    """
    try:
        return plan(request, apply_policy=apply_activation_checkpointing)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{request.name or request.network.kind}: {error}") from error


def plan_request(
    preset: str | None = None,
    *,
    run: RunConfig | None = None,
    override: tuple[str, ...] = (),
    sample_size: int | None = None,
    image_size: int | None = None,
    factor: int = 8,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    precision: Literal["fp32", "tf32", "bf16"] | None = None,
    nodes: int = 1,
    gpus_per_node: int = 1,
    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp"] | None = None,
    shard_size: int | None = None,
    reshard: bool | None = None,
    activation_checkpointing: CheckpointPolicy | None = None,
    steps: int | None = None,
    device: str = "h100",
    utilisation: tuple[float, ...] = UTILISATIONS,
    measured: Path | None = None,
    measured_device: str | None = None,
    **others: Any,
) -> PlanRequest:
    """What to ask for a preset, for a run's settings, or for both: what is None comes from the run, else the paper.

    Args:
        image_size, factor: side of the images, and pixels to a side of one latent; instead of `sample_size`.
        measured: a run folder or a JSON file, see `read_measured`.
        others: further fields of `PlanRequest`.

    Raises:
        ConfigError: an unknown name, a setting out of its range, or two that contradict each other.
    """
    if preset is None and run is None:
        raise ConfigError("name a preset, e.g. dit-xl-2 (`smalti presets` lists them), or give --config run.yaml")
    name = preset if preset is not None else run.model  # type: ignore[union-attr]
    settings = _of_run(run, name) if run is not None else {}
    settings |= parse_overrides(override)
    if (side := _side(sample_size, image_size, factor)) is not None:
        settings["sample_size"] = side
    parallel = run.parallel if run is not None else None
    if strategy is None:
        strategy = parallel.strategy if parallel is not None else "auto"
    settled = settle_strategy(strategy, nodes, gpus_per_node)
    if shard_size is None and parallel is not None and settled == "hsdp":
        shard_size = parallel.shard_size
    if activation_checkpointing is None:
        activation_checkpointing = parallel.activation_checkpointing if parallel is not None else "none"
    return PlanRequest(
        network=preset_config(name, **settings),
        name=name,
        batch_size=_first(batch_size, run and run.batch_size, PAPER_BATCH),
        micro_batch=_first(micro_batch, run and run.micro_batch, None),
        precision=_first(precision, run and run.precision, "bf16"),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        strategy=settled,
        shard_size=shard_size,
        reshard=_first(reshard, parallel and parallel.reshard, True),
        activation_checkpointing=activation_checkpointing,
        steps=_first(steps, run and run.steps, PAPER_STEPS),
        device=device,
        utilisation=utilisation,
        measured=None if measured is None else read_measured(measured, measured_device or device),
        **others,
    )


def _of_run(run: RunConfig, name: str) -> dict[str, Any]:
    """What training will make of the preset, as far as settings tell; the rest it takes from the examples."""
    settings: dict[str, Any] = {}
    if run.data.image_size is not None and find_preset(name).config.in_channels == PIXEL_CHANNELS:
        settings["sample_size"] = run.data.image_size
    settings |= _of_latents(Path(run.data.path))
    if run.objective.schedule == "flow":
        settings["learned_variance"] = False  # a path without steps has no step variance to learn
    return settings | (parse_overrides(run.override) if name == run.model else {})


def _of_latents(folder: Path) -> dict[str, Any]:
    """What the latents of a folder make of a network; nothing where there are none on this machine."""
    if not (folder / RECORD).is_file():
        return {}
    record = read_record(open_store(folder))
    channels, rows, columns = record.identity.latent_shape
    return {"in_channels": channels, "sample_size": (rows, columns), "num_classes": len(record.class_names)}


def _first(asked: Any, of_run: Any, otherwise: Any) -> Any:
    return asked if asked is not None else of_run if of_run is not None else otherwise


def settle_strategy(strategy: str, nodes: int, gpus_per_node: int) -> Strategy:
    """What "auto" means for a world: one process alone, copies in a node, split copies across nodes."""
    if strategy == "auto":
        return "single" if nodes * gpus_per_node == 1 else "ddp" if nodes == 1 else "hsdp"
    return strategy  # type: ignore[return-value]


def _side(sample_size: int | None, image_size: int | None, factor: int) -> int | None:
    if image_size is None:
        return sample_size
    if sample_size is not None:
        raise ConfigError("give the size once: --sample-size of the latents, or --image-size and --factor")
    if factor < 1 or image_size % factor:
        raise ConfigError(f"image_size {image_size} is not divisible by factor {factor}: latents need whole numbers")
    return image_size // factor


def read_measured(path: Path, device: str) -> Measured:
    """The speed of a run: its folder, or a JSON file such as `{"images_per_second": 410, "device": "h100"}`.

    A folder's log has a speed for every stretch of steps: the plan takes the median, and the band that four of five
    lie in, of as many processes as trained last; the first ones are left out. A file may also have low, high, devices,
    precision, activation_checkpointing, peak_tflops, and network, as `to_dict` writes a backbone's config.

    Args:
        device: kind of device of a run folder, which does not know it by this name.

    Raises:
        ConfigError: there is no speed in it.
    """
    if path.is_dir():
        return _of_folder(path, device)
    try:
        told = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"--measured {path} does not exist: give a run folder or a JSON file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--measured {path} cannot be read as JSON: {' '.join(str(error).split())[:200]}") from error
    if isinstance(told, dict):
        told = {"source": str(path), "device": device} | told
    return from_dict(Measured, told, str(path))


def _of_folder(path: Path, device: str) -> Measured:
    config = load_config(path / CONFIG)
    try:
        network = yaml.safe_load((path / RESOLVED).read_text())["model"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no run folder: its {RESOLVED} does not name the network") from error
    lines = [line for line in read_log(path) if line.get("event") == "train" and "images_per_second" in line]
    lines = [line for line in lines if line.get("processes") == lines[-1].get("processes")]
    speeds = sorted(line["images_per_second"] for line in lines[WARM_LINES if len(lines) > 2 * WARM_LINES else 0 :])
    if not speeds:
        raise ConfigError(f"{path / 'log.jsonl'} has no line with images_per_second: let the run take some steps first")
    middle = statistics.median(speeds)
    tenth = len(speeds) // 10
    spread = len(speeds) >= 5
    return Measured(
        images_per_second=middle,
        low=speeds[tenth] if spread else None,
        high=speeds[-1 - tenth] if spread else None,
        device=device,
        devices=lines[-1].get("processes", 1),
        precision=config.precision,
        activation_checkpointing=config.parallel.activation_checkpointing,
        network=from_dict(BackboneConfig, network, str(path / RESOLVED)),
        source=str(path),
    )

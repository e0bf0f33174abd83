"""What a call of `sample` asks for, checked before anything is written."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from smalti.config import to_dict
from smalti.errors import ConfigError
from smalti.models import InferenceForm, InferenceMode
from smalti.models.files import WEIGHTS
from smalti.sampling import SamplingConfig
from smalti.sampling.record import LabelRule, ModelFacts, SampleIdentity, SampleRecord, labels_sha256, seeds_text
from smalti.storage import filesystem
from smalti.storage.sealed import smalti_version
from smalti.training.device import resolve_device
from smalti.workflows.chunk_share import read_chunk_range
from smalti.workflows.out_folder import check_folder
from smalti.workflows.sample import Source, load_source, parse_seeds, read_classes, require_images, sample
from smalti.world import World

CHUNK_SIZE = 64  # images, or the next multiple of micro_batch

Save = Literal["png", "npz"]


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What a user asks for.

    Args:
        seeds: one image each, as `parse_seeds` reads them.
        classes: used in turn; without them `label_rule` says where classes come from.
        chunks: `a:b`, numbers of the chunks that this process is to make, b not included; "" = whichever is missing.
        chunk_size, threads: None = as the set that is there, else 64 (rounded up to micro_batch), and torch's number.
        codec, other_decoder: see `load_source`.
        overwrite: where `out` holds another set, remove that one first; nothing that is not its own.
    """

    model: Path
    out: Path
    sampling: SamplingConfig
    seeds: str = "0-15"
    classes: tuple[str, ...] = ()
    label_rule: Literal["random", "balanced"] = "random"
    micro_batch: int = 16
    device: str = "auto"
    precision: str = "fp32"
    inference: Literal["none"] | InferenceMode = "none"
    save: tuple[Save, ...] = ("png",)
    chunks: str = ""
    chunk_size: int | None = None
    threads: int | None = None
    codec: str = ""
    other_decoder: bool = False
    overwrite: bool = False


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """Settings that were found to be good, with the network and the labels that they lead to.

    Attributes:
        record: as it would be if this process were the first.
    """

    settings: SampleSettings
    source: Source
    device: torch.device
    seeds: list[int]
    class_labels: list[int] | None
    record: SampleRecord


def read_request(settings: SampleSettings, place: World) -> SampleRequest:
    """Everything that can be wrong is found here, where nothing is written.

    Raises:
        SmaltiError: a setting is wrong, or does not fit the model.
    """
    check_folder(settings.out, "--out")
    where = resolve_device(settings.device)
    where = place.device(where)
    seeds = parse_seeds(settings.seeds)
    if len(set(seeds)) < len(seeds):
        (twice, _), *_ = Counter(seeds).most_common(1)
        raise ConfigError(f"seeds {settings.seeds!r}: {twice} is there twice; one image is made for each seed")
    for name, value in (("micro_batch", settings.micro_batch), ("chunk_size", settings.chunk_size),
                        ("threads", settings.threads)):  # fmt: skip
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if not settings.save:
        raise ConfigError("--save needs png, npz or both")
    if settings.classes and settings.label_rule == "balanced":
        raise ConfigError("--labels balanced takes every class: leave --classes out, or --labels")
    source = load_source(settings.model, where, codec=settings.codec, other_decoder=settings.other_decoder)
    require_images(source, settings.model)
    labels = read_classes(source, settings.classes, len(seeds), seeds, otherwise=settings.label_rule)
    weights, config = _model_digests(settings.model, source)
    if settings.inference != "none":
        source = source.for_inference(settings.inference, settings.precision)
    # Says now what is wrong with the sampling settings; nothing is drawn before the first image is asked for.
    sample(source, seeds, labels, settings.sampling, micro_batch=settings.micro_batch, device=where)
    identity = SampleIdentity(
        weights_sha256=weights,
        config_sha256=config,
        seeds=seeds_text(seeds),
        count=len(seeds),
        label_rule=_label_rule(settings, source, labels),
        sampling=settings.sampling,
        image_size=source.image_size,
        decoder=source.decoder,
        micro_batch=settings.micro_batch,
        chunk_size=settings.chunk_size or -(-CHUNK_SIZE // settings.micro_batch) * settings.micro_batch,
        precision=settings.precision,
        inference=source.model.mode if isinstance(source.model, InferenceForm) else "none",
        device=where.type,
        threads=settings.threads or torch.get_num_threads(),
        torch=str(torch.__version__),
        save=tuple(sorted(set(settings.save), reverse=True)),
    )
    facts = ModelFacts(
        path=str(settings.model),
        kind=source.config.kind,
        weights=source.weights,
        schedule=source.objective.schedule,
        learned_variance=source.config.learned_variance,
        steps=source.steps,
    )
    device_name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    record = SampleRecord(identity=identity, model=facts, device_name=device_name, smalti=smalti_version())
    chunks_of(settings, identity)
    return SampleRequest(settings, source, where, seeds, labels, record)


def _model_digests(path: Path, source: Source) -> tuple[str, str]:
    weights = next(folder / WEIGHTS for folder in (path / "model", path) if (folder / WEIGHTS).exists())
    described = {"network": to_dict(source.config), "objective": to_dict(source.objective)}
    config = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return filesystem.read_record(weights).sha256, config


def _label_rule(settings: SampleSettings, source: Source, labels: list[int] | None) -> LabelRule:
    total = source.config.num_classes
    if labels is None:
        return LabelRule(rule="none", num_classes=0)
    if settings.classes:
        given = tuple(labels[: len(settings.classes)])
        return LabelRule(rule="given", num_classes=total, classes=given, sha256=labels_sha256(labels))
    return LabelRule(rule=settings.label_rule, num_classes=total, sha256=labels_sha256(labels))


def chunks_of(settings: SampleSettings, identity: SampleIdentity) -> range:
    """What `settings.chunks` means for this set.

    Raises:
        ConfigError: not of that form, or no chunk of the set is in it.
    """
    return read_chunk_range(
        settings.chunks, chunks=identity.chunks, count=identity.count, chunk_size=identity.chunk_size
    )

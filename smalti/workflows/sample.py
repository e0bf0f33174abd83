"""`sample`: from a stored model to images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti import streams
from smalti.checkpoints import load_bundle
from smalti.config import did_you_mean, from_dict
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import CheckpointError, ConfigError
from smalti.latents import Codec, CodecFacts, PixelCodec, codec_of, load_codec
from smalti.models import BackboneConfig, InferenceForm, InferenceMode, config_of, inference_form
from smalti.models.files import Bundle
from smalti.presets import list_models
from smalti.sampling import SamplingConfig, sample_latents
from smalti.training.device import autocast_dtype

MOST_IMAGES = 10_000_000  # of one set: seeds and labels are held, and nobody means more


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Finished images in [-1, 1], with the label and the seed of each."""

    images: Float[Tensor, "B 3 H W"]
    class_labels: Int[Tensor, "B"] | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A trained network and what sampling must know about it.

    Attributes:
        weights: "ema" = moving averages, as `smalti train` stores them; of converted weights, which part was taken.
        steps: of its training, where known.
        codec: what turns the network's samples into images; None = unknown, and they are latents.
    """

    model: nn.Module
    objective: ObjectiveConfig
    class_names: tuple[str, ...]
    weights: str = "unknown"
    steps: int | None = None
    codec: Codec | None = field(default_factory=PixelCodec)

    @property
    def config(self) -> BackboneConfig:
        return config_of(self.model)

    @property
    def null_class(self) -> int | None:
        c = self.config
        return c.num_classes if c.num_classes and c.null_class else None

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns in pixels."""
        return self.config.sample_size if self.codec is None else self.codec.facts.image_size(self.config.sample_size)

    @property
    def decoder(self) -> str:
        """For protocols and records: `pixels`, `autoencoder-kl 3f2a91c0d4e5`."""
        return "unknown" if self.codec is None else self.codec.facts.label

    def for_inference(self, mode: InferenceMode = "eager", precision: str = "fp32") -> "Source":
        """The same with `smalti.models.inference_form` of its network, to be kept for all calls of `sample`.

        Args:
            precision: of the weights; what `sample` is told no longer matters.
        """
        return replace(
            self, model=inference_form(self.model, dtype=autocast_dtype(precision) or torch.float32, mode=mode)
        )


def load_source(path: Path, device: torch.device, *, codec: str = "", other_decoder: bool = False) -> Source:
    """A model folder, or a run folder with a finished model, and the codec that its latents belong to.

    Args:
        codec: where that lies now, as `load_codec` reads it; "" = where it lay when the model was trained.
        other_decoder: take another decoder of the same latents; see `codec_of`.

    Raises:
        CheckpointError: there is none, or it is damaged, or says nothing about its diffusion; or the codec is not
            there, or another one.
        ConfigError: the name of a preset was given, which has no weights; or a codec for a network that makes images.
    """
    if not path.exists() and list_models(str(path)):
        raise ConfigError(f"{path} is a preset, a network without weights; train it first, or give a model folder")
    bundle = load_bundle(path)
    if "objective" not in bundle.extra:
        raise CheckpointError(f"{path} does not say what its network predicts; it was not written by `smalti train`")
    objective = from_dict(ObjectiveConfig, bundle.extra["objective"], f"{path}: objective")
    names = tuple(bundle.extra.get("class_names", ()))
    trained, converted = bundle.extra.get("trained"), bundle.extra.get("converted_from")
    return Source(
        bundle.model.to(device),
        objective,
        names,
        "ema" if trained else converted["weights"] if converted else "unknown",
        trained["steps"] if trained else None,
        _open_codec(path, bundle, codec, other_decoder, device),
    )


def require_images(source: Source, name: str | Path) -> None:
    """Refuse a network whose samples nothing turns into images.

    Raises:
        ConfigError: it is one.
    """
    if source.codec is None:
        raise ConfigError(
            f"{name} makes latents of {source.config.in_channels} channels, not images: they need the decoder that it "
            "was trained with; name it with --codec (for released ImageNet models: stabilityai/sd-vae-ft-ema)"
        )


def _open_codec(path: Path, bundle: Bundle, given: str, other_decoder: bool, device: torch.device) -> Codec | None:
    channels = config_of(bundle.model).in_channels
    if "codec" in bundle.extra:
        facts = from_dict(CodecFacts, bundle.extra["codec"], f"{path}: codec")
    elif channels == CodecFacts().channels:
        facts = CodecFacts()
    elif not given:
        return None
    else:  # converted weights do not say whose latents they make
        found = load_codec(given, device=device)
        if found.facts.channels != channels:
            raise ConfigError(
                f"--codec {given} has latents of {found.facts.channels} channels, {path} makes {channels}; give the "
                "one that it was trained with"
            )
        return found
    return codec_of(facts, given or None, other_decoder=other_decoder, device=device)


def read_classes(
    source: Source,
    wanted: Sequence[str],
    count: int,
    seeds: Sequence[int],
    *,
    otherwise: Literal["random", "balanced"] = "random",
) -> list[int] | None:
    """One label per image: the wanted classes in turn, by number or name.

    Args:
        otherwise: when none is wanted: random = uniform and independent, drawn from each seed; balanced = every class
            in turn along the seeds, so that no class has two images more than another.

    Raises:
        ConfigError: a class that the model does not have.
    """
    total = source.config.num_classes
    if not total:
        if wanted:
            raise ConfigError("this model has no classes: leave --classes out")
        return None
    if not wanted and otherwise == "balanced":
        return [position % total for position in range(count)]
    if not wanted:
        return [streams.key(seed, streams.SAMPLE_LABEL) % total for seed in seeds]
    labels = [_read_class(name, source.class_names, total) for name in wanted]
    return [labels[i % len(labels)] for i in range(count)]


def _read_class(name: str, class_names: tuple[str, ...], total: int) -> int:
    if name in class_names:
        return class_names.index(name)
    try:
        label = int(name)
    except ValueError:
        hint = did_you_mean(name, class_names) if class_names else ""
        raise ConfigError(f"this model has no class {name!r}{hint}") from None
    if not 0 <= label < total:
        raise ConfigError(f"class {label} is out of range: this model has classes 0 to {total - 1}")
    return label


def sample(
    source: Source,
    seeds: Sequence[int],
    class_labels: Sequence[int] | None,
    config: SamplingConfig,
    *,
    micro_batch: int = 16,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    on_step: Callable[[int, int, Any], None] | None = None,
) -> Iterator[ImageBatch]:
    """Images of the given seeds, in order; image i depends on its seed, its class and the settings alone.

    Of a source without codec, what comes are its latents.
    """
    c = source.config
    batches = sample_latents(
        source.model,
        seeds,
        class_labels,
        sample_shape=(c.in_channels, *c.sample_size),
        schedule=build_schedule(source.objective.schedule, source.objective.num_train_timesteps),
        config=config,
        prediction=source.objective.prediction,
        learned_variance=c.learned_variance,
        null_class=source.null_class,
        micro_batch=micro_batch,
        device=device,
        autocast=None if isinstance(source.model, InferenceForm) else autocast_dtype(precision),
        on_step=on_step,
    )
    decode = (lambda latents: latents) if source.codec is None else source.codec.decode
    return (ImageBatch(decode(b.latents).cpu(), b.class_labels, b.seeds) for b in batches)


def parse_seeds(text: str) -> list[int]:
    """`0-49` or `3,7,20-29` as a list.

    Raises:
        ConfigError: not of that form, empty, or more than ten million.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise ConfigError(f"seeds {text!r}: expected numbers and ranges such as 0-49 or 3,7,20-29")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise ConfigError(f"seeds {text!r}: the range {part} runs backwards")
        if len(seeds) + stop - int(first) >= MOST_IMAGES:
            raise ConfigError(f"seeds {text!r}: at most {MOST_IMAGES:,} images make one set; draw several sets")
        seeds.extend(range(int(first), stop + 1))
    return seeds


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()

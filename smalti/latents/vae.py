"""The autoencoder of Stable Diffusion (`AutoencoderKL`) as a codec: weights in the layout of diffusers, read strictly.

The network is diffusers' own class. What is written here is what surrounds it: where the weights come from, that they
are exactly those that the config asks for, the scale and shift of each model, and batches of a fixed size, so that an
image's bits depend on the image alone.
"""

import contextlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import CheckpointError, ConfigError
from smalti.latents.codec import Codec, CodecFacts, PixelCodec, Posterior
from smalti.storage.precheck import check_safetensors
from smalti.storage.tensors import differences, read_tensors, shapes_of, tensors_digest

KIND, CLASS = "autoencoder-kl", "AutoencoderKL"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PIXELS = "pixels"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
_PIXELS_AT_ONCE = 1 << 18  # four images of 256 x 256: about 2 GiB in the widest layer of Stable Diffusion's network
_MOST_ROWS = 64
_MOST, _MOST_LEVELS = 1 << 12, 12  # layers and widths; a stranger's config must not build a network without end
# Names of the attention's layers in files older than diffusers 0.15, which most released ones are.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_PRECISIONS = (torch.float32, torch.bfloat16)


class AutoencoderCodec:
    """An `AutoencoderKL` behind the interface of all codecs, which takes no gradients and draws no random numbers.

    Args:
        network: diffusers' module.
        rows: images in each call of the network; the last call is filled up. None = by their size: 64 of 64 x 64
            pixels, 4 of 256 x 256, 1 of 512 x 512.
    """

    def __init__(self, network: nn.Module, facts: CodecFacts, *, rows: int | None = None) -> None:
        if rows is not None and rows < 1:
            raise ConfigError(f"the codec needs at least 1 image at a time, got {rows}")
        self._network, self._facts, self._rows = network, facts, rows
        parameter = next(network.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @property
    def facts(self) -> CodecFacts:
        return self._facts

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Posterior:
        """The scaled posterior, in float32.

        Raises:
            ConfigError: the images' size is no multiple of the factor.
        """
        rows, columns = images.shape[2:]
        self._facts.latent_shape((rows, columns))
        moments = self._in_batches(images, rows * columns, self._moments)
        mean, log_variance = moments.chunk(2, dim=1)
        # The bounds are those of diffusers' DiagonalGaussianDistribution.
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return Posterior((mean - self._facts.shift) * self._facts.scale, std * self._facts.scale)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Images, about [-1, 1], in float32."""
        rows, columns = self._facts.image_size((latents.shape[2], latents.shape[3]))
        unscaled = latents.float() / self._facts.scale + self._facts.shift
        return self._in_batches(unscaled, rows * columns, self._images)

    def _moments(self, images: Tensor) -> Tensor:
        parameters: Tensor = self._network.encode(images).latent_dist.parameters  # type: ignore[operator]
        return parameters

    def _images(self, latents: Tensor) -> Tensor:
        sample: Tensor = self._network.decode(latents).sample  # type: ignore[operator]
        return sample

    def _in_batches(self, inputs: Tensor, pixels: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """Kernels choose their order of summation by the batch's size: with one size, an image has one result."""
        rows = self._rows or rows_at_once(pixels)
        found = []
        for start in range(0, len(inputs), rows):
            part = inputs[start : start + rows].to(self._device, self._dtype)
            filled = torch.cat([part, part[-1:].expand(rows - len(part), *part.shape[1:])]).contiguous()
            found.append(apply(filled)[: len(part)].float())
        return torch.cat(found)


def rows_at_once(pixels: int) -> int:
    """Images of so many pixels each that the network takes in one call, unless told otherwise."""
    return min(max(1, _PIXELS_AT_ONCE // pixels), _MOST_ROWS)


def load_codec(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    rows: int | None = None,
) -> Codec:
    """The codec in a folder or in a repository of the Hugging Face hub.

    Args:
        source: a folder in diffusers' layout, a folder with such a one called `vae` in it, a repository `owner/name`
            of either form, or "pixels".
        dtype: of the network's weights and products, float32 or bfloat16; what comes out is float32.
        rows: see `AutoencoderCodec`.

    Raises:
        ConfigError: diffusers is not installed.
        CheckpointError: there is nothing there, or it is damaged, not finite, a pickle, or no such autoencoder.
    """
    if str(source) == PIXELS:
        return PixelCodec()
    if dtype not in _PRECISIONS:
        raise ConfigError(f"a codec computes in float32 or bfloat16, got {dtype}")
    theirs = network_class()
    folder = _find(source)
    config = _read_config(folder / CONFIG, theirs)
    weights = _read_weights(folder / WEIGHTS)
    network = _build(theirs, config, weights, folder)
    network.load_state_dict({name: t.to(device=device, dtype=dtype) for name, t in weights.items()}, assign=True)
    encoder = {name: t.half() for name, t in weights.items() if name.startswith(("encoder.", "quant_conv."))}
    facts = CodecFacts(
        kind=KIND,
        channels=network.config.latent_channels,
        factor=2 ** (len(network.config.block_out_channels) - 1),
        scale=float(network.config.scaling_factor),
        shift=float(network.config.shift_factor or 0.0),
        source=str(source),
        sha256=tensors_digest(weights),
        encoder_sha256=tensors_digest(encoder),
    )
    return AutoencoderCodec(network.eval().requires_grad_(False), facts, rows=rows)


def codec_of(
    facts: CodecFacts,
    override: str | Path | None = None,
    *,
    other_decoder: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Codec:
    """The codec that a model or latents belong to, opened again.

    Args:
        facts: what was recorded of it.
        override: where it lies now; None = where it lay then.
        other_decoder: accept other weights, if their encoder is the same: another decoder of the same latents, as the
            ft-MSE and ft-EMA ones of Stable Diffusion are.

    Raises:
        ConfigError: a codec was given for images, or diffusers is not installed.
        CheckpointError: it is not there, or it is another one.
    """
    if facts.kind == PIXELS:
        if override is not None and str(override) != PIXELS:
            raise ConfigError(f"codec {override}: these are images and not latents; leave the codec out")
        return PixelCodec()
    try:
        codec = load_codec(facts.source if override is None else override, device=device, dtype=dtype)
    except CheckpointError as error:
        if override is not None:
            raise
        raise CheckpointError(f"{error}; say where the codec ({facts.label}) lies now with --codec") from error
    if difference := _difference(facts, codec.facts, other_decoder):
        raise CheckpointError(f"{codec.facts.source or PIXELS} is not the codec that is needed: {difference}")
    return codec


def recorded(facts: CodecFacts) -> CodecFacts:
    """The same without what decides nothing: two codecs are one if these are equal."""
    return replace(facts, source="")


def decode_batches(
    codec: Codec, batches: Iterable[Float[Tensor, "_ C H W"]]
) -> Iterator[Float[Tensor, "_ 3 rows columns"]]:
    """Batches of latents as batches of images on the CPU, one at a time."""
    return (codec.decode(latents).cpu() for latents in batches)


def _difference(wanted: CodecFacts, found: CodecFacts, other_decoder: bool) -> str:
    """Why one may not stand for the other; "" if it may."""
    for name in ("kind", "channels", "factor", "scale", "shift"):
        if getattr(wanted, name) != getattr(found, name):
            return f"{name} {getattr(found, name)}, expected {getattr(wanted, name)}"
    if wanted.sha256 == found.sha256:
        return ""
    if not other_decoder:
        same = wanted.encoder_sha256 and wanted.encoder_sha256 == found.encoder_sha256
        advice = "; its encoder is the same: add --other-decoder if another decoder is meant" if same else ""
        return f"its weights are {found.sha256[:12]}, expected {wanted.sha256[:12]}{advice}"
    if wanted.encoder_sha256 != found.encoder_sha256:
        return "its encoder is another one as well, so its latents are others; no decoder can replace that"
    return ""


def network_class() -> Any:
    """diffusers' `AutoencoderKL`.

    Raises:
        ConfigError: diffusers is not installed, or not usable.
    """
    # TorchVision, which diffusers asks for, may be there and broken; then the import fails with something of its own.
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"latents need the autoencoder of diffusers ({error.name} is not installed): pip install 'smalti[vae]'"
        ) from error
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"diffusers is installed but cannot be imported: {' '.join(str(error).split())[:200]}; if it names "
            "torchvision, remove that or install the one for this torch"
        ) from error
    return AutoencoderKL


@dataclass(frozen=True)
class _Places:
    """Where a codec's two files may lie."""

    name: str

    def local(self) -> Path:
        folder = Path(self.name)
        if folder.is_file():
            raise CheckpointError(
                f"{folder} is a file; give the folder with {CONFIG} and {WEIGHTS}, the layout of diffusers. Pickles "
                "(.bin, .pt, .ckpt) are not read"
            )
        for place in (folder, folder / "vae"):
            if (place / WEIGHTS).is_file() and (place / CONFIG).is_file():
                return place
        for place in (folder, folder / "vae"):
            if pickles := [name for name in _PICKLES if (place / name).is_file()]:
                raise CheckpointError(
                    f"{place / pickles[0]} is a pickle, which can run any code when it is read: only safetensors are; "
                    f"get or make {WEIGHTS}"
                )
            if gone := [name for name in (CONFIG, WEIGHTS) if not (place / name).is_file()]:
                found = [name for name in (CONFIG, WEIGHTS) if name not in gone]
                if found:
                    raise CheckpointError(f"{place} has {found[0]} but no {gone[0]}; a codec needs both")
        raise CheckpointError(f"{folder} holds no codec: expected {CONFIG} and {WEIGHTS} in it or in its folder vae")

    def hub(self) -> Path:
        """The folder of the cache in which both files lie, of one commit."""
        config, below = self._fetch_config()
        # The cache's folders are called by commit, so the weights cannot come from a later one.
        commit = config.parents[1 if below else 0].name
        return self._fetch(below + WEIGHTS, commit).parent

    def _fetch_config(self) -> tuple[Path, str]:
        problems = []
        for below in ("", "vae/"):
            try:
                config = self._fetch(below + CONFIG, None)
            except CheckpointError as error:
                problems.append(error)
                continue
            if below or _class_of(config) == CLASS:
                return config, below
        if problems:
            raise problems[0]
        raise CheckpointError(f"{self.name} holds no {CLASS}, neither at its top nor in vae/")

    def _fetch(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, name, revision=revision, library_name="smalti"))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"there is no folder {self.name}, and no {name} of a repository of that name in the cache of the "
                "Hugging Face hub, which cannot be reached; give a folder, or try again with a network"
            ) from error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise CheckpointError(
                f"there is no folder {self.name}, and no {name} from the repository of that name ({reason})"
            ) from error


def _find(source: str | Path) -> Path:
    places = _Places(str(source))
    if Path(source).exists():
        return places.local()
    if not _REPOSITORY.fullmatch(str(source)):
        raise CheckpointError(f"{source} is neither a folder nor a repository owner/name on the Hugging Face hub")
    return places.hub()


def _class_of(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        name: str | None = json.loads(path.read_bytes()).get("_class_name")
        return name
    return None


def _read_config(path: Path, theirs: Any) -> dict[str, Any]:
    """The settings of the network, none of them unknown to the class."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("_class_name") != CLASS:
        found = config.get("_class_name", config.get("format")) if isinstance(config, dict) else None
        raise CheckpointError(f"{path} describes {found or 'something'!r}, expected diffusers' {CLASS}")
    known = list(inspect.signature(theirs.__init__).parameters)[1:]
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in settings:
        if name not in known:
            raise CheckpointError(f"{path}: this diffusers' {CLASS} has no setting {name!r}{did_you_mean(name, known)}")
    for name in ("latents_mean", "latents_std"):
        if settings.get(name) is not None:
            raise CheckpointError(f"{path} has {name}: codecs that are scaled channel by channel are not supported")
    for name in ("in_channels", "out_channels"):
        if settings.get(name, 3) != 3:
            raise CheckpointError(f"{path}: {name} is {settings[name]}; images have 3 channels")
    for name, least in (("scaling_factor", 0.0), ("shift_factor", -math.inf)):
        value = settings.get(name)
        if value is not None and not (type(value) in (int, float) and least < value < math.inf):
            raise CheckpointError(
                f"{path}: {name} is {value!r}, expected a finite number{' above 0' if not least else ''}"
            )
    widths = settings.get("block_out_channels", (64,))
    listed = isinstance(widths, list | tuple) and len(widths) <= _MOST_LEVELS
    sizes = [settings.get("layers_per_block", 1), settings.get("latent_channels", 4), *(widths if listed else [0])]
    if not all(type(size) is int and 1 <= size <= _MOST for size in sizes):
        raise CheckpointError(
            f"{path}: layers_per_block, latent_channels and block_out_channels are whole numbers from 1 to {_MOST}, "
            f"the last a list of at most {_MOST_LEVELS}"
        )
    return settings


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, under the names that the class has today."""
    check_safetensors(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(path).items():
        old = _OLD.fullmatch(name)
        tensors[f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}" if old else name] = tensor
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} has values that are not finite numbers; get the file again")
    return tensors


def _build(theirs: Any, config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> Any:
    """The network without memory, checked to be the one of these weights."""
    try:
        with torch.device("meta"):
            network = theirs(**config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} describes no network that diffusers can build: {' '.join(str(error).split())[:200]}"
        ) from error
    if table := differences(shapes_of(network.state_dict()), shapes_of(weights)):
        lines = "; ".join(" ".join(line.split()) for line in table.splitlines()[:4])
        raise CheckpointError(f"{folder / WEIGHTS} holds another network than its {CONFIG} says: {lines}")
    return network

"""DINOv2 through the package `transformers`: the features of FD-DINOv2.

Source: Stein et al. 2023, arXiv:2306.04675, who found them closer to human judgement than Inception's: the class token
of ViT-L/14 after its last norm, of images resized to 224 pixels (bicubic, antialiased, in floating point) and scaled by
ImageNet's mean and deviation. The network is Oquab et al. 2023, arXiv:2304.07193. Theirs is run from its authors' code;
this one is `transformers`', which stretches the table of positions from 518 to 224 pixels a little differently.
"""

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import CheckpointError, ConfigError
from smalti.evaluation.networks.module import ModuleNetwork
from smalti.storage.precheck import check_safetensors
from smalti.storage.tensors import read_tensors, tensors_digest

DEFAULT = "facebook/dinov2-large"
SIZE = 224
# Of the training images of ImageNet, in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_MAX_CONFIG = 1 << 20  # bytes
_ADVICE = f"give dinov2:FOLDER with {_CONFIG} and {_WEIGHTS} as transformers stores them"


class ClassToken(nn.Module):
    """The first token of what a vision transformer of `transformers` puts out, its last norm included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.model(pixel_values=images).last_hidden_state[:, 0]


def build_dinov2(rest: str, device: str) -> ModuleNetwork:
    """`dinov2`, which is facebook/dinov2-large, or `dinov2:FOLDER` or `dinov2:OWNER/NAME` on the Hugging Face hub.

    Nothing but these two files is fetched, and no code that comes with them is run.

    Raises:
        ConfigError: what follows the name is neither, or transformers is not installed.
        CheckpointError: there is no such folder or repository, or it holds something else.
    """
    if rest and (not rest.startswith(":") or len(rest) == 1):
        raise ConfigError(f"dinov2{rest}: give dinov2, dinov2:FOLDER or dinov2:OWNER/NAME")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"dinov2 needs the package transformers ({error}): pip install 'smalti[dinov2]'") from error
    folder = _folder(rest[1:] or DEFAULT)
    _check(folder)
    with _quiet(transformers):
        try:
            loaded: Any = transformers.Dinov2Model.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder}: transformers cannot load it: {_one_line(error)}") from error
    model, report = loaded
    # transformers fills what is missing with random numbers, and features of those are features of nothing.
    if wrong := {what: sorted(map(str, names)) for what, names in report.items() if names}:
        said = "; ".join(f"{what.replace('_', ' ')} {', '.join(names[:3])}" for what, names in wrong.items())
        raise CheckpointError(f"{folder} does not hold the DINOv2 of its {_CONFIG}: {said}")
    # Of the file, because the names in the model change with the version of transformers.
    weights = tensors_digest(read_tensors(folder / _WEIGHTS))
    return ModuleNetwork(ClassToken(model), "dinov2", size=SIZE, mean=MEAN, std=STD, device=device, weights=weights)


def _folder(place: str) -> Path:
    """The folder itself, or a copy of the hub's."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    owner, slash, name = place.partition("/")
    if folder.exists() or not slash or not name or "/" in name or owner in ("", ".", "..", "~"):
        raise CheckpointError(f"there is no folder {place}, and no repository can have this name; {_ADVICE}")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        kept = [try_to_load_from_cache(place, file) for file in (_CONFIG, _WEIGHTS)]
        if all(isinstance(path, str) for path in kept):
            return Path(str(kept[0])).parent
        paths = [Path(hf_hub_download(place, file, library_name="smalti")) for file in (_CONFIG, _WEIGHTS)]
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # OSError: offline, and all of httpx's besides
        raise CheckpointError(
            f"there is no folder {place}, and the repository of that name could not be fetched "
            f"({_one_line(error)}); {_ADVICE}"
        ) from error
    return paths[0].parent


def _check(folder: Path) -> None:
    """A DINOv2 by its config, with weights that are plain tensors."""
    path = folder / _CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, which no config has")
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {_CONFIG}; {_ADVICE}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_one_line(error)}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "dinov2":
        raise CheckpointError(f"{path} describes a model of type {kind!r}, not dinov2; {_ADVICE}")
    if not (folder / _WEIGHTS).exists():
        raise CheckpointError(f"{folder} has no {_WEIGHTS}: only safetensors in one file are read; {_ADVICE}")
    check_safetensors(folder / _WEIGHTS)


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """No bar and no remarks while weights are read; what matters of them is in the report of the loading."""
    log = library.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 240, placeholder=' ...')}"

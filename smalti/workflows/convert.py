"""`convert`: released weights, diffusers folders and our own model folders, each into the other's form.

Every input but our own is a stranger's; see `smalti.checkpoints.foreign`. Nothing is written before everything fits,
and then all of it or nothing.
"""

import contextlib
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from smalti.checkpoints import MAPS, from_official, load_bundle, official_shapes, to_official
from smalti.checkpoints import diffusers as theirs
from smalti.checkpoints.foreign import ForeignWeights, Part, read_foreign
from smalti.checkpoints.maps import Source
from smalti.config import did_you_mean, to_dict
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import CheckpointError, ConfigError
from smalti.models import BackboneConfig, config_of
from smalti.models.pretrained import Pretrained
from smalti.presets import PRESETS, find_preset, preset_config
from smalti.storage.filesystem import LocalFileSystem, remove_tree, require_space, storage_errors, write_file
from smalti.storage.tensors import differences, file_pieces, file_size, shapes_of

Form = Literal["smalti", "official", "diffusers"]

_SMALTI, _DIFFUSERS = "smalti", theirs.NAME
_WRAPPERS = ("module.", "_orig_mod.")
_DEFAULTS: Mapping[str, Any] = {"preset": None, "settings": {}, "weights": "auto"}
_SHIFT = "for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert into what.

    Args:
        source: what `file` is: a repository of MAPS, "diffusers", or "smalti".
        out: a folder, or for `to="official"` a file; None = named after the input, in the working directory.
        preset: gives the released hyper-parameters; None = those that the file names, or the preset it fits.
        settings: released hyper-parameters by their released names, over those of the preset.
        weights: which weights of a training checkpoint; auto = the moving average if there is one.
    """

    source: str
    file: Path
    out: Path | None = None
    to: Form = "smalti"
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Part = "auto"


@dataclass(frozen=True)
class Converted:
    """What was done, in words, and where the result is."""

    out: Path
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Input:
    model: nn.Module
    extra: Mapping[str, Any]
    said: str
    notes: tuple[str, ...] = ()


def convert(conversion: Conversion) -> Converted:
    """Read, check, write.

    Raises:
        ConfigError: an unknown source, preset or setting, an `out` that is taken, or a network that the wanted form
            cannot express.
        CheckpointError: the file is damaged, unsafe, or of another network than asked for; a table says what differs.
    """
    c = replace(conversion, source=_source(conversion.source))
    if c.source == c.to:
        raise ConfigError(f"{c.file} is said to be {c.source}'s already: nothing to convert")
    if c.source in (_SMALTI, _DIFFUSERS):
        allowed = {"timestep_frequencies"} if c.source == _DIFFUSERS else set()
        wrong = [name for name in ("preset", "weights") if getattr(c, name) != _DEFAULTS[name]]
        wrong += [f"set {name}" for name in c.settings if name not in allowed]
        if wrong:
            raise ConfigError(f"--{wrong[0]} has no meaning for {c.source}, whose {theirs.CONFIG} says it all")
    stem = c.file.resolve().name.removesuffix(c.file.suffix) if c.file.is_file() else c.file.resolve().name
    default = f"{stem}-official.safetensors" if c.to == "official" else f"{stem}-{c.to}"
    out = Path(default) if c.out is None else c.out
    if c.to == "official" and out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: released names are written as one .safetensors file; nothing here is a pickle")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; give another name or remove it")
    found = _read(c)
    lines = (found.said, *_WRITERS[c.to](found, out))
    return Converted(out, (*lines, *(f"note: {note}" for note in found.notes)))


def _source(name: str) -> str:
    """A source by its name, or by the part behind its owner's."""
    known = (*MAPS, _DIFFUSERS, _SMALTI)
    hits = [k for k in known if name.lower() in (k.lower(), k.rpartition("/")[2].lower())]
    if len(hits) != 1:
        raise ConfigError(f"{name!r} is nothing that can be converted{did_you_mean(name, known)}")
    return hits[0]


# --- reading


def _read(c: Conversion) -> _Input:
    if c.source == _SMALTI:
        bundle = load_bundle(c.file)
        return _Input(bundle.model, bundle.extra, f"read {c.file}: {_size(bundle.model)}")
    if c.source == _DIFFUSERS:
        frequencies = c.settings.get("timestep_frequencies")
        if frequencies not in (None, "half_open", "closed"):
            raise ConfigError(f"--set timestep_frequencies={frequencies}: expected half_open or closed")
        got = theirs.from_diffusers(c.file, timestep_frequencies=frequencies)
        return _Input(got.model, _provenance(c, "plain"), f"read {c.file}: {_size(got.model)}", got.notes)
    weights = _unwrapped(read_foreign(c.file, c.weights))
    values, where = _hyperparameters(MAPS[c.source], weights, c)
    try:
        model = from_official(c.source, weights.tensors, **values)
    except CheckpointError as error:
        raise CheckpointError(f"{c.file}, with settings from {where}: {error}") from error
    part = "its weights" if weights.part == "plain" else f"its {weights.part!r} weights"
    said = f"read {c.file}: {part} ({len(weights.tensors)} tensors) as {_size(model)}; settings from {where}"
    return _Input(model, _provenance(c, weights.part), said)


def _provenance(c: Conversion, part: str) -> dict[str, Any]:
    """What `smalti sample` must know, and where the weights came from. The released networks predict eps."""
    source = {"source": c.source, "file": c.file.name, "weights": part}
    return {"objective": to_dict(ObjectiveConfig()), "converted_from": source}


def _unwrapped(weights: ForeignWeights) -> ForeignWeights:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in weights.tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in weights.tensors.items()}
            return _unwrapped(replace(weights, tensors=tensors))
    return weights


def _hyperparameters(origin: Source, weights: ForeignWeights, c: Conversion) -> tuple[dict[str, Any], str]:
    """Released hyper-parameters, and where they come from: the user, the file's own settings, or its shapes."""
    for name in c.settings:
        if name not in origin.hyperparameters:
            raise ConfigError(f"--set {name}: {origin.name} has none{did_you_mean(name, origin.hyperparameters)}")
    own = f" and --set {', '.join(c.settings)}" if c.settings else ""
    if c.preset is not None:
        preset = find_preset(c.preset)
        return _released(origin, preset.config) | dict(c.settings), f"preset {preset.name}{own}"
    if all(name in c.settings or name in origin.defaults for name in origin.hyperparameters) and c.settings:
        return dict(c.settings), f"--set {', '.join(c.settings)}"
    if (config := _from_script(weights.settings, origin)) is not None:
        return _released(origin, config) | dict(c.settings), f"the file ({weights.settings['model']}){own}"
    name = _fitting(origin, weights.tensors, c)
    return _released(origin, PRESETS[name].config) | dict(c.settings), f"preset {name}, whose shapes these are{own}"


def _released(origin: Source, config: BackboneConfig) -> dict[str, Any]:
    if config.kind != origin.kind:
        raise ConfigError(f"{origin.name} has {origin.kind} networks, the preset asked for is a {config.kind}")
    if origin.released is None:
        raise ConfigError(f"{origin.name}: give the hyper-parameters with --set {', '.join(origin.hyperparameters)}")
    return dict(origin.released(config))


def _from_script(settings: Mapping[str, Any], origin: Source) -> BackboneConfig | None:
    """The network that a released training script was told to build; None if its settings do not say."""
    model, size, classes = (settings.get(name) for name in ("model", "image_size", "num_classes"))
    if not isinstance(model, str):
        return None
    names = [p.name for p in PRESETS.values() if p.config.kind == origin.kind and model in (p.name, p.title)]
    if len(names) != 1:
        return None
    config = PRESETS[names[0]].config
    changes: dict[str, Any] = {}
    if type(size) is int:
        changes["sample_size"] = size // 8 if config.in_channels == 4 else size  # latents are an eighth of the image
    if type(classes) is int and config.num_classes:
        changes["num_classes"] = classes
    return preset_config(names[0], **changes)


def _fitting(origin: Source, tensors: Mapping[str, Tensor], c: Conversion) -> str:
    """The one preset with exactly these names and shapes; else a table of what keeps the nearest one from it."""
    found = shapes_of(tensors)
    tables: dict[str, str] = {}
    for preset in PRESETS.values():
        if preset.config.kind != origin.kind:
            continue
        with contextlib.suppress(ConfigError):  # networks that were never released
            values = _released(origin, preset.config) | dict(c.settings)
            tables[preset.name] = differences(official_shapes(origin.name, **values), found)
    fitting = [name for name, table in tables.items() if not table]
    if len(fitting) == 1:
        return fitting[0]
    advice = f"say which with --preset, or give --set {' '.join(f'{name}=...' for name in origin.hyperparameters)}"
    if fitting:
        raise ConfigError(f"{c.file} has the shapes of {', '.join(fitting)}: {advice}")
    if not tables:
        raise ConfigError(f"{c.file}: no preset of {origin.name} is known; {advice}")
    nearest = min(tables, key=lambda name: sum(map(int, _numbers(tables[name]))))
    raise CheckpointError(
        f"{c.file} has the shapes of no preset of {origin.name}; {advice}; beside {nearest}, {tables[nearest]}"
    )


def _numbers(table: str) -> list[str]:
    return [word for word in table.splitlines()[0].split() if word.isdigit()]


# --- writing


def _write_smalti(found: _Input, out: Path) -> tuple[str, ...]:
    model = found.model
    assert isinstance(model, Pretrained)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder, extra=found.extra)

    _write_folder(out, found, fill)
    return (f"wrote {out}: model.safetensors ({_weight(model)}), config.json, README.md",)


def _write_diffusers(found: _Input, out: Path) -> tuple[str, ...]:
    config, tensors = theirs.to_diffusers(found.model)
    text = (json.dumps(config, indent=2) + "\n").encode()

    def fill(folder: Path) -> None:
        fs = LocalFileSystem()
        fs.make_folder(folder)
        write_file(fs, folder / theirs.WEIGHTS, file_pieces(tensors))
        write_file(fs, folder / theirs.CONFIG, [text])
        fs.sync_folder(folder)

    _write_folder(out, found, fill)
    lines = [f"wrote {out}: {theirs.WEIGHTS} ({_weight(found.model)}), {theirs.CONFIG} of {theirs.CLASS}"]
    if config["_smalti_timestep_frequencies"] == "half_open":
        lines.append(
            f"note: diffusers spaces timestep frequencies otherwise; for the same outputs, after loading: {_SHIFT}"
        )
    return tuple(lines)


def _write_official(found: _Input, out: Path) -> tuple[str, ...]:
    tensors = to_official(found.model)
    config = config_of(found.model)
    (origin,) = (source for source in MAPS.values() if source.kind == config.kind)
    built = ", ".join(f"{k}={v!r}" for k, v in origin.released(config).items()) if origin.released else ""
    fs, hidden = LocalFileSystem(), _hidden(out)
    with _storage(out, found):
        write_file(fs, hidden, file_pieces(tensors))
        fs.rename(hidden, out)
        fs.sync_folder(out.resolve().parent)
    line = f"wrote {out}: {len(tensors)} tensors ({_weight(found.model)}) under the names of {origin.name}"
    return (f"{line}, for {built}" if built else line,)


_WRITERS: dict[Form, Callable[[_Input, Path], tuple[str, ...]]] = {
    "smalti": _write_smalti,
    "diffusers": _write_diffusers,
    "official": _write_official,
}


def _write_folder(out: Path, found: _Input, fill: Callable[[Path], None]) -> None:
    """Make a folder that is there whole or not at all."""
    fs, hidden = LocalFileSystem(), _hidden(out)
    with _storage(out, found):
        try:
            fill(hidden)
            if out.exists():
                fs.remove_folder(out)  # it was empty when we began
            fs.rename(hidden, out)
        except BaseException:
            remove_tree(fs, hidden)
            raise
        fs.sync_folder(out.resolve().parent)


@contextlib.contextmanager
def _storage(out: Path, found: _Input) -> Iterator[None]:
    fs, needed = LocalFileSystem(), file_size(found.model.state_dict()) + 65536
    parent = out.resolve().parent
    with storage_errors(fs, parent, needed, "converting", "Nothing was written"):
        parent.mkdir(parents=True, exist_ok=True)
        require_space(fs, parent, needed, "the result")
        yield


def _hidden(out: Path) -> Path:
    return out.resolve().parent / f".{out.name}.tmp-{secrets.token_hex(4)}"


def _size(model: nn.Module) -> str:
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters"


def _weight(model: nn.Module) -> str:
    tensors: list[Tensor] = list(model.state_dict().values())
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    return f"{math.fsum(t.nbytes for t in tensors) / 1e6:,.1f} MB, {kinds}"

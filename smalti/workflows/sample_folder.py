"""Whose folder it is: one folder holds one set of samples, and `sample.json` says which."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from smalti.errors import CheckpointError, ConfigError
from smalti.sampling.record import (
    RECORD,
    SampleIdentity,
    SampleRecord,
    first_difference,
    read_record,
    record_bytes,
)
from smalti.storage.chunks import ChunkStore, Claims
from smalti.storage.filesystem import FileSystem, make_folders, require_space, storage_errors
from smalti.storage.replacing import replace_file
from smalti.workflows.sample import parse_seeds
from smalti.workflows.sample_request import SampleSettings

NPZ, GRID, YAML = "samples.npz", "grid.png", "sample.yaml"


def settle(settings: SampleSettings, wanted: SampleRecord, fs: FileSystem) -> SampleRecord:
    """The record of the folder, written by whoever comes first; what the user left open is as that one decided.

    Raises:
        ConfigError: it holds another set, or files that no record tells of. CheckpointError: the record is damaged.
        StorageError: there is no room, or the folder cannot be written to.
    """
    out = settings.out
    with storage_errors(fs, out, 4096, "preparing the folder", "Choose another --out"):
        make_folders(fs, out)
        with Claims(out).hold("record"):
            stored = _stored_record(settings)
            if stored is not None:
                refusal = _refusal(settings, stored, wanted.identity)
                if not refusal:
                    return stored
                if not settings.overwrite:
                    raise ConfigError(refusal)
                _remove_set(out, stored.identity, fs)
            elif not settings.overwrite and (foreign := [n for n in _names(wanted.identity) if (out / n).exists()]):
                raise ConfigError(
                    f"{out} has {foreign[0]}, but no {RECORD} that says what it is; choose another --out, or "
                    "--overwrite it"
                )
            elif not settings.overwrite and (others := _others(out)):
                raise ConfigError(
                    f"{out} has files of something else, such as {others[0]}; choose another --out, or add --overwrite "
                    "to draw into it all the same"
                )
            require_space(fs, out, _bytes_needed(wanted.identity), f"a set of {wanted.identity.count:,} samples")
            open_store(wanted.identity, out, fs).open()
            replace_file(fs, out / RECORD, [record_bytes(wanted)])
    return wanted


def _stored_record(settings: SampleSettings) -> SampleRecord | None:
    if not (settings.out / RECORD).exists():
        return None
    try:
        return read_record(settings.out)
    except CheckpointError as error:
        if settings.overwrite:
            return None
        raise CheckpointError(f"{error}; choose another --out, or --overwrite it") from error


def _refusal(settings: SampleSettings, stored: SampleRecord, wanted: SampleIdentity) -> str:
    """Why this set cannot be continued here; "" when it can."""
    there = stored.identity
    wanted = replace(
        wanted,
        threads=settings.threads or there.threads,
        chunk_size=settings.chunk_size or there.chunk_size,
    )
    if difference := first_difference(there, wanted):
        return f"{settings.out} holds another set of samples ({difference}); choose another --out, or --overwrite it"
    if stored.complete and (lost := _lost_output(settings.out, stored)):
        return f"{settings.out} was complete, but {lost} is gone or changed; --overwrite makes the set again"
    return ""


def _lost_output(out: Path, record: SampleRecord) -> str:
    for output in record.outputs:
        if output.name == NPZ and (not (out / NPZ).exists() or (out / NPZ).stat().st_size != output.bytes):
            return NPZ
    return next((name for name in png_names(record.identity) if not (out / name).exists()), "")


def _others(out: Path) -> list[str]:
    """What people see in a folder that no set of samples was drawn into."""
    return sorted(name for name in os.listdir(out) if not name.startswith("."))


def _remove_set(out: Path, identity: SampleIdentity, fs: FileSystem) -> None:
    """The record goes last: until then, the same command finds what is left to remove."""
    store = open_store(identity, out, fs)
    if store.in_use():
        raise ConfigError(f"another process is drawing samples into {out}; wait until it ends, stop it, or choose "
                          "another --out")  # fmt: skip
    for name in _names(identity):
        with contextlib.suppress(FileNotFoundError):
            fs.remove_file(out / name)
    store.clear()
    fs.remove_file(out / RECORD)


def open_store(identity: SampleIdentity, out: Path, fs: FileSystem) -> ChunkStore:
    """The chunks of a set."""
    # The digest in the name keeps a process of a set that was overwritten from mixing its chunks with these.
    digest = identity.digest
    return ChunkStore(out / f".chunks-{digest[:12]}", identity.chunks, digest, fs=fs)


def _bytes_needed(identity: SampleIdentity) -> int:
    """Chunks, and every output at most as large as the pixels."""
    rows, columns = identity.image_size
    return identity.count * rows * columns * 3 * (1 + len(identity.save)) + (1 << 16)


def png_names(identity: SampleIdentity) -> list[str]:
    """One for each seed, where PNGs are asked for."""
    return [png_name(seed) for seed in parse_seeds(identity.seeds)] if "png" in identity.save else []


def png_name(seed: int) -> str:
    """Seeds as people sort them."""
    return f"{seed:06d}.png"


def _names(identity: SampleIdentity) -> list[str]:
    """Every file of a finished set but its record."""
    return [*png_names(identity), *([NPZ] if "npz" in identity.save else []), GRID, YAML]

"""Features of reference images, kept on disk: a reference is measured against many times and never changes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from smalti.errors import CheckpointError, StorageError
from smalti.evaluation.features import FeatureSet, NetworkIdentity
from smalti.storage.filesystem import FileRecord, LocalFileSystem, make_folders, read_record, write_file
from smalti.storage.sealed import seal, unseal
from smalti.storage.tensors import file_pieces, file_size, read_tensors

LIMIT_BYTES = 1 << 30  # larger sets are measured anew rather than fill a home directory


def cached_features(
    folder: Path,
    images_fingerprint: str,
    identity: NetworkIdentity,
    kinds: Sequence[str],
    make: Callable[[], FeatureSet],
    note: Callable[[str], None],
) -> FeatureSet:
    """The features as they were kept, or made now and kept for the next time.

    Args:
        images_fingerprint: of the images and their order.
        make: computes them.
        note: told in one line what was kept, or why not; a cache that fails never stops an evaluation.
    """
    wanted = [images_fingerprint, asdict(identity), sorted(kinds)]
    stem = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]
    data, seal_file = folder / f"{stem}.safetensors", folder / f"{stem}.json"
    try:
        if seal_file.exists():
            record = FileRecord(**unseal(seal_file.read_bytes(), str(seal_file))["file"])
            if read_record(data) == record:
                return FeatureSet(read_tensors(data))
            note(f"{data} was changed after it was written; its features are made anew")
    except (OSError, CheckpointError, KeyError, TypeError) as error:
        note(f"kept features cannot be used ({error}); they are made anew")
    found = make()
    if file_size(found.features) > LIMIT_BYTES:
        note(f"features of more than {LIMIT_BYTES >> 30} GiB are not kept; --save-statistics keeps what FID needs")
        return found
    try:
        _keep(found, data, seal_file)
        note(f"features of the reference are kept in {data}")
    except (OSError, StorageError) as error:
        note(f"features of the reference could not be kept in {folder}: {error}")
    return found


def _keep(found: FeatureSet, data: Path, seal_file: Path) -> None:
    fs = LocalFileSystem()
    make_folders(fs, data.parent)
    mine = f".{os.getpid()}.tmp"
    temporary = [path.with_name(path.name + mine) for path in (data, seal_file)]
    try:
        record = write_file(fs, temporary[0], file_pieces(found.features))
        document = seal({"format": "smalti-features", "version": 1, "file": record._asdict()})
        write_file(fs, temporary[1], [document])
        # The seal last: it is what says that the other one is whole.
        fs.rename(temporary[0], data)
        fs.rename(temporary[1], seal_file)
    finally:
        for path in temporary:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

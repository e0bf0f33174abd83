"""Features of reference images, kept on disk: a reference is measured against many times and never changes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smalti.errors import CheckpointError
from smalti.evaluation.features import FeatureSet, NetworkIdentity
from smalti.storage.filesystem import FileRecord, LocalFileSystem, make_folders, read_record
from smalti.storage.replacing import replace_file
from smalti.storage.sealed import check_format, seal, smalti_version, unseal
from smalti.storage.tensors import file_pieces, file_size, read_tensors

_FORMAT, _VERSION = "smalti-features", 1
LIMIT_BYTES = 1 << 30  # larger sets are measured anew rather than fill a home directory


@dataclass(frozen=True)
class FeatureCache:
    """Feature sets in a folder. A cache that fails never stops an evaluation: it says so in a note.

    Args:
        note: told in one line what was kept, or what could not be used.
    """

    folder: Path
    note: Callable[[str], None]

    def load(self, images: str, identity: NetworkIdentity, kinds: Sequence[str]) -> FeatureSet | None:
        """What was kept for these images and this network, or None.

        Args:
            images: fingerprint of the images and their order.
        """
        data, seal_file = self._paths(images, identity, kinds)
        try:
            if not seal_file.exists():
                return None
            document = unseal(seal_file.read_bytes(), str(seal_file))
            check_format(document, _FORMAT, _VERSION, str(seal_file))
            record = FileRecord(**document["file"])
            if read_record(data) == record:
                return FeatureSet(read_tensors(data))
            self.note(f"{data} was changed after it was written; its features are made anew")
        except (OSError, CheckpointError, KeyError, TypeError) as error:
            self.note(f"kept features cannot be used ({error}); they are made anew")
        return None

    def keep(self, images: str, identity: NetworkIdentity, kinds: Sequence[str], found: FeatureSet) -> None:
        """Write them down for the next time, whole or not at all."""
        if file_size(found.features) > LIMIT_BYTES:
            self.note(f"features of more than {LIMIT_BYTES >> 30} GiB are not kept for the next time")
            return
        data, seal_file = self._paths(images, identity, kinds)
        fs = LocalFileSystem()
        try:
            make_folders(fs, self.folder)
            record = replace_file(fs, data, file_pieces(found.features))
            # The seal last: it is what says that the other one is whole.
            head = {"format": _FORMAT, "version": _VERSION, "smalti": smalti_version()}
            replace_file(fs, seal_file, [seal(head | {"file": record._asdict()})])
            self.note(f"features are kept in {data}")
        except OSError as error:
            self.note(f"features could not be kept in {self.folder}: {error}")

    def _paths(self, images: str, identity: NetworkIdentity, kinds: Sequence[str]) -> tuple[Path, Path]:
        wanted = [images, asdict(identity), sorted(kinds)]
        stem = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"

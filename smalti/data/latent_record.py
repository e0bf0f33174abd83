"""The files of a latent set: what `smalti encode` writes, and what is known of it before any example is read.

A latent set is a folder with
- `latents.json`, sealed: codec, image size, classes, where the images came from, and size and hash of every file;
- `chunk-00000000.safetensors` and so on: one tensor `moments`, float16 (rows, views, 2, C, H, W), the mean and the
  standard deviation of each posterior in the scale that networks are trained on. A second view is the mirrored image,
  encoded by itself. Rows have one size, so example i lies at a place that arithmetic finds;
- `index.safetensors`: labels, names, and a checksum of each posterior, which every read is compared with.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smalti.config import from_dict, to_dict
from smalti.data.image_set import Catalogue
from smalti.data.index_file import PackedNames
from smalti.errors import CheckpointError, ConfigError
from smalti.latents import CodecFacts
from smalti.storage.objects import ByteStore
from smalti.storage.sealed import check_format, seal, smalti_version, unseal

FORMAT, VERSION = "smalti-latents", 1
RECORD, INDEX, MOMENTS = "latents.json", "index.safetensors", "moments"

Flips = Literal["none", "stored"]


@dataclass(frozen=True, kw_only=True)
class LatentIdentity:
    """Everything that decides the bytes of a latent set.

    Attributes:
        source: what the images were read from, as `smalti encode` was told.
        source_count: images in that image set.
        source_fingerprint: of the whole of it, at that image size.
        count: how many of them were encoded, from the first on.
        flips: whether each mirrored image was encoded as well.
        chunk_rows: examples in each chunk but the last.
        batch: images in each call of the codec's network.
        precision: of that network: fp32, bf16.
        device: its type.
    """

    codec: CodecFacts
    source: str
    source_count: int
    image_size: tuple[int, int]
    source_fingerprint: str  # behind what it is made of: the first difference is told, and should say something
    count: int
    flips: Flips
    chunk_rows: int
    batch: int
    precision: str
    device: str
    threads: int
    torch: str

    @property
    def digest(self) -> str:
        """One number for all that decides a bit: not where codec and images lay."""
        plain = replace(self, source="", codec=replace(self.codec, source=""))
        return hashlib.sha256(json.dumps(to_dict(plain), sort_keys=True).encode()).hexdigest()

    @property
    def views(self) -> int:
        """Posteriors stored for each image."""
        return 2 if self.flips == "stored" else 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns."""
        return self.codec.latent_shape(self.image_size)

    @property
    def view_bytes(self) -> int:
        """Mean and standard deviation in float16."""
        channels, rows, columns = self.latent_shape
        return 2 * channels * rows * columns * 2

    @property
    def row_bytes(self) -> int:
        """Of one example."""
        return self.views * self.view_bytes

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.count // self.chunk_rows)

    def rows(self, chunk: int) -> range:
        """The examples of a chunk."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.count))


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a latent set.

    Attributes:
        offset: where its rows begin; 0 for the index.
    """

    bytes: int
    sha256: str
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """What a latent set is and, once it is whole, its files."""

    identity: LatentIdentity
    class_names: tuple[str, ...]
    smalti: str
    index: StoredFile | None = None
    chunks: tuple[StoredFile, ...] = ()

    @property
    def complete(self) -> bool:
        return self.index is not None

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the contents of all files."""
        assert self.index is not None
        parts = [list(self.class_names), self.index.sha256, *(chunk.sha256 for chunk in self.chunks)]
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


def record_bytes(record: LatentRecord) -> bytes:
    """The content of `latents.json`."""
    return seal({"format": FORMAT, "version": VERSION, "smalti": smalti_version(), "record": to_dict(record)})


def read_record(store: ByteStore) -> LatentRecord:
    """The record of a folder of latents, whole or not.

    Raises:
        MissingObjectError: there is none. StorageError: the store cannot be reached.
        CheckpointError: it is damaged or of a newer format.
    """
    where = f"{store.place}/{RECORD}"
    document = unseal(store.read(RECORD), where)
    check_format(document, FORMAT, VERSION, where)
    try:
        record = from_dict(LatentRecord, document.get("record"), where)
        impossible = _impossible(record)
    except ConfigError as error:
        raise CheckpointError(f"{error}; it was written by another smalti than this one") from error
    if impossible:
        raise CheckpointError(f"{where} describes latents that cannot be: {impossible}; encode them again")
    return record


def _impossible(record: LatentRecord) -> str:
    """What contradicts itself, or "". A digest is no signature: the record may be a stranger's, like his latents."""
    identity = record.identity
    for name in ("count", "source_count", "chunk_rows", "batch", "threads"):
        if not 1 <= getattr(identity, name) < 1 << 48:
            return f"{name} is {getattr(identity, name)}"
    if min(identity.image_size) < 1 or max(identity.image_size) > 1 << 20:
        return f"images of {identity.image_size}"
    if not 1 <= identity.codec.channels <= 1 << 12 or not 1 <= identity.codec.factor <= 1 << 12:
        return f"a codec of {identity.codec.channels} channels and factor {identity.codec.factor}"
    if identity.count > identity.source_count:
        return f"{identity.count} of {identity.source_count} images"
    if record.index is None:
        return "" if not record.chunks else "chunks without an index"
    if len(record.chunks) != identity.chunks:
        return f"{len(record.chunks)} chunks of {identity.chunks}"
    for number, file in enumerate(record.chunks):
        need = len(identity.rows(number)) * identity.row_bytes
        if file.offset < 8 or file.offset + need > file.bytes:
            return f"{chunk_name(number)} of {file.bytes} bytes, whose rows need {need} from byte {file.offset} on"
    return ""


def chunk_name(index: int) -> str:
    """As `ChunkStore` calls its files."""
    return f"chunk-{index:08d}.safetensors"


def index_tensors(images: Catalogue, count: int, checksums: Tensor) -> dict[str, Tensor]:
    """The content of `index.safetensors`.

    Args:
        checksums: CRC-32 of each posterior's bytes, int64 (count, views).
    """
    labels = images.class_labels[:count] if images.class_names else np.empty(0, dtype=np.int64)
    tensors = {"class_labels": torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)), "crc32": checksums}
    items, splits = (_packed_names(names, count) for names in (images.item_names, images.split_names))
    for column, names in (("item_names", items), ("split_names", splits)):
        if column == "item_names" or not all(map(torch.equal, items, splits)):
            tensors[f"{column}.bytes"], tensors[f"{column}.ends"] = names
    return tensors


def _packed_names(names: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """The first names as one array of bytes, and where each of them ends."""
    packed = PackedNames.of(itertools.islice(names, count))
    return torch.from_numpy(np.frombuffer(packed.text, dtype=np.uint8).copy()), torch.from_numpy(packed.ends)

"""Weights on disk: the checkpoints of a run, finished models, and the import of officially released weights."""

from smalti.checkpoints.keymap import KeyMap
from smalti.checkpoints.lock import RunLock
from smalti.checkpoints.maps import MAPS
from smalti.checkpoints.mirror import Mirror
from smalti.checkpoints.official import from_official, official_shapes, to_official
from smalti.checkpoints.saver import AsyncSaver
from smalti.checkpoints.shards import Groups, Piece, StoredCheckpoint
from smalti.checkpoints.store import CheckpointStore
from smalti.models.files import Bundle, load_bundle, load_model, save_model
from smalti.storage.filesystem import FileSystem, LocalFileSystem, Writer
from smalti.storage.tensors import load_tensors

__all__ = [
    "MAPS",
    "AsyncSaver",
    "Bundle",
    "CheckpointStore",
    "FileSystem",
    "Groups",
    "KeyMap",
    "LocalFileSystem",
    "Mirror",
    "Piece",
    "RunLock",
    "StoredCheckpoint",
    "Writer",
    "from_official",
    "load_bundle",
    "load_model",
    "load_tensors",
    "official_shapes",
    "save_model",
    "to_official",
]

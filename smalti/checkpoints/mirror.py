"""A second place for the checkpoints of a run: an object store, from where another machine goes on.

Object stores have no rename. What makes a checkpoint there is its manifest: written last, when every other file is in
place with its size, and removed first. A folder without a whole manifest is no checkpoint, whoever left it.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from smalti.checkpoints.layout import FILE, FORMAT, MANIFEST, VERSION, name_of, nonce, verify_folder
from smalti.checkpoints.shelf import Keep, Shelf
from smalti.errors import CheckpointError, ConfigError, RunLockedError, SmaltiError, StorageError
from smalti.storage.filesystem import (
    FileRecord,
    FileSystem,
    LocalFileSystem,
    make_folders,
    remove_tree,
    require_space,
    storage_errors,
    write_file,
)
from smalti.storage.objects import file_system, shown
from smalti.storage.sealed import NewerFormatError, check_format, unseal

PAUSES = (0.5, 2.0, 8.0)  # seconds before the second and each later try
_PIECE = 1 << 24
_FOLDER = re.compile(r"step-(\d{10})(-[0-9a-f]{8})?")  # the second part, where a step was stored once more

T = TypeVar("T")


class _Remote(NamedTuple):
    """A whole checkpoint in the mirror."""

    step: int
    name: str
    manifest: Mapping[str, Any]


class Mirror:
    """The checkpoints of a run in an object store.

    Args:
        url: a folder of it: `s3://bucket/run`, `gs://bucket/run`, or whatever else fsspec has a package for. Of this
            run alone.
        keep_last, keep_every, keep_best: as of `CheckpointStore`.
        pauses: seconds before each further try of what failed.
        remote: the fsspec file system; tests put failures here. None = as the URL says.

    Raises:
        ConfigError: nothing is known of such URLs, or the package for them is missing.
        ValueError: keep_last or keep_every is below 1.
    """

    def __init__(
        self,
        url: str,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: bool = False,
        pauses: tuple[float, ...] = PAUSES,
        remote: Any = None,
    ) -> None:
        self.url = shown(url)  # for messages: without what could be a password
        self.keep = Keep(keep_last, keep_every, keep_best)
        self._pauses = pauses
        found, root = _connect(url)
        self._remote = found if remote is None else remote
        self._root = root.rstrip("/")
        self._manifests: dict[str, dict[str, Any]] = {}  # of folders that are known to be whole

    def upload(self, folder: Path) -> None:
        """Store a checkpoint folder; when this returns, it is there as a whole. Then old ones are deleted.

        Raises:
            StorageError: it could not be stored or others not be deleted, after several tries; what was whole before
                still is.
            RunLockedError: another run has a newer one there.
            CheckpointError: the folder is no whole checkpoint.
        """
        data = (folder / MANIFEST).read_bytes()
        manifest = unseal(data, str(folder / MANIFEST))
        step, run_id = manifest["step"], manifest.get("run_id")
        with self._told(f"copying checkpoint {folder.name}"):
            there = self._list()
            foreign = {one.step: one.manifest["run_id"] for one in there if _is_foreign(one, run_id)}
            if newer := [other for other in foreign if other >= step]:
                raise RunLockedError(
                    f"{self.url} has {name_of(max(newer))} of run {foreign[max(newer)]}, and this is run {run_id} at "
                    f"step {step}: another run writes there too. Stop one of the two, or choose another place"
                )
            names = {one.name for one in there}
            same = [one.name for one in there if one.manifest == manifest]
            self._remove([folder for folder in self._folders() if folder not in names])  # what was cut short before
            if not same:
                # What it replaces stays until the new one is there.
                name = name_of(step) if name_of(step) not in names else f"{name_of(step)}-{nonce()[-8:]}"
                self._upload(folder, name, manifest, data)
                same = [name]
            own = [one for one in self._list() if not _is_foreign(one, run_id)]
            stay = self.keep.stay({one.step: one.manifest.get("score") for one in own}, step)
            self._remove(
                [one.name for one in own if one.step not in stay or (one.step == step and one.name != same[0])]
            )

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is there as a whole; None if there is none.

        Raises:
            StorageError: the store cannot be reached, after several tries.
        """
        with self._told("looking for checkpoints"):
            return max((one.step for one in self._list()), default=None)

    def fetch_newest(
        self,
        folder: Path,
        *,
        newer_than: int | None = None,
        run_id: str | None = None,
        on_skip: Callable[[str], None] = lambda line: None,
        fs: FileSystem | None = None,
    ) -> Path | None:
        """Copy the newest whole checkpoint into a store's folder, if that has none as new.

        Args:
            folder: as `CheckpointStore` was given it.
            newer_than: the newest step that is whole there, -1 if none is; None = find out.
            run_id: of the folder's run; None = any may come.
            on_skip: told of each that is damaged, with the reason.
            fs: the file operations.

        Returns:
            The checkpoint's folder; None if nothing was copied.

        Raises:
            StorageError: the store cannot be reached, or the disk is full.
            CheckpointError: the newest was written by a newer smalti.
            RunLockedError: it is of another run; nothing is copied.
        """
        fs = LocalFileSystem() if fs is None else fs
        shelf = Shelf(folder, fs, sole_writer=False)
        if newer_than is None:
            newer_than = max((step for step in shelf.steps() if _is_whole(folder / name_of(step))), default=-1)
        with self._told("looking for checkpoints"):
            there = sorted(self._list(), key=lambda one: (one.step, one.name), reverse=True)
        for one in there:
            if one.step <= newer_than:
                return None
            if _is_foreign(one, run_id):
                raise RunLockedError(
                    f"{self.url} has {one.name} of run {one.manifest['run_id']}, and {folder.parent} is run {run_id}: "
                    "choose another place for its copies, or another run folder to continue that run in"
                )
            try:
                check_format(one.manifest, FORMAT, VERSION, f"{self.url}/{one.name}")
                with self._told(f"fetching checkpoint {one.name}"):
                    return self._download(one, folder, shelf, fs)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                on_skip(f"checkpoint {one.name} of {self.url} is skipped: {error}")
        return None

    def _upload(self, folder: Path, name: str, manifest: Mapping[str, Any], data: bytes) -> None:
        self._try(lambda remote: remote.makedirs(self._path(name), exist_ok=True))
        for file, record in manifest["files"].items():
            self._put(folder / file, f"{name}/{file}", FileRecord(**record))
        where = self._path(f"{name}/{MANIFEST}")

        def commit(remote: Any) -> None:
            remote.pipe_file(where, data)
            remote.invalidate_cache()
            if remote.cat_file(where) != data:
                raise OSError(f"{MANIFEST} does not come back as it was written")

        self._try(commit)
        self._manifests[name] = dict(manifest)

    def _put(self, file: Path, name: str, record: FileRecord) -> None:
        def put(remote: Any) -> None:
            remote.put_file(str(file), self._path(name))
            remote.invalidate_cache()
            size = remote.info(self._path(name))["size"]
            if size != record.bytes:
                raise OSError(f"{name} has {size:,} bytes there, {record.bytes:,} were sent")

        self._try(put)

    def _download(self, one: _Remote, folder: Path, shelf: Shelf, fs: FileSystem) -> Path:
        records = {name: FileRecord(**record) for name, record in one.manifest["files"].items()}
        if odd := [name for name in records if not FILE.fullmatch(name)]:
            raise CheckpointError(f"its manifest names the file {odd[0]!r}, which no checkpoint has")
        needed = sum(record.bytes for record in records.values())
        advice = "Make room and run again"
        with storage_errors(fs, folder, needed, f"fetching checkpoint {one.name} from {self.url}", advice):
            make_folders(fs, folder)
            shelf.sweep()
            require_space(fs, folder, needed, f"checkpoint {one.name} of {self.url}")
            temporary, final = folder / f".tmp-{one.step:010d}-{nonce()}", folder / name_of(one.step)
            fs.make_folder(temporary)
        try:
            for name, record in records.items():
                self._get(f"{one.name}/{name}", temporary / name, record, fs)
            data = self._read(self._path(f"{one.name}/{MANIFEST}"))
            if unseal(data, f"{self.url}/{one.name}/{MANIFEST}") != one.manifest:
                raise CheckpointError("it was replaced while it was fetched")
            with storage_errors(fs, folder, needed, f"fetching checkpoint {one.name} from {self.url}", advice):
                write_file(fs, temporary / MANIFEST, [data])
                fs.sync_folder(temporary)
                if final.exists():  # and is damaged, or it would not be fetched
                    shelf.discard([final])
                fs.rename(temporary, final)
                fs.sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):  # the next sweep clears what stays
                remove_tree(fs, temporary)
            raise
        return final

    def _get(self, name: str, file: Path, expected: FileRecord, fs: FileSystem) -> None:
        where = self._path(name)

        def get(remote: Any) -> FileRecord:
            if file.exists():  # of the try before
                fs.remove_file(file)
            with remote.open(where, "rb", block_size=_PIECE) as stream:
                return write_file(fs, file, _pieces(stream))

        if (found := self._try(get)) != expected:
            raise CheckpointError(
                f"{name} is damaged: {found.bytes:,} bytes came, its manifest says {expected.bytes:,}"
                + (", and their sha256 differs" if found.bytes == expected.bytes else "")
            )

    def _files(self) -> list[tuple[str, str]]:
        """Folder and file of everything that is there."""

        def find(remote: Any) -> list[str]:
            remote.invalidate_cache()
            return list(remote.find(self._root))

        start = f"{self._root.lstrip('/')}/"
        below = [str(path).lstrip("/").removeprefix(start) for path in self._try(find)]
        return [(parts[0], parts[1]) for path in below if len(parts := path.split("/")) == 2]

    def _folders(self) -> list[str]:
        return sorted({folder for folder, _ in self._files() if _FOLDER.fullmatch(folder)})

    def _list(self) -> list[_Remote]:
        """The whole ones."""
        result = []
        for folder, file in self._files():
            match = _FOLDER.fullmatch(folder)
            if match is None or file != MANIFEST:
                continue
            if folder not in self._manifests:
                where = self._path(f"{folder}/{MANIFEST}")
                data = self._read(where)
                with contextlib.suppress(CheckpointError):  # half written: no checkpoint yet
                    self._manifests[folder] = unseal(data, where)
            if (manifest := self._manifests.get(folder)) is not None and manifest["step"] == int(match[1]):
                result.append(_Remote(manifest["step"], folder, manifest))
        return result

    def _read(self, where: str) -> bytes:
        return self._try(lambda remote: bytes(remote.cat_file(where)))

    def _remove(self, folders: list[str]) -> None:
        for folder in folders:
            self._manifests.pop(folder, None)

            def remove(remote: Any, folder: str = folder) -> None:
                with contextlib.suppress(FileNotFoundError):
                    remote.rm_file(self._path(f"{folder}/{MANIFEST}"))
                remote.invalidate_cache()
                with contextlib.suppress(FileNotFoundError):
                    remote.rm(self._path(folder), recursive=True)

            self._try(remove)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, do: Callable[[Any], T]) -> T:
        """Ask the store, and again after failures that may pass: every store has errors of its own."""
        for pause in self._pauses:
            try:
                return do(self._remote)
            except (SmaltiError, PermissionError):
                raise
            except Exception:  # noqa: BLE001  (the last try raises it)
                time.sleep(pause)
        return do(self._remote)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except SmaltiError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            tries = "" if isinstance(error, PermissionError) else f" after {len(self._pauses) + 1} tries"
            raise StorageError(
                f"{what} in {self.url} failed{tries}: {reason}. Checkpoints stored there before are untouched; check "
                "the network and the rights, and run again"
            ) from error


def _connect(url: str) -> tuple[Any, str]:
    if url.startswith(("http://", "https://")):
        raise ConfigError(f"{shown(url)} is no place for a mirror: nothing can be written there; give s3:// or gs://")
    remote, root = file_system(url)
    if "file" in remote.protocol and os.path.lexists(root) and not os.path.isdir(root):
        raise ConfigError(f"{shown(url)} is a file; a mirror is a folder")
    return remote, root


def _is_foreign(one: _Remote, run_id: str | None) -> bool:
    return run_id is not None and one.manifest.get("run_id") not in (None, run_id)


def _is_whole(path: Path) -> bool:
    try:
        verify_folder(path)
    except NewerFormatError:
        return True
    except (CheckpointError, OSError):
        return False
    return True


def _pieces(stream: Any) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece

"""Files of strangers, in every place where a user's path leads: refused in one line, and nothing in them runs.

The pickles of foreign checkpoints have tests of their own, in tests/checkpoints/test_foreign.py; here the same kind of
file lies where latents, codecs, shards, indices, sets and settings are expected.
"""

import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tiny_vae
import torch
from PIL import Image
from safetensors.torch import save_file

from smalti.cli import main
from smalti.data import load_image_set
from smalti.data.index_file import PackedNames, StoredIndex, index_bytes, parse_index
from smalti.data.latent_record import INDEX, RECORD, StoredFile, chunk_name, read_record, record_bytes
from smalti.data.latent_set import LatentExamples, open_latents
from smalti.data.order import SampleOrder
from smalti.data.shard_index import index_shard, restored, stored
from smalti.data.shards import BESIDE, load_shards
from smalti.data.sources import open_images
from smalti.errors import CheckpointError, DataError, SmaltiError
from smalti.latents import load_codec
from smalti.storage.objects import open_store
from smalti.workflows.encode import EncodeSettings, encode

pytestmark = pytest.mark.faults


class Run:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(canary):
    """Each would make the file `canary` if it were unpickled, evaluated, or asked for its tags."""
    system = Run(os.system, f"touch {canary}")
    packed, zipped = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": system}, packed)
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("arr_0.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"
                       .ljust(117) + b"\n" + pickle.dumps([system]))  # fmt: skip
    return {
        "protocol 0": pickle.dumps(system, 0),
        "protocol 4": pickle.dumps({"a": system}, 4),
        "exec": pickle.dumps(Run(exec, f"import pathlib; pathlib.Path({str(canary)!r}).touch()")),
        "torch": packed.getvalue(),
        "npz": zipped.getvalue(),
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']\n".encode(),
    }


def with_weights(name):
    def place(folder, vae, latents, data):
        (folder / "config.json").write_bytes((vae / "config.json").read_bytes())
        (folder / name).write_bytes(data)
        load_codec(folder)

    return place


def with_config(folder, vae, latents, data):
    weights = "diffusion_pytorch_model.safetensors"
    (folder / weights).write_bytes((vae / weights).read_bytes())
    (folder / "config.json").write_bytes(data)
    load_codec(folder)


def copied(folder, latents):
    for path in latents.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return read_record(open_store(latents))


def as_record(folder, vae, latents, data):
    copied(folder, latents)
    (folder / RECORD).write_bytes(data)
    open_latents(folder)


def as_index(folder, vae, latents, data):
    record = copied(folder, latents)
    (folder / INDEX).write_bytes(data)
    honest = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / RECORD).write_bytes(record_bytes(replace(record, index=honest)))
    open_latents(folder)


def as_chunk(folder, vae, latents, data):
    copied(folder, latents)
    (folder / chunk_name(0)).write_bytes(data)
    LatentExamples(open_latents(folder)).load(SampleOrder(range(4), 0), range(4), flip=False, seed=0)


def tar_of(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def as_tar(folder, vae, latents, data):
    (folder / "a.tar").write_bytes(data)
    load_shards(folder / "a.tar", None)


def in_tar(suffix):
    def place(folder, vae, latents, data):
        tar_of(folder / "a.tar", [(f"a.{suffix}", data), ("b.pyd", data), ("c.pkl", data)])
        load_shards(folder / "a.tar", None)

    return place


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def beside(name):
    """Beside a good shard, whose own index is not there."""

    def place(folder, vae, latents, data):
        tar_of(folder / "a.tar", [("a.png", png())])
        (folder / BESIDE).mkdir()
        (folder / name).write_bytes(data)
        assert len(load_shards(folder, None)) == 1
        raise DataError("harmless")

    return place


def in_folder(name):
    def place(folder, vae, latents, data):
        (folder / BESIDE).mkdir()
        (folder / name).write_bytes(data)
        load_image_set(folder)

    return place


def as_npz(folder, vae, latents, data):
    (folder / "a.npz").write_bytes(data)
    list(open_images(folder / "a.npz").batches())


def command(*arguments):
    def place(folder, vae, latents, data):
        (folder / "model.safetensors").write_bytes(data)
        (folder / "config.json").write_bytes(data)
        (folder / "run.yaml").write_bytes(data)
        code = main([argument.format(folder=folder) for argument in arguments])
        assert code != 0
        raise DataError(f"exit code {code}")

    return place


PLACES = {
    "weights of a codec": with_weights("diffusion_pytorch_model.safetensors"),
    "old weights of a codec": with_weights("diffusion_pytorch_model.bin"),
    "settings of a codec": with_config,
    "record of latents": as_record,
    "index of latents": as_index,
    "chunk of latents": as_chunk,
    "tar": as_tar,
    "image in a tar": in_tar("png"),
    "label in a tar": in_tar("json"),
    "manifest of tars": beside("index.json"),
    "index of a tar": beside(f"{BESIDE}/a.tar.index"),
    "image in a folder": in_folder("a.png"),
    "index of a folder": in_folder(f"{BESIDE}/folder.index"),
    "items of a set": in_folder("items.json"),
    "npz": as_npz,
    "model": command("sample", "{folder}", "--out", "{folder}/out", "--seeds", "0-1"),
    "settings of a run": command("train", "--config", "{folder}/run.yaml", "--out", "{folder}/out"),
    "data of a run": command("train", "--data.path", "{folder}", "--out", "{folder}/out"),
    "data that are checked": command("data", "check", "{folder}"),
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_vae.saved(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def latents(vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "set"
    encode(EncodeSettings(source="emoji32", codec=str(vae), out=out, limit=4, chunk_rows=2, device="cpu", threads=1))
    return out


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_payloads_would_run_if_anything_unpickled_them(tmp_path):
    canary = tmp_path / "canary"
    for name in ("protocol 0", "protocol 4", "exec"):
        pickle.loads(payloads(canary)[name])
        assert canary.exists()
        canary.unlink()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
def test_nothing_runs_whatever_file_lies_where_one_is_expected(place, vae, latents, tmp_path, capsys):
    canary = tmp_path / "canary"
    for number, (name, data) in enumerate(payloads(canary).items()):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        with pytest.raises(SmaltiError) as caught:
            PLACES[place](folder, vae, latents, data)
        assert not canary.exists(), name
        assert str(caught.value)


# What is whole, and lies


LIES = {
    "no rows in a chunk": lambda r: replace(r, identity=replace(r.identity, chunk_rows=0)),
    "fewer than no images": lambda r: replace(r, identity=replace(r.identity, count=-4)),
    "more images than there were": lambda r: replace(r, identity=replace(r.identity, source_count=3)),
    "images of no size": lambda r: replace(r, identity=replace(r.identity, image_size=(0, 0))),
    "a codec of no channel": lambda r: replace(
        r, identity=replace(r.identity, codec=replace(r.identity.codec, channels=0))
    ),
    "a chunk too few": lambda r: replace(r, chunks=r.chunks[:1]),
    "rows before the file": lambda r: replace(r, chunks=(replace(r.chunks[0], offset=-64), r.chunks[1])),
    "rows behind the file": lambda r: replace(r, chunks=(replace(r.chunks[0], offset=1 << 20), r.chunks[1])),
    "a chunk of no bytes": lambda r: replace(r, chunks=(replace(r.chunks[0], bytes=0), r.chunks[1])),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_contradicts_itself_is_refused(lie, latents, tmp_path):
    record = copied(tmp_path, latents)
    (tmp_path / RECORD).write_bytes(record_bytes(LIES[lie](record)))
    with pytest.raises(CheckpointError, match="describes latents that cannot be"):
        open_latents(tmp_path)


TABLES = {
    "labels of no class": ("class_labels", lambda t: t + 1000),
    "labels below 0": ("class_labels", lambda t: t - 1000),
    "too few labels": ("class_labels", lambda t: t[1:]),
    "labels that are no whole numbers": ("class_labels", lambda t: t.float()),
    "checksums of one view too many": ("crc32", lambda t: t.repeat(1, 2)),
    "checksums below 0": ("crc32", lambda t: t - (1 << 33)),
    "names that end behind the text": ("item_names.ends", lambda t: t + 5),
    "names that end before they begin": ("item_names.ends", lambda t: t.flip(0)),
    "names in disorder": ("item_names.ends", lambda t: t[[1, 0, 2, 3]]),
    "no text of names": ("item_names.bytes", None),
    "no names": ("item_names.ends", None),
}


@pytest.mark.parametrize("table", TABLES)
def test_an_index_that_does_not_fit_its_record_is_refused(table, latents, tmp_path):
    from safetensors.torch import load_file

    record = copied(tmp_path, latents)
    name, change = TABLES[table]
    tensors = load_file(tmp_path / INDEX)
    old = tensors.pop(name)
    if change:
        tensors[name] = change(old).contiguous()
    save_file(tensors, tmp_path / INDEX)
    data = (tmp_path / INDEX).read_bytes()
    honest = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (tmp_path / RECORD).write_bytes(record_bytes(replace(record, index=honest)))
    with pytest.raises(DataError, match=r"does not fit latents\.json"):
        open_latents(tmp_path)


def test_an_index_of_a_shard_that_no_pass_can_find_counts_as_none(tmp_path):
    tar_of(
        tmp_path / "a.tar", [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("png", png()), ("cls", b"1"))]
    )
    index = index_shard(open_store(tmp_path), "a.tar")
    again = restored(parse_index(index_bytes(stored(index))), "a.tar")
    assert again is not None
    assert list(again.paths) == list(index.paths)
    for change in (
        {"offset": index.offset - 10_000},
        {"offset": index.offset + index.bytes},
        {"size": index.size - 10_000},
        {"label": index.label - 9},
        {"label": index.label + (1 << 20)},
        {"source": index.source + 1},
        {"source": index.source + 7},
        {"source": index.source + 7, "label_names": ("a", "b")},
        {"source": index.source - 5, "label_names": ("a", "b")},
        {"image_size": index.image_size * 0},
        {"crc": index.crc.astype(np.int64)},
        {"digest": index.digest[:, 0]},
        {"label": index.label[1:]},
        {"keys": PackedNames.of(["one"])},
        {"label_names": (1, 2)},
        {"bytes": "many"},
        {"bytes": float(index.bytes)},
        {"kinds": (("PNG RGB", "many"),)},
        {"notes": ((3, 4),)},
    ):
        data = index_bytes(stored(replace(index, **change)))
        assert restored(parse_index(data), "a.tar") is None, change


def test_columns_of_objects_and_names_without_end_make_no_index():
    good = StoredIndex({"format": "x"}, {"a": np.arange(3)}, {"n": PackedNames.of(["a", "bc"])})
    assert list(parse_index(index_bytes(good)).names["n"]) == ["a", "bc"]
    head, body = index_bytes(good).split(b"\n", 2)[2].split(b"\n", 1)
    for change in (
        lambda h: h["columns"].update(a=["|O", [3]]),
        lambda h: h["columns"].update(a=["<f8", [3]]),
        lambda h: h["columns"].update(a=["<i8", [-1]]),
        lambda h: h["columns"].update(a=["<i8", [1 << 40]]),
        lambda h: h["columns"].update(a=["<i8", ["3"]]),
        lambda h: h["columns"].update(a=["<i8", [3, True]]),
        lambda h: h["columns"].update({"n ends": ["<i8", [-1]]}),
        lambda h: h["columns"].update(a=3),
        lambda h: h.update(names=["none"]),
        lambda h: h.update(facts=[]),
        lambda h: h.update(columns=7),
    ):
        changed = json.loads(head)
        change(changed)
        rest = json.dumps(changed).encode() + b"\n" + body
        data = b"smalti index 1\n" + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest
        assert parse_index(data) is None, changed
    for ends in ([2, 1, 3], [-1, 2, 3], [1, 2, 9]):
        data = index_bytes(StoredIndex({}, {}, {"n": PackedNames(b"abc", np.array(ends))}))
        assert parse_index(data) is None, ends


@pytest.mark.parametrize(
    "change",
    [
        {"scaling_factor": 0}, {"scaling_factor": -1.0}, {"scaling_factor": float("nan")}, {"scaling_factor": "1"},
        {"shift_factor": float("inf")}, {"layers_per_block": 10**9}, {"latent_channels": 10**12},
        {"block_out_channels": [8] * 1000}, {"block_out_channels": 8}, {"block_out_channels": [8, "8"]},
        {"down_block_types": [1, 2]}, {"down_block_types": None}, {"norm_num_groups": 0}, {"act_fn": ["silu"]},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_codec_that_cannot_be_are_refused_at_once(vae, tmp_path, change):
    folder = tmp_path / "vae"
    folder.mkdir()
    for path in vae.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_codec(folder)


@pytest.mark.parametrize("size", ["9" * 5000, "٣", "-1", "1e9", "18446744073709551616"])
def test_sizes_that_are_no_numbers_are_damage_and_no_crash(tmp_path, size):
    info = tarfile.TarInfo("a.png")
    info.size, info.pax_headers = 8, {"size": size}
    data = info.tobuf(tarfile.PAX_FORMAT) + png()[:8].ljust(512, b"\0") + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a size of|cut off"):
        load_shards(tmp_path / "a.tar", None)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_packed_tar_is_named_as_such(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}"):
        pass
    with pytest.raises(DataError, match=r"it is packed with (gzip|bzip2|xz); unpack it"):
        load_shards(tmp_path / "a.tar", None)

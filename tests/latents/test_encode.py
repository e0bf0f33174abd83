"""`smalti encode` and what is read of it: the same bytes by any number of processes, and every byte accounted for."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_vae
import torch
from processes import wait_until

from smalti.cli import main
from smalti.data import SampleOrder, load_image_set
from smalti.data import latent_set as latent_set_module
from smalti.data import read_ahead as read_ahead_module
from smalti.data.examples import Examples, PixelExamples
from smalti.data.latent_set import LatentExamples, open_latents
from smalti.data.open_examples import load_examples
from smalti.data.order import Blocked
from smalti.data.pixels import read_images
from smalti.errors import CheckpointError, ConfigError, DataError, NumericError
from smalti.latents import AutoencoderCodec, load_codec
from smalti.workflows.encode import EncodeSettings, encode

COUNT, ROWS = 50, 16
SCRIPT = "import sys, torch; torch.set_num_threads(1); from smalti.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_vae.saved(tmp_path_factory.mktemp("vae"), scaling_factor=0.7)


def settings(vae, out, **changes):
    given = {"codec": str(vae), "limit": COUNT, "chunk_rows": ROWS, "flips": "stored", "device": "cpu", "threads": 1}
    return EncodeSettings(source="emoji32", out=out, **(given | changes))


@pytest.fixture(scope="module")
def whole(vae, tmp_path_factory):
    """Made by one process in one go."""
    out = tmp_path_factory.mktemp("latents") / "whole"
    encode(settings(vae, out))
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_set_is_its_chunks_an_index_and_a_record_and_nothing_else(whole):
    chunks = [f"chunk-{n:08d}.safetensors" for n in range(4)]
    assert sorted(contents(whole)) == [*chunks, "index.safetensors", "latents.json"]
    identity = open_latents(whole).record.identity
    assert identity.row_bytes == 2 * 2 * 4 * 16 * 16 * 2
    assert replace(identity, image_size=(256, 256), codec=replace(identity.codec, factor=8)).view_bytes == 16384


def test_what_is_stored_is_the_posterior_of_each_image_and_of_its_mirror_to_half_precision(vae, whole):
    images = read_images(load_image_set("emoji32"), range(COUNT))
    codec, latents = load_codec(vae), open_latents(whole)
    for view, x in enumerate((images, images.flip(-1))):
        expected = torch.stack(codec.encode(x), dim=1).half().float()
        assert torch.equal(latents.moments(list(range(COUNT)), [view] * COUNT), expected)


def test_the_catalogue_is_that_of_the_images(whole):
    images, latents = load_image_set("emoji32"), open_latents(whole)
    assert (len(latents), latents.name) == (COUNT, "whole")
    assert latents.class_names == images.class_names
    assert tuple(latents.item_names) == images.item_names[:COUNT]
    assert tuple(latents.split_names) == images.split_names[:COUNT]
    assert np.array_equal(latents.class_labels, images.class_labels[:COUNT])
    assert latents.record.identity.source_fingerprint == images.fingerprint
    assert len(latents.fingerprint) == 64


def test_the_same_command_again_does_nothing(vae, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    result = encode(settings(vae, whole))
    assert "is complete: 50 examples, nothing to do" in result.note
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("chunks", ["", ":2"])
def test_of_several_processes_the_first_says_what_came_of_it(vae, whole, tmp_path, capsys, monkeypatch, chunks):
    out = tmp_path / "part" if chunks else whole
    command = ["encode", "emoji32", "--codec", str(vae), "--out", str(out), "--limit", str(COUNT), "--chunk-rows"]
    command += [str(ROWS), "--flips", "stored", "--device", "cpu", "--threads", "1", "--chunks", chunks]
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(command) == 0
        said.append(capsys.readouterr())
    assert said[0].out + said[0].err == ""
    if chunks:
        assert "chunks 0:2 are stored; of all 4, 2 are missing" in said[1].err
    else:
        assert "nothing to do" in said[1].err
        assert said[1].out.startswith(f"{whole}: 50 examples, latents 4 x 16 x 16")
        assert said[1].out.endswith(f"train on them with `smalti train --data.path {whole}`\n")


def test_parts_by_themselves_end_in_the_same_bytes(vae, whole, tmp_path):
    out = tmp_path / "whole"
    first = encode(settings(vae, out, chunks="2:"))
    assert "chunks 2:4 are stored; of all 4, 2 are missing: 0-1" in first.note
    with pytest.raises(DataError, match="is not finished; run the `smalti encode` command that began it again"):
        open_latents(out)
    (out / ".claim-00000003").write_bytes(b"")  # of a process that died between storing its chunk and letting go
    assert encode(settings(vae, out, chunks=":2")).record.complete
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("call", [1, 3, 7])
def test_whatever_call_of_the_network_it_dies_in_the_same_command_goes_on(vae, whole, tmp_path, monkeypatch, call):
    out, calls = tmp_path / "whole", []
    real = AutoencoderCodec.encode

    def dying(self, images):
        calls.append(len(images))
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(AutoencoderCodec, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        encode(settings(vae, out))
    encode(settings(vae, out))
    assert contents(out) == contents(whole)


@pytest.mark.long
@pytest.mark.faults
def test_killed_again_and_again_and_done_by_two_processes_the_bytes_are_the_same(vae, whole, tmp_path):
    out = tmp_path / "whole"
    command = [sys.executable, "-c", SCRIPT, "encode", "emoji32", "--codec", str(vae), "--out", str(out)]
    command += ["--limit", str(COUNT), "--chunk-rows", str(ROWS), "--flips", "stored", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start():
        return subprocess.Popen([*command, "--threads", "1"], env=environment, stderr=subprocess.DEVNULL)

    victim = start()
    wait_until(lambda: list(out.glob("chunk-*")), "a chunk", [victim.pid])
    victim.send_signal(signal.SIGKILL)
    victim.wait(60)
    (out / ".tmp-00000003-1-aaaaaaaa").write_bytes(b"half a chunk")  # as a writer leaves it that dies at its work
    both = [start(), start()]
    assert [process.wait(120) for process in both] == [0, 0]
    assert contents(out) == contents(whole)


def test_latents_that_half_precision_does_not_hold_are_refused_and_not_stored(tmp_path):
    vae, out = tiny_vae.saved(tmp_path / "vae", scaling_factor=1e6), tmp_path / "latents"
    with pytest.raises(NumericError, match="latents of images 0 to 3 have values that float16 does not hold") as caught:
        encode(settings(vae, out, limit=8, chunk_rows=4))
    assert caught.value.exit_code == 70
    assert not list(out.glob("chunk-*"))


def test_a_chunk_that_was_deleted_is_made_again(vae, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "whole")
    (out / "chunk-00000002.safetensors").unlink()
    encode(settings(vae, out))
    assert contents(out) == contents(whole)


def test_a_chunk_that_was_damaged_before_the_finish_is_made_again(vae, whole, tmp_path):
    out = tmp_path / "whole"
    encode(settings(vae, out, chunks=":3"))
    flip(out / "chunk-00000001.safetensors", 5000)
    encode(settings(vae, out))
    assert contents(out) == contents(whole)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("held", [True, False])
def test_every_changed_byte_of_an_example_is_noticed(whole, tmp_path, monkeypatch, held):
    if not held:
        monkeypatch.setattr(latent_set_module, "HELD_BYTES", 0)
    out = shutil.copytree(whole, tmp_path / "whole")
    offset = open_latents(out).record.chunks[1].offset
    row_bytes = open_latents(out).record.identity.row_bytes
    for place in (0, row_bytes // 2 - 1, row_bytes - 1):
        flip(out / "chunk-00000001.safetensors", offset + 3 * row_bytes + place)
        latents = open_latents(out)
        reason = "its sha256 is not" if held else f"example {ROWS + 3} is not"
        with pytest.raises(DataError, match=rf"chunk-00000001.safetensors is damaged \({reason} .*; delete it and run"):
            latents.moments([ROWS + 3, ROWS + 3], [0, 1])
        assert latents.check() == ["chunk-00000001.safetensors: its sha256 is not the one that was written"]
        flip(out / "chunk-00000001.safetensors", offset + 3 * row_bytes + place)
    assert open_latents(out).check() == []


def test_cut_and_missing_files_are_named(whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "whole")
    chunk = out / "chunk-00000003.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"chunk-00000003.safetensors is damaged \(.* bytes, .* were written\)"):
        open_latents(out).moments([COUNT - 1], [0])
    chunk.unlink()
    with pytest.raises(DataError, match=r"chunk-00000003.safetensors is damaged"):
        open_latents(out).moments([COUNT - 1], [0])
    assert [line.split(": ")[0] for line in open_latents(out).check()] == ["chunk-00000003.safetensors"]
    assert main(["data", "check", str(out)]) == 65
    assert "chunk-00000003.safetensors" in capsys.readouterr().out
    flip(out / "index.safetensors", 300)
    with pytest.raises(DataError, match=r"index.safetensors is damaged"):
        open_latents(out)
    flip(out / "latents.json", 300)
    with pytest.raises(CheckpointError, match=r"latents.json"):
        open_latents(out)


def test_latents_are_examples_and_their_noise_is_new_in_each_epoch(whole):
    examples = load_examples(whole)
    assert isinstance(examples, LatentExamples)
    assert isinstance(examples, Examples)
    assert (examples.sample_shape, examples.can_flip, examples.codec.factor) == ((4, 16, 16), True, 2)
    order = SampleOrder(range(COUNT), seed=3)
    first = examples.load(order, range(COUNT), flip=False, seed=3)
    second = examples.load(order, range(COUNT, 2 * COUNT), flip=False, seed=3)
    assert sorted(first.indices.tolist()) == sorted(second.indices.tolist()) == list(range(COUNT))
    a, b = first.x0[first.indices.argsort()], second.x0[second.indices.argsort()]
    mean, std = examples.latents.moments(list(range(COUNT)), [0] * COUNT).unbind(1)
    assert torch.equal(mean, examples.x0(range(COUNT)))
    for drawn in (a, b):
        eps = (drawn - mean) / std
        # 50 x 1024 values: means of unit noise and of its square are within 5 standard errors of 0 and 1.
        assert abs(float(eps.mean())) < 5 / 51200**0.5
        assert abs(float(eps.square().mean()) - 1) < 5 * (2 / 51200) ** 0.5 + 1e-3
    assert not torch.equal(a, b)
    labels = load_image_set("emoji32").class_labels
    assert first.class_labels.tolist() == labels[first.indices.numpy()].tolist()


def test_an_example_depends_on_its_position_and_the_seed_alone(whole):
    order = SampleOrder(range(COUNT), seed=3)
    one = load_examples(whole).load(order, range(7, 30), flip=True, seed=3)
    other = pickle.loads(pickle.dumps(load_examples(whole)))  # as a worker process gets it
    again = other.load(order, [29, 11], flip=True, seed=3)
    assert torch.equal(again.x0, one.x0[[22, 4]])
    drawn = [load_examples(whole).load(order, [11], flip=False, seed=seed).x0 for seed in (3, 4)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (3, 1)])
def test_flips_are_those_of_the_images_and_mean_is_the_mean(whole, seed, epoch):
    order, positions = SampleOrder(range(COUNT), seed=0), range(COUNT * epoch, COUNT * (epoch + 1))
    images = PixelExamples(load_image_set("emoji32"))
    pixels, plain = (images.load(order, positions, flip=flip, seed=seed).x0 for flip in (True, False))
    mirrored = [not torch.equal(a, b) for a, b in zip(pixels, plain, strict=True)]
    examples = load_examples(whole, posterior="mean")
    found = examples.load(order, positions, flip=True, seed=seed)
    expected = examples.latents.moments(found.indices.tolist(), [int(m) for m in mirrored])[:, 0]
    assert torch.equal(found.x0, expected)
    assert 10 < sum(mirrored) < 40


def test_without_stored_flips_mirroring_is_refused(vae, tmp_path):
    encode(settings(vae, tmp_path / "plain", flips="none", limit=4))
    examples = load_examples(tmp_path / "plain", 32)
    assert not examples.can_flip
    with pytest.raises(ConfigError, match="encode again with --flips stored"):
        examples.load(SampleOrder(range(4), 0), [0], flip=True, seed=0)
    with pytest.raises(ConfigError, match="made of images of 32x32, 16x16 were asked for"):
        load_examples(tmp_path / "plain", 16)


def test_from_a_store_the_same_is_read_by_ranges(whole, monkeypatch):
    monkeypatch.setattr(latent_set_module, "HELD_BYTES", 0)
    monkeypatch.setattr(latent_set_module, "_BLOCK_BYTES", 5 * 8192)
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name, data in contents(whole).items():
        memory.pipe_file(f"/latents/{name}", data)
    remote, local = load_examples("memory://latents"), load_examples(whole)
    order = SampleOrder(range(COUNT), seed=1)
    a, b = (e.load(order, range(80), flip=True, seed=1) for e in (remote, local))
    assert torch.equal(a.x0, b.x0)
    assert remote.catalogue.fingerprint == local.catalogue.fingerprint
    assert isinstance(remote.catalogue, Blocked)
    assert remote.catalogue.wants_blocks
    assert not local.catalogue.wants_blocks
    assert remote.catalogue.block_starts.tolist() == [0, 5, 10, 15, 16, 21, 26, 31, 32, 37, 42, 47, 48]


def test_of_a_store_what_was_read_last_is_held_and_no_more_than_allowed(whole, monkeypatch):
    block = 5 * 8192
    monkeypatch.setattr(latent_set_module, "HELD_BYTES", block)
    monkeypatch.setattr(latent_set_module, "_BLOCK_BYTES", block)
    monkeypatch.setattr(read_ahead_module, "HELD_BYTES", 2 * block)
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name, data in contents(whole).items():
        memory.pipe_file(f"/held/{name}", data)
    latents = open_latents("memory://held")
    read, asked = latents.store.read, []
    monkeypatch.setattr(latents.store, "read", lambda *range: asked.append(range) or read(*range))
    for index, requests in ((0, 1), (5, 2), (9, 2), (10, 3), (5, 3), (0, 4), (6, 4), (11, 5)):
        latents.moments([index], [0], nearby=True)
        assert len(asked) == requests, index
        assert sum(len(stretch.data) for stretch in latents._ahead._held.values()) <= 2 * block


@pytest.mark.faults
def test_what_a_store_gave_once_is_not_held_if_it_was_wrong(whole):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name, data in contents(whole).items():
        memory.pipe_file(f"/wrong/{name}", data)
    latents = open_latents("memory://wrong")
    assert not latents.wants_blocks, "it is small"
    name, right = "chunk-00000001.safetensors", (whole / "chunk-00000001.safetensors").read_bytes()
    last = latents.record.chunks[1].offset + ROWS * latents.record.identity.row_bytes - 1
    memory.pipe_file(f"/wrong/{name}", right[:last] + bytes([right[last] ^ 1]) + right[last + 1 :])
    with pytest.raises(DataError, match=r"example 31 is not as it was written"):
        latents.moments([31], [1])
    memory.pipe_file(f"/wrong/{name}", right)
    assert latents.moments([31], [1]).isfinite().all()
    for index, view in ((COUNT, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            latents.moments([index], [view])


def test_the_fingerprint_of_latents_follows_their_classes_their_index_and_their_chunks(whole):
    record = open_latents(whole).record
    others = [
        replace(record, class_names=record.class_names[::-1]),
        replace(record, index=replace(record.index, sha256="0" * 64)),
        replace(record, chunks=record.chunks[::-1]),
    ]
    assert len({record.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunks": "9:"}, "there is no such chunk; these 50 images are cut into chunks of 16, numbered 0 to 3"),
        ({"chunks": "1"}, "expected a range of chunk numbers"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"codec": "pixels"}, "images need no encoding"),
        ({"image_size": 33}, "33x33 is no multiple of 2"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(vae, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        encode(settings(vae, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_other_latents_and_other_files_are_not_written_over(vae, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"holds other latents \(flips: stored there, none now\)"):
        encode(settings(vae, whole, flips="none"))
    with pytest.raises(ConfigError, match=r"holds other latents \(image_size: .*there, .*now\)"):
        encode(settings(vae, whole, image_size=16))
    other = tiny_vae.saved(tmp_path / "other", seed=1, scaling_factor=0.7)
    with pytest.raises(ConfigError, match=r"holds other latents \(codec.sha256"):
        encode(settings(other, whole))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"has files of something else, such as thesis.tex"):
        encode(settings(vae, tmp_path / "mine"))


def test_the_command_says_what_it_made(vae, tmp_path, capsys):
    arguments = ["encode", "emoji32", "--codec", str(vae), "--out", str(tmp_path / "out"), "--limit", "4"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "4 examples, latents 4 x 16 x 16 of images 32 x 32, codec autoencoder-kl" in capsys.readouterr().out
    assert main([*arguments[:3], str(tmp_path), *arguments[4:]]) == 65
    assert "holds no codec" in capsys.readouterr().err

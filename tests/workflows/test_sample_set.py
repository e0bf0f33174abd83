"""One folder, one set of samples: shared out, interrupted, damaged and asked for again, it ends in the same bytes."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import CLASSES, write_tiny_model

from smalti import streams
from smalti.checkpoints import save_model
from smalti.cli import main
from smalti.errors import CheckpointError, ConfigError, NumericError, PreemptedError, StorageError
from smalti.presets import create_model
from smalti.sampling import SamplingConfig
from smalti.sampling.record import read_record, seeds_text
from smalti.storage.filesystem import LocalFileSystem
from smalti.workflows import sample_set as module
from smalti.workflows.sample import parse_seeds
from smalti.workflows.sample_folder import open_store
from smalti.workflows.sample_request import SampleSettings
from smalti.workflows.sample_set import sample_set

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = SamplingConfig(sampler="ddim", num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def only_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(model, tmp_path):
    """22 images in six chunks of four, the last of two."""
    return SampleSettings(
        model=model, out=tmp_path / "out", sampling=SAMPLING, seeds="0-21", micro_batch=2, chunk_size=4, device="cpu"
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(settings, tmp_path):
    """The set with both outputs, made by one process that was left alone."""
    alone = replace(settings, out=tmp_path / "alone", save=("png", "npz"))
    sample_set(alone)
    return contents(alone.out)


class Crash(BaseException):
    """The process is gone."""


class FailingFileSystem(LocalFileSystem):
    """From operation `at` on, every one raises `error`; syncs are left out, because they cost most of the time."""

    def __init__(self, at=10**9, error=Crash()):  # noqa: B008
        self.calls, self.at, self.error = 0, at, error

    def step(self):
        self.calls += 1
        if self.calls >= self.at:
            raise self.error

    def create(self, path):
        self.step()
        writer = super().create(path)
        writer.sync = self.step
        return writer

    def rename(self, source, target):
        self.step()
        super().rename(source, target)

    def make_folder(self, path):
        self.step()
        super().make_folder(path)

    def remove_file(self, path):
        self.step()
        super().remove_file(path)

    def remove_folder(self, path):
        self.step()
        super().remove_folder(path)

    def sync_folder(self, path):
        self.step()


# --- outputs


def test_the_npz_holds_the_images_and_labels_of_the_pngs_in_the_order_of_the_seeds(settings):
    result = sample_set(replace(settings, seeds="7,3,20-22", save=("png", "npz"), classes=("2", "class 5")))
    assert result.outputs == (settings.out / "grid.png", settings.out / "samples.npz")
    with np.load(settings.out / "samples.npz") as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    assert images.shape == (5, 8, 8, 3)
    assert labels.tolist() == [2, 5, 2, 5, 2]
    for image, seed in zip(images, (7, 3, 20, 21, 22), strict=True):
        assert np.array_equal(np.asarray(Image.open(settings.out / f"{seed:06d}.png")), image)
    expected = {f"{seed:06d}.png" for seed in (7, 3, 20, 21, 22)}
    assert contents(settings.out).keys() == expected | {"grid.png", "samples.npz", "sample.json", "sample.yaml"}


def test_npz_alone_leaves_no_png_but_the_grid(settings):
    sample_set(replace(settings, save=("npz",)))
    assert contents(settings.out).keys() == {"grid.png", "samples.npz", "sample.json", "sample.yaml"}


def test_the_grid_shows_the_first_64_at_most(settings):
    sample_set(replace(settings, seeds="0-80", save=("npz",), chunk_size=40))
    side = 8 * 10 + 2  # eight by eight tiles of eight pixels, two between
    with Image.open(settings.out / "grid.png") as image:
        assert image.size == (side * (800 // side),) * 2


def test_the_record_says_what_the_set_is(settings, model):
    sample_set(replace(settings, label_rule="balanced", save=("npz",)))
    record = read_record(settings.out)
    identity = record.identity
    assert record.complete
    assert (identity.seeds, identity.count, identity.image_size) == ("0-21", 22, (8, 8))
    assert identity.sampling == SAMPLING
    assert (identity.label_rule.rule, identity.label_rule.num_classes) == ("balanced", 10)
    assert (record.model.path, record.model.kind, record.model.weights) == (str(model), "dit", "unknown")
    (npz,) = record.outputs
    assert npz.bytes == (settings.out / "samples.npz").stat().st_size
    with np.load(settings.out / "samples.npz") as stored:
        assert stored["arr_1"].tolist() == [position % 10 for position in range(22)]


def test_labels_are_drawn_from_each_seed_unless_asked_for_otherwise(settings):
    sample_set(replace(settings, seeds="5-9"))
    drawn = yaml.safe_load((settings.out / "sample.yaml").read_text())
    assert drawn["class_labels"] == [streams.key(seed, streams.SAMPLE_LABEL) % 10 for seed in range(5, 10)]
    assert drawn["labels"] == "random"
    assert read_record(settings.out).identity.label_rule.rule == "random"


@pytest.mark.parametrize("text", ["0-21", "5", "3,7,20-22", "2-3,1,0"])
def test_seeds_are_recorded_as_they_can_be_typed(text):
    assert seeds_text(parse_seeds(text)) == text


# --- many processes, one after another


def test_chunks_made_apart_give_the_bytes_of_one_process(settings, whole):
    both = replace(settings, save=("png", "npz"))
    first = sample_set(replace(both, chunks="0:3"))
    assert first.outputs == ()
    assert first.note.startswith("chunks 0:3 are stored; of all 6, 3 are missing: 3-5.")
    assert sample_set(replace(both, chunks="0:3")) == first
    assert sample_set(replace(both, chunks="3:")).outputs != ()
    assert contents(settings.out) == whole


def test_the_same_call_on_a_complete_set_touches_nothing(settings):
    sample_set(settings)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in settings.out.iterdir()}
    for again in (settings, replace(settings, overwrite=True), replace(settings, chunks="1:2")):
        result = sample_set(again)
        assert result.note == f"{settings.out} is complete: 22 samples, nothing to do"
        assert result.outputs == (settings.out / "grid.png",)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in settings.out.iterdir()} == before


@pytest.mark.slow
def test_a_crash_at_any_operation_is_made_good_by_the_same_command(settings, whole, tmp_path):
    counting = FailingFileSystem()
    few = replace(settings, save=("png", "npz"), seeds="0-2", chunk_size=2)
    sample_set(replace(few, out=tmp_path / "few"), fs=counting)
    right = contents(tmp_path / "few")
    for at in range(1, counting.calls + 1):
        crashed = replace(few, out=tmp_path / f"crash{at}")
        with pytest.raises(Crash):
            sample_set(crashed, fs=FailingFileSystem(at))
        sample_set(crashed, fs=FailingFileSystem())
        assert contents(crashed.out) == right, at
    assert counting.calls > 30
    assert all(whole[f"{seed:06d}.png"] == right[f"{seed:06d}.png"] for seed in range(3))


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_operation_is_one_line_and_costs_nothing(settings, tmp_path):
    counting = FailingFileSystem()
    few = replace(settings, save=("npz",), seeds="0-2", chunk_size=2)
    sample_set(replace(few, out=tmp_path / "few"), fs=counting)
    right = contents(tmp_path / "few")
    for at in range(1, counting.calls + 1):
        full = replace(few, out=tmp_path / f"full{at}")
        with pytest.raises(StorageError) as told:
            sample_set(full, fs=FailingFileSystem(at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        assert "No space left on device" in str(told.value)
        assert "\n" not in str(told.value)
        sample_set(full, fs=FailingFileSystem())
        assert contents(full.out) == right, at


def test_room_for_all_of_it_is_asked_for_first(settings, monkeypatch):
    monkeypatch.setattr(LocalFileSystem, "free_bytes", lambda fs, path: 20_000)
    with pytest.raises(StorageError, match="a set of 22 samples does not fit"):
        sample_set(settings)
    assert contents(settings.out) == {}


def test_a_damaged_chunk_is_found_and_made_again(settings, whole):
    both = replace(settings, save=("png", "npz"))
    sample_set(replace(both, chunks="0:5"))
    store = open_store(read_record(settings.out).identity, settings.out, LocalFileSystem())
    data = bytearray(store.path(2).read_bytes())
    data[-5] ^= 1
    store.path(2).write_bytes(data)
    store.path(4).write_bytes(b"")
    sample_set(both)
    assert contents(settings.out) == whole


def test_a_stop_keeps_every_stored_chunk_and_the_same_command_goes_on(settings, whole, monkeypatch):
    both = replace(settings, save=("png", "npz"))
    real, made = module.to_uint8, []

    def counted(images):
        made.append(len(images))
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(images)

    monkeypatch.setattr(module, "to_uint8", counted)
    with pytest.raises(PreemptedError) as told:
        sample_set(both)
    assert str(told.value) == (
        f"stopped by SIGTERM; 3 of 6 chunks are stored, the same command continues {settings.out}"
    )
    sample_set(both)
    assert made == [4, 4, 4, 4, 4, 2]
    assert contents(settings.out) == whole


def test_a_stop_inside_a_chunk_does_not_wait_for_its_end(settings, monkeypatch):
    real, drawn = module.sample, []

    def watched(*args, on_step, **options):
        def step(done, total, latents):
            drawn.append(done)
            if len(drawn) == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            on_step(done, total, latents)

        return real(*args, on_step=step, **options)

    monkeypatch.setattr(module, "sample", watched)
    with pytest.raises(PreemptedError, match="stopped by SIGUSR1; 0 of 6 chunks"):
        sample_set(settings)
    assert drawn == [1, 2, 3]


def test_a_process_begins_at_its_own_place(settings, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    order, real = [], module._Work._draw
    monkeypatch.setattr(module._Work, "_draw", lambda self, index, *a: order.append(index) or real(self, index, *a))
    sample_set(settings)
    assert order == [3, 4, 5, 0, 1, 2]


def test_of_several_processes_the_first_says_where_the_images_are(settings, monkeypatch, capsys):
    sample_set(settings)
    capsys.readouterr()
    said = []
    monkeypatch.setattr("smalti.cli.sample.sample_set", lambda asked: sample_set(settings))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(["sample", str(settings.model), "--out", str(settings.out)]) == 0
        said.append(capsys.readouterr())
    assert said[0].out + said[0].err == ""
    assert said[1].out == f"{settings.out / 'grid.png'}\n"
    assert "nothing to do" in said[1].err


# --- another set in the same folder


def test_a_folder_of_something_else_is_left_alone_unless_told_otherwise(settings):
    settings.out.mkdir(parents=True)
    (settings.out / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has files of something else, such as holiday.jpg; choose another --out"):
        sample_set(settings)
    assert os.listdir(settings.out) == ["holiday.jpg"]
    sample_set(replace(settings, overwrite=True))
    assert (settings.out / "holiday.jpg").read_bytes() == b"x"


def test_more_images_than_anybody_means_are_refused_before_they_are_listed():
    with pytest.raises(ConfigError, match="at most 10,000,000 images make one set"):
        parse_seeds("0-999999999999")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": "0-20"}, "seeds: 0-21 there, 0-20 now"),
        ({"classes": ("1",)}, "label_rule.rule: random there, given now"),
        ({"label_rule": "balanced"}, "label_rule.rule: random there, balanced now"),
        ({"sampling": replace(SAMPLING, guidance_scale=3.0)}, "sampling.guidance_scale: 2.0 there, 3.0 now"),
        ({"micro_batch": 4}, "micro_batch: 2 there, 4 now"),
        ({"chunk_size": 8}, "chunk_size: 4 there, 8 now"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 now"),
        ({"inference": "eager"}, "inference: none there, eager now"),
        ({"threads": 2}, "threads: 1 there, 2 now"),
        ({"save": ("npz",)}, "save: ['png'] there, ['npz'] now"),
    ],
)
@pytest.mark.parametrize("chunks", ["", "0:2"])
def test_another_set_in_the_folder_is_refused_with_what_differs(settings, change, said, chunks):
    sample_set(replace(settings, chunks=chunks))
    before = contents(settings.out) if not chunks else None
    with pytest.raises(ConfigError) as told:
        sample_set(replace(settings, **change))
    assert str(told.value) == (
        f"{settings.out} holds another set of samples ({said}); choose another --out, or --overwrite it"
    )
    assert before is None or contents(settings.out) == before


def test_other_weights_are_another_set(settings, tmp_path):
    sample_set(settings)
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="weights_sha256: "):
        sample_set(replace(settings, model=other))


def test_the_first_process_decides_threads_and_chunks_for_those_that_leave_them_open(settings, monkeypatch):
    sample_set(replace(settings, threads=2, chunks="0:1"))
    assert torch.get_num_threads() == 1
    seen, real = set(), module.sample
    monkeypatch.setattr(module, "sample", lambda *a, **k: seen.add(torch.get_num_threads()) or real(*a, **k))
    sample_set(replace(settings, chunk_size=None))
    identity = read_record(settings.out).identity
    assert (identity.threads, identity.chunk_size, seen) == (2, 4, {2})
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("chunks", ["", "0:2"])
def test_overwriting_removes_the_set_and_nothing_else(settings, whole, chunks):
    old = replace(settings, seeds="100-140", save=("png", "npz"), chunks=chunks)
    sample_set(old)
    (settings.out / "notes.txt").write_text("mine")
    (settings.out / "999.png").write_text("mine too")
    sample_set(replace(settings, save=("png", "npz"), overwrite=True))
    assert contents(settings.out) == whole | {"notes.txt": b"mine", "999.png": b"mine too"}


def test_a_set_that_others_work_on_is_not_overwritten(settings):
    sample_set(replace(settings, chunks="0:2"))
    store = open_store(read_record(settings.out).identity, settings.out, LocalFileSystem())
    with (
        store.claim(3),
        pytest.raises(ConfigError, match="another process is drawing samples"),
    ):
        sample_set(replace(settings, seeds="0-3", overwrite=True))
    sample_set(replace(settings, seeds="0-3", overwrite=True))


def test_files_that_no_record_tells_of_are_left_alone(settings, whole):
    settings.out.mkdir()
    (settings.out / "000003.png").write_text("mine")
    with pytest.raises(ConfigError, match=r"has 000003\.png, but no sample\.json"):
        sample_set(settings)
    assert contents(settings.out) == {"000003.png": b"mine"}
    sample_set(replace(settings, save=("png", "npz"), overwrite=True))
    assert contents(settings.out) == whole


@pytest.mark.parametrize("name", ["samples.npz", "000003.png"])
def test_a_complete_set_that_lost_a_file_says_so_and_is_made_again_on_request(settings, whole, name):
    both = replace(settings, save=("png", "npz"))
    sample_set(both)
    (settings.out / name).unlink()
    with pytest.raises(ConfigError, match=f"was complete, but {name} is gone or changed"):
        sample_set(both)
    sample_set(replace(both, overwrite=True))
    assert contents(settings.out) == whole


def test_a_damaged_record_is_one_line(settings, whole):
    both = replace(settings, save=("png", "npz"))
    sample_set(both)
    record = settings.out / "sample.json"
    record.write_bytes(record.read_bytes().replace(b'"count": 22', b'"count": 23'))
    with pytest.raises(CheckpointError, match=r"was changed after it was written.*--overwrite"):
        sample_set(both)
    sample_set(replace(both, overwrite=True))
    assert contents(settings.out) == whole


def test_a_process_of_a_set_that_was_overwritten_says_so(settings, monkeypatch):
    real = module._Work._draw

    def overwritten(self, index, *rest):
        images = real(self, index, *rest)
        record = read_record(settings.out)
        changed = replace(record, identity=replace(record.identity, seeds="5-26"))
        (settings.out / "sample.json").write_bytes(module.record_bytes(changed))
        return images

    monkeypatch.setattr(module._Work, "_draw", overwritten)
    with pytest.raises(ConfigError, match="was overwritten by another set of samples meanwhile"):
        sample_set(settings)


# --- what cannot be


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": "0-3,2"}, "seeds '0-3,2': 2 is there twice"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"save": ()}, "--save needs png, npz or both"),
        ({"classes": ("1",), "label_rule": "balanced"}, "--labels balanced takes every class"),
        ({"chunks": "3"}, "--chunks '3': expected a range of chunk numbers"),
        ({"chunks": "a:b"}, "--chunks 'a:b': expected"),
        ({"chunks": "-1:2"}, "--chunks '-1:2': expected"),
        ({"chunks": "2:2"}, "--chunks 2:2: there is no such chunk; these 22 images are cut into chunks of 4"),
        ({"chunks": "6:9"}, "--chunks 6:9: there is no such chunk"),
    ],
)
def test_settings_that_cannot_be_are_one_line_and_write_nothing(settings, change, said):
    with pytest.raises(ConfigError) as told:
        sample_set(replace(settings, **change))
    assert str(told.value).startswith(said)
    assert not settings.out.exists()


def test_a_model_of_latents_is_one_line(settings, tmp_path):
    latents = create_model("dit-emoji32", depth=1, hidden_size=16, num_heads=2, in_channels=4)
    save_model(tmp_path / "latents", latents, extra={"objective": {}})
    with pytest.raises(ConfigError, match="makes latents of 4 channels, not images"):
        sample_set(replace(settings, model=tmp_path / "latents"))


def test_images_that_are_not_finite_are_not_stored(settings, monkeypatch):
    real = module.sample

    def broken(*args, **options):
        for batch in real(*args, **options):
            batch.images[0, 0, 0, 0] = torch.nan
            yield batch

    monkeypatch.setattr(module, "sample", broken)
    with pytest.raises(NumericError, match="the samples of seeds 0 to 3 have values that are not finite"):
        sample_set(settings)
    assert not list(settings.out.glob(".chunks-*/chunk-*"))


def test_a_folder_without_a_record_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no sample\.json: expected a folder that `smalti sample` wrote"):
        read_record(tmp_path)


# --- the command


def test_the_command_says_what_it_made_and_what_is_missing(settings, capsys):
    fixed = f"sample {settings.model} --out {settings.out} --seeds 0-21 --chunk-size 4 --device cpu --save npz"
    quick = ["--sampling.num-inference-steps", "1", "--labels", "balanced"]
    assert main([*fixed.split(), *quick, "--chunks", ":4"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("chunks 0:4 are stored; of all 6, 2 are missing: 4-5.")
    assert main([*fixed.split(), *quick]) == 0
    assert capsys.readouterr().out.split() == [str(settings.out / name) for name in ("grid.png", "samples.npz")]
    assert main([*fixed.split(), *quick]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main([*fixed.split(), *quick, "--classes", "class 1"]) == 64


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_bytes_of_one(settings, whole):
    sampling = "--sampling.sampler ddim --sampling.num-inference-steps 2 --sampling.guidance-scale 2"
    words = f"sample {settings.model} --out {settings.out} --seeds 0-21 --micro-batch 2 --chunk-size 4 --device cpu"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smalti"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*run, *words.split(), *sampling.split(), "--save", "npz", "png"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert contents(settings.out) == whole
    assert len(CLASSES) == 10

"""A second place without renames holds whole checkpoints only, whatever fails on the way."""

import secrets
from functools import partial

import fsspec
import pytest

from smalti.checkpoints import CheckpointStore, Mirror
from smalti.errors import CheckpointError, ConfigError, RunLockedError, StorageError
from smalti.storage.sealed import seal, unseal

CHANGES = ("makedirs", "put_file", "pipe_file", "rm_file", "rm")
READS = ("find", "info", "cat_file", "open")


class LostError(Exception):
    """The connection is gone."""


class Faulty:
    """An fsspec file system that fails at call k: once, or from then on; a failing write leaves half of a file."""

    def __init__(self, real, calls=CHANGES):
        self.real, self.counted, self.calls, self.fault = real, calls, 0, lambda call: False

    def __getattr__(self, name):
        method = getattr(self.real, name)
        if name not in self.counted:
            return method

        def call(*args, **kw):
            self.calls += 1
            if self.fault(self.calls):
                if name == "put_file":
                    with open(args[0], "rb") as file:
                        data = file.read()
                    self.real.pipe_file(args[1], data[: len(data) // 2])
                elif name == "pipe_file":
                    self.real.pipe_file(args[0], args[1][: len(args[1]) // 2])
                elif name == "rm":
                    self.real.rm_file(sorted(self.real.find(args[0]))[0])
                raise LostError("connection reset")
            return method(*args, **kw)

        return call


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/far away/mirror"
    return f"memory://mirror-{secrets.token_hex(4)}/run"


def remote_of(url):
    return fsspec.core.url_to_fs(url)[0]


def mirror(url, **kw):
    return Mirror(url, **({"pauses": (), "keep_last": 1} | kw))


def fetched(url, folder, **kw):
    """What another machine with an empty disk would go on from."""
    skipped = []
    path = mirror(url).fetch_newest(folder, on_skip=skipped.append, **kw)
    return (None if path is None else CheckpointStore(folder).load_newest(pytest.fail)), skipped


def save(folder, step, faults, *, value=None, **kw):
    store = CheckpointStore(folder, fs=faults.QuickFileSystem(), **kw)
    value = step if value is None else value
    return store.save(step, faults.payload(value), {"value": value})


def test_what_was_uploaded_comes_back_on_another_machine(tmp_path, faults, url):
    assert fetched(url, tmp_path / "none") == (None, [])
    assert mirror(url).newest() is None
    mirror(url).upload(save(tmp_path / "here", 10, faults, run_id="a"))
    found, skipped = fetched(url, tmp_path / "there")
    assert (faults.value_of(found), found.run_id, skipped) == (10, "a", [])
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["step-0000000010"]
    for file in found.path.iterdir():
        assert file.read_bytes() == (tmp_path / "here" / "step-0000000010" / file.name).read_bytes()
    assert mirror(url).newest() == 10


def test_only_newer_ones_are_fetched_and_a_damaged_one_here_is_replaced(tmp_path, faults, url):
    mirror(url).upload(save(tmp_path / "here", 10, faults))
    for step in (11, 10):
        path = save(tmp_path / f"has {step}", step, faults)
        assert mirror(url).fetch_newest(tmp_path / f"has {step}") is None
    (path / "ema.safetensors").write_bytes(b"?")
    assert fetched(url, tmp_path / "has 10")[0].step == 10
    save(tmp_path / "older", 9, faults)
    assert fetched(url, tmp_path / "older")[0].step == 10


def test_the_keep_policy_holds_there_too(tmp_path, faults, url):
    there = mirror(url, keep_last=2, keep_every=30, keep_best=True)
    store = CheckpointStore(tmp_path / "here", keep_last=9, fs=faults.QuickFileSystem())
    for step, score in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 4.0)):
        there.upload(store.save(step, faults.payload(step), {"value": step}, score=score))
    assert sorted({folder for folder, _ in there._files()}) == [f"step-00000000{step}" for step in (20, 30, 40, 50)]
    there.upload(tmp_path / "here" / "step-0000000050")  # once more is no change
    assert len({folder for folder, _ in there._files()}) == 4


def prepared(tmp_path, faults, url, name, *, again):
    """A mirror with one whole checkpoint, and a second one, maybe of the same step, that is to be uploaded."""
    mirror(url).upload(save(tmp_path / name, 10, faults))
    return save(tmp_path / name, 10 if again else 20, faults, value=20)


def outcome(act):
    """The message of a StorageError; None if there was none."""
    try:
        act()
    except StorageError as error:
        return str(error)
    return None


@pytest.mark.faults
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_an_upload_that_fails_at_any_call_leaves_a_whole_checkpoint_there(tmp_path, faults, url, again):
    for k in range(1, 100):
        place = f"{url}-{k}"
        path = prepared(tmp_path, faults, place, f"here {k}", again=again)
        remote = Faulty(remote_of(place))
        remote.fault = lambda call, k=k: call >= k
        failed = outcome(partial(mirror(place, remote=remote).upload, path))
        assert failed is None or "connection reset" in failed
        found, skipped = fetched(place, tmp_path / f"there {k}")
        assert faults.value_of(found) in ((10, 20) if failed else (20,)), k
        assert skipped == []
        files = set(mirror(place)._files())  # also what is being removed is whole, or has no manifest any more
        assert all((one.name, file) in files for one in mirror(place)._list() for file in one.manifest["files"]), k
        mirror(place).upload(path)  # the next try clears what the failed one left
        found, skipped = fetched(place, tmp_path / f"then {k}")
        assert (faults.value_of(found), skipped) == (20, [])
        assert len({folder for folder, _ in mirror(place)._files()}) == 1
        if failed is None:
            break
    assert 9 <= k < 99


def test_what_fails_once_is_tried_again(tmp_path, faults, url):
    path = save(tmp_path / "here", 10, faults)
    remote = Faulty(remote_of(url), CHANGES + READS)
    remote.fault = lambda call: call % 3 == 1
    there = mirror(url, remote=remote, pauses=(0, 0))
    there.upload(path)
    assert there.fetch_newest(tmp_path / "there") is not None
    assert faults.value_of(CheckpointStore(tmp_path / "there").load_newest(pytest.fail)) == 10
    assert remote.calls > 20


def test_a_store_that_stays_away_is_one_line_with_its_url_and_no_password(tmp_path, faults):
    path = save(tmp_path / "here", 10, faults)
    remote = Faulty(remote_of("memory://x"), CHANGES + READS)
    remote.fault = lambda call: True
    away = Mirror("memory://me:secret@bucket/run", remote=remote, pauses=(0, 0))
    for act in (lambda: away.upload(path), lambda: away.fetch_newest(tmp_path / "there"), away.newest):
        with pytest.raises(StorageError, match=r"memory://bucket/run failed after 3 tries: connection reset") as error:
            act()
        assert "secret" not in str(error.value)


@pytest.mark.faults
def test_a_store_that_swallows_bytes_is_found_out_at_once(tmp_path, faults, url):
    class Short(Faulty):
        def put_file(self, source, target):
            with open(source, "rb") as file:
                self.real.pipe_file(target, file.read()[:-1])

    with pytest.raises(StorageError, match=r"bytes there, .* were sent"):
        mirror(url, remote=Short(remote_of(url))).upload(save(tmp_path / "here", 10, faults))
    assert mirror(url).newest() is None


@pytest.mark.faults
def test_a_store_that_spoils_the_manifest_is_found_out_at_once(tmp_path, faults, url):
    class Spoiling(Faulty):
        def pipe_file(self, target, data):
            self.real.pipe_file(target, data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])

    with pytest.raises(StorageError, match=r"manifest\.json does not come back as it was written"):
        mirror(url, remote=Spoiling(remote_of(url))).upload(save(tmp_path / "here", 10, faults))


@pytest.mark.faults
def test_a_damaged_file_there_is_told_and_the_older_checkpoint_fetched(tmp_path, faults, url):
    there = mirror(url, keep_last=5)
    for step in (10, 20, 30):
        there.upload(save(tmp_path / "here", step, faults, keep_last=5))
    remote = remote_of(url)
    names = sorted(path for path in remote.find(there._root) if "0000000030" in path)
    assert len(names) == 6
    for i, name in enumerate(names):
        good = remote.cat_file(name)
        for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[: len(good) // 2]):
            remote.pipe_file(name, bad)
            found, skipped = fetched(url, tmp_path / f"{i} {len(bad)}")
            assert faults.value_of(found) == 20
            # Without a whole manifest it is no checkpoint; else the damaged file is named.
            assert [name.rsplit("/", 1)[1] in line for line in skipped] == [True] * (not name.endswith("manifest.json"))
        remote.rm_file(name)
        if name.endswith("manifest.json"):
            assert fetched(url, tmp_path / f"{i} gone")[0].step == 20
        else:
            with pytest.raises(StorageError, match="failed"):
                fetched(url, tmp_path / f"{i} gone")
        assert not list(tmp_path.glob("*/.tmp-*"))
        remote.pipe_file(name, good)


def test_too_little_room_for_what_is_fetched_is_told_before_the_first_byte(tmp_path, faults, url):
    mirror(url).upload(save(tmp_path / "here", 10, faults))
    fs = faults.FileSystem(tmp_path)
    fs.free = 100
    with pytest.raises(StorageError, match="does not fit"):
        mirror(url).fetch_newest(tmp_path / "there", fs=fs)
    assert "create" not in fs.names


class Replacing:
    """A file system in which somebody writes another manifest when the first file is read."""

    def __init__(self, real, where, data):
        self.real, self.where, self.data = real, where, data

    def __getattr__(self, name):
        if name == "open":
            self.real.pipe_file(self.where, self.data)
        return getattr(self.real, name)


def test_a_manifest_that_leads_outside_or_changes_meanwhile_is_passed_over(tmp_path, faults, url):
    there = mirror(url)
    there.upload(save(tmp_path / "here", 10, faults))
    remote, where = remote_of(url), there._path("step-0000000010/manifest.json")
    manifest = unseal(remote.cat_file(where), where)
    skipped = []
    changed = Replacing(remote, where, seal(manifest | {"score": 0.5}))
    assert mirror(url, remote=changed).fetch_newest(tmp_path / "a", on_skip=skipped.append) is None
    record = manifest["files"]["state.json"]
    remote.pipe_file(where, seal(manifest | {"files": {"../state.json": record} | manifest["files"]}))
    assert mirror(url).fetch_newest(tmp_path / "b", on_skip=skipped.append) is None
    assert ["was replaced while" in skipped[0], "which no checkpoint has" in skipped[1]] == [True, True]
    assert not [path for place in ("a", "b") for path in (tmp_path / place).glob("*")]


def test_a_disk_that_fails_while_fetching_is_told_and_leaves_nothing(tmp_path, faults, url):
    mirror(url).upload(save(tmp_path / "here", 10, faults))
    for k in range(1, 60):
        (tmp_path / str(k)).mkdir()
        fs = faults.FileSystem(tmp_path / str(k))
        fs.fault = faults.fail_at(k, 28, lasting=False)
        folder = tmp_path / str(k) / "run"
        failed = outcome(partial(mirror(url).fetch_newest, folder, fs=fs))
        found = CheckpointStore(folder).load_newest(pytest.fail)
        if failed is None:
            assert faults.value_of(found) == 10
            disk = fs.after_power_cut(tmp_path / "after", "lost")
            assert faults.value_of(CheckpointStore(disk / "run").load(10)) == 10
            break
        assert "No space left" in failed
        assert found is None or fs.names[k - 1] == "sync_folder"  # of the last name, after the rename
        assert not list(folder.glob(".tmp-*")) or fs.names[-1].startswith("remove"), k
    assert 20 <= k < 59


@pytest.mark.parametrize("size", [1, 2])
def test_a_store_with_a_mirror_writes_to_it_and_goes_on_from_it_on_an_empty_disk(tmp_path, faults, url, size):
    def act(folder, do):
        def one(world):
            store = CheckpointStore(folder, world=world, keep_last=1, run_id="a", mirror=mirror(url))
            return do(store, world)

        return faults.in_ranks(size, one)

    save_10 = lambda store, world: store.save(10, faults.parts(world, 10), {"value": 10})  # noqa: E731
    act(tmp_path / "here", save_10)
    assert mirror(url).newest() == 10
    load = lambda store, world: faults.value_of(store.load_newest(pytest.fail))  # noqa: E731
    assert act(tmp_path / "there", load) == [10] * size
    act(tmp_path / "there", lambda store, world: store.save(11, faults.parts(world, 11), {"value": 11}))
    assert act(tmp_path / "here", load) == [11] * size
    save(tmp_path / "here", 12, faults, run_id="a", value=12)
    assert act(tmp_path / "here", load) == [12] * size


@pytest.mark.parametrize("size", [1, 2])
def test_a_mirror_out_of_reach_fails_all_and_the_checkpoint_here_stands(tmp_path, faults, size):
    def act(world):
        remote = Faulty(remote_of("memory://x"), CHANGES + READS)
        remote.fault = lambda call: True
        store = CheckpointStore(tmp_path, world=world, mirror=Mirror("memory://x/y", remote=remote, pauses=()))
        return store.save(10, faults.parts(world, 10), {"value": 10})

    outcomes = faults.in_ranks(size, act)
    assert {type(outcome) for outcome in outcomes} == {StorageError}
    assert faults.value_of(CheckpointStore(tmp_path).load_newest(pytest.fail)) == 10


def test_checkpoints_of_another_run_are_neither_overtaken_nor_deleted(tmp_path, faults, url):
    mirror(url).upload(save(tmp_path / "a", 10, faults, run_id="a"))
    with pytest.raises(RunLockedError, match="step-0000000010 of run a, and this is run b at step 9"):
        mirror(url).upload(save(tmp_path / "b", 9, faults, run_id="b"))
    mirror(url).upload(save(tmp_path / "b", 11, faults, run_id="b"))
    assert sorted({folder for folder, _ in mirror(url)._files()}) == ["step-0000000010", "step-0000000011"]


def test_a_run_with_checkpoints_of_its_own_is_given_none_of_another_run(tmp_path, faults, url):
    mirror(url).upload(save(tmp_path / "a", 10, faults, run_id="a"))
    save(tmp_path / "b", 5, faults, run_id="b")
    store = CheckpointStore(tmp_path / "b", mirror=mirror(url))
    with pytest.raises(RunLockedError, match=r"step-0000000010 of run a, and .* is run b"):
        store.load_newest(pytest.fail)
    assert store.steps() == [5]
    fresh = CheckpointStore(tmp_path / "c", mirror=mirror(url))
    assert fresh.load_newest(pytest.fail).run_id == "a"
    assert fresh.fetched == url
    assert fresh.steps() == [10]
    assert fresh.load_newest(pytest.fail).step == 10
    assert fresh.fetched == ""


def test_a_damaged_folder_and_an_unknown_place_are_refused(tmp_path, faults):
    path = save(tmp_path / "here", 10, faults)
    manifest = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(manifest[:-3])
    with pytest.raises(CheckpointError, match="manifest"):
        mirror("memory://x/z").upload(path)
    with pytest.raises(ConfigError, match="nowhere://x"):
        Mirror("nowhere://x")


def test_places_that_no_checkpoint_can_go_to_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; a mirror is a folder"):
        Mirror(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="nothing can be written there"):
        Mirror("https://somewhere/run")

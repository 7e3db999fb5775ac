"""Checkpoints: what goes in comes out, and a damaged one is said to be."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import struct

import pytest
import safetensors.torch
import torch

from flatmin.errors import DataError, OutputError
from flatmin.lab.runs import checkpoint
from flatmin.lab.runs.checkpoint import STATE, TENSORS, copy_checkpoint, load_checkpoint, save_checkpoint, settle
from tests.killed import killed_at


def test_what_goes_in_comes_out(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "epoch": 3,
        "nested": {"half": shared.half(), "view": shared.t(), "empty": torch.empty(0), "scalar": torch.tensor(1.5)},
        "state": {0: {"step": torch.tensor(4), "on": True, "none": None}, 1: {}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "name": "all"}],
        "twice": [shared, shared],
    }
    save_checkpoint(tmp_path / "last", state)
    loaded = load_checkpoint(tmp_path / "last")
    assert list(loaded) == list(state)
    assert loaded["epoch"] == 3
    assert loaded["groups"] == [{"lr": 0.1, "betas": [0.9, 0.999], "params": [0, 1], "name": "all"}]
    assert loaded["state"][0]["on"] is True
    assert loaded["state"][0]["none"] is None
    assert loaded["state"][1] == {}
    for name, tensor in state["nested"].items():
        assert loaded["nested"][name].dtype == tensor.dtype
        assert torch.equal(loaded["nested"][name], tensor)
    assert all(torch.equal(tensor, shared) for tensor in loaded["twice"])


def test_a_checkpoint_is_a_copy_of_its_moment(tmp_path):
    weight = torch.ones(3)
    save_checkpoint(tmp_path / "last", {"weight": weight})
    weight.zero_()
    assert load_checkpoint(tmp_path / "last")["weight"].tolist() == [1, 1, 1]


def test_a_new_one_takes_the_place_of_the_old_and_leaves_nothing_beside_it(tmp_path):
    for number in range(3):
        save_checkpoint(tmp_path / "last", {"number": number})
    assert load_checkpoint(tmp_path / "last") == {"number": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_no_pickle(tmp_path):
    save_checkpoint(tmp_path / "last", {"weight": torch.ones(3)})
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["state.json", "tensors.safetensors"]
    json.loads((tmp_path / "last" / "state.json").read_text())


def test_a_crash_while_writing_leaves_the_old_one_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last", {"number": 1})

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.json, "dumps", full)
    with pytest.raises(OutputError, match=r"last: the checkpoint could not be written: disk full"):
        save_checkpoint(tmp_path / "last", {"number": 2})
    assert load_checkpoint(tmp_path / "last") == {"number": 1}


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.hook: function cannot be stored"):
        save_checkpoint(tmp_path / "last", {"optimizer": {"hook": test_no_pickle}})
    assert not (tmp_path / "last").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        save_checkpoint(tmp_path / "file" / "last", {})


def test_every_dtype_and_bytes(tmp_path):
    dtypes = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16, torch.uint32]
    dtypes += [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
    state = {str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in dtypes}
    save_checkpoint(tmp_path / "last", {**state, "extra": {"raw": b"\x00\xff", 3: bytearray(b"abc")}})
    loaded = load_checkpoint(tmp_path / "last")
    assert loaded.pop("extra") == {"raw": b"\x00\xff", 3: b"abc"}
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_names_that_would_be_one_are_two(tmp_path):
    state = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}}
    save_checkpoint(tmp_path / "last", state)
    assert load_checkpoint(tmp_path / "last") == state


def test_what_shares_no_memory_is_written_from_where_it_is(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path: (written.update(tensors), path.touch()))
    state = {"large": torch.ones(1000), "view": torch.ones(4, 4)[1:3]}
    save_checkpoint(tmp_path / "last", state)
    assert {name: value.data_ptr() for name, value in written.items()} == {
        name: value.data_ptr() for name, value in state.items()
    }


def test_the_one_that_is_replaced_becomes_the_previous_one(tmp_path):
    last, previous = tmp_path / "last", tmp_path / "previous"
    for number in range(4):
        save_checkpoint(last, {"number": number}, previous=previous)
        assert load_checkpoint(last) == {"number": number}
        assert number == 0 or load_checkpoint(previous) == {"number": number - 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "previous"]


@pytest.mark.parametrize("linked", [True, False])
def test_a_copy_stays_what_it_is_when_the_source_is_replaced(tmp_path, monkeypatch, linked):
    last, best = tmp_path / "last", tmp_path / "best"
    if not linked:

        def refused(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refused)
    for number in range(3):
        save_checkpoint(last, {"number": number})
        if number < 2:
            copy_checkpoint(last, best)
            assert (os.stat(best / STATE).st_ino == os.stat(last / STATE).st_ino) is linked
    assert (load_checkpoint(last), load_checkpoint(best)) == ({"number": 2}, {"number": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]


class TestKilled:
    """At each of its operations on files, in turn."""

    def test_while_saving_there_is_a_whole_one_at_every_moment(self, tmp_path):
        number, news = 0, set()
        while True:
            number += 1
            folder = tmp_path / str(number)
            last, previous = folder / "last", folder / "previous"
            for value in (1, 2):
                save_checkpoint(last, {"v": torch.full((5,), value)}, previous=previous)
            killed = killed_at(number, lambda p=(last, previous): save_checkpoint(p[0], state(3), previous=p[1]))
            settle(last)
            settle(previous)
            assert sorted(path.name for path in folder.iterdir()) == ["last", "previous"]
            found = [int(load_checkpoint(path)["v"][0]) for path in (last, previous)]
            news.add(tuple(found))
            if not killed:
                break
        assert number > 10
        assert found == [3, 2]
        assert news <= {(2, 1), (3, 2), (3, 1)}
        assert {(2, 1), (3, 2)} <= news

    @pytest.mark.parametrize("action", [copy_checkpoint, lambda source, best: save_checkpoint(best, state(3))])
    def test_while_replacing_without_a_previous_one(self, tmp_path, action):
        number, killed, found = 0, True, set()
        save_checkpoint(tmp_path / "source", state(3))
        while killed:
            number += 1
            best = tmp_path / str(number) / "best"
            save_checkpoint(best, state(2))
            killed = killed_at(number, lambda best=best: action(tmp_path / "source", best))
            settle(best)
            assert [path.name for path in best.parent.iterdir()] == ["best"]
            found.add(int(load_checkpoint(best)["v"][0]))
        assert found == {2, 3}

    def test_the_first_one_is_there_or_not(self, tmp_path):
        number, killed = 0, True
        while killed:
            number += 1
            last = tmp_path / str(number) / "last"
            killed = killed_at(number, lambda last=last: save_checkpoint(last, state(1)))
            settle(last)
            if last.exists():
                assert int(load_checkpoint(last)["v"][0]) == 1
        assert last.exists()


def state(value):
    return {"v": torch.full((5,), value)}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    save_checkpoint(tmp_path / "last", {"number": 1}, previous=tmp_path / "previous")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal, so that writing further fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match="last: the checkpoint could not be written"):
            save_checkpoint(tmp_path / "last", {"large": torch.ones(10_000)}, previous=tmp_path / "previous")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(tmp_path / "last") == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


class TestSettle:
    """What may be the only checkpoint goes only if it is sure that it was never whole."""

    @pytest.fixture
    def fresh(self, tmp_path):
        save_checkpoint(tmp_path / "last.new", {"number": 1})
        return tmp_path / "last.new"

    @pytest.mark.parametrize(
        "error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "denied"), MemoryError()]
    )
    def test_one_that_cannot_be_read_at_the_moment_stays(self, fresh, monkeypatch, error):
        def broken(path):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_digest", broken)
            with pytest.raises(DataError, match=r"last.new: .*; it may be the newest: move it away"):
                settle(fresh.with_name("last"))
        settle(fresh.with_name("last"))
        assert load_checkpoint(fresh.with_name("last")) == {"number": 1}

    @pytest.mark.parametrize("rest", [" ", '", "and": "more'])
    def test_one_of_a_newer_flatmin_stays(self, fresh, rest):
        text = (fresh / STATE).read_text().replace('"version": 1, ', f'"version": 2, "x": "{rest}", ')
        (fresh / STATE).write_text(text)
        with pytest.raises(DataError, match="version 2, and this flatmin reads version 1"):
            settle(fresh.with_name("last"))
        assert (fresh / STATE).read_text() == text

    @pytest.mark.parametrize("name", [STATE, TENSORS])
    def test_one_that_was_not_written_to_its_end_goes_and_the_old_one_comes_back(self, fresh, name):
        save_checkpoint(fresh.with_name("last.old"), {"number": 0})
        (fresh / name).write_bytes((fresh / name).read_bytes()[:-1])
        settle(fresh.with_name("last"))
        assert load_checkpoint(fresh.with_name("last")) == {"number": 0}
        assert [path.name for path in fresh.parent.iterdir()] == ["last"]

    def test_an_old_one_comes_back_unread(self, fresh):
        fresh.rename(fresh.with_name("last.old"))
        (fresh.with_name("last.old") / STATE).write_text("of another version")
        settle(fresh.with_name("last"))
        assert (fresh.with_name("last") / STATE).read_text() == "of another version"


class TestDurable:
    @pytest.fixture
    def synced(self, monkeypatch):
        paths = []
        monkeypatch.setattr(checkpoint, "sync", paths.append)
        return paths

    def test_the_first_one_syncs_the_folder_above_its_own_too(self, tmp_path, synced):
        last = tmp_path / "checkpoints/last"
        fresh = last.with_name("last.new")
        for above in ([tmp_path], []):
            save_checkpoint(last, {})
            assert synced == [fresh / TENSORS, fresh / STATE, fresh, last.parent, *above]
            synced.clear()

    def test_a_copy(self, tmp_path, synced):
        save_checkpoint(tmp_path / "last", {}, durable=False)
        assert synced == []
        copy_checkpoint(tmp_path / "last", tmp_path / "best", durable=False)
        assert synced == []
        copy_checkpoint(tmp_path / "last", tmp_path / "best")
        assert synced == [tmp_path / "best.new", tmp_path]


class TestDamaged:
    @pytest.fixture
    def folder(self, tmp_path):
        save_checkpoint(tmp_path / "last", {"weight": torch.ones(300), "epoch": 1})
        return tmp_path / "last"

    @pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
    def test_a_file_is_missing(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(DataError, match="no checkpoint there"):
            load_checkpoint(folder)

    def test_all_is_missing(self, tmp_path):
        with pytest.raises(DataError, match="nowhere: no checkpoint there"):
            load_checkpoint(tmp_path / "nowhere")

    @pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
    @pytest.mark.parametrize("keep", [0, 0.5, 0.99])
    def test_a_file_is_cut_short(self, folder, name, keep):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])
        with pytest.raises(DataError, match="last: the checkpoint is damaged"):
            load_checkpoint(folder)

    @pytest.mark.parametrize(
        "content", ["[", '{"items": [["weight", {"tensor": "other"}]]}', '{"items": 3}', '{"a": 1}']
    )
    def test_the_state_does_not_fit(self, folder, content):
        (folder / "state.json").write_text(content)
        with pytest.raises(DataError, match="damaged"):
            load_checkpoint(folder)

    @pytest.mark.parametrize("name", [STATE, TENSORS])
    def test_any_byte_that_changes_is_found(self, folder, name):
        whole, draw = (folder / name).read_bytes(), random.Random(0)
        places = [*range(min(len(whole), 250)), *(draw.randrange(len(whole)) for _ in range(150)), len(whole) - 1]
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= draw.randrange(1, 256)
            (folder / name).write_bytes(changed)
            with pytest.raises(DataError, match=r"last: the checkpoint is damaged: (state|tensors)"):
                load_checkpoint(folder)
        (folder / name).write_bytes(whole)
        load_checkpoint(folder)

    @pytest.mark.parametrize("name", [STATE, TENSORS])
    def test_any_length_but_its_own_is_found(self, folder, name):
        whole = (folder / name).read_bytes()
        for length in [*range(0, len(whole), 7), len(whole) - 1]:
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(DataError, match=f"damaged: {name}: "):
                load_checkpoint(folder)
        for tail in (b"\n", b"}", bytes(100), whole):
            (folder / name).write_bytes(whole + tail)
            with pytest.raises(DataError, match=f"damaged: {name}: "):
                load_checkpoint(folder)

    @pytest.mark.parametrize("name", [STATE, TENSORS])
    def test_files_of_something_else(self, folder, name):
        png = b"\x89PNG\r\n\x1a\n" + bytes(100)
        for content in (pickle.dumps({"a": Unpickled()}), png, b"[" * 10**6, b"{}", b'{"format": "other"}', bytes(300)):
            (folder / name).write_bytes(content)
            with pytest.raises(DataError, match=f"damaged: {name}: "):
                load_checkpoint(folder)

    @pytest.mark.parametrize("name", [STATE, TENSORS])
    def test_no_file_at_all(self, folder, name):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(DataError, match=f"damaged: {name}: it is not a file"):
            load_checkpoint(folder)
        (folder / name).rmdir()
        os.mkfifo(folder / name)  # reading it would never end
        with pytest.raises(DataError, match=f"damaged: {name}: it is not a file"):
            load_checkpoint(folder)

    def test_a_file_in_the_place_of_the_folder(self, tmp_path):
        (tmp_path / "last").write_text("")
        with pytest.raises(DataError, match=r"last: the checkpoint cannot be read: .*Not a directory"):
            load_checkpoint(tmp_path / "last")

    @pytest.mark.parametrize("name", [STATE, TENSORS])
    def test_an_absurd_size(self, folder, name):
        with open(folder / name, "r+b") as file:
            file.truncate(2**40)  # a hole, which takes no room
        with pytest.raises(DataError, match=f"damaged: {name}: it has 1099511627776 bytes"):
            load_checkpoint(folder)

    def test_a_version_that_is_not_known(self, folder):
        (folder / STATE).write_text((folder / STATE).read_text().replace('"version": 1', '"version": 2'))
        with pytest.raises(DataError, match="version 2, and this flatmin reads version 1"):
            load_checkpoint(folder)


class Unpickled:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def forge(folder, state, tensors):
    """Writes a checkpoint whose digests are right, whatever it holds."""
    folder.mkdir(exist_ok=True)
    (folder / TENSORS).write_bytes(tensors)
    digests = [hashlib.sha256(content).hexdigest() for content in (tensors, state)]
    head = f'{{"format": "flatmin checkpoint", "version": 1, "tensors": "{digests[0]}", "bytes": {len(tensors)}, '
    (folder / STATE).write_bytes(head.encode() + f'"digest": "{digests[1]}", "state": '.encode() + state + b"}\n")


WEIGHT = safetensors.torch.save({"weight": torch.ones(3)})


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text.encode() + data


def test_a_forged_one_is_read_if_it_is_right(tmp_path):
    forge(tmp_path / "last", b'{"items": [["w", {"tensor": "weight"}]]}', WEIGHT)
    assert load_checkpoint(tmp_path / "last")["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "state",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"items": [["a", ' * 20_000,
        b'{"items": [["a", ' * 900 + b"1" + b"]]}" * 900,
        b"",
        b"\xff\xfe",
        b"nul",
        b"9" * 5000,
        b"{}",
        b'{"items": 3}',
        b'{"items": [3]}',
        b'{"items": [[[], 3]]}',
        b'{"items": [["a", 1, 2]]}',
        b'{"tensor": "other"}',
        b'{"tensor": []}',
        b'{"tensor": {"tensor": "weight"}}',
        b'[{"tensor": "weight"}, {"tensor": "weight"}]',
        b'{"bytes": "?"}',
        b'{"bytes": 3}',
        b'{"complex": {"tensor": "weight"}}',
        b'{"complex": 3}',
        b"3",  # and the tensor that is there is not in the state
    ],
    ids=lambda state: state[:30].decode(errors="replace"),
)
def test_a_hostile_state(tmp_path, state):
    forge(tmp_path / "last", state, WEIGHT)
    with pytest.raises(DataError, match="last: the checkpoint is damaged: "):
        load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize(
    "tensors",
    [
        b"",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**8) + b"{",
        header("[" * 100_000),
        header('{"weight": ' * 50_000),
        header("{}"),
        header("{}", bytes(100)),
        header('{"weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', bytes(8)),
        header('{"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}', bytes(12)),
        header('{"weight": {"dtype": "F99", "shape": [3], "data_offsets": [0, 12]}}', bytes(12)),
        header('{"weight": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}', bytes(12)),
        header('{"weight": {"dtype": "F32", "shape": [9223372036854775807, 4], "data_offsets": [0, 12]}}', bytes(12)),
        header('{"weight": {"dtype": "F32", "shape": [0, 18446744073709551615], "data_offsets": [0, 0]}}'),
        header('{"weight": {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}}', bytes(12)),
        header('{"weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 99999999999]}}', bytes(12)),
        safetensors.torch.save({"weight": torch.ones(3), "more": torch.ones(3)}),
        safetensors.torch.save({"other": torch.ones(3)}),
        pickle.dumps({"weight": Unpickled()}),
    ],
    ids=range(18),
)
def test_hostile_tensors(tmp_path, tensors):
    forge(tmp_path / "last", b'{"tensor": "weight"}', tensors)
    with pytest.raises(DataError, match="last: the checkpoint is damaged: "):
        load_checkpoint(tmp_path / "last")

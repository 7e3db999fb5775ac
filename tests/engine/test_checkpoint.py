"""Checkpoints: what goes in comes out, and a damaged one is said to be."""

import json

import pytest
import torch

from flatmin.engine import checkpoint
from flatmin.engine.checkpoint import load_checkpoint, save_checkpoint
from flatmin.errors import DataError, OutputError


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

"""What runs logged, read back as TensorBoard reads it."""

import importlib
import json

import pytest

from flatmin.errors import DataError, MissingDependencyError, OutputError
from flatmin.lab.report import write_tensorboard

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder):
    found = accumulators.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_every_number_of_every_epoch_a_run_for_each_row_and_seed(comparison, tmp_path):
    written = write_tensorboard([comparison(("base", "sam rho=0.1"), seeds=2)], tmp_path / "events")
    assert [path.name for path in written] == ["base-seed0", "base-seed1", "sam-rho=0.1-seed0", "sam-rho=0.1-seed1"]
    lines = (tmp_path / "comparison" / "runs" / "sam-rho=0.1-seed1" / "metrics.jsonl").read_text().splitlines()
    wanted = {}
    for line in map(json.loads, lines):
        for name, value in line.items():
            if name != "epoch" and value is not None:
                wanted.setdefault(name, []).append((line["epoch"] + 1, pytest.approx(value)))
    assert scalars(written[-1]) == wanted
    assert [step for step, _ in wanted["test_loss"]] == [1, 3, 4]


def test_a_second_call_replaces_the_first_and_nothing_else(single, tmp_path):
    folder = single()
    (target,) = write_tensorboard([folder], tmp_path / "events")
    (target / "events.out.tfevents.1.other.2.3").write_bytes(b"")
    write_tensorboard([folder], tmp_path / "events")
    assert len(list(target.iterdir())) == 2
    assert len(scalars(target)["train_loss_vanilla"]) == 4


def test_several_comparisons_stay_apart_and_labels_inside(comparison, single, tmp_path):
    foreign = single()
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "method": "../../a/b"}))
    written = write_tensorboard([comparison(seeds=1), comparison(seeds=1, name="second"), foreign], tmp_path / "events")
    assert len(set(written)) == len(written) == 7
    assert {path.resolve().parent for path in written} == {tmp_path / "events"}


def test_what_cannot_be_done_is_said(comparison, single, tmp_path, monkeypatch):
    folder = comparison()
    alone = (folder / "results.json").rename(tmp_path / "alone.json")
    with pytest.raises(DataError, match=r"alone\.json: holds no run's metrics"):
        write_tensorboard([alone], tmp_path / "events")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_tensorboard([single()], tmp_path / "file")

    def missing(name, *rest):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"'tensorboard' is needed.*flatmin\[tensorboard\]"):
        write_tensorboard([single("saf")], tmp_path / "events")

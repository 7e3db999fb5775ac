"""What is left of a network after training: rounding as torchao's, the size of the noise, and nothing else touched."""

import copy
import json

import pytest
import torch
from torch import nn

from flatmin.errors import ExperimentError, InvalidArgumentError
from flatmin.lab.problems.checked import shifted
from flatmin.lab.problems.load import load_problem
from flatmin.lab.results.after import AFTER
from flatmin.lab.runs import after, measure_after, open_saved
from flatmin.lab.runs.after import DRAWS, _weights, measured_after, noisy, rounded, write_after
from flatmin.lab.runs.run import train_run


@pytest.fixture
def saved(tmp_path, make_run, experiment):
    """Trains a run and opens it."""

    def make(method="base"):
        (tmp_path / "run").mkdir()
        train_run(make_run(method, experiment=experiment), tmp_path / "run")
        return open_saved(tmp_path / "run")

    return make


class TestRounded:
    def test_by_hand(self):
        weight = torch.tensor([[0.6, -0.75, 0.2, 0.0], [15.0, 6.0, -16.0, -1.0]])
        want = torch.tensor([[0.5, -1.0, 0.0, 0.0], [32 / 3, 32 / 3, -32 / 3 * 2, 0.0]])  # steps 1/2 and 32/3
        assert torch.allclose(rounded(weight, 2), want)

    def test_channels_of_zeros_stay_and_the_dtype_does(self):
        weight = torch.zeros(2, 3, 1, 1, dtype=torch.float64)
        assert torch.equal(rounded(weight, 2), weight)
        assert rounded(weight, 2).dtype == torch.float64


def test_noise_has_the_norm_that_was_asked_for_and_the_same_draw_for_all():
    weight = 3 * torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    made = [noisy(weight, 0.4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert ((made[0] - weight).norm() / weight.norm()).item() == pytest.approx(0.4, rel=0.02)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_is_a_weight():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    )
    shapes = {tuple(each.shape) for each in _weights(network)}
    assert shapes == {(4, 3, 3, 3), (5, 4)}  # no biases, no norm's scales, no lengths of weight norm


@pytest.mark.parametrize("method", ["base", "ema"])
def test_every_measure_is_written_and_nothing_else_is_touched(saved, method):
    run = saved(method)
    before = copy.deepcopy(run.model.state_dict())
    steps, random = [], torch.get_rng_state()
    found = write_after(run, on_step=lambda: steps.append(1))
    assert list(found) == list(AFTER)
    assert all(0 <= value <= 1 for value in found.values())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    written = json.loads((run.folder / "after.json").read_text())
    assert written["test_accuracy"] == found
    assert {len(written["draws"][name]) for name in found if "noise" in name} == {DRAWS}
    assert len(steps) == 1 + 4 + 3 * DRAWS + 4  # as it is, widths, draws, and the steps of an epoch of the fine-tune
    words = []
    again = measure_after(run.folder, on_progress=words.append)
    assert (again.test_accuracy, again.path, again.method) == (found, run.folder / "after.json", method)
    assert (words[0], len(words)) == (f"{run.name}: weights rounded to 8 bits", 4 + 3 + 2)
    assert measured_after(run.folder, 3) == found
    assert measured_after(run.folder, 2) is None  # another network
    with open(run.folder / "metrics.jsonl") as lines:
        accuracy = json.loads(lines.readlines()[-1])["test_accuracy"]
    assert found["rounded_8"] == pytest.approx(accuracy, abs=0.1)  # the network that was evaluated


def test_statistics_are_made_anew_and_the_fine_tune_learns_the_shifted_set(saved, monkeypatch):
    """Of inputs whose sign is changed, the largest of three becomes the smallest."""
    monkeypatch.setattr(after, "TUNED_EPOCHS", 20)
    monkeypatch.setattr(after, "TUNED_LR", 1)
    run = saved()
    for name, value in run.model.state_dict().items():
        if name.endswith("running_mean"):
            value.fill_(1e6)  # with which nothing would be right but one class
    found = write_after(run)
    assert found["rounded_8"] > 0.5
    assert found["fresh"] > 0.5
    assert found["tuned_shifted"] > 0.7
    assert found["tuned_original"] < 0.5


def test_of_a_network_without_statistics_fresh_ones_change_nothing(saved, experiment):
    with open(experiment, "a") as file:
        file.write("\ndef model():\n    return nn.Linear(4, 3)\n")
    run = saved()
    with open(run.folder / "metrics.jsonl") as lines:
        assert write_after(run)["fresh"] == json.loads(lines.readlines()[-1])["test_accuracy"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda written: written["test_accuracy"].pop("fresh"),  # as before it was measured
        lambda written: written["test_accuracy"].update(noise_0=1, rounded_2=None),
        lambda written: written["test_accuracy"].update(rounded_2=7),
        lambda written: written.update(test_accuracy=[]),
        lambda written: written.update(rule="another"),
        lambda written: written.update(checkpoint="run/best"),
        lambda written: written.clear(),
    ],
)
def test_what_was_measured_is_taken_only_as_a_whole_and_by_the_same_rule(tmp_path, damage):
    written = {"test_accuracy": dict.fromkeys(AFTER, 0.5), "rule": after.RULE}
    written |= {"checkpoint": tmp_path.name, "checkpoint_epoch": 3}
    (tmp_path / "after.json").write_text(json.dumps(written))
    assert measured_after(tmp_path, 3) == written["test_accuracy"]
    damage(written)
    (tmp_path / "after.json").write_text(json.dumps(written))
    assert measured_after(tmp_path, 3) is None


class TestShift:
    @pytest.fixture
    def problem(self, make_run, experiment):
        """Loads the problem of an experiment file that has a ``shift`` with this body."""

        def load(body):
            with open(experiment, "a") as file:
                file.write(f"\ndef shift(x):\n    return {body}\n")
            return load_problem(make_run("base", experiment=experiment).recipe, 0)

        return load

    def test_an_experiment_file_defines_its_own(self, problem):
        x = torch.randn(5, 4)
        assert torch.equal(shifted(problem("x + 1"), x), x + 1)

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("x[:, :2]", r"shift\(x\) must return a batch of the same shape, \(5, 4\), got \(5, 2\)"),
            ("x.nothing", r"no attribute 'nothing' \(in shift\(x\), which must return a batch of inputs"),
        ],
    )
    def test_one_that_cannot_be(self, problem, body, said):
        with pytest.raises(ExperimentError, match=said):
            shifted(problem(body), torch.randn(5, 4))

    def test_inputs_without_a_sign_need_one(self, make_run, experiment):
        problem = load_problem(make_run("base", experiment=experiment).recipe, 0)
        with pytest.raises(InvalidArgumentError, match=r"these are torch.int64: define shift\(x\)"):
            shifted(problem, torch.ones(5, 4, dtype=torch.int64))

"""Time per step: interleaved, the same number for all, and with the trajectory loss at work, by a false clock."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from flatmin.indices import with_indices
from flatmin.lab.comparison import timing
from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.timing import StepTimes, measure_rows, measure_steps


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def stub(name, seconds, clock, order):
    """A trainer whose step takes so many seconds of the false clock, or in turn each of several."""
    costs = itertools.cycle(seconds if isinstance(seconds, list) else [seconds])

    def step(*batch):
        order.append(name)
        clock.now += next(costs)

    return SimpleNamespace(
        trajectory=None,
        device=torch.device("cpu"),
        model=torch.nn.Linear(1, 1),
        set_epoch=lambda epoch: None,
        step=step,
        make_statistics=lambda: None,
    )


def first_batch(trainer):
    index, (x, y) = next(iter(with_indices(trainer.loader)))
    return index, x, y


def test_the_ratio_is_that_of_the_steps(clock):
    trainers = [stub(name, cost, clock, []) for name, cost in (("base", 0.1), ("slow", 0.23), ("quick", 0.05))]
    times = measure_steps(trainers, (None, None, None), seconds=0)
    assert [each.ratio(times[0]) for each in times] == pytest.approx([1, 2.3, 0.5])
    assert [each.median() for each in times] == pytest.approx([0.1, 0.23, 0.05])


def test_a_machine_that_slows_down_slows_all_of_them(clock):
    costs = [0.1 * 1.1**number for number in range(40)]
    trainers = [stub("base", costs, clock, []), stub("double", [2 * cost for cost in costs], clock, [])]
    base, double = measure_steps(trainers, (None, None, None), seconds=0)
    assert double.ratio(base) == pytest.approx(2)


def test_one_slow_step_does_not_move_the_ratio(clock):
    trainers = [stub("base", 0.1, clock, []), stub("other", [0.1] * 7 + [50.0], clock, [])]
    base, other = measure_steps(trainers, (None, None, None), seconds=0)
    assert max(other.seconds) == pytest.approx(50)
    assert other.ratio(base) == pytest.approx(1)


@pytest.mark.parametrize("interval", [2, 3])
def test_a_loss_in_every_kth_step_costs_its_mean(clock, interval):
    trainers = [stub("base", 0.1, clock, []), stub("mesa", [0.4] + [0.1] * (interval - 1), clock, [])]
    trainers[1].trajectory = SimpleNamespace(interval=interval)
    base, mesa = measure_steps(trainers, (None, None, None), seconds=0)
    assert mesa.ratio(base) == pytest.approx(1 + 3 / interval)


@pytest.mark.parametrize("interval", [1, 2])
def test_of_a_block_of_steps_only_the_end_is_waited_for(clock, monkeypatch, interval):
    said = []
    trainer = stub("a", 0.1, clock, said)
    trainer.set_epoch = said.append
    trainer.trajectory = SimpleNamespace(interval=interval, lag=2, start_epoch=5)
    monkeypatch.setattr(timing, "synchronize", lambda device: said.append("wait"))
    (times,) = measure_steps([trainer], (None, None, None), seconds=0, block=3, warm_up=1)
    assert times.median() == pytest.approx(0.1)
    first = said[: 6 + 3 * interval - 1]
    steps = ["a"] * interval
    assert first == [3, "wait", *steps, 5, *steps, 7, *steps, "wait"]
    assert said[len(first)] == 9


def test_the_steps_are_interleaved_in_an_order_drawn_anew(clock):
    order = []
    measure_steps([stub(name, 0.1, clock, order) for name in "abc"], (None, None, None), seconds=0)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) >= 4


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 10), (2.1, 10), (9, 30)])
def test_it_measures_as_long_as_it_is_told_and_ten_rounds_at_least(clock, seconds, rounds):
    order, said = [], []
    trainers = [stub("a", 0.1, clock, order), stub("b", 0.2, clock, order)]
    times = measure_steps(trainers, (None, None, None), seconds=seconds, on_round=said.append)
    assert [len(each.seconds) for each in times] == pytest.approx([rounds] * 2, abs=1)
    assert len(times[0].seconds) == len(times[1].seconds)
    assert len(order) == 2 * (len(times[0].seconds) + 2)  # two rounds to warm up
    assert said[-1] == len(times[0].seconds)


def test_the_warm_up_is_not_counted(clock):
    (times,) = measure_steps([stub("a", [9.0, 9.0] + [0.1] * 50, clock, [])], (None, None, None), seconds=0)
    assert max(times.seconds) == pytest.approx(0.1)


@pytest.mark.parametrize("settings", [{}, {"start_epoch": 0}, {"start_epoch": 7, "lag": 2}, {"lag": 5}], ids=str)
@pytest.mark.parametrize("method", ["saf", "mesa"])
def test_the_trajectory_loss_is_at_work_in_every_timed_step(make_trainer, method, settings, recwarn):
    if method == "mesa":
        settings = {name: value for name, value in settings.items() if name != "lag"}
    trainer, penalties = make_trainer(method, settings={"start_epoch": 5, **settings}), []
    step = trainer.step

    def noting(*batch):
        found = step(*batch)
        penalties.append(float(found.loss - found.vanilla))

    trainer.step = noting
    (times,) = measure_steps([trainer], first_batch(trainer), seconds=0)
    assert len(penalties) == len(times.seconds) + 2
    assert all(penalty > 0 for penalty in penalties[2:])
    assert not [each for each in recwarn if "first samples" in str(each.message)]  # it has a past, as in training


def test_the_whole_step_is_timed_in_training_mode(make_trainer):
    trainer, calls = make_trainer("base"), []
    trainer.model.register_forward_hook(lambda model, inputs, output: calls.append(model.training))
    before = trainer.model[1].weight.clone()
    trainer.model.eval()
    measure_steps([trainer], first_batch(trainer), seconds=0)
    assert calls == [True] * 12
    assert not torch.equal(before, trainer.model[1].weight)


def test_ratios_pair_the_rounds():
    assert StepTimes([2.0, 40.0, 6.0]).ratio(StepTimes([1.0, 20.0, 3.0])) == 2


def test_rows_of_which_not_all_steps_pay_are_timed_in_both_kinds(monkeypatch):
    rows = make_rows(["base", "sam", "late_sam", "look_sam"], {}, epochs=5)
    monkeypatch.setattr(timing, "measure_steps", lambda trainers, batch: [StepTimes([float(n)]) for n in range(6)])
    costs, trainers = measure_rows(rows, lambda row: row, (None, None, None))
    assert [(c.full.median(), c.plain and c.plain.median()) for c in costs] == [(0, None), (1, None), (2, 3), (4, 5)]
    assert [row.settings.get("when") for row in trainers] == [None, "always", "always", "always"]


def test_a_target_with_fresh_statistics_has_them_before_it_is_timed(make_trainer, recwarn):
    trainer = make_trainer("mesa", settings={"statistics": "fresh", "start_epoch": 0}, epochs=8)
    trainer.step(*first_batch(trainer))  # after which statistics are wanted
    measure_steps([trainer], first_batch(trainer), seconds=0)
    assert not recwarn.list

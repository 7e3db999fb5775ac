"""Schedules: in which steps the second pass runs, by a function or by a class of the user's."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import InvalidArgumentError, NonFiniteGradientWarning
from flatmin.optim import Adaptive, Every, Schedule, schedules
from tests.contracts._optimizers import EVERY, Training, assert_same
from tests.optim._problem import Problem

TWO = [name for name in EVERY if EVERY[name].max_passes == 2]
two_passes = pytest.mark.parametrize("name", TWO)


class Budget(Schedule):
    """The second pass runs where the gradient is not much shorter than those of the past, until a budget is spent."""

    def __init__(self, budget: int) -> None:
        self.budget, self.total, self.steps, self.asked = budget, 0.0, 0, []

    def before(self, step: int) -> bool | None:
        return None if self.budget else False

    def after(self, step: int, gradient_norm: float) -> bool:
        self.asked.append((step, gradient_norm))
        return self._long(gradient_norm)

    def observe(self, step: int, gradient_norm: float) -> None:
        assert step == self.steps
        self.budget -= bool(self.budget and self._long(gradient_norm))
        self.total, self.steps = self.total + gradient_norm, self.steps + 1

    def state_dict(self) -> dict:
        return {"budget": self.budget, "total": self.total, "steps": self.steps}

    def load_state_dict(self, state_dict: dict) -> None:
        self.budget, self.total, self.steps = (state_dict[key] for key in ("budget", "total", "steps"))

    def _long(self, gradient_norm: float) -> bool:
        return gradient_norm * self.steps >= 0.1 * self.total


def test_the_module_and_the_package_have_the_same():
    assert all(getattr(schedules, name) is getattr(flatmin.optim, name) for name in schedules.__all__)
    assert all(issubclass(getattr(schedules, name), Schedule) for name in schedules.__all__ if name != "RhoByLR")


@two_passes
def test_a_schedule_of_the_users_decides_sees_the_gradient_and_is_resumed(name):
    """Through a file, in the middle of its budget; by itself it would begin anew."""
    training = Training(name, when=Budget(7))
    training.step(5)
    when = training.optimizer._when
    assert when.steps == 5
    assert 0 < when.budget < 7
    assert when.asked[0][1] > 0
    file = io.BytesIO()
    torch.save(training.optimizer.state_dict(), file)
    file.seek(0)
    model = copy.deepcopy(training.model.state_dict())
    done, losses = training.passes, training.step(6)
    state = torch.load(file, weights_only=True)
    resumed, forgetful = Training(name, when=Budget(7)), Training(name, when=Budget(7))
    for each in (resumed, forgetful):
        each.model.load_state_dict(copy.deepcopy(model))
        each.optimizer.load_state_dict(copy.deepcopy(state))
    assert resumed.step(6) == losses
    assert resumed.passes == training.passes - done
    assert_same(resumed.state(), training.state())
    assert when.budget == 0
    forgetful.optimizer._when.load_state_dict(Budget(7).state_dict())
    forgetful.optimizer._when.steps = 5
    forgetful.step(6)
    assert forgetful.passes > resumed.passes


@two_passes
def test_it_learns_nothing_of_a_step_that_is_dropped(name):
    training = Training(name, when=Budget(4))
    training.step(2)
    before = training.optimizer._when.state_dict()
    training.factor[training.passes + 1] = float("nan")
    with pytest.warns(NonFiniteGradientWarning):
        training.step()
    assert training.optimizer._when.state_dict() == before


@pytest.mark.parametrize("when", [lambda: Budget(3), lambda: Adaptive(9)])
def test_with_a_plain_state_it_begins_anew_as_it_was_made(when):
    plain, training, fresh = Problem(), Training("SAM", when=when()), when()
    plain.steps(base := plain.sgd(), 2)
    training.step(3)
    assert training.optimizer._when.state_dict() != fresh.state_dict()
    model = training.model
    state = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
    training.optimizer.load_state_dict(state)
    assert training.optimizer._when.state_dict() == fresh.state_dict()
    assert training.optimizer.state_dict()["flatmin"]["step"] == 0
    assert base.state_dict()["state"]


def test_one_that_always_runs_or_never_has_as_many_passes():
    class Fixed(Schedule):
        def __init__(self, answer):
            self.answer = answer

        def before(self, step):
            return self.answer

    for answer, calls in ((True, 8), (False, 4), (torch.tensor(True), 8), (torch.tensor(False), 4)):
        training = Training("SAM", when=Fixed(answer))
        assert training.optimizer._begin(None).second_runs is bool(answer)
        training.step(4)
        assert training.passes == calls


def test_schedules_combine_in_a_plain_function():
    training = Training("SAM", when=lambda step: Every(2)(step) or step > 3)
    training.step(6)
    assert training.passes == 6 + 4
    assert Every(2)(3) is False
    assert Adaptive(5)(3) is None


class Half(Schedule):
    def before(self, step):
        return True

    def state_dict(self):
        return {"half": 1}


class Silent(Schedule):
    def before(self, step):
        return None


class Undecided(Silent):
    def after(self, step, gradient_norm):
        pass


class Outside:
    """Has a state, and is no Schedule."""

    def __call__(self, step):
        return True

    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (5, r"^when must be a function of the step index.*Schedule such as Every\(5\), got 5"),
        ("every:5", r"^when must be a function of the step index.*got 'every:5'"),
        (Every, r"^when must be a function of the step index.*got <class.*Every"),
        (lambda: True, r"^when must take one argument, the index of the step, got <function"),
        (lambda step, norm: True, r"^when must take one argument, the index of the step"),
        (functools.partial(lambda step: True, 3), r"^when must take one argument"),
        (Half(), "^when: Half has one of state_dict and load_state_dict; write both"),
        (Outside(), "^when: the state of Outside would not be saved; derive the class from .*Schedule"),
        (nn.Linear(1, 1), "^when: the state of Linear would not be saved"),
    ],
)
def test_a_bad_when_is_explained(when, message):
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.SAM(Problem().sgd(), when=when)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (lambda step: None, r"^when returned None for step 2; return True"),
        (Silent(), r"^when: Silent.before\(2\) returned None, and Silent has no after\(step, gradient_norm\)"),
        (Undecided(), r"^when returned None for step 2; return True"),
    ],
)
def test_one_that_does_not_decide_is_explained_and_changes_nothing(when, message):
    training = Training("SAM")
    training.step(2)
    state = training.state()
    training.model[1].eval()
    training.optimizer._when = flatmin.SAM(Problem().sgd(), when=when)._when
    with pytest.raises(InvalidArgumentError, match=message):
        training.step()
    assert_same(training.state(), state)


def test_before_is_all_that_a_schedule_must_have():
    class Nothing(Schedule):
        pass

    with pytest.raises(TypeError, match="before"):
        Nothing()


@pytest.mark.parametrize("when", [max, functools.partial(lambda k, step: step % k == 0, 2), Every(2).before])
def test_functions_of_all_kinds_do(when):
    """Of max, which is written in C, Python knows no signature."""
    assert flatmin.SAM(Problem().sgd(), when=when)._when

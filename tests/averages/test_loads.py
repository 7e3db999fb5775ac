"""A network whose weights are loaded, and whose average is not, is said once to have an average of other weights."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import FlatminWarning

MAKERS = {
    "EMA": lambda model: flatmin.EMA(model, decay=0.8),
    "SwitchEMA": lambda model: flatmin.SwitchEMA(model, decay=0.8),
    "LAWA": lambda model: flatmin.LAWA(model, k=2),
    "MESA": lambda model: flatmin.MESA(model, decay=0.8, start_epoch=0),
}
every = pytest.mark.parametrize("name", MAKERS)
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Run:
    """A training by hand, whose average is moved by hand or attached."""

    def __init__(self, name, seed=0, attached=False):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.average, self.attached = MAKERS[name](self.model), attached
        if attached:
            self.average.attach(self.optimizer)

    def steps(self, count=2):
        """Returns what was warned of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                self.optimizer.zero_grad()
                self.model(X).square().mean().backward()
                self.optimizer.step()
                if not self.attached or isinstance(self.average, flatmin.LAWA):
                    self.average.update()
        return caught

    def state(self):
        return copy.deepcopy([each.state_dict() for each in (self.model, self.optimizer, self.average)])


def check(caught, name):
    (warning,) = caught
    assert issubclass(warning.category, FlatminWarning)
    assert f"after this {name} was made or last updated" in str(warning.message)
    assert warning.filename == __file__


@every
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_weights_that_are_loaded_alone_are_said_once(name, trained, attached):
    """Into a new run, whose average is that of the network it was made with, and into one that has gone on."""
    saved, run = Run(name), Run(name, seed=1, attached=attached)
    assert not saved.steps()
    assert not run.steps(2 if trained else 0)
    run.model.load_state_dict(saved.model.state_dict())
    check(run.steps(), name)
    run.model.load_state_dict(saved.model.state_dict())
    assert not run.steps()


@every
def test_a_part_that_is_loaded_alone_is_said_once_and_put_back_is_no_other(name):
    saved, run = Run(name), Run(name, seed=1)
    saved.steps(), run.steps()
    run.model[0].load_state_dict(run.model[0].state_dict())
    assert not run.steps()
    run.model[0].load_state_dict(saved.model[0].state_dict())
    check(run.steps(), name)
    run.model[2].load_state_dict(saved.model[2].state_dict())
    assert not run.steps()


def test_a_part_that_two_networks_share_is_said_of_both():
    shared = nn.Linear(4, 4)
    averages = [flatmin.EMA(nn.Sequential(shared, nn.Linear(4, 2)), decay=0.8) for _ in range(2)]
    shared.load_state_dict(nn.Linear(4, 4).state_dict())
    for average in averages:
        with pytest.warns(FlatminWarning, match="after this EMA was made"):
            average.update()


@every
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("attached", [False, True])
def test_with_its_state_it_is_the_uninterrupted_run_in_silence(name, order, attached):
    saved, run = Run(name, attached=attached), Run(name, seed=1, attached=attached)
    saved.steps()
    state = saved.state()
    for part in order:
        if part == 2 and attached:
            continue  # the optimizer has it
        (run.model, run.optimizer, run.average)[part].load_state_dict(state[part])
    assert not run.steps()
    saved.steps()
    for ours, theirs in zip(run.state()[2].values(), saved.state()[2].values(), strict=True):
        assert torch.equal(ours, theirs)


@every
def test_weights_that_are_put_back_are_no_others(name):
    run = Run(name)
    run.steps()
    for _ in range(2):
        own, network = copy.deepcopy(run.model.state_dict()), getattr(run.average, "average", run.average).module
        run.model.load_state_dict(network.state_dict(), strict=False)
        run.average.eval()
        run.model.load_state_dict(own)
        assert not run.steps()
    run.model.load_state_dict(Run(name, seed=1).model.state_dict())
    run.model.eval()(X)  # an evaluation at the end says nothing
    if name != "MESA":
        run.average(X)


@every
def test_to_go_on_from_the_average_is_silent(name):
    """By hand, as SwitchEMA's switch does."""
    run = Run(name, attached=True)
    for _ in range(3):
        assert not run.steps()
        run.model.load_state_dict(getattr(run.average, "average", run.average).module.state_dict())


@pytest.mark.parametrize("around", [nn.Sequential, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_whoever_loads(around):
    run, other = Run("EMA"), Run("EMA", seed=1)
    around(run.model).load_state_dict(around(other.model).state_dict())
    check(run.steps(), "EMA")


def test_copies_follow_their_own_network_and_a_pickle_of_one_needs_nothing_of_flatmin():
    run, other = Run("EMA"), Run("EMA", seed=1).model.state_dict()
    run.steps()
    twin = copy.deepcopy(run)
    assert not twin.steps()
    run.model.load_state_dict(other)
    assert not twin.steps()
    check(run.steps(), "EMA")
    twin.model.load_state_dict(other)
    check(twin.steps(), "EMA")
    stored = pickle.dumps(run.model)
    assert b"flatmin.averages" not in stored
    pickle.loads(stored).load_state_dict(other)


@every
def test_an_average_that_moves_twice_a_step_is_said_once(name):
    run = Run(name, attached=True)
    run.attached = False  # it is updated by hand too
    caught = run.steps()
    assert len(caught) == (name != "LAWA")  # which no optimizer updates
    assert all(f"update() was called of a {name} that is attached" in str(each.message) for each in caught)
    assert not run.steps()

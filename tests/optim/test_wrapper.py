"""What is the base optimizer's is the wrapper's, whatever is done to either, and torch's hooks work on both."""

import collections
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torchs

import flatmin
from flatmin.errors import InvalidArgumentError, StateDictError
from tests.contracts._optimizers import EVERY, Training, assert_same, sgd

every = pytest.mark.parametrize("name", EVERY)


def assert_shares(optimizer: torch.optim.Optimizer) -> None:
    base = optimizer.base_optimizer
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert not {"param_groups", "state", "defaults"} & vars(optimizer).keys()  # derived, not kept in step


def replace_groups(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups = [{**group, "lr": 0.25} for group in optimizer.param_groups]


def replace_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = collections.defaultdict(dict)


def replace_defaults(optimizer: torch.optim.Optimizer) -> None:
    optimizer.defaults = {**optimizer.defaults, "lr": 0.25}


def load(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state_dict()
    state["param_groups"] = [{**group, "lr": 0.25} for group in state["param_groups"]]
    optimizer.load_state_dict(state)


def add(optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.25})


CHANGES = {
    "param_groups": (replace_groups, lambda o: o.param_groups[-1]["lr"] == 0.25),
    "state": (replace_state, lambda o: not o.state),
    "defaults": (replace_defaults, lambda o: o.defaults["lr"] == 0.25),
    "load_state_dict": (load, lambda o: o.param_groups[-1]["lr"] == 0.25),
    "add_param_group": (add, lambda o: len(o.param_groups) == 2),
}
DUPLICATES = {
    "itself": lambda optimizer: optimizer,
    "copied": copy.deepcopy,
    "pickled": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@every
@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_what_is_done_to_one_is_done_to_the_other(name, on, change, duplicate):
    training = Training(name)
    training.step(2)
    optimizer = DUPLICATES[duplicate](training.optimizer)
    do, done = CHANGES[change]
    assert not done(optimizer)
    do(optimizer if on == "wrapper" else optimizer.base_optimizer)
    assert done(optimizer)
    assert done(optimizer.base_optimizer)
    assert_shares(optimizer)


@every
@pytest.mark.parametrize("how", ["added", "changed"])
def test_a_group_that_maximizes_is_refused_whenever_it_comes(name, how):
    training = Training(name)
    training.step()
    which = training.optimizer.base_optimizer
    if how == "added":
        which.add_param_group({"params": [nn.Parameter(torch.ones(2))], "maximize": True})
    else:
        which.param_groups[0]["maximize"] = True
    before = copy.deepcopy(training.model.state_dict())
    with pytest.raises(InvalidArgumentError, match=r"base_optimizer has maximize=True.*minimize the negative"):
        training.step()
    assert_same(training.model.state_dict(), before)


@every
@pytest.mark.parametrize("replace", [replace_groups, replace_state])
def test_a_base_whose_state_is_replaced_is_trained_on_as_it_would_be_alone(name, replace):
    """The next step has the gradient of the one before, and what the base had forgotten is forgotten."""
    training, twin = Training(name), Training(name)
    training.step(2), twin.step(2)
    replace(training.optimizer.base_optimizer)
    if replace is replace_groups:
        twin.optimizer.param_groups[0]["lr"] = 0.25
    else:
        twin.optimizer.state.clear()
    if name == "MSAM" and replace is replace_state:
        for each in (training, twin):
            each.optimizer._steps = 0  # or it would say that there is no momentum
    assert training.step(3) == twin.step(3)
    assert_same(training.model.state_dict(), twin.model.state_dict())


@every
def test_each_hook_of_torchs_fires_once_where_it_is_registered(name):
    training, fired = Training(name), []
    optimizer = training.optimizer
    for who, which in (("wrapper", optimizer), ("base", optimizer.base_optimizer)):
        for kind in ("step_pre", "step_post", "state_dict_pre", "load_state_dict_post"):
            register = getattr(which, f"register_{kind}_hook")
            register(lambda *_, note=f"{who} {kind}": fired.append(note))
        which.register_state_dict_post_hook(lambda o, state, note=f"{who} state_dict_post": fired.append(note))
        which.register_load_state_dict_pre_hook(lambda o, state, note=f"{who} load_state_dict_pre": fired.append(note))
    training.step(2)
    assert fired == ["wrapper step_pre", "base step_pre", "base step_post", "wrapper step_post"] * 2
    fired.clear()
    state = optimizer.state_dict()
    kinds = ["wrapper state_dict_pre", "base state_dict_pre", "base state_dict_post", "wrapper state_dict_post"]
    assert fired == kinds
    fired.clear()
    optimizer.load_state_dict(state)
    assert fired == [kind.replace("state_dict", "load_state_dict") for kind in kinds]


def test_state_dict_hooks_may_add_to_the_state_and_take_it_out():
    """As something does that is to be saved with the optimizer."""
    training, found = Training("SAM"), []
    training.optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 7})

    def take(optimizer, state):
        state = dict(state)
        found.append(state.pop("extra"))
        return state

    training.optimizer.register_load_state_dict_pre_hook(take)
    training.step(2)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    assert found == [7]
    training.step()


def test_hooks_of_all_optimizers_and_the_profiler_see_both():
    training, seen = Training("SAM"), []
    handle = torchs.register_optimizer_step_pre_hook(lambda o, *_: seen.append(type(o).__name__))
    try:
        with torch.profiler.profile() as profile:
            training.step()
            training.loop()
    finally:
        handle.remove()
    assert seen == ["SAM", "SGD"] * 2
    names = {event.key: event.count for event in profile.key_averages()}
    assert names["Optimizer.step#SAM.step"] == names["Optimizer.step#SGD.step"] == 2
    assert "Optimizer.zero_grad#SAM.zero_grad" in names


class ScheduleFree(torch.optim.Optimizer):
    """Keeps two sequences of weights, as schedule-free optimizers do, and swaps them by train() and eval()."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "train_mode": True, "k": 0})

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def _swap(self, mode: bool) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if group["train_mode"] != mode else []:
                state = self.state[parameter]
                state["other"], value = parameter.clone(), state.get("other", parameter).clone()
                parameter.copy_(value)
            group["train_mode"] = mode

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.5)
                parameter.sub_(group["lr"] * mean)
                state.setdefault("other", parameter.clone()).lerp_(parameter, 1 / group["k"])


@every
def test_a_schedule_free_base_is_switched_saved_and_resumed(name):
    def base(model: nn.Module) -> torch.optim.Optimizer:
        return ScheduleFree(model.parameters(), lr=0.1)

    training = Training(name, base=base)
    training.step(3)
    trained = copy.deepcopy(training.model.state_dict())
    training.optimizer.eval()
    assert not torch.equal(training.model[0].weight, trained["0.weight"])
    assert training.optimizer.param_groups[0]["train_mode"] is False
    state = copy.deepcopy(training.optimizer.state_dict())
    averaged = copy.deepcopy(training.model.state_dict())
    training.optimizer.train()
    assert_same(training.model.state_dict(), trained)
    resumed = Training(name, base=base)
    resumed.model.load_state_dict(averaged)
    resumed.optimizer.load_state_dict(state)
    resumed.optimizer.train()
    assert resumed.step(3) == training.step(3)
    assert training.optimizer.param_groups[0]["k"] == 6
    assert_same(resumed.model.state_dict(), training.model.state_dict())


@every
def test_what_the_base_has_beside_is_there_and_what_it_has_not_is_not(name):
    training = Training(name, base=lambda model: ScheduleFree(model.parameters(), lr=0.1))
    plain = Training(name).optimizer
    training.optimizer.base_optimizer.own = 7
    assert training.optimizer.own == 7
    assert callable(training.optimizer.eval)
    assert not hasattr(plain, "eval")
    assert not hasattr(plain, "train")
    assert not hasattr(training.optimizer, "_swap")  # what torch's own machinery looks for is for the base alone
    with pytest.raises(AttributeError, match=f"^{name} has no attribute 'eval'; its base: .*SGD"):
        plain.eval()
    assert callable(copy.deepcopy(training.optimizer).eval)


def test_a_fused_base_is_not_taken_for_one_that_the_scaler_may_leave_scaled():
    training = Training("SAM", base=lambda m: torch.optim.AdamW(m.parameters(), fused=True), dtype=torch.float32)
    assert getattr(training.optimizer.base_optimizer, "_step_supports_amp_scaling", False)
    assert not getattr(training.optimizer, "_step_supports_amp_scaling", False)


class Derived(torch.optim.Optimizer):
    """Around another one without torch's constructor, with properties: accelerate's and Opacus' are made like this."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups, lambda self, groups: None)
    state = property(lambda self: self.optimizer.state, lambda self, state: None)
    defaults = property(lambda self: self.optimizer.defaults, lambda self, defaults: None)

    def step(self, closure=None):
        return self.optimizer.step(closure)


@every
def test_a_wrapper_without_torchs_constructor_is_refused_and_may_stand_outside(name):
    training = Training(name)
    with pytest.raises(InvalidArgumentError, match=r"^base_optimizer Derived leaves out .*__init__.*wrap that one"):
        EVERY[name](Derived(sgd(training.model)))
    outside, twin = Derived(training.optimizer), Training(name)
    for _ in range(3):
        outside.step(training.losses if training.own_passes else training.closure)
    twin.step(3)
    assert_same(training.state(), twin.state())


@pytest.mark.parametrize("name", ["SAM", "MSAM"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_base_steps_as_the_plain_one(name):
    ours, plain = Training(name), Training(name)
    base = ours.optimizer.base_optimizer
    torch._dynamo.reset()
    base.step = torch.compile(base.step, backend="eager")
    losses = ours.step(4)
    assert losses == pytest.approx(plain.step(4), rel=1e-12)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_base_optimizers_defaults_are_left_as_they_were():
    class Plain(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    base = Plain([nn.Parameter(torch.ones(2))], {"lr": 0.1})
    flatmin.SAM(base)
    assert base.defaults == {"lr": 0.1}
    assert len(base.param_groups) == 1
    assert not base.state


def test_nothing_of_the_wrappers_stays_at_a_base_that_outlives_it():
    training = Training("SAM")
    base = training.optimizer.base_optimizer
    hooks = [value for key, value in vars(base).items() if key.startswith("_optimizer_")]
    assert len(hooks) == 6
    assert not any(hooks)


@every
def test_the_state_of_another_librarys_sam_is_refused_and_nothing_is_loaded(name: str) -> None:
    """It keeps a copy of the weights under old_p, and the base's momentum nowhere."""
    training = Training(name)
    training.step()
    before = copy.deepcopy(training.optimizer.state_dict())
    theirs = copy.deepcopy(training.optimizer.base_optimizer.state_dict())
    theirs["state"] = {i: {"old_p": torch.ones(1)} for i in theirs["state"]}
    theirs["param_groups"][0].update(lr=0.5, rho=0.05, adaptive=False)
    with pytest.raises(StateDictError, match=r"another library's SAM.*load the network's state alone"):
        training.optimizer.load_state_dict(theirs)
    assert_same(training.optimizer.state_dict(), before)

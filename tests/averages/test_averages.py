"""Averages of the weights: the rules in float64, what is evaluated, what is resumed, what is left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError, StateDictError
from tests.reference import oracles

STEPS = 3  # an epoch


class Training:
    """A network with batch norm and an index buffer, trained on noise; its weights after each step."""

    def __init__(self, make, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).to(dtype)
        self.model.register_buffer("places", torch.tensor([3, 1, 4]))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.average = make(self.model)
        self.by_epoch = isinstance(self.average, flatmin.LAWA)
        if not self.by_epoch:
            self.handle = self.average.attach(self.optimizer)
        self.start = self.floating(self.model)
        self.after_steps, self.after_epochs = [], []
        self.seed = 0

    @staticmethod
    def floating(module):
        tensors = (*module.parameters(), *module.buffers())
        return [tensor.detach().clone() for tensor in tensors if tensor.is_floating_point()]

    def epoch(self):
        for _ in range(STEPS):
            self.seed += 1
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(self.seed)).to(self.model[0].weight.dtype)
            self.optimizer.zero_grad()
            self.model.train()(x).square().mean().backward()
            self.optimizer.step()
            self.after_steps.append(self.floating(self.model))
        self.after_epochs.append(self.after_steps[-1])
        if self.by_epoch:
            self.average.update()
        if isinstance(self.average, flatmin.SwitchEMA):
            self.average.switch()
        return self

    def averaged(self):
        return self.floating(self.average.module)


MAKERS = {
    "EMA": lambda model: flatmin.EMA(model, decay=0.8),
    "SwitchEMA": lambda model: flatmin.SwitchEMA(model, decay=0.8),
    "LAWA": lambda model: flatmin.LAWA(model, k=2),
}
every = pytest.mark.parametrize("name", MAKERS)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_ema_is_the_recursion_and_lets_training_be():
    training, plain = Training(MAKERS["EMA"]), Training(lambda model: flatmin.LAWA(model, k=1))
    for _ in range(3):
        training.epoch(), plain.epoch()
    for number, found in enumerate(training.averaged()):
        values = [weights[number] for weights in training.after_steps]
        torch.testing.assert_close(found, oracles.ema(training.start[number], values, 0.8))
    assert_close(training.floating(training.model), plain.floating(plain.model))


def test_switch_ema_goes_on_from_its_average():
    training = Training(MAKERS["SwitchEMA"]).epoch()
    expected = [
        oracles.ema(start, [weights[number] for weights in training.after_steps], 0.8)
        for number, start in enumerate(training.start)
    ]
    assert_close(training.averaged(), expected)
    assert_close(training.floating(training.model), expected)
    assert any(not torch.equal(a, b) for a, b in zip(expected, training.after_epochs[0], strict=True))


def test_switch_ema_waits_for_its_start_epoch():
    training = Training(lambda model: flatmin.SwitchEMA(model, decay=0.8, start_epoch=1)).epoch()
    assert_close(training.floating(training.model), training.after_epochs[0])
    training.epoch()
    assert_close(training.floating(training.model), training.averaged())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_lawa_is_the_mean_of_the_last_epochs_ends(k):
    training = Training(lambda model: flatmin.LAWA(model, k=k))
    for epoch in range(1, 6):
        training.epoch()
        last = training.after_epochs[-min(k, epoch) :]
        assert_close(training.averaged(), [torch.stack(tensors).mean(dim=0) for tensors in zip(*last, strict=True)])


@every
def test_integer_buffers_are_copied_and_the_average_is_run_without_gradient(name):
    training = Training(MAKERS[name])
    training.model.places.add_(1)
    training.epoch()
    network = training.average.module
    assert network.places.tolist() == [4, 2, 5]
    assert int(network[1].num_batches_tracked) == STEPS
    x = torch.randn(5, 4, dtype=torch.float64)
    training.average.train()
    logits = training.average(x)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, copy.deepcopy(network).eval()(x))


@every
def test_resume_is_bitwise_neutral(name):
    whole, first, second = (Training(MAKERS[name]) for _ in range(3))
    for _ in range(4):
        whole.epoch()
    for _ in range(3):
        first.epoch()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.average.load_state_dict(copy.deepcopy(first.average.state_dict()))
    second.seed = first.seed
    second.epoch()  # one alone, while LAWA has an epoch from before in its mean
    for a, b in zip(second.averaged(), whole.averaged(), strict=True):
        assert torch.equal(a, b)


@every
def test_a_wrapped_model_is_averaged_without_its_wrapper(name):
    plain = Training(MAKERS[name])
    wrapped = Training(lambda model: MAKERS[name](nn.DataParallel(model)))
    assert_close(wrapped.epoch().averaged(), plain.epoch().averaged())
    assert wrapped.average.module.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: flatmin.EMA(model, decay=1.0), r"decay must be a finite number > 0 and < 1, got 1.0"),
        (lambda model: flatmin.SwitchEMA(model, decay=0), r"decay must be .* got 0"),
        (lambda model: flatmin.SwitchEMA(model, start_epoch=-1), r"start_epoch must be an integer .* got -1"),
        (lambda model: flatmin.EMA(nn.Linear), r"model must be a network, .* got <class .*Linear"),
        (lambda model: flatmin.LAWA(model.parameters()), r"model must be a network, .* got <generator"),
        (lambda model: flatmin.LAWA(model, k=0), r"k must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named_with_their_value(make, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [flatmin.EMA, flatmin.SwitchEMA])
def test_weights_too_coarse_for_the_decay_are_warned_of(make):
    with pytest.warns(FlatminWarning, match="does not move") as caught:
        make(nn.Linear(2, 2).bfloat16(), decay=0.999)
    assert [warning.filename for warning in caught] == [__file__]


@every
def test_updates_are_counted_and_a_handle_detaches(name):
    training = Training(MAKERS[name])
    assert training.average.n_averaged == 1
    training.epoch()
    assert training.average.n_averaged == 1 + (1 if training.by_epoch else STEPS)
    if not training.by_epoch:
        training.handle.remove()
        training.epoch()
        assert training.average.n_averaged == 1 + STEPS


def test_lawa_is_attached_to_be_saved_and_says_that_its_update_is_yours_to_call():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lawa = flatmin.LAWA(model)
    with lawa.attach(optimizer):
        lawa(torch.ones(1, 2))  # before training there is nothing to say
        optimizer.step()
        with pytest.warns(FlatminWarning, match=r"^LAWA averages the ends of epochs.*call lawa\.update\(\)"):
            lawa(torch.ones(1, 2))
        lawa(torch.ones(1, 2))  # warned once
    assert lawa.n_averaged == 1
    assert not optimizer._optimizer_step_post_hooks


def test_the_state_of_an_ema_is_that_of_torchs_averaged_model():
    training = Training(MAKERS["EMA"]).epoch()
    torchs = AveragedModel(copy.deepcopy(training.model))
    assert torchs.load_state_dict(training.average.state_dict())
    assert_close(training.floating(torchs.module), training.averaged())
    assert torchs.n_averaged == 1 + STEPS


@every
def test_state_of_an_earlier_layout_is_refused_in_one_line(name):
    average = MAKERS[name](nn.Linear(2, 2))
    state = {
        f"average.{key}" if key.startswith(("module.", "n_averaged")) else key: torch.zeros_like(value)
        for key, value in average.state_dict().items()
    }
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(StateDictError, match=r"^the state's average was saved by an earlier version") as error:
        average.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in average.state_dict().items())


@pytest.mark.parametrize("name", ["EMA", "SwitchEMA"])
def test_the_average_may_be_more_precise_than_the_weights(name):
    training = Training(lambda model: MAKERS[name](model).double(), torch.float32).epoch()
    for number, start in enumerate(training.start):
        values = [weights[number].double() for weights in training.after_steps]
        expected = oracles.ema(start.double(), values, 0.8)
        torch.testing.assert_close(training.averaged()[number], expected, rtol=1e-12, atol=1e-12)

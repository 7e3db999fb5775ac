"""SharpnessAware in Lightning: the weights are those of the method written out by hand, over the same batches."""

import collections
import contextlib
import copy
import functools
import itertools

import pytest

pytest.importorskip("lightning")

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch.nn import functional as F

import flatmin
from flatmin.errors import NonFiniteGradientWarning
from flatmin.integrations.lightning import SharpnessAware
from flatmin.integrations.lightning._passes import REPLACED
from flatmin.optim import Adaptive, Every
from tests.contracts._optimizers import CLOSURES, EVERY, VISIBLE
from tests.integrations._lightning import (
    EPOCHS,
    N,
    Net,
    difference,
    fit,
    half,
    loader,
    network,
    sam_by_hand,
    trainer,
    windows,
    without_lightnings_warnings,
)

SCHEDULE = {0: 1, 1: 3}

# The Trainer's settings, the network's, and the same by hand.
CASES = {
    "plain": ({}, {}, {}),
    "batch norm and dropout": ({}, {"norm": True, "dropout": 0.3}, {}),
    "accumulation of 2": ({"accumulate_grad_batches": 2}, {}, {"accumulate": 2}),
    "accumulation of 3": ({"accumulate_grad_batches": 3}, {"norm": True, "dropout": 0.3}, {"accumulate": 3}),
    "scheduled accumulation": (
        {"callbacks": [GradientAccumulationScheduler(SCHEDULE)]},
        {"dropout": 0.3},
        {"accumulate": SCHEDULE.get},
    ),
    "clipped by norm": ({"gradient_clip_val": 0.1}, {}, {"clip": 0.1}),
    "clipped by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
        {},
        {"clip_value": 0.01, "accumulate": 2},
    ),
    "bfloat16": ({"precision": "bf16-mixed"}, {}, {"dtype": torch.bfloat16}),
    "float16": ({"plugins": [half]}, {}, {"dtype": torch.float16, "scale": 256.0}),
    "float16, accumulated and clipped": (
        {"plugins": [half], "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {},
        {"dtype": torch.float16, "scale": 256.0, "clip": 0.1, "accumulate": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_sam_is_that_by_hand(case):
    options, architecture, by_hand = CASES[case]
    options = dict(options)
    callbacks = options.pop("callbacks", [])
    if "plugins" in options:
        options["plugins"] = [make() for make in options["plugins"]]
    module, net = Net(network(**architecture)), network(**architecture)
    fit(module, SharpnessAware(flatmin.SAM, rho=0.05), *callbacks, **options)
    sam_by_hand(net, **by_hand)
    assert difference(module.net, net) < 1e-6
    assert difference(module.net, network(**architecture)) > 1e-2


def own_loop(make, accumulate, clip):
    """One of flatmin's optimizers in a loop with closures; it clips for itself what the base optimizer steps with."""
    net = network(norm=True)
    torch.manual_seed(7)
    optimizer = make(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), max_norm=clip)
    for window, count in windows(accumulate):

        def closure(window=window, count=count):
            optimizer.zero_grad()
            losses = [F.cross_entropy(net(x), y) / count for x, y in window]
            for loss in losses:
                loss.backward()
            return sum(losses)

        optimizer.step(closure)
    return net


METHODS = {
    **{name: (EVERY[name], VISIBLE.get(name, {})) for name in CLOSURES},
    "Adaptive": (flatmin.SAM, {"when": Adaptive(steps=10)}),
    "Every": (flatmin.SAM, {"when": Every(2)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_clips_the_gradient_it_steps_with_alone(name):
    method, keywords = copy.deepcopy(METHODS[name])
    accumulate = 1 if method.max_passes == 1 else 2
    module = Net(network(norm=True))
    fit(module, SharpnessAware(method, **keywords), accumulate_grad_batches=accumulate, gradient_clip_val=0.3)
    other = own_loop(functools.partial(method, **copy.deepcopy(METHODS[name][1])), accumulate, 0.3)
    assert difference(module.net, other) < 1e-6


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)


def test_a_scheduler_of_the_plain_optimizer():
    module, net = Net(scheduler=one_cycle), network()
    made = fit(module, SharpnessAware(flatmin.SAM), accumulate_grad_batches=2)
    sam_by_hand(net, accumulate=2, scheduler=one_cycle)
    assert difference(module.net, net) < 1e-6
    assert made.global_step == 2 * EPOCHS + 2
    assert made.lr_scheduler_configs[0].scheduler.last_epoch == made.global_step


def test_an_optimizer_of_flatmins_in_the_module():
    module, net = Net(wrap=functools.partial(flatmin.SAM, rho=0.05)), network()
    callback = SharpnessAware()
    made = fit(module, callback, accumulate_grad_batches=2, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    sam_by_hand(net, accumulate=2, clip_value=0.01)
    assert difference(module.net, net) < 1e-6
    assert made.optimizers == [callback.optimizer]


def test_parameters_are_chosen_in_the_module():
    module, same = Net(network(norm=True)), Net(network(norm=True))
    choose = flatmin.optim.normalization_parameters
    fit(module, SharpnessAware(flatmin.SAM, rho=0.5, parameters=choose))
    fit(same, SharpnessAware(lambda base: flatmin.SAM(base, rho=0.5, parameters=choose(same.net), model=same)))
    assert difference(module.net, same.net) == 0
    assert difference(module.net, own_loop(functools.partial(flatmin.SAM, rho=0.5), 1, None)) > 1e-3


def test_a_compiled_module_has_statistics_of_one_pass():
    module, net = Net(network(norm=True)), network(norm=True)
    fit(torch.compile(module, backend="eager"), SharpnessAware(flatmin.SAM), accumulate_grad_batches=2)
    sam_by_hand(net, accumulate=2)
    assert difference(module.net, net) < 1e-6


# What is counted.


class Counting(Net):
    """Logs in all the ways that there are."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.values = torchmetrics.CatMetric()
        both = [torchmetrics.Precision(task="multiclass", num_classes=10, average="macro") for _ in range(2)]
        self.group = torchmetrics.MetricCollection(dict(zip("ab", both, strict=True)))
        self.hooks = collections.Counter()
        self.returned = []

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=1)
        self.log_dict({"sum": loss.detach()}, on_step=False, on_epoch=True, reduce_fx="sum")
        self.values.update(loss.detach())
        self.group.update(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict(self.group, on_step=False, on_epoch=True)
        return {"loss": loss, "extra": 1}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["extra"] == 1
        self.returned.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, optimizer):
        self.hooks["step"] += 1

    def on_before_zero_grad(self, optimizer):
        self.hooks["zero_grad"] += 1

    def on_after_backward(self):
        self.hooks["backward"] += 1
        self.log("norm", self.net[0].weight.grad.norm(), on_step=False, on_epoch=True, reduce_fx="sum")

    def on_train_epoch_end(self):
        self.counted = (
            self.accuracy._update_count,
            int(self.accuracy.tp.sum() + self.accuracy.fn.sum()),
            len(self.values.value),
        )


class Says(L.Callback):
    """A callback logs by the module's function, which it keeps."""

    def on_after_backward(self, trainer, pl_module):
        self.log("said", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_metrics_and_hooks_count_the_first_pass(accumulate):
    """With a perturbation that does nothing, all is as with the plain optimizer."""
    plain, module = Counting(), Counting()
    options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1}
    runs = [fit(plain, Says(), **options), fit(module, SharpnessAware(flatmin.SAM, rho=1e-9), Says(), **options)]
    logged = [{name: float(value) for name, value in run.callback_metrics.items()} for run in runs]
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    assert {"loss_epoch", "sum", "accuracy", "a", "b", "norm", "said"} <= logged[0].keys()
    assert logged[0]["said"] == 5
    assert module.returned == pytest.approx(plain.returned, rel=1e-5)
    assert module.counted == plain.counted == (5, N, 5 * EPOCHS)
    assert runs[0].global_step == runs[1].global_step
    assert {**module.hooks, "backward": 0} == {**plain.hooks, "backward": 0}
    assert module.hooks["backward"] == 2 * plain.hooks["backward"]  # which may change gradients
    assert "log" not in vars(module)


def test_what_is_logged_is_of_the_unperturbed_weights():
    module = Counting()
    fit(module, SharpnessAware(flatmin.SAM, rho=0.5))
    assert module.returned == pytest.approx(sam_by_hand(network(), rho=0.5), rel=1e-5)


# What comes in between.


class Skipping(Net):
    """Skips batches by returning None.

    Args:
        skipped: The indices of the calls in which it does.
    """

    def __init__(self, skipped, **arguments):
        super().__init__(**arguments)
        self.skipped, self.calls = skipped, -1

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return None if self.calls in self.skipped else self.loss(batch)


@pytest.mark.parametrize("float16", [False, True])
def test_a_batch_that_is_skipped(float16):
    """Calls 0 and 1 are the two passes of the first step, 2 is the second batch, 4 the second pass of the third."""
    module, callback = Skipping({2, 4}), SharpnessAware(flatmin.SAM)
    made = fit(module, callback, max_epochs=1, **({"plugins": [half()]} if float16 else {}))
    assert module.calls + 1 == 2 + 1 + 2 + 2 + 2
    assert callback.optimizer.state_dict()["flatmin"]["step"] == 3
    assert made.global_step == 5  # as Lightning counts with a plain optimizer


def test_a_micro_batch_that_is_skipped_is_in_neither_pass():
    module, net = Skipping({0}), network()
    fit(module, SharpnessAware(flatmin.SAM), max_epochs=1, accumulate_grad_batches=5)
    batches = list(loader())[1:]
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.SAM(base)

    def closure():
        optimizer.zero_grad()
        for x, y in batches:
            (F.cross_entropy(net(x), y) / 5).backward()

    optimizer.step(closure)
    assert difference(module.net, net) < 1e-6
    assert module.calls == 5 + 4 - 1


class Stopping(Net):
    """Ends the first epoch in the middle of a window; Lightning clears that gradient without a step."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


def test_a_window_that_an_epoch_leaves_open_is_in_no_step():
    module, net = Stopping(), network()
    fit(module, SharpnessAware(flatmin.SAM), accumulate_grad_batches=2)
    optimizer = flatmin.SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    for number, (window, count) in enumerate(windows(2)):
        if number in (1, 2):
            continue

        def closure(window=window, count=count):
            optimizer.zero_grad()
            for x, y in window:
                (F.cross_entropy(net(x), y) / count).backward()

        optimizer.step(closure)
    assert difference(module.net, net) < 1e-6


class Infinite(Net):
    """The loss of one call is not finite."""

    def __init__(self, call, **arguments):
        super().__init__(**arguments)
        self.bad, self.calls = call, -1

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return self.loss(batch) * (float("inf") if self.calls == self.bad else 1)


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("float16", [False, True])
def test_a_pass_that_is_not_finite_drops_the_step(call, float16):
    module, callback = Infinite(call, net=network(norm=True)), SharpnessAware(flatmin.SAM)
    plugins = {"plugins": [half()]} if float16 else {}
    with contextlib.nullcontext() if float16 else pytest.warns(NonFiniteGradientWarning):
        fit(module, callback, max_epochs=1, limit_train_batches=1, **plugins)
    assert difference(module.net, network(norm=True)) == 0
    assert callback.optimizer.skipped_steps == 1
    assert callback.optimizer.scaler.get_scale() == (128.0 if float16 else 1.0)


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if self.failing and not torch.equal(self.net[0].weight, self.before):
            raise KeyError("in the second pass")
        return self.loss(batch)


def test_an_error_in_the_second_pass_leaves_trainer_and_weights_as_they_were():
    module, callback = Failing(), SharpnessAware(flatmin.SAM, rho=1.0)
    module.failing, module.before = True, module.net[0].weight.detach().clone()
    made = trainer(callback)
    with pytest.raises(KeyError, match="second pass"), without_lightnings_warnings():
        made.fit(module, loader())
    assert difference(module.net, network()) == 0
    assert not {"log", "log_dict", *REPLACED} & {*vars(module), *vars(made.strategy)}
    module.failing = False
    with without_lightnings_warnings():
        made.fit(module, loader())
    net = network()
    sam_by_hand(net, rho=1.0)
    assert difference(module.net, net) < 1e-6


class Watching(L.Callback):
    """The weights that others find during a run."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(copy.deepcopy(pl_module.net.state_dict()))

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(copy.deepcopy(pl_module.net.state_dict()))


class Validating(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))


@pytest.mark.parametrize("name", CLOSURES)
def test_others_find_the_weights_where_they_belong(name):
    """Weights change in a step alone: between micro-batches, also in a validation, they are the same."""
    accumulate = 1 if EVERY[name].max_passes == 1 else 5
    watching, module = Watching(), Validating()
    fit(
        module,
        SharpnessAware(EVERY[name]),
        watching,
        validation=loader(),
        accumulate_grad_batches=accumulate,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    steps = [network()[0].weight, *(state["0.weight"] for state in watching.seen)]
    different = [not torch.equal(a, b) for a, b in itertools.pairwise(steps)]
    assert sum(different) == 10 // accumulate


def test_averages_of_lightnings_follow_the_clean_weights():
    averaging, module = EMAWeightAveraging(decay=0.5), Net(network(norm=True))
    other = copy.deepcopy(module.net)
    expected = torch.optim.swa_utils.AveragedModel(other, avg_fn=lambda a, b, _: (a + b) / 2, use_buffers=False)
    watching = Watching()
    fit(module, SharpnessAware(flatmin.SAM), watching, averaging)
    for state in watching.seen:
        other.load_state_dict(state)
        expected.update_parameters(other)
    ours, theirs = dict(module.net.named_parameters()), dict(expected.module.named_parameters())
    assert all(
        torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours
    )  # it puts the average into the module


def test_lightnings_average_with_statistics_made_anew():
    """Its last epoch trains nothing: no pass is made in it, and no step."""
    callback, module = SharpnessAware(flatmin.SAM), Net(network(norm=True))
    fit(module, callback, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), max_epochs=3)
    assert callback.optimizer.state_dict()["flatmin"]["step"] == 15
    assert int(module.net[1].num_batches_tracked) == 5


def test_the_learning_rate_can_be_searched():
    module, callback = Net(), SharpnessAware(flatmin.SAM)
    made = trainer(callback, accumulate_grad_batches=2)
    with without_lightnings_warnings():
        L.pytorch.tuner.Tuner(made).lr_find(module, loader(), num_training=10, update_attr=False)
        made.fit(module, loader())
    net = network()
    sam_by_hand(net, accumulate=2)
    assert difference(module.net, net) < 1e-6

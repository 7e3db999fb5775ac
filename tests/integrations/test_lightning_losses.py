"""TrajectoryLoss in Lightning: SAF and MESA are those of an own loop over the same batches. Runs that resume."""

import copy
import pickle

import pytest

pytest.importorskip("lightning")

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader

import flatmin
from flatmin.errors import FlatminWarning
from flatmin.integrations.lightning import SharpnessAware, TrajectoryLoss
from flatmin.optim import Adaptive
from tests.contracts._optimizers import CLOSURES, EVERY, VISIBLE
from tests.integrations._lightning import (
    EPOCHS,
    N,
    Net,
    data,
    difference,
    fit,
    loader,
    network,
    trainer,
    windows,
    without_lightnings_warnings,
)

SAF = {"num_samples": N, "num_classes": 10, "coefficient": 1.0, "lag": 1, "start_epoch": 1}
MESA = {"coefficient": 1.0, "decay": 0.9, "start_epoch": 0}


class Penalised(Net):
    """Adds the loss that the callback gives it.

    Args:
        loss: Its name here.
    """

    def __init__(self, loss="saf", **arguments):
        super().__init__(**arguments)
        self.kind, self.total, self.validated = loss, 0.0, []

    def penalised(self, batch):
        x, y = batch
        logits = self.net(x)
        penalty = self.saf(logits) if self.kind == "saf" else self.mesa(logits, x)
        return F.cross_entropy(logits, y) + penalty, penalty.detach()

    def training_step(self, batch, batch_idx):
        loss, penalty = self.penalised(batch)
        self.total += penalty
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append(float(self.penalised(batch)[1]))

    test_step = validation_step


def own_loop(kind, accumulate=1, sam=False, **architecture):
    """The same without Lightning; returns the network and the sum of the penalties of first passes."""
    net, total = network(**architecture), 0.0
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loss = flatmin.SAF(**SAF) if kind == "saf" else flatmin.MESA(net, **MESA)
    optimizer = flatmin.SAM(base, rho=0.05) if sam else base
    steps = len(list(windows(accumulate))) // EPOCHS
    for number, (window, count) in enumerate(windows(accumulate, flatmin.with_indices(loader()))):
        loss.set_epoch(number // steps)
        for index in optimizer.passes() if sam else range(1):
            optimizer.zero_grad()
            for positions, (x, y) in window:
                logits = net(x)
                penalty = loss(logits, positions if kind == "saf" else x)
                ((F.cross_entropy(logits, y) + penalty) / count).backward()
                total += float(penalty.detach()) if index == 0 else 0
        if not sam:
            base.step()
        if kind == "mesa":
            loss.update()
    return net, total


def saf(**options):
    return TrajectoryLoss(flatmin.SAF(**SAF, **options))


def mesa(**options):
    return TrajectoryLoss(flatmin.MESA, network="net", **MESA, **options)


CALLBACKS = {
    "saf": saf,
    "saf, class": lambda: TrajectoryLoss(flatmin.SAF, **SAF),
    "mesa": mesa,
    "mesa of the module": lambda: TrajectoryLoss(flatmin.MESA, **MESA),
}
SOURCES = {
    "indexed": lambda: loader(flatmin.indexed(data())),
    "with_indices": lambda: flatmin.with_indices(loader()),
    "workers": lambda: loader(flatmin.indexed(data()), num_workers=1, multiprocessing_context="fork"),
}


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_that_of_an_own_loop(callback, accumulate):
    kind = callback[:4].rstrip(",")
    module, made = Penalised(kind), CALLBACKS[callback]()
    batches = SOURCES["indexed"]() if kind == "saf" else None
    run = fit(
        module, made, batches=batches, validation=loader(), accumulate_grad_batches=accumulate, val_check_interval=2
    )
    net, total = own_loop(kind, accumulate)
    assert difference(module.net, net) < 1e-7
    assert module.total == pytest.approx(total, rel=1e-5) != 0
    assert module.validated == [0.0] * len(module.validated) != []
    assert kind not in vars(module)
    assert module.state_dict().keys() == Net().state_dict().keys()
    assert run.global_step == len(list(windows(accumulate)))


@pytest.mark.parametrize("source", SOURCES)
def test_the_index_reaches_saf_from_every_source(source):
    module = Penalised()
    fit(module, saf(), batches=SOURCES[source]())
    assert difference(module.net, own_loop("saf")[0]) == 0


class Mapped(Penalised):
    def penalised(self, batch):
        assert set(batch) == {"x", "y"}
        return super().penalised((batch["x"], batch["y"]))


def test_the_index_is_taken_off_mappings():
    module = Mapped()
    rows = [{"x": x, "y": y} for x, y in data()]
    batches = loader(flatmin.indexed(rows, key="row"))
    fit(module, TrajectoryLoss(flatmin.SAF(**SAF), key="row"), batches=batches)
    assert difference(module.net, own_loop("saf")[0]) == 0


@pytest.mark.parametrize("norm", [False, True])
def test_mesa_within_sam(norm):
    """In either order of the callbacks: the average moves once a step, and both passes have the same penalty."""
    for order in (1, -1):
        module = Penalised("mesa", net=network(norm=norm))
        callbacks = [SharpnessAware(flatmin.SAM), mesa()][::order]
        fit(module, *callbacks, accumulate_grad_batches=2)
        assert difference(module.net, own_loop("mesa", 2, sam=True, norm=norm)[0]) < 1e-6


def test_a_step_that_is_dropped_does_not_move_the_average():
    class Infinite(Penalised):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("inf")

    for order in (1, -1):
        callbacks = [SharpnessAware(flatmin.SAM), mesa()][::order]
        with pytest.warns(flatmin.errors.NonFiniteGradientWarning):
            fit(Infinite("mesa"), *callbacks, max_epochs=1)
        average = next(each for each in callbacks if isinstance(each, TrajectoryLoss)).loss.average
        assert int(average.n_averaged) == 1


def test_a_module_is_evaluated_without_a_fit():
    module = Penalised()
    with without_lightnings_warnings():
        trainer(saf()).test(module, loader(flatmin.indexed(data())), verbose=False)
    assert module.validated == [0.0] * 5


def test_an_average_of_lightnings_has_no_history():
    module, average = Penalised(), EMAWeightAveraging(decay=0.5)
    fit(module, saf(), average, batches=SOURCES["indexed"]())
    assert sum(buffer.numel() for buffer in average._average_model.buffers()) == 1  # its own count


class Copying(Penalised):
    def on_train_batch_end(self, *_):
        for other in (copy.deepcopy(self), pickle.loads(pickle.dumps(self))):
            assert float(other.saf(torch.zeros(2, 10))) == 0


def test_a_copy_of_the_module_has_a_loss_of_0():
    fit(Copying(), saf(), batches=SOURCES["indexed"]())


def test_callbacks_reach_processes_that_are_spawned():
    for callback in (saf(), mesa(), SharpnessAware(flatmin.SAM, rho=0.05, parameters=torch.nn.Module.parameters)):
        assert vars(pickle.loads(pickle.dumps(callback))).keys() == vars(callback).keys()


def test_a_loss_that_is_not_added_is_warned_of():
    with pytest.warns(FlatminWarning, match=r"Net.training_step has not called self.saf in an epoch"):
        fit(Net(), saf(), batches=SOURCES["indexed"]())
    with pytest.warns(FlatminWarning, match=r"loss = loss \+ self.mesa\(logits, x\)"):
        fit(Net(), mesa())


@pytest.mark.parametrize("kind", ["saf", "mesa"])
def test_a_training_that_ends_before_the_loss_begins_is_told_of(kind):
    made = {"saf": flatmin.SAF(N, 10), "mesa": flatmin.MESA}[kind]
    callback = TrajectoryLoss(made, **({"network": "net", "decay": 0.9} if kind == "mesa" else {}))
    module = Penalised(kind)
    with pytest.warns(FlatminWarning, match="is 0 before epoch 5, .* has one epoch, .* lower start_epoch=5") as caught:
        fit(module, callback, batches=SOURCES["indexed"](), max_epochs=1)
    assert len(caught) == 1
    assert module.total == 0


class Both(Penalised):
    def penalised(self, batch):
        x, y = batch
        logits = self.net(x)
        penalties = torch.stack([self.saf(logits), self.mesa(logits, x)]).detach()
        return F.cross_entropy(logits, y), penalties


def test_two_losses_at_once():
    for callbacks in ([saf(), mesa()], [mesa(), saf()]):
        module = Both()
        fit(module, *callbacks, batches=SOURCES["indexed"]())
        assert (module.total > 0).all()


def test_mesa_over_an_indexed_data_set():
    module = Penalised("mesa")
    fit(module, mesa(), batches=SOURCES["indexed"](), validation=SOURCES["indexed"]())
    assert difference(module.net, own_loop("mesa")[0]) < 1e-7


# Resuming.


class Resuming(DataLoader):
    """A loader that goes on in the middle of an epoch, as Lightning asks for it."""

    done = 0

    def state_dict(self):
        return {"done": self.done, "epoch": self.sampler.epoch}

    def load_state_dict(self, state):
        self.skip = state["done"]

    def __iter__(self):
        skip, self.skip = getattr(self, "skip", 0), 0
        self.done = skip
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                self.done = number + 1
                yield batch
        self.done = 0


METHODS = {name: (EVERY[name], VISIBLE.get(name, {})) for name in CLOSURES} | {
    "Adaptive": (flatmin.SAM, {"when": Adaptive(steps=10)})
}
RESUMED = {
    **{name: lambda name=name: SharpnessAware(METHODS[name][0], **METHODS[name][1]) for name in METHODS},
    "saf": saf,
    "mesa": mesa,
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("when", ["between epochs", "within an epoch"])
def test_a_resumed_run_is_the_same(name, when, tmp_path):
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=30)

    def module():
        return Penalised(name, scheduler=scheduler) if name in ("saf", "mesa") else Net(scheduler=scheduler)

    def batches():
        return loader(flatmin.indexed(data()) if name == "saf" else data(), Resuming if within else DataLoader)

    within = when == "within an epoch"
    whole, first, second = module(), module(), module()
    fit(whole, RESUMED[name](), batches=batches(), max_epochs=3)
    options = {"every_n_train_steps": 13} if within else {"save_on_train_epoch_end": True}
    saving = ModelCheckpoint(dirpath=tmp_path, filename="saved", **options)
    steps = {"max_steps": 13, "max_epochs": -1} if within else {"max_epochs": 2}
    fit(first, RESUMED[name](), saving, batches=batches(), enable_checkpointing=True, **steps)
    run = fit(second, RESUMED[name](), batches=batches(), max_epochs=3, ckpt_path=tmp_path / "saved.ckpt")
    assert run.global_step == 15
    assert difference(whole.net, second.net) == 0
    assert difference(whole.net, first.net) > 1e-3
    with without_lightnings_warnings():
        Net.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=False)  # nothing in it is flatmin's


def test_a_checkpoint_without_the_loss_begins_it_anew(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, filename="saved")
    fit(Net(), saving, max_epochs=1, enable_checkpointing=True)
    module = Penalised()
    with pytest.warns(
        FlatminWarning, match="SAF records its first samples in epoch 1, and compares nothing for 1 epoch"
    ):
        fit(module, saf(), batches=SOURCES["indexed"](), ckpt_path=tmp_path / "saved.ckpt", max_epochs=3)
    assert module.total > 0

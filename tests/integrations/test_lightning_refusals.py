"""What flatmin cannot be right with in Lightning is an error that names the way out; no case is silent."""

import contextlib
import types

import pytest

pytest.importorskip("lightning")

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import IterableDataset

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError, MissingDependencyError
from flatmin.integrations.lightning import SharpnessAware, TrajectoryLoss, _checks, _package
from flatmin.optim import Adaptive
from tests.contracts._optimizers import CLOSURES, EVERY
from tests.integrations._lightning import EPOCHS, N, Net, data, difference, fit, half, loader, network, sam_by_hand


class Manual(Net):
    """Optimizes by itself.

    Args:
        step: What it does with the optimizer and a batch.
    """

    def __init__(self, step=None, **arguments):
        super().__init__(**arguments)
        self.automatic_optimization = False
        self.step = step

    def training_step(self, batch, batch_idx):
        self.step(self, self.optimizers(), batch)


class Iterating(Net):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(data())


def saf(**options):
    return TrajectoryLoss(flatmin.SAF(N, 10, **{"start_epoch": 1, "lag": 1, **options}))


def sam():
    return SharpnessAware(flatmin.SAM)


def returned(method=flatmin.SAM, **keywords):
    """A module that returns an optimizer of flatmin's."""
    return Net(wrap=lambda base: method(base, **keywords))


def other_network():
    return TrajectoryLoss(flatmin.MESA(network()))


class TwoForMesa(Net):
    def configure_optimizers(self):
        self.automatic_optimization = False
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[-1])]


class WithoutForward(L.LightningModule):
    training_step = configure_optimizers = lambda *_: None


class Deep(Net):
    def __init__(self):
        super().__init__()
        self.saf = flatmin.SAF(N, 10)


# A module, callbacks, options, and what is said.
REFUSED = {
    "manual optimization": (lambda: Manual(), lambda: [sam()], {}, "leave the callback out.*optimizer.step.closure"),
    "dataloader_iter": (Iterating, lambda: [sam()], {}, "let it take batch"),
    "two callbacks": (Net, lambda: [sam(), sam()], {}, "two callbacks SharpnessAware: keep one"),
    "two wrappers": (returned, lambda: [sam()], {}, "returns flatmin's SAM already.*SharpnessAware.. alone"),
    "a plain optimizer without a method": (Net, lambda: [SharpnessAware()], {}, "SharpnessAware.flatmin.SAM, rho=0.05"),
    "a function of something else": (Net, lambda: [SharpnessAware(lambda base: base)], {}, "method must make"),
    "esam in the module": (lambda: returned(flatmin.ESAM), lambda: [SharpnessAware()], {}, "flatmin.LookSAM"),
    "esam without the callback": (lambda: returned(flatmin.ESAM), list, {}, "loss of each sample.*use flatmin.SAM"),
    "saf within sam": (Net, lambda: [sam(), saf()], {}, "not both"),
    "saf in the module within sam": (Deep, lambda: [sam()], {}, "not both"),
    "the loss's name": (Deep, lambda: [saf()], {}, "attribute 'saf' already.*name='penalty'"),
    "no index": (
        Net,
        lambda: [saf()],
        {},
        r"carries no index: let the loader's data set be flatmin.indexed\(dataset\)",
    ),
    "a stream": (
        Net,
        lambda: [saf()],
        {"batches": lambda: torch.utils.data.DataLoader(Streamed(), 16)},
        "flatmin.MESA",
    ),
    "no such network": (Net, lambda: [TrajectoryLoss(flatmin.MESA, network="body")], {}, "no network 'body'"),
    "no forward": (WithoutForward, lambda: [TrajectoryLoss(flatmin.MESA)], {}, "network='net'"),
    "mesa of another network": (Net, lambda: [other_network()], {}, "not in Net.*network='net'"),
    "two optimizers for mesa": (TwoForMesa, lambda: [TrajectoryLoss(flatmin.MESA)], {}, "there are 2"),
    # flatmin's optimizer returned by configure_optimizers, without the callback: all that was silent
    "accumulation": (returned, list, {"accumulate_grad_batches": 2}, "only the last.*SharpnessAware"),
    "accumulation, one pass": (
        lambda: returned(flatmin.S2SAM),
        list,
        {"accumulate_grad_batches": 2},
        "only the last.*SharpnessAware",
    ),
    "clipping by value": (
        returned,
        list,
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        "first gradient.*SharpnessAware.*max_norm=0.1",
    ),
    **{
        f"clipping, {name}": (lambda made=made: made(), list, {"gradient_clip_val": 0.1}, "first gradient.*Sharpness")
        for name, made in {
            "GSAM": lambda: returned(flatmin.GSAM),
            "LookSAM": lambda: returned(flatmin.LookSAM),
            "FriendlySAM": lambda: returned(flatmin.optim.FriendlySAM),
            "Adaptive": lambda: returned(when=Adaptive(steps=10)),
        }.items()
    },
    "float16": (returned, list, {"plugins": half}, "integrations.lightning.SharpnessAware"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_and_the_way_out_is_named(case):
    module, callbacks, options, said = REFUSED[case]
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(InvalidArgumentError, match=f"(?s){said}"):
        fit(module(), *callbacks(), **options)


def test_another_strategy_is_refused(monkeypatch):
    monkeypatch.setattr(_checks, "SingleDeviceStrategy", DDPStrategy)  # none but DDP
    with pytest.raises(InvalidArgumentError, match="one device and for strategy='ddp', got SingleDeviceStrategy"):
        fit(Net(), sam())


WRONG = {
    "no method": (lambda: SharpnessAware(rho=0.1), "SharpnessAware has rho, and no method"),
    "a loss that needs none": (
        lambda: TrajectoryLoss(flatmin.logit_squeezing),
        r"need no callback: in training_step, loss \+ flatmin\.logit_squeezing\(logits\)",
    ),
    "an optimizer": (lambda: SharpnessAware(flatmin.SAM(Net().configure_optimizers())), "takes the class"),
    "a plain class": (lambda: SharpnessAware(torch.optim.SGD), "one of flatmin's optimizers"),
    "esam": (lambda: SharpnessAware(flatmin.ESAM), "loss of each sample.*LookSAM"),
    "a scaler": (lambda: SharpnessAware(flatmin.SAM, scaler=None), "the Trainer makes one"),
    "a keyword": (lambda: SharpnessAware(flatmin.SAM, roh=0.1), "SAM, which refuses them.*roh"),
    "a loss for the optimizer": (lambda: SharpnessAware(flatmin.SAF(8, 3)), "given to the callback TrajectoryLoss"),
    "an optimizer for the loss": (lambda: TrajectoryLoss(flatmin.SAM), "given to the callback SharpnessAware"),
    "SAF without its sizes": (lambda: TrajectoryLoss(flatmin.SAF), "SAF, which refuses them.*num_samples"),
    "not a loss": (lambda: TrajectoryLoss(torch.nn.Linear(1, 1)), "flatmin.SAF or flatmin.MESA"),
    "keywords for a loss that is made": (lambda: TrajectoryLoss(flatmin.SAF(N, 10), lag=1), "made already"),
    "a network for saf": (lambda: TrajectoryLoss(flatmin.SAF, network="net"), "SAF needs none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_are_checked(case):
    make, said = WRONG[case]
    with pytest.raises(InvalidArgumentError, match=f"(?s){said}"):
        make()


def test_a_trainer_of_another_package():
    for callback in (sam(), saf()):
        with pytest.raises(InvalidArgumentError, match="import lightning as L"):
            callback.setup(types.SimpleNamespace(callbacks=[callback]), Net(), "fit")


@pytest.mark.parametrize("version", ["1.9.5", "2.5.9"])
def test_a_version_that_is_too_old(monkeypatch, version):
    monkeypatch.setattr(L, "__version__", version)
    with pytest.raises(MissingDependencyError, match=f"{version} is too old, 2.6 is needed; pip install"):
        _package.check_package()


def test_no_lightning(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lightning", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flatmin\[lightning\]'"):
        _package.check_package()


# Without the callback: right, or said.


def test_without_the_callback_logs_are_warned_of_once():
    module, net = returned(), network()
    with pytest.warns(FlatminWarning, match="count both passes of each SAM step: add the callback") as caught:
        fit(module)
    assert len(caught) == 1
    sam_by_hand(net)
    assert difference(module.net, net) < 1e-6


class Skipping(Net):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize("method", [flatmin.SAM, flatmin.S2SAM])
def test_without_the_callback_a_skipped_batch_names_it(method):
    logs = pytest.warns(FlatminWarning, match="count both") if method.max_passes == 2 else contextlib.nullcontext()
    with (
        logs,
        pytest.raises(InvalidArgumentError, match=r"training_step returned None.*SharpnessAware"),
    ):
        fit(Skipping(wrap=method))


def step_with_closure(module, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = module.loss(batch)
        module.manual_backward(loss)
        return loss

    optimizer.step(closure)


def step_over_passes(module, optimizer, batch):
    for _ in optimizer.passes():
        optimizer.zero_grad()
        module.manual_backward(module.loss(batch))


@pytest.mark.parametrize("step", [step_with_closure, step_over_passes])
def test_manual_optimization_is_right(step):
    module, net = Manual(step, wrap=flatmin.SAM), network()
    made = fit(module)
    sam_by_hand(net)
    assert difference(module.net, net) < 1e-6
    assert made.global_step == 10


@pytest.mark.parametrize("name", CLOSURES)
def test_manual_steps_without_a_closure_are_refused(name):
    def step(module, optimizer, batch):
        optimizer.zero_grad()
        module.manual_backward(module.loss(batch))
        optimizer.step()

    with pytest.raises(InvalidArgumentError, match=rf"(?s){name}.*optimizer.step\(closure\)"):
        fit(Manual(step, wrap=EVERY[name]))


def test_fabric_steps_with_a_closure():
    fabric = L.Fabric(accelerator="cpu", devices=1)
    net, by_hand = network(), network()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(net, flatmin.SAM(base, rho=0.05))
    torch.manual_seed(7)
    batches = fabric.setup_dataloaders(loader(), use_distributed_sampler=False)
    for _ in range(EPOCHS):
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                fabric.backward(loss)
                return loss

            optimizer.step(closure)
    sam_by_hand(by_hand)
    assert difference(net, by_hand) < 1e-6

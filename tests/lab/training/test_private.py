"""Private runs: Poisson batches, DP-SGD as Opacus makes it, the epsilon that was asked for, and what is refused."""

import pytest

pytest.importorskip("opacus")

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from flatmin import lab
from flatmin.errors import DataError, InvalidArgumentError
from flatmin.indices import with_indices
from flatmin.lab import cli
from flatmin.lab.comparison import compare
from flatmin.lab.methods import METHODS, Assembled, Card, get_method, register, resolve_settings
from flatmin.lab.methods.private import COMPARED, check_privacy
from flatmin.lab.problems.batches import rank_batches
from flatmin.lab.problems.problem import Problem, base_optimizer
from flatmin.lab.recipe import Run
from flatmin.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from flatmin.lab.training.private import ACCOUNTANT, ORDERS, noise_multiplier, poisson_loader
from flatmin.lab.training.trainer import Trainer
from tests.registry import restored

ALLOWED = [*COMPARED, "ema", "switch_ema", "lawa"]
SOON = {"lag": 1, "start_epoch": 1, "ema_epochs": 1.0}


def images(seed):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(dim=1))


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3))


def trainer(method="base", *, settings=None, train=None, model=network, seed=0, epochs=2, batch_size=10, **recipe):
    recipe = lab.Recipe(
        **{"epochs": epochs, "batch_size": batch_size, "device": "cpu", "private": 5.0, "clip": 0.5, **recipe}
    )
    card = get_method(method)
    soon = {name: value for name, value in SOON.items() if name in card.defaults}
    run = Run(recipe, method, resolve_settings(card, {**soon, **(settings or {})}, epochs=epochs), seed)
    problem = Problem(
        images(1) if train is None else train, images(2), 3, model, None, lambda p: base_optimizer(recipe, p)
    )
    return Trainer(run, problem)


def weights(trained):
    return torch.cat([parameter.detach().flatten() for parameter in trained.model.parameters()])


def fit(trained, epochs=2):
    return [trained.train_epoch() for _ in range(epochs)]


def test_base_is_dp_sgd_by_opacus():
    """The same batches and the same noise, in a loop of one's own."""
    ours, theirs = trainer(momentum=0.5, weight_decay=0.0), trainer(momentum=0.5, weight_decay=0.0)
    metrics = fit(ours)
    net, engine = theirs.model, PrivacyEngine(accountant=ACCOUNTANT)
    alone = network()
    alone.load_state_dict(net.state_dict())
    module, optimizer, _ = engine.make_private(
        module=alone,
        optimizer=torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.5),
        data_loader=theirs.loader,
        noise_multiplier=noise_multiplier(5.0, 1e-5, 1 / 4, 8),
        max_grad_norm=0.5,
        noise_generator=torch.Generator().manual_seed(0),
        poisson_sampling=False,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.original_optimizer, 2)
    for epoch in range(2):
        theirs._randomness.begin_epoch(epoch)
        for x, y in theirs.loader:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        schedule.step()
    assert torch.equal(weights(ours), torch.cat([p.detach().flatten() for p in alone.parameters()]))
    assert metrics[-1]["epsilon"] == engine.accountant.get_epsilon(1e-5, alphas=ORDERS)
    assert 4.9 < metrics[-1]["epsilon"] <= 5.0 < metrics[0]["epsilon"] * 2


def test_batches_are_drawn_by_poisson_sampling():
    data = images(1)
    loader = poisson_loader(data, 4, workers=0, generator=torch.Generator().manual_seed(0))
    drawn = [index for _ in range(200) for index, _ in with_indices(loader)]
    sizes = torch.tensor([float(len(index)) for index in drawn])
    assert len(drawn) == 2000
    assert float(sizes.mean()) == pytest.approx(4.0, abs=0.2)
    assert float(sizes.var()) == pytest.approx(4.0 * 0.9, abs=0.4)  # a binomial's
    assert torch.stack([torch.bincount(index, minlength=40) for index in drawn]).max() == 1
    assert rank_batches(loader).lengths == [len(index) for index in drawn[-10:]]


class Samples(Dataset):
    """The same samples, one at a time."""

    def __init__(self):
        self.tensors = images(1).tensors

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return tuple(tensor[index] for tensor in self.tensors)


@pytest.mark.parametrize("method", ["base", "saf", "mesa"])
def test_empty_batches_and_other_data_sets(method):
    for train in (None, Samples()):
        trained = trainer(method, batch_size=2, train=train)
        metrics = fit(trained)
        assert all(torch.isfinite(torch.tensor(list(each.values()))).all() for each in metrics)
        assert trained._private._engine.accountant.history[-1][2] == 40
        assert 0 in trained._batches.lengths


@pytest.mark.parametrize("method", ALLOWED)
def test_what_is_allowed_trains_at_the_same_epsilon(method):
    trained = trainer(method, settings={"rho": 0.5} if method == "dpsat" else None)
    metrics = fit(trained)
    assert metrics[-1]["epsilon"] == fit(trainer())[-1]["epsilon"]
    assert metrics[-1]["closure_calls"] == 1
    if method not in ("base", "ema", "lawa"):  # these train as the base does
        assert not torch.equal(weights(trained), weights(fitted()))


@pytest.mark.parametrize("method", ["base", "dpsat"])
def test_what_is_measured_changes_nothing(method):
    measured, plain = trainer(method, log_sharpness=1, log_curvature=1), trainer(method)
    assert fit(measured)[-1].keys() > {"sharpness", "top_eigenvalue"}
    fit(plain)
    assert torch.equal(weights(measured), weights(plain))


def test_bfloat16():
    trained = trainer("dpsat", precision="bfloat16")
    assert fit(trained)[-1]["test_loss"] < 2
    assert not torch.equal(weights(trained), weights(fitted()))


def fitted():
    trained = trainer()
    fit(trained)
    return trained


@pytest.mark.parametrize("method", ["base", "saf", "mesa", "dpsat"])
@pytest.mark.parametrize("steps", [3, 5])
def test_a_resumed_run_is_bit_identical(method, steps, tmp_path):
    whole, ended = trainer(method), trainer(method)
    expected = fit(whole)

    def end():
        if ended.progress.steps + 4 * ended.epoch == steps:
            save_checkpoint(tmp_path / "saved", ended.state_dict())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        while True:
            ended.train_epoch(end)
    resumed = trainer(method)
    resumed.load_state_dict(load_checkpoint(tmp_path / "saved"))
    found = [resumed.train_epoch() for _ in range(2 - resumed.epoch)]
    assert torch.equal(weights(whole), weights(resumed))
    assert resumed.epoch == 2
    assert found[-1]["epsilon"] == expected[-1]["epsilon"]


def test_a_state_of_a_run_without_privacy():
    with pytest.raises(DataError, match="private: the checkpoint has no accounted steps"):
        trainer().load_state_dict(trainer(private=None).state_dict())


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(ALLOWED)))
def test_other_methods_are_refused_by_name_before_any_work(method, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InvalidArgumentError, match=f"^{method} cannot train with differential privacy"):
        lab.compare(lab.Recipe(private=3.0), methods=["base", method], out=out)
    with pytest.raises(InvalidArgumentError, match=f"^{method} cannot train with differential privacy"):
        lab.train(lab.Recipe(private=3.0), method=method, out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "given", "label"),
    [
        ("saf", {"history": "auto"}, "saf history=auto"),
        ("mesa", {"fraction": 0.5}, "mesa fraction=0.5"),
        ("mesa", {"statistics": "batch"}, "mesa statistics=batch"),
    ],
)
def test_settings_that_mix_samples_are_refused(method, given, label):
    with pytest.raises(InvalidArgumentError, match=f"^{label} cannot train with differential privacy"):
        lab.compare(lab.Recipe(private=3.0), methods=["base", method], settings={method: given})


def test_a_low_rank_is_refused():
    lowrank = {**get_method("saf").defaults, "history": "lowrank"}
    check_privacy("saf", get_method("saf"), lowrank, private=False)
    with pytest.raises(InvalidArgumentError, match=r"^saf cannot train with differential privacy"):
        check_privacy("saf", get_method("saf"), lowrank, private=True)


def test_dpsat_needs_privacy():
    for start in (lambda: lab.compare(methods=["base", "dpsat"]), lambda: lab.train(method="dpsat")):
        with pytest.raises(InvalidArgumentError, match=r"^dpsat trains with differential privacy alone: --private"):
            start()
    with pytest.raises(InvalidArgumentError, match="dpsat trains with differential privacy alone"):
        trainer("dpsat", private=None)
    with pytest.raises(InvalidArgumentError, match="unknown direction"):
        resolve_settings(get_method("dpsat"), {"direction": "sideways"}, epochs=2)


def test_what_else_cannot_be():
    with pytest.raises(InvalidArgumentError, match=r"BatchNorm.*GroupNorm.*cnn-gn"):
        trainer(model=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    with pytest.raises(InvalidArgumentError, match="private and precision float16"):
        lab.Recipe(private=3.0, precision="float16")
    with pytest.raises(InvalidArgumentError, match="private must be a finite number > 0"):
        lab.Recipe(private=0.0)


def test_methods_of_ones_own():
    with restored():
        register(Card("plain", "x", {}, lambda given, settings: Assembled(given.optimizer), private=lambda s: True))
        own = lambda given, settings: Assembled(torch.optim.Adam(given.model.parameters()))  # noqa: E731
        register(Card("other", "x", {}, own, private=lambda s: True))
        register(Card("unsaid", "x", {}, lambda given, settings: Assembled(given.optimizer)))
        assert torch.equal(weights(trainer("plain")), weights(trainer()))
        with pytest.raises(InvalidArgumentError, match="other has an optimizer of its own"):
            trainer("other")
        with pytest.raises(InvalidArgumentError, match=r"^unsaid cannot train with differential privacy"):
            lab.train(lab.Recipe(private=3.0), method="unsaid")
        with pytest.raises(InvalidArgumentError, match="there is a method 'dpsat' already"):
            register(Card("dpsat", "x", {}, own))


class Stop(Exception):  # noqa: N818
    """With the rows that would be compared."""


def stop(recipe, rows, *_, **__):
    raise Stop(recipe, rows)


def test_a_private_comparison_has_dp_sgd_both_forms_and_what_else_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "Comparison", stop)
    with pytest.raises(Stop) as found:
        cli.run(["compare", "--private", "3", "--clip", "0.1", "--model", "cnn-gn", "--out", str(tmp_path / "out")])
    recipe, rows = found.value.args
    assert (recipe.private, recipe.clip, recipe.delta) == (3.0, 0.1, 1e-5)
    labels = ["base", "smoothing", "logit_squeezing", "saf", "mesa", "dpsat direction=gradient", "dpsat direction=step"]
    assert [row.label for row in rows] == labels
    assert [row.settings["direction"] for row in rows[-2:]] == ["gradient", "step"]


def test_the_network_of_the_command_trains_privately(tmp_path):
    recipe = lab.Recipe(model="cnn-gn", private=8.0, epochs=1, batch_size=100, train_samples=400)
    done = lab.train(recipe, method="dpsat", out=tmp_path / "out")
    assert 7 < done.metrics["epsilon"] <= 8
    again = lab.resume(tmp_path / "out")
    assert again.metrics == done.metrics

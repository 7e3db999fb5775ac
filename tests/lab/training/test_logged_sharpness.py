"""Sharpness during training: it is measured when due and changes nothing."""

import math

import pytest
import torch
from torch.nn import functional as F

from flatmin.errors import FlatminError, FlatminWarning
from flatmin.lab.training.logged_sharpness import epoch_sharpness, fixed_batches
from flatmin.sharpness import Objective, hessian_eigenvalues

CHEAP = {"sharpness", "sharpness_normalised", "gradient_norm"}
KEYS = CHEAP | {"top_eigenvalue", "lr_times_top_eigenvalue"}


@pytest.mark.parametrize("method", ["base", "mesa", "ema"])
def test_training_is_the_same_to_the_bit_with_and_without_it(make_trainer, method):
    plain, logged = make_trainer(method), make_trainer(method, log_sharpness=2, log_curvature=3)
    for epoch in range(3):
        without, metrics = plain.train_epoch(), logged.train_epoch()
        found = {name for name in metrics if name in KEYS}
        assert found == (set(), CHEAP, KEYS)[epoch]  # the last has both
        assert {n: v for n, v in metrics.items() if n not in KEYS | {"seconds"}} == {
            n: v for n, v in without.items() if n != "seconds"
        }
        for one, other in zip(plain.model.state_dict().values(), logged.model.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    assert metrics["lr_times_top_eigenvalue"] == pytest.approx(metrics["lr"] * metrics["top_eigenvalue"])
    assert metrics["sharpness"] > 0


def test_weights_that_are_not_finite_end_no_training(make_trainer):
    trainer = make_trainer("base", log_sharpness=1, log_curvature=1)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    found = epoch_sharpness(trainer, 0.1)
    assert found.keys() == KEYS
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("name", "lost"),
    [("sam_sharpness", CHEAP), ("hessian_eigenvalues", {"top_eigenvalue", "lr_times_top_eigenvalue"})],
)
def test_a_measure_that_fails_ends_no_training(make_trainer, monkeypatch, name, lost):
    def fail(*_, **__):
        raise FlatminError("no convergence")

    monkeypatch.setattr(f"flatmin.lab.training.logged_sharpness.{name}", fail)
    with pytest.warns(FlatminWarning, match="sharpness could not be logged: no convergence"):
        metrics = make_trainer("base", log_sharpness=1, log_curvature=1).train_epoch()
    assert {key for key in KEYS if math.isnan(metrics[key])} == lost


def test_the_top_eigenvalue_is_the_hessians(make_trainer):
    trainer = make_trainer("base", log_curvature=1)
    logged = trainer.train_epoch()["top_eigenvalue"]
    batches = fixed_batches(trainer.problem, 512, 0, trainer.device)
    objective = Objective(trainer.model, F.cross_entropy, batches, dtype=torch.float64)
    exact = hessian_eigenvalues(objective, tolerance=1e-8).value
    assert logged == pytest.approx(exact, rel=0.01)

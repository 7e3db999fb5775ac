"""The training loop: what is the same for every method, what is reported, and how it is continued."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from flatmin.errors import DataError, InvalidArgumentError
from flatmin.indices import with_indices
from flatmin.lab.methods import METHODS
from flatmin.lab.problems.load import load_problem
from flatmin.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from flatmin.lab.training.device import resolve_device
from flatmin.lab.training.trainer import Trainer

KEYS = ["epoch", "train_loss", "train_loss_vanilla", "test_loss", "test_accuracy", "lr", "seconds", "closure_calls"]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def batches(trainer, epochs=2, before_step=lambda: None):
    """Trains and returns each batch that reached the step."""
    seen, step = [], trainer.step

    def noting(index, x, y, **options):
        seen.append((index.clone(), x.clone(), y.clone()))
        before_step()
        return step(index, x, y, **options)

    trainer.step = noting
    for _ in range(epochs):
        trainer.train_epoch()
    return seen


def equal_batches(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


class Logits(torch.nn.Module):
    """Gives the true class of every test sample the largest logit, and then some samples' logits other values."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def forward(self, x):
        logits = torch.nn.functional.one_hot(x[:, 0, 0, :3].argmax(dim=1), 3).float()
        return self.spoil(logits, logits.argmax(dim=1))


def filled(value, where):
    """Gives logits a value, of all classes, of the true one or of one that is wrong, in every second sample."""

    def spoil(logits, y):
        chosen = {
            "all": torch.ones_like(logits, dtype=torch.bool),
            "true": F.one_hot(y, 3).bool(),
            "wrong": F.one_hot((y + 1) % 3, 3).bool(),
        }[where]
        chosen[1::2] = False
        return logits.masked_fill(chosen, value)

    return spoil


class TestOutputsThatAreNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["all", "true", "wrong"])
    def test_they_are_not_right(self, make_trainer, where, value):
        trainer = make_trainer("base")
        trainer.model = Logits(filled(value, where))
        loss, accuracy = trainer.evaluate()
        masked = where == "wrong" and value == -math.inf  # a class that is masked is no fault
        assert accuracy == (1.0 if masked else 0.5)
        assert math.isfinite(loss) == masked

    def test_finite_ones_are_as_they_were(self, make_trainer):
        trainer = make_trainer("base")
        trainer.model = Logits(lambda logits, y: logits)
        assert trainer.evaluate()[1] == 1.0
        trainer.model = Logits(lambda logits, y: -logits)
        assert trainer.evaluate()[1] == 0.0


class TestTheSameForEveryMethod:
    @pytest.mark.parametrize("method", [name for name in METHODS if name != "base"])
    def test_initial_weights_and_batches_of_a_seed(self, make_trainer, method):
        options = {"seed": 3, "crop": True, "flip": True}
        base, other = make_trainer("base", **options), make_trainer(method, **options)
        assert same(weights(base), weights(other))
        assert equal_batches(batches(base), batches(other))

    def test_another_seed_is_another_run(self, make_trainer):
        one, other = make_trainer("base", seed=0), make_trainer("base", seed=1)
        assert not same(weights(one), weights(other))
        assert not torch.equal(batches(one)[0][0], batches(other)[0][0])

    def test_every_epoch_has_its_own_order_of_all_samples(self, make_trainer):
        seen = [index for index, _, _ in batches(make_trainer("base"), epochs=2)]
        first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
        assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
        assert not torch.equal(first, second)

    def test_the_random_numbers_a_method_draws_change_neither_order_nor_augmentation(self, make_trainer):
        quiet, noisy = (make_trainer("base", crop=True, flip=True) for _ in range(2))
        assert equal_batches(batches(quiet), batches(noisy, before_step=lambda: torch.rand(7)))

    def test_indices_belong_to_the_samples(self, make_trainer):
        trainer = make_trainer("saf")
        x, y = trainer.problem.train.tensors
        for index, x_batch, y_batch in batches(trainer, epochs=1):
            assert torch.equal(x[index], x_batch)
            assert torch.equal(y[index], y_batch)

    @pytest.mark.parametrize("option", ["crop", "flip"])
    def test_augmentation_changes_training_images_and_no_others(self, make_trainer, option):
        trainer = make_trainer("base", **{option: True})
        test_inputs = []
        trainer.model.register_forward_pre_hook(
            lambda model, inputs: None if model.training else test_inputs.append(inputs[0])
        )
        x = trainer.problem.train.tensors[0]
        changed = [not torch.equal(x[index], x_batch) for index, x_batch, _ in batches(trainer, epochs=1)]
        assert all(changed)
        assert torch.equal(torch.cat(test_inputs), trainer.problem.test.tensors[0])


class TestMetrics:
    def test_they_are_those_of_the_issue(self, make_trainer):
        assert list(make_trainer("mesa").train_epoch()) == KEYS

    def test_esam_s_is_the_mean_of_its_losses_at_the_weights(self, make_trainer):
        trainer = make_trainer("esam", settings={"smoothing": 0.1})
        trainer.model[4].p = 0.0
        index, (x, y) = next(iter(with_indices(trainer.loader)))
        expected = F.cross_entropy(copy.deepcopy(trainer.model)(x), y, label_smoothing=0.1).detach()
        found = trainer.step(index, x, y)
        torch.testing.assert_close(found.vanilla, expected)
        assert found.calls == 3

    @pytest.mark.parametrize(("when", "calls"), [("always", 2.0), ("every:3", 4 / 3), ("late:0.5", 1.0)])
    def test_closure_calls_are_a_steps_on_average(self, make_trainer, when, calls):
        trainer = make_trainer("sam", settings={"when": when}, epochs=2)
        assert trainer.train_epoch()["closure_calls"] == pytest.approx(calls)

    @pytest.mark.parametrize("method", ["ema", "switch_ema", "lawa"])
    def test_an_average_is_evaluated_in_place_of_the_network(self, make_trainer, method):
        trainer = make_trainer(method)
        trainer.train_epoch()
        metrics = trainer.train_epoch()
        x, y = trainer.problem.test.tensors
        with torch.no_grad():
            logits = trainer.average(x)
            plain = trainer.model.eval()(x)
        assert metrics["test_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
        assert torch.equal(logits, plain) == (method == "switch_ema")

    @pytest.mark.parametrize("method", ["base", "smoothing", "sam"])
    def test_without_a_trajectory_loss_both_losses_are_one(self, make_trainer, method):
        trainer = make_trainer(method)
        for _ in range(3):
            metrics = trainer.train_epoch()
            assert metrics["train_loss"] == metrics["train_loss_vanilla"]

    @pytest.mark.parametrize("method", ["saf", "mesa"])
    def test_the_losses_differ_by_the_mean_penalty_from_its_start_epoch_on(self, make_trainer, method):
        trainer, penalties = make_trainer(method), []
        trainer.trajectory.register_forward_hook(
            lambda module, inputs, output: penalties.append((float(output.detach()), len(inputs[0])))
        )
        first, second = trainer.train_epoch(), trainer.train_epoch()
        assert first["train_loss"] == first["train_loss_vanilla"]
        wanted = sum(value * count for value, count in penalties[3:]) / 40
        assert wanted > 1e-4
        assert second["train_loss"] - second["train_loss_vanilla"] == pytest.approx(wanted, rel=1e-3)

    @pytest.mark.parametrize("method", [name for name in METHODS if name != "esam"])  # whose criterion gives no mean
    def test_the_vanilla_loss_is_the_mean_of_the_criterion_over_the_samples(self, make_trainer, method):
        trainer, losses = make_trainer(method), []
        trainer.stepping.criterion.register_forward_hook(
            lambda module, inputs, output: losses.append((float(output.detach()), len(inputs[0])))
        )
        trainer.train_epoch()
        losses.clear()
        step, passes = trainer.step, []  # the first of each step; a second is at other weights

        def noting(*batch, **weight):
            found = step(*batch, **weight)
            passes.append(losses[0])
            assert len(losses) == found.calls
            losses.clear()
            return found

        trainer.step = noting
        metrics = trainer.train_epoch()
        assert [count for _, count in passes] == [16, 16, 8]
        assert metrics["train_loss_vanilla"] == pytest.approx(sum(v * n for v, n in passes) / 40, rel=1e-5)

    def test_the_test_metrics_are_those_of_the_model_in_evaluation_mode(self, make_trainer):
        trainer = make_trainer("smoothing", settings={"smoothing": 0.5})
        metrics = trainer.train_epoch()
        x, y = trainer.problem.test.tensors
        with torch.no_grad():
            logits = trainer.model.eval()(x)
        assert metrics["test_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)  # never smoothed
        assert metrics["test_accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))

    @pytest.mark.parametrize("method", list(METHODS))
    def test_the_learning_rate_falls_along_a_cosine(self, make_trainer, method):
        trainer = make_trainer(method, epochs=4, lr=0.2)
        rates = [trainer.train_epoch()["lr"] for _ in range(4)]
        assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
    def test_label_smoothing(self, make_trainer, smoothing):
        criterion = make_trainer("smoothing", settings={"smoothing": smoothing}).stepping.criterion
        logits, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
        target = (1 - smoothing) * F.one_hot(y, 3) + smoothing / 3
        wanted = -(target * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(criterion(logits, y), wanted)

    def test_the_criterion_of_the_problem_is_used_and_not_smoothed(self, experiment, make_run):
        with open(experiment, "a") as file:
            file.write("\ndef criterion(): return lambda logits, y: (logits.sum() * 0 + 42)\n")
        run = make_run("base", experiment=experiment)
        trainer = Trainer(run, load_problem(run.recipe, 0))
        assert trainer.train_epoch()["train_loss"] == 42
        run = make_run("smoothing", experiment=experiment)
        with pytest.raises(InvalidArgumentError, match=r"smoothing=0.1 .* criterion\(\)"):
            Trainer(run, load_problem(run.recipe, 0))

    def test_the_train_mode_comes_back_after_an_evaluation(self, make_trainer):
        trainer, modes = make_trainer("base"), []
        trainer.model.register_forward_pre_hook(lambda model, inputs: modes.append(model.training))
        trainer.train_epoch()
        trainer.train_epoch()
        assert modes == [True, True, True, False] * 2


class TestContinuing:
    @pytest.mark.parametrize("method", list(METHODS))
    def test_from_a_checkpoint_on_disk_is_bitwise_equal_to_never_having_stopped(self, make_trainer, method, tmp_path):
        options = {"epochs": 4, "crop": True, "seed": 2}
        whole, first, second = (make_trainer(method, **options) for _ in range(3))
        expected = [whole.train_epoch() for _ in range(4)]
        for _ in range(2):
            first.train_epoch()
        save_checkpoint(tmp_path / "last", first.state_dict())
        torch.manual_seed(99)
        second.load_state_dict(load_checkpoint(tmp_path / "last"))
        continued = [second.train_epoch() for _ in range(2)]
        for ours, theirs in zip(continued, expected[2:], strict=True):
            assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
        assert same(weights(second), weights(whole))
        if whole.trajectory is not None:
            ours, theirs = second.trajectory.state_dict(), whole.trajectory.state_dict()
            assert same(ours, theirs)

    @pytest.mark.parametrize("part", ["scheduler", "epoch"])
    def test_parts_of_two_moments_are_refused(self, make_trainer, part):
        whole, second = make_trainer("base", epochs=4), make_trainer("base", epochs=4)
        whole.train_epoch()
        with pytest.raises(DataError, match=r"scheduler.last_epoch is [01], this run's is [01]"):
            second.load_state_dict({**whole.state_dict(), part: second.state_dict()[part]})

    @pytest.mark.parametrize("part", ["model", "optimizer"])
    def test_every_part_of_the_state_matters(self, make_trainer, part):
        whole, second = make_trainer("base", epochs=4), make_trainer("base", epochs=4)
        for _ in range(2):
            whole.train_epoch()
        second.load_state_dict({**whole.state_dict(), part: make_trainer("base", epochs=4).state_dict()[part]})
        whole.train_epoch()
        second.train_epoch()
        assert not same(weights(second), weights(whole))

    def test_the_history_of_saf_matters(self, make_trainer):
        whole, second = make_trainer("saf", epochs=4), make_trainer("saf", epochs=4)
        for _ in range(2):
            whole.train_epoch()
        second.load_state_dict({**whole.state_dict(), "trajectory": second.trajectory.state_dict()})
        assert whole.train_epoch()["train_loss"] > second.train_epoch()["train_loss"]


class TestBadInput:
    def test_labels_outside_the_classes(self, make_trainer):
        trainer = make_trainer("saf")
        trainer.problem.train.tensors[1][7] = 3
        with pytest.raises(DataError, match="outside the 3 classes: 3"):
            trainer.train_epoch()

    def test_test_labels_outside_the_classes(self, make_trainer):
        trainer = make_trainer("saf")
        trainer.problem.test.tensors[1][7] = -1
        with pytest.raises(DataError, match="outside the 3 classes: -1"):
            trainer.evaluate()

    @pytest.mark.parametrize("name", ["nonsense", "cuda:77"])
    def test_a_device_that_is_not_here(self, name):
        with pytest.raises(InvalidArgumentError, match=f"device '{name}' cannot be used"):
            resolve_device(name)

    @pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
    def test_smoothing_out_of_bounds(self, make_trainer, smoothing):
        with pytest.raises(InvalidArgumentError, match="smoothing must be a finite number >= 0 and < 1"):
            make_trainer("base", settings={"smoothing": smoothing})


@pytest.mark.parametrize("method", list(METHODS))
def test_bfloat16_computes_the_network_in_bfloat16_and_keeps_the_weights_in_float32(make_trainer, method):
    trainer, seen = make_trainer(method, precision="bfloat16"), []
    trainer.model.register_forward_hook(lambda model, inputs, output: seen.append(output.dtype))
    for _ in range(2):
        metrics = trainer.train_epoch()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert math.isfinite(metrics["train_loss"])


class TestFloat16:
    @pytest.mark.parametrize("method", list(METHODS))
    def test_the_network_is_computed_in_float16_and_the_weights_stay_in_float32(self, make_trainer, method):
        trainer, seen = make_trainer(method, precision="float16"), []
        trainer.model.register_forward_hook(lambda model, inputs, output: seen.append(output.dtype))
        before = weights(trainer)
        for _ in range(2):
            metrics = trainer.train_epoch()
        assert set(seen) == {torch.float16}
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert math.isfinite(metrics["train_loss"])
        assert not same(before, weights(trainer))

    @pytest.mark.parametrize("method", ["base", "sam", "msam", "esam", "mesa"])
    def test_a_step_that_overflows_is_dropped_and_the_scale_goes_down(self, make_trainer, method):
        trainer = make_trainer(method, precision="float16")
        index, (x, y) = next(iter(with_indices(trainer.loader)))
        trainer.step(index, x, y)
        scale, before = trainer._scaler.get_scale(), [p.clone() for p in trainer.model.parameters()]
        trainer.step(index, torch.full_like(x, torch.inf), y)
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        assert trainer._scaler.get_scale() == scale / 2

    @pytest.mark.parametrize("method", ["base", "gsam"])
    def test_its_scale_is_in_the_checkpoint(self, make_trainer, method):
        whole, first, second = (make_trainer(method, precision="float16") for _ in range(3))
        for trainer in (whole, first):
            trainer._scaler.scale(torch.ones(()))  # a scaler begins with its first scaling
            trainer._scaler.update(2.0**7)
            trainer.train_epoch()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for trainer in (whole, second):
            trainer.train_epoch()
        assert second._scaler.state_dict() == whole._scaler.state_dict()
        assert second._scaler.get_scale() == 2.0**7
        assert same(weights(second), weights(whole))

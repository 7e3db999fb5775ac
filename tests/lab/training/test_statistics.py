"""The batch-norm statistics of what is evaluated, if not those of training, and of MESA's target."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.lab.methods import METHODS, Assembled, Card
from flatmin.lab.problems.batches import drawn_batches
from flatmin.lab.runs import measure_sharpness, open_saved
from flatmin.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from flatmin.lab.runs.run import train_run
from flatmin.lab.training import evaluation
from flatmin.lab.training import trainer as trainer_module
from flatmin.lab.training.trainer import Trainer

EVALUATED = {"ema": "averaged", "switch_ema": "averaged", "lawa": "averaged", "msam": "trained", "s2sam": "trained"}


def statistics(network: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))]


def by_hand(trainer: Trainer) -> list[torch.Tensor]:
    """The mean and the variance, over all training images as they are, of what batch norm gets in the evaluation."""
    flatten, linear = trainer.evaluated[:2]
    x = linear(flatten(trainer.problem.train.tensors[0])).detach()
    return [x.mean(dim=0), x.var(dim=0)]


def evaluated_with(trainer: Trainer, monkeypatch) -> list[list[torch.Tensor]]:
    """The statistics at each evaluation from now on."""
    seen, evaluate = [], trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda: seen.append(statistics(trainer.evaluated)) or evaluate())
    return seen


def close(ours, theirs) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", EVALUATED)
@pytest.mark.parametrize("choice", [None, "fresh", "other"])
def test_what_is_evaluated_has_statistics_of_its_own_weights(make_trainer, method, choice, monkeypatch):
    statistics_of = {None: {}, "fresh": {"statistics": "fresh"}, "other": {"statistics": EVALUATED[method]}}
    trainer = make_trainer(method, crop=True, settings=statistics_of[choice])
    seen = evaluated_with(trainer, monkeypatch)
    for _ in range(2):
        trainer.train_epoch()
        assert close(seen[-1], by_hand(trainer)) == (choice != "other")


@pytest.mark.parametrize("method", [*EVALUATED, "mesa"])
def test_making_them_disturbs_neither_training_nor_random_numbers(make_trainer, method, monkeypatch):
    class Noisy(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(()), y

    runs = []
    for made in (True, False):
        trainer = make_trainer(method, crop=True)
        trainer.problem = replace(trainer.problem, train=Noisy(*trainer.problem.train.tensors))
        if method == "mesa" and made:  # its own statistics count, so only that they are made is compared
            trainer._refresh = copy.deepcopy(trainer.trajectory).refresh
        if not made:
            trainer._refresh = None
        for _ in range(2):
            trainer.train_epoch()
        runs.append([*trainer.model.parameters(), *(tensor for tensor in (torch.get_rng_state(),))])
        runs[-1] += [trainer._randomness.order.get_state(), trainer._randomness.augmentation.get_state()]
    assert [torch.equal(a, b) for a, b in zip(*runs, strict=True)] == [True] * len(runs[0])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dpsat"])
def test_a_recipe_gives_them_to_every_network_and_training_does_not_feel_it(make_trainer, method, monkeypatch):
    states = []
    for fresh in (True, False):
        trainer = make_trainer(method, fresh_statistics=fresh)
        seen = evaluated_with(trainer, monkeypatch)
        for _ in range(3):
            trainer.train_epoch()
            if fresh:
                assert close(seen[-1], by_hand(trainer))
        assert close(statistics(trainer.evaluated), by_hand(trainer)) == (fresh or method in EVALUATED)
        own = [] if trainer.trajectory is None else trainer.trajectory.state_dict().values()
        states.append([*trainer.model.parameters(), *(value for value in own if isinstance(value, torch.Tensor))])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_an_evaluation_that_fails_leaves_the_networks_own(make_trainer, monkeypatch):
    trainer, twin = (make_trainer("mesa", fresh_statistics=fresh) for fresh in (True, False))
    monkeypatch.setattr(trainer, "evaluate", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train_epoch()
    twin.train_epoch()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.buffers(), twin.model.buffers(), strict=True))


def test_a_registered_average_gets_them_by_itself(make_trainer, make_run, make_problem, monkeypatch):
    def assemble(given, settings):
        ema = flatmin.EMA(given.model, decay=0.8)
        ema.attach(given.optimizer)
        return Assembled(given.optimizer, average=ema)

    monkeypatch.setattr(trainer_module, "get_method", lambda name: Card("mine", "an average", {}, assemble))
    run = make_run("base")
    trainer = Trainer(run, make_problem(run))
    trainer.train_epoch()
    assert close(statistics(trainer.evaluated), by_hand(trainer))


@pytest.mark.parametrize("choice", ["averaged", "batch", "fresh"])
def test_mesas_target_has_the_statistics_that_were_asked_for(make_trainer, choice):
    settings = {"start_epoch": 0, "statistics": choice}
    trainer = make_trainer("mesa", settings=settings)
    assert trainer.trajectory.statistics == choice
    seen, target = [], trainer.trajectory.average.module

    def note(layer, inputs, output):
        x = inputs[0]
        own = (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias
        seen.append((torch.allclose(own, output, atol=1e-4), layer.running_mean))

    target[2].register_forward_hook(note)
    trainer.train_epoch()
    own = [found for found, running in seen if running is None]
    assert len(own) == (len(trainer.loader) if choice == "batch" else 0)
    assert all(own)
    x = target[1](target[0](trainer.problem.train.tensors[0])).detach()
    assert close(statistics(target), [x.mean(dim=0), x.var(dim=0)]) == (choice == "fresh")


@pytest.mark.parametrize("choice", ["batch", "fresh"])
@pytest.mark.parametrize("steps", [0, 2])
def test_mesa_goes_on_bitwise_with_each_of_them(make_trainer, choice, steps, tmp_path):
    options = {"epochs": 3, "settings": {"start_epoch": 0, "statistics": choice}}
    whole, first, second = (make_trainer("mesa", **options) for _ in range(3))
    expected = [whole.train_epoch() for _ in range(3)]

    class StopError(Exception):
        pass

    def stop():
        if first.epoch == 1 and first.progress.steps == steps:
            save_checkpoint(tmp_path / "last", first.state_dict())
            raise StopError

    first.train_epoch()
    if steps == 0:
        save_checkpoint(tmp_path / "last", first.state_dict())
    else:
        with pytest.raises(StopError):
            first.train_epoch(stop)
    second.load_state_dict(load_checkpoint(tmp_path / "last"))
    for theirs in expected[1:]:
        ours = second.train_epoch()
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    same = [second.model.state_dict().values(), second.trajectory.state_dict().values()]
    other = [whole.model.state_dict().values(), whole.trajectory.state_dict().values()]
    assert all(torch.equal(a, b) for x, y in zip(same, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("method", EVALUATED)
def test_the_batchs_own_are_for_mesa_alone(make_trainer, method):
    with pytest.raises(InvalidArgumentError, match=f"unknown statistics 'batch'; there are {EVALUATED[method]}, fresh"):
        make_trainer(method, settings={"statistics": "batch"})


@pytest.mark.parametrize("method", EVALUATED)
def test_a_network_without_batch_norm_reads_no_sample(make_run, make_problem, method, monkeypatch):
    run = make_run(method)
    problem = replace(make_problem(run), make_model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    trainer = Trainer(run, problem)

    read = []

    def none(*_):
        read.append(method)
        yield from ()

    monkeypatch.setattr(evaluation, "drawn_batches", none)
    assert trainer.train_epoch()["epoch"] == 0
    assert read == []


@pytest.mark.parametrize("method", EVALUATED)
def test_a_checkpoint_has_them(tmp_path, make_run, experiment, method):
    folder = tmp_path / "run"
    folder.mkdir()
    run = make_run(method, experiment=experiment)
    train_run(run, folder)
    saved = open_saved(folder)
    x = saved.model[0](saved.problem.train.tensors[0]).detach()
    assert close(statistics(saved.model), [x.mean(dim=0), x.var(dim=0)])
    assert measure_sharpness(folder, samples=20).path.exists()


@pytest.mark.parametrize(("size", "samples", "lengths"), [(40, 30, [16, 14]), (40, 99, [16, 16, 8]), (2, 99, [2])])
def test_drawn_batches_are_the_same_for_all_forms_of_a_data_set(size, samples, lengths):
    x = torch.arange(float(size))
    plain = torch.utils.data.TensorDataset(x, x.long())
    found = [list(drawn_batches(data, samples, 0, 16)) for data in (plain, list(zip(x, x.long(), strict=True)))]
    assert [len(x) for x, _ in found[0]] == lengths
    for (a, b), (c, d) in zip(*found, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert torch.equal(a.long(), b)
    drawn = torch.cat([x for x, _ in found[0]])
    assert len(set(drawn.tolist())) == min(size, samples)

"""What the command does on a GPU, on the CPU by the same code: data on the device, the layout of images, --compile."""

import copy
import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.lab.problems import problem as problem_module
from flatmin.lab.problems.batches import make_loader
from flatmin.lab.problems.source import TRAIN
from flatmin.lab.recipe import Recipe
from flatmin.lab.training import compiled, feed
from flatmin.lab.training import trainer as trainer_module
from flatmin.lab.training.device import release
from flatmin.lab.training.feed import Feed
from flatmin.lab.training.trainer import Trainer
from flatmin.losses import _captured, _mesa, _side
from tests.host_reads import NoReads
from tests.side import Late


@pytest.fixture
def held(monkeypatch):
    """Treats the CPU as a GPU whose memory holds the data."""
    monkeypatch.setattr(feed, "HELD", {"cpu"})


@pytest.fixture
def trainer_of(make_run, make_problem):
    def make(method="base", model=None, **recipe):
        run = make_run(method, **recipe)
        problem = make_problem(run)
        return Trainer(run, problem if model is None else dataclasses.replace(problem, make_model=model))

    return make


def trained(trainer, epochs=2):
    rows = [trainer.train_epoch() for _ in range(epochs)]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same_weights(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("options", [{}, {"crop": True, "flip": True}, {"method": "saf"}], ids=str)
def test_data_on_the_device_give_the_very_same_training(options, trainer_of, held, monkeypatch):
    monkeypatch.setattr("flatmin.lab.training.trainer.layout_of", lambda *_: None)
    trainer = trainer_of(**options)
    assert trainer._train.dataset is not trainer.problem.train
    assert trainer._test.evaluated_at_a_time(16) == 2048
    rows = trained(trainer)
    monkeypatch.setattr(feed, "HELD", set())
    plain = trainer_of(**options)
    assert plain._train.dataset is plain.problem.train
    assert plain._test.evaluated_at_a_time(16) == 512
    assert rows == trained(plain)
    assert same_weights(trainer, plain)


def test_images_are_channels_last_where_a_gpu_trains_on_them(trainer_of, held, monkeypatch):
    def model():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    rows = []
    for kind in (torch.channels_last, torch.contiguous_format):
        trainer = trainer_of(model=model, crop=True)
        seen, step = [], trainer.step
        trainer.step = lambda i, x, y, step=step, seen=seen, **rest: seen.append(x) or step(i, x, y, **rest)
        rows += trained(trainer, 1)
        kernels = [each for each in trainer.model.parameters() if each.ndim == 4]
        assert kernels
        assert all(each.is_contiguous(memory_format=kind) for each in kernels)
        assert kind != torch.channels_last or all(x.is_contiguous(memory_format=kind) for x in seen)
        monkeypatch.setattr(feed, "HELD", set())
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def test_a_run_may_go_on_where_the_data_do_not_fit(trainer_of, held, monkeypatch):
    monkeypatch.setattr("flatmin.lab.training.trainer.layout_of", lambda *_: None)
    whole = trainer_of()
    expected = trained(whole)
    first = trainer_of()
    trained(first, 1)
    monkeypatch.setattr(feed, "HELD", set())
    second = trainer_of()
    second.load_state_dict(first.state_dict())
    assert trained(second, 1) == expected[1:]
    assert same_weights(second, whole)


def test_what_does_not_fit_or_is_read_by_code_stays_where_it_is(make_run, make_problem, held, monkeypatch):
    problem, cpu = make_problem(make_run()), torch.device("cpu")

    class Own(TensorDataset):
        pass

    own = Own(*problem.train.tensors)
    wrong = TensorDataset(problem.train.tensors[0], problem.train.tensors[1] + 10)
    for dataset in (own, wrong):
        assert Feed(problem, TRAIN, dataset, cpu).dataset is dataset
    assert Feed(problem, TRAIN, problem.train, cpu, held=False).dataset is problem.train
    assert Feed(problem, TRAIN, problem.train, cpu).dataset is not problem.train
    monkeypatch.setattr(feed, "MOST", sum(tensor.nbytes for tensor in problem.train.tensors) - 1)
    assert Feed(problem, TRAIN, problem.train, cpu).dataset is problem.train


def test_feeds_of_one_set_share_its_copy(make_run, make_problem, held):
    """A comparison times all its rows at once."""
    problem, cpu = make_problem(make_run()), torch.device("cpu")
    one, other = (Feed(problem, TRAIN, problem.train, cpu) for _ in range(2))
    assert one._held is other._held is not None
    assert Feed(problem, TRAIN, problem.test, cpu)._held is not one._held
    shared = weakref.ref(one._held)
    del one, other
    assert shared() is None


def test_batches_that_are_read_are_pinned_for_a_gpu(make_run, make_problem, monkeypatch):
    """Of others the copy waits for all that the GPU has to do."""
    problem = make_problem(make_run())
    loader = make_loader(problem.train, 8, workers=0)
    there, here = (Feed(problem, TRAIN, problem.train, torch.device(name), held=False) for name in ("cuda", "cpu"))
    assert there._pinning(loader).pin_memory
    assert here._pinning(loader) is loader
    assert not loader.pin_memory
    seen = []
    monkeypatch.setattr(Feed, "_pinning", lambda self, loader: seen.append(self) or loader)
    next(here.batches(loader))
    next(here.without_index(loader))
    assert seen == [here, here]


def test_what_only_cycles_keep_is_given_back_to_the_gpu(monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flatmin.EMA(model).attach(optimizer)
    weight, found = weakref.ref(model.weight), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(weight()))
    gc.disable()
    try:
        del model, optimizer
        assert weight() is not None
        release()
    finally:
        gc.enable()
    assert found == [None]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gpu_makes_the_step_in_one_kernel_and_a_run_goes_on_elsewhere(optimizer, trainer_of, monkeypatch):
    plain = trainer_of("sam", optimizer=optimizer)
    trained(plain, 1)
    monkeypatch.setattr(problem_module, "FUSED", {"cpu"})
    assert trainer_of(optimizer=optimizer, precision="float16").optimizer.param_groups[0]["fused"] is None
    fused = trainer_of("sam", optimizer=optimizer)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert fused.optimizer.param_groups[0]["fused"] is True
    (row,), (expected,) = trained(fused, 1), trained(plain, 1)
    assert row == pytest.approx(expected, rel=1e-4)
    plain.load_state_dict(fused.state_dict())
    assert plain.optimizer.param_groups[0]["fused"] is None


def test_no_step_waits_for_the_device(trainer_of, held, monkeypatch):
    """What is made of the index, which is on the host: the batch, its augmentation, the step, the sums of losses."""
    trainer, calls = trainer_of("mesa", crop=True, flip=True), []

    def unread(function):
        def call(*args, **kwargs):
            calls.append(function)
            with NoReads():
                return function(*args, **kwargs)

        return call

    names = ("step", "_train._taken", "progress.add", "_first_losses.add")
    for owner, name in (*((trainer, name) for name in names), (trainer_module, "augmented")):
        *path, last = name.split(".")
        owner = functools.reduce(getattr, path, owner)
        monkeypatch.setattr(owner, last, unread(getattr(owner, last)))
    trainer.train_epoch()
    assert len(calls) == 5 * len(trainer.loader)


def test_the_loop_starts_the_average_before_the_network(trainer_of, monkeypatch):
    monkeypatch.setattr(_captured, "AFTER", 1)
    trainers, rows = [], []
    for side in (Late(), None):
        monkeypatch.setattr(_side, "SIDES", {"cpu": side} if side else {})
        monkeypatch.setattr(_mesa, "SIDES", _side.SIDES)
        monkeypatch.setattr(_captured, "SIDES", _side.SIDES)
        trainers.append(trainer_of("mesa"))
        if side is not None:
            note = lambda layer, *_: side.events.append("network" * layer.training)  # noqa: E731, B023
            trainers[-1].model.register_forward_hook(note)
        rows.append(trained(trainers[-1]))
        if side is not None:
            assert [event for event in side.events if event][-4:] == ["launch", "network", "join", "replay"]
    assert rows[0] == rows[1]
    assert same_weights(*trainers)


def test_a_compiled_network_trains_as_a_plain_one(trainer_of, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    trainer, plain = trainer_of("sam", compile=True), trainer_of("sam")
    assert trained(trainer, 1) == trained(plain, 1)
    assert same_weights(trainer, plain)
    assert hasattr(trainer._network, "_orig_mod")


def test_a_compiler_that_fails_is_named(trainer_of, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(compiled, "BACKEND", fails)
    with pytest.raises(InvalidArgumentError, match=r"could not be compiled .*no C\+\+ compiler.*leave out compile"):
        trained(trainer_of(compile=True), 1)
    with pytest.raises(InvalidArgumentError, match="private and compile exclude each other"):
        Recipe(private=3.0, compile=True)
    with pytest.raises(InvalidArgumentError, match="compile must be True or False"):
        Recipe(compile="yes")


def test_networks_of_three_dimensions_and_of_experiment_files_keep_their_layout(held):
    from flatmin.lab.training.layout import in_layout, layout_of, to_layout

    net = nn.Sequential(nn.Conv3d(2, 2, 2), nn.Conv2d(2, 2, 2))
    to_layout(net, torch.channels_last)
    assert all(each.is_contiguous() for each in net.parameters())
    assert layout_of(None, Recipe(experiment="x.py"), torch.device("cpu")) is None
    assert in_layout(x := torch.ones(2, 3), torch.channels_last) is x

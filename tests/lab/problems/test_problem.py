"""What is to be learnt: data by name, label noise, loaders, experiment files."""

import dataclasses
import itertools
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flatmin.errors import DataError, ExperimentError, InvalidArgumentError
from flatmin.lab.problems.batches import make_loader
from flatmin.lab.problems.experiment import HOOKS
from flatmin.lab.problems.load import import_experiment, load_problem
from flatmin.lab.problems.problem import base_optimizer, class_numbers
from flatmin.lab.recipe import Recipe

SPLIT = """
_all = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 2)
def train_set(): return torch.utils.data.random_split(_all, [10, 10])[0]
"""


class Pairs(torch.utils.data.Dataset):
    """Samples one by one, with labels that can be replaced."""

    def __init__(self, count=10):
        self.targets = [number % 2 for number in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.tensor([float(index)]), self.targets[index]


@pytest.fixture
def experiment_file(tmp_path, monkeypatch):
    """Writes an experiment file from its lines; what they leave out is the plainest that works."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    plain = {
        "model": "def model(): return torch.nn.Linear(1, 2)",
        "train_set": "def train_set(): return TensorDataset(torch.ones(4, 1), torch.tensor([0, 1, 0, 1]))",
        "test_set": "def test_set(): return TensorDataset(torch.ones(2, 1), torch.tensor([0, 1]))",
    }

    def write(**functions):
        lines = ["import torch", "from torch.utils.data import TensorDataset", *{**plain, **functions}.values()]
        path = tmp_path / "one_experiment.py"
        path.write_text("\n".join(line for line in lines if line))
        return Recipe(experiment=str(path), device="cpu")

    yield write
    sys.modules.pop("one_experiment", None)


def tensors(problem):
    return [*problem.train.tensors, *problem.test.tensors]


@pytest.mark.parametrize(("kind", "lr", "decay"), [("sgd", 0.1, 5e-4), ("adamw", 1e-3, 0.05)])
def test_the_base_optimizer_and_its_defaults(kind, lr, decay):
    (group,) = base_optimizer(Recipe(optimizer=kind), [torch.nn.Parameter(torch.ones(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (lr, decay)
    assert group.get("momentum", group.get("betas", [0])[0]) == 0.9
    given = Recipe(optimizer=kind, lr=0.02, weight_decay=0.0, momentum=0.5)
    (group,) = base_optimizer(given, [torch.nn.Parameter(torch.ones(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.0)
    assert group.get("momentum", group.get("betas", [0])[0]) == 0.5


def test_the_split_of_digits_belongs_to_the_seed():
    same, again, other = (load_problem(Recipe(), seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(again), strict=True))
    assert not torch.equal(same.train.tensors[1], other.train.tensors[1])


def test_label_noise_is_on_the_training_labels_alone():
    clean, noisy = load_problem(Recipe(), 3), load_problem(Recipe(label_noise=0.3), 3)
    x, y, test_x, test_y = tensors(clean)
    noisy_x, noisy_y, noisy_test_x, noisy_test_y = tensors(noisy)
    assert int((y != noisy_y).sum()) == round(0.3 * len(y))
    assert torch.equal(x, noisy_x)
    assert torch.equal(test_x, noisy_test_x)
    assert torch.equal(test_y, noisy_test_y)


def test_label_noise_belongs_to_the_seed():
    def flipped(seed):
        clean, noisy = load_problem(Recipe(), seed), load_problem(Recipe(label_noise=0.1), seed)
        return (clean.train.tensors[1] != noisy.train.tensors[1]).nonzero().flatten()

    assert torch.equal(flipped(0), flipped(0))
    assert not torch.equal(flipped(0), flipped(1))


@pytest.mark.parametrize("data", ["digitz", "idx:", "folder", "cifar10"])
def test_unknown_data_gets_what_there_is(data):
    with pytest.raises(
        InvalidArgumentError, match=f"unknown data '{data}'.*digits, mnist1d, idx:FOLDER and folder:FOLDER"
    ):
        load_problem(Recipe(data=data), 0)


@pytest.fixture
def _signals():
    pytest.importorskip("mnist1d")


@pytest.mark.usefixtures("_signals")
class TestSignals:
    def test_the_split_is_fixed_and_the_noise_belongs_to_the_seed(self):
        recipe = Recipe(data="mnist1d", model="cnn1d", label_noise=0.2)
        first, second = load_problem(recipe, 0), load_problem(recipe, 1)
        (x, y, *test), (other_x, other_y, *other_test) = tensors(first), tensors(second)
        assert all(torch.equal(a, b) for a, b in zip([x, *test], [other_x, *other_test], strict=True))
        assert not torch.equal(y, other_y)
        clean = load_problem(Recipe(data="mnist1d", model="cnn1d"), 0).train.tensors[1]
        assert int((y != clean).sum()) == 800
        assert first.make_model()(x[:2]).shape == (2, 10)

    @pytest.mark.parametrize("model", ["cnn", "resnet18", "timm/resnet18", "torchvision/resnet18"])
    def test_a_network_for_images_is_refused(self, model):
        message = f"model '{model}' takes images, and the data 'mnist1d' are signals .*; take model cnn1d"
        with pytest.raises(InvalidArgumentError, match=message):
            load_problem(Recipe(data="mnist1d", model=model), 0)

    @pytest.mark.parametrize("name", ["crop", "flip"])
    def test_the_augmentation_of_images_is_refused(self, name):
        message = rf"{name} is for images, and the data 'mnist1d' are signals of shape \(1, 40\)"
        with pytest.raises(InvalidArgumentError, match=message):
            load_problem(Recipe(data="mnist1d", model="cnn1d", **{name: True}), 0)


def test_a_network_for_signals_is_refused_on_images():
    message = r"model 'cnn1d' takes signals, and the data 'digits' are images of shape \(1, 8, 8\); take model cnn$"
    with pytest.raises(InvalidArgumentError, match=message):
        load_problem(Recipe(model="cnn1d"), 0)


@pytest.mark.parametrize("dataset", [TensorDataset(torch.arange(9), torch.arange(9)), Pairs(9)], ids=["tensors", "own"])
def test_a_loader_shuffles_the_training_set_by_its_generator_alone(dataset):
    def order(seed):
        torch.manual_seed(torch.initial_seed() + 1)  # the global generator says nothing about it
        loader = make_loader(dataset, 4, workers=0, generator=torch.Generator().manual_seed(seed))
        return [int(value) for x, _ in loader for value in x]

    assert order(0) == order(0) != order(1)
    assert len(set(order(0))) == 8  # of 9, a last batch of one left out


@pytest.mark.parametrize("size", [8, 9, 10])
def test_a_training_loader_leaves_out_a_last_batch_of_one_and_nothing_else(size):
    for dataset in (TensorDataset(torch.arange(size), torch.arange(size)), Pairs(size)):
        train = make_loader(dataset, 4, workers=0, generator=torch.Generator())
        test = make_loader(dataset, 4, workers=0)
        assert [len(x) for x, _ in train] == {8: [4, 4], 9: [4, 4], 10: [4, 4, 2]}[size]
        assert [int(value) for x, _ in test for value in x] == list(range(size))
        assert isinstance(train, DataLoader)


def test_a_data_set_derived_from_tensors_is_asked_sample_by_sample():
    class Mirrored(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x.flip(0), y

    x, y = torch.arange(8.0).view(4, 2), torch.arange(4)
    ((x_batch, y_batch),) = make_loader(Mirrored(x, y), 4, workers=0)
    assert torch.equal(y_batch, y)
    assert torch.equal(x_batch, x.flip(1))


class TestExperimentFile:
    def test_the_functions_are_used(self, experiment_file):
        recipe = experiment_file(
            criterion="def criterion(): return torch.nn.MultiMarginLoss()",
            optimizer="def optimizer(parameters): return torch.optim.Adagrad(parameters, lr=0.5)",
        )
        problem = load_problem(recipe, 0)
        assert (len(problem.train), len(problem.test), problem.num_classes) == (4, 2, 2)
        assert isinstance(problem.make_model(), torch.nn.Linear)
        assert isinstance(problem.criterion, torch.nn.MultiMarginLoss)
        assert isinstance(problem.make_optimizer([torch.ones(1, requires_grad=True)]), torch.optim.Adagrad)

    def test_criterion_and_optimizer_may_be_left_out(self, experiment_file):
        problem = load_problem(experiment_file(), 0)
        assert problem.criterion is None
        assert isinstance(problem.make_optimizer([torch.ones(1, requires_grad=True)]), torch.optim.SGD)

    def test_every_run_gets_a_fresh_network(self, experiment_file):
        problem = load_problem(experiment_file(), 0)
        assert problem.make_model() is not problem.make_model()

    def test_its_neighbours_can_be_imported(self, experiment_file, tmp_path):
        (tmp_path / "neighbour_of_it.py").write_text("CLASSES = 2")
        recipe = experiment_file(
            model="import neighbour_of_it\ndef model(): return torch.nn.Linear(1, neighbour_of_it.CLASSES)"
        )
        assert load_problem(recipe, 0).num_classes == 2
        del sys.modules["neighbour_of_it"]

    def test_a_hook_that_is_only_imported_is_refused_and_one_that_it_defines_is_not(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "neighbour_of_it.py").write_text("\n".join(f"def {name}(x): ..." for name in HOOKS))
        imported = ["from neighbour_of_it import {name}", "from neighbour_of_it import *", "import torch as {name}"]
        own = [
            "def {name}(): ...",
            "{name} = lambda: 1",
            "class {name}: ...",
            "from neighbour_of_it import {name}\n{name} = {name}",
            "import neighbour_of_it\n{name} = neighbour_of_it.{name}",
            "from neighbour_of_it import {name} as other",
            "try:\n    from nowhere import {name}\nexcept ImportError:\n    def {name}(): ...",
        ]
        recipe = Recipe(experiment=str(tmp_path / "of_hooks.py"))
        for name, form in itertools.product(HOOKS, imported + own):
            (tmp_path / "of_hooks.py").write_text(form.format(name=name))
            if form in own:
                import_experiment(recipe)
            else:
                said = rf"of_hooks.py: {'criterion' if '*' in form else name} is imported, .* \(import ... as\)"
                with pytest.raises(ExperimentError, match=said):
                    import_experiment(recipe)
        for module in ("neighbour_of_it", "of_hooks"):
            del sys.modules[module]

    def test_what_it_must_have_may_be_imported(self, experiment_file, tmp_path):
        (tmp_path / "my_nets.py").write_text("import torch\ndef model(): return torch.nn.Linear(1, 2)")
        assert load_problem(experiment_file(model="from my_nets import model"), 0).num_classes == 2
        del sys.modules["my_nets"]

    def test_label_noise_replaces_the_targets_of_a_data_set_of_its_own(self, experiment_file):
        recipe = experiment_file(
            train_set="class Own(torch.utils.data.Dataset):\n"
            "    targets = [0, 1] * 5\n"
            "    def __len__(self): return 10\n"
            "    def __getitem__(self, i): return torch.ones(1), self.targets[i]\n"
            "def train_set(): return Own()"
        )
        noisy = load_problem(Recipe(experiment=recipe.experiment, label_noise=0.2, device="cpu"), 0)
        assert sum(a != b for a, b in zip(noisy.train.targets, [0, 1] * 5, strict=True)) == 2
        assert all(isinstance(label, int) for label in noisy.train.targets)

    def test_label_noise_needs_labels_it_can_replace(self, experiment_file):
        recipe = experiment_file(
            train_set="def train_set(): return [(torch.ones(1), 0), (torch.ones(1), 1)]",
        )
        with pytest.raises(InvalidArgumentError, match=r"label_noise=0.2 needs .* got list"):
            load_problem(Recipe(experiment=recipe.experiment, label_noise=0.2), 0)

    @pytest.mark.parametrize(
        ("functions", "message"),
        [
            ({"model": ""}, r"no function model\(\)"),
            ({"train_set": "train_set = 3"}, r"no function train_set\(\)"),
            ({"test_set": ""}, r"no function test_set\(\)"),
            ({"model": "def model(:"}, "SyntaxError"),
            ({"model": "1 / 0"}, r"one_experiment.py:3: ZeroDivisionError"),
            ({"model": "def model():\n    raise RuntimeError('no GPU')"}, r"one_experiment.py:4: RuntimeError: no GPU"),
            ({"train_set": "def train_set(): return open('/nowhere/x')"}, r"one_experiment.py:4: FileNotFoundError"),
            ({"test_set": "def test_set(): raise KeyError('label')"}, r"one_experiment.py:5: KeyError"),
            ({"criterion": "def criterion(): return x"}, r"one_experiment.py:6: NameError"),
            ({"model": "def model(): return 3"}, r"model\(\) must return a torch.nn.Module, got int"),
            ({"train_set": "def train_set(): return 3"}, r"train_set\(\) must return a map-style data set.*got int"),
            ({"test_set": "def test_set(): return iter([1])"}, r"test_set\(\) must return a map-style data set"),
            ({"train_set": "def train_set(): return []"}, r"train_set\(\) returned an empty data set"),
            ({"train_set": "def train_set(): return TensorDataset(torch.ones(4, 1))"}, r"a sample must be a pair"),
            (
                {"model": "def model(): return torch.nn.Linear(1, 1)"},
                r"logits of shape \(batch, classes\), got \(2, 1\)",
            ),
            ({"model": "def model(): return torch.nn.Unflatten(1, (1, 1))"}, r"got \(2, 1, 1\)"),
            ({"model": "def model(): return torch.nn.LSTM(1, 2)"}, r"got tuple"),
            ({"model": "def model(): return torch.nn.Linear(5, 2)"}, "RuntimeError.*shapes cannot be multiplied"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_place(self, experiment_file, functions, message):
        with pytest.raises(ExperimentError, match=message) as caught:
            load_problem(experiment_file(**functions), 0)
        assert "one_experiment.py" in str(caught.value)

    @pytest.mark.parametrize("name", ["nowhere.py", "."])
    def test_a_file_that_is_not_there(self, name):
        with pytest.raises(ExperimentError, match="no such experiment file"):
            load_problem(Recipe(experiment=name), 0)

    def test_a_file_that_is_no_python(self, tmp_path):
        (tmp_path / "data.csv").write_text("1,2")
        with pytest.raises(ExperimentError, match=r"ending in \.py"):
            load_problem(Recipe(experiment=str(tmp_path / "data.csv")), 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "outside the 3 classes: 3"),
        (torch.tensor([-1, 2]), "outside the 3 classes: -1"),
        (torch.tensor([0.0, 1.0]), r"class indices.*float32.*y\.long\(\)"),
        (torch.eye(3), "class indices.*mixup.*MESA"),
        (torch.tensor([[0], [1]]), r"class indices.*y\[:, 0\]\.long\(\)"),
    ],
)
def test_labels_that_are_no_class_numbers(labels, message):
    with pytest.raises(DataError, match=message):
        class_numbers(labels, 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_labels_that_are_class_numbers_come_back_as_int64(dtype):
    labels = class_numbers(torch.tensor([0, 2, 1], dtype=dtype), 3)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 2, 1]


def test_a_split_that_an_experiment_file_draws_follows_from_the_seed_alone(experiment_file):
    recipe = experiment_file(train_set=SPLIT)

    def split(seed, disturbed):
        torch.rand(disturbed)  # what another run has drawn before in the same process
        return list(load_problem(recipe, seed).train.indices)

    assert split(0, 1) == split(0, 2)
    assert split(0, 1) != split(1, 1)


def test_label_noise_leaves_the_users_own_data_set_alone(experiment_file):
    shared = """
class Set:
    def __init__(self): self.targets = [number % 2 for number in range(20)]
    def __len__(self): return 20
    def __getitem__(self, index): return torch.ones(1), self.targets[index]
_set = Set()
def train_set(): return _set
def test_set(): return _set
"""
    recipe = dataclasses.replace(experiment_file(train_set=shared, test_set=""), label_noise=0.3)
    problem = load_problem(recipe, 0)
    clean = [number % 2 for number in range(20)]
    assert problem.test.targets == clean
    assert sum(a != b for a, b in zip(problem.train.targets, clean, strict=True)) == 6

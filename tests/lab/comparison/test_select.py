"""Settings chosen on held-out samples: what is held out, what is chosen, and that the test set stays unseen."""

import dataclasses

import pytest
from torch.utils.data import Dataset

from flatmin.errors import DataError, FlatminWarning, InvalidArgumentError
from flatmin.lab.comparison import select as module
from flatmin.lab.comparison.outcome import Outcome
from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.select import select
from flatmin.lab.problems.load import load_problem
from flatmin.lab.problems.problem import held_out, reduced
from flatmin.lab.recipe import Recipe


def as_set(dataset):
    return {(*x.flatten().tolist(), int(y)) for x, y in dataset}


class Wrapped(Dataset):
    """A data set that is no TensorDataset."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place):
        return self.dataset[place]


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, Wrapped])
def test_a_share_of_the_training_set_takes_the_place_of_the_test_set(make_run, make_problem, wrap):
    problem = make_problem(make_run())
    problem = dataclasses.replace(problem, train=wrap(problem.train))
    split = held_out(problem, 0.25, seed=3)
    assert (len(split.train), len(split.test)) == (30, 10)
    assert as_set(split.train) | as_set(split.test) == as_set(problem.train)
    assert not as_set(split.train) & as_set(split.test)
    assert as_set(held_out(problem, 0.25, seed=3).test) == as_set(split.test)
    assert as_set(held_out(problem, 0.25, seed=4).test) != as_set(split.test)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_labels_are_wrong_as_often_as_the_others(seed):
    clean, noisy = (load_problem(Recipe(label_noise=noise, validation=0.5), seed=seed) for noise in (0.0, 0.2))
    for name in ("train", "test"):
        ours, theirs = (getattr(problem, name).tensors[1] for problem in (clean, noisy))
        assert 0.14 < (ours != theirs).float().mean() < 0.26


def test_a_smaller_training_set_leaves_the_test_set_alone(make_run, make_problem):
    problem = make_problem(make_run())
    small = reduced(problem, 12, seed=0)
    assert len(small.train) == 12
    assert as_set(small.train) < as_set(problem.train)
    assert small.test is problem.test


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda problem: held_out(problem, 0.001, 0), InvalidArgumentError, "validation=0.001 of 40 .* is no sample"),
        (lambda problem: held_out(problem, 0.99, 0), DataError, "what validation=0.99 leaves"),
        (
            lambda problem: reduced(problem, 41, 0),
            InvalidArgumentError,
            "=41 is more than the 40 training samples",
        ),
        (lambda problem: reduced(problem, 1, 0), DataError, "train_samples=1"),
    ],
)
def test_too_few_are_explained(make_run, make_problem, change, error, message):
    with pytest.raises(error, match=message):
        change(make_problem(make_run()))


@pytest.fixture
def comparisons(monkeypatch):
    """Stands for the comparison: accuracy rises with the coefficient, or with the seeds given."""
    made = []

    class Fake:
        def __init__(self, recipe, rows, folder, **options):
            made.append((recipe, rows, options))
            self.outcome = Outcome(recipe, rows)

        def run(self):
            for row in self.outcome.rows:
                merit = row.settings.get("coefficient", 0.0)
                self.outcome.metrics[row.label] = {
                    seed: {"test_accuracy": min(merit, 0.8), "test_loss": 1.0 + merit} for seed in (1000, 1001)
                }
            return self.outcome

    monkeypatch.setattr(module, "Comparison", Fake)
    return made


def test_the_best_of_each_method_is_kept_in_order(comparisons, tmp_path):
    tried = {"saf": {"coefficient": [0.1, 0.5]}, "mesa": {"coefficient": [0.3, 0.8, 0.9]}}
    rows = make_rows(["mesa", "base", "sam", "saf"], tried, epochs=10)
    chosen, found = select(Recipe(epochs=10), rows, tmp_path / "selection", seeds=2)
    # 0.8 and 0.9 are equally accurate, and 0.8 has the lower loss
    assert [row.label for row in chosen] == ["base", "mesa coefficient=0.8", "sam", "saf coefficient=0.5"]
    assert [entry["label"] for entry in found["candidates"] if entry["chosen"]] == [
        "mesa coefficient=0.8",
        "saf coefficient=0.5",
    ]
    ((recipe, contested, options),) = comparisons
    assert recipe.validation == found["held_out"] == 0.2
    assert "sam" not in [row.label for row in contested]
    assert (options["seeds"], options["first_seed"], options["timed"]) == (2, 1000, False)


@pytest.mark.parametrize("lost", [{"saf coefficient=0.5"}, {"saf coefficient=0.1", "saf coefficient=0.5"}])
def test_a_diverged_candidate_comes_after_all_others(comparisons, tmp_path, monkeypatch, lost):
    plain = module.Comparison.run

    def run(self):
        outcome = plain(self)
        for label in lost:
            outcome.metrics[label][1001]["test_loss"] = float("nan")
        return outcome

    monkeypatch.setattr(module.Comparison, "run", run)
    rows = make_rows(["base", "saf"], {"saf": {"coefficient": [0.5, 0.1]}}, epochs=10)
    if len(lost) == 1:
        chosen, found = select(Recipe(epochs=10), rows, tmp_path / "selection", seeds=2)
        assert [row.label for row in chosen] == ["base", "saf coefficient=0.1"]
    else:
        with pytest.warns(FlatminWarning, match="saf diverged with every value"):
            _, found = select(Recipe(epochs=10), rows, tmp_path / "selection", seeds=2)
    assert {entry["label"] for entry in found["candidates"] if entry["diverged"]} == lost


def test_candidates_are_really_trained_on_other_seeds(tmp_path, experiment):
    recipe = Recipe(experiment=experiment, epochs=2, batch_size=20)
    rows = make_rows(["base", "saf"], {"saf": {"coefficient": [0.0, 0.3], "start_epoch": [1]}}, epochs=2)
    chosen, found = select(recipe, rows, tmp_path / "selection", seeds=1, jobs=1)
    assert len(chosen) == 2
    assert found["seeds"] == [1000]
    assert [len(entry["validation_accuracy"]) for entry in found["candidates"]] == [1, 1]
    assert sum(entry["chosen"] for entry in found["candidates"]) == 1

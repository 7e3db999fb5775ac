"""A saved run measured from Python: what is returned is what is written, and what the measures say."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from flatmin.errors import DataError, InvalidArgumentError
from flatmin.lab.runs import measure_landscape, measure_sharpness, open_saved
from flatmin.lab.runs.run import train_run as train
from flatmin.lab.training.logged_sharpness import fixed_batches
from flatmin.sharpness import Objective, hessian_eigenvalues, sam_sharpness, spectral_density


@pytest.fixture
def run(tmp_path, make_run, experiment):
    """Trains a run and returns its folder."""

    def make(method="base", seed=0):
        folder = tmp_path / f"{method}-{seed}"
        folder.mkdir()
        train(make_run(method, seed=seed, experiment=experiment), folder)
        return folder

    return make


def test_what_is_returned_is_what_was_written(run):
    folder = run("ema")
    words = []
    found = measure_sharpness(
        folder, rho=0.1, samples=20, seed=3, eigenvalues=2, trace=True, density=True, on_progress=words.append
    )
    assert found.path == folder / "sharpness.json"
    written = json.loads(found.path.read_text())
    assert [vars(each) for each in found.measures] == written["measures"]
    assert (list(found.eigenvalues), found.loss) == (written["eigenvalues"], written["loss"])
    assert list(found.density.density) == written["spectral_density"]["density"]
    assert (found.name, found.method, found.epoch, found.samples) == ("ema-0", "ema", 3, 20)
    assert len(words) == 7
    assert [(each.name, each.logits) for each in found.measures] == [
        (name, logits)
        for logits in ("raw", "normalised")
        for name in (
            "sam_sharpness",
            "sam_sharpness_adaptive",
            "average_sharpness",
            "gradient_norm",
            "top_eigenvalue",
            "hessian_trace",
        )
    ]


def test_it_is_what_the_measures_say_of_the_network_that_was_evaluated(run):
    folder = run("ema")
    found = measure_sharpness(folder, samples=20, seed=3, eigenvalues=2, density=True, float64=True, train_mode=True)
    saved = open_saved(folder)
    batches = fixed_batches(saved.problem, 20, 3, saved.device)
    objective = Objective(saved.model, F.cross_entropy, batches, batch_statistics=True, dtype=torch.float64, seed=3)
    values = {(each.name, each.logits): each.value for each in found.measures}
    assert values["sam_sharpness", "raw"] == sam_sharpness(objective).value
    normalised = objective.variant(normalise_logits=True)
    assert values["sam_sharpness_adaptive", "normalised"] == sam_sharpness(normalised, rho=0.5, adaptive=True).value
    assert found.eigenvalues == hessian_eigenvalues(objective, k=2).eigenvalues
    assert found.density == spectral_density(objective)


def test_a_landscape_is_returned_as_it_was_written_and_begins_at_the_loss(run):
    folder, points = run(), []
    found = measure_landscape(folder / "checkpoints" / "best", points=3, on_progress=lambda *told: points.append(told))
    assert found.path == folder / "landscape.json"
    written = json.loads(found.path.read_text())
    assert [list(row) for row in found.landscape.loss] == written["loss"]
    assert written["data"] == {"set": "train", "samples": 60, "seed": 0}
    assert found.landscape.loss[1][1] == pytest.approx(found.landscape.origin_loss)
    assert points == [(done, 9, "base-0/best") for done in range(1, 10)]
    assert (found.name, found.method) == ("base-0/best", "base")
    best = open_saved(folder / "checkpoints" / "best")
    x, y = fixed_batches(best.problem, 60, 0, best.device)[0]
    assert found.landscape.origin_loss == pytest.approx(F.cross_entropy(best.model.eval()(x), y).item(), rel=1e-5)


def test_the_plane_goes_through_three_runs(run):
    folders = [run("base"), run("base", seed=1), run("smoothing")]
    found = measure_landscape(folders[0], through=folders[1:], points=2)
    written = json.loads(found.path.read_text())
    assert found.landscape.kind == "plane"
    assert [place["name"] for place in written["checkpoints"]] == ["base-0", "base-1", "smoothing-0"]
    opened = [open_saved(folder) for folder in folders]
    assert measure_landscape(opened[0], through=opened[1:], points=2) == found
    for wrong in (folders[1:2], folders, folders[1], []):
        with pytest.raises(InvalidArgumentError, match="through must be two more runs"):
            measure_landscape(folders[0], through=wrong)


def test_an_opened_run_is_measured_as_its_path_is(run):
    folder = run()
    saved = open_saved(folder)
    state = copy.deepcopy(saved.model.state_dict())
    assert measure_sharpness(saved, eigenvalues=0) == measure_sharpness(str(folder), eigenvalues=0, device="cpu")
    assert all(torch.equal(tensor, saved.model.state_dict()[name]) for name, tensor in state.items())
    with pytest.raises(InvalidArgumentError, match=r"device='cpu' is for a path"):
        measure_sharpness(saved, device="cpu")


def test_an_interrupted_landscape_goes_on_where_it_was(run):
    folder = run()

    def stop(done, planned, word):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_landscape(folder, points=3, on_progress=stop)
    assert len(json.loads((folder / "landscape.partial").read_text())["losses"]) == 4
    told = []
    found = measure_landscape(folder, points=3, on_progress=lambda done, planned, word: told.append(done))
    assert told == [5, 6, 7, 8, 9]
    assert not (folder / "landscape.partial").exists()
    assert found == measure_landscape(folder, points=3)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"samples": 0}, "samples"), ({"seed": -1}, "seed"), ({"eigenvalues": -1}, "eigenvalues"), ({"rho": 0}, "rho")],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(run, options, match):
    folder = run()
    with pytest.raises(InvalidArgumentError, match=f"{match} must be"):
        measure_sharpness(folder, **options)
    if match in ("samples", "seed"):
        with pytest.raises(InvalidArgumentError, match=f"{match} must be"):
            measure_landscape(folder, **options)
    assert not list(folder.glob("sharpness*")) + list(folder.glob("landscape*"))


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    for function in (measure_sharpness, measure_landscape):
        with pytest.raises(DataError, match="no run there"):
            function(tmp_path)

import random
import socket
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

from flatmin.errors import MissingDependencyError
from flatmin.lab.problems.data import _mnist1d, load_mnist1d

generator = pytest.importorskip("mnist1d.data")


@pytest.fixture
def anew(monkeypatch):
    """A small set is generated again, and not remembered for the tests that follow."""
    arguments = generator.get_dataset_args()
    arguments.num_samples = 100
    monkeypatch.setattr(generator, "get_dataset_args", lambda: arguments)
    monkeypatch.setattr(_mnist1d, "_generate", cache(_mnist1d._generate.__wrapped__))


@pytest.fixture(scope="module")
def published():
    state = np.random.get_state(), random.getstate()
    made = generator.make_dataset()
    np.random.set_state(state[0])
    random.setstate(state[1])
    return made


def test_the_split_describes_itself():
    split = load_mnist1d()
    for half, size in ((split.train, 4000), (split.test, 1000)):
        x, y = half.tensors
        assert (x.shape, x.dtype) == ((size, 1, 40), torch.float32)
        assert (y.shape, y.dtype) == ((size,), torch.int64)
        assert set(y.tolist()) == set(range(10))
    assert (split.num_classes, split.input_shape) == (10, (1, 40))
    assert split.classes == tuple("0123456789")


def test_it_is_the_set_of_the_package_standardised_by_its_training_half(published):
    split = load_mnist1d()
    mean, std = published["x"].mean(), published["x"].std()
    for half, suffix in ((split.train, ""), (split.test, "_test")):
        x, y = half.tensors
        expected = torch.from_numpy((published[f"x{suffix}"] - mean) / std).float().unsqueeze(1)
        torch.testing.assert_close(x, expected)
        assert y.tolist() == published[f"y{suffix}"].tolist()
    assert abs(split.train.tensors[0].mean()) < 1e-5 < abs(split.test.tensors[0].mean())


def test_the_generator_is_still_the_one_our_results_rest_on(published):
    assert published["y"][:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    assert published["x"][0, :4] == pytest.approx([-0.33200567, -0.47191037, -0.77869708, -1.00974083])


@pytest.mark.usefixtures("anew")
def test_it_is_the_same_whatever_the_random_states_are():
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        _mnist1d._generate.cache_clear()
        drawn.append(load_mnist1d())
    assert all(
        torch.equal(a, b)
        for half in ("train", "test")
        for a, b in zip(getattr(drawn[0], half).tensors, getattr(drawn[1], half).tensors, strict=True)
    )


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("fails", [False, True])
def test_random_states_stay_as_they_are(monkeypatch, fails):
    make = generator.make_dataset

    def make_and_draw(args):
        made = make(args)
        torch.manual_seed(random.randrange(100))  # as other versions of the package may
        if fails:
            raise MemoryError
        return made

    monkeypatch.setattr(generator, "make_dataset", make_and_draw)
    random.seed(7)  # states that generating the set would not end in
    np.random.seed(7)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        load_mnist1d()
    except MemoryError:
        assert fails
    assert random.getstate() == states[0]
    for now, before in zip(np.random.get_state(), states[1], strict=True):
        assert np.array_equal(now, before)
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.usefixtures("anew")
def test_nothing_is_downloaded_written_or_printed(monkeypatch, tmp_path, capfd):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    load_mnist1d()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_who_changes_a_set_changes_no_other():
    for half in ("train", "test"):
        for changed, kept in zip(
            getattr(load_mnist1d(), half).tensors, getattr(load_mnist1d(), half).tensors, strict=True
        ):
            before = kept.clone()
            changed.zero_()
            assert torch.equal(kept, before)


@pytest.mark.usefixtures("anew")
def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(MissingDependencyError, match=r"'mnist1d' is needed .*pip install 'flatmin\[mnist1d\]'"):
        load_mnist1d()


def test_importing_the_loader_loads_no_optional_dependency():
    command = "import sys; import flatmin.lab.problems.data._mnist1d; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert not {name.split(".")[0] for name in output.split()} & {"mnist1d", "matplotlib", "requests"}

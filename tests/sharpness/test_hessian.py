"""Eigenvalues, trace and density against the full Hessian, and two Lanczos iterations against each other."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from flatmin.errors import FlatminError, MissingDependencyError
from flatmin.lab.problems.models import create_model
from flatmin.sharpness import Objective, hessian_eigenvalues, hessian_trace, spectral_density
from flatmin.sharpness._density import lanczos


@pytest.fixture
def hessian(network, whole):
    """The full Hessian, by torch's own function, of all parameters one after the other."""
    names = [name for name, _ in network.named_parameters()]
    shapes = [p.shape for p in network.parameters()]
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    x, y = whole[0]

    def loss(w):
        parts = w.split([s.numel() for s in shapes])
        return F.cross_entropy(
            functional_call(network, {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}, (x,)), y
        )

    return torch.autograd.functional.hessian(loss, flat)


def test_eigenvalues_are_those_of_the_full_hessian(network, batches, hessian):
    found = hessian_eigenvalues(Objective(network, F.cross_entropy, batches), k=5, tolerance=1e-10)
    wanted = torch.linalg.eigvalsh(hessian).flip(0)[:5]
    assert found.eigenvalues == pytest.approx(wanted.tolist(), rel=1e-8)
    assert found.value == found.eigenvalues[0]
    assert found.products >= 5


def test_all_but_one_eigenvalue_can_be_had(network, batches, hessian):
    k = len(hessian) - 1
    found = hessian_eigenvalues(Objective(network, F.cross_entropy, batches), k=k, tolerance=1e-10)
    assert found.eigenvalues == pytest.approx(torch.linalg.eigvalsh(hessian).flip(0)[:k].tolist(), abs=1e-8)


def test_the_trace_is_within_its_error(network, batches, hessian):
    found = hessian_trace(Objective(network, F.cross_entropy, batches), probes=400)
    wanted = float(hessian.trace())
    assert found.value == pytest.approx(wanted, abs=4 * found.standard_error)
    # Hutchinson's variance with signs: twice the squares off the diagonal.
    off = hessian - hessian.diag().diag()
    assert found.standard_error == pytest.approx(float((2 * off.square().sum() / 400).sqrt()), rel=0.2)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    model = torch.nn.Linear(3, 1, bias=False).double()
    batches = [(torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))]
    found = hessian_trace(Objective(model, F.mse_loss, batches), probes=2)
    assert found.value == pytest.approx(2.0, rel=1e-12)
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)


def test_two_iterations_agree_on_a_real_network():
    torch.manual_seed(0)
    model = create_model("cnn", 1, 10)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    one = hessian_eigenvalues(Objective(model, F.cross_entropy, [(x, y)]))
    other = spectral_density(Objective(model, F.cross_entropy, [(x, y)], seed=5), probes=1, steps=25)
    assert one.value == pytest.approx(other.largest, rel=1e-3)


def test_lanczos_gives_every_eigenvalue_of_a_small_matrix(hessian):
    matrix = hessian + torch.linspace(0, 1, len(hessian), dtype=torch.float64).diag()  # no two eigenvalues are equal
    start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nodes, weights = lanczos(lambda v: matrix @ v, start, 100)
    assert nodes.tolist() == pytest.approx(torch.linalg.eigvalsh(matrix).tolist(), abs=1e-9)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
    unit = start / start.norm()
    assert float(weights @ nodes) == pytest.approx(float(unit @ matrix @ unit), rel=1e-9)


def test_lanczos_stops_where_the_space_is_exhausted():
    matrix = torch.diag(torch.tensor([3.0, 3.0, 3.0, -1.0], dtype=torch.float64))
    nodes, weights = lanczos(lambda v: matrix @ v, torch.ones(4, dtype=torch.float64), 4)
    assert nodes.tolist() == pytest.approx([-1, 3])
    assert weights.tolist() == pytest.approx([0.25, 0.75])


def test_the_density_integrates_to_one_and_has_the_hessians_mean(network, batches, hessian):
    found = spectral_density(Objective(network, F.cross_entropy, batches), probes=8, steps=50)
    grid, density = torch.tensor(found.grid), torch.tensor(found.density)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)
    assert (density >= 0).all()
    values = torch.linalg.eigvalsh(hessian)
    assert (found.smallest, found.largest) == pytest.approx((float(values[0]), float(values[-1])), rel=1e-6)
    mean = float(torch.trapezoid(density * grid, grid))
    assert mean == pytest.approx(float(values.mean()), abs=0.1 * float(values.std()))


def test_a_loss_that_is_linear_has_no_curvature():
    model = torch.nn.Linear(4, 1)

    def mean(z, y):
        return z.mean()

    batches = [(torch.ones(2, 4), torch.zeros(2))]
    assert hessian_trace(Objective(model, mean, batches)).value == 0
    found = spectral_density(Objective(model, mean, batches), probes=1)
    assert sum(found.density) * (found.grid[1] - found.grid[0]) == pytest.approx(1, abs=1e-3)


def test_attention_has_second_derivatives():
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def loss(z, y):
        return F.cross_entropy(z.mean(dim=1), y)

    objective = Objective(model, loss, [(torch.randn(3, 4, 8), torch.tensor([0, 1, 2]))])
    assert hessian_trace(objective, probes=2).parameters > 0


def test_an_iteration_that_does_not_end_says_so(network, batches, monkeypatch):
    import scipy.sparse.linalg as linalg

    def fail(*args, **kwargs):
        raise linalg.ArpackNoConvergence("no", [1.0], [])

    monkeypatch.setattr(linalg, "eigsh", fail)
    with pytest.raises(FlatminError, match="found 1 of 3 eigenvalues"):
        hessian_eigenvalues(Objective(network, F.cross_entropy, batches), k=3)


def test_scipy_is_asked_for_by_name(network, batches, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(MissingDependencyError, match=r"flatmin\[cli\]"):
        hessian_eigenvalues(Objective(network, F.cross_entropy, batches))


def fitted():
    """A network that has every sample right beyond doubt."""
    model = nn.Linear(1, 3)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0], [0.0]]))
    return model, F.cross_entropy, [(torch.tensor([[5000.0], [-5000.0]]), torch.tensor([1, 0]))]


def linear():
    """A loss without curvature."""
    return nn.Linear(3, 2), lambda output, y: output.mean(), [(torch.randn(4, 3), torch.zeros(4))]


@pytest.mark.parametrize("make", [fitted, linear])
@pytest.mark.parametrize("options", [{}, {"k": 3}, {"tolerance": 0.05, "vectors": 5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hessian_of_nothing_has_eigenvalues_of_0(make, options, dtype):
    objective = Objective(*make(), dtype=dtype)
    assert hessian_eigenvalues(objective, **options).eigenvalues == (0.0,) * options.get("k", 1)
    assert hessian_trace(objective).value == 0
    found = spectral_density(objective, probes=1, steps=3)
    assert (found.smallest, found.largest) == (0, 0)

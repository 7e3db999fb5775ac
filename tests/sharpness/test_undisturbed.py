"""A measure leaves no trace in the model or in any random state, and says what it cannot measure."""

import contextlib
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin import sharpness
from flatmin.errors import FlatminError, FlatminWarning, InvalidArgumentError, NoDirectionError, NonFiniteLossError
from flatmin.sharpness import Objective

MEASURES = {
    "sam": (sharpness.sam_sharpness, {"ascent_steps": 2, "adaptive": True}),
    "sam per batch": (sharpness.sam_sharpness, {"per_batch": True}),
    "average": (sharpness.average_sharpness, {"directions": 2}),
    "eigenvalues": (sharpness.hessian_eigenvalues, {"k": 2}),
    "trace": (sharpness.hessian_trace, {"probes": 2}),
    "density": (sharpness.spectral_density, {"probes": 1, "steps": 3}),
    "landscape": (sharpness.loss_landscape, {"points": 3}),
}


@pytest.fixture(params=MEASURES)
def measure(request):
    function, options = MEASURES[request.param]
    return lambda *args, **shared: function(Objective(*args, **shared), **options)


def snapshot(model):
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "pointers": [p.data_ptr() for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def assert_same(before, after):
    for name, value in before.items():
        pairs = zip(value.values(), after[name].values(), strict=True) if name == "state" else [(value, after[name])]
        if name == "grad":
            pairs = zip(value, after[name], strict=True)
        for one, other in pairs:
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other), name
            else:
                assert one == other, name


@pytest.mark.parametrize("options", [{}, {"batch_statistics": True, "normalise_logits": True, "samples": 7}])
def test_nothing_is_disturbed(measure, delicate, options):
    model, batches = delicate
    before = snapshot(model)
    measure(model, F.cross_entropy, batches, **options)
    assert_same(before, snapshot(model))


class Folding(nn.Linear):
    """Folds two small weights into its own in evaluation mode, as loralib does."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.merged = False
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.register_buffer("told", torch.zeros(()), persistent=False)

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.a.T @ self.b.T)


@pytest.mark.parametrize("modes", ["training", "evaluation", "outside", "inside"])
@pytest.mark.parametrize("fails", [False, True])
def test_modules_that_fold_their_weights_are_unfolded(measure, modes, fails):
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    model = nn.Sequential(nn.Sequential(Folding(4, 8), nn.Dropout(0.5)), nn.ReLU(), nn.Linear(8, 3))
    folding = model[0][0]
    model.train(modes in ("training", "outside"))
    model[0].train(modes in ("training", "inside"))
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model) | {"merged": [folding.merged]}

    def loss(logits, y):
        if fails:
            raise KeyError("the user's own")
        return F.cross_entropy(logits, y)

    with contextlib.ExitStack() as stack:
        if not folding.merged:
            stack.enter_context(pytest.warns(FlatminWarning, match="Folding changes its weights when eval"))
        if fails:
            stack.enter_context(pytest.raises(KeyError))
        measure(model, loss, [(x, y)])
    assert_same(before, snapshot(model) | {"merged": [folding.merged]})
    model.train()
    assert not folding.merged
    F.cross_entropy(model(x), y).backward()
    assert folding.a.grad.abs().sum() > 0


def test_a_train_of_its_own_that_folds_nothing_is_no_matter(measure, delicate):
    class Frozen(nn.Sequential):
        """Keeps its statistics still, as is often done."""

        def train(self, mode=True):
            super().train(mode)
            self[0][1].eval()
            return self

    model, batches = delicate
    plain = measure(model, F.cross_entropy, batches)
    wrapped = Frozen(model).train()
    before = snapshot(wrapped)
    assert measure(wrapped, F.cross_entropy, batches) == plain
    assert_same(before, snapshot(wrapped))


@pytest.mark.parametrize("calls", [0, 5])
def test_nothing_is_disturbed_when_the_loss_raises(measure, delicate, calls):
    model, batches = delicate
    before, made = snapshot(model), []

    def loss(logits, y):
        torch.rand(1)
        if len(made) == calls:
            raise KeyError("the user's own")
        made.append(1)
        return F.cross_entropy(logits, y)

    with pytest.raises(KeyError):
        measure(model, loss, batches)
    assert_same(before, snapshot(model))


def test_it_measures_where_the_caller_has_switched_gradients_off(measure, delicate):
    model, batches = delicate
    plain = measure(model, F.cross_entropy, batches)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert measure(model, F.cross_entropy, batches) == plain


def test_a_measure_repeats_itself_whatever_the_random_state(measure, delicate):
    model, batches = delicate
    one = measure(model, F.cross_entropy, batches, samples=7)
    torch.manual_seed(99)
    assert measure(model, F.cross_entropy, batches, samples=7) == one


def test_dropout_is_off_and_normalisation_as_asked(delicate):
    model, batches = delicate
    seen = []
    hook = model[1].register_forward_pre_hook(lambda module, args: seen.append((module.training, model[4].training)))
    sharpness.sam_sharpness(Objective(model, F.cross_entropy, batches))
    assert set(seen) == {(False, False)}
    seen.clear()
    sharpness.sam_sharpness(Objective(model, F.cross_entropy, batches, batch_statistics=True))
    assert set(seen) == {(True, False)}
    hook.remove()


def test_the_subset_is_fixed_and_no_larger_than_asked(network, batches):
    measured = [
        sharpness.sam_sharpness(Objective(network, F.cross_entropy, batches, samples=4, seed=s)) for s in (0, 0, 1)
    ]
    assert measured[0] == measured[1] != measured[2]
    assert measured[0].samples == 4
    assert sharpness.sam_sharpness(Objective(network, F.cross_entropy, batches, samples=99)).samples == 10


def test_float32_and_float64_are_what_is_asked(network, batches):
    kinds = set()

    def loss(logits, y):
        kinds.add(logits.dtype)
        return F.cross_entropy(logits, y)

    for dtype in (torch.float32, torch.float64, None):
        sharpness.sam_sharpness(Objective(network, loss, batches, dtype=dtype))
    assert kinds == {torch.float32, torch.float64}
    assert network[0].weight.dtype is torch.float64


def test_a_result_becomes_json(measure, network, batches):
    import json

    found = measure(network, F.cross_entropy, batches)
    assert json.loads(json.dumps(found.to_json()))["samples"] == 10
    with pytest.raises(AttributeError):
        found.samples = 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batches": []}, "batches are empty"),
        ({"batches": [(torch.zeros(0, 3), torch.zeros(0))]}, "batches are empty"),
        ({"batches": iter([])}, "iterated again"),
        ({"batches": 3}, "iterated again"),
        ({"batches": [torch.zeros(2, 3)]}, "pairs"),
        ({"model": nn.Flatten()}, "no parameter with requires_grad"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, "mean over the batch"),
        ({"samples": 0}, "samples must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        ({"dtype": torch.float16}, "dtype must be"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, network, batches, options, match):
    given = {"model": network, "loss_fn": nn.CrossEntropyLoss(), "batches": batches, **options}
    with pytest.raises(InvalidArgumentError, match=match):
        measure(given.pop("model"), given.pop("loss_fn"), given.pop("batches"), **given)


def test_a_loss_that_is_not_finite_is_refused(measure, network, batches):
    with torch.no_grad():
        network[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="is nan"):
        measure(network, F.cross_entropy, batches)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (sharpness.sam_sharpness, {"rho": 0.0}),
        (sharpness.sam_sharpness, {"rho": float("inf")}),
        (sharpness.sam_sharpness, {"eta": -1}),
        (sharpness.sam_sharpness, {"ascent_steps": 0}),
        (sharpness.average_sharpness, {"rho": -1}),
        (sharpness.average_sharpness, {"directions": 1}),
        (sharpness.hessian_eigenvalues, {"k": 0}),
        (sharpness.hessian_eigenvalues, {"k": 43}),
        (sharpness.hessian_eigenvalues, {"tolerance": 0}),
        (sharpness.hessian_trace, {"probes": 1}),
        (sharpness.spectral_density, {"steps": 1}),
        (sharpness.spectral_density, {"width": 0.0}),
        (sharpness.loss_landscape, {"points": 1}),
        (sharpness.loss_landscape, {"radius": 0.0}),
        (sharpness.loss_landscape, {"directions": 3}),
        (sharpness.loss_landscape, {"margin": -0.1}),
    ],
)
def test_an_option_out_of_its_bounds_is_named(network, batches, function, options):
    (name, value), *_ = options.items()
    with pytest.raises(InvalidArgumentError, match=f"{name} must be .*{value}"):
        function(Objective(network, F.cross_entropy, batches), **options)


WEIGHT = torch.tensor([0.5, 2.0, 0.0])
COUNTING = {
    "ignored": F.cross_entropy,
    "ignored, module": nn.CrossEntropyLoss(ignore_index=-100),
    "weight": nn.CrossEntropyLoss(weight=WEIGHT.double()),
    "weight, function": functools.partial(F.cross_entropy, weight=WEIGHT.double(), ignore_index=-100),
    "label smoothing": nn.CrossEntropyLoss(weight=WEIGHT.double(), label_smoothing=0.1),
    "likelihood": lambda: functools.partial(F.nll_loss, weight=WEIGHT.double()),
    "another index": functools.partial(F.cross_entropy, ignore_index=1),
    "probabilities": F.cross_entropy,
}


@pytest.mark.parametrize("kind", COUNTING)
@pytest.mark.parametrize("name", [name for name in MEASURES if name != "sam per batch"])  # which measures the cuts
def test_what_the_loss_counts_does_not_depend_on_how_the_data_are_cut(network, kind, name):
    function, options = MEASURES[name]
    loss_fn = COUNTING[kind]() if kind == "likelihood" else COUNTING[kind]
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.arange(16) % 3
    if kind != "another index":
        y[:7] = -100
    if kind == "probabilities":
        y = F.one_hot(torch.arange(16) % 3, 3).double()
    found = []
    for size in (16, 6, 3):
        batches = list(zip(x.split(size), y.split(size), strict=True))
        found.append(numbers_of(function(Objective(network, loss_fn, batches), **options)))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6, abs=1e-9)


def numbers_of(result):
    """All floats of a result, in order."""
    values = [result.to_json()]
    flat = []
    while values:
        value = values.pop(0)
        if isinstance(value, (dict, list, tuple)):
            values = [*(value.values() if isinstance(value, dict) else value), *values]
        elif isinstance(value, float):
            flat.append(value)
    return flat


def test_the_loss_is_torchs_over_all_and_per_batch_by_what_counts(network):
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.arange(16) % 3
    y[:7] = -100
    batches = [*zip(x.split(4), y.split(4), strict=True)]  # of the first, nothing counts
    for loss_fn in (F.cross_entropy, COUNTING["weight"]):
        objective = Objective(network, loss_fn, batches)
        for per_batch in (False, True):
            found = sharpness.sam_sharpness(objective, per_batch=per_batch)
            assert found.loss == pytest.approx(loss_fn(network(x), y).item())
            assert (found.samples, found.value > 0) == (16, True)


def test_pixels_count_each_that_is_not_ignored():
    model = nn.Sequential(nn.Conv2d(2, 3, 1)).double()
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(3, (6, 4, 4))
    y[:2, 1:] = 255
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    losses = [
        sharpness.sam_sharpness(Objective(model, criterion, [*zip(x.split(n), y.split(n), strict=True)])).loss
        for n in (6, 2)
    ]
    assert losses == pytest.approx([criterion(model(x), y).item()] * 2)


def test_a_loss_that_ignores_every_target_is_refused(measure, network, batches):
    ignored = [(x, torch.full_like(y, -100)) for x, y in batches]
    with pytest.raises(InvalidArgumentError, match="ignores every target"):
        measure(network, F.cross_entropy, ignored)


class Noisy(nn.Module):
    """Draws from every generator in evaluation mode too."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.drawn = []

    def forward(self, x):
        noise = torch.rand(()), random.random(), np.random.rand()
        self.drawn.append(tuple(map(float, noise)))
        return self.network(F.dropout(x, 0.5, training=True) + sum(noise))


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_is_random_in_evaluation_mode_is_the_same_in_every_pass_whatever_the_size(
    measure, network, batches, monkeypatch, shuffle
):
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    found, drawn = [], []
    for kept in (2**28, 0):
        monkeypatch.setattr("flatmin.sharpness._batches.KEPT", kept)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=shuffle)
        noisy = Noisy(network)
        found.append(measure(noisy, F.cross_entropy, loader))
        drawn.append(list(noisy.drawn))
        again = measure(noisy, F.cross_entropy, loader, seed=1)
        assert again != found[-1]
    assert found[0] == found[1]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) <= 3  # one set of numbers for each of the three batches
    assert len(drawn[0]) > 3


def test_noise_does_not_hide_a_step_up_the_slope(network, batches):
    for seed in range(5):
        found = sharpness.sam_sharpness(Objective(Noisy(network), F.cross_entropy, batches, seed=seed), rho=1e-3)
        assert found.value == pytest.approx(1e-3 * found.gradient_norm, rel=0.05)


def test_large_sets_are_read_again_in_each_pass(network, batches, monkeypatch):
    kept = sharpness.sam_sharpness(Objective(network, F.cross_entropy, batches))
    monkeypatch.setattr("flatmin.sharpness._batches.KEPT", 0)
    assert sharpness.sam_sharpness(Objective(network, F.cross_entropy, batches)) == kept


def test_a_network_that_views_its_images_is_measured_too(batches):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 3)

        def forward(self, x):
            h = self.convolution(x)
            return self.head(h.view(len(x), -1))

    x, y = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    assert sharpness.sam_sharpness(Objective(Viewing(), F.cross_entropy, [(x, y)])).value > 0


class Words(nn.Module):
    def __init__(self, kind, max_norm):
        super().__init__()
        self.e, self.h = kind(10, 8, max_norm=max_norm), nn.Linear(8, 3)

    def forward(self, i):
        found = self.e(i)
        return self.h(found if found.ndim == 2 else found.mean(1))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.spare = nn.Linear(3, 3).requires_grad_(False), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return self.l(x)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat))

    def forward(self, x):
        return (x.to(self.w.dtype) @ self.w).abs()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_embedding_that_overwrites_its_weights_is_refused(measure, kind, frozen):
    batches = [(torch.randint(10, (16, 4)), torch.randint(3, (16,)))]
    model = Words(kind, 1.0)
    model.e.requires_grad_(not frozen)
    before = model.e.weight.clone()
    with pytest.raises(InvalidArgumentError, match=rf"the model's e, {kind.__name__}\(max_norm=1\), overwrites"):
        measure(model, F.cross_entropy, batches)
    assert torch.equal(before, model.e.weight)
    if kind is nn.Embedding:
        measure(Words(kind, None), F.cross_entropy, batches)


def test_a_loss_that_depends_on_no_weight_has_no_slope(measure, batches):
    batches = [(x.float(), y) for x, y in batches]
    try:
        found = measure(Unused(), F.cross_entropy, batches)
    except InvalidArgumentError as error:
        found = error
    if isinstance(found, sharpness.AverageSharpness):  # needs no slope
        assert found.value == 0
    elif not isinstance(found, sharpness.Landscape):
        assert "does not depend on any parameter" in str(found)


@pytest.mark.parametrize("name", ["eigenvalues", "trace", "density"])
def test_what_has_no_second_derivative_is_said_to_have_none(name):
    function, options = MEASURES[name]
    objective = Objective(
        Words(nn.EmbeddingBag, None), F.cross_entropy, [(torch.randint(10, (16, 4)), torch.randint(3, (16,)))]
    )
    with pytest.raises(InvalidArgumentError, match="has no second derivative, which the Hessian needs"):
        function(objective, **options)
    assert sharpness.sam_sharpness(objective).value > 0


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("part", [False, True])
def test_what_torch_jit_has_compiled_is_refused(measure, network, batches, part):
    scripted = torch.jit.script(nn.Linear(3, 3).double())
    model = nn.Sequential(network, scripted) if part else scripted
    with pytest.raises(InvalidArgumentError, match=r"is compiled by torch\.jit.*state dict"):
        measure(model, F.cross_entropy, batches)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("wrap", [nn.DataParallel, functools.partial(torch.compile, backend="eager")])
def test_what_is_wrapped_is_measured_as_the_network_itself(measure, network, batches, wrap):
    network.train()
    wrapped = wrap(network)
    assert measure(wrapped, F.cross_entropy, batches) == measure(network, F.cross_entropy, batches)
    assert wrapped.training
    assert network.training


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_complex_weights_are_refused_whatever_the_dtype(measure, batches, dtype):
    batches = [(x.float(), y) for x, y in batches]
    with pytest.raises(InvalidArgumentError, match=r"parameter w is complex.*view_as_real"):
        measure(Complex(), F.cross_entropy, batches, dtype=dtype)


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sharpness.hessian_trace(Objective(model, F.cross_entropy, [(x, torch.tensor([0, 1, 2, 0]))]))
    assert found.parameters == 9


def test_errors_are_the_librarys_own():
    assert issubclass(NonFiniteLossError, FlatminError)


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_few_logits_to_be_normalised_are_refused(measure, logits, dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, logits))
    batches = [(torch.randn(8, 3), torch.randn(8, logits))]
    measure(model, F.mse_loss, batches, dtype=dtype)
    with pytest.raises(NoDirectionError, match=f"at least three logits a sample, got {logits}"):
        measure(model, F.mse_loss, batches, dtype=dtype, normalise_logits=True)


def test_a_flat_output_cannot_be_normalised(measure):
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    with pytest.raises(NoDirectionError, match="got 1"):
        measure(model, F.mse_loss, [(torch.randn(8, 3), torch.randn(8))], normalise_logits=True)


def test_logits_that_are_all_equal_have_no_direction(measure, network, batches):
    for parameter in network[-1].parameters():
        nn.init.zeros_(parameter)
    measure(network, F.cross_entropy, batches)
    with pytest.raises(NoDirectionError, match="as of a head whose weights are 0"):
        measure(network, F.cross_entropy, batches, normalise_logits=True)

"""Networks that are more than weights: masks, caches, norms with state, hooks, layers that fold, layers by name."""

import contextlib
import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError
from tests.host_reads import NoReads

C = 3
AVERAGES = {
    "EMA": lambda model: flatmin.EMA(model, decay=0.8),
    "SwitchEMA": lambda model: flatmin.SwitchEMA(model, decay=0.8),
    "LAWA": lambda model: flatmin.LAWA(model, k=2),
    "MESA": lambda model: flatmin.MESA(model, decay=0.8, start_epoch=0),
}
every = pytest.mark.parametrize("name", AVERAGES)


@every
def test_weights_in_new_memory_are_followed(name):
    """``weight.data = ...``: what was found before is of the old memory."""
    model = nn.Linear(4, C)
    average = AVERAGES[name](model)
    update(average, 2)
    model.weight.data = model.weight.detach() + 100.0
    inner(average).bias.data = inner(average).bias.detach().clone()
    update(average, 4)
    assert (inner(average).weight > 50 * 0.2).all()
    before = inner(average).bias.detach().clone()
    with torch.no_grad():
        model.bias += 1.0
    update(average, 3)
    assert (inner(average).bias > before).all()


@pytest.mark.parametrize("statistics", ["averaged", "batch"])
def test_the_host_reads_nothing_where_mesa_is_used_and_moved(statistics):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, C))
    mesa = flatmin.MESA(model, start_epoch=0, statistics=statistics, fraction=0.5)
    x = torch.randn(6, 1, 8, 8)
    for epoch in range(3):
        mesa.set_epoch(epoch)
        with NoReads() if epoch == 2 else contextlib.nullcontext():
            mesa(model(x), x).backward()
            mesa.update()


def inner(average: nn.Module) -> nn.Module:
    return (average.average if isinstance(average, flatmin.MESA) else average).module


def run(average: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return average.average(x) if isinstance(average, flatmin.MESA) else average(x)


def update(average: nn.Module, times: int = 3) -> None:
    for _ in range(times):
        average.update()
    if isinstance(average, flatmin.SwitchEMA):
        average.switch()


def batch(size: int = 5) -> torch.Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


class Masked(nn.Module):
    """A causal mask as a buffer or a frozen parameter, and a range that is found with the first batch."""

    def __init__(self, frozen: bool):
        super().__init__()
        self.linear = nn.Linear(4, C)
        mask = torch.full((C, C), float("-inf")).triu(1)
        if frozen:
            self.mask = nn.Parameter(mask, requires_grad=False)
        else:
            self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("never", torch.tensor(float("nan")))
        self.register_buffer("constant", torch.tensor([0.1, 0.7]))
        self.register_buffer("moves", torch.tensor(1.0))

    def forward(self, x):
        return self.linear(x) @ self.mask.softmax(1)


@every
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_not_finite_or_does_not_move_is_copied(name, frozen):
    model = Masked(frozen)
    average = AVERAGES[name](model)
    with torch.no_grad():
        model.low.fill_(2.0)
        model.moves.fill_(5.0)
    for _ in range(3):
        update(average, times=1)
        for network in (inner(average), model):
            assert torch.equal(network.mask, Masked(False).mask)
            assert network.low == 2
            assert network.never.isnan()
            assert torch.equal(network.constant, torch.tensor([0.1, 0.7]))
            assert network(batch()).isfinite().all()
    assert run(average, batch()).isfinite().all()
    expected = {"EMA": 5 - 4 * 0.8**3, "LAWA": 5.0, "MESA": 5 - 4 * 0.8**3, "SwitchEMA": 1.8}
    assert inner(average).moves.item() == pytest.approx(expected[name])  # other buffers are averaged still
    if name == "MESA":
        assert average(model(batch()), batch()) == 0


@every
def test_tensors_are_paired_by_name(name):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("second", nn.Linear(4, 4))
    average = AVERAGES[name](model)
    weights = copy.deepcopy(model.state_dict())
    first = model._modules.pop("first")
    model.add_module("first", first)  # registered in another order
    update(average)
    for network in (inner(average), model):
        for key, value in weights.items():
            torch.testing.assert_close(network.state_dict()[key], value)
    second = model._modules.pop("second")
    with pytest.raises(InvalidArgumentError, match=r"no parameter 'second.weight', .*make the average anew"):
        average.update()
    model.second, model.third = second, nn.Linear(4, 4)
    with pytest.raises(InvalidArgumentError, match=r"parameter 'third.bias', which its average lacks"):
        average.update()


@every
def test_a_layer_may_be_wrapped_in_place_and_weights_be_tied(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    average = AVERAGES[name](model)
    model[0] = torch.compile(model[0], backend="eager")
    with torch.no_grad():
        model[1].weight += 1
        model[0].bias += 1
    before = inner(average)[0].weight.clone()
    update(average, times=1)
    assert not torch.equal(inner(average)[0].weight, before)
    assert inner(average)[0].weight is inner(average)[1].weight
    if name == "LAWA":
        assert torch.equal(inner(average)[0].weight, model[1].weight)


class Cached(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.linear = nn.Linear(4, C)
        self.register_buffer("cache", first, persistent=False)

    def forward(self, x):
        if self.cache is None or len(self.cache) < len(x):
            self.cache = torch.arange(len(x)).float()[:, None]
        return self.linear(x) * self.cache[: len(x)]


@every
@pytest.mark.parametrize("first", [None, torch.arange(2.0)[:, None]], ids=["comes", "grows"])
def test_buffers_that_come_grow_or_go_are_followed(name, first):
    model = Cached(first)
    average = AVERAGES[name](model)
    names = set(average.state_dict())
    for size in (5, 9):
        model(batch(size))
        update(average)
        assert torch.equal(inner(average).cache, torch.arange(size).float()[:, None])
        assert torch.equal(model.cache, inner(average).cache)
        torch.testing.assert_close(run(average, batch(size)), model(batch(size)))
    assert set(average.state_dict()) == names  # it is not persistent there either
    model.cache = None
    update(average)
    assert inner(average).cache is None
    model.late = nn.Module()
    model.late.register_buffer("more", torch.ones(1))
    with pytest.raises(InvalidArgumentError, match=r"buffer 'late.more' in a layer that its average lacks"):
        average.update()


class Sharded(nn.Linear):
    def __deepcopy__(self, memo):
        raise AssertionError("FSDP does not support deepcopy")


@every
@pytest.mark.parametrize("kind", ["generator", "sharded", "lazy"])
def test_a_network_that_cannot_be_copied_is_told_what_can_be_done(name, kind):
    model = {"generator": nn.Linear(4, C), "sharded": Sharded(4, C), "lazy": nn.LazyLinear(C)}[kind]
    if kind == "generator":
        model.noise = (i for i in range(3))
    with pytest.raises(InvalidArgumentError) as error:
        AVERAGES[name](model)
    said = str(error.value)
    assert ("fully_shard" in said) == (kind == "sharded")
    assert ("call model once with a batch" in said) == (kind == "lazy")
    assert ("copy.deepcopy cannot copy" in said) == (kind == "generator")
    assert ("average=" in said) == (name == "MESA" and kind != "lazy")  # the others have no such argument
    if kind == "lazy":
        model(batch())
        AVERAGES[name](model)


def spectral(old: bool) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.utils.spectral_norm if old else parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(4, 16)), nn.ReLU(), norm(nn.Linear(16, 16)), nn.ReLU(), norm(nn.Linear(16, C)))


@every
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("after_a_pass", [False, True])
def test_spectral_norm_of_an_average_is_1(name, old, after_a_pass):
    model = spectral(old)
    if after_a_pass:  # old spectral_norm then has a weight that it computed
        model(batch())
    average = AVERAGES[name](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        optimizer.zero_grad()
        x = torch.randn(16, 4, generator=generator)
        (3 * model(x)).log_softmax(1)[range(16), x[:, :C].argmax(1)].mean().neg().backward()
        optimizer.step()
        average.update()
    if isinstance(average, flatmin.SwitchEMA):
        average.switch()
    x = batch()
    expected = copy.deepcopy(inner(average))
    for number in (0, 2, 4):
        weight = inner(average)[number].weight_orig if old else inner(average)[number].parametrizations.weight.original
        with torch.no_grad():
            before = expected[number](torch.eye(weight.shape[1])) - expected[number].bias
        assert torch.linalg.matrix_norm(before, 2).item() == pytest.approx(1, abs=0.01)
    assert torch.equal(run(average, x), inner(average)(x))
    if name == "SwitchEMA":
        assert torch.equal(model.eval()(x), inner(average)(x))


@every
@pytest.mark.parametrize("kind", ["weight_norm", "parametrized", "orthogonal"])
def test_other_reparametrisations_work_before_and_after_a_pass(name, kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, for the old form
        layer = {
            "weight_norm": nn.utils.weight_norm,
            "parametrized": parametrizations.weight_norm,
            "orthogonal": parametrizations.orthogonal,
        }[kind](nn.Linear(4, C))
    model = nn.Sequential(layer)
    model(batch())
    average = AVERAGES[name](model)
    update(average)
    torch.testing.assert_close(run(average, batch()), model(batch()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(batch())[:, 0].sum().backward()
    optimizer.step()
    assert not torch.allclose(run(average, batch()), model(batch()), atol=0.05)
    update(average, times=60)
    torch.testing.assert_close(run(average, batch()), model(batch()), atol=1e-3, rtol=1e-3)


@every
def test_masks_of_pruning_are_copied(name):
    model = nn.Sequential(nn.Linear(4, C))
    prune.random_unstructured(model[0], "weight", amount=2)
    model(batch())
    average = AVERAGES[name](model)
    prune.random_unstructured(model[0], "weight", amount=3)
    assert int(model[0].weight_mask.sum()) == 4 * C - 5
    update(average, times=1)
    assert torch.equal(inner(average)[0].weight_mask, model[0].weight_mask)
    torch.testing.assert_close(run(average, batch()), model(batch()))


class Keeper:
    def __init__(self, *modules):
        self.seen = []

    def keep(self, *arguments):
        self.seen.append(arguments[-1])


class Gathering(nn.Module):
    """Its result is what its own hooks gather."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, C)
        self.layer.register_forward_hook(functools.partial(self.gather, 1.0))
        self.found = {}

    def gather(self, scale, layer, inputs, output):
        self.found["logits"] = scale * output

    def forward(self, x):
        self.layer(x)
        return self.found.pop("logits")


FOREIGN = {
    "function": lambda keeper: lambda *arguments: keeper.keep(*arguments),
    "method": lambda keeper: keeper.keep,
    "partial": lambda keeper: functools.partial(keeper.keep, 1),
}


@every
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("pre", [False, True])
def test_hooks_that_keep_features_get_the_networks_alone(name, kind, pre):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, C))
    keeper = Keeper()
    hook = FOREIGN[kind](keeper)
    model[1].register_forward_pre_hook(hook) if pre else model[1].register_forward_hook(hook)
    with pytest.warns(
        FlatminWarning, match=r"without the forward hooks of 1: .*register it on average.module"
    ) as caught:
        average = AVERAGES[name](model)
    assert [warning.filename for warning in caught] == [__file__]
    logits = model(batch())
    run(average, batch())
    if name == "MESA":
        average(logits, batch())
    assert len(keeper.seen) == 1
    assert len(model[1]._forward_pre_hooks if pre else model[1]._forward_hooks) == 1
    model(batch())
    assert len(keeper.seen) == 2


@every
def test_hooks_that_belong_to_the_network_are_the_copys(name):
    model = Gathering()
    average = AVERAGES[name](model)
    with torch.no_grad():
        model.layer.bias += 1
    assert not torch.equal(run(average, batch()), model(batch()))
    assert torch.equal(run(average, batch()), inner(average).layer(batch()))
    assert not model.found


@pytest.mark.parametrize(
    "make", [copy.deepcopy, AveragedModel, lambda model: torch.compile(copy.deepcopy(model), backend="eager")]
)
def test_an_average_that_was_given_runs_without_the_networks_hooks_too(make):
    model, seen, own = nn.Sequential(nn.Linear(4, C)), [], []
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.requires_grad))
    given = make(model)
    network = next(module for module in given.modules() if isinstance(module, nn.Linear))
    network.register_forward_hook(lambda *_: own.append(1))
    mesa = flatmin.MESA(model, average=given, start_epoch=0)
    logits = model(batch())
    mesa(logits, batch())
    assert seen == [True]
    assert own == [1]  # one that only the average has
    assert len(network._forward_hooks) == 2
    given(batch())
    assert len(seen) == 2


class Folding(nn.Linear):
    """Folds an update into its weight in evaluation mode, as loralib does."""

    def __init__(self, i, o):
        super().__init__(i, o)
        self.weight.requires_grad_(False)
        self.merged = False
        self.a, self.b = nn.Parameter(torch.randn(2, i)), nn.Parameter(torch.randn(o, 2))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.a.T @ self.b.T)


def folding() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Folding(4, 8), nn.ReLU(), nn.Sequential(Folding(8, C))).double()


@every
@pytest.mark.parametrize("mode", ["training", "evaluation", "mixed"])
def test_layers_that_fold_their_weights_are_averaged_in_the_networks_form(name, mode):
    model = folding().train(mode == "training")
    if mode == "mixed":
        model[0].train()
    x = batch().double()
    average = AVERAGES[name](model)
    before = model(x).detach()
    update(average, times=20)
    torch.testing.assert_close(run(average, x), before)
    torch.testing.assert_close(model(x), before)
    assert [model[0].merged, model[2][0].merged] == {"training": [0, 0], "evaluation": [1, 1], "mixed": [0, 1]}[mode]
    assert inner(average)[0].merged
    average.train()
    average.eval()
    assert inner(average)[0].merged
    if name == "MESA":
        assert average.train()(model(x), x).item() == pytest.approx(0, abs=1e-12)


def test_a_folding_average_is_the_mean_of_what_the_network_learns():
    model = folding()
    average = AVERAGES["EMA"](model)
    start, frozen = model[0].a.detach().clone(), model[0].weight.clone()
    with torch.no_grad():
        model[0].a += 1
    average.update()
    average.module.train()
    torch.testing.assert_close(average.module[0].a, start + 0.2)
    torch.testing.assert_close(average.module[0].weight, frozen)


@pytest.mark.parametrize("make", [copy.deepcopy, AveragedModel])
def test_a_given_average_that_folds_is_as_before(make):
    model = folding()
    x, average = batch().double(), make(model)
    average.train()
    layers = [module for module in average.modules() if isinstance(module, Folding)]
    layers[1].eval()
    weights = [layer.weight.clone() for layer in layers]
    mesa = flatmin.MESA(model, average=average, start_epoch=0)
    assert mesa(model(x), x).item() == pytest.approx(0, abs=1e-12)
    assert [layer.merged for layer in layers] == [False, True]
    assert [layer.training for layer in layers] == [True, False]
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer.weight, weight)


def test_parametrized_is_what_torch_says():
    assert parametrize.is_parametrized(spectral(old=False)[0])
    assert not parametrize.is_parametrized(spectral(old=True)[0])

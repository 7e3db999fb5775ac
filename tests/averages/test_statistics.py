"""Which batch-norm statistics an average and MESA's target have, and how they are made anew."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.averages._statistics import refresh
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.indices import Indexed
from tests.live import live

C = 3
AVERAGES = {
    "EMA": lambda model, **kwargs: flatmin.EMA(model, decay=0.8, **kwargs),
    "SwitchEMA": lambda model, **kwargs: flatmin.SwitchEMA(model, decay=0.8, **kwargs),
    "LAWA": lambda model, **kwargs: flatmin.LAWA(model, k=2, **kwargs),
    "MESA": lambda model, **kwargs: flatmin.MESA(model, decay=0.8, start_epoch=0, **kwargs),
}
every = pytest.mark.parametrize("name", AVERAGES)


def network(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 6), nn.BatchNorm1d(6)]
    return nn.Sequential(*layers, nn.Linear(6, C)).to(dtype)


def batches(count: int = 3, size: int = 16, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(2 * torch.randn(size, 4, generator=generator) + 1).to(dtype) for _ in range(count)]


def train(model: nn.Module, average: nn.Module, steps: int = 6, seed: int = 5) -> list[torch.Tensor]:
    """Trains on noise and updates the average; returns the weights after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(seed)
    weights = []
    model.train()
    for _ in range(steps):
        x = torch.randn(16, 4, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        logits = model(x)
        loss = logits.log_softmax(dim=-1).square().mean()
        (loss + average(logits, x) if isinstance(average, flatmin.MESA) else loss).backward()
        optimizer.step()
        average.update()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    return weights


def inner(average: nn.Module) -> nn.Module:
    return (average.average if isinstance(average, flatmin.MESA) else average).module


def statistics(network: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))]


def by_hand(net: nn.Sequential, data: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mean over batches of the mean and the unbiased variance of what each batch norm gets."""
    sums: dict[int, list[torch.Tensor]] = {}
    for x in data:
        for number, layer in enumerate(net):
            if isinstance(layer, nn.BatchNorm1d):
                mean, var = x.mean(dim=0), x.var(dim=0)
                sums.setdefault(number, []).append(torch.stack([mean, var]))
                x = (x - mean) / (x.var(dim=0, unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias
            elif not isinstance(layer, nn.Dropout):
                x = layer(x)
    return [row for number in sums for row in torch.stack(sums[number]).mean(dim=0).detach()]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def different(ours, theirs) -> bool:
    return any((a - b).abs().max() > 0.01 for a, b in zip(ours, theirs, strict=True))


@every
@pytest.mark.parametrize("choice", ["averaged", "batch", "fresh"])
def test_fresh_statistics_are_the_means_over_the_batches_with_the_averages_weights(name, choice):
    model = network(dropout=0.5)
    average = AVERAGES[name](model, statistics=choice)
    if choice == "fresh":
        average.refresh(batches(1, size=64))
    train(model, average)
    before, torchs = statistics(inner(average)), copy.deepcopy(inner(average))
    expected = by_hand(inner(average), batches())
    random = torch.get_rng_state()
    average.refresh((x, "a label") for x in batches())
    assert torch.equal(torch.get_rng_state(), random)  # dropout is off
    assert_close(statistics(inner(average)), expected)
    assert different(before, expected)
    torchs[3].p = 0.0
    update_bn(batches(), torchs)
    assert_close(statistics(inner(average)), statistics(torchs))
    logits = inner(average)(batches()[0])
    assert_close([logits], [torchs.eval()(batches()[0])])
    assert not any(layer.training for layer in inner(average).modules())


def test_those_of_a_network_in_training_are_made_anew_in_place():
    """As for MSAM in the laboratory; frozen layers keep theirs, and all layers their modes."""
    model = network(dropout=0.5).train()
    model[5].eval()
    kept, expected = statistics(model[5]), by_hand(model[:5], batches())
    modes = [layer.training for layer in model.modules()]
    refresh(model, model, batches())
    assert_close(statistics(model), [*expected, *kept])
    assert [layer.training for layer in model.modules()] == modes
    assert model[1].momentum == 0.1


@every
def test_what_is_no_statistic_stays(name):
    model = network()
    model[1].momentum = None
    average = AVERAGES[name](model)
    train(model, average)
    before = {name: value.clone() for name, value in inner(average).state_dict().items() if "running" not in name}
    average.refresh(batches())
    after = inner(average).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the layers' counters too
    assert [layer.momentum for layer in (inner(average)[1], inner(average)[5])] == [None, 0.1]


@every
def test_fresh_statistics_stay_until_the_next_refresh_and_averaged_ones_go_on(name):
    for choice in ("fresh", "averaged", "batch"):
        model = network()
        average = AVERAGES[name](model, statistics=choice)
        average.refresh(batches())
        made = statistics(inner(average))
        train(model, average)
        assert all(map(torch.equal, statistics(inner(average)), made)) == (choice == "fresh")
        assert not torch.equal(inner(average)[0].weight, network()[0].weight)
        assert inner(average)[1].num_batches_tracked == model[1].num_batches_tracked == 6


@every
def test_batches_may_be_what_loaders_yield_and_are_read_once(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            return self.layers(x)

    x = batches(1)[0]
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))
    (counted,) = flatmin.with_indices(loader)
    (ridden,) = DataLoader(flatmin.indexed(loader.dataset), batch_size=len(x))
    found = []
    for form in (x, (x, 1), [x, 1], {"x": x}, counted, ridden, Indexed(counted.index, {"x": x}), x.clone()):
        average = AVERAGES[name](Net())
        average.refresh(iter([form]))
        found.append(statistics(inner(average)))
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@every
def test_a_network_without_batch_norm_pays_nothing(name):
    results = []
    for choice in ("averaged", "batch", "fresh"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Linear(8, C)).double()
        average = AVERAGES[name](model, statistics=choice)
        train(model, average)
        average.refresh(iter(pytest.fail, None))  # not read
        run = average.average if name == "MESA" else average
        results.append(torch.cat([run(batches()[0]).flatten(), *(p.detach().flatten() for p in model.parameters())]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["EMA", "SwitchEMA", "LAWA"])
def test_an_average_runs_with_the_batchs_own_statistics(name):
    model = network(dropout=0.5)
    average = AVERAGES[name](model, statistics="batch")
    train(model, average)
    expected = copy.deepcopy(inner(average))
    for layer in (expected[1], expected[5]):
        layer.train()
    before = copy.deepcopy(average.state_dict())
    x = batches()[0]
    assert torch.equal(average(x), expected(x))
    assert all(torch.equal(average.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(average(x), inner(average)(x))
    assert inner(average)[1].track_running_stats
    assert inner(average)[1].running_mean is not None


GIVEN = {
    "own": lambda model: None,
    "EMA": lambda model: flatmin.EMA(model, decay=0.8),
    "AveragedModel": lambda model: AveragedModel(model, use_buffers=True),
    "module": copy.deepcopy,
    "compiled": lambda model: torch.compile(copy.deepcopy(model), backend="eager"),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.01])
def test_mesas_target_has_the_statistics_of_the_share_it_runs_on(kind, fraction):
    model, x = network(dropout=0.5), batches()[0]
    average = GIVEN[kind](model)
    arguments = {} if average is None else {"average": average}
    mesa = flatmin.MESA(model, statistics="batch", fraction=fraction, start_epoch=0, **arguments)
    net = mesa._networks[0]
    with torch.no_grad():
        net[0].weight += 0.5
    expected = copy.deepcopy(net).eval()
    for layer in (expected[1], expected[5]):
        layer.train()
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before, random = copy.deepcopy(mesa.average.state_dict()), torch.get_rng_state()
    logits = torch.zeros(16, C, dtype=torch.float64, requires_grad=True)
    loss = mesa(logits, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(mesa.average.state_dict()[name], value) for name, value in before.items())
    share = seen[0]
    assert len(share) == max(2, round(fraction * 16))  # one sample has no statistics
    target = expected(share)
    wanted = (
        0.8 * 25 * F.kl_div(torch.zeros_like(target).log_softmax(1), (target / 5).softmax(1), reduction="batchmean")
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    assert not torch.equal(target, copy.deepcopy(net).eval()(share))


class Own(nn.Module):
    """A batch norm of somebody's own."""

    def __init__(self, features):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, self.momentum)


KINDS = {
    "batch": (lambda: nn.BatchNorm1d(5), (8, 5)),
    "batch without momentum": (lambda: nn.BatchNorm1d(5, momentum=None), (8, 5)),
    "batch without weights": (lambda: nn.BatchNorm2d(5, affine=False), (8, 5, 2, 2)),
    "synchronised": (lambda: nn.SyncBatchNorm(5), (8, 5)),
    "instance": (lambda: nn.InstanceNorm1d(5, track_running_stats=True), (8, 5, 6)),
    "own": (lambda: Own(5), (8, 5)),
}


@every
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_that_keeps_statistics_gets_fresh_ones_and_the_batchs_own(name, kind):
    make, shape = KINDS[kind]
    model = nn.Sequential(make(), nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), C))
    average = AVERAGES[name](model, statistics="batch")
    data = [torch.randn(shape) * 3 + 2 for _ in range(3)]
    dims = [0, *range(2, len(shape))]
    average.refresh(data)
    layer = inner(average)[0]
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(dims) for x in data]).mean(0))
    spread = lambda x: x.var(2).mean(0) if kind == "instance" else x.transpose(0, 1).flatten(1).var(1)  # noqa: E731
    torch.testing.assert_close(layer.running_var, torch.stack([spread(x) for x in data]).mean(0))
    before = copy.deepcopy(layer.state_dict())
    moved = 100 * data[0] + 7
    if name == "MESA":
        logits = inner(average)[2](inner(average)[1](copy.deepcopy(layer).train()(moved)))
        assert average(logits.detach(), moved) < 1e-6
        assert flatmin.MESA(model, average=average.average, start_epoch=0)(live(logits), moved) > 1e-3
    else:
        logits = inner(average)[2](inner(average)[1](copy.deepcopy(layer).train()(moved)))
        torch.testing.assert_close(average(moved), logits)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())
    assert not layer.training


class StaysFrozen(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


@every
@pytest.mark.parametrize("how", ["eval", "train() overridden"])
def test_frozen_batch_norm_keeps_its_statistics(name, how):
    model = network()
    if how == "eval":
        model.train()[1].eval()
    else:
        model[1] = StaysFrozen(8).double()
        model.train()
    with torch.no_grad():
        model[1].running_mean += 3
    average = AVERAGES[name](model, statistics="batch")
    average.refresh(batches())
    assert torch.equal(inner(average)[1].running_mean, model[1].running_mean)
    assert not torch.equal(inner(average)[5].running_mean, model[5].running_mean)
    if name == "MESA" and how == "eval":
        x = batches()[0]
        logits = model(x).detach()  # the network's own layers are in the same modes
        assert average(logits, x) < 1e-12


@every
@pytest.mark.parametrize("what", ["nothing", "a batch that does not fit", "a loader that fails"])
def test_an_error_leaves_everything_as_it_was(name, what):
    def failing():
        yield batches()[0]
        raise OSError("no such file")

    model = network()
    average = AVERAGES[name](model)
    train(model, average)
    before, modes = copy.deepcopy(average.state_dict()), [m.training for m in average.modules()]
    given, error = {
        "nothing": (
            [],
            pytest.raises(InvalidArgumentError, match=r"^batches must hold at least one batch .* got none"),
        ),
        "a batch that does not fit": ([batches()[0], torch.zeros(4, 9)], pytest.raises(RuntimeError)),
        "a loader that fails": (failing(), pytest.raises(OSError, match="no such file")),
    }[what]
    with error:
        average.refresh(given)
    assert all(torch.equal(average.state_dict()[key], value) for key, value in before.items())
    assert [m.training for m in average.modules()] == modes
    assert inner(average)[1].momentum == 0.1


def test_switch_ema_gives_the_network_the_statistics_and_training_does_not_feel_it():
    runs = []
    for order in ("never", "after", "before"):
        model = network()
        average = AVERAGES["SwitchEMA"](model)
        weights = train(model, average)
        if order == "before":
            average.refresh(batches())
        average.switch()
        if order == "after":
            average.refresh(batches())
        assert all(map(torch.equal, statistics(model), statistics(average.module)))
        same = all(
            torch.allclose(a, b) for a, b in zip(statistics(model), by_hand(average.module, batches()), strict=True)
        )
        assert same == (order != "never")
        assert torch.equal(model.eval()(batches()[0]), average(batches()[0]))
        runs.append(torch.stack(weights + train(model, average, seed=6)))
        average.refresh(batches())  # in the middle of an epoch the network keeps its own
        assert not all(map(torch.equal, statistics(model), statistics(average.module)))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", ["EMA", "SwitchEMA", "LAWA", "MESA"])
def test_refresh_does_not_touch_what_is_averaged(name):
    results = []
    for refreshed in (True, False):
        model = network()
        average = AVERAGES[name](model)
        train(model, average)
        if refreshed:
            average.refresh(batches())
        train(model, average, seed=6)
        tensors = list(inner(average).parameters()) + (statistics(inner(average)) if name == "LAWA" else [])
        results.append(tensors)
    if name == "MESA":  # whose target has changed
        assert not all(map(torch.equal, *results))
    else:
        assert all(map(torch.equal, *results))


@every
def test_resume_is_bitwise_neutral_with_fresh_statistics(name):
    results = []
    for cut in (True, False):
        model = network()
        average = AVERAGES[name](model, statistics="fresh")
        average.refresh(batches())
        train(model, average)
        if cut:
            twin = network()
            twin.load_state_dict(model.state_dict())
            state = copy.deepcopy(average.state_dict())
            model, average = twin, AVERAGES[name](twin, statistics="fresh")
            average.load_state_dict(state)
        train(model, average, seed=6)
        results.append([*model.state_dict().values(), *average.state_dict().values()])
    assert all(map(torch.equal, *results))


@every
def test_fresh_statistics_that_were_never_made_are_warned_of_once(name):
    model = network()
    average = AVERAGES[name](model, statistics="fresh")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run = average if name != "MESA" else average.average
            run(batches()[0])
            average.update()
    assert [warning.category for warning in caught] == [FlatminWarning]
    assert "call refresh(batches)" in str(caught[0].message)
    assert caught[0].filename == __file__


@every
def test_an_unknown_choice_is_named(name):
    with pytest.raises(InvalidArgumentError, match="unknown statistics 'bacth', did you mean batch"):
        AVERAGES[name](network(), statistics="bacth")


def test_a_given_average_has_its_own_fresh_statistics():
    model = network()
    with pytest.raises(InvalidArgumentError, match=r"^statistics must not be 'fresh' where average is given"):
        flatmin.MESA(model, average=flatmin.EMA(model), statistics="fresh")
    mesa = flatmin.MESA(model, average=flatmin.EMA(model, statistics="fresh"))
    with pytest.raises(InvalidArgumentError, match=r"whoever owns it updates it.*mesa.refresh"):
        mesa.refresh(batches())

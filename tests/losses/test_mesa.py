"""MESA against its oracle, and each of its promises."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError
from tests.live import live
from tests.reference import oracles

C = 3
SOON = {"decay": 0.9, "start_epoch": 0}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, C)).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator).to(dtype), torch.randint(C, (16,), generator=generator)


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def sam(model: nn.Module) -> torch.optim.Optimizer:
    return flatmin.SAM(plain(model), rho=0.5)


def train(model, mesa, optimizer, steps: int = 4, after=lambda: None) -> list[torch.Tensor]:
    """The losses of a training loop; ``after`` is called after each step."""
    x, y = data(next(model.parameters()).dtype)
    losses = []
    for _ in range(steps):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y) + mesa(logits, x)
            loss.backward()
            return loss.detach()

        losses.append(optimizer.step(closure))
        after()
    return losses


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_average_and_loss_equal_the_oracle():
    model, (x, _) = network(torch.float64), data(torch.float64)
    mesa = flatmin.MESA(model, coefficient=0.7, temperature=4.0, decay=0.8, start_epoch=0)
    states = [copy.deepcopy(model.state_dict())]
    teacher = network(torch.float64).eval()

    def check() -> None:
        mesa.update()
        states.append(copy.deepcopy(model.state_dict()))
        expected = {
            name: oracles.ema(start, [state[name] for state in states[1:]], 0.8) if start.is_floating_point() else None
            for name, start in states[0].items()
        }
        average = mesa.average.module.state_dict()
        for name, value in expected.items():
            expected[name] = states[-1][name] if value is None else value
            torch.testing.assert_close(average[name], expected[name], rtol=1e-12, atol=1e-14)
        teacher.load_state_dict(expected)
        logits = model(x).detach().requires_grad_()
        loss = mesa(logits, x)
        loss.backward()
        oracle, gradient = oracles.trajectory(teacher(x).tolist(), logits.tolist(), coefficient=0.7, temperature=4.0)
        torch.testing.assert_close(loss.item(), oracle, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-13)

    train(model, mesa, plain(model), steps=6, after=check)
    assert not torch.equal(states[0]["1.running_mean"], mesa.average.module.state_dict()["1.running_mean"])


@pytest.mark.parametrize("decay", [0.95, 0.9996, 0.5])
def test_integer_buffers_are_copied(decay):
    model = network()
    model.register_buffer("position", torch.arange(1000))
    model.register_buffer("allowed", torch.tensor([True, False]))
    mesa = flatmin.MESA(model, decay=decay)
    train(model, mesa, plain(model), steps=3, after=lambda: mesa.update())
    average = mesa.average.module
    assert torch.equal(average.position, torch.arange(1000))
    assert torch.equal(average.allowed, model.allowed)
    assert average[1].num_batches_tracked == model[1].num_batches_tracked == 3


def test_averaged_model_runs_from_start_epoch_on_in_eval_mode_and_without_gradient():
    model, (x, _) = network(), data()
    mesa = flatmin.MESA(model, start_epoch=2)
    calls = []
    mesa.average.module.register_forward_hook(lambda m, *_: calls.append((m.training, torch.is_grad_enabled())))
    losses = []
    for epoch in range(4):
        mesa.set_epoch(epoch)
        mesa.train()
        losses.append(mesa(model(x), x))
        mesa.update()
        assert len(calls) == max(0, epoch - 1)
    assert calls == [(False, False)] * 2
    assert losses[0] == losses[1] == 0 < losses[2]
    assert not any(module.training for module in mesa.average.modules())


@pytest.mark.parametrize(("coefficient", "training"), [(0.8, False), (0.0, True)])
def test_averaged_model_is_not_run_in_eval_mode_nor_where_it_does_not_count(coefficient, training):
    model, (x, _) = network(), data()
    mesa = flatmin.MESA(model, coefficient=coefficient, start_epoch=0).train(training)
    mesa.average.module.register_forward_hook(lambda *_: pytest.fail("was run"))
    assert mesa(model(x), x) == 0


def test_neither_random_numbers_nor_statistics_are_consumed():
    model, (x, _) = network(), data()
    mesa = flatmin.MESA(model, start_epoch=0)
    logits, average = model(x), copy.deepcopy(mesa.average)
    before = torch.get_rng_state()
    assert mesa(logits, x) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(mesa.average, average)


@pytest.mark.parametrize("make", [plain, sam])
def test_attach_is_update_by_hand(make):
    results = []
    for attached in (True, False):
        model = network()
        mesa, optimizer = flatmin.MESA(model, **SOON), make(model)
        if attached:
            handle = mesa.attach(optimizer)
        losses = train(model, mesa, optimizer, after=(lambda: None) if attached else lambda: mesa.update())  # noqa: B023
        results.append((losses, mesa))
        if attached:
            handle.remove()
            average = copy.deepcopy(mesa.average)
            train(model, mesa, optimizer, steps=1)
            assert_same_state(mesa.average, average)
    (ours, mesa), (by_hand, other) = results
    assert torch.equal(torch.stack(ours), torch.stack(by_hand))
    assert_same_state(mesa.average, other.average)


def test_average_takes_part_in_the_weights_after_the_step_and_not_in_perturbed_ones():
    model = network()
    mesa, optimizer = flatmin.MESA(model, decay=0.5), sam(model)
    mesa.attach(optimizer)
    start = model[0].weight.detach().clone()
    train(model, mesa, optimizer, steps=1)
    torch.testing.assert_close(mesa.average.module[0].weight, (start + model[0].weight) / 2)


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Scaled(nn.Module):
    """Takes two arguments and a keyword, and returns an object as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, C)

    def forward(self, x: torch.Tensor, shift: torch.Tensor, *, scale: float = 1.0) -> Output:
        return Output(scale * self.layer(x) + shift)


def test_further_arguments_and_output_objects_pass_through():
    model, (x, _) = Scaled(), data()
    mesa = flatmin.MESA(model, start_epoch=0)
    arguments = {"shift": torch.tensor([5.0, 0.0, 0.0]), "scale": 3.0}
    logits = model(x, **arguments).logits
    assert mesa(logits, x, **arguments) == 0  # the average is still the model, so its logits are the same
    assert mesa(logits, x, arguments["shift"], scale=3.0) == 0
    assert mesa(logits, x, arguments["shift"]) > 0


def test_average_can_be_deployed():
    model, (x, _) = network(), data()
    mesa = flatmin.MESA(model, **SOON)
    train(model, mesa, plain(model), after=lambda: mesa.update())
    deployed = network().eval()
    deployed.load_state_dict(mesa.average.module.state_dict())
    assert torch.equal(deployed(x), mesa.average(x))
    assert not torch.equal(deployed(x), model.eval()(x))
    assert not any(parameter.requires_grad for parameter in mesa.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("forgotten", [True, False])
def test_forgotten_update_is_warned_of_once_where_mesa_was_called(forgotten):
    model, (x, _) = network(), data()
    mesa = flatmin.MESA(model, **SOON)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(4):
            mesa.set_epoch(epoch)
            for _ in range(3):
                mesa(model(x), x)
            if not forgotten:
                mesa.update()
    assert [warning.category for warning in caught] == [FlatminWarning] * forgotten
    if forgotten:
        assert "update" in str(caught[0].message)
        assert caught[0].filename == __file__


@pytest.mark.parametrize("told", [False, True])
def test_a_long_epoch_without_an_update_is_none_for_whoever_tells_of_epochs(told, monkeypatch, recwarn):
    monkeypatch.setattr(flatmin.losses._mesa, "MANY", 4)
    model, (x, _) = network(), data()
    mesa = flatmin.MESA(model, **SOON)
    if told:
        mesa.set_epoch(0)
    for _ in range(7):
        mesa(model(x), x)
    assert len(recwarn) == (not told)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at any graph break
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}, {"interval": 2}, {"fraction": 0.5, "interval": 3}], ids=str)
def test_a_compiled_step_is_not_compiled_anew_for_each_call(options):
    model, (x, _) = nn.Linear(4, C), data()
    mesa, graphs, known = flatmin.MESA(model, **SOON, **options), [], []
    plain = flatmin.MESA(model, **SOON, **options)
    mesa.set_epoch(0), plain.set_epoch(0)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    whole = "interval" not in options  # else the graph breaks where the call is counted
    compiled = torch.compile(lambda x: mesa(model(x), x), backend=backend, fullgraph=whole)
    for _ in range(7):
        torch.testing.assert_close(compiled(x), plain(model(x), x))
        with torch.no_grad():
            model.weight[0] += 0.1
        mesa.update(), plain.update()
        known.append(len(graphs))
    assert known[-1] == known[3] <= 5


def test_state_dict_is_bitwise_neutral():
    model = network()
    mesa = flatmin.MESA(model, decay=0.9, start_epoch=1)
    mesa.set_epoch(3)
    train(model, mesa, plain(model), after=lambda: mesa.update())
    file = io.BytesIO()
    torch.save({"mesa": mesa.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network()
    resumed = flatmin.MESA(twin, decay=0.9, start_epoch=1)
    twin.load_state_dict(saved["model"])
    assert resumed.load_state_dict(saved["mesa"])
    results = []
    for net, loss in ((model, mesa), (twin, resumed)):
        torch.manual_seed(5)
        results.append(torch.stack(train(net, loss, plain(net), after=lambda: loss.update())))  # noqa: B023
    assert torch.equal(*results)
    assert_same_state(mesa.average, resumed.average)


def test_state_dict_holds_the_average_once_and_no_second_model():
    model = network()
    names = set(flatmin.MESA(model).state_dict())
    assert names == {"_extra_state", "average.n_averaged"} | {f"average.module.{name}" for name in model.state_dict()}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_unwrapped(name, process_group):
    model = network()
    wrapped = WRAPPERS[name](model)
    mesa = flatmin.MESA(wrapped, decay=0.5)
    attached = flatmin.MESA(wrapped, decay=0.5)
    attached.attach(optimizer := plain(model))
    assert type(mesa.average.module) is nn.Sequential
    start = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    mesa.update()
    torch.testing.assert_close(mesa.average.module[0].weight, (start + model[0].weight) / 2)
    assert_same_state(mesa.average, attached.average)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_loss_is_float32_or_float64_and_finite(dtype):
    model, x = nn.Linear(4, C).to(dtype), torch.full((2, 4), 300, dtype=dtype)
    mesa = flatmin.MESA(model, start_epoch=0, decay=0.9)
    logits = model(x)
    loss = mesa(logits.flip(1), x)
    assert loss.dtype == flatmin.MESA(model, decay=0.9)(logits, x).dtype == torch.promote_types(dtype, torch.float32)
    assert loss.isfinite()
    assert loss > 0


def test_autocast_gives_float32():
    model, (x, _) = nn.Linear(4, C), data()
    mesa = flatmin.MESA(model, start_epoch=0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        assert logits.dtype == torch.bfloat16
        assert mesa(logits.flip(1), x).dtype == torch.float32


def test_ema_decay_is_a_horizon_in_epochs():
    assert flatmin.ema_decay(epochs=10, steps_per_epoch=50) == 1 - 1 / 500
    assert flatmin.ema_decay(epochs=0.5, steps_per_epoch=4) == 0.5


@pytest.mark.parametrize(
    ("epochs", "steps", "message"),
    [(0, 5, "^epochs"), (-1, 5, "^epochs"), (1, 0, "^steps_per_epoch"), (1, 1, "epochs"), (float("inf"), 5, "^epochs")],
)
def test_ema_decay_refuses_what_is_no_horizon(epochs, steps, message):
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.ema_decay(epochs=epochs, steps_per_epoch=steps)


@pytest.mark.parametrize(
    ("name", "value"),
    [("decay", v) for v in (0, 1, -0.1, 1.5, float("nan"))]
    + [("coefficient", v) for v in (-1, float("inf"))]
    + [("temperature", v) for v in (0, -1)]
    + [("start_epoch", v) for v in (-1, 1.0)]
    + [("fraction", v) for v in (0, -0.5, 1.01, float("nan"), None)]
    + [("interval", v) for v in (0, 1.0, True)]
    + [("autocast", v) for v in ("bfloat16", torch.float32)],
)
def test_bad_argument_is_named_with_its_value(name, value):
    with pytest.raises(InvalidArgumentError, match=rf"^{name} must .*{value!r}"):
        flatmin.MESA(nn.Linear(4, C), **{name: value})


@pytest.mark.parametrize("epoch", [-1, 0.5])
def test_bad_epoch_is_named(epoch):
    with pytest.raises(InvalidArgumentError, match=r"^epoch must"):
        flatmin.MESA(nn.Linear(4, C)).set_epoch(epoch)


@pytest.mark.parametrize(
    ("logits", "x", "message"),
    [
        (torch.zeros(2), torch.zeros(2, 4), "^logits must"),
        (torch.zeros(2, C, dtype=torch.int64), torch.zeros(2, 4), "^logits must be floating"),
        (torch.zeros(2, C), torch.zeros(3, 4), r"returned \(3, 3\) where logits of shape \(2, 3\)"),
        (torch.zeros(2, C + 1), torch.zeros(2, 4), "returned"),
    ],
)
def test_logits_that_do_not_fit_are_explained(logits, x, message):
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.MESA(nn.Linear(4, C), start_epoch=0)(live(logits) if logits.is_floating_point() else logits, x)


def test_averaged_model_that_returns_no_tensor_is_explained():
    model = nn.Linear(4, C)
    mesa = flatmin.MESA(model, start_epoch=0)
    mesa.average.module.register_forward_hook(lambda *_: {"out": torch.zeros(2, C)})
    with pytest.raises(InvalidArgumentError, match="returned dict"):
        mesa(live(torch.zeros(2, C)), torch.zeros(2, 4))


@pytest.mark.parametrize("given", [False, True])
def test_an_average_that_is_never_updated_is_warned_of_once(given, recwarn):
    model = nn.Linear(4, 3)
    average = {"average": flatmin.EMA(model)} if given else {}
    mesa = flatmin.MESA(model, start_epoch=0, **average)
    for epoch in range(3):
        mesa.set_epoch(epoch)
        mesa(model(torch.ones(2, 4)), torch.ones(2, 4))
    (warning,) = recwarn.list
    assert f"call {'average' if given else 'mesa'}.update()" in str(warning.message)


@pytest.mark.parametrize("told", [False, True])
def test_a_forgotten_epoch_is_said_once(told):
    model, (x, _) = network(), data()
    mesa = flatmin.MESA(model)
    if told:
        mesa.set_epoch(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = model(x)
        assert not any(mesa(logits, x) for _ in range(1100))
    assert len(caught) == (not told)
    assert told or "start_epoch=5 for ever: call mesa.set_epoch(epoch)" in str(caught[0].message)


def test_what_the_network_was_called_with_is_asked_for():
    model, (x, _) = network(), data()
    with pytest.raises(InvalidArgumentError, match=r"mesa\(logits, x\)"):
        flatmin.MESA(model, **SOON)(model(x))

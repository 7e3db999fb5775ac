"""Every method of the registry through the same tests; a method that is added is tested without being named here."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.errors import FlatminWarning
from flatmin.lab.methods import METHODS, Ingredients, resolve_settings

N, C, B = 24, 3, 8
EPOCHS = 6


class Loop:
    """The loop of the README over a small network, in which the method is a parameter."""

    def __init__(self, method: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(N, 1, 4, 4, dtype=dtype)
        self.y = torch.randint(C, (N,))
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, C)
        ).to(dtype)
        base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, EPOCHS)
        # short enough that every mechanism is at work within the few epochs here
        short = {"start_epoch": 1, "lag": 1, "ema_epochs": 1.0, "k": 2, "beta": 1.0, "gamma": 0.75}
        short |= {"when": "late:0.9"} if method == "late_sam" else {}
        given = {name: value for name, value in short.items() if name in METHODS[method].defaults}
        self.settings = resolve_settings(METHODS[method], given, epochs=EPOCHS)
        self.method = METHODS[method].assemble(
            Ingredients(self.model, base, N, C, steps_per_epoch=N // B, epochs=EPOCHS), self.settings
        )
        self.calls = 0
        self.raise_in_call = 0
        self.in_closure = lambda: None

    def epoch(self, epoch: int, micro_batches: int = 1) -> list[float]:
        torch.manual_seed(1000 + epoch)
        if self.method.trajectory is not None:
            self.method.trajectory.set_epoch(epoch)
        losses = [float(self.step(index, micro_batches)) for index in torch.randperm(N).split(B)]
        self.scheduler.step()
        self.method.at_epoch_end()
        return losses

    def step(self, index: torch.Tensor, micro_batches: int = 1) -> torch.Tensor:
        optimizer, penalty = self.method.optimizer, self.method.penalty

        def closure() -> torch.Tensor:
            self.calls += 1
            optimizer.zero_grad()
            self.in_closure()
            total = torch.zeros(())
            for part in index.chunk(micro_batches):
                x, y = self.x[part], self.y[part]
                logits = self.model(x)
                loss = F.cross_entropy(logits, y, label_smoothing=self.settings["smoothing"])
                if penalty is not None:
                    loss = loss + penalty(logits, y, part, x)
                (loss / micro_batches).backward()
                total = total + loss.detach() / micro_batches
            if self.calls == self.raise_in_call:
                raise RuntimeError("in the closure")
            return total

        def losses(keep: object) -> torch.Tensor:  # of a method that chooses samples
            self.calls += 1
            self.in_closure()
            x, y = self.x[index][keep], self.y[index][keep]
            each = F.cross_entropy(self.model(x), y, reduction="none", label_smoothing=self.settings["smoothing"])
            if self.calls == self.raise_in_call:
                raise RuntimeError("in the closure")
            return each

        return optimizer.step(losses if self.method.chooses else closure)

    def state(self) -> dict:
        trajectory, average = self.method.trajectory, self.method.average
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.method.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "trajectory": {} if trajectory is None else trajectory.state_dict(),
                "average": {} if average is None else average.state_dict(),
            }
        )

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.method.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.method.trajectory is not None:
            self.method.trajectory.load_state_dict(state["trajectory"])
        if self.method.average is not None:
            self.method.average.load_state_dict(state["average"])


def weights(loop: Loop) -> list[torch.Tensor]:
    """All of the network, and of the average that is evaluated in its place, if there is one."""
    average = {} if loop.method.average is None else loop.method.average.module.state_dict()
    return [tensor.clone() for tensor in (*loop.model.state_dict().values(), *average.values())]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


STEPS = EPOCHS * (N // B)


def calls(method: str, step: int) -> int | None:
    return METHODS[method].calls(step, Loop(method).settings, STEPS)


every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_resume_is_bitwise_equal(method: str) -> None:
    whole, first, second = Loop(method), Loop(method), Loop(method)
    for epoch in range(EPOCHS):
        whole.epoch(epoch)
    for epoch in range(3):
        first.epoch(epoch)
    second.load(first.state())
    for epoch in range(3, EPOCHS):
        second.epoch(epoch)
    assert_same(weights(second), weights(whole))
    if whole.method.trajectory is not None:
        ours, theirs = second.state()["trajectory"], whole.state()["trajectory"]
        assert_same(list(ours.values()), list(theirs.values()))


@every_method
def test_resume_without_the_method_state_differs(method: str) -> None:
    """The control of the test above: there is state that matters."""
    first, second = Loop(method), Loop(method)
    for epoch in range(3):
        first.epoch(epoch)
    second.model.load_state_dict(first.model.state_dict())
    first.epoch(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.epoch(3)
    assert any(not torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    said = [each for each in caught if issubclass(each.category, FlatminWarning)]
    assert len(said) == (method in {"saf", "mesa", "ema", "switch_ema", "lawa"})


@every_method
def test_the_mechanism_acts(method: str) -> None:
    """A method that is switched off would train exactly as the base."""
    ours, base = Loop(method), Loop("base")
    losses = [[loop.epoch(epoch) for epoch in range(EPOCHS)] for loop in (ours, base)]
    average = ours.method.average
    evaluated = ours.model if average is None else average.module
    same = all(torch.equal(a, b) for a, b in zip(evaluated.state_dict().values(), weights(base), strict=True))
    assert same == (method == "base")
    if average is None:  # averages may let training be
        assert (losses[0] == losses[1]) == (method == "base")


@every_method
def test_weights_are_restored_when_the_closure_raises(method: str) -> None:
    cases = [(step, call) for step in (2, 3) for call in range(calls(method, step) or 1)]
    for steps, call in cases:
        loop = Loop(method)
        for _ in range(steps):
            loop.step(torch.arange(B))
        before = [parameter.clone() for parameter in loop.model.parameters()]
        optimizer_before = copy.deepcopy(loop.method.optimizer.state_dict()["state"])
        loop.raise_in_call = loop.calls + call + 1
        with pytest.raises(RuntimeError, match="in the closure"):
            loop.step(torch.arange(B))
        assert_same(list(loop.model.parameters()), before)
        momenta = loop.method.optimizer.state_dict()["state"]
        for number, state in optimizer_before.items():
            assert torch.equal(momenta[number]["momentum_buffer"], state["momentum_buffer"])


@every_method
def test_number_of_closure_calls(method: str) -> None:
    loop = Loop(method)
    for epoch in range(EPOCHS):
        loop.epoch(epoch)
    counts = [calls(method, step) for step in range(STEPS)]
    assert sum(count or 1 for count in counts) <= loop.calls <= sum(count or 2 for count in counts)


@every_method
def test_loss_of_the_unperturbed_weights_is_returned(method: str) -> None:
    loop = Loop(method)
    loop.model[4].p = 0.0
    before = copy.deepcopy(loop.model)
    loss = loop.step(torch.arange(B))
    first = "coefficient" if method == "online_label_smoothing" else "smoothing"  # it begins with plain smoothing
    smoothing = loop.settings[first]
    expected = F.cross_entropy(before(loop.x[:B]), loop.y[:B], label_smoothing=smoothing)
    if loop.method.penalty is not None and loop.method.trajectory is None:  # at work from the start
        expected = expected + loop.method.penalty(before(loop.x[:B]), loop.y[:B], torch.arange(B), loop.x[:B])
    torch.testing.assert_close(loss, expected.detach())


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept(method: str, dtype: torch.dtype) -> None:
    loop = Loop(method, dtype)
    for epoch in range(3):
        loop.epoch(epoch)
    assert {parameter.dtype for parameter in loop.model.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in loop.model.parameters())
    buffers = [s["momentum_buffer"].dtype for s in loop.method.optimizer.state.values()]
    assert set(buffers) == {dtype}


@every_method
def test_accumulation_equals_the_big_batch(method: str) -> None:
    """The closure may go over micro-batches; with no batch norm and no dropout nothing differs."""
    whole, parts = Loop(method, torch.float64), Loop(method, torch.float64)
    for loop in (whole, parts):
        loop.model[1].eval()
        loop.model[4].p = 0.0
    for epoch in range(EPOCHS):
        whole.epoch(epoch), parts.epoch(epoch, micro_batches=2)
    for a, b in zip(weights(parts), weights(whole), strict=True):
        torch.testing.assert_close(a, b)


@every_method
def test_batch_norm_statistics_move_once_a_step(method: str) -> None:
    loop = Loop(method)
    loop.epoch(0), loop.epoch(1)
    assert int(loop.model[1].num_batches_tracked) == 2 * (N // B)


@every_method
def test_extra_bytes_are_what_the_method_keeps(method: str) -> None:
    """Measured: the tensors that there are in a pass, at most, beyond the base's; and what a trajectory remembers."""
    ours, base = Loop(method), Loop("base")
    for loop in (ours, base):
        loop.model[1].eval()  # in training its statistics are copied for a moment, and have the shape of a weight
    state = {**ours.state()["trajectory"], **ours.state()["average"]}
    kept = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith("_extra_state"))
    assert ours.method.extra_bytes == kept + peak_of_an_epoch(ours) - peak_of_an_epoch(base)


def peak_of_an_epoch(loop: Loop) -> int:
    """Most bytes of tensors like the weights that are there when a pass begins, those of the trajectory aside."""
    loop.epoch(0)
    shapes = {parameter.shape for parameter in loop.model.parameters()}
    own = [entry for state in loop.method.optimizer.state.values() for entry in state.values()]
    remembered = loop.method.optimizer.state_dict().get("flatmin", {"state": {}})["state"]
    counted = {id(tensor) for tensor in own} | {id(t) for entries in remembered.values() for t in entries.values()}
    # kept alive, so that no other takes its place
    aside = {id(t): t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and id(t) not in counted}
    del own, remembered
    most = [0]

    def count() -> None:
        found = (t for t in gc.get_objects() if type(t) is torch.Tensor and id(t) not in aside and t.shape in shapes)
        most[0] = max(most[0], sum({t.untyped_storage().data_ptr(): t.nbytes for t in found}.values()))

    loop.in_closure = count
    loop.epoch(1)
    return most[0]

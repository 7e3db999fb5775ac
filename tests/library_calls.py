"""A call in order of every public function, class and method of the library, and what cannot stand in its arguments.

`tests/contracts/test_wrong_arguments.py` puts each wrong value in each place; `tests/fuzz/test_library_calls.py` draws.
"""

import copy
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin import history, indices, losses, optim, sharpness
from flatmin.errors import FlatminError

MODULES = ("", "averages", "history", "indices", "losses", "optim", "optim.schedules", "sharpness")
Made = tuple[Callable[..., Any], dict[str, Any]]


class Foreign:
    """Of no type that anything takes."""

    def __repr__(self) -> str:
        return "Foreign()"


# Those that every argument must refuse, if it is not said below that it takes them.
WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a wrong type": Foreign,
    "a wrong shape": lambda: torch.zeros(7, 5, 3),
    "an empty tensor": lambda: torch.empty(0),
}
# Those that the random calls have too; some may be right.
ODD: dict[str, Callable[[], Any]] = {
    "text": lambda: "x",
    "bytes": lambda: b"x",
    "less than 0": lambda: -1,
    "0": lambda: 0,
    "NaN": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "too large": lambda: 10**40,
    "a bool": lambda: True,
    "an empty list": list,
    "an empty dict": dict,
    "a list of others": lambda: [Foreign()],
    "a dict of others": lambda: {"state": 5, "param_groups": [Foreign()], "flatmin": {"state": {0: 5}}},
    "a class": lambda: nn.Linear,
    "a function": lambda: lambda *_, **__: None,
    "a network without parameters": nn.ReLU,
    "a tensor of NaN": lambda: torch.full((4, 3), torch.nan),
    "a tensor of int8": lambda: torch.ones(4, dtype=torch.int8),
    "a complex tensor": lambda: torch.ones(4, 3, dtype=torch.complex64),
    "a number in a tensor": lambda: torch.tensor(2.0),
}


def network() -> nn.Module:
    """Of 4 inputs and 3 classes, with batch norm."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def trained(kind: Any = SGD) -> tuple[nn.Module, Any]:
    """A network and its optimizer."""
    model = network()
    return model, kind(model.parameters(), lr=0.1)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of four samples."""
    return torch.randn(4, 4), torch.tensor([0, 1, 2, 0])


def logits() -> torch.Tensor:
    """Of four samples."""
    return torch.randn(4, 3, requires_grad=True)


def objective(model: nn.Module | None = None) -> sharpness.Objective:
    """Of a network on two batches."""
    return sharpness.Objective(model or network(), F.cross_entropy, [batch(), batch()])


OPTIMIZERS = [
    kind
    for kind in vars(optim).values()
    if inspect.isclass(kind) and issubclass(kind, optim.SharpnessAware) and not inspect.isabstract(kind)
]
AVERAGES = [flatmin.EMA, flatmin.LAWA, flatmin.SwitchEMA]
CODECS = [history.Dense(), history.Quantized(4), history.LowRank(2), history.TopK(2)]
CALLS: dict[str, Callable[[], Made]] = {}


def call(name: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Adds a call to the table."""

    def added(make: Callable[[], Made]) -> Callable[[], Made]:
        CALLS[name] = make
        return make

    return added


def simple(function: Any, name: str = "", **arguments: Any) -> None:
    """Adds one whose arguments may be shared."""
    CALLS[name or function.__qualname__] = lambda: (function, dict(arguments))


def saved(name: str, made: Callable[[], Any]) -> None:
    """Adds ``load_state_dict`` of what ``made`` returns, and of its class ``set_extra_state``."""
    CALLS[f"{name}.load_state_dict"] = lambda: (made().load_state_dict, {"state_dict": made().state_dict()})
    if "set_extra_state" in vars(type(made())):
        CALLS[f"{name}.set_extra_state"] = lambda: (made().set_extra_state, {"state": made().get_extra_state()})


# Losses.

simple(flatmin.logit_squeezing, logits=torch.randn(4, 3), coefficient=1.0, temperature=2.0, class_dim=1)
TWO = {"target": torch.randn(4, 3), "temperature": 2.0, "mask": torch.tensor([True, False, True, True])}
simple(losses.trajectory_loss, logits=torch.randn(4, 3), **TWO, class_dim=1)
simple(losses.binary_trajectory_loss, logits=torch.randn(4, 3), **TWO)
simple(losses.feature_distance, features=torch.randn(4, 3), target=TWO["target"], mask=TWO["mask"], class_dim=1)
SAF = {"num_samples": 8, "num_classes": 3, "lag": 1, "start_epoch": 1}
HOW = {"history": "dense", "momentum": None, "path": None, "location": "device", "sharing": "auto"}
simple(flatmin.SAF, **SAF, coefficient=1.0, temperature=2.0, **HOW)
simple(flatmin.OnlineLabelSmoothing, num_classes=3, coefficient=0.5)
saved("SAF", lambda: flatmin.SAF(**SAF))
saved("OnlineLabelSmoothing", lambda: flatmin.OnlineLabelSmoothing(3))
saved("MESA", lambda: flatmin.MESA(network(), decay=0.9))


@call("SAF.forward")
def _() -> Made:
    return flatmin.SAF(**SAF), {"logits": logits(), "index": torch.tensor([0, 5, 7, 2])}


@call("OnlineLabelSmoothing.forward")
def _() -> Made:
    return flatmin.OnlineLabelSmoothing(3), {"logits": logits(), "y": batch()[1]}


@call("MESA")
def _() -> Made:
    own = {"model": network(), "decay": 0.9, "average": None, "autocast": None, "output": None, "class_dim": None}
    numbers = {"coefficient": 1.0, "temperature": 2.0, "start_epoch": 0, "fraction": 1.0, "interval": 1}
    own["capture"] = None
    return flatmin.MESA, {**own, **numbers, "statistics": "averaged", "link": "softmax", "distance": None}


@call("MESA with an average")
def _() -> Made:
    model = network()
    return flatmin.MESA, {"model": model, "average": flatmin.EMA(model, decay=0.9)}


@call("MESA.forward")
def _() -> Made:
    def forward(logits: Any, where: torch.Tensor | None) -> Any:  # what the network takes is between it and its user
        return flatmin.MESA(network(), start_epoch=0, decay=0.9)(logits, batch()[0], where=where)

    return forward, {"logits": logits(), "where": torch.tensor([True, False, True, True])}


@call("MESA.prepare")
def _() -> Made:
    prepare = flatmin.MESA(network(), start_epoch=0, decay=0.9).prepare
    return lambda: prepare(batch()[0]), {}  # all it takes is what the network takes


for kind, make in {
    "SAF": lambda model: flatmin.SAF(**SAF),
    "MESA": lambda model: flatmin.MESA(model, decay=0.9),
    "OnlineLabelSmoothing": lambda model: flatmin.OnlineLabelSmoothing(3),
    **{each.__name__: each for each in AVERAGES},
}.items():

    def attached(make: Any = make) -> Made:
        model, optimizer = trained()
        return make(model).attach, {"optimizer": optimizer}

    CALLS[f"{kind}.attach"] = attached
    if kind in ("SAF", "MESA", "OnlineLabelSmoothing"):
        CALLS[f"{kind}.set_epoch"] = lambda make=make: (make(network()).set_epoch, {"epoch": 1})
    if kind not in ("SAF", "OnlineLabelSmoothing"):
        CALLS[f"{kind}.refresh"] = lambda make=make: (make(network()).refresh, {"batches": [batch()]})

# Averages.

simple(flatmin.ema_decay, epochs=2, steps_per_epoch=10)
for average, numbers in {
    flatmin.EMA: {"decay": 0.9},
    flatmin.LAWA: {"k": 2},
    flatmin.SwitchEMA: {"decay": 0.9, "start_epoch": 0},
}.items():

    def averaged(average: Any = average, numbers: Any = numbers) -> Made:
        return average, {"model": network(), **numbers, "statistics": "averaged"}

    CALLS[average.__name__] = averaged
    saved(average.__name__, lambda average=average: average(network()))

# Histories.

SIZES = {"num_samples": 8, "num_classes": 3}
simple(history.Dense, dtype=torch.float32)
simple(history.Quantized, bits=8)
simple(history.LowRank, rank=2)
simple(history.TopK, k=2)
HISTORY = {"lag": 1, "momentum": None, "temperature": 2.0, "path": None, "location": "device", "sharing": "auto"}
simple(history.History, codec=history.Dense(), **SIZES, **HISTORY)
simple(history.make_history, history="dense", **SIZES, **HISTORY)
for codec in CODECS:
    kind = "" if isinstance(codec, history.Dense) else f" of {type(codec).__name__}"
    saved(f"History{kind}", lambda codec=codec: history.History(codec, **SIZES, lag=1))
BATCH = {"index": torch.tensor([0, 5]), "logits": torch.randn(2, 3), "epoch": 1}
for method, more in {"exchange": {"compare": True}, "recall": {}}.items():
    CALLS[f"History.{method}"] = lambda method=method, more=more: (
        getattr(history.History(history.Dense(), **SIZES, lag=1), method),
        {**BATCH, **more},
    )


@call("History.check_state")
def _() -> Made:
    found = history.History(history.Dense(), **SIZES, lag=1)
    return found.check_state, {"state": found.state_dict(), "prefix": ""}


# Optimizers.


def around(method: Any, model: Any, base: Any, **more: Any) -> Any:
    """An optimizer of a method around another one."""
    if "step_sizes" in inspect.signature(method).parameters:
        more["step_sizes"] = [model[0].bias]
    return method(base, **more)


RULES = {"parameters": None, "scaling": None, "scaler": None, "max_norm": 1.0, "when": None, "model": None}
for method in OPTIMIZERS:

    def made(method: Any = method) -> Made:
        taken = inspect.signature(method).parameters
        model, base = trained()
        given = {"rho": 0.1, "eta": 0.1, "beta": 0.5, "gamma": 0.5, "alpha": 0.5, "seed": 1, "k": 2, "sigma": 1.0}
        given |= {**RULES, "parameters": list(model.parameters()), "model": model, "norm": "global"}
        given |= {"same_randomness": True, "base_optimizer": base}
        given |= {"step_sizes": [model[0].bias], "period": 2, "perturb": "weights", "quantizers": []}
        return method, {name: given.get(name, parameter.default) for name, parameter in taken.items()}

    CALLS[method.__name__] = made

    @functools.cache
    def state(method: Any = method) -> dict[str, Any]:
        model, base = trained(torch.optim.Adam)
        own = {} if method.max_passes == 1 else {"when": optim.Adaptive(9)}
        optimizer, (x, y) = around(method, model, base, **own), batch()
        if method.per_sample_closure:
            optimizer.step(lambda keep: F.cross_entropy(model(x[keep]), y[keep], reduction="none"))
        else:
            for _ in optimizer.passes():
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
        return optimizer.state_dict()

    def loading(method: Any = method, state: Any = state, part: str = "") -> Made:
        load = around(method, *trained(torch.optim.Adam)).load_state_dict
        if not part:
            return load, {"state_dict": copy.deepcopy(state())}
        return lambda state_dict: load({**state(), part: state_dict}), {"state_dict": state()[part]}

    CALLS[f"{method.__name__}.load_state_dict"] = loading
    for part in ("state", "param_groups", "flatmin"):
        CALLS[f"{method.__name__}.load_state_dict of {part}"] = functools.partial(loading, part=part)

    def stepping(method: Any = method) -> Made:
        model, base = trained()
        (x, y), optimizer = batch(), around(method, model, base)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        def losses(keep: Any) -> torch.Tensor:
            return F.cross_entropy(model(x[keep]), y[keep], reduction="none")

        return optimizer.step, {"closure": losses if method.per_sample_closure else closure}

    CALLS[f"{method.__name__}.step"] = stepping


@call("SAM of several")
def _() -> Made:
    model = network()
    bases = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    optimizer = optim.SAM(bases)
    return optimizer.load_state_dict, {"state_dict": optimizer.state_dict()}


simple(optim.Elementwise, eta=0.1)
CALLS["normalization_parameters"] = lambda: (optim.normalization_parameters, {"model": network()})
simple(optim.Every, k=2)
simple(optim.Late, share=0.5, steps=10)
simple(optim.Sometimes, probability=0.5, seed=1)
simple(optim.Adaptive, steps=10, start=1.0, end=-1.0, decay=0.9)
simple(optim.RhoByLR, rho_max=1.0, rho_min=0.1, lr_max=0.1, lr_min=0.0)
simple(optim.Adaptive(10).load_state_dict, state_dict={"mean": 1.0, "variance": 1.0})

# Sharpness.


@call("Objective")
def _() -> Made:
    what = {"model": network(), "loss_fn": F.cross_entropy, "batches": [batch(), batch()], "dtype": torch.float32}
    return sharpness.Objective, {**what, "normalise_logits": False, "batch_statistics": False, "samples": 6, "seed": 1}


@call("Objective of one batch")
def _() -> Made:
    def measured(x: Any, y: Any) -> sharpness.SamSharpness:
        return sharpness.sam_sharpness(sharpness.Objective(network(), F.cross_entropy, [(x, y)]))

    x, y = batch()
    return measured, {"x": x, "y": y}


CALLS["Objective.variant"] = lambda: (objective().variant, {"normalise_logits": True, "batch_statistics": True})
for measured, options in {
    sharpness.sam_sharpness: {"rho": 0.1, "adaptive": True, "eta": 0.1, "ascent_steps": 1, "per_batch": True},
    sharpness.average_sharpness: {"rho": 0.1, "adaptive": True, "eta": 0.1, "directions": 2},
    sharpness.hessian_eigenvalues: {"k": 1, "tolerance": 0.1, "vectors": 9},
    sharpness.hessian_trace: {"probes": 2},
    sharpness.spectral_density: {"probes": 1, "steps": 2, "points": 101, "width": 0.1},
    sharpness.loss_landscape: {"points": 2, "radius": 1.0, "directions": 1, "direction_seed": 1, "margin": 0.1},
}.items():
    CALLS[measured.__name__] = lambda measured=measured, options=options: (
        measured,
        {"objective": objective(), **options},
    )


@call("loss_landscape of a plane")
def _() -> Made:
    plane = [network().state_dict() for _ in range(3)]
    given = {"plane": plane, "partial": None, "on_progress": lambda done, total: None, "points": 2}
    return sharpness.loss_landscape, {"objective": objective().variant(batch_statistics=True), **given}


@call("loss_landscape of a part of the plane")
def _() -> Made:
    measured = objective().variant(batch_statistics=True)

    def of_plane(plane: Any) -> Any:
        two = [network().state_dict() for _ in range(2)]
        return sharpness.loss_landscape(measured, plane=[*two, plane], points=2)

    return of_plane, {"plane": network().state_dict()}


# Indices.


def dataset() -> TensorDataset:
    """Four samples."""
    return TensorDataset(*batch())


CALLS["with_indices"] = lambda: (flatmin.with_indices, {"loader": DataLoader(dataset(), batch_size=2)})
CALLS["indexed"] = lambda: (flatmin.indexed, {"dataset": dataset(), "key": "index"})
CALLS["IndexedDataset"] = lambda: (indices.IndexedDataset, {"dataset": dataset(), "index_key": "index"})
CALLS["IndexedDataset.__getitem__"] = lambda: (lambda indices: flatmin.indexed(dataset())[indices], {"indices": 2})
CALLS["collate"] = lambda: (indices.collate, {"collate_fn": list, "key": "index"})
CALLS["collate.__call__"] = lambda: (
    lambda samples: indices.collate(torch.utils.data.default_collate)(samples),
    {"samples": [flatmin.indexed(dataset())[0]]},
)
simple(indices.split, batch={"index": torch.tensor([1]), "x": 1}, key="index")


def public() -> dict[str, Any]:
    """Every class and function in the ``__all__`` of the library's modules."""
    found: dict[str, Any] = {}
    for name in MODULES:
        module = importlib.import_module(f"flatmin.{name}".rstrip("."))
        found |= {each: getattr(module, each) for each in module.__all__}
    return {name: value for name, value in found.items() if callable(value)}


def methods(kind: type) -> Iterator[str]:
    """The methods of a class that take an argument and are flatmin's, not torch's."""
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        shown = not name.startswith("_") or name in ("__call__", "__getitem__")
        if shown and method.__module__.startswith("flatmin") and len(inspect.signature(method).parameters) > 1:
            yield name


def judge(name: str, spoiled: list[str], function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Calls it: what is wrong with what comes, in a line; ``returned`` if nothing is raised, ``""`` if it is right."""
    given = ", ".join(f"{each}={' '.join(repr(arguments[each]).split()):.60}" for each in spoiled)
    shown = f"{name}({given})"
    try:
        function(**arguments)
    except FlatminError as error:
        said = str(error)
        if not any(re.search(rf"\b{each}\b", said, re.IGNORECASE) for each in spoiled):
            return f"{shown} does not name the argument: {said:.300}"
        return f"{shown} is not one line: {said!r:.300}" if "\n" in said else ""
    except Exception as error:
        return f"{shown} raises {type(error).__name__}: {error!s:.200}"
    return f"{shown} returned"


def takes_none(function: Callable[..., Any], argument: str, value: Any) -> bool:
    """Whether None is right for an argument: as it is in the table, is the default, or its type says so."""
    try:
        parameter = inspect.signature(function).parameters[argument]
    except KeyError:
        return value is None
    return value is None or parameter.default is None or "None" in str(parameter.annotation)

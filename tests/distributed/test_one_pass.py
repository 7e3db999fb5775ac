"""One-pass methods in a loop without a closure, on two ranks: each way of wrapping is what a closure does there."""

import contextlib
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.contracts._one_pass import ONE_PASS
from tests.contracts._optimizers import EVERY
from tests.distributed import _problem as problem
from tests.distributed._spawn import run_ranks

STEPS = 3
HOWS = ["inner", "outer", "compiled", "views", "static graph", "sharded"]


def train(name: str, how: str, parts: int, with_closure: bool) -> list[torch.Tensor]:
    """The weights at the end."""
    inner = problem.network(norm=how == "outer")
    if how == "sharded":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        fully_shard(inner[0], mesh=mesh)
        network = fully_shard(inner, mesh=mesh)
    elif how == "alone":
        network = inner
    else:
        options = {
            "views": {"gradient_as_bucket_view": True},
            "static graph": {"static_graph": True},
        }
        network = DistributedDataParallel(inner, **options.get(how, {}))
    called = torch.compile(network, backend="eager") if how == "compiled" else network
    given = {"inner": inner, "compiled": called}.get(how, network)
    optimizer = EVERY[name](problem.sgd(inner), rho=0.5, model=given)
    saved = []

    def passes(step: int) -> None:
        optimizer.zero_grad()
        x, y = problem.batch(step)
        for part, (inputs, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            waits = part < parts - 1 and isinstance(network, DistributedDataParallel) and how != "static graph"
            with network.no_sync() if waits else contextlib.nullcontext():
                loss = nn.functional.cross_entropy(called(inputs), labels) / parts
                if not with_closure:
                    saved.append([v.clone() for k, v in network.state_dict().items() if "weight" in k or "bias" in k])
                loss.backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        for step in range(STEPS):
            if with_closure:
                optimizer.step(lambda step=step: passes(step))
            else:
                before = problem.weights(inner)
                passes(step)
                whole = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in saved[-1]]
                problem.assert_same(whole, before)  # clean in the middle
                problem.assert_same(problem.weights(inner), before)
                optimizer.step()
    return problem.weights(inner)


def all_ways(name: str) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    parts = {how: 1 if how == "static graph" else 2 for how in HOWS}
    return {how: (train(name, how, parts[how], False), train(name, how, parts[how], True)) for how in HOWS}


@pytest.mark.parametrize("name", ONE_PASS)
def test_two_ranks(name):
    first, second = run_ranks(all_ways, 2, name)
    for how, (ours, theirs) in first.items():
        problem.assert_same(ours, theirs)
        problem.assert_same(ours, second[how][0])
        if how != "outer":  # whose batch norm is that of a rank's share
            problem.assert_close(ours, train(name, "alone", 1, False))

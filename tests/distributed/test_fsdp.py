"""SAF, MESA and SAM with parameters sharded by FSDP2, against one process."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.optim._foreach import global_norm
from tests.distributed import _problem as problem
from tests.distributed._spawn import run_ranks

STEPS = 5
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="torch 2.6 itself cannot shard on the CPU"
)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer, mesa: flatmin.MESA | None = None) -> list[torch.Tensor]:
    losses = []
    for step in range(STEPS):

        def closure(step=step) -> torch.Tensor:
            optimizer.zero_grad()
            x, y = problem.batch(step)
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
            if mesa is not None:
                loss = loss + mesa(logits, x)
            loss.backward()
            return loss.detach()

        losses.append(optimizer.step(closure))
        if mesa is not None:
            assert all(isinstance(p, DTensor) for p in mesa.average.parameters()) == isinstance(
                model[0].weight, DTensor
            )
    return losses


def sam(sharded: bool, norm: str) -> tuple[list[torch.Tensor], list[int]]:
    model = problem.network()
    if sharded:
        shard(model)
    optimizer = flatmin.SAM(problem.sgd(model), rho=0.5, norm=norm)
    train(model, optimizer)
    return problem.weights(model), [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("norm", ["global", "rank"])
def test_sam_is_that_of_one_process(norm, world_size):
    expected, _ = sam(False, norm)
    if world_size == 3:  # shares of 6, 6 and 4 samples are not weighted, so only that ranks stay alike
        results = run_ranks(sam, world_size, True, norm)
        problem.assert_same(results[0][0], results[2][0])
        return
    for weights, sizes in run_ranks(sam, world_size, True, norm):
        problem.assert_close(weights, expected)
        assert 0 < sum(sizes) < sum(weight.numel() for weight in weights)


def mesa(sharded: bool, **arguments) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    model = problem.network(norm=False)
    ours = flatmin.MESA(model, coefficient=5.0, decay=0.7, start_epoch=0, **arguments)
    if sharded:
        shard(model), shard(ours.average.module)
    optimizer = problem.sgd(model)
    ours.attach(optimizer)
    losses = train(model, optimizer, ours)
    return problem.weights(model), problem.weights(ours.average.module), losses


def test_mesa_is_that_of_one_process():
    weights, average, losses = mesa(False)
    results = run_ranks(mesa, 2, True)
    for rank_weights, rank_average, _ in results:
        problem.assert_close(rank_weights, weights)
        problem.assert_close(rank_average, average)
    mean = [(a + b) / 2 for a, b in zip(results[0][2], results[1][2], strict=True)]
    problem.assert_close(mean, losses)


def test_mesa_on_a_share_keeps_ranks_alike():
    ours, theirs = run_ranks(mesa_on_a_share, 2)
    problem.assert_same(ours[0], theirs[0])
    problem.assert_same(ours[1], theirs[1])


def mesa_on_a_share():
    return mesa(True, fraction=0.5, interval=2, autocast=torch.bfloat16)


def mixed_norm() -> tuple[torch.Tensor, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.arange(10.0), torch.ones(3, 2, dtype=torch.float64), torch.full((1,), 3.0), torch.full((4,), 2.0)]
    placements = [Shard(0), Shard(0), Replicate()]
    placed = [distribute_tensor(tensor, mesh, [how]) for tensor, how in zip(whole, placements, strict=False)]
    halves = DTensor.from_local(whole[3] / 2, mesh, [Partial()])
    uneven = distribute_tensor(torch.full((3, 2), 1.5, dtype=torch.bfloat16), mesh, [Shard(0)])
    added = [whole[3], torch.full((3, 2), 1.5)]
    return global_norm([placed[0], whole[3], *placed[1:], halves, uneven]), global_norm([*whole, *added])


def test_norm_runs_over_shards_replicas_and_plain_tensors_together():
    for ours, expected in run_ranks(mixed_norm, 2):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def mixed_parameters() -> tuple[list[torch.Tensor], float]:
    """A plain parameter beside sharded ones, whose gradient the user averages."""
    model = problem.network()
    extra = nn.Parameter(torch.ones(problem.C, dtype=torch.float64))
    seen = []
    shard(model)
    optimizer = flatmin.SAM(torch.optim.SGD([*model.parameters(), extra], lr=0.2, foreach=False), rho=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        seen.append([*problem.weights(model), extra.detach().clone()])
        x, y = problem.batch(0)
        (loss := nn.functional.cross_entropy(model(x) * extra, y)).backward()
        distributed.all_reduce(extra.grad)
        extra.grad /= 2
        return loss.detach()

    optimizer.step(closure)
    return [*problem.weights(model), extra.detach()], global_norm([b - a for a, b in zip(*seen, strict=True)]).item()


def test_sam_perturbs_plain_parameters_beside_sharded_ones():
    (ours, moved), (theirs, also) = run_ranks(mixed_parameters, 2)
    problem.assert_same(ours, theirs)
    assert moved == also == pytest.approx(0.5, rel=1e-9)


def wrong_order() -> tuple[str, str]:
    sharded = shard(problem.network())
    with pytest.raises(InvalidArgumentError) as copied:
        flatmin.MESA(sharded)
    model = problem.network()
    late = flatmin.MESA(model)
    shard(model)
    with pytest.raises(InvalidArgumentError) as half:
        late.update()
    return str(copied.value), str(half.value)


def test_wrong_order_is_explained():
    for copied, half in run_ranks(wrong_order, 2):
        assert copied.startswith("model cannot be copied (FSDP does not support deepcopy")
        assert "make its average first" in copied
        assert "call fully_shard(model) and, in the same way, fully_shard(average.module)" in copied
        assert copied.endswith("or give MESA an average of your own, average=...")
        assert "call fully_shard(average.module) in the same way" in half


def shared() -> torch.Tensor:
    model, average = problem.network(), problem.network()
    shard(model), shard(average)
    x, _ = problem.batch(0)
    ours = flatmin.MESA(model, average=average, start_epoch=0)
    loss = ours(model(x) + 1 * x[:, : problem.C], x).detach()
    assert all(isinstance(p, DTensor) for p in average.parameters())
    return loss


def test_a_sharded_average_can_be_shared():
    assert all(loss > 0 for loss in run_ranks(shared, 2))


def saf(sharded: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each step is an epoch in which every sample comes once, on whichever rank its turn falls."""
    model = problem.network()
    if sharded:
        shard(model)
    codec = flatmin.history.Dense(torch.float64)
    ours = flatmin.SAF(problem.B, problem.C, coefficient=5.0, lag=1, start_epoch=0, history=codec, sharing="shard")
    optimizer = problem.sgd(model)
    losses = []
    for step in range(STEPS):
        ours.set_epoch(step)
        order = torch.randperm(problem.B, generator=torch.Generator().manual_seed(step))
        index = order.chunk(problem.world())[problem.rank()]
        x, y = torch.sin(torch.outer(index + 1.0, torch.arange(1.0, 5))).double(), index % problem.C
        optimizer.zero_grad()
        logits = model(x)
        penalty = ours(logits, index)
        (nn.functional.cross_entropy(logits, y) + penalty).backward()
        optimizer.step()
        losses.append(penalty.detach())
    return problem.weights(model), losses


def test_saf_is_that_of_one_process():
    weights, losses = saf(False)
    assert all(loss > 1e-3 for loss in losses[1:])
    results = run_ranks(saf, 2, True)
    for rank_weights, _ in results:
        problem.assert_close(rank_weights, weights)
    problem.assert_close([(a + b) / 2 for a, b in zip(results[0][1], results[1][1], strict=True)], losses)


def statistics(sharded: bool, choice: str) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """MESA of a network with batch norm, whose statistics each rank has for itself, as the network has."""
    model = problem.network(norm=True)
    ours = flatmin.MESA(model, coefficient=5.0, decay=0.7, start_epoch=0, statistics=choice)
    if sharded:
        shard(model), shard(ours.average.module)
    optimizer = problem.sgd(model)
    ours.attach(optimizer)
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4) ** 3  # the same on all ranks
    for _ in range(STEPS):
        if choice == "fresh":
            ours.refresh([x, -x])
        optimizer.zero_grad()
        logits = model(x)
        (logits.log_softmax(1).square().mean() + ours(logits, x)).backward()
        optimizer.step()
    buffers = [buffer.clone() for buffer in ours.average.module.buffers()]
    return problem.weights(ours.average.module), buffers, ours(model(x), x).detach()


@pytest.mark.parametrize("choice", ["averaged", "batch", "fresh"])
def test_statistics_of_a_sharded_average_are_those_of_one_process(choice):
    weights, buffers, loss = statistics(False, choice)
    for rank_weights, rank_buffers, rank_loss in run_ranks(statistics, 2, True, choice):
        problem.assert_close(rank_weights, weights)
        problem.assert_close(rank_buffers, buffers)
        problem.assert_close([rank_loss], [loss])

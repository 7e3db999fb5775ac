"""SAF on several ranks equals SAF on one process that sees the ranks' batches one after another."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DistributedSampler

import flatmin
from flatmin._attached import KEY
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.history import Dense, LowRank, Quantized, TopK
from tests.distributed._spawn import run_ranks
from tests.live import live

N, C, BATCH, LAG, EPOCHS = 23, 6, 4, 2, 7
FORMS = {
    "dense": {"history": Dense(), "lag": LAG},
    "mean": {"history": Dense(), "momentum": 0.7},
    "int6": {"history": Quantized(6), "lag": LAG},
    "topk": {"history": TopK(3), "lag": LAG},
    "lowrank": {"history": LowRank(3), "lag": LAG},
}
Step = tuple[int, list[Tensor]]  # the epoch, and each rank's samples


def make(form: str, sharing: str = "auto") -> flatmin.SAF:
    return flatmin.SAF(N, C, start_epoch=0, sharing=sharing, **FORMS[form])


def padded(world: int) -> Iterator[Step]:
    """DistributedSampler deals the samples out anew in each epoch, and repeats some so that all ranks have as many."""
    samplers = [DistributedSampler(range(N), world, rank, seed=1) for rank in range(world)]
    for epoch in range(EPOCHS):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for batches in zip(*(torch.tensor(list(sampler)).split(BATCH) for sampler in samplers), strict=True):
            yield epoch, list(batches)


def uneven(world: int) -> Iterator[Step]:
    """Nothing is padded: the last batches differ in length, and some are empty."""
    for epoch in range(EPOCHS):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
        shares = [list(order[rank::world].split(BATCH - rank)) for rank in range(world)]
        empty = torch.empty(0, dtype=torch.int64)
        for batches in itertools.zip_longest(*shares, fillvalue=empty):
            yield epoch, list(batches)


def repeating(world: int) -> Iterator[Step]:
    """Drawn with replacement: samples come twice within a batch, a step and an epoch."""
    generator = torch.Generator().manual_seed(3)
    for epoch in range(EPOCHS):
        for _ in range(N // (BATCH * world) + 1):
            yield epoch, [torch.randint(N // 2, (BATCH,), generator=generator) for _ in range(world)]


STREAMS = {each.__name__: each for each in (padded, uneven, repeating)}


def outputs(step: int, index: Tensor, rank: int) -> Tensor:
    """The network's logits: others in each step."""
    return 3 * torch.randn(len(index), C, generator=torch.Generator().manual_seed(1000 * step + rank))


def follow(saf: flatmin.SAF, steps: list[Step], ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Each step's loss, summed over the batch, and its gradient, where ``ranks`` are those this process stands for."""
    results, current = [], None
    for number, (epoch, batches) in enumerate(steps):
        if epoch != current:
            saf.set_epoch(epoch)
            current = epoch
        logits = torch.cat([outputs(number, batches[rank], rank) for rank in ranks]).requires_grad_()
        loss = saf(live(logits), torch.cat([batches[rank] for rank in ranks]))
        if loss.requires_grad:
            loss.backward()
        gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad
        results.append((loss.detach() * len(logits), gradient * len(logits)))
    return results


def whole_state(saf: flatmin.SAF) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in saf.state_dict().items() if not name.endswith("_extra_state")}


def on_ranks(stream: str) -> dict:
    """What one rank sees of every form and both ways of sharing."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    steps = list(STREAMS[stream](world))
    results = {}
    for form, sharing in itertools.product(FORMS, ("replicate", "shard")):
        saf = make(form, sharing)
        results[form, sharing] = (follow(saf, steps, [rank]), whole_state(saf), saf.history.store.rows.nbytes)
    return results


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stream", STREAMS)
def test_ranks_equal_one_process(world: int, stream: str) -> None:
    seen = run_ranks(on_ranks, world, stream)
    steps = list(STREAMS[stream](world))
    acting = 0
    for form, sharing in itertools.product(FORMS, ("replicate", "shard")):
        one = make(form)
        expected = follow(one, steps, list(range(world)))
        # A sum in another order may round a code of the low-rank form otherwise.
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if form == "lowrank" else {}
        for number, (loss, gradient) in enumerate(expected):
            parts = [each[form, sharing][0][number] for each in seen]
            torch.testing.assert_close(sum(part[0] for part in parts), loss, **tolerance)
            torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, **tolerance)
            acting += bool(loss > 0)
        for rank, each in enumerate(seen):
            _, state, nbytes = each[form, sharing]
            for name, tensor in whole_state(one).items():
                if name.endswith(("product", "total", "count")) or tensor.dtype != torch.uint8:
                    continue
                if form in ("mean", "lowrank"):  # sums in another order may round one step of the scale otherwise
                    assert (state[name] == tensor).float().mean() > 0.9
                else:
                    assert torch.equal(state[name], tensor), (form, sharing, name)
            torch.testing.assert_close(state["history.store.epochs"], one.state_dict()["history.store.epochs"])
            if sharing == "shard":
                share = len(range(rank, N, world))
                assert nbytes * N == one.history.store.rows.nbytes * share
    assert acting > 60


def each_for_itself() -> list[Tensor]:
    """The authors' way, as a control: no rank hears of the others."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    saf = make("dense")
    saf.history.store.ranks = _Alone()
    return [loss for loss, _ in follow(saf, list(padded(world)), [rank])]


class _Alone:
    size, rank = 1, 0


def test_without_sharing_about_half_of_the_comparisons_are_lost() -> None:
    losses = run_ranks(each_for_itself, 2)
    together = [loss for loss, _ in follow(make("dense"), list(padded(2)), [0, 1])]
    alone = sum(float(loss) for each in losses for loss in each)
    assert 0.25 < alone / float(sum(together)) < 0.75


def saved(sharing: str, epochs: int) -> tuple[dict, list]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    steps = list(padded(world))
    middle = next(place for place, (epoch, _) in enumerate(steps) if epoch == epochs) + 1  # in the midst of an epoch
    saf = make("int6", sharing)
    follow(saf, steps[:middle], [rank])
    return saf.state_dict(), saf.history.store.rows.shape[1]


def resumed(sharing: str, state: dict) -> list[Tensor]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    saf = make("int6", sharing)
    saf.load_state_dict(state)
    return [loss for loss, _ in follow(saf, [step for step in padded(world) if step[0] >= 4], [rank])]


@pytest.mark.parametrize("sharing", ["replicate", "shard"])
def test_state_is_whole_on_every_rank_and_fits_another_number_of_ranks(sharing: str) -> None:
    states = [state for state, _ in run_ranks(saved, 2, sharing, 3)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name.startswith("history."))
    assert states[0]["history.store.rows"].shape[1] == N
    one = make("int6")
    one.load_state_dict(states[0])
    expected = [loss for loss, _ in follow(one, [step for step in padded(4) if step[0] >= 4], [0, 1, 2, 3])]
    for losses in (run_ranks(resumed, 4, sharing, states[0]), run_ranks(resumed, 4, "shard", states[0])):
        torch.testing.assert_close([sum(each) for each in zip(*losses, strict=True)], expected)
    assert sum(loss > 0 for loss in expected[: len(expected) // 3]) > 0  # of what was remembered, and not seen since


def low_rank_sums(state: dict | None) -> dict:
    """Saved in the midst of an epoch; the sums of which the next basis is made."""
    saf = make("lowrank")
    if state is None:
        steps = list(padded(distributed.get_world_size()))
        follow(saf, steps[: len(steps) // EPOCHS * 3 + 1], [distributed.get_rank()])
    else:
        saf.load_state_dict(state)
    return saf.state_dict()


def test_state_of_low_rank_holds_what_all_ranks_have_seen() -> None:
    state, other = run_ranks(low_rank_sums, 2, None)
    again = [*run_ranks(low_rank_sums, 4, state), *run_ranks(low_rank_sums, 2, state)]
    one = make("lowrank")
    one.load_state_dict(state)
    for name in ("history.codec.product", "history.codec.total", "history.codec.count"):
        assert state[name].abs().sum() > 0
        assert torch.equal(state[name], other[name])
        for each in (one.state_dict(), *again):
            torch.testing.assert_close(each[name], state[name])
    assert state["history.codec.count"] == 2 * BATCH


def copied_with_rows_under_way() -> list[bool]:
    saf = make("int6", "replicate")
    saf(live(torch.ones(1, C)), torch.tensor([distributed.get_rank()]))
    assert saf.history.store._pending
    copies = [copy.deepcopy(saf), pickle.loads(pickle.dumps(saf))]
    return [bool((each.history.store.epochs[0, :2] == 0).all()) for each in copies]


def test_a_copy_has_what_was_under_way() -> None:
    assert run_ranks(copied_with_rows_under_way, 2) == [[True, True]] * 2


def in_different_epochs() -> str:
    saf = make("dense")
    saf.set_epoch(distributed.get_rank())
    with pytest.raises(InvalidArgumentError) as error:
        saf(live(torch.zeros(2, C)), torch.arange(2))
    return str(error.value)


def test_ranks_in_different_epochs_are_told_so() -> None:
    assert all("different epochs, [0, 1]" in message for message in run_ranks(in_different_epochs, 2))


def made_too_early() -> str:
    history = make("dense", "shard").history
    history.store.part = (0, 1)  # as it would be, had it been made before init_process_group
    with pytest.raises(InvalidArgumentError) as error:
        history.exchange(torch.arange(2), torch.zeros(2, C), 0)
    return str(error.value)


def test_a_history_made_before_the_ranks_were_there_says_so() -> None:
    assert all("after torch.distributed.init_process_group" in message for message in run_ranks(made_too_early, 2))


class Holder(nn.Module):
    """A network that holds its SAF, as a LightningModule does."""

    def __init__(self, saf: flatmin.SAF) -> None:
        super().__init__()
        self.layer, self.saf = nn.Linear(3, C), saf

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def saf_within_ddp() -> dict:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    steps = list(padded(world))
    results = {}
    for form, sharing in itertools.product(FORMS, ("replicate", "shard")):
        held, alone = make(form, sharing), make(form, sharing)
        model = nn.parallel.DistributedDataParallel(Holder(held))
        assert not list(model.buffers())
        losses = []
        for saf in (held, alone):
            current = None
            losses.append([])
            for number, (epoch, batches) in enumerate(steps):
                if epoch != current:
                    saf.set_epoch(epoch)
                    current = epoch
                index = batches[rank]
                if saf is held:
                    model(torch.ones(len(index), 3))  # DDP sends buffers at its beginning
                losses[-1].append(saf(outputs(number, index, rank).requires_grad_(), index).detach())
        assert sum(loss > 0 for loss in losses[0]) > 5
        results[form, sharing] = torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    return results


def test_a_saf_that_is_stored_on_the_network_is_not_broadcast_by_ddp() -> None:
    for each in run_ranks(saf_within_ddp, 2):
        assert all(each.values()), each


def soft_labels_within_ddp() -> Tensor:
    smoothing = flatmin.OnlineLabelSmoothing(C)
    model = nn.parallel.DistributedDataParallel(Holder(smoothing))
    y = torch.full((2,), distributed.get_rank())
    for _ in range(2):
        model(torch.ones(2, 3))
        smoothing(nn.functional.one_hot(y, C).float().requires_grad_(), y)
    smoothing.set_epoch(1)
    return smoothing.soft_labels


def test_soft_labels_that_are_stored_on_the_network_have_what_each_rank_saw() -> None:
    ours, theirs = run_ranks(soft_labels_within_ddp, 2)
    assert torch.equal(ours, theirs)
    assert (ours[:2].diag() > 1 / C).all()
    assert (ours[2:] == 1 / C).all()


def saved_on_one_rank(form: str, sharing: str) -> tuple[dict | None, list[Tensor], str]:
    """The first rank alone asks its optimizer for the state; all go on."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    steps = list(padded(world))
    middle = len(steps) // 2
    saf, optimizer = make(form, sharing), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    saf.attach(optimizer)
    follow(saf, steps[:middle], [rank])
    state, said = None, ""
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = copy.deepcopy(optimizer.state_dict())
            optimizer.state_dict()
        said = " | ".join(str(warning.message) for warning in caught)
    return state, [loss for loss, _ in follow(saf, steps[middle:], [rank])], said


def resumed_from(form: str, sharing: str, states: list[dict]) -> tuple[list[Tensor], str]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    steps = list(padded(world))
    saf, optimizer = make(form, sharing), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    saf.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(states[rank % len(states)])
    losses = [loss for loss, _ in follow(saf, steps[len(steps) // 2 :], [rank])]
    return losses, " | ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize(("form", "sharing"), [("int6", "shard"), ("int6", "replicate"), ("lowrank", "replicate")])
def test_the_state_on_one_rank_alone_does_not_wait_for_the_others_and_loses_nothing_in_silence(form, sharing) -> None:
    (state, ours, said), (_, theirs, _) = run_ranks(saved_on_one_rank, 2, form, sharing)
    (first, nothing), (second, lost) = run_ranks(resumed_from, 2, form, sharing, [state])
    assert ("this rank's share of SAF's history alone" in said) == (sharing == "shard")
    assert said.count("share of") <= 1
    assert nothing == ""
    if sharing == "shard":
        assert f"of rank 0 of 2 alone: {N // 2} of the {N // 2} samples here begin anew" in lost
        torch.manual_seed(0)
        one, optimizer = make(form), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        one.attach(optimizer)
        with pytest.warns(FlatminWarning, match=f"{N // 2} of the {N} samples here begin anew"):
            optimizer.load_state_dict(state)
        assert (one.history.store.epochs[:, 0::2] >= 0).any()
        assert (one.history.store.epochs[:, 1::2] == -1).all()
    elif form == "lowrank":
        assert "the logits that rank 0 of 2 saw" in lost
    else:
        assert lost == ""
        assert torch.equal(torch.stack(first), torch.stack(ours))
        assert torch.equal(torch.stack(second), torch.stack(theirs))


def saved_on_every_rank(form: str) -> tuple[dict, list[Tensor]]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    steps = list(padded(world))
    middle = len(steps) // 2
    saf, optimizer = make(form, "shard"), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    saf.attach(optimizer)
    follow(saf, steps[:middle], [rank])
    saf._warned_of_share = True
    state = copy.deepcopy(optimizer.state_dict())
    return state, [loss for loss, _ in follow(saf, steps[middle:], [rank])]


@pytest.mark.parametrize("form", ["int6", "lowrank"])
def test_shards_that_each_rank_saved_for_itself_continue_exactly(form) -> None:
    (state, ours), (other, theirs) = run_ranks(saved_on_every_rank, 2, form)
    assert not torch.equal(state[KEY]["SAF"]["history.store.part"], other[KEY]["SAF"]["history.store.part"])
    (first, said), (second, said_too) = run_ranks(resumed_from, 2, form, "shard", [state, other])
    assert said == said_too == ""
    assert torch.equal(torch.stack(first), torch.stack(ours))
    assert torch.equal(torch.stack(second), torch.stack(theirs))
    assert sum(loss > 0 for loss in ours) > 5

"""SAF against its oracle, and each of its promises."""

import copy
import io
import warnings

import pytest
import torch
from torch.utils.data import DistributedSampler

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.history import Dense, LowRank, TopK
from tests.live import live
from tests.reference import oracles

N, C = 23, 4
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
Batch = tuple[int, torch.Tensor, torch.Tensor]


def stream(epochs: int, *, skip: float = 0.3, repeat: bool = False, seed: int = 0) -> list[Batch]:
    """Shuffled epochs of (epoch, index, logits) in which samples are missing, and repeated if so wished."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for epoch in range(epochs):
        order = torch.randperm(N, generator=generator)
        if repeat:
            order = torch.randint(N, (N,), generator=generator)
        order = order[torch.rand(N, generator=generator) >= skip]
        for index in order.split(5):
            logits = 3 * torch.randn(len(index), C, dtype=torch.float64, generator=generator)
            batches.append((epoch, index, logits.requires_grad_()))
    return batches


def follow(saf: flatmin.SAF, batches: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a training loop sees: each batch's loss and gradient, with set_epoch when an epoch begins."""
    results, current = [], None
    for epoch, index, logits in batches:
        if epoch != current:
            saf.set_epoch(epoch)
            current = epoch
        results.append(one(saf, logits, index))
    return results


def one(saf: flatmin.SAF, logits: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = saf(live(leaf), index)
    (loss + 0 * leaf.sum()).backward()
    return loss.detach(), leaf.grad


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True))


def recorded(lag: int = 1, logits: torch.Tensor | None = None, **arguments) -> flatmin.SAF:
    """A SAF that has seen samples 0, 1, 2 in epoch 0, and stands where they are compared with."""
    saf = flatmin.SAF(N, C, lag=lag, start_epoch=0, **arguments)
    saf(live(first_logits() if logits is None else logits), torch.arange(3))
    saf.set_epoch(lag)
    return saf


IN_FLOAT64 = {"history": Dense(torch.float64)}


def kept(saf: flatmin.SAF) -> torch.Tensor:
    """The logits in a dense history, shape (lag, N, C)."""
    return saf.history.store.rows.view(saf.history.codec.dtype)


def first_logits() -> torch.Tensor:
    return torch.randn(3, C, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lag", [1, 3, 5])
@pytest.mark.parametrize("repeat", [False, True], ids=["shuffled", "with repeats"])
@pytest.mark.parametrize("start_epoch", [0, 5])
def test_equals_the_oracle_over_many_epochs(lag, repeat, start_epoch):
    options = {"coefficient": 0.7, "temperature": 4.0, "lag": lag, "start_epoch": start_epoch}
    batches = stream(14, repeat=repeat)
    ours = follow(flatmin.SAF(N, C, **IN_FLOAT64, **options), batches)
    oracle = oracles.saf([(epoch, index.tolist(), logits.tolist()) for epoch, index, logits in batches], **options)
    assert sum(loss > 0 for loss, _ in oracle) > 20
    for (loss, gradient), (value, slope) in zip(ours, oracle, strict=True):
        torch.testing.assert_close(loss.item(), value, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(gradient, torch.tensor(slope, dtype=torch.float64), rtol=1e-10, atol=1e-13)


def test_an_epoch_that_was_left_out_is_not_filled_from_an_older_one():
    saf = flatmin.SAF(N, C, lag=3, start_epoch=0)
    index = torch.arange(N)
    follow(saf, [(0, index, torch.randn(N, C))])
    assert follow(saf, [(6, index, torch.randn(N, C))])[0][0] == 0
    assert follow(saf, [(9, index, torch.randn(N, C))])[0][0] > 0


FORMS = ["dense", "int4", "mean", LowRank(rank=2), TopK(k=2)]


@pytest.mark.parametrize("history", FORMS, ids=lambda form: form if isinstance(form, str) else type(form).__name__)
def test_another_training_from_epoch_0_finds_nothing_of_the_one_before(history):
    options = {"lag": None if history == "mean" else 2, "start_epoch": 0, "history": history}
    saf = flatmin.SAF(N, C, **options)
    follow(saf, stream(7))
    batches = stream(9, skip=0.5, seed=1)
    again, alone = follow(saf, batches), follow(flatmin.SAF(N, C, **options), batches)
    assert any(loss > 0 for loss, _ in alone)
    assert_same(again, alone)


def test_epoch_0_alone_loses_nothing_until_something_is_recorded():
    saf, twin = recorded(), recorded()
    saf.set_epoch(0)
    saf.eval()(live(torch.zeros(3, C)), torch.arange(3))
    saf.train().set_epoch(1)
    assert saf(live(torch.zeros(3, C)), torch.arange(3)) == twin(live(torch.zeros(3, C)), torch.arange(3)) > 0


@pytest.mark.parametrize("start_epoch", [2, 3])
def test_loss_begins_at_start_epoch_with_what_was_recorded_before(start_epoch):
    losses = follow(flatmin.SAF(N, C, lag=1, start_epoch=start_epoch), stream(5, skip=0.0))
    batches = len(losses) // 5
    assert all(loss == 0 for loss, _ in losses[: start_epoch * batches])
    assert all(loss > 0 for loss, _ in losses[start_epoch * batches :])


def test_coefficient_scales_the_loss_and_zero_switches_it_off():
    now = torch.zeros(3, C)
    losses = [recorded(coefficient=c)(live(now), torch.arange(3)) for c in (0.0, 0.3, 0.6)]
    assert losses[0] == 0
    torch.testing.assert_close(losses[2], 2 * losses[1])


def test_eval_mode_neither_records_nor_penalises():
    saf = recorded().eval()
    before = copy.deepcopy(saf.state_dict())
    assert saf(live(torch.zeros(3, C)), torch.arange(3)) == 0
    assert all(torch.equal(before[name], value) for name, value in saf.state_dict().items())
    assert saf.train()(live(torch.zeros(3, C)), torch.arange(3)) > 0


@pytest.mark.parametrize("lag", [1, 3, 5])
def test_keeps_exactly_lag_slots(lag):
    saf = flatmin.SAF(N, C, lag=lag)
    expected = lag * N * (4 * C + 4)
    assert saf.history.nbytes == sum(buffer.untyped_storage().nbytes() for buffer in saf.history.buffers()) == expected


@pytest.mark.parametrize("same_batch", [True, False])
def test_a_repeated_sample_contributes_once_the_first_counts_and_the_last_is_remembered(same_batch):
    saf = recorded()
    a, b = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0, 0.0]])
    index = torch.tensor([1])
    alone = recorded()(live(a), index)
    if same_batch:
        torch.testing.assert_close(saf(live(torch.cat([a, b])), index.repeat(2)), alone / 2)  # a mean over two
    else:
        torch.testing.assert_close(saf(live(a), index), alone)
        assert saf(live(b), index) == 0
    saf.set_epoch(2)
    assert saf(live(b), index) == 0  # nothing has moved since the last
    assert torch.equal(kept(saf)[0, 1], b[0])


def test_many_repeats_in_a_large_batch_remember_the_last():
    saf, index = flatmin.SAF(N, C), torch.randint(N, (1000,), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1000, C)
    with pytest.warns(FlatminWarning):
        saf(live(logits), index)
    for sample in range(N):
        assert torch.equal(kept(saf)[0, sample], logits[(index == sample).nonzero().max()])


def test_history_is_given_equal_rows_for_a_repeated_sample(monkeypatch):
    # on a GPU it is open which of two different rows would be kept
    saf, given = flatmin.SAF(N, C), []
    monkeypatch.setattr(saf.history.store, "write", lambda *arguments: given.append(arguments))
    saf.set_epoch(4)
    logits = torch.randn(5, C)
    saf(live(logits), torch.tensor([7, 2, 7, 7, 2]))
    ((index, slot, rows, epochs, _),) = given
    assert (index.tolist(), slot, epochs.tolist()) == ([7, 2, 7, 7, 2], 4 % 3, [4] * 5)
    assert torch.equal(rows.view(torch.float32), logits[[3, 4, 3, 3, 4]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])  # -inf is a masked class, see test_masked.py
def test_outputs_that_are_not_finite_are_not_remembered(value):
    logits, now = first_logits(), torch.zeros(3, C)
    broken = logits.clone()
    broken[1, 2] = value
    loss, gradient = one(recorded(logits=broken), now, torch.arange(3))
    alone, _ = one(recorded(), now[[0, 2]], torch.tensor([0, 2]))
    torch.testing.assert_close(loss, alone * 2 / 3)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


def test_outputs_too_large_for_the_history_are_not_remembered():
    saf = flatmin.SAF(N, C, lag=1, start_epoch=0)
    saf(live(torch.full((3, C), 1e300, dtype=torch.float64)), torch.arange(3))
    saf.set_epoch(1)
    assert saf(live(torch.randn(3, C)), torch.arange(3)) == 0


def test_forgotten_set_epoch_is_warned_of_once_where_saf_was_called():
    saf = flatmin.SAF(N, C)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            for index in torch.arange(N).split(5):
                saf(live(torch.zeros(len(index), C)), index)
    assert [warning.category for warning in caught] == [FlatminWarning]
    assert "set_epoch" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("replicas", [1, 4])
def test_correct_use_gives_no_warning(replicas):
    saf = flatmin.SAF(N, C)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(4):
            saf.set_epoch(epoch)
            for rank in range(replicas):  # each rank's share is padded to the same length
                index = torch.tensor(list(DistributedSampler(range(N), replicas, rank)))
                saf(live(torch.zeros(len(index), C)), index)
    assert not caught


def test_state_dict_in_the_middle_of_an_epoch_is_bitwise_neutral():
    batches, lag = stream(12), 3
    middle = next(i for i, batch in enumerate(batches) if batch[0] == 8) + 2
    saf = flatmin.SAF(N, C, lag=lag)
    follow(saf, batches[:middle])
    file = io.BytesIO()
    torch.save(saf.state_dict(), file)
    file.seek(0)
    resumed = flatmin.SAF(N, C, lag=lag)
    assert resumed.load_state_dict(torch.load(file, weights_only=True))
    rest = [batch for batch in batches[middle:] if batch[0] == 8]
    expected, got = ([one(module, logits, index) for _, index, logits in rest] for module in (saf, resumed))
    assert any(loss > 0 for loss, _ in expected)
    assert_same(expected, got)
    later = [batch for batch in batches if batch[0] > 8]
    assert_same(follow(saf, later), follow(resumed, later))


def test_state_dict_carries_how_far_the_epoch_has_come():
    saf, resumed, index = flatmin.SAF(N, C), flatmin.SAF(N, C), torch.arange(N)
    saf(live(torch.zeros(N, C)), index)
    resumed.load_state_dict(saf.state_dict())
    with pytest.warns(FlatminWarning, match="set_epoch"):
        resumed(live(torch.zeros(N, C)), index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_history_in_another_dtype(dtype):
    saf = flatmin.SAF(N, C, history=Dense(dtype))
    assert saf.history.row_bytes == dtype.itemsize * C
    got, exact = (follow(module, stream(9)) for module in (saf, flatmin.SAF(N, C, **IN_FLOAT64)))
    tolerance = 10 * torch.finfo(dtype).eps
    for (loss, _), (expected, _) in zip(got, exact, strict=True):
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert sum(loss > 0 for loss, _ in got) > 10


def test_deepcopy_goes_on_by_itself():
    batches = stream(9)
    saf = flatmin.SAF(N, C, lag=3)
    head = [batch for batch in batches if batch[0] < 5]
    follow(saf, head)
    twin = copy.deepcopy(saf)
    assert_same(follow(saf, batches[len(head) :]), follow(twin, batches[len(head) :]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_of_any_dtype_give_a_finite_loss_in_float32_or_float64(dtype):
    most = torch.finfo(dtype).max
    past = torch.tensor([[0.0, 1000.0, 0.0, 0.0], [most, -most, 0.0, 0.0], [-most, -most, -most, most]], dtype=dtype)
    saf = recorded(logits=past) if dtype != torch.float64 else recorded(logits=past.clamp(-1e38, 1e38))
    loss, gradient = one(saf, past.flip(1), torch.arange(3))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.isfinite()
    assert loss > 0
    assert gradient.isfinite().all()
    assert flatmin.SAF(N, C)(live(past), torch.arange(3)).dtype == loss.dtype  # 0, before start_epoch


def test_autocast_does_not_lower_the_precision():
    layer, x = torch.nn.Linear(8, C), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        inside = recorded()(live(logits), torch.arange(3))
    assert logits.dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, recorded()(live(logits), torch.arange(3)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_records_logits_and_no_graph(dtype):
    saf, logits = flatmin.SAF(N, C), torch.randn(3, C, requires_grad=True)
    saf(live(logits), torch.tensor([4, 2, 9], dtype=dtype))
    assert torch.equal(kept(saf)[0, [4, 2, 9]], logits.detach())
    assert not any(buffer.requires_grad for buffer in saf.history.buffers())


def test_empty_batch():
    assert recorded()(live(torch.zeros(0, C)), torch.zeros(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("index_device", ["meta", "cpu"])
def test_the_host_never_waits_for_a_value_on_the_device(index_device):
    # a meta tensor has no values: whatever would make the host wait for one raises there
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros((), device="meta").item()
    saf = flatmin.SAF(N, C, lag=3, start_epoch=0).to("meta")
    for epoch in range(5):
        saf.set_epoch(epoch)
        logits = torch.zeros(3, C, device="meta", requires_grad=True)
        loss = saf(live(logits), torch.zeros(3, dtype=torch.int64, device=index_device))
        (loss + logits.sum()).backward()
    assert loss.requires_grad
    assert loss.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_on_a_gpu():
    saf = flatmin.SAF(N, C, lag=1, start_epoch=0).cuda()
    index, logits = torch.arange(3).pin_memory(), torch.randn(3, C, device="cuda", requires_grad=True)
    saf(live(logits), index)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for where in (index, index.cuda(non_blocking=True)):
            saf.set_epoch(1)
            saf(live(logits), where).backward()  # raises where the host would wait
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.grad is not None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_samples", v) for v in (0, -1, 2.5, "10", True)]
    + [("num_classes", v) for v in (1, 0, 2.5)]
    + [("coefficient", v) for v in (-0.1, NAN, INF, "much", None)]
    + [("temperature", v) for v in (0, -5, NAN, INF)]
    + [("lag", v) for v in (0, -1, 1.5)]
    + [("start_epoch", v) for v in (-1, 0.5, None)],
)
def test_bad_argument_is_named_with_its_value(name, value):
    with pytest.raises(InvalidArgumentError, match=rf"^{name} must .*{value!r}"):
        flatmin.SAF(**{"num_samples": N, "num_classes": C, name: value})


@pytest.mark.parametrize("epoch", [-1, 1.0, None])
def test_bad_epoch_is_named(epoch):
    with pytest.raises(InvalidArgumentError, match=r"^epoch must"):
        flatmin.SAF(N, C).set_epoch(epoch)


LOGITS, INDEX = torch.zeros(3, C), torch.arange(3)


@pytest.mark.parametrize(
    ("logits", "index", "message"),
    [
        (torch.zeros(3, C + 1), INDEX, rf"^logits must .*\(3, {C + 1}\).*num_classes={C}"),
        (torch.zeros(C), INDEX, "^logits must"),
        (torch.zeros(3, C, 1), INDEX, "^logits must"),
        (LOGITS.long(), INDEX, "^logits must be floating"),
        ([[0.0] * C], INDEX, "^logits must be a tensor, got list"),
        (LOGITS, [0, 1, 2], "^index must be a tensor, got list"),
        (LOGITS, torch.tensor([0, 1, N]), rf"^index must lie in \[0, {N}\).*to {N}.*num_samples={N}"),
        (LOGITS, torch.tensor([0, -1, 2]), "^index must lie in .*from -1"),
        (LOGITS, INDEX.float(), "^index must be int64.*float32"),
        (LOGITS, INDEX.bool(), "^index must be int64.*bool"),
        (LOGITS, torch.arange(2), r"^index must .*\(3,\).*\(2,\)"),
        (LOGITS, torch.arange(3)[:, None], "^index must"),
        (LOGITS, torch.full((3, C), 1 / C), "^index .*mixup.*MESA"),
        (LOGITS.to("meta"), INDEX, r"^logits are on meta .*saf\.to\('meta'\)"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_batch_is_explained_and_not_recorded(logits, index, message, training):
    saf = recorded().train(training)
    before = kept(saf).clone()
    with pytest.raises(InvalidArgumentError, match=message):
        saf(logits, index)
    assert torch.equal(kept(saf), before)


def test_the_second_pass_of_another_optimizer_is_named_and_not_a_forgotten_epoch():
    model, saf = torch.nn.Linear(4, C), flatmin.SAF(N, C, lag=1, start_epoch=1)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = saf(model(torch.ones(N, 4)), torch.arange(N)) + model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(3):
            saf.set_epoch(epoch)
            optimizer.step(closure)
    (said,) = (str(warning.message) for warning in caught)
    assert "no past in the second pass" in said
    assert "not both" in said


@pytest.mark.parametrize("loaded", [False, True])
def test_a_resumed_run_whose_past_was_not_loaded_is_said_once(loaded):
    saf, before = (flatmin.SAF(N, C, lag=1, start_epoch=1) for _ in range(2))
    if loaded:
        saf.load_state_dict(before.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in (3, 4):
            saf.set_epoch(epoch)
            saf(live(torch.randn(2, C)), torch.tensor([0, 1]))
    assert len(caught) == (not loaded)
    assert loaded or "first samples in epoch 3" in str(caught[0].message)

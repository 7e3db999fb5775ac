"""The forms of a history: what comes back of what was put in, and which bytes it takes."""

import math

import pytest
import torch
from torch import Tensor

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.history import Codec, Dense, History, LowRank, Quantized, TopK, make_history
from flatmin.history._choose import CODECS
from flatmin.history._quantized import dequantize, pack, quantize, unpack
from flatmin.losses import trajectory_loss
from tests.live import live
from tests.reference import oracles

N, C = 40, 37
NAMES = [*CODECS]


def form(name: str, classes: int = C, *, lag: int = 1, samples: int = N) -> History:
    if name == "topk":
        return History(TopK(5), samples, classes, lag=lag)
    if name == "lowrank":
        return History(LowRank(8), samples, classes, lag=lag)
    return make_history(name, samples, classes, lag=None if name == "mean" else lag, temperature=5.0)


def outputs(seed: int, count: int = N, classes: int = C, rank: int | None = None) -> Tensor:
    """Logits as a network gives them: some classes likely, and of a certain rank if so wished."""
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return 4 * torch.randn(count, classes, generator=generator)
    directions = torch.randn(rank, classes, generator=torch.Generator().manual_seed(99))
    return 2 * torch.randn(count, rank, generator=generator) @ directions


def put(history: History, index: Tensor, epoch: int, logits: Tensor) -> None:
    assert history.exchange(index, logits, epoch, compare=False) is None


def get(history: History, index: Tensor, epoch: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return history.recall(index, logits, epoch)


def divergence(history: History, index: Tensor, epoch: int, logits: Tensor) -> Tensor:
    now, then, counts = get(history, index, epoch, logits)
    return trajectory_loss(now, then, temperature=5.0, mask=counts)


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 36, 37, 1000])
def test_packing_loses_nothing_and_no_byte(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (7, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack(codes, bits)
    assert packed.shape == (7, math.ceil(count * bits / 8))
    assert torch.equal(unpack(packed, bits, count), codes)
    assert pack(codes[:0], bits).shape == (0, packed.shape[1])


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_quantized_logits_are_off_by_half_a_step_at_most(bits: int) -> None:
    logits = outputs(0, 200)
    codes, step = quantize(logits, bits)
    back = dequantize(codes, step, bits, C)
    span = logits.amax(1) - logits.amin(1)
    torch.testing.assert_close(step.float(), span / (2**bits - 1), rtol=2e-3, atol=0)
    error = (back - (logits - logits.amax(1, keepdim=True))).abs().amax(1)
    # half a step, and what the step lost in float16 by the lowest code
    assert (error <= 0.5 * span / (2**bits - 1) + 6e-4 * span).all()
    assert (error > 0.2 * span / (2**bits - 1)).all()  # the control: it is this coarse


def test_a_class_that_is_masked_out_does_not_take_the_precision_of_the_others() -> None:
    logits = outputs(1, 10)
    masked = logits.clone()
    masked[:, 3] = -1e9
    codes, step = quantize(masked, 8)
    back = dequantize(codes, step, 8, C)
    assert (step < 0.5).all()
    loss = trajectory_loss(masked, back, temperature=5.0)
    assert loss < 1e-2
    assert trajectory_loss(masked.roll(1, 0), back, temperature=5.0) > 1


@pytest.mark.parametrize("name", NAMES)
def test_what_has_not_moved_has_no_divergence_and_what_has_moved_has(name: str) -> None:
    index = torch.arange(N)
    history = form(name)
    then, now = outputs(0, rank=6), outputs(1, rank=6)
    for epoch in range(4):  # the low-rank basis has to be found
        put(history, index, epoch, then)
    still = divergence(history, index, 4, then)
    moved = divergence(history, index, 4, now)
    assert moved > 0.1
    assert still < {"int4": 0.02}.get(name, 2e-3) * moved


@pytest.mark.parametrize("name", NAMES)
def test_nearness_to_the_dense_gradient(name: str) -> None:
    """Cosines on outputs of which four fifths lie in eight directions; each form must be as near as least says."""
    least = {
        "dense": 1,
        "mean": 1,
        "half": 0.9999,
        "int8": 0.9998,
        "int6": 0.998,
        "int4": 0.96,
        "topk": 0.5,
        "lowrank": 0.97,
    }
    index = torch.arange(N)
    gradients = {}
    for each in ("dense", name):
        history = form(each)
        for epoch in range(6):
            put(history, index, epoch, outputs(epoch, rank=8) + 0.3 * outputs(50))
        now = (outputs(5, rank=8) * 0.7 + 0.25 * outputs(50)).requires_grad_()
        divergence(history, index, 6, now).backward()
        gradients[each] = now.grad.flatten()
    cosine = torch.cosine_similarity(gradients["dense"], gradients[name], dim=0)
    if name == "mean":  # of all epochs, and so another target
        assert cosine < 0.9
    else:
        assert cosine > least[name] - 1e-5


def test_topk_is_the_divergence_over_k_and_one_outcomes() -> None:
    k, temperature = 4, 3.0
    history = History(TopK(k), N, C, temperature=temperature, lag=1)
    index, then, now = torch.arange(N), outputs(0), outputs(1).double().requires_grad_()
    put(history, index, 0, then)
    ours, past, counts = get(history, index, 1, now)
    assert counts.all()
    assert ours.shape == past.shape == (N, k + 1)
    loss = trajectory_loss(ours, past, temperature=temperature)
    loss.backward()
    expected, slope = 0.0, torch.zeros(N, C, dtype=torch.float64)
    for i in range(N):
        p, q = (oracles.softmax(row[i].tolist(), temperature) for row in (then, now))
        kept = sorted(range(C), key=lambda c: -then[i, c].item())[:k]
        rest = [c for c in range(C) if c not in kept]
        p_rest, q_rest = sum(p[c] for c in rest), sum(q[c] for c in rest)
        expected += sum(p[c] * math.log(p[c] / q[c]) for c in kept) + p_rest * math.log(p_rest / q_rest)
        for c in range(C):
            slope[i, c] = (q[c] - p[c] if c in kept else q[c] - p_rest * q[c] / q_rest) / temperature
    torch.testing.assert_close(loss.item(), temperature**2 / N * expected, rtol=2e-3, atol=0)  # float16
    torch.testing.assert_close(
        now.grad, temperature**2 / N * slope, rtol=0, atol=2e-4 * float(now.grad.abs().max()) * 10
    )


def test_topk_without_the_rest_would_be_another_loss() -> None:
    """The control of the test above: at temperature 5 most of the mass is in the rest."""
    then = outputs(0)
    values, _ = then.topk(4, dim=1)
    weight = (then / 5).softmax(1).topk(4, dim=1).values.sum(1)
    assert weight.mean() < 0.5
    assert values.shape == (N, 4)


@pytest.mark.parametrize("classes", [40_000, 65_536])
def test_topk_numbers_more_classes_than_an_int16_holds(classes: int) -> None:
    history = History(TopK(3), 2, classes, lag=1)
    logits = torch.zeros(2, classes)
    logits[0, [0, 32_768, classes - 1]] = torch.tensor([9.0, 8.0, 7.0])
    logits[1, [32_767, 1, 39_999]] = torch.tensor([9.0, 8.0, 7.0])
    put(history, torch.arange(2), 0, logits)
    torch.testing.assert_close(
        centred(history.codec.decode(history.store.rows[0], 0, logits)), centred(logits), atol=0.05, rtol=0
    )


def test_low_rank_outputs_come_back_whole_and_the_rest_has_the_present_direction_and_the_past_length() -> None:
    rank, index = 8, torch.arange(N)
    history = History(LowRank(rank), N, C, lag=1)
    for epoch in range(5):
        put(history, index, epoch, outputs(epoch, rank=rank))
    then = outputs(4, rank=rank)
    _, past, counts = get(history, index, 5, outputs(7))
    assert counts.all()
    error = (centred(past) - centred(then)).norm() / centred(then).norm()
    assert error < 0.02
    # Now with a part outside of the basis: what is stored is its length.
    outside = centred(outputs(60))
    basis = history.codec.bases[5 % 2]
    outside -= outside @ basis @ basis.T
    put(history, index, 5, outputs(5, rank=rank) + 0.5 * outside)
    present = outputs(6, rank=rank) + 2.0 * outside
    _, past, _ = get(history, index, 6, present)
    expected = outputs(5, rank=rank) + 0.5 * outside
    assert (centred(past) - centred(expected)).norm() / outside.norm() < 0.15
    lost = (outputs(5, rank=rank) - expected).norm() / outside.norm()
    assert lost > 0.45  # the control: without it


def test_low_rank_remembers_nothing_of_the_first_epoch() -> None:
    history, index = History(LowRank(4), N, C, lag=1), torch.arange(N)
    put(history, index, 0, outputs(0))
    assert not get(history, index, 1, outputs(1))[2].any()
    put(history, index, 1, outputs(1))
    assert get(history, index, 2, outputs(2))[2].all()


def test_low_rank_goes_on_after_an_epoch_left_out_and_one_gone_back_to() -> None:
    history, index = History(LowRank(8), N, C, lag=2), torch.arange(N)
    for epoch in (0, 1, 2, 5, 6):
        put(history, index[: N // 2], epoch, outputs(epoch, N // 2, rank=8))
    put(history, index[N // 2 :], 5, outputs(5, rank=8)[N // 2 :])
    _, past, counts = get(history, index, 7, outputs(7))
    assert counts.all()
    wanted = torch.cat([outputs(5, N // 2, rank=8), outputs(5, rank=8)[N // 2 :]])
    assert (centred(past) - centred(wanted)).norm() / centred(wanted).norm() < 0.05


@pytest.mark.parametrize("epoch", [2, 3, 4, 5])
def test_low_rank_centres_by_the_mean_of_the_epoch_before_however_long_ago_that_was(epoch: int) -> None:
    lag, index = 2, torch.arange(N)
    history = History(LowRank(8), N, C, lag=lag)
    for each in (0, 1, epoch):  # in epoch 4 = 1 + lag + 1, the basis takes the place of the one it is made from
        put(history, index, each, outputs(each) + 5 * outputs(90, 1))
    before = outputs(1) + 5 * outputs(90, 1)
    torch.testing.assert_close(history.codec.means[epoch % (lag + 1)], centred(before).mean(dim=0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["dense", "half", "int8"])
def test_mean_is_temporal_ensembling(momentum: float, name: str) -> None:
    """Against Laine & Aila's own form, Z <- momentum Z + (1 - momentum) z, divided by 1 - momentum^t."""
    history = make_history(name, N, C, lag=None, temperature=5.0, momentum=momentum)
    assert history.store.rows.shape[0] == 1
    index, total = torch.arange(N), torch.zeros(N, C, dtype=torch.float64)
    for epoch in range(6):
        logits = outputs(epoch)
        if epoch > 0:
            _, past, counts = get(history, index, epoch, logits)
            assert counts.all()
            expected = total / (1 - momentum**epoch)
            tolerance = {"dense": 1e-4, "half": 0.02, "int8": 0.3}[name]
            torch.testing.assert_close(centred(past.double()), centred(expected), atol=tolerance, rtol=0)
        put(history, index, epoch, logits)
        total = momentum * total + (1 - momentum) * logits


def test_a_sample_goes_into_the_mean_once_an_epoch() -> None:
    histories = [make_history("mean", N, C, lag=None, temperature=5.0) for _ in range(2)]
    for epoch in range(3):
        logits = outputs(epoch, 2)
        for history in histories:
            put(history, torch.tensor([1, 2]), epoch, logits)
        put(histories[1], torch.tensor([2, 1, 1]), epoch, outputs(70, 3))  # again: left out
    put(histories[0], torch.tensor([3]), 2, outputs(5, 1))
    put(histories[1], torch.tensor([3, 3]), 2, torch.cat([outputs(5, 1), outputs(6, 1)]))  # the first counts
    assert torch.equal(histories[0].store.rows, histories[1].store.rows)


def test_an_output_that_is_not_finite_leaves_the_mean_as_it_was() -> None:
    history, index = make_history("mean", N, C, lag=None, temperature=5.0), torch.arange(2)
    put(history, index, 0, outputs(0, 2))
    before = history.store.rows.clone()
    put(history, index, 1, torch.full((2, C), torch.nan))
    assert torch.equal(history.store.rows, before)
    assert get(history, index, 2, outputs(1, 2))[2].all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_not_remembered_and_spoil_no_other(name: str, value: float) -> None:
    index, kept = torch.arange(N), torch.arange(N) != 4
    histories = [form(name), form(name)]
    for epoch in range(3):
        logits = outputs(epoch, rank=6)
        put(histories[0], index[kept], epoch, logits[kept])
        logits[4, 7] = value
        put(histories[1], index, epoch, logits)
    _, clean, _ = get(histories[0], index, 3, outputs(3))
    _, past, counts = get(histories[1], index, 3, outputs(3))
    assert counts.tolist() == kept.tolist()
    assert past.isfinite().all()
    tolerance = {"atol": 0.2, "rtol": 0.0} if name == "lowrank" else {}  # a code may be rounded otherwise
    torch.testing.assert_close(past[kept], clean[kept], **tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_floating_dtype_is_taken(name: str, dtype: torch.dtype) -> None:
    index = torch.arange(N)
    histories = [form(name), form(name)]
    for epoch in range(3):
        logits = outputs(epoch, rank=6).to(dtype)
        put(histories[0], index, epoch, logits)
        put(histories[1], index, epoch, logits.float())
    now = outputs(3, rank=6).to(dtype).requires_grad_()
    loss = divergence(histories[0], index, 3, now)
    loss.backward()
    torch.testing.assert_close(
        loss.float(), divergence(histories[1], index, 3, now.detach().float()), rtol=1e-3, atol=1e-4
    )
    assert now.grad.dtype == dtype
    assert now.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    index = torch.arange(N)
    logits = [outputs(epoch, rank=6) for epoch in range(4)]
    histories = [form(name), form(name)]
    results = []
    for history, enabled in zip(histories, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for epoch in range(3):
                put(history, index, epoch, logits[epoch])
            results.append(divergence(history, index, 3, logits[3]))
    assert torch.equal(histories[0].store.rows, histories[1].store.rows)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name: str) -> None:
    history, index = form(name), torch.arange(4)
    logits = torch.zeros(4, C)
    logits[0, 0], logits[1] = 3e38, -3e38
    logits[2, :2] = torch.tensor([3e38, -3e38])
    for epoch in range(3):
        put(history, index, epoch, logits)
    now = outputs(0, 4).requires_grad_()
    loss = divergence(history, index, 3, now)
    loss.backward()
    assert loss.isfinite()
    assert now.grad.isfinite().all()


SIZES = {"dense": 4 * 1000, "half": 2 * 1000, "int8": 1002, "int6": 752, "int4": 502, "topk": 98, "lowrank": 96}


@pytest.mark.parametrize("name", SIZES)
def test_bytes_are_as_documented(name: str) -> None:
    history = make_history(name, 50, 1000, lag=3, temperature=5.0)
    assert history.row_bytes == SIZES[name]
    books = 4 * (4 * 1000 * 93 + 1000 * 93 + 1) + 8 * 5 if name == "lowrank" else 0
    assert history.nbytes == 3 * 50 * (SIZES[name] + 4) + books
    held = sum(buffer.untyped_storage().nbytes() for buffer in history.buffers())
    assert held == history.nbytes


def test_compact_forms_meet_their_goals() -> None:
    """ImageNet-1k in 400 MB, ImageNet-21k in 5 GB, and a near-lossless form in a quarter: here by arithmetic."""
    lowrank = SIZES["lowrank"] + 4
    assert 3 * 1_281_167 * lowrank + 4 * 1000 * 93 * 5 < 400e6
    assert 3 * 14_197_122 * lowrank + 4 * 21_841 * 93 * 5 < 5e9
    assert SIZES["int6"] + 4 <= (SIZES["dense"] + 4) / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": "sparse"}, "unknown history 'sparse'.*dense"),
        ({"history": "topk"}, "k=24 and num_classes=10: k must be less"),
        ({"history": "lowrank"}, "rank=92 must be less than the number of classes, 10"),
        (
            {"history": "topk", "momentum": 0.9, "num_classes": 1000},
            "momentum=0.9 and TopK exclude each other",
        ),
        ({"history": "mean", "lag": 7}, "lag=7 and momentum=0.9 exclude each other"),
        ({"history": "int6", "momentum": 0.9}, "momentum=0.9 and bits=6 exclude each other.*take 8"),
        ({"history": "auto", "path": "/tmp"}, "path='/tmp' and history='auto' exclude each other"),
        ({"history": "mean", "momentum": 1.0}, "momentum must be a finite number >= 0 and < 1, got 1.0"),
        ({"history": 3}, "history must be a name or"),
        ({"history": Dense}, "history must be a name or a codec, such as .*got <class"),
        (
            {"history": History(Dense(), 9, 10)},
            r"history must be .* a codec, such as .*LowRank\(rank=64\), got Hist",
        ),
        ({"history": History(TopK(2), 9, 10).codec}, r"this TopK belongs to another history: make a new one, TopK\("),
        ({"history": TopK(2), "momentum": 0.9}, "momentum=0.9 and TopK exclude each other.*'dense', 'half' or 'int8'"),
        ({"history": LowRank(2), "momentum": 0.9}, "momentum=0.9 and LowRank exclude each other"),
        ({"history": Quantized(4), "momentum": 0.5}, "momentum=0.5 and bits=4 exclude each other"),
        ({"history": Dense(), "momentum": 0.5, "lag": 3}, "lag=3 and momentum=0.5 exclude each other"),
        ({"history": "dense", "location": "disk"}, "unknown location 'disk'"),
        ({"history": "dense", "sharing": "no"}, "unknown sharing 'no'"),
    ],
)
def test_what_does_not_fit_is_explained(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.SAF(**{"num_samples": 9, "num_classes": 10, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantized(bits=8.0), "bits must be 8, 6 or 4, got 8.0"),
        (lambda: History(LowRank(), 9, "100"), "num_classes must be an integer"),
        (lambda: History(TopK(), 9, None), "num_classes must be an integer"),
        (lambda: History(Dense(torch.bfloat16), 9, 10, momentum=0.9), "momentum=0.9 and dtype=torch.bfloat16"),
        (lambda: Quantized(bits=5), "bits must be 8, 6 or 4, got 5"),
        (lambda: Dense(dtype=torch.int32), "dtype must be one of .*float16.*, got torch.int32"),
        (lambda: History(TopK(k=10), 9, 10), "k=10 and num_classes=10"),
        (lambda: History(TopK(), 9, 70_000), "num_classes=70000: .*at most 65536"),
        (lambda: TopK(k=0), "k must be"),
        (lambda: History(LowRank(rank=10), 9, 10), "rank=10 must be less"),
        (lambda: History(Dense(), 9, 10, location="disk"), "unknown location 'disk'"),
        (lambda: History(Dense(), 9, 10, sharing="no"), "unknown sharing 'no'"),
        (lambda: History("dense", 9, 10), "codec must be one of flatmin.history, such as .*got 'dense'"),
        (lambda: History(Dense, 9, 10), "codec must be one of flatmin.history, such as .*got <class"),
        (lambda: History(Dense(), 0, 10), "num_samples must be an integer of at least 1, got 0"),
        (lambda: History(Dense(), 9, 10, lag=0), "lag must be an integer of at least 1, got 0"),
        (lambda: History(Dense(), 9, 10, lag=7, momentum=0.9), "lag=7 and momentum=0.9 exclude each other"),
        (lambda: History(Dense(), 9, 10, lag=3, momentum=0.9), "lag=3 and momentum=0.9 exclude each other"),
        (lambda: History(Dense(), 9, 10, temperature=0.0), "temperature must be .* > 0, got 0.0"),
        (lambda: History(Dense(), 10**9, 10**6), "needs 12000000.0 GB and this machine has .*: take a smaller form"),
    ],
)
def test_bad_arguments_are_explained(make, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("codec", "row_bytes", "printed"),
    [
        (Dense(torch.bfloat16), 20, "Dense(dtype=bfloat16)"),
        (Quantized(4), 7, "Quantized(bits=4)"),
        (TopK(3), 14, "TopK(k=3)"),
        (LowRank(5), 9, "LowRank(rank=5)"),
    ],
)
def test_one_codec_serves_many_histories_which_share_nothing(codec: Codec, row_bytes: int, printed: str) -> None:
    safs = [flatmin.SAF(9, 10, lag=lag, start_epoch=0, history=codec) for lag in (1, 1, 2)]
    assert [saf.lag for saf in safs] == [1, 1, 2]
    assert [saf.history.row_bytes for saf in safs] == [row_bytes] * 3
    assert repr(codec) == printed
    assert not codec.is_bound
    assert not codec.state_dict()
    untouched = [tensor.clone() for tensor in safs[1].history.buffers()]
    storages = [{buffer.untyped_storage().data_ptr() for buffer in saf.history.buffers()} for saf in safs]
    assert not storages[0] & storages[1]
    for epoch in range(3):
        safs[0].set_epoch(epoch)
        safs[0](live(outputs(epoch, 9, 10)), torch.arange(9))
    assert all(torch.equal(a, b) for a, b in zip(untouched, safs[1].history.buffers(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(untouched, safs[0].history.buffers(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_an_exchange_recalls_and_then_records(name: str) -> None:
    together, apart, index = form(name), form(name), torch.tensor([3, 5, 3, 8])
    for epoch in range(5):
        logits = outputs(epoch, 4)
        expected = get(apart, index, epoch, logits)
        put(apart, index, epoch, logits)
        exchanged = together.exchange(index, logits, epoch)
        for ours, theirs in zip(exchanged, expected, strict=True):
            assert torch.equal(ours, theirs)
        assert all(torch.equal(a, b) for a, b in zip(together.buffers(), apart.buffers(), strict=True))
    assert expected[2].tolist() == [True, True, False, True]


def test_recalling_changes_nothing() -> None:
    history, index = form("dense"), torch.arange(N)
    put(history, index, 0, outputs(0))
    before = [buffer.clone() for buffer in history.buffers()]
    assert get(history, index, 1, outputs(1))[2].all()
    assert get(history, index, 1, outputs(1))[2].all()
    assert all(torch.equal(a, b) for a, b in zip(before, history.buffers(), strict=True))


class Signs(Codec):
    """A codec by a stranger: one byte a class, 1 for a positive logit."""

    def prepare(self) -> int:
        return self.num_classes

    def encode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return (logits > 0).to(torch.uint8), logits.isfinite().all(dim=1)

    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        return rows.float()

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return logits, self.decode(rows, epoch, logits)

    def describe(self) -> dict:
        return {}


def test_a_codec_of_ones_own_works_in_saf() -> None:
    saf = flatmin.SAF(3, 2, lag=1, start_epoch=0, history=Signs())
    logits, index = torch.tensor([[1.0, -1.0], [torch.nan, 0.0]]), torch.tensor([2, 0])
    assert saf(live(logits), index) == 0
    saf.set_epoch(1)
    expected = 0.3 * trajectory_loss(logits[:1], torch.tensor([[1.0, 0.0]]), temperature=5.0) / 2
    assert saf(live(logits), index) == expected > 0


@pytest.mark.parametrize("name", ["half", "int8"])
def test_a_mean_follows_outputs_that_drift_slowly(name: str) -> None:
    """Rounding must not hold it: a change of the mean is a tenth of that of the outputs."""
    start, drift = outputs(0), outputs(1)
    exact, rounded = (make_history(each, N, C, lag=None, temperature=5.0, momentum=0.9) for each in ("dense", name))
    index = torch.arange(N)
    for epoch in range(60):
        for history in (exact, rounded):
            put(history, index, epoch, start + drift * min(epoch / 30, 1))
    means = [centred(get(history, index, 60, start)[1]) for history in (exact, rounded)]
    assert (means[1] - means[0]).norm() / means[0].norm() < 0.06
    assert (means[0] - centred(start)).norm() / means[0].norm() > 0.5


def test_a_class_that_was_out_of_range_once_comes_back_into_a_mean() -> None:
    history, index = make_history("int8", 1, 4, lag=None, temperature=5.0, momentum=0.5), torch.arange(1)
    put(history, index, 0, torch.tensor([[0.0, 1.0, 2.0, -200.0]]))
    for epoch in range(1, 16):
        put(history, index, epoch, torch.tensor([[0.0, 1.0, 2.0, 2.0]]))
    _, past, _ = get(history, index, 16, torch.zeros(1, 4))
    torch.testing.assert_close(centred(past), centred(torch.tensor([[0.0, 1.0, 2.0, 2.0]])), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["int8", "int6", "int4"])
def test_rows_of_a_small_range_are_as_exact_as_others(name: str) -> None:
    history, index = form(name), torch.arange(N)
    logits = 1e-3 * outputs(0)
    put(history, index, 0, logits)
    _, past, _ = get(history, index, 1, logits)
    span = logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)
    assert ((centred(past) - centred(logits)) / span).abs().max() < 1.2 / (2 ** int(name[3:]) - 1)


def test_nothing_is_recalled_before_there_was_anything() -> None:
    history, index = History(Dense(), N, C, lag=3), torch.arange(N)
    for epoch in range(3):
        assert not get(history, index, epoch, outputs(0))[2].any()
        put(history, index, epoch, outputs(epoch))
    assert get(history, index, 3, outputs(0))[2].all()


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_an_epoch_that_shows_next_to_nothing_does_not_turn_the_basis(value: float) -> None:
    history, index = History(LowRank(8), N, C, lag=1), torch.arange(N)
    for epoch in range(5):
        put(history, index, epoch, outputs(epoch, rank=8))
    put(history, index[:2], 5, value * outputs(5, 2, rank=8))
    put(history, index, 6, outputs(6, rank=8))
    _, past, counts = get(history, index, 7, outputs(9))
    assert counts.all()
    assert (centred(past) - centred(outputs(6, rank=8))).norm() / centred(outputs(6, rank=8)).norm() < 0.05

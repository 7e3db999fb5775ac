"""A history whose data set has grown: it loads the state of fewer samples, and the new ones begin without a past."""

import copy
import io
from pathlib import Path

import pytest
import torch

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.history import make_history
from flatmin.history._state import PART
from tests.history.test_store import FORMS, LAG, C, N, assert_same, every_form, follow, held, make, steps

MORE = 11


def longer(form: str, **options: object) -> flatmin.SAF:
    return flatmin.SAF(N + MORE, C, start_epoch=0, **{"grown": True, **FORMS[form], **options})


def saved(saf: flatmin.SAF) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(saf.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_form
@pytest.mark.parametrize("place", ["memory", "file", "host"])
def test_the_old_samples_go_on_bitwise(form: str, place: str, tmp_path: Path) -> None:
    small = make(form)
    options = {"memory": {}, "file": {"path": tmp_path}, "host": {"location": "host"}}[place]
    large = longer(form, **options)
    follow(small, steps(*range(LAG + 1)))
    state = saved(small)
    assert large.load_state_dict(state)
    assert len(state["history.store.epochs"][0]) == N  # what was given is as it was
    rest = steps(LAG + 1, LAG + 2)
    expected = follow(small, rest)
    assert sum(float(loss) > 0 for loss in expected[::2]) > 4
    assert_same(expected, follow(large, rest))


@every_form
def test_the_new_samples_have_no_past_until_they_have(form: str) -> None:
    small, large = make(form), longer(form)
    epochs = range(LAG + 2)
    follow(small, steps(*epochs))
    large.load_state_dict(saved(small))
    new = torch.arange(N, N + MORE)
    compared = []
    for epoch in range(LAG + 2, 2 * LAG + 5):
        _, _, mask = large.history.exchange(new, 3 * torch.randn(MORE, C), epoch)
        compared.append(bool(mask.any()))
        assert mask.all() == mask.any()
    lag = large.lag
    assert compared == [False] * lag + [True] * (len(compared) - lag)


@every_form
def test_without_grown_it_is_refused_and_nothing_is_loaded(form: str) -> None:
    small, large = make(form), longer(form, grown=False)
    follow(small, steps(0))
    before = held(large)
    with pytest.raises(InvalidArgumentError, match=r"num_samples=30 and .* num_samples=41.*nothing was.*grown=True"):
        large.load_state_dict(saved(small))
    assert_same(list(before.values()), list(held(large).values()))


@pytest.mark.parametrize("other", [{"lag": LAG + 1}, {"history": "half"}, {"history": "int8"}])
def test_all_else_has_to_be_the_same(other: dict[str, object]) -> None:
    large = longer("dense", **other)
    with pytest.raises(InvalidArgumentError, match="nothing was loaded, make SAF as it was") as error:
        large.load_state_dict(make("dense").state_dict())
    assert "grown=True" not in str(error.value)


def test_a_history_does_not_shrink_and_equal_ones_load_as_ever() -> None:
    large, small = longer("dense"), make("dense", grown=True)
    with pytest.raises(InvalidArgumentError, match="num_samples=41 and this one has num_samples=30") as error:
        small.load_state_dict(large.state_dict())
    assert "grown=True" not in str(error.value)
    follow(large, steps(0, 1))
    again = longer("dense")
    again.load_state_dict(large.state_dict())
    assert_same(list(held(large).values()), list(held(again).values()))


def test_it_comes_with_an_optimizer_and_inside_of_a_module() -> None:
    small, large = make("dense"), longer("dense")
    follow(small, steps(0, 1, 2))
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2)]
    small.attach(optimizers[0])
    large.attach(optimizers[1])
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    nested = torch.nn.ModuleDict({"history": make_history("dense", N + MORE, C, lag=LAG, grown=True)})
    nested.load_state_dict({f"history.{name}": value for name, value in small.history.state_dict().items()})
    for history in (large.history, nested["history"]):
        assert torch.equal(history.store.rows[:, :N], small.history.store.rows)
        assert history.store.epochs[:, N:].eq(-1).all()


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_has_its_own_of_the_new_samples_too(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of the large one, from a whole state and from the same rank's share, are those of the whole."""
    small, whole = make("dense"), longer("dense")
    follow(small, steps(0, 1, 2))
    state = saved(small)
    whole.load_state_dict(state)
    for rank in range(ranks):
        own = {name: value.clone() for name, value in state.items()}
        for name in ("history.store.rows", "history.store.epochs"):
            own[name] = own[name][:, rank::ranks]
        own[f"history.store.{PART}"] = torch.tensor([rank, ranks])
        monkeypatch.setattr("flatmin._distributed.size", lambda: ranks)
        monkeypatch.setattr("flatmin._distributed.rank", lambda rank=rank: rank)
        for given in (state, own):
            shard = longer("dense", sharing="shard")
            shard.load_state_dict(given)
            assert torch.equal(shard.history.store.rows, whole.history.store.rows[:, rank::ranks])
            assert torch.equal(shard.history.store.epochs, whole.history.store.epochs[:, rank::ranks])
        monkeypatch.undo()


def test_another_ranks_share_leaves_the_rest_empty_and_says_so() -> None:
    small, large = make("dense"), longer("dense")
    follow(small, steps(0, 1, 2))
    own = saved(small)
    for name in ("history.store.rows", "history.store.epochs"):
        own[name] = own[name][:, 1::2]
    own[f"history.store.{PART}"] = torch.tensor([1, 2])
    with pytest.warns(FlatminWarning, match="rank 1 of 2 alone"):
        large.load_state_dict(own)
    assert torch.equal(large.history.store.rows[:, 1:N:2], small.history.store.rows[:, 1::2])
    assert large.history.store.epochs[:, ::2].eq(-1).all()


def test_the_state_of_an_average_has_none_of_the_old_samples_and_says_so() -> None:
    network = torch.nn.Linear(2, 2)
    network.saf = make("dense")
    average = torch.optim.swa_utils.AveragedModel(network)
    large = longer("dense")
    with pytest.warns(FlatminWarning, match="an average, which has none: 41 of the 41 samples here begin anew"):
        large.load_state_dict(average.module.saf.state_dict())
    assert large.history.store.epochs.eq(-1).all()

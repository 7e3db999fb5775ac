"""What makes MESA cheaper: a share of the batch, an interval, lower precision, and an average that is there anyway."""

import collections
import copy
import gc
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flatmin
from flatmin.averages import WeightAverage
from flatmin.errors import InvalidArgumentError

C = 3


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, C))


def mesa_of(model: nn.Module, **arguments) -> flatmin.MESA:
    return flatmin.MESA(model, **{"start_epoch": 0, "decay": 0.9, **arguments})


def batch(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def watched(mesa: flatmin.MESA) -> list[torch.Tensor]:
    """The inputs that the averaged network is called with, as they come."""
    seen: list[torch.Tensor] = []
    mesa.average.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def moved(mesa: flatmin.MESA) -> None:
    """Takes the average away from the model, so that there is a loss."""
    with torch.no_grad():
        for parameter in mesa.average.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))


class Recurrent(nn.Module):
    """Takes sequences, and a hidden state if it is given one."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(4, 8, batch_first=batch_first), nn.Linear(8, C)

    def forward(self, x, hidden=None):
        return self.head(self.body(x, hidden)[1][-1])


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.EmbeddingBag(9, 8), nn.Linear(8, C)

    def forward(self, text, offsets):
        return self.head(self.body(text, offsets))


PARTLY = {
    "time first": lambda: (Recurrent(batch_first=False), (torch.randn(5, 8, 4),)),
    "hidden state": lambda: (Recurrent(batch_first=True), (torch.randn(8, 5, 4), torch.zeros(1, 8, 8))),
    "offsets": lambda: (Bags(), (torch.arange(24) % 9, torch.arange(0, 24, 3))),
}


class TestFraction:
    def test_all_shares_are_drawn_alike_and_their_mean_gradient_is_the_full_one(self):
        model, x = nn.Linear(4, C).double(), batch(5, torch.float64)
        whole, part = mesa_of(model), mesa_of(model, fraction=0.4)
        moved(whole), moved(part)
        part.average.n_averaged += 1  # or MESA would say, after so many calls, that nobody updates it
        seen, draws = watched(part), 2000
        logits = model(x).detach().requires_grad_()
        gradients, counts = {}, collections.Counter()
        for _ in range(draws):
            (gradient,) = torch.autograd.grad(part(logits, x), logits)
            share = tuple(sorted(next(i for i in range(5) if torch.equal(x[i], row)) for row in seen[-1]))
            gradients[share] = gradient
            counts[share] += 1
        assert sorted(counts) == list(itertools.combinations(range(5), 2))
        assert all(count == pytest.approx(draws / 10, abs=5 * (draws * 0.09) ** 0.5) for count in counts.values())
        (full,) = torch.autograd.grad(whole(logits, x), logits)
        torch.testing.assert_close(sum(gradients.values()) / 10, full, rtol=1e-12, atol=1e-15)
        assert all(int((gradient != 0).any(dim=1).sum()) == 2 for gradient in gradients.values())

    @pytest.mark.parametrize(
        ("size", "fraction", "run"),
        [(8, 0.25, 2), (8, 0.3, 2), (7, 0.5, 4), (8, 0.01, 1), (1, 0.01, 1), (1, 0.5, 1), (8, 0.99, 8), (8, 1.0, 8)],
    )
    def test_average_is_run_on_that_many_samples(self, size, fraction, run):
        model, x = nn.Linear(4, C), batch(size)
        mesa = mesa_of(model, fraction=fraction)
        moved(mesa)
        seen = watched(mesa)
        assert mesa(model(x), x) > 0
        assert [len(inputs) for inputs in seen] == [run]
        assert len({tuple(row.tolist()) for row in seen[0]}) == run  # none twice

    @pytest.mark.parametrize("kind", PARTLY)
    def test_inputs_of_which_no_share_can_be_taken_are_explained(self, kind):
        torch.manual_seed(0)  # or the first bag may be drawn first, whose text begins where it should
        model, inputs = PARTLY[kind]()
        assert mesa_of(model)(model(*inputs), *inputs) == 0
        with pytest.raises(InvalidArgumentError, match=r"fraction of.*first dimension is the batch's, 8; leave out"):
            mesa_of(model, fraction=0.25)(model(*inputs), *inputs)

    def test_the_empty_batch_is_no_error(self):
        mesa = mesa_of(model := nn.Linear(4, C), fraction=0.5)
        assert mesa(model(batch(0)), batch(0)) == 0

    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    def test_only_a_share_is_drawn_and_copied(self, fraction, monkeypatch):
        mesa, x = mesa_of(model := nn.Linear(4, C), fraction=fraction), batch(8)
        seen, drawn, randperm = watched(mesa), [], torch.randperm
        monkeypatch.setattr(torch, "randperm", lambda *a, **k: drawn.append(1) or randperm(*a, **k))
        mesa(model(x), x)
        assert (seen[0] is x) == (not drawn) == (fraction == 1)

    def test_global_random_state_is_untouched(self):
        mesa, x = mesa_of(model := nn.Linear(4, C), fraction=0.5), batch(8)
        before = torch.get_rng_state()
        mesa(model(x), x)
        assert torch.equal(torch.get_rng_state(), before)

    def test_shares_follow_the_seed_and_differ_from_call_to_call(self):
        x, shares = batch(8), []
        for seed in (7, 7, 8):
            model = nn.Linear(4, C)
            torch.manual_seed(seed)
            mesa = mesa_of(model, fraction=0.5)
            seen = watched(mesa)
            for _ in range(6):
                mesa(model(x), x)
            shares.append(torch.stack(seen))
        assert torch.equal(shares[0], shares[1])
        assert not torch.equal(shares[0], shares[2])
        assert len({tuple(share.flatten().tolist()) for share in shares[0]}) > 3

    @pytest.mark.parametrize("kind", ["kept", "older", "lost"])
    def test_resume_is_bitwise_neutral(self, kind):
        x, y = batch(16), torch.arange(16) % C

        def train(model: nn.Module, mesa: flatmin.MESA) -> torch.Tensor:
            optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
            torch.manual_seed(5)
            for _ in range(5):
                optimizer.zero_grad()
                logits = model(x)
                losses.append(F.cross_entropy(logits, y) + mesa(logits, x))
                losses[-1].backward()
                optimizer.step()
                mesa.update()
            return torch.stack(losses).detach()

        model = network()
        mesa = mesa_of(model, fraction=0.3, interval=2)
        train(model, mesa)
        saved = copy.deepcopy(mesa.state_dict())
        twin = network()
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(99)
        resumed = mesa_of(twin, fraction=0.3, interval=2)
        if kind == "older":
            saved["_extra_state"] = saved["_extra_state"][:1]
        if kind == "lost":
            del saved["_extra_state"]
        assert saved["average.n_averaged"] == 6
        resumed.load_state_dict(saved, strict=kind != "lost")
        assert torch.equal(train(model, mesa), train(twin, resumed)) == (kind == "kept")

    def test_tensors_of_the_batch_are_shared_out_wherever_they_are(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, C)

            def forward(self, x, pair, *, mask, shift, names, scale=1.0):
                assert len(names) == 8  # no tensor
                assert shift.shape == (C,)
                output = self.layer(x * mask) * scale + shift + pair[0]["more"]
                return type("Output", (), {"logits": output})()

        model, x = Net(), batch(8).requires_grad_()
        arguments = {"mask": x.detach() > 0, "shift": torch.ones(C), "names": list("abcdefgh"), "scale": 2.0}
        pair = ({"more": torch.rand(8, C)}, torch.tensor(8))
        mesa = mesa_of(model, fraction=0.5)
        seen = watched(mesa)
        logits = model(x, pair, **arguments).logits
        assert mesa(logits, x, pair, **arguments) == 0  # the average is still the model, so its logits are the same
        assert len(seen[0]) == 4
        assert not seen[0].requires_grad
        arguments["mask"] = ~arguments["mask"]
        assert mesa(logits, x, pair, **arguments) > 0

    def test_images_stay_channels_last(self):
        mesa = mesa_of(model := nn.Sequential(nn.Conv2d(3, C, 4), nn.Flatten()), fraction=0.5)
        seen, x = watched(mesa), torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)
        mesa(model(x), x)
        assert seen[0].is_contiguous(memory_format=torch.channels_last)

    def test_an_average_that_answers_for_another_batch_is_explained(self):
        mesa = mesa_of(model := nn.Linear(4, C), fraction=0.5)
        with pytest.raises(InvalidArgumentError, match=r"returned \(6, 3\) where logits of shape \(4, 3\)"):
            mesa(model(batch(8)), batch(6))


class TestInterval:
    def test_average_runs_in_every_third_call_that_counts(self):
        mesa, x = mesa_of(model := network(), interval=3, start_epoch=1), batch(8)
        moved(mesa)
        seen, losses = watched(mesa), []
        mesa(model(x), x)  # before start_epoch: not counted
        mesa.set_epoch(1)
        for call in range(7):
            mesa.eval()(model(x), x), mesa.train()  # nor is this
            losses.append(mesa(model(x), x))
            assert len(seen) == call // 3 + 1
        assert [bool(loss > 0) for loss in losses] == [True, False, False] * 2 + [True]
        assert losses[1].dtype == torch.float32

    def test_the_loss_is_not_rescaled(self):
        model, x = nn.Linear(4, C), batch(8)
        losses = []
        for interval in (1, 4):
            mesa = mesa_of(model, interval=interval)
            moved(mesa)
            losses.append(mesa(model(x), x))
        assert losses[0] == losses[1] > 0


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, None])
    @pytest.mark.parametrize("around", [torch.bfloat16, None])
    def test_average_runs_in_the_precision_given_or_else_in_the_callers(self, dtype, around):
        mesa, x = mesa_of(model := nn.Linear(4, C), autocast=dtype), batch(8)
        moved(mesa)
        outputs = []
        mesa.average.register_forward_hook(lambda *arguments: outputs.append(arguments[-1].dtype))
        with torch.autocast("cpu", around, enabled=around is not None):
            logits = model(x)
            loss = mesa(logits, x)
            assert model(x).dtype == logits.dtype == (around or torch.float32)
        assert outputs == [dtype or around or torch.float32]
        assert loss.dtype == torch.float32
        full = mesa_of(model, decay=None, average=mesa.average)
        assert loss.item() == pytest.approx(full(model(x), x).item(), rel=0.05)


class Ema(nn.Module):
    """An average by a stranger, in the form of timm's ``ModelEmaV3``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


AVERAGES = {
    "AveragedModel": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "EMA": lambda model: flatmin.EMA(model, decay=0.9),
    "SwitchEMA": lambda model: flatmin.SwitchEMA(model, decay=0.9),
    "LAWA": lambda model: flatmin.LAWA(model, k=2),
    "ModelEmaV3": Ema,
    "module": copy.deepcopy,
    "compiled": lambda model: torch.compile(copy.deepcopy(model), backend="eager"),
}


class TestSharing:
    @pytest.mark.parametrize("kind", AVERAGES)
    def test_shared_average_gives_the_loss_of_an_own_one(self, kind):
        model, x = network(), batch(16)
        own, average = mesa_of(model), AVERAGES[kind](model)
        shared = mesa_of(model, decay=None, average=average)
        moved(own), moved(shared)
        average.train()
        modes, before = [], copy.deepcopy(average.state_dict())
        training = [module.training for module in average.modules()]
        inner = average if kind in ("module", "compiled") else average.module
        assert inner.training == (not isinstance(average, WeightAverage))  # flatmin's stay in evaluation mode
        inner.register_forward_hook(lambda net, *_: modes.append((net.training, torch.is_grad_enabled())))
        logits = model(x)
        assert shared(logits, x) == own(logits, x) > 0
        assert modes == [(False, False)]
        assert [module.training for module in average.modules()] == training
        after = average.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert shared.average is average

    def test_modes_are_put_back_one_by_one_also_after_an_error(self):
        model, average = network(), network()
        average[1].eval()
        modes = [module.training for module in average.modules()]
        with pytest.raises(RuntimeError, match="shape"):
            mesa_of(model, decay=None, average=average)(torch.zeros(2, C, requires_grad=True), torch.zeros(2, 9))
        assert [module.training for module in average.modules()] == modes

    def test_owners_updates_are_followed(self):
        model, x = network(), batch(8)
        average = AVERAGES["AveragedModel"](model)
        mesa = mesa_of(model.eval(), decay=None, average=average)
        average.update_parameters(model)
        assert mesa(model(x), x) == 0
        with torch.no_grad():
            model[4].weight *= 3
        first = mesa(model(x), x)
        average.update_parameters(model)
        assert first > mesa(model(x), x) > 0

    def test_training_with_a_given_ema_is_training_with_an_own_one(self):
        results = []
        for given in (True, False):
            model, x, y = network(), batch(16), torch.arange(16) % C
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            ema = flatmin.EMA(model, decay=0.9) if given else None
            mesa = mesa_of(model, decay=None, average=ema) if given else mesa_of(model)
            (ema if given else mesa).attach(optimizer)
            torch.manual_seed(3)
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                logits = model(x)
                losses.append(F.cross_entropy(logits, y) + mesa(logits, x))
                losses[-1].backward()
                optimizer.step()
            assert mesa.average.n_averaged == 6
            assert (mesa.decay is None) == given
            results.append([*torch.stack(losses).detach(), *mesa.average.module.state_dict().values()])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))

    def test_nothing_is_copied_saved_or_moved(self):
        model = nn.Linear(1000, 100)
        average = AveragedModel(model)
        before = count(400_000)
        mesa = mesa_of(model, decay=None, average=average)
        assert count(400_000) == before == 2
        assert set(mesa.state_dict()) == {"_extra_state"}
        assert not list(mesa.parameters())
        mesa.double().train()
        assert average.module.weight.dtype == torch.float32
        assert count(400_000, mesa_of(model)) == before + 1

    def test_update_and_attach_say_that_the_owner_updates(self):
        model = network()
        mesa = mesa_of(model, decay=None, average=copy.deepcopy(model))
        with pytest.raises(InvalidArgumentError, match="whoever owns it updates it"):
            mesa.update()
        with pytest.raises(InvalidArgumentError, match="whoever owns it updates it"):
            mesa.attach(torch.optim.SGD(model.parameters(), lr=0.1))

    def test_epochs_without_update_are_the_owners_affair(self):
        model, x = network(), batch(8)
        mesa = mesa_of(model, decay=None, average=AveragedModel(model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for epoch in range(3):
                mesa.set_epoch(epoch)
                mesa(model(x), x)
        assert caught == []

    def test_a_module_of_that_name_in_the_network_itself_does_not_confuse(self):
        model = nn.Sequential(collections.OrderedDict(module=nn.Linear(4, C), last=nn.Linear(C, C)))
        for average in (copy.deepcopy(model), AveragedModel(model)):
            assert mesa_of(model, decay=None, average=average)(model(batch(8)), batch(8)) == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"average": flatmin.EMA(network(9))}, r"'0.weight' is \(9, 4\) in it and \(8, 4\) in model"),
            ({"average": network(), "decay": 0.9}, "^decay must be left out where average is given, got 0.9"),
            ({"average": network(9)}, r"^average .*'0.weight' is \(9, 4\) in it and \(8, 4\) in model"),
            ({"average": AveragedModel(network(9))}, "^average must have the parameters of model"),
            ({"average": nn.Linear(4, C)}, "'0.weight' is missing in it"),
            ({"average": network()[:4]}, "'4.weight' is missing in it"),
            ({"average": nn.Sequential(*network(), nn.Linear(2, 2))}, r"'5.weight' is \(2, 2\) in it and missing in"),
            ({"average": [1]}, r"^average must be a module .*got \[1\]"),
        ],
    )
    def test_bad_average_is_explained(self, arguments, message):
        with pytest.raises(InvalidArgumentError, match=message):
            flatmin.MESA(network(), **arguments)

    def test_the_model_is_no_average_of_itself(self):
        model = network()
        with pytest.raises(InvalidArgumentError, match="got model itself"):
            flatmin.MESA(model, average=model)

    def test_a_model_that_cannot_be_copied_is_explained(self):
        class Fixed(nn.Linear):
            def __deepcopy__(self, memo):
                raise AssertionError("FSDP does not support deepcopy")

        with pytest.raises(InvalidArgumentError, match=r"^model cannot be copied \(FSDP.*fully_shard.*give MESA an av"):
            flatmin.MESA(Fixed(4, C))
        for make in (flatmin.EMA, flatmin.SwitchEMA, flatmin.LAWA):
            with pytest.raises(InvalidArgumentError, match=r"^model cannot be copied \(FSDP.*fully_shard") as error:
                make(Fixed(4, C))
            assert "average=" not in str(error.value)  # which these do not have
            assert "MESA" not in str(error.value)


def count(nbytes: int, *alive: object) -> int:
    """How many tensors of that size there are."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.nbytes == nbytes]
    return len({t.untyped_storage().data_ptr() for t in tensors})


@pytest.mark.parametrize(
    ("dtype", "decay", "warned"),
    [(torch.bfloat16, 0.9998, True), (torch.bfloat16, 0.9, False), (torch.float32, 0.9998, False)],
)
def test_an_average_that_could_not_move_is_warned_of(dtype, decay, warned):
    model = nn.Linear(2, 2).to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flatmin.MESA(model, decay=decay)
    assert ["does not move" in str(warning.message) for warning in caught] == [True] * warned
    assert all(warning.filename == __file__ for warning in caught)

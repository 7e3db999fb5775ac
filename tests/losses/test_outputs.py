"""Outputs and inputs as networks have them: dictionaries, tokens, pixels, independent labels, features; evaluation."""

import math
from collections import UserDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.losses import binary_trajectory_loss, feature_distance, trajectory_loss
from tests.live import live
from tests.reference import oracles

B, C, L = 5, 4, 6
T = 3.0
generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


X = draw(B, 3)
TOKENS = draw(B, L, 3)


def binary_oracle(logits: Tensor, target: Tensor) -> float:
    """The mean over all logits of the divergence of two coins, in plain Python."""
    total = 0.0
    for now, then in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        q, p = 1 / (1 + math.exp(-now / T)), 1 / (1 + math.exp(-then / T))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return T**2 * total / logits.numel()


def feature_oracle(features: Tensor, target: Tensor) -> float:
    """Over rows of channels, in plain Python; layer norm adds 1e-5 to the variance."""

    def normalised(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        return [(value - mean) / math.sqrt(variance + 1e-5) for value in row]

    rows = list(zip(features.tolist(), target.tolist(), strict=True))
    errors = [sum((a - b) ** 2 for a, b in zip(normalised(f), normalised(t), strict=True)) / len(f) for f, t in rows]
    return sum(errors) / len(errors)


class TestFormulas:
    def test_binary_trajectory_loss_is_the_oracle_with_its_gradient(self):
        logits, target = draw(B, C).requires_grad_(), draw(B, C)
        loss = binary_trajectory_loss(logits, target, temperature=T)
        torch.testing.assert_close(loss.item(), binary_oracle(logits, target), rtol=1e-12, atol=0)
        loss.backward()
        slope = T * ((logits / T).sigmoid() - (target / T).sigmoid()) / logits.numel()
        torch.testing.assert_close(logits.grad, slope.detach())
        assert torch.autograd.gradcheck(lambda z: binary_trajectory_loss(z, target, temperature=T), logits)

    @pytest.mark.parametrize("dim", [-1, 1])
    def test_feature_distance_is_the_oracle_with_its_gradient(self, dim):
        features, target = draw(B, L, C).requires_grad_(), draw(B, L, C)
        given = [each if dim == -1 else each.movedim(-1, 1) for each in (features, target)]
        loss = feature_distance(*given, class_dim=dim)
        expected = feature_oracle(features.reshape(-1, C), target.reshape(-1, C))
        torch.testing.assert_close(loss.item(), expected, rtol=1e-12, atol=0)
        assert torch.autograd.gradcheck(lambda z: feature_distance(z, target, class_dim=-1), features)

    @pytest.mark.parametrize(("shape", "dim"), [((B, C, 2, 3), 1), ((B, L, C), -1), ((B, L, C), 2), ((B, C), -1)])
    def test_trajectory_loss_over_positions_is_that_of_their_rows(self, shape, dim):
        logits, target = draw(*shape).requires_grad_(), draw(*shape)
        rows = [each.movedim(dim, -1).reshape(-1, C) for each in (logits, target)]
        loss = trajectory_loss(logits, target, temperature=T, class_dim=dim)
        value, gradient = oracles.trajectory(rows[1].tolist(), rows[0].tolist(), coefficient=1.0, temperature=T)
        torch.testing.assert_close(loss.item(), value, rtol=1e-12, atol=0)
        (slope,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(slope.movedim(dim, -1).reshape(-1, C), torch.tensor(gradient, dtype=torch.float64))
        squeezed = flatmin.logit_squeezing(logits, coefficient=1.0, temperature=T, class_dim=dim)
        assert squeezed == trajectory_loss(logits, torch.zeros_like(logits), temperature=T, class_dim=dim)

    def test_masks_leave_out_and_the_mean_stays_over_all(self):
        mask = torch.tensor([True, False, True, False, False])
        z, t = draw(B, C), draw(B, C)
        for loss in (
            lambda z, t, **mask: binary_trajectory_loss(z, t, temperature=T, **mask),
            lambda z, t, **mask: trajectory_loss(z, t, temperature=T, **mask),
            feature_distance,
        ):
            torch.testing.assert_close(loss(z, t, mask=mask), loss(z[mask], t[mask]) * 2 / 5)
        one = torch.rand(B, C, generator=generator) < 0.5
        torch.testing.assert_close(
            binary_trajectory_loss(z, t, temperature=T, mask=one),
            binary_trajectory_loss(z[one], t[one], temperature=T) * one.sum() / one.numel(),
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_extremes_are_finite_and_at_least_float32(self, dtype):
        big = torch.finfo(dtype).max
        z = torch.tensor([[big, -big, -torch.inf, 0.0]], dtype=dtype, requires_grad=True)
        for t in (z.detach().flip(1), z.detach(), torch.zeros_like(z)):
            loss = binary_trajectory_loss(z, t, temperature=0.5)
            assert loss.isfinite()
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
            assert torch.autograd.grad(loss, z)[0].isfinite().all()
        flat = torch.ones(2, C, dtype=dtype, requires_grad=True)
        distance = feature_distance(flat, torch.zeros_like(flat))
        assert distance == 0
        assert torch.autograd.grad(distance, flat)[0].isfinite().all()

    def test_empty_batches_are_zero(self):
        empty = torch.zeros(0, C, requires_grad=True)
        assert binary_trajectory_loss(empty, empty, temperature=T) == 0
        assert feature_distance(empty, empty) == 0

    @pytest.mark.parametrize("shape", [(B, C, 2, 2), (B, L, C), (C,)])
    @pytest.mark.parametrize(
        "loss",
        [
            lambda z: trajectory_loss(z, z, temperature=T),
            lambda z: feature_distance(z, z),
            flatmin.logit_squeezing,
            lambda z: flatmin.MESA(nn.Linear(3, C), start_epoch=0)(z, z),
        ],
    )
    def test_more_dimensions_are_refused_with_the_way_out(self, shape, loss):
        with pytest.raises(InvalidArgumentError, match=r"class_dim=1 for maps \(B, C, H, W\), class_dim=-1 for tokens"):
            loss(torch.zeros(shape, requires_grad=True))

    @pytest.mark.parametrize("dim", [0, 3, -3, -4])
    def test_a_class_dimension_that_there_is_not_is_refused(self, dim):
        with pytest.raises(InvalidArgumentError, match=f"class_dim must be a dimension after the first, got {dim}"):
            trajectory_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), temperature=T, class_dim=dim)


class Wrapped(nn.Module):
    """Returns its logits in some structure, and takes the inputs by name."""

    def __init__(self, form: str, layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.form, self.layer = form, layer or nn.Linear(3, C, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> object:
        logits = scale * self.layer(x)
        return {
            "tensor": logits,
            "dict": {"logits": logits, "hidden": x},
            "out": {"out": logits, "aux": x},
            "userdict": UserDict(logits=logits),
            "object": type("Output", (), {"logits": logits})(),
            "tuple": (logits, x),
            "list": [x, logits],
        }[self.form]


FORMS = {
    "tensor": {},
    "dict": {},
    "userdict": {},
    "object": {},
    "out": {"output": lambda out: out["out"]},
    "tuple": {"output": lambda out: out[0]},
    "list": {"output": lambda out: out[1]},
}


def moved(model: nn.Module, **options) -> flatmin.MESA:
    """A MESA whose average differs from the model."""
    mesa = flatmin.MESA(model, start_epoch=0, coefficient=1.0, temperature=T, **options)
    with torch.no_grad():
        for parameter in mesa.average.module.parameters():
            parameter.mul_(-0.5)
    return mesa


@pytest.mark.parametrize("form", FORMS)
class TestStructures:
    def test_logits_are_found_in_what_is_returned(self, form):
        model, plain = Wrapped(form), Wrapped("tensor")
        mesa, expected = moved(model, **FORMS[form]), moved(plain)(plain(X), X)
        assert expected > 0
        returned = model(X)
        logits = plain(X)
        assert torch.equal(mesa(logits, X), expected)
        if form not in ("tensor",):
            assert torch.equal(mesa(returned, X), expected)

    @pytest.mark.parametrize("given", ["keywords", "mapping", "userdict"])
    def test_a_batch_may_be_a_mapping(self, form, given):
        model = Wrapped(form)
        mesa, batch = moved(model, **FORMS[form]), {"x": X, "scale": 2.0, "labels": torch.arange(B)}
        logits = 2 * model.layer(X)
        expected = mesa(logits, X, scale=2.0)
        assert torch.equal(mesa(logits, X), expected) is False
        if given == "keywords":
            assert torch.equal(mesa(logits, **batch), expected)
        else:
            assert torch.equal(mesa(logits, batch if given == "mapping" else UserDict(batch)), expected)


def test_a_share_is_drawn_of_structures_and_gradients_flow():
    model = Wrapped("dict")
    mesa, share = moved(model, fraction=0.4), []
    mesa.average.module.layer.register_forward_pre_hook(lambda _, args: share.append(args[0]))
    returned = model(x=X)
    (gradient,) = torch.autograd.grad(mesa(returned, {"x": X}), returned["logits"])
    assert [len(each) for each in share] == [2]
    assert (gradient.abs().sum(dim=1) > 0).sum() == 2


def test_a_network_that_takes_the_mapping_itself_gets_it():
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, C, dtype=torch.float64)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["x"])

    model = Takes()
    batch = {"x": X, "y": torch.arange(B)}
    assert moved(model)(model(batch), batch) > 0


@pytest.mark.parametrize(("form", "got"), [("out", "dict"), ("tuple", "tuple"), ("list", "list")])
def test_a_structure_without_logits_is_refused_naming_output(form, got):
    model = Wrapped(form)
    with pytest.raises(InvalidArgumentError, match=f"^logits must be a tensor, got {got}; .*output=lambda out"):
        moved(model)(model(X), X)
    with pytest.raises(InvalidArgumentError, match=f"returned {got} where logits of .*output=lambda out"):
        moved(model)(live(draw(B, C)), X)


class Tokens(nn.Module):
    """Tokens (B, L, C), or maps (B, C, L)."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.maps = nn.Linear(3, C, dtype=torch.float64), maps

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.layer(x)
        return logits.movedim(-1, 1) if self.maps else logits


def test_logits_that_were_put_in_rows_are_refused_naming_class_dim():
    model = Tokens(maps=False)
    with pytest.raises(InvalidArgumentError, match=r"as the model returned them, with class_dim=1 .* -1 for tokens"):
        moved(model)(model(TOKENS).reshape(-1, C), TOKENS)


@pytest.mark.parametrize("maps", [False, True])
class TestPositions:
    def make(self, maps: bool, **options) -> tuple[nn.Module, flatmin.MESA]:
        model = Tokens(maps)
        return model, moved(model, class_dim=1 if maps else -1, **options)

    def rows(self, model: nn.Module, mesa: flatmin.MESA) -> tuple[Tensor, Tensor]:
        """Logits and their targets, a row each."""
        return tuple(m.layer(TOKENS).reshape(-1, C) for m in (model, mesa.average.module))

    def test_the_mean_is_over_all_positions(self, maps):
        model, mesa = self.make(maps)
        now, then = self.rows(model, mesa)
        torch.testing.assert_close(mesa(model(TOKENS), TOKENS), trajectory_loss(now, then, temperature=T))

    @pytest.mark.parametrize("said", ["where", "labels", "both"])
    def test_positions_that_do_not_count_are_left_out_of_sum_and_mean(self, maps, said):
        model, mesa = self.make(maps)
        where = torch.rand(B, L, generator=generator) < 0.4
        labels = torch.where(where, 1, -100)
        arguments = {
            "where": {"where": where},
            "labels": {"labels": labels},
            "both": {"where": where, "labels": torch.ones(B, L).long()},
        }[said]
        now, then = (each[where.flatten()] for each in self.rows(model, mesa))
        expected = trajectory_loss(now, then, temperature=T)
        torch.testing.assert_close(mesa(model(TOKENS), TOKENS, **arguments), expected)
        distance = moved(model, class_dim=1 if maps else -1, distance="features")
        torch.testing.assert_close(distance(model(TOKENS), TOKENS, **arguments), feature_distance(now, then))

    def test_where_nothing_counts_it_is_zero_with_a_gradient_of_zero(self, maps):
        model, mesa = self.make(maps)
        logits = model(TOKENS)
        loss = mesa(logits, TOKENS, labels=torch.full((B, L), -100))
        assert loss == 0
        assert not torch.autograd.grad(loss, logits)[0].any()

    def test_a_share_takes_the_samples_of_all(self, maps):
        model, mesa = self.make(maps, fraction=0.4)
        where = torch.rand(B, L, generator=generator) < 0.6
        logits = model(TOKENS)
        (gradient,) = torch.autograd.grad(mesa(logits, TOKENS, where=where), logits)
        rows = (gradient.movedim(1, -1) if maps else gradient).abs().sum(-1) > 0
        drawn = rows.any(dim=1)
        assert drawn.sum() == 2
        assert torch.equal(rows[drawn], where[drawn])

    @pytest.mark.parametrize("where", [torch.ones(B, L), torch.ones(B, dtype=torch.bool), [True] * B])
    def test_a_where_that_does_not_fit_is_refused(self, maps, where):
        model, mesa = self.make(maps)
        with pytest.raises(InvalidArgumentError, match=rf"^where must be a bool tensor of shape \({B}, {L}\)"):
            mesa(model(TOKENS), TOKENS, where=where)


def test_labels_without_an_ignored_one_change_nothing_at_all():
    model = Wrapped("tensor")
    mesa = moved(model)
    logits = model(X)
    assert torch.equal(mesa(logits, x=X, labels=torch.arange(B) % C), mesa(logits, X))
    half = mesa(logits, x=X, labels=torch.tensor([0, -100, 1, -100, -100]))
    torch.testing.assert_close(half, mesa(logits[[0, 2]], X[[0, 2]]))


class TestSigmoid:
    @pytest.mark.parametrize("shape", [(B, C), (B, 1), (B,), (B, L, C)])
    def test_each_logit_stands_for_itself(self, shape):
        class Model(Wrapped):
            def forward(self, x: Tensor) -> Tensor:
                return x * self.layer.bias[0]

        model, x = Model("tensor"), draw(*shape)
        mesa = moved(model, link="sigmoid")
        target = mesa.average.module(x)
        torch.testing.assert_close(mesa(model(x), x).item(), binary_oracle(model(x), target), rtol=1e-12, atol=0)
        where = torch.tensor([True, False, True, True, False])
        chosen = binary_oracle(model(x)[where], target[where])
        torch.testing.assert_close(mesa(model(x), x, where=where).item(), chosen, rtol=1e-12, atol=0)

    def test_a_shift_of_all_logits_costs_what_it_costs_nothing_with_softmax(self):
        model = Wrapped("tensor")
        softmax, sigmoid = (flatmin.MESA(model, start_epoch=0, link=link) for link in ("softmax", "sigmoid"))
        assert softmax(model(X) + 5, X).item() == pytest.approx(0, abs=1e-12)
        assert sigmoid(model(X) + 5, X) > 0.1

    @pytest.mark.parametrize("options", [{}, {"statistics": "batch"}])
    def test_a_single_logit_is_refused_naming_both_ways_out(self, options):
        model = nn.Linear(3, 1)
        with pytest.raises(InvalidArgumentError, match=r"two classes.*link='sigmoid'.*distance="):
            flatmin.MESA(model, start_epoch=0, **options)(model(X.float()), X.float())

    def test_labels_of_several_classes_may_be_ignored_one_by_one(self):
        model = Wrapped("tensor")
        mesa = moved(model, link="sigmoid")
        labels = torch.where(torch.rand(B, C, generator=generator) < 0.5, 1, -100)
        now, then = (m.layer(X)[labels == 1] for m in (model, mesa.average.module))
        assert mesa(model(X), X, labels=labels).item() == pytest.approx(binary_oracle(now, then), rel=1e-12)


def test_what_was_chosen_is_printed():
    assert "link" not in repr(flatmin.MESA(nn.Linear(3, C)))
    assert "class_dim=-1, distance=features" in repr(flatmin.MESA(nn.Linear(3, C), class_dim=-1, distance="features"))


class TestDistance:
    def test_features_of_a_network(self):
        model = Wrapped("dict")
        mesa = moved(model, distance="features")
        now, then = (m.layer(X) for m in (model, mesa.average.module))
        assert mesa(model(X), X).item() == pytest.approx(feature_oracle(now, then), rel=1e-12)

    def test_a_function_gets_whatever_the_network_returns(self):
        def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
            assert not theirs["out"].requires_grad
            return F.l1_loss(ours["out"], theirs["out"])

        model = Wrapped("out")
        mesa = moved(model, distance=distance, fraction=0.4)
        returned = model(X)
        loss = mesa(returned, X)
        (gradient,) = torch.autograd.grad(loss, returned["out"])
        assert loss > 0
        assert (gradient.abs().sum(dim=1) > 0).sum() == 2
        mesa.set_epoch(0)
        assert mesa.eval()(model(X), X) == 0

    def test_a_regression_with_one_output(self):
        model = nn.Linear(3, 1, dtype=torch.float64)
        mesa = moved(model, distance=F.mse_loss)
        assert torch.equal(mesa(model(X), X), F.mse_loss(model(X), mesa.average(X)))
        with pytest.raises(InvalidArgumentError, match="where must be left out"):
            mesa(model(X), X, where=torch.ones(B, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "softmx"}, "unknown link 'softmx', did you mean softmax"),
        ({"distance": "feature"}, "distance must be 'features', a function of both outputs, or None, got 'feature'"),
        ({"distance": 3}, "distance must be .* got 3"),
        ({"link": "sigmoid", "distance": "features"}, "link='sigmoid' and distance='features' exclude each other"),
        ({"output": "logits"}, "output must be a function of what model returns, got 'logits'"),
        ({"class_dim": 0}, "class_dim must be an integer that is not 0"),
        ({"class_dim": 1.0}, "class_dim must be an integer that is not 0"),
        ({"class_dim": True}, "class_dim must be an integer that is not 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        flatmin.MESA(nn.Linear(3, C), **options)


LOSSES = {
    "SAF": (lambda: flatmin.SAF(B, C, lag=1, start_epoch=0), torch.arange(B)),
    "MESA": (lambda: flatmin.MESA(nn.Linear(3, C), start_epoch=0, interval=2, fraction=0.5), X.float()),
    "OnlineLabelSmoothing": (lambda: flatmin.OnlineLabelSmoothing(C), torch.arange(B) % C),
}


@pytest.mark.parametrize("way", ["detached", "no_grad", "inference", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_that_need_no_gradient_give_zero_and_leave_no_trace(name, way):
    make, beside = LOSSES[name]
    loss, training = make(), draw(B, C).float().requires_grad_()
    loss.set_epoch(0)
    loss(training, beside)
    loss.set_epoch(1)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    expected = make()
    expected.load_state_dict(before)
    for _ in range(3):
        if way == "no_grad":
            with torch.no_grad():
                got = loss(training * 2, beside)
        elif way == "inference":
            with torch.inference_mode():
                got = loss(training * 2, beside)
        else:
            got = loss(training.detach() if way == "detached" else draw(B, C).float(), beside)
        assert got == 0
        assert got.dtype == torch.float32
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())
    losses = [each(training * 3, beside) for each in (loss, expected)]  # training goes on as if nothing had been
    assert torch.equal(*losses)


def test_saf_names_mesa_for_tokens_and_pixels():
    with pytest.raises(InvalidArgumentError, match=r"one row a sample: for tokens or pixels take flatmin\.MESA"):
        flatmin.SAF(B, C)(torch.zeros(B, L, C), torch.arange(B))


def test_mesa_within_a_functional_gradient_is_the_same():
    model = Wrapped("tensor")
    mesa, logits = moved(model), model(X)
    (expected,) = torch.autograd.grad(mesa(logits, X), logits)
    assert torch.equal(torch.func.grad(lambda z: mesa(z, X))(logits.detach()), expected)
    assert expected.any()

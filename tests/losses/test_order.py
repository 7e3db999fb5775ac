"""A loss of outputs and of something else that is called the other way around says so; each loss there is."""

import inspect
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import flatmin
from flatmin import losses
from flatmin.errors import InvalidArgumentError

B, C = 6, 3
torch.manual_seed(0)
MODEL, TOKENS = nn.Linear(4, C), nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, C))
X, IDS, PAST = torch.randn(B, 4), torch.randint(9, (B, 2)), torch.randn(B, C)
MOVED = X.clone().requires_grad_()  # as for adversarial examples
# Each with the logits, and what comes behind them.
CALLS = {
    "MESA": (flatmin.MESA(MODEL, start_epoch=0), MODEL(X), X),
    "MESA before it begins": (flatmin.MESA(MODEL), MODEL(X), X),
    "MESA of tokens": (flatmin.MESA(TOKENS, start_epoch=0), TOKENS(IDS), IDS),
    "MESA of a dictionary": (flatmin.MESA(TOKENS, start_epoch=0), {"logits": TOKENS(IDS)}, {"input": IDS}),
    "MESA of inputs with a gradient": (flatmin.MESA(MODEL, start_epoch=0), MODEL(MOVED), MOVED),
    "SAF": (flatmin.SAF(B, C), MODEL(X), torch.arange(B)),
    "OnlineLabelSmoothing": (flatmin.OnlineLabelSmoothing(C), MODEL(X), torch.zeros(B, dtype=torch.int64)),
    "trajectory_loss": (partial(losses.trajectory_loss, temperature=5.0), MODEL(X), PAST),
    "binary_trajectory_loss": (partial(losses.binary_trajectory_loss, temperature=5.0), MODEL(X), PAST),
    "feature_distance": (losses.feature_distance, MODEL(X), PAST),
}


def test_none_is_left_out():
    """But what takes nothing beside the logits."""
    assert {name.split()[0] for name in CALLS} == set(losses.__all__) - {"logit_squeezing"}
    assert len(inspect.signature(losses.logit_squeezing).bind(PAST).args) == 1


@pytest.mark.parametrize("name", CALLS)
def test_the_other_way_around_is_said(name):
    loss, logits, other = CALLS[name]
    with pytest.raises(InvalidArgumentError, match=r"(logits|features) come first"):
        loss(other, logits)
    if name.startswith("MESA") and isinstance(other, Tensor):
        with pytest.raises(InvalidArgumentError, match=r"mesa\(logits, x\)"):
            loss(other, input=logits)


@pytest.mark.parametrize("name", CALLS)
def test_the_right_way_is_silent_in_training_and_in_evaluation(name):
    loss, logits, other = CALLS[name]
    plain = logits.detach() if isinstance(logits, Tensor) else {"logits": logits["logits"].detach()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(logits, other).isfinite()
        assert loss(plain, other).isfinite()
        with torch.no_grad():
            assert loss(plain, other).isfinite()


def test_a_step_that_is_compiled_whole_says_it_too():
    mesa = flatmin.MESA(MODEL, start_epoch=0)
    step = torch.compile(lambda x: mesa(x, MODEL(x)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"mesa\(logits, x\)"):
        step(X)


class Maps(nn.Module):
    """Four features each, of whatever shape, to logits whose classes come second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(-1, 1)


LABELS = torch.randint(C, (B,))
FORMS = {
    "plain": {},
    "fraction": {"fraction": 0.5},
    "interval": {"interval": 2},
    "batch statistics": {"statistics": "batch"},
    "bfloat16": {"autocast": torch.bfloat16},
    "features": {"distance": "features"},
    "yes and no": {"link": "sigmoid"},
    "given": {"average": flatmin.EMA(MODEL, decay=0.9)},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_labels_in_place_of_the_inputs_are_said(options):
    mesa = flatmin.MESA(MODEL, start_epoch=0, **options)
    with pytest.raises(InvalidArgumentError, match=r"labels.* mesa\(logits, x\)") as found:
        mesa(MODEL(X), LABELS)
    assert isinstance(found.value.__cause__, RuntimeError)  # torch's own, of the matrices


@pytest.mark.parametrize(
    ("shape", "class_dim", "labels"),
    [((B, 5, 4), 1, (B, 5)), ((B, 5, 2, 4), 1, (B, 5, 2)), ((B, 4), 1, (B, C))],
    ids=["tokens", "pixels", "several a sample"],
)
def test_nor_of_tokens_pixels_or_several_a_sample(shape, class_dim, labels):
    model, x = Maps(), torch.randn(shape)
    logits = model(x)
    mesa = flatmin.MESA(model, start_epoch=0, class_dim=class_dim)
    assert mesa(logits, x).isfinite()
    with pytest.raises(InvalidArgumentError, match=r"takes no labels"):
        mesa(logits, torch.randint(2, labels))


class Fails(nn.Module):
    """A network that fails once it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(9, C)

    def forward(self, x: Tensor, *, error: type[Exception] | None = None) -> Tensor:
        if error is not None:
            raise error("of its own")
        return self.inner(x.long())


def test_what_runs_and_other_errors_are_left_alone(monkeypatch):
    model = Fails()
    mesa, ids = flatmin.MESA(model, start_epoch=0), torch.randint(9, (B,))
    assert mesa(model(ids), ids).isfinite()  # one integer a sample
    with pytest.raises(RuntimeError, match="of its own"):
        mesa(model(ids), ids, error=RuntimeError)
    with pytest.raises(KeyError):  # with inputs that are no integers
        monkeypatch.setattr(Fails, "forward", lambda self, x: {}[x])
        mesa(model.inner(ids), X)
    monkeypatch.setattr(Fails, "forward", lambda self, x: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        mesa(model.inner(ids), ids)

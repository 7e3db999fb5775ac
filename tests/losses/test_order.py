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

"""SAF inside torch.compile: one graph, compiled once, that never goes stale."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError
from flatmin.history import TopK
from flatmin.history._choose import CODECS

N, C, B = 8, 96, 4


class Counting:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def trained(history, how, epochs=5):
    """Losses and weights after some epochs, how many graphs there were, and SAF."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model, count = nn.Linear(4, C), Counting()
    saf = flatmin.SAF(N, C, start_epoch=1, history=history, **({} if history == "mean" else {"lag": 1}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(x, y, index):
        logits = model(x)
        return F.cross_entropy(logits, y) + saf(logits, index)

    step = loss if how is None else torch.compile(loss, backend=count if how == "counting" else how)
    losses = []
    for epoch in range(epochs):
        saf.set_epoch(epoch)
        for index in torch.arange(N).split(B):
            value = step(torch.randn(B, 4), index % 2, index)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses, model.weight.detach(), count.graphs, saf


@pytest.mark.parametrize("history", CODECS)
def test_one_graph_without_breaks_for_all_epochs_gives_what_eager_gives(history):
    compiled, plain = trained(history, "counting"), trained(history, None)
    assert compiled[2] == 1
    assert compiled[0] == plain[0]
    assert torch.equal(compiled[1], plain[1])
    ours, theirs = compiled[3].state_dict(), plain[3].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    trained(history, "counting", epochs=1)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_gradients_are_also_compiled():
    compiled, plain = trained("int6", "aot_eager"), trained("int6", None)
    torch.testing.assert_close(compiled[0], plain[0])
    torch.testing.assert_close(compiled[1], plain[1])


def test_checks_and_warnings_are_those_of_a_step():
    *_, saf = trained("dense", None, epochs=1)
    step = torch.compile(lambda logits, index: saf(logits, index) * 1, backend="eager")
    with pytest.raises(InvalidArgumentError, match=r"index must lie in \[0, 8\)"):
        step(torch.randn(2, C, requires_grad=True), torch.tensor([0, 8]))
    saf.set_epoch(1)
    for _ in range(3):
        step(torch.randn(B, C, requires_grad=True), torch.arange(B))
    with pytest.warns(FlatminWarning, match="call saf.set_epoch") as said:
        step(torch.randn(B, C, requires_grad=True), torch.arange(B))
    assert said[0].filename == __file__


def test_a_copy_remembers_for_itself():
    *_, saf = trained("dense", None, epochs=1)
    other = copy.deepcopy(saf)
    other.set_epoch(7)
    torch.compile(lambda z, i: other(z, i) * 1, backend="eager")(torch.randn(B, C, requires_grad=True), torch.arange(B))
    assert (other.history.store.epochs == 7).sum() == B
    assert not (saf.history.store.epochs == 7).any()


class Merging(TopK):
    """A codec of a user's that merges classes and does not say so."""

    merges = False


def test_a_codec_that_merges_in_secret_is_refused():
    with pytest.raises(InvalidArgumentError, match="say merges = True"):
        trained(Merging(), "eager")


def test_an_evaluation_is_compiled_too():
    *_, saf = trained("dense", None, epochs=1)
    step = torch.compile(lambda z, i: saf.eval()(z, i), backend="eager", fullgraph=True)
    assert step(torch.randn(B, C, requires_grad=True), torch.arange(B)) == 0

"""An objective is made once: it measures the weights of the moment, reads its batches once, and refuses all else."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flatmin import sharpness
from flatmin.errors import InvalidArgumentError
from flatmin.sharpness import Objective, hessian_trace, loss_landscape, sam_sharpness

MEASURES = {
    "sam_sharpness": {"per_batch": True},
    "average_sharpness": {"directions": 2},
    "hessian_eigenvalues": {"k": 2},
    "hessian_trace": {"probes": 2},
    "spectral_density": {"probes": 1, "steps": 3},
    "loss_landscape": {"points": 3},
}


@pytest.fixture(params=MEASURES)
def measure(request):
    return lambda *args, **more: getattr(sharpness, request.param)(*args, **{**MEASURES[request.param], **more})


class Counted:
    """Batches that say how often they were gone through."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def train(model, batches):
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_an_objective_made_before_training_measures_the_weights_of_the_moment(measure, delicate):
    model, batches = delicate
    objective = Objective(model, F.cross_entropy, batches)
    before = measure(objective)
    train(model, batches)
    after = measure(objective)
    assert after != before
    assert after == measure(Objective(model, F.cross_entropy, batches))


def test_buffers_are_those_of_the_moment(measure, delicate):
    model, batches = delicate
    objective = Objective(model, F.cross_entropy, batches)
    before = measure(objective)
    model[1].running_mean += 0.5
    after = measure(objective)
    assert after != before
    assert after == measure(Objective(model, F.cross_entropy, batches))


def test_weights_that_are_frozen_or_unfrozen_meanwhile_are_left_out_or_measured(delicate):
    model, batches = delicate
    objective = Objective(model, F.cross_entropy, batches)
    size = sum(p.numel() for p in model.parameters())
    assert hessian_trace(objective).parameters == size - 4
    model[0].bias.requires_grad_(True)
    assert hessian_trace(objective).parameters == size
    model[5].requires_grad_(False)
    assert hessian_trace(objective).parameters == size - 51
    model.requires_grad_(False)
    with pytest.raises(InvalidArgumentError, match="no parameter with requires_grad"):
        hessian_trace(objective)


def test_a_model_whose_dtype_has_changed_is_measured_in_it(measure, network, batches):
    exact = copy.deepcopy(network)
    objective = Objective(network.float(), F.cross_entropy, batches)
    measure(objective)
    network.double().load_state_dict(exact.state_dict())
    assert measure(objective) == measure(Objective(exact, F.cross_entropy, batches))


def test_batches_are_read_once(network, batches):
    counted = Counted(batches)
    objective = Objective(network, F.cross_entropy, counted)
    passes = counted.passes
    for name, options in MEASURES.items():
        getattr(sharpness, name)(objective, **options)
    train(network, batches)
    sam_sharpness(objective.variant(normalise_logits=True, batch_statistics=True))
    assert counted.passes == passes
    assert Objective(network, F.cross_entropy, batches, samples=4).samples == 4
    assert objective.samples == 10


def test_a_variant_is_what_an_objective_with_its_options_is(measure, delicate):
    model, batches = delicate
    plain = Objective(model, F.cross_entropy, batches, samples=7, seed=3)
    changed = plain.variant(normalise_logits=True, batch_statistics=True)
    options = {"normalise_logits": True, "batch_statistics": True, "samples": 7, "seed": 3}
    wanted = measure(Objective(model, F.cross_entropy, batches, **options))
    assert measure(changed) == wanted
    assert measure(changed.variant()) == wanted
    assert measure(plain) != wanted
    assert measure(changed.variant(normalise_logits=False, batch_statistics=False)) == measure(plain)


def test_the_model_is_in_evaluation_mode_only_while_it_is_measured(delicate):
    model, batches = delicate
    modes = []
    hook = model[4].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    objective = Objective(model, F.cross_entropy, batches)
    assert model[4].training
    sam_sharpness(objective)
    assert model[4].training
    hook.remove()
    assert set(modes) == {False}


@pytest.mark.parametrize("kept", [2**28, 0])
def test_a_loaders_own_generator_is_put_back_and_changes_nothing(delicate, monkeypatch, kept):
    monkeypatch.setattr("flatmin.sharpness._batches.KEPT", kept)
    model, batches = delicate
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(batches.dataset, batch_size=5, shuffle=True, generator=generator)
    before = generator.get_state()
    objective = Objective(model, F.cross_entropy, loader, samples=None if kept else 7)
    assert torch.equal(generator.get_state(), before)
    found = sam_sharpness(objective, per_batch=True)
    assert torch.equal(generator.get_state(), before)
    generator.manual_seed(6)
    assert sam_sharpness(objective, per_batch=True) == found
    assert (
        sam_sharpness(Objective(model, F.cross_entropy, loader, samples=None if kept else 7), per_batch=True) == found
    )


def test_making_one_of_what_raises_disturbs_nothing(delicate):
    model, batches = delicate
    modes = [module.training for module in model.modules()]
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(batches.dataset, batch_size=5, shuffle=True, generator=generator)

    def fail(z, y):
        torch.rand(1)
        raise KeyError("the user's own")

    states = torch.get_rng_state(), generator.get_state()
    with pytest.raises(KeyError):
        Objective(model, fail, loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])
    assert [module.training for module in model.modules()] == modes


def test_a_network_that_draws_random_numbers_draws_the_same_in_every_measure(measure, network, batches):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x + 0.1 * torch.randn(x.shape, dtype=x.dtype))

    loader = DataLoader(TensorDataset(*(torch.cat(column) for column in zip(*batches, strict=True))), 4, shuffle=True)
    objective = Objective(Noisy(), F.cross_entropy, loader)
    one = measure(objective)
    torch.manual_seed(99)
    assert measure(objective) == one


def test_a_pass_of_another_number_of_samples_is_refused(network, batches, monkeypatch):
    monkeypatch.setattr("flatmin.sharpness._batches.KEPT", 0)
    changing = list(batches)
    objective = Objective(network, F.cross_entropy, changing)
    sam_sharpness(objective)
    changing.pop()
    with pytest.raises(InvalidArgumentError, match="gave 10 samples in the first pass and 9 in a later one"):
        sam_sharpness(objective)


def test_reading_that_failed_is_done_again(network, batches):
    objective = Objective(network, F.cross_entropy, failing := list(batches))
    network.float()
    failing.append("no pair")
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="pairs"):
            sam_sharpness(objective)
    failing.pop()
    assert sam_sharpness(objective).samples == 10


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_no_objective_is_refused_in_a_sentence(name, network, batches):
    function = getattr(sharpness, name)
    objective = Objective(network, F.cross_entropy, batches)
    way = rf"{name} takes one Objective.* {name}\(Objective\(model, loss_fn, batches\), \.\.\.\), got "
    with pytest.raises(InvalidArgumentError, match=way + "Sequential, function, list"):
        function(network, F.cross_entropy, batches)
    with pytest.raises(InvalidArgumentError, match=way + "model, loss_fn, batches"):
        function(model=network, loss_fn=F.cross_entropy, batches=batches)
    with pytest.raises(InvalidArgumentError, match=way + "Sequential"):
        function(network)
    with pytest.raises(InvalidArgumentError, match=way + "nothing"):
        function()
    with pytest.raises(InvalidArgumentError, match=way + "Objective, Objective"):
        function(objective, objective)
    with pytest.raises(InvalidArgumentError, match=rf"{name} takes no normalise_logits and no seed, .*Objective\("):
        function(objective, seed=1, normalise_logits=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rhoo'"):
        function(objective, rhoo=1)
    assert next(iter(inspect.signature(function).parameters)) == "objective"
    assert function(objective=objective, **MEASURES[name]) == function(objective, **MEASURES[name])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": nn.Linear}, "model must be a network"),
        ({"loss_fn": "cross_entropy"}, "loss_fn must be a function"),
        ({"batches": []}, "batches are empty"),
        ({"batches": [torch.zeros(2, 3)]}, "pairs"),
        ({"samples": 0}, "samples must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        ({"dtype": torch.float16}, "dtype must be"),
    ],
)
def test_arguments_are_checked_where_they_are_given(network, batches, options, match):
    given = {"model": network, "loss_fn": F.cross_entropy, "batches": batches, **options}
    with pytest.raises(InvalidArgumentError, match=match):
        Objective(given.pop("model"), given.pop("loss_fn"), given.pop("batches"), **given)


def test_a_loss_that_is_no_tensor_is_refused(network, batches):
    objective = Objective(network, lambda z, y: 1.0, batches)
    with pytest.raises(InvalidArgumentError, match="mean over the batch, got float"):
        loss_landscape(objective)


def test_what_is_kept_is_a_copy(network, batches):
    """A caller may change a batch in place, and a loader fill the same memory again."""
    x, y = batches[0]
    wanted = sam_sharpness(Objective(network, F.cross_entropy, [(x.clone(), y.clone())])).loss
    objective = Objective(network, F.cross_entropy, [(x, y)])
    x.zero_()
    y.zero_()
    assert sam_sharpness(objective).loss == wanted

    class Reusing:
        def __iter__(self):
            for inputs, targets in batches[1:3]:
                x[: len(inputs)] = inputs
                y[: len(targets)] = targets
                yield x[: len(inputs)], y[: len(targets)]

    known = [(inputs.clone(), targets.clone()) for inputs, targets in batches[1:3]]
    found = Objective(network, F.cross_entropy, Reusing())
    assert sam_sharpness(found).loss == sam_sharpness(Objective(network, F.cross_entropy, known)).loss

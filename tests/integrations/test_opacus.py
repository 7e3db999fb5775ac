"""DP-SAT with Opacus: it is the paper's, from a loop over samples, in every mode, and its privacy is DP-SGD's."""

import functools
import io
from contextlib import nullcontext

import pytest

pytest.importorskip("opacus")

import torch
from opacus.schedulers import ExponentialNoise
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import flatmin
from flatmin.errors import FlatminWarning, NonFiniteGradientWarning
from flatmin.integrations.opacus import DPSAT
from tests.integrations._opacus import MODES, Private, brute_force, by_hand, data, difference, flat, quiet, sgd

BOTH = ["gradient", "step"]
ADAPTIVE = {
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.2,
    "max_clipbound": 10.0,
    "min_clipbound": 0.1,
    "unclipped_num_std": 5.0,
}


@pytest.fixture(autouse=True)
def _quiet():
    quiet()


def dpsat(private, rho=0.5, direction="gradient", **options):
    return DPSAT(module=private.module, optimizer=private.optimizer, rho=rho, direction=direction, **options)


@functools.cache
def reference(direction):
    return brute_force(0.5, direction)


@functools.cache
def plain(mode="hooks", clipping="flat", accountant="rdp"):
    """Weights and epsilon of DP-SGD."""
    trained = Private(mode, clipping=clipping, accountant=accountant, **(ADAPTIVE if clipping == "adaptive" else {}))
    trained.fit()
    return flat(trained.net), trained.epsilon()


@pytest.mark.parametrize(("mode", "wrap"), MODES)
@pytest.mark.parametrize("direction", BOTH)
def test_it_is_the_papers(mode, wrap, direction):
    private = Private(mode, wrap)
    dpsat(private, direction=direction)
    private.fit()
    assert difference(flat(private.net), reference(direction)) < 1e-6
    assert difference(reference(direction), brute_force(0.0) if mode == "hooks" else plain()[0]) > 1e-3
    assert private.epsilon() == plain()[1]


@pytest.mark.parametrize("direction", BOTH)
def test_per_layer_clipping(direction):
    private = Private(clipping="per_layer")
    dpsat(private, direction=direction)
    private.fit()
    ours = brute_force(0.5, direction, per_layer=private.optimizer.max_grad_norms)
    assert difference(flat(private.net), ours) < 1e-6
    assert private.epsilon() == plain(clipping="per_layer")[1]
    assert difference(ours, plain(clipping="per_layer")[0]) > 1e-3


@pytest.mark.parametrize("direction", BOTH)
def test_adaptive_clipping(direction):
    private = Private(clipping="adaptive", **ADAPTIVE)
    dpsat(private, direction=direction)
    private.fit()
    assert difference(flat(private.net), by_hand(Private(clipping="adaptive", **ADAPTIVE), 0.5, direction)) < 1e-6
    assert private.epsilon() == plain(clipping="adaptive")[1]
    assert difference(flat(private.net), plain(clipping="adaptive")[0]) > 1e-3


@pytest.mark.parametrize(("mode", "wrap"), MODES)
@pytest.mark.parametrize("direction", BOTH)
def test_without_rho_it_is_dpsgd(mode, wrap, direction):
    private = Private(mode, wrap)
    dpsat(private, rho=lambda optimizer: 0.0, direction=direction)
    assert torch.equal(flat(private.fit().net), plain(mode)[0])


@pytest.mark.parametrize("mode", ["hooks", "ew", "ghost"])
@pytest.mark.parametrize("direction", BOTH)
def test_physical_batches_make_one_logical_batch(mode, direction):
    whole, parts = Private(mode), Private(mode)
    dpsat(whole, direction=direction)
    dpsat(parts, direction=direction)
    whole.fit()
    parts.fit(physical=5)
    assert len(parts.sizes) > 3 * len(whole.sizes)
    assert sum(parts.sizes) == sum(whole.sizes)
    assert difference(flat(whole.net), flat(parts.net)) < 1e-6
    assert difference(flat(parts.net), by_hand(Private(mode), 0.5, direction, physical=5)) < 1e-6
    assert parts.epsilon() == whole.epsilon()


def test_the_default_accountant_counts_as_for_dpsgd():
    private = Private(accountant="prv")
    dpsat(private)
    assert private.fit().epsilon() == plain(accountant="prv")[1]


@pytest.mark.parametrize("physical", [None, 4])
def test_weights_are_moved_by_rho_once_and_put_back(physical):
    """At learning rate 0 the weights stand still; the authors' code moves them with every physical batch."""
    private = Private(lr=0.0)
    with dpsat(private, rho=0.25):
        before, lengths = flat(private.net), []
        torch.manual_seed(3)
        for x, y in private.batches(4, physical):
            private.optimizer.zero_grad()
            private.backward(x, y)
            lengths.append(float((flat(private.net) - before).norm()))
            private.optimizer.step()
            if not private.optimizer._is_last_step_skipped:
                assert torch.equal(flat(private.net), before)
    first = next(index for index, length in enumerate(lengths) if length)  # after the first logical step
    assert first == 1 if physical is None else first > 1
    assert lengths[first:] == pytest.approx([0.25] * len(lengths[first:]), abs=1e-6)


def begin(private):
    """The forward and backward pass of a step that is not made."""
    private.optimizer.zero_grad()
    private.backward(*data())


def evaluate(private):
    private.call.eval()
    with torch.no_grad():
        private.net(data()[0])
    private.call.train()


def differentiate(private):
    """An evaluation that takes a gradient, after which a training forward moves the weights again."""
    private.call.eval()
    private.net(data()[0])
    private.call.train()


@pytest.mark.parametrize("between", [evaluate, differentiate, lambda private: private.net.state_dict()])
@pytest.mark.parametrize("physical", [None, 4])
def test_what_the_loop_does_between_passes_changes_nothing(between, physical):
    private, ours = Private(), Private()
    dpsat(private)
    private.fit(physical=physical, between=lambda: between(private))
    dpsat(ours)
    assert torch.equal(flat(private.net), flat(ours.fit(physical=physical).net))


@pytest.mark.parametrize("way", ["closure", "after", "inner"])
def test_loops_are_those_that_opacus_takes(way):
    private = Private()
    dpsat(private)
    torch.manual_seed(3)
    for x, y in private.batches(5):
        if way == "closure":  # Lightning's way

            def closure(x=x, y=y):
                private.optimizer.zero_grad()
                return private.backward(x, y)

            private.optimizer.step(closure)
        elif way == "after":
            private.backward(x, y)
            private.optimizer.step()
            private.optimizer.zero_grad()
        else:  # the network is called, and not what is around it
            private.optimizer.zero_grad()
            F.cross_entropy(private.net(x), y).backward()
            private.optimizer.step()
    assert difference(flat(private.net), reference("gradient")) < 1e-6


def test_evaluations_and_state_dicts_within_a_step_have_the_clean_weights():
    private = Private()
    dpsat(private)
    private.fit(2)
    x, _ = data()
    clean, logits = flat(private.net), private.net.eval()(x).detach()
    private.call.train()
    begin(private)
    assert difference(flat(private.net), clean) > 1e-3
    with torch.no_grad():
        assert torch.equal(private.call(x), logits)
    for module, prefix in ((private.net, ""), (private.module, "_module.")):
        state = module.state_dict()
        saved = [state[prefix + name].flatten() for name, _ in private.net.named_parameters()]
        assert torch.equal(torch.cat(saved), clean)
    assert difference(flat(private.net), clean) > 1e-3
    private.net.eval()(x)  # with gradients
    assert torch.equal(flat(private.net), clean)


@pytest.mark.parametrize("direction", BOTH)
def test_resumed_is_continued(direction):
    def stopped():
        private = Private()
        dpsat(private, direction=direction)
        return private

    private, file = stopped(), io.BytesIO()
    private.fit(3)
    private.engine.save_checkpoint(path=file, module=private.module, optimizer=private.optimizer)
    random, noise = torch.get_rng_state(), private.noise.get_state()
    private.fit(3, seed=None)

    def resumed(again):
        file.seek(0)
        again.engine.load_checkpoint(path=file, module=again.module, optimizer=again.optimizer)
        torch.set_rng_state(random)
        again.noise.set_state(noise)
        return again.fit(3, seed=None)

    again = resumed(stopped())
    assert torch.equal(flat(private.net), flat(again.net))
    assert private.epsilon() == again.epsilon()
    assert difference(flat(resumed(Private()).net), flat(private.net)) > 1e-3  # DP-SGD goes on from it


def test_a_state_of_dpsgd_begins_anew_and_says_so():
    private, other = Private(), Private()
    state = private.fit(2).optimizer.state_dict()
    dpsat(other)
    other.fit(2)
    with pytest.warns(FlatminWarning, match="nothing of DPSAT"):
        other.optimizer.load_state_dict(state)
    other.net.load_state_dict(private.net.state_dict())
    clean = flat(other.net)
    begin(other)
    assert torch.equal(flat(other.net), clean)


def test_learning_rate_and_noise_are_scheduled_as_for_dpsgd():
    private = Private()
    dpsat(private)
    schedulers = ExponentialNoise(private.optimizer, gamma=0.9), torch.optim.lr_scheduler.StepLR(private.optimizer, 2)
    private.fit(3, between=lambda: [scheduler.step() for scheduler in schedulers])
    assert [round(entry[0], 4) for entry in private.engine.accountant.history] == [1.0, 0.9, 0.81]
    assert private.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_rho_may_follow_the_learning_rate_and_be_set():
    private, seen = Private(), []
    attached = dpsat(private, rho=lambda optimizer: seen.append(optimizer) or 0.5)
    private.fit(3)
    assert seen == [private.optimizer.original_optimizer] * 3
    attached.rho = 0.125
    clean = flat(private.net)
    begin(private)
    assert float((flat(private.net) - clean).norm()) == pytest.approx(0.125, abs=1e-6)


def test_some_parameters_and_another_scaling():
    ones = by_hand(Private(), 0.5, perturbed=lambda parameter: parameter.shape == (4,))
    alone = Private()
    dpsat(alone, parameters=[p for p in alone.net.parameters() if p.shape == (4,)])
    assert difference(flat(alone.fit().net), ones) < 1e-6
    scaled = Private()
    dpsat(scaled, scaling=flatmin.optim.Elementwise())
    results = [ones, flat(scaled.fit().net), reference("gradient")]
    assert min(difference(a, b) for i, a in enumerate(results) for b in results[:i]) > 1e-4


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_empty_batches_are_steps(mode):
    private = Private(mode, batch=1)
    dpsat(private)
    private.fit(12, seed=4)
    assert 0 in private.sizes[1:]
    assert flat(private.net).isfinite().all()
    assert private.engine.accountant.history[-1][2] == 12


def infinite(private):
    """A step with samples of which no gradient is finite."""
    x, y = data()
    private.optimizer.zero_grad()
    private.backward(torch.full_like(x, torch.inf), y)
    private.optimizer.step()


def test_a_privatised_gradient_that_is_not_finite_is_left_out_and_accounted():
    private = Private()
    attached = dpsat(private)
    private.fit(2)
    clean, before = flat(private.net), private.optimizer.state_dict()["flatmin"]["state"]
    with pytest.warns(NonFiniteGradientWarning, match=r"accounted.*skipped_steps"):
        infinite(private)
    infinite(private)  # warned once
    assert attached.skipped_steps == 2
    assert torch.equal(flat(private.net), clean)
    after = private.optimizer.state_dict()["flatmin"]["state"]
    assert all(torch.equal(before[index]["direction"], after[index]["direction"]) for index in before)
    private.fit(1)
    assert private.engine.accountant.history[-1][2] == 5
    assert attached.skipped_steps == 2
    assert difference(flat(private.net), clean) > 1e-3


def test_removed_it_is_dpsgd():
    private = Private()
    attached = dpsat(private)
    private.fit(2)
    clean = flat(private.net)
    begin(private)
    attached.remove()
    assert torch.equal(flat(private.net), clean)
    assert "flatmin" not in private.optimizer.state_dict()
    begin(private)
    assert torch.equal(flat(private.net), clean)
    private.optimizer.step()
    dpsat(private)


def test_an_average_is_of_the_clean_weights():
    averages, ours = [], []
    private = Private(base=lambda net, lr: averages.append(flatmin.EMA(net, decay=0.5)) or sgd(net, lr))
    dpsat(private)
    average = averages[0]
    average.attach(private.optimizer)
    expected = flat(private.net)
    private.fit(3, between=lambda: ours.append(flat(private.net)))
    for weights in ours:
        expected = 0.5 * expected + 0.5 * weights
    assert difference(flat(average.module), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_are_too_coarse_are_warned_of_once(dtype):
    x, y = data()
    private = Private(base=lambda net, lr: sgd(net.to(dtype), lr), dataset=TensorDataset(x.to(dtype), y))
    dpsat(private, rho=0.001)
    with pytest.warns(FlatminWarning, match="rounded away") if dtype == torch.bfloat16 else nullcontext() as caught:
        private.fit(4)
    assert dtype == torch.float64 or [each.category for each in caught].count(FlatminWarning) == 1

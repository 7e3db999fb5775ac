"""The gradient that the base optimizer steps with is clipped, and no other; clipping in a pass is noticed."""

import gc
import threading
import warnings

import pytest
import torch
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_, get_total_norm

import flatmin
from flatmin.errors import FlatminWarning
from flatmin.optim._clipping import GLOBAL, _seen
from tests.contracts._optimizers import CLOSED, TRAINED, Training, assert_same

every = pytest.mark.parametrize("name", TRAINED)


@pytest.fixture(scope="module", autouse=True)
def _without_what_other_tests_left():
    gc.collect()  # optimizers that are gone and watch still


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Without those of what stands still in the step."""
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def gradients(training: Training) -> list[torch.Tensor]:
    """What the base optimizer steps with, in the step after the first three."""
    training.step(3)
    found = []
    training.optimizer.base_optimizer.register_step_pre_hook(lambda *_: found.extend(gradients_of(training.model)))
    training.step()
    return found


@every
def test_it_equals_torchs_clipping_of_the_last_gradient(name):
    """Told of in the fourth step alone, so that both arrive there alike."""
    plain, clipped, weights = Training(name), Training(name), []
    expected = gradients(plain)
    clipped.step(3)
    clipped.each_pass = lambda: weights.append([p.detach().clone() for p in clipped.model.parameters()])
    clipped.optimizer.max_norm = 0.05
    found = []
    clipped.optimizer.base_optimizer.register_step_pre_hook(lambda *_: found.extend(gradients_of(clipped.model)))
    clipped.step()
    holders = [torch.nn.Parameter(gradient) for gradient in expected]
    for holder, gradient in zip(holders, expected, strict=True):
        holder.grad = gradient.clone()
    assert torch.nn.utils.clip_grad_norm_(holders, 0.05) > 0.05
    for ours, holder in zip(found, holders, strict=True):
        torch.testing.assert_close(ours, holder.grad, rtol=1e-9, atol=1e-12)
    again = Training(name)
    again.step(3)
    moved = []
    again.each_pass = lambda: moved.append([p.detach().clone() for p in again.model.parameters()])
    again.step()
    assert_same(weights, moved)  # the perturbation is of the gradient as it was


@every
def test_a_gradient_that_is_short_enough_is_left_alone(name):
    ours, plain = Training(name, max_norm=1e6), Training(name)
    assert ours.step(4) == plain.step(4)
    assert_same(ours.state(), plain.state())


NORM, VALUE = 0.05, 0.01  # which no gradient is below


def clipping(name, clip, way="step", steps=3, **options):
    """A training that clips at the end of each pass, and what it is warned of."""
    ours = Training(name, **options)
    ours._end = lambda: clip(ours)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(ours, way)(steps)
    return ours, [each for each in caught if issubclass(each.category, FlatminWarning)]


def by_norm(ours):
    clip_grad_norm_(ours.model.parameters(), NORM)


def by_value(ours):
    clip_grad_value_(ours.model.parameters(), VALUE)


def with_norm(ours):
    total = get_total_norm(parameter.grad for parameter in ours.model.parameters() if parameter.grad is not None)
    torch.nn.utils.clip_grads_with_norm_(list(ours.model.parameters()), NORM, total, foreach=False)


def each_by_norm(ours):
    for parameter in ours.model.parameters():
        torch.nn.utils.clip_grad_norm_(parameter, NORM)


CLIPS = {by_norm: "clip_grad_norm_", by_value: "clip_grad_value_", with_norm: "clip_grads_with_norm_"}


@pytest.mark.parametrize(
    ("clip", "way"), [(by_norm, "step"), (by_value, "loop"), (with_norm, "loop"), (each_by_norm, "step")]
)
@pytest.mark.parametrize("name", CLOSED)
def test_clipping_in_a_pass_is_said_once_where_it_is_not_that_of_max_norm(name, clip, way):
    ours, caught = clipping(name, clip, way)
    if clip in (by_norm, with_norm):
        plain = Training(name, max_norm=NORM)
        plain.step(3)
        pairs = zip(ours.model.parameters(), plain.model.parameters(), strict=True)
        assert len(caught) == any(not torch.allclose(left, right, rtol=0, atol=1e-9) for left, right in pairs)
    else:  # a gradient is turned; of one pass alone, it is the one to step with
        assert len(caught) == TRAINED[name].max_passes - 1
    for each in caught:
        function, bound = CLIPS.get(clip, "clip_grad_norm_"), VALUE if clip is by_value else NORM
        assert str(each.message).startswith(f"{function}(..., {bound}) in a pass of {name} clips its first gradient, ")
        assert f"{name}(..., max_norm={'...' if clip is by_value else NORM})" in str(each.message)
        assert each.filename == __file__
    assert type(getattr(clip_grad, GLOBAL)).__name__ == "function"  # torch's own


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"when": flatmin.optim.Adaptive(10)}, "whose length when= looks at"),
        ({"scaling": lambda parameters, directions, norm: (directions, 1.0)}, "which changes the step"),
        ({"scaling": flatmin.optim.Elementwise(0.01)}, None),
        ({"when": flatmin.optim.Late(0.1, steps=10)}, None),
    ],
)
def test_it_depends_on_the_arguments(options, said):
    _, caught = clipping("SAM", by_norm, **options)
    assert [said in str(each.message) for each in caught] == ([True] if said else [])


def second_alone(clip):
    return lambda ours: clip(ours) if ours.passes % 2 == 0 else None


@pytest.mark.parametrize("name", ["SAM", "FriendlySAM", "GSAM"])
def test_clipping_in_the_second_pass_alone_changes_what_is_made_of_both(name):
    _, caught = clipping(name, second_alone(by_norm), "loop")
    assert len(caught) == (name == "GSAM")


@pytest.mark.parametrize("clip", [by_norm, second_alone(by_norm)])
@pytest.mark.parametrize("name", ["SAM", "MSAM"])
def test_gradients_that_are_scaled_still_are_of_another_length(name, clip):
    _, caught = clipping(name, clip, steps=2, scaler=torch.amp.GradScaler("cpu", init_scale=4.0), dtype=torch.float32)
    assert ["which the scaler has scaled" in str(each.message) for each in caught] == [True]


def without_first(ours):
    clip_grad_norm_([*ours.model.parameters()][1:], NORM)


def test_a_part_that_is_not_perturbed_turns_nothing():
    ours = Training("SAM")
    part = [*ours.model.parameters()][1:]
    assert not clipping("SAM", without_first, model=ours.model, parameters=part)[1]
    assert len(clipping("SAM", without_first, model=ours.model)[1]) == 1


def perturbed(ours, steps):
    for _ in range(steps):
        Training.closure(ours)
        if ours.optimizer.perturb():
            Training.closure(ours)
            ours.optimizer.restore()
        by_value(ours)
        ours.optimizer.step()


def in_somebodys_loop(ours, steps):
    """Clips the first gradient before the optimizer is called, and that to step with as is right."""
    clip, ours._end = ours._end, lambda: None
    for _ in range(steps):
        Training.closure(ours)
        clip()
        if ours.optimizer.perturb():
            Training.closure(ours)
            ours.optimizer.restore()
        by_value(ours)
        ours.optimizer.step()


def with_two_steps(ours, steps):
    clip, ours._end = ours._end, lambda: None
    for _ in range(steps):
        Training.closure(ours)
        clip()
        if ours.optimizer.first_step():
            Training.closure(ours)
            ours.optimizer.second_step()


@pytest.mark.parametrize(
    ("clip", "way"), [(by_norm, with_two_steps), (by_value, in_somebodys_loop), (each_by_norm, with_two_steps)]
)
@pytest.mark.parametrize("name", [name for name in CLOSED if TRAINED[name].max_passes == 2])
def test_before_perturb_it_is_said_of_the_same_methods_from_the_second_step_on(name, way, clip, monkeypatch):
    monkeypatch.setattr(Training, "somebodys", way, raising=False)
    _, caught = clipping(name, clip, "somebodys")
    _, inside = clipping(name, clip, "loop")
    assert len(caught) == len(inside)
    for each in caught:
        bound = VALUE if clip is by_value else NORM
        assert f"(..., {bound}) before perturb() of {name} clips its first gradient" in str(each.message)
        assert each.filename == __file__
    assert not clipping(name, clip, "somebodys", 1)[1]  # it was over before the optimizer was called


def test_an_optimizer_that_is_gone_watches_no_more(monkeypatch):
    monkeypatch.setattr(Training, "somebodys", with_two_steps, raising=False)
    ours, _ = clipping("GSAM", lambda ours: None, "somebodys")
    assert type(getattr(clip_grad, GLOBAL)).__name__ == "_Wrapper"
    del ours
    gc.collect()
    assert type(getattr(clip_grad, GLOBAL)).__name__ == "function"


def test_right_loops_are_left_alone(monkeypatch):
    monkeypatch.setattr(Training, "perturbed", perturbed, raising=False)
    other = torch.nn.Linear(2, 2)

    def of_another(ours):
        other(torch.ones(1, 2)).sum().backward()
        clip_grad_value_(other.parameters(), VALUE)

    def measured(ours):
        get_total_norm([parameter.grad for parameter in ours.model.parameters()])
        clip_grad_norm_(ours.model.parameters(), float("inf"))

    for clip, way in ((lambda ours: None, "perturbed"), (of_another, "step"), (measured, "step")):
        assert not clipping("GSAM", clip, way)[1]


def test_a_closure_that_raises_leaves_torch_as_it_was():
    gc.collect()
    ours, before = Training("SAM"), getattr(clip_grad, GLOBAL)
    ours._end = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ours.step()
    for _ in ours.optimizer.passes():
        assert getattr(clip_grad, GLOBAL) is not before
        break
    assert getattr(clip_grad, GLOBAL) is before


def test_another_thread_that_clips_meanwhile_is_none_of_its_business():
    def elsewhere(ours):
        thread = threading.Thread(target=by_value, args=(ours,))
        thread.start()
        thread.join()

    assert not clipping("SAM", elsewhere)[1]


def test_a_clip_that_is_being_compiled_is_left_to_the_compiler(monkeypatch):
    ours, seen = Training("SAM"), []
    ours.step()
    with _seen(lambda *_: seen.append(by_value)):
        by_value(ours)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # frames would break the graph
        by_value(ours)
    assert seen == [by_value]

"""Arithmetic over lists of tensors."""

import pytest
import torch
from torch import nn

import flatmin
from flatmin.optim._foreach import absolute, add_, blend, component, plus, scale_, times

DTYPES = [torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float32]


def tensors(seed: int) -> list[torch.Tensor]:
    """Of several dtypes by turns, which no foreach function takes together."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, generator=generator).to(dtype) for dtype in DTYPES]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_lists_keep_their_order_over_several_dtypes():
    a, b = tensors(0), tensors(1)
    assert_close(plus(a, b, alpha=0.5), [x + 0.5 * y for x, y in zip(a, b, strict=True)])
    assert_close(times(a, b), [x * y for x, y in zip(a, b, strict=True)])
    assert_close(blend(a, b, 0.25), [0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)])
    assert_close(absolute(a, 0.25), [x.abs() + 0.25 for x in a])
    assert_close(a, tensors(0))
    assert plus([], [], alpha=1) == blend([], [], 1) == times([], []) == absolute([], 1) == []


def test_those_in_place_too():
    b = tensors(1)
    for change, expected in (
        (lambda a: add_(a, b, alpha=0.5), lambda x, y: x + 0.5 * y),
        (lambda a: scale_(a, 0.5), lambda x, _: 0.5 * x),
    ):
        change(a := tensors(0))
        assert_close(a, [expected(x, y) for x, y in zip(tensors(0), b, strict=True)])


@pytest.mark.parametrize("length", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("angle", ["any", "parallel", "opposite", "orthogonal"])
def test_component_is_that_of_the_dot_product(angle, length):
    a, b = torch.randn(2, 50, dtype=torch.float64)
    if angle == "orthogonal":
        a -= (a @ b) / (b @ b) * b
    elif angle != "any":
        a = (2.0 if angle == "parallel" else -2.0) * b
    a *= length
    found = component([a[:20], a[20:]], [b[:20], b[20:]], float(a.norm()), float(b.norm()))
    assert found == pytest.approx(float(a @ b / (b @ b)), rel=1e-9, abs=1e-14 * length)


def test_component_of_nothing_is_none():
    one, none = [torch.ones(2)], [torch.zeros(2)]
    assert component(none, one, 0.0, 2**0.5) == component(one, none, 2**0.5, 0.0) == 0


@pytest.mark.parametrize("name", ["GSAM", "LookSAM"])
def test_the_projection_is_over_those_with_both_gradients(name):
    """Of a parameter that only the first pass reaches, the gradient has no part in the norm either."""
    torch.manual_seed(0)
    weight, other = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2))
    base = torch.optim.SGD([weight, other], lr=0.1)
    optimizer = flatmin.GSAM(base, rho=0.5, alpha=0.6) if name == "GSAM" else flatmin.LookSAM(base, rho=0.5)
    gradients, left = [], []
    base.register_step_pre_hook(lambda *_: left.append(weight.grad.clone()))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.pow(4).sum()
        (loss + other.square().sum() if not gradients else loss).backward()
        gradients.append(weight.grad.clone())
        return loss.detach()

    optimizer.step(closure)
    first, second = gradients
    if name == "GSAM":
        expected = second - 0.6 * (first - (first @ second) / (second @ second) * second)
        torch.testing.assert_close(left[0], expected, rtol=1e-12, atol=1e-12)
    else:
        kept = optimizer.state_dict()["flatmin"]["state"][0]["direction"]
        torch.testing.assert_close(kept, second - (second @ first) / (first @ first) * first, rtol=1e-9, atol=1e-12)

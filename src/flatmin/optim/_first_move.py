"""What is wrong with a perturbation, seen in the first step that moves weights."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .._distributed import local
from ..errors import FlatminWarning
from ._foreach import global_norm
from ._surroundings import step_sizes_among

# Of the length of all weights. SAM's usual rho is 0.3 % of it and MSAM's paper's 3 % for a ResNet-18 on CIFAR-100; 20 %
# ruined a small BERT and cost up to three points on MNIST-1D (docs/methods/msam.md).
FAR, USUAL = 0.1, 0.01
FEW = 10_000  # numbers: nothing is known of the lengths of fewer
SMALL = 1e-3  # root mean square of weights that have yet to grow, such as those of a head that begins at 0


def faults_of_move(
    name: str,
    moved: list[Tensor],
    weights: list[Tensor],
    offsets: list[Tensor],
    *,
    rho: float | None = None,
    trained: Iterable[Tensor] = (),
) -> Iterator[FlatminWarning]:
    """What is to be warned of.

    Args:
        name: Of the method.
        moved: The moved weights.
        weights: As they were.
        offsets: Along which they were to be moved.
        rho: The length of the perturbation; None if that is not known.
        trained: All weights, of which the length matters.
    """
    coarse = rounded_away(moved, weights, offsets)
    if coarse is not None:
        yield FlatminWarning(
            f"the weights are {coarse}, in which most of {name}'s perturbation is rounded away: keep them in float32 "
            "and compute in lower precision with torch.autocast (warned once)"
        )
    if step_sizes_among(moved):
        yield FlatminWarning(
            f"{name} perturbs the step sizes of torchao's fake quantisers too, below 0 perhaps: give it "
            "parameters=flatmin.integrations.torchao.weights(model), or use flatmin.SQuAT (warned once)"
        )
    before = dict(zip(moved, weights, strict=True))
    every = [before.get(weight, weight).detach() for weight in trained if _has_length(weight)]
    count = sum(weight.numel() for weight in every)
    if rho is None or count < FEW:
        return
    norm = float(global_norm(every))  # waits for the device, this once
    if rho > FAR * norm and norm > SMALL * count**0.5:
        yield FlatminWarning(
            f"{name}'s rho={rho:g} moves the weights by {rho / norm:.0%} of their length, which has ruined "
            f"networks: about 1 % of it is usual, so try rho={USUAL * norm:.1g} (warned once)"
        )


def _has_length(weight: Tensor) -> bool:
    """Whether torch can measure it: not what is made later, is elsewhere, or is kept in another form."""
    if nn.parameter.is_lazy(weight) or weight.is_meta or weight.layout != torch.strided:
        return False
    return (weight.is_floating_point() or weight.is_complex()) and weight.dtype.itemsize > 1


def rounded_away(moved: list[Tensor], weights: list[Tensor], offsets: list[Tensor]) -> torch.dtype | None:
    """The dtype of 16 bits, if there is one, in which the perturbation is rounded: its cosine to ``s`` is below 0.9."""
    dots = [torch.zeros((), dtype=torch.float64)] * 3
    half = None
    for ours, old, offset in zip(map(local, moved), map(local, weights), map(local, offsets), strict=True):
        if ours.dtype in (torch.bfloat16, torch.float16):
            half = ours.dtype
            made, wanted = ours.float() - old.float(), offset.float()
            products = (made * wanted, made * made, wanted * wanted)
            dots = [dot + product.sum().cpu().double() for dot, product in zip(dots, products, strict=True)]
    along, made_norm, wanted_norm = (float(dot) for dot in dots)
    # abs: one-pass methods may move down the slope
    return half if abs(along) < 0.9 * (made_norm * wanted_norm) ** 0.5 or made_norm == 0 < wanted_norm else None

"""Where a landscape's points lie: random directions, filter by filter, or the plane through three checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_mapping, shown
from ..errors import InvalidArgumentError
from ._snapshot import Snapshot


@dataclass(frozen=True)
class Axes:
    """Points ``origin + x * directions[0] + y * directions[1]``.

    Attributes:
        origin: Flat weights, shape (n,).
        directions: One or two, shape (n,) each.
        x: Coordinates along the first.
        y: Along the second; None for one direction.
        places: Coordinates of the given checkpoints.
    """

    origin: Tensor
    directions: tuple[Tensor, ...]
    x: tuple[float, ...]
    y: tuple[float, ...] | None
    places: tuple[tuple[float, float], ...] = ()


def random_axes(loss: Snapshot, *, count: int, points: int, radius: float, seed: int) -> Axes:
    """One or two directions as in Li et al. 2018, each filter of which has the length of the weights' filter.

    Within each filter the second is orthogonal to the first, so that both are orthogonal and keep their lengths; a
    filter of one weight has no room for that and stands still in the second.

    Biases and the weights of normalisation layers, whatever has less than two dimensions, stand still, as by default in
    the authors' code.
    """
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for _ in range(count):
        z = torch.randn(len(loss.weights), generator=generator, dtype=loss.dtype).to(loss.device)
        parts = loss.split(z)
        for name, weights in loss.split(loss.weights).items():
            part = parts[name].flatten(1) if weights.ndim >= 2 else parts[name].zero_()
            if weights.ndim < 2:
                continue
            for other in made:
                before = loss.split(other)[name].flatten(1)
                share = (part * before).sum(1, keepdim=True) / before.square().sum(1, keepdim=True).clamp_min(1e-30)
                part -= share * before
                if part.shape[1] == 1:
                    part.zero_()
            lengths = part.norm(dim=1, keepdim=True).clamp_min(1e-10)
            part *= weights.flatten(1).norm(dim=1, keepdim=True) / lengths
        made.append(z)
    ticks = tuple(torch.linspace(-radius, radius, points, dtype=torch.float64).tolist())
    return Axes(loss.weights, tuple(made), ticks, ticks if count == 2 else None)


def plane_axes(loss: Snapshot, checkpoints: Sequence[Mapping[str, Tensor]], *, points: int, margin: float) -> Axes:
    """The plane through three checkpoints, as in Garipov et al. 2018: in units of the distance between weights.

    The first checkpoint is the origin, the second lies on the first axis.
    """
    if not isinstance(checkpoints, (list, tuple)) or len(checkpoints) != 3:
        got = len(checkpoints) if isinstance(checkpoints, (list, tuple)) else shown(checkpoints)
        raise InvalidArgumentError(f"a plane goes through three checkpoints, got {got}")
    flats = []
    for number, checkpoint in enumerate(checkpoints):
        check_mapping(f"plane[{number}]", checkpoint)
        for name, shape in loss.shapes.items():
            tensor = checkpoint.get(name)
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else "missing"
            if found != tuple(shape):
                raise InvalidArgumentError(
                    f"checkpoint {number} is of another network: {name} is {found}, the model's is {tuple(shape)}"
                )
        flats.append(loss.flat(dict(checkpoint)).to(loss.device))
    first, second, third = flats
    u, v = second - first, third - first
    length = float(u.norm())
    if length > 0:
        u = u / length
        along = float(v @ u)
        v = v - along * u
    height = float(v.norm())
    if length == 0 or height <= 1e-6 * length:
        raise InvalidArgumentError("the three checkpoints lie on one line, through which there is no plane")
    places = ((0.0, 0.0), (length, 0.0), (along, height))
    edge = margin * max(length, height)
    x, y = (
        tuple(torch.linspace(min(one) - edge, max(one) + edge, points, dtype=torch.float64).tolist())
        for one in zip(*places, strict=True)
    )
    return Axes(first, (u, v / height), x, y, places)

"""Each sample's logits in the few directions in which the network's logits vary, and the rest from the current ones.

The logits of different samples differ mostly within a subspace far smaller than the number of classes. Its basis ``Q``
is tracked as the network moves, by one step of subspace iteration an epoch over all logits of that epoch::

    row    c = Q^T (z - m), in 8 bits;  r = |z - m - Q c|
    past   m' + Q c + r * R / |R|,      R = the current logits, less their mean, outside of Q

``m`` is the mean of the logits of the epoch before. ``m'`` is the same with its part outside of ``Q`` replaced by that
of the true mean of the row's own epoch. What a row leaves out is so neither zero, which would make the loss pull the
network into the subspace, nor free: it has the current direction and the past length.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _distributed
from .._checks import check_integer
from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError
from ._codec import Codec
from ._rows import OUT_OF_RANGE, RANGE, from_bytes, nonzero, within_range
from ._state import PART, is_of_this_rank

RANK = 92  # 100 bytes a row with its epoch, 0.39 GB for ImageNet-1k
NO_BASIS = -1
TINY = 1e-12
SUMS = ("product", "total", "count")  # over an epoch's logits on this rank


Result = TypeVar("Result")


def full_precision(method: Callable[..., Result]) -> Callable[..., Result]:
    """Switches autocast off within a method, which would round its matrix products."""

    @functools.wraps(method)
    def wrapper(self: "LowRank", *arguments: Any) -> Result:
        device = self.bases.device.type  # the rows may be elsewhere
        if not torch.amp.is_autocast_available(device):
            return method(self, *arguments)
        with torch.autocast(device, enabled=False):
            return method(self, *arguments)

    return wrapper


def project(centred: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Splits rows, shape (B, C), by an orthonormal basis, shape (C, rank), into coordinates and what lies outside."""
    coordinates = centred @ basis
    return coordinates, centred - coordinates @ basis.T


def next_basis(product: Tensor, mean: Tensor, basis: Tensor, count: Tensor) -> Tensor:
    """Makes one step of subspace iteration with the covariance of an epoch's logits.

    Args:
        product: ``sum_i x_i x_i^T Q`` over the logits ``x_i``, shape (C, rank).
        mean: Their mean, shape (C,).
        basis: ``Q``, orthonormal, shape (C, rank).
        count: Their number.

    Returns:
        An orthonormal basis, shape (C, rank).
    """
    basis, _ = torch.linalg.qr(product - count * torch.outer(mean, mean @ basis))
    return basis


class LowRank(Codec):
    """Keeps ``rank`` coordinates of a row in 8 bits each, their step and the length of the rest: ``rank + 4`` bytes.

    Take it where memory rules: ImageNet-1k in 0.39 GB, with four fifths of the dense history's gain.

    The first epoch has no basis yet, so its logits are not remembered. The bases of ``lag + 1`` epochs are kept, ``4 C
    * rank`` bytes each, in float32 even after ``.half()``. When an epoch begins, and in ``state_dict``, all ranks add
    up what they have seen, so all of them must get there.

    Args:
        rank: Number of directions, less than ``C``.

    Raises:
        InvalidArgumentError: If ``rank`` is out of its bounds, or the history keeps a running mean.

    Example:
        >>> from flatmin.history import History, LowRank
        >>> History(LowRank(rank=92), num_samples=1000, num_classes=1000).row_bytes
        96
    """

    bases: Tensor
    means: Tensor
    basis_epochs: Tensor
    current_epoch: Tensor
    product: Tensor
    total: Tensor
    count: Tensor
    mixes_samples = True

    def __init__(self, rank: int = RANK) -> None:
        super().__init__()
        self.rank = check_integer("rank", rank, least=1)

    def prepare(self) -> int:
        """See `Codec.prepare`."""
        self._refuse_mean()
        rank, num_classes, slots = self.rank, self.num_classes, self.lag + 1
        if rank >= num_classes:
            raise InvalidArgumentError(
                f"rank={rank} must be less than the number of classes, {num_classes}; for few classes take "
                "history='int8' or 'int6'"
            )
        self.register_buffer("bases", torch.zeros(slots, num_classes, rank, dtype=torch.float32))
        self.register_buffer("means", torch.zeros(slots, num_classes, dtype=torch.float32))
        self.register_buffer("basis_epochs", torch.full((slots,), NO_BASIS))
        self.register_buffer("current_epoch", torch.tensor(NO_BASIS))
        self.register_buffer("product", torch.zeros(num_classes, rank, dtype=torch.float32))
        self.register_buffer("total", torch.zeros(num_classes, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))
        # Every rank begins with the same directions, whatever its global random state.
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(num_classes, rank, generator=generator, device="cpu", dtype=torch.float32)
        self.bases[0] = torch.linalg.qr(start)[0].to(self.bases.device)
        # The same epochs as in the two buffers, where the host can read them without waiting.
        self._epochs = [NO_BASIS] * slots
        self._epoch: int | None = None
        return rank + 4

    @full_precision
    def begin_epoch(self, epoch: int) -> None:
        """See `Codec.begin_epoch`: makes the basis of a new epoch from what the epoch before has shown."""
        if epoch == self._epoch:
            return
        before, self._epoch = self._epoch, epoch
        self.current_epoch.fill_(epoch)
        new = epoch % (self.lag + 1)
        if self._epochs[new] == epoch:  # gone back to: its rows are in this basis
            return
        if before is None:  # the very first: nothing is known yet, and the basis only serves to look around
            self.bases[new] = self.bases[0]
            self._epochs[new] = NO_BASIS
        else:
            old = before % (self.lag + 1)
            product, total, count = (_distributed.total(getattr(self, name).clone()) for name in SUMS)
            # An epoch with fewer rows than directions changes nothing.
            enough = count >= self.rank
            shift = torch.where(enough, total / count, 0)  # of the epoch's mean, from the mean it was centred by
            basis = next_basis(product, total / count.clamp(min=1), self.bases[old], count)
            self.bases[new] = torch.where(enough, basis, self.bases[old])
            self.means[new] = self.means[old] + shift
            if old != new:  # outside of their basis, the rows of the epoch that ends get its own mean
                self.means[old] += project(shift[None], self.bases[old])[1][0]
            self._epochs[new] = epoch
            for name in SUMS:
                getattr(self, name).zero_()
        self.basis_epochs[new].fill_(self._epochs[new])  # to assign a number to an element would wait on CUDA

    @full_precision
    def encode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Codec.encode`: also adds these logits to what the next epoch's basis is made from."""
        epoch, slot = self._current()
        basis, mean = self.bases[slot], self.means[slot]
        finite = logits.isfinite().all(dim=1)
        centred = _centred(logits.where(finite[:, None], 0), mean)
        coordinates, rest = project(centred, basis)
        self.product += centred.T @ (coordinates * finite[:, None])
        self.total += centred.where(finite[:, None], 0).sum(dim=0)
        self.count += finite.sum()
        step = (coordinates.abs().amax(dim=1) / 127).half()
        codes = (coordinates / nonzero(step.float())[:, None]).round().clamp(-127, 127)
        scales = torch.stack([step, rest.norm(dim=1).half()], dim=1)
        kept = finite & scales.isfinite().all(dim=1) & (self._epochs[slot] == epoch)
        scales = scales.where(kept[:, None], 0)
        return torch.cat([codes.to(torch.int8).view(torch.uint8), scales.view(torch.uint8)], dim=1), kept

    @full_precision
    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `Codec.decode`: what lies outside of the basis has the current direction and the past length."""
        slot, (_, now) = epoch % (self.lag + 1), self._current()
        basis, mean = self.bases[slot], self.means[slot]
        codes, scales = torch.split(rows, [self.rank, 4], dim=1)
        step, length = from_bytes(scales, torch.float16).to(basis).unbind(dim=1)
        coordinates = from_bytes(codes, torch.int8).to(basis) * step[:, None]
        _, rest = project(_centred(logits, self.means[now]), basis)
        rest = rest * (length / rest.norm(dim=1).clamp(min=TINY))[:, None]
        past: Tensor = mean + coordinates @ basis.T + rest
        # A class out of range, masked out by the user, has no probability now and had none then.
        return past.masked_fill(logits < logits.amax(dim=1, keepdim=True) - RANGE, -OUT_OF_RANGE)

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `Codec.compare`."""
        return logits, self.decode(rows, epoch, logits.detach())

    def describe(self) -> dict[str, Any]:
        """See `Codec.describe`."""
        return {"rank": self.rank}

    def _current(self) -> tuple[int, int]:
        """The current epoch, and the slot of its basis."""
        if self._epoch is None:
            raise InvalidArgumentError("call begin_epoch(epoch) first, as History does")
        return self._epoch, self._epoch % (self.lag + 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowRank":
        # Sums over an epoch exceed 16 bits, so floats travel as bits: to other devices, but to no other dtype.
        def move(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.int32)).view(tensor.dtype) if tensor.is_floating_point() else fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without types
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_bound and _distributed.size() > 1 and is_of_this_rank():
            destination[prefix + PART] = torch.tensor([_distributed.rank(), _distributed.size()])
        elif self.is_bound and _distributed.size() > 1:
            for name in SUMS:  # what all ranks have seen
                destination[prefix + name] = _distributed.total(getattr(self, name).clone())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        size, part = _distributed.size(), state_dict.get(prefix + PART)
        names = [prefix + name for name in SUMS if prefix + name in state_dict]
        state_dict = {key: value for key, value in state_dict.items() if key != prefix + PART}
        if part is None and size > 1:  # what all ranks have seen, in equal parts
            state_dict.update({name: state_dict[name] / size for name in names})
        elif part is not None and int(part[0]) % size != _distributed.rank():  # what another rank saw, and has
            if any(state_dict[name].any() for name in names):
                warnings.warn(
                    f"the state has the logits that rank {int(part[0])} of {int(part[1])} saw in its epoch, and "
                    "not those of this rank: the next basis of LowRank is made without them; load on each rank what "
                    "that rank saved, or take saf.state_dict() on all ranks together",
                    FlatminWarning,
                    stacklevel=depth_in_package(),
                )
            state_dict.update({name: torch.zeros_like(state_dict[name]) for name in names})
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.is_bound:
            self._epochs = self.basis_epochs.tolist()
            self._epoch = None if self.current_epoch == NO_BASIS else int(self.current_epoch)


def _centred(logits: Tensor, mean: Tensor) -> Tensor:
    logits = within_range(logits.float())
    return logits - logits.mean(dim=1, keepdim=True) - mean

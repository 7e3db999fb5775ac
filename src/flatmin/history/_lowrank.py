"""Each sample's logits in the few directions in which the network's outputs vary, and the rest from the present.

A network's outputs differ from sample to sample mostly in a subspace far smaller than the number of classes. Its basis
``Q`` is followed as the network moves, by one step of subspace iteration an epoch over all outputs of that epoch::

    row    c = Q^T (z - m), in 8 bits;  r = |z - m - Q c|
    past   m' + Q c + r * R / |R|,      R = the present output, less its mean, outside of Q

``m`` is the mean output of the epoch before, ``m'`` the same with what lies outside ``Q`` replaced by the true mean
of the row's own epoch. What is not stored is so neither zero (the loss would then pull the network into the subspace)
nor free: it has the present's direction and the past's length.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._checks import check_integer
from ..errors import InvalidArgumentError
from ._base import History
from ._rows import OUT_OF_RANGE, RANGE, from_bytes, nonzero, within_range

RANK = 92  # 100 bytes a row with its epoch, 0.39 GB for ImageNet-1k
NO_BOOK = -1
TINY = 1e-12
SUMS = ("product", "total", "count")  # over an epoch's outputs on this rank


Result = TypeVar("Result")


def full_precision(method: Callable[..., Result]) -> Callable[..., Result]:
    """Lets a method multiply matrices as they are within autocast, which would round them."""

    @functools.wraps(method)
    def wrapper(self: "LowRankHistory", *arguments: Any) -> Result:
        device = self.bases.device.type  # the rows may be elsewhere
        if not torch.amp.is_autocast_available(device):
            return method(self, *arguments)
        with torch.autocast(device, enabled=False):
            return method(self, *arguments)

    return wrapper


def project(centred: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Splits rows, shape (B, C), by an orthonormal basis, shape (C, rank): coordinates, and what lies outside."""
    coordinates = centred @ basis
    return coordinates, centred - coordinates @ basis.T


def next_basis(product: Tensor, mean: Tensor, basis: Tensor, count: Tensor) -> Tensor:
    """One step of subspace iteration with the covariance of an epoch's outputs.

    Args:
        product: ``sum_i x_i x_i^T Q`` over the outputs, shape (C, rank).
        mean: Their mean, shape (C,).
        basis: ``Q``, orthonormal, shape (C, rank).
        count: How many they are.

    Returns:
        An orthonormal basis, shape (C, rank).
    """
    basis, _ = torch.linalg.qr(product - count * torch.outer(mean, mean @ basis))
    return basis


class LowRankHistory(History):
    """Keeps ``rank`` coordinates of a row in 8 bits each, its scale and the length of the rest: ``rank + 4`` bytes.

    In the first epoch there is no basis yet, so its outputs are not remembered; the bases of ``lag + 1`` epochs are
    kept, ``4 C * rank`` bytes each; ``.half()`` leaves them in float32. Where an epoch begins, all ranks add up what
    they saw, and so does ``state_dict``.

    Args:
        num_samples: Number of samples ``N`` in the data set.
        num_classes: Number of classes ``C``.
        rank: Number of directions, less than ``C``.
        lag: Number of epochs between writing and reading.
        path: See `History`.
        location: See `History`.
        sharing: See `History`.

    Raises:
        InvalidArgumentError: If an argument is out of its bounds, or the rows do not fit into memory.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> from flatmin.history import LowRankHistory
        >>> LowRankHistory(num_samples=1000, num_classes=1000, rank=92).row_bytes
        96
    """

    bases: Tensor
    means: Tensor
    book_epochs: Tensor
    under_way: Tensor
    product: Tensor
    total: Tensor
    count: Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        rank: int = RANK,
        lag: int = 3,
        path: str | Path | None = None,
        location: str = "device",
        sharing: str = "auto",
    ) -> None:
        self.rank = check_integer("rank", rank, least=1)
        if self.rank >= check_integer("num_classes", num_classes, least=2):
            raise InvalidArgumentError(
                f"rank={rank} must be less than the number of classes, {num_classes}; for few classes take "
                "history='int8' or 'int6'"
            )
        super().__init__(
            num_samples, num_classes, row_bytes=rank + 4, lag=lag, path=path, location=location, sharing=sharing
        )
        self.register_buffer("bases", torch.zeros(lag + 1, num_classes, rank))
        self.register_buffer("means", torch.zeros(lag + 1, num_classes))
        self.register_buffer("book_epochs", torch.full((lag + 1,), NO_BOOK))
        self.register_buffer("under_way", torch.tensor(NO_BOOK))
        self.register_buffer("product", torch.zeros(num_classes, rank))
        self.register_buffer("total", torch.zeros(num_classes))
        self.register_buffer("count", torch.zeros(()))
        # The same directions to begin with on every rank, wherever the global random state is.
        start = torch.randn(num_classes, rank, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        self.bases[0] = torch.linalg.qr(start)[0].to(self.bases.device)
        # The epochs of the bases and the one under way, as the host knows them.
        self._books = [NO_BOOK] * (lag + 1)
        self._epoch: int | None = None

    @full_precision
    def encode(self, logits: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.encode`; also learns from these outputs where the next epoch's basis lies."""
        self._turn(epoch)
        book = epoch % (self.lag + 1)
        basis, mean = self.bases[book], self.means[book]
        whole = logits.isfinite().all(dim=1)
        centred = _centred(logits.where(whole[:, None], 0), mean)
        coordinates, rest = project(centred, basis)
        self.product += centred.T @ (coordinates * whole[:, None])
        self.total += centred.where(whole[:, None], 0).sum(dim=0)
        self.count += whole.sum()
        step = (coordinates.abs().amax(dim=1) / 127).half()
        codes = (coordinates / nonzero(step.float())[:, None]).round().clamp(-127, 127)
        scales = torch.stack([step, rest.norm(dim=1).half()], dim=1)
        whole = whole & scales.isfinite().all(dim=1) & (self._books[book] == epoch)
        scales = scales.where(whole[:, None], 0)
        return torch.cat([codes.to(torch.int8).view(torch.uint8), scales.view(torch.uint8)], dim=1), whole

    @full_precision
    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """See `History.decode`: what lies outside the basis has the present's direction and the past's length."""
        present = (epoch + self.lag) if self._epoch is None else self._epoch
        book, now = epoch % (self.lag + 1), present % (self.lag + 1)
        basis, mean = self.bases[book], self.means[book]
        codes, scales = torch.split(rows, [self.rank, 4], dim=1)
        step, length = from_bytes(scales, torch.float16).to(basis).unbind(dim=1)
        coordinates = from_bytes(codes, torch.int8).to(basis) * step[:, None]
        _, rest = project(_centred(logits, self.means[now]), basis)
        rest = rest * (length / rest.norm(dim=1).clamp(min=TINY))[:, None]
        past: Tensor = mean + coordinates @ basis.T + rest
        # A class out of range, masked out by the user, has no share now and had none then.
        return past.masked_fill(logits < logits.amax(dim=1, keepdim=True) - RANGE, -OUT_OF_RANGE)

    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """See `History.compare`."""
        self._turn(epoch + self.lag)
        return logits, self.decode(rows, epoch, logits.detach())

    def describe(self) -> dict[str, Any]:
        """See `History.describe`."""
        return {**self._shape(), "rank": self.rank}

    def set_extra_state(self, state: Tensor) -> None:
        """Learns which epochs the loaded bases are of."""
        self._books = self.book_epochs.tolist()
        self._epoch = None if self.under_way == NO_BOOK else int(self.under_way)

    @full_precision
    def _turn(self, epoch: int) -> None:
        """Where an epoch begins, makes its basis of what the one before has shown."""
        if epoch == self._epoch:
            return
        before, self._epoch = self._epoch, epoch
        self.under_way.fill_(epoch)
        new = epoch % (self.lag + 1)
        if self._books[new] == epoch:  # gone back to: its rows are in this basis
            return
        if before is None:  # the very first: nothing is known, and the basis only serves to look around
            self.bases[new] = self.bases[0]
            self._books[new] = NO_BOOK
        else:
            old = before % (self.lag + 1)
            product, total, count = (self.store.ranks.add(getattr(self, name).clone()) for name in SUMS)
            # An epoch that has shown next to nothing changes nothing.
            enough = count >= self.rank
            shift = torch.where(enough, total / count, 0)  # of the epoch's mean, from the mean it was centred by
            basis = next_basis(product, total / count.clamp(min=1), self.bases[old], count)
            self.bases[new] = torch.where(enough, basis, self.bases[old])
            self.means[new] = self.means[old] + shift
            if old != new:  # the rows of the epoch that ends get its own mean where their basis does not reach
                self.means[old] += project(shift[None], self.bases[old])[1][0]
            self._books[new] = epoch
            for name in SUMS:
                getattr(self, name).zero_()
        self.book_epochs[new] = self._books[new]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowRankHistory":
        # Sums over an epoch exceed 16 bits: what is a number here moves as bits, to other devices and no other dtype.
        def move(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.int32)).view(tensor.dtype) if tensor.is_floating_point() else fn(tensor)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.store.ranks.size > 1:
            for name in SUMS:  # what all ranks have seen
                destination[prefix + name] = self.store.ranks.add(getattr(self, name).clone())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        size = self.store.ranks.size
        names = [prefix + name for name in SUMS if prefix + name in state_dict] if size > 1 else []
        state_dict = {**state_dict, **{name: state_dict[name] / size for name in names}}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _centred(logits: Tensor, mean: Tensor) -> Tensor:
    logits = within_range(logits.float())
    return logits - logits.mean(dim=1, keepdim=True) - mean

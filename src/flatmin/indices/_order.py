"""Whether a batch has its samples in another order than they were given, as far as its content tells."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

_SMALL = 64  # numbers in an entry, above which it is looked for in its own row alone


def is_moved(samples: Sequence[Any], batch: Any) -> bool:
    """Whether an entry of the samples is in the batch in another order, and none is in their own.

    An entry is a number, a tensor or a list of numbers that every sample has in the same place. It is looked for in the
    columns of the batch, a sequence also where it is padded. What a function computes anew is not found, nor are two
    values that have changed places, since they may be two classes with other names.
    """
    size = len(samples)
    if size < 2:
        return False
    tensors = [each for each in _tensors(batch) if each.ndim]
    rows = [each for each in tensors if len(each) == size]
    time_first = [each.transpose(0, 1) for each in tensors if each.ndim > 1 and each.shape[1] == size]
    found = False
    for column in _columns(samples):
        alike = len({each.shape for each in column}) == 1
        for row in [*rows, *time_first]:
            there = _is_there(column, row, alike)
            if there is True:
                return False
            found = found or there is False
    return found


def _is_there(column: Sequence[Tensor], row: Tensor, alike: bool) -> bool | None:
    """True: as it was; False: in another order; None: not at all, or nothing can be told."""
    if alike and row.shape[1:] == column[0].shape:
        values = torch.stack(list(column)).to(row)
        small = values[0].numel() <= _SMALL
        if not small:
            return True if torch.equal(values, row) else None
        before, after = (list(map(str, each.tolist())) for each in (values, row))
        if len(set(before)) < 2 or sorted(before) != sorted(after):
            return None
        if before == after:
            return True
        # Two classes may have other names in the batch; more cannot, and nor can one that has become both.
        return None if len(set(before)) == 2 and len(set(zip(before, after, strict=True))) == 2 else False
    if column[0].ndim == 0 or any(each.ndim != row.ndim - 1 for each in column) or not all(map(len, column)):
        return None
    fits: list[list[int]] = []  # for each sample the rows that it may be in
    for each in column:
        fits.append([at for at, padded in enumerate(row) if _is_padded(each, padded)])
        if not fits[-1]:
            return None
    if all(at in each for at, each in enumerate(fits)):
        return True if len(set(map(str, row.tolist()))) > 1 else None
    return False if len({at for each in fits for at in each}) == len(column) else None


def _is_padded(sequence: Tensor, padded: Tensor) -> bool:
    size = len(sequence)
    if size > len(padded) or sequence.shape[1:] != padded.shape[1:]:
        return False
    sequence = sequence.to(padded)
    return torch.equal(sequence, padded[:size]) or torch.equal(sequence, padded[-size:])


def _columns(samples: Sequence[Any]) -> Iterator[list[Tensor]]:
    """The entries that all samples have in the same place of nested mappings, tuples and lists."""
    first = samples[0]
    if isinstance(first, Mapping):
        if all(isinstance(each, Mapping) and each.keys() == first.keys() for each in samples):
            for key in first:
                yield from _columns([each[key] for each in samples])
        return
    if isinstance(first, (tuple, list)) and all(
        isinstance(each, (tuple, list)) and len(each) == len(first) for each in samples
    ):
        for entries in zip(*samples, strict=True):
            yield from _columns(entries)
    tensors = [tensor for each in samples if (tensor := _tensor(each)) is not None]
    if len(tensors) == len(samples):
        yield tensors


def _tensor(entry: Any) -> Tensor | None:
    if isinstance(entry, list) and not all(isinstance(each, (int, float)) for each in entry):
        return None
    if isinstance(entry, (int, float, list)) or type(entry).__module__ == "numpy":
        try:
            return torch.as_tensor(entry, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # numpy's strings and objects
            return None
    plain = isinstance(entry, Tensor) and entry.layout is torch.strided and not entry.is_nested
    return entry.detach() if plain else None


def _tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, tuples and lists."""
    if isinstance(batch, PackedSequence):
        batch = pad_packed_sequence(batch, batch_first=True)[0]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)) and not (isinstance(batch, list) and _tensor(batch) is not None):
        for each in batch:
            yield from _tensors(each)
    elif (tensor := _tensor(batch)) is not None:
        yield tensor

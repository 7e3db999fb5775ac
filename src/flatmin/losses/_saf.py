"""SAF, sharpness-aware training for free: the trajectory loss against the network's own past outputs.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083, equation 8 and Algorithm 1.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_number
from ..errors import FlatminWarning, InvalidArgumentError
from ..history import History, make_history
from ._trajectory import trajectory_loss


class SAF(nn.Module):
    """Penalises how far the network's output on a sample has moved in the last ``lag`` epochs.

    ``coefficient * T**2 / B * sum_i KL(softmax(past_i / T) || softmax(logits_i / T))``

    over the samples recorded exactly ``lag`` epochs ago; the other samples contribute 0. Every call in training mode
    records the detached logits, from the first epoch on. After ``.eval()`` it neither records nor penalises.

    It costs no pass through the network; a step does not wait for the accelerator. What it keeps, and in how many
    bytes (``history.nbytes``), is the history's choice, see `flatmin.history`; it lives on the device that ``.to()``
    says. Under ``torch.distributed`` samples are compared with what any rank recorded: make SAF and call it alike on
    all ranks.

    A batch is read as if its samples had come one after another, those of several ranks in the ranks' order: of a
    sample that comes twice in an epoch the first contributes and the last is remembered. Outputs that are not finite
    are not remembered. So with an optimizer that calls its closure twice, as SAM does, it does not reach the second
    gradient: use one or the other.

    Args:
        num_samples: Number of samples ``N`` in the data set; indices run from 0 to ``N - 1``.
        num_classes: Number of classes ``C``.
        coefficient: Weight of the loss, lambda in the paper; at least 0.
        temperature: ``T`` > 0.
        lag: After how many epochs an output is compared with; at least 1; 3 unless the history says otherwise.
        start_epoch: First epoch, from 0, in which the loss is not 0. The paper's "after 5 epochs" is 5.
        history: "dense" (float32), "half", "int8", "int6", "int4", "topk", "lowrank"; "mean": the running mean of a
            sample's outputs in place of one ``lag`` epochs ago; "auto": by size; or a `flatmin.history.History`.
        momentum: Of that mean, in [0, 1); .9 with "mean". Also makes "half" and "int8" keep a mean.
        path: A folder for a scratch file in which the history lives if it exceeds memory; see `History`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, or does not fit the history given.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> import torch, flatmin
        >>> saf = flatmin.SAF(num_samples=100, num_classes=3, lag=1, start_epoch=1)
        >>> index, logits = torch.tensor([7, 42]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
        >>> saf.set_epoch(0)
        >>> saf(logits, index)
        tensor(0.)
        >>> saf.set_epoch(1)
        >>> saf(2 * logits, index)
        tensor(0.1854)
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        coefficient: float = 0.3,
        temperature: float = 5.0,
        lag: int | None = None,
        start_epoch: int = 5,
        history: str | History = "dense",
        momentum: float | None = None,
        path: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.num_samples = check_integer("num_samples", num_samples, least=1)
        self.num_classes = check_integer(
            "num_classes",
            num_classes,
            least=2,
            hint="; the softmax of a single logit is constant, so give a binary problem two logits",
        )
        self.coefficient = check_number("coefficient", coefficient, least=0)
        self.temperature = check_number("temperature", temperature, above=0)
        self.start_epoch = check_integer("start_epoch", start_epoch, least=0)
        if isinstance(history, str):
            self.history = make_history(
                history,
                self.num_samples,
                self.num_classes,
                lag=None if lag is None else check_integer("lag", lag, least=1),
                temperature=self.temperature,
                momentum=momentum,
                path=path,
            )
        else:
            self.history = _fitting(
                history,
                {"num_samples": num_samples, "num_classes": num_classes, "temperature": self.temperature},
                {"lag": lag, "momentum": momentum, "path": path},
            )
        self._epoch = 0
        self._seen = 0  # samples in this epoch, counted on the host
        self._warned = False

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, from 0; call it before each, as ``DistributedSampler.set_epoch``.

        Raises:
            InvalidArgumentError: If ``epoch`` is not an integer of at least 0.
        """
        self._epoch = check_integer("epoch", epoch, least=0)
        self._seen = 0

    def forward(self, logits: Tensor, index: Tensor) -> Tensor:
        """Computes the loss of a batch and records its outputs.

        Args:
            logits: The network's outputs, floating, shape (B, C).
            index: The samples' numbers in the data set, int64, shape (B,). Best left on the CPU, where they come
                from: there they are checked, and copied without waiting. On an accelerator, reading their values to
                check them would stall the step; an index out of range is caught by the device itself.

        Returns:
            A scalar, float64 if ``logits`` are float64 and float32 otherwise.

        Raises:
            InvalidArgumentError: If shapes, dtypes, devices or indices do not fit.
        """
        self._check(logits, index)
        zero = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        if not self.training:
            return zero
        self._count(len(index) * self.history.store.ranks.size)
        batch = self.history.open(index, self._epoch)
        loss = zero
        # Where nothing can contribute, the host knows it, and nothing is computed.
        if self._epoch >= max(self.start_epoch, self.history.lag) and self.coefficient > 0:
            now, then, counts = self.history.recall(batch, logits)
            loss = self.coefficient * trajectory_loss(now, then, temperature=self.temperature, mask=counts)
        self.history.record(batch, logits)
        return loss

    @property
    def lag(self) -> int:
        """After how many epochs an output is compared with; 1 where the history is a running mean."""
        return self.history.lag

    def get_extra_state(self) -> Tensor:
        """Carries the epoch in ``state_dict``, as a tensor, so that any format can store it."""
        return torch.tensor([self._epoch, self._seen])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the epoch from a ``state_dict``."""
        self._epoch, self._seen = (int(number) for number in state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.history.check_state(state_dict, f"{prefix}history.")  # before anything is loaded
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Shows the hyperparameters when printed."""
        return (
            f"num_samples={self.num_samples}, num_classes={self.num_classes}, coefficient={self.coefficient}, "
            f"temperature={self.temperature}, start_epoch={self.start_epoch}"
        )

    def _check(self, logits: Tensor, index: Tensor) -> None:
        for name, value in (("logits", logits), ("index", index)):
            if not isinstance(value, Tensor):
                raise InvalidArgumentError(f"{name} must be a tensor, got {type(value).__name__}")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not logits.is_floating_point():
            raise InvalidArgumentError(
                f"logits must be floating and of shape (batch, {self.num_classes}), "
                f"got {_describe(logits)}; SAF was made for num_classes={self.num_classes}"
            )
        if index.is_floating_point() and index.ndim == 2:
            raise InvalidArgumentError(
                f"index must hold sample numbers, got {_describe(index)}, which looks like soft labels: with mixup or "
                "cutmix a sample's past output belongs to another mixture; use flatmin.MESA, whose target sees the "
                "same mixed input"
            )
        if index.dtype not in (torch.int64, torch.int32) or index.shape != logits.shape[:1]:
            raise InvalidArgumentError(
                f"index must be int64 and of shape ({len(logits)},), one sample number for each row of logits, "
                f"got {_describe(index)}; flatmin.with_indices(loader) yields it"
            )
        for elsewhere in self.history.devices - {logits.device}:
            raise InvalidArgumentError(
                f"logits are on {logits.device} and the history is on {elsewhere}; "
                f"move it once, after creating it: saf.to('{logits.device}')"
            )
        if index.device.type == "cpu" and len(index) > 0:
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= self.num_samples:
                raise InvalidArgumentError(
                    f"index must lie in [0, {self.num_samples}), got values from {low} to {high}; "
                    f"SAF was made for num_samples={self.num_samples}, which must be len(dataset)"
                )

    def _count(self, batch: int) -> None:
        """Warns once when an epoch is much longer than the data set: set_epoch was forgotten."""
        self._seen += batch
        if self._seen > 1.5 * self.num_samples and not self._warned:
            self._warned = True
            warnings.warn(
                f"SAF has seen {self._seen} samples since epoch {self._epoch} began, and the data set has "
                f"{self.num_samples}: call saf.set_epoch(epoch) before each epoch, or it compares nothing; where "
                "samples are meant to come again within an epoch, only the first time counts",
                FlatminWarning,
                stacklevel=5,  # _count, forward, nn.Module.__call__ (two frames), the caller
            )


def _fitting(history: object, needed: dict[str, float], excluded: dict[str, object]) -> History:
    """Checks a history that the user has made."""
    if not isinstance(history, History):
        raise InvalidArgumentError(f"history must be a name or a flatmin.history.History, got {history!r:.80}")
    described = history.describe()
    for name, value in needed.items():
        if name in described and described[name] != value:
            raise InvalidArgumentError(f"{name}={value} and the history given was made for {name}={described[name]}")
    for name, argument in excluded.items():
        if argument is not None and argument != described.get(name):
            raise InvalidArgumentError(f"{name}={argument!r} is the history's own: give it to {type(history).__name__}")
    return history


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"

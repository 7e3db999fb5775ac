"""Online label smoothing: the soft labels of a class are the mean prediction for it in the epoch before.

*Delving Deep into Label Smoothing*, Zhang et al., IEEE TIP 2021, arXiv 2011.12562::

    S_y = mean of softmax(logits) over the samples of class y that were classified correctly in the last epoch
    loss = (1 - coefficient) * CE(y) + coefficient * CE(S_y)            averaged over the batch
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._attached import Attachment, attach
from .._checks import Bounds, Loaded, check_counts, check_integer, check_number, check_tensor, shown
from .._distributed import total
from .._passes import current_pass
from .._privacy import check_unmixed
from ..errors import InvalidArgumentError
from ._masked import filling, masked_classes
from ._undivided import watched

TINY = 1e-12
CLASSES = Bounds(integer=True, least=2, most=2**16)  # their square is kept twice


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``1/B sum_i sum_c -targets_ic log softmax(logits_i)_c``: a scalar, in float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return -(targets.to(dtype) * logits.to(dtype).log_softmax(dim=1)).sum(dim=1).mean()


class OnlineLabelSmoothing(Loaded):
    """Moves a part of the criterion's weight from the label to the network's own mean prediction for that class.

    ``coefficient / B * sum_i (CE(S_y) - CE(y))``

    Add it to the plain cross entropy; the total is then the paper's loss. Like SAF it distils the network into itself.
    Unlike SAF it keeps one row a class, C x C numbers, needs no sample indices, and works on streams of data. It costs
    no pass through the network.

    A class whose logit is -inf, masked out by the network, has no part in the loss: S_y is that of the others.

    In the first epoch S is uniform, which is plain label smoothing. It stays uniform for a class until one of its
    samples is classified correctly. With ``torch.distributed``, `set_epoch` sums the predictions of all ranks, so all
    of them must call it.

    Args:
        num_classes: Number of classes ``C``, at least 2.
        coefficient: Weight of the soft labels, in [0, 1]; 0.5 in the paper.

    Attributes:
        soft_labels: ``S``, float32, shape (C, C), a row for each class.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds.

    Example:
        >>> import torch, flatmin
        >>> smoothing = flatmin.OnlineLabelSmoothing(num_classes=2)
        >>> logits, y = torch.tensor([[2.0, 0.0], [1.0, 3.0]], requires_grad=True), torch.tensor([0, 1])
        >>> smoothing.set_epoch(0)
        >>> loss = torch.nn.functional.cross_entropy(logits, y) + smoothing(logits, y)
        >>> smoothing.set_epoch(1)
        >>> smoothing.soft_labels
        tensor([[0.8808, 0.1192],
                [0.1192, 0.8808]])
    """

    soft_labels: Tensor
    sums: Tensor
    _beside_network: ClassVar[bool] = True  # averages of a network on which it is stored have none

    def __init__(self, num_classes: int, *, coefficient: float = 0.5) -> None:
        super().__init__()
        self.num_classes = num_classes = int(CLASSES.check("num_classes", num_classes))
        self.coefficient = check_number("coefficient", coefficient, least=0, most=1)
        self.register_buffer(
            "soft_labels", torch.full((num_classes, num_classes), 1 / num_classes, dtype=torch.float32)
        )
        # No buffer: DDP overwrites those of a module that is stored on the network with the first rank's.
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float32)
        self._epoch = 0

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Tells it which epoch begins, from 0. Call it before each epoch: it makes the soft labels anew.

        Raises:
            InvalidArgumentError: If ``epoch`` is not an integer of at least 0.
        """
        epoch = check_integer("epoch", epoch, least=0)
        if epoch == self._epoch:
            return
        self._epoch = epoch
        total(self.sums)
        counts = self.sums.sum(dim=1, keepdim=True)  # a row of probabilities sums to 1
        self.soft_labels = torch.where(counts > 0, self.sums / counts.clamp(min=1e-12), self.soft_labels)
        self.sums.zero_()

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Computes what to add to the cross entropy of a batch and, in training mode, collects its predictions.

        Args:
            logits: The network's logits, floating, shape (B, C).
            y: Class indices, int64, shape (B,). On an accelerator the device itself catches one out of range.

        Returns:
            A scalar, float64 if ``logits`` are float64 and float32 otherwise. It is below 0 if the soft labels are
            closer to the predictions than the hard ones. After ``.eval()``, and for logits that need no gradient, as in
            an evaluation, it is 0 and nothing is counted.

        Raises:
            InvalidArgumentError: If a shape or dtype does not fit, or a class index is out of range.
        """
        self._check(logits, y)
        if not self.training or not logits.requires_grad:  # an evaluation
            return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        check_unmixed(logits, "OnlineLabelSmoothing", "take flatmin.SAF, whose target is a sample's own past output")
        now = current_pass()
        if now is None or not now.second:  # counted once a step, at the weights
            self._count(logits.detach(), y)
        hard = nn.functional.one_hot(y, self.num_classes)
        masked = masked_classes(logits)
        soft = self.soft_labels[y].masked_fill(masked, 0)
        soft = torch.where(masked.any(dim=1, keepdim=True), soft / soft.sum(dim=1, keepdim=True).clamp(min=TINY), soft)
        logits = logits.masked_fill(masked, filling(logits.dtype))  # 0 * log 0 is 0
        found = self.coefficient * soft_cross_entropy(logits, soft - hard.masked_fill(masked, 0))
        return watched(found, "OnlineLabelSmoothing")

    def get_extra_state(self) -> Tensor:
        """Puts the epoch into ``state_dict``, as a tensor, which any format can store."""
        return torch.tensor([self._epoch])

    def set_extra_state(self, state: Tensor) -> None:
        """Reads the epoch from a ``state_dict``."""
        (self._epoch,) = check_counts("state", state, (1,))

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Saves and loads the soft labels with ``optimizer``, a plain one or flatmin's. Attach before a load.

        Returns:
            A handle; its ``remove()`` detaches.
        """
        return attach(self, optimizer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnlineLabelSmoothing":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.sums = fn(self.sums)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "sums"] = self.sums

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        key = f"{prefix}sums"
        own = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, *rest)
        if key not in state_dict:
            missing_keys.append(key)
        elif isinstance(found := state_dict[key], Tensor) and found.shape == self.sums.shape:
            self.sums.copy_(found)
        else:
            rest[-1].append(f"{key} must be a tensor of shape {tuple(self.sums.shape)}, got {shown(found)}.")

    def extra_repr(self) -> str:
        """Shows the hyperparameters when printed."""
        return f"num_classes={self.num_classes}, coefficient={self.coefficient}"

    def _count(self, logits: Tensor, y: Tensor) -> None:
        predictions = logits.to(self.sums.dtype).softmax(dim=1)
        correct = (logits.argmax(dim=1) == y) & predictions.isfinite().all(dim=1)
        self.sums.index_add_(0, y, predictions.where(correct[:, None], 0))  # masked, since selecting would wait

    def _check(self, logits: Tensor, y: Tensor) -> None:
        if not isinstance(y, Tensor):
            raise InvalidArgumentError(f"y must be a tensor of class indices, got {shown(y)}")
        if isinstance(logits, Tensor) and y.is_floating_point() and not logits.is_floating_point():
            raise InvalidArgumentError(
                f"logits must be floating and y class indices, got {shown(logits)} and {shown(y)}: the logits come "
                "first, smoothing(logits, y)"
            )
        if (
            check_tensor("logits", logits).ndim != 2
            or logits.shape[1] != self.num_classes
            or not logits.is_floating_point()
        ):
            raise InvalidArgumentError(
                f"logits must be floating and of shape (batch, {self.num_classes}), got {logits.dtype} of shape "
                f"{tuple(logits.shape)}; OnlineLabelSmoothing was made for num_classes={self.num_classes}"
            )
        if y.dtype != torch.int64 or y.shape != logits.shape[:1]:
            raise InvalidArgumentError(
                f"y must be class indices, int64 of shape ({len(logits)},), got {y.dtype} of shape {tuple(y.shape)}; "
                "soft labels (mixup, cutmix) belong to no class"
            )
        if y.device.type == "cpu" and len(y) > 0:  # reading values elsewhere would stall the step
            low, high = (int(bound) for bound in y.aminmax())
            if low < 0 or high >= self.num_classes:
                raise InvalidArgumentError(
                    f"y must lie in [0, {self.num_classes}), got values from {low} to {high}; leave out the rows of "
                    "samples without a class, such as cross_entropy's ignore_index"
                )
        if self.sums.device != logits.device:
            raise InvalidArgumentError(
                f"logits are on {logits.device} and the soft labels on {self.sums.device}; "
                f"move them once, after creating it: smoothing.to('{logits.device}')"
            )

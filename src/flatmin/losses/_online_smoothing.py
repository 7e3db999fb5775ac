"""Online label smoothing: the soft labels of a class are what the network said of it in the epoch before.

*Delving Deep into Label Smoothing*, Zhang et al., IEEE TIP 2021, arXiv 2011.12562::

    S_y = mean over the samples of class y classified rightly in the last epoch of softmax(logits)
    loss = (1 - coefficient) * CE(y) + coefficient * CE(S_y)            averaged over the batch
"""

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_number
from .._distributed import total
from ..errors import InvalidArgumentError


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``1/B sum_i sum_c -targets_ic log softmax(logits_i)_c``: a scalar, in float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return -(targets.to(dtype) * logits.to(dtype).log_softmax(dim=1)).sum(dim=1).mean()


class OnlineLabelSmoothing(nn.Module):
    """Moves a part of the criterion's weight from the label to what the network itself says of the label's class.

    It is added to the plain cross entropy, as SAF and MESA are: ``coefficient / B * sum_i (CE(S_y) - CE(y))``, which
    makes of the sum what the paper has. Like SAF it distils the network into itself; unlike SAF it keeps one row a
    class, C x C numbers, needs no samples' indices, and works on streams of data. It costs no pass.

    In the first epoch, before there is anything to go by, S is uniform, which is plain label smoothing; so it stays for
    a class of which no sample is classified rightly. Under ``torch.distributed`` what is counted on all ranks is summed
    in `set_epoch`, which all of them have to call.

    Args:
        num_classes: Number of classes ``C``.
        coefficient: Weight of the soft labels, in [0, 1]; .5 in the paper.

    Attributes:
        soft_labels: ``S``, float32, shape (C, C), a row for each class.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds.

    Example:
        >>> import torch, flatmin
        >>> smoothing = flatmin.OnlineLabelSmoothing(num_classes=2)
        >>> logits, y = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
        >>> smoothing.set_epoch(0)
        >>> loss = torch.nn.functional.cross_entropy(logits, y) + smoothing(logits, y)
        >>> smoothing.set_epoch(1)
        >>> smoothing.soft_labels
        tensor([[0.8808, 0.1192],
                [0.1192, 0.8808]])
    """

    soft_labels: Tensor
    sums: Tensor

    def __init__(self, num_classes: int, *, coefficient: float = 0.5) -> None:
        super().__init__()
        self.num_classes = check_integer("num_classes", num_classes, least=2)
        self.coefficient = check_number("coefficient", coefficient, least=0, most=1)
        self.register_buffer("soft_labels", torch.full((num_classes, num_classes), 1 / num_classes))
        self.register_buffer("sums", torch.zeros(num_classes, num_classes))
        self._epoch = 0

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, from 0; call it before each. What the last one has said is what counts from now on.

        Raises:
            InvalidArgumentError: If ``epoch`` is not an integer of at least 0.
        """
        if check_integer("epoch", epoch, least=0) == self._epoch:
            return
        self._epoch = epoch
        total(self.sums)
        counts = self.sums.sum(dim=1, keepdim=True)  # a row of probabilities sums to 1
        self.soft_labels = torch.where(counts > 0, self.sums / counts.clamp(min=1e-12), self.soft_labels)
        self.sums.zero_()

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Computes what is to be added to the cross entropy of a batch, and counts it in training mode.

        Args:
            logits: The network's outputs, floating, shape (B, C).
            y: Class numbers, int64, shape (B,). On an accelerator one out of range is caught by the device itself.

        Returns:
            A scalar, float64 if ``logits`` are float64 and float32 otherwise; below 0 where the soft labels are closer
            to what the network says than the hard one. 0 after ``.eval()``.

        Raises:
            InvalidArgumentError: If a shape or dtype is another, or a class number is out of range.
        """
        self._check(logits, y)
        if not self.training:
            return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        self._count(logits.detach(), y)
        hard = nn.functional.one_hot(y, self.num_classes)
        return self.coefficient * soft_cross_entropy(logits, self.soft_labels[y] - hard)

    def get_extra_state(self) -> Tensor:
        """Carries the epoch in ``state_dict``, as a tensor, so that any format can store it."""
        return torch.tensor([self._epoch])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the epoch from a ``state_dict``."""
        self._epoch = int(state)

    def extra_repr(self) -> str:
        """Shows the hyperparameters when printed."""
        return f"num_classes={self.num_classes}, coefficient={self.coefficient}"

    def _count(self, logits: Tensor, y: Tensor) -> None:
        said = logits.to(self.sums.dtype).softmax(dim=1)
        right = (logits.argmax(dim=1) == y) & said.isfinite().all(dim=1)
        self.sums.index_add_(0, y, said.where(right[:, None], 0))  # masked and not selected: no wait for the device

    def _check(self, logits: Tensor, y: Tensor) -> None:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not logits.is_floating_point():
            raise InvalidArgumentError(
                f"logits must be floating and of shape (batch, {self.num_classes}), got {logits.dtype} of shape "
                f"{tuple(logits.shape)}; OnlineLabelSmoothing was made for num_classes={self.num_classes}"
            )
        if y.dtype != torch.int64 or y.shape != logits.shape[:1]:
            raise InvalidArgumentError(
                f"y must be class numbers, int64 of shape ({len(logits)},), got {y.dtype} of shape {tuple(y.shape)}; "
                "soft labels (mixup, cutmix) belong to no class"
            )
        if y.device.type == "cpu" and len(y) > 0:  # elsewhere to look would stall the step
            low, high = (int(bound) for bound in y.aminmax())
            if low < 0 or high >= self.num_classes:
                raise InvalidArgumentError(
                    f"y must lie in [0, {self.num_classes}), got values from {low} to {high}; of samples without a "
                    "class, such as cross_entropy's ignore_index, leave out the rows"
                )
        if self.sums.device != logits.device:
            raise InvalidArgumentError(
                f"logits are on {logits.device} and the soft labels on {self.sums.device}; "
                f"move them once, after creating it: smoothing.to('{logits.device}')"
            )

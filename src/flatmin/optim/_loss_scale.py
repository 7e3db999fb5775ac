"""What a step in float16 has to do with torch's ``GradScaler``, by its public functions alone."""

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ._foreach import scale_


class LossScale:
    """The loss scale of one step; the scaler is told of one pass a step, which is all that it allows.

    Args:
        scaler: The scaler; one that is not enabled scales by 1.
        optimizer: Whose step it is.
    """

    def __init__(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._scaler, self._optimizer = scaler, optimizer
        self._factor = 0.0  # not known before the first backward pass, which may choose it

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self._scaler.is_enabled()

    def factor(self) -> float:
        """What the losses of this step are multiplied with. Waits for the device, once a step."""
        if not self._factor:
            self._factor = self._scaler.get_scale()
        return self._factor

    def remove(self, gradients: list[Tensor], *, last: bool) -> None:
        """Divides by the scale: of the last pass's gradients the scaler does it, and notes that they are finite."""
        if last:
            self._scaler.unscale_(self._optimizer)
        elif self.enabled:
            scale_(gradients, 1 / self.factor())

    def overflowed(self, gradients: list[Tensor]) -> None:
        """Has the scaler note that a pass was not finite, on this rank too where it was so on another alone."""
        if self.enabled:
            for gradient in gradients:
                gradient.fill_(float("inf"))
            self._scaler.unscale_(self._optimizer)

"""What turns rows of logits into bytes, and back: the part in which histories differ."""

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self


class Codec(nn.Module, ABC):
    """Turns each row of logits into ``row_bytes`` bytes, and back.

    What you make, such as ``LowRank(rank=64)``, is a description that knows no sizes. A `History` takes a copy of it,
    bound to the history's sizes, and the description never changes: give it to as many histories as you like, they
    share nothing.

    A codec of your own is a subclass with `prepare`, `encode`, `decode`, `compare` and `describe`, and `begin_epoch`
    if it learns. What it has to remember belongs into buffers, made in `prepare`: ``state_dict`` then carries it.

    Attributes:
        merges: Whether `compare` gives other outcomes than the logits themselves; say so in the class. It must then
            depend on its first two arguments alone, so that `torch.compile` can compile it.
        num_classes: Number of classes ``C``. This and those below exist once the codec is bound.
        lag: The history's lag in epochs; 1 for a running mean.
        temperature: Temperature of the loss.
        momentum: Momentum of the running mean, or None.
        row_bytes: Bytes of a row.
        mixes_samples: Of the class: whether a row depends on other samples, so that training would not be private.
    """

    merges: ClassVar[bool] = False
    mixes_samples: ClassVar[bool] = False

    num_classes: int
    lag: int
    temperature: float
    momentum: float | None
    row_bytes: int

    def bind(self, num_classes: int, *, lag: int, temperature: float, momentum: float | None) -> "Self":
        """Returns a copy of this description that is made for the sizes given; `History` calls it.

        Args:
            num_classes: Number of classes ``C``, at least 2.
            lag: The history's lag in epochs, at least 1.
            temperature: Temperature of the loss, > 0.
            momentum: Momentum of the running mean, or None if the history keeps none.

        Raises:
            InvalidArgumentError: If this codec is bound already, or does not fit the sizes.
        """
        name = type(self).__name__
        if self.is_bound:
            raise InvalidArgumentError(f"this {name} belongs to another history: make a new one, {name}(...)")
        bound = copy.deepcopy(self)
        bound.num_classes, bound.lag, bound.temperature, bound.momentum = num_classes, lag, temperature, momentum
        bound.row_bytes = bound.prepare()
        return bound

    @property
    def is_bound(self) -> bool:
        """Whether this codec belongs to a history, and so has sizes."""
        return "row_bytes" in self.__dict__

    @abstractmethod
    def prepare(self) -> int:
        """Checks the codec's arguments against its sizes, makes its buffers, and returns the bytes of a row.

        Raises:
            InvalidArgumentError: If they do not fit.
        """

    @abstractmethod
    def encode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Turns logits into rows.

        Args:
            logits: Detached logits of the current epoch, floating, shape (B, C).

        Returns:
            The rows, uint8, shape (B, row_bytes), and a bool mask, shape (B,), of the rows worth keeping. A row that
            is not finite never is.
        """

    @abstractmethod
    def decode(self, rows: Tensor, epoch: int, logits: Tensor) -> Tensor:
        """Turns rows into logits again, up to a constant for each row.

        Args:
            rows: Rows that `encode` made, uint8, shape (B, row_bytes).
            epoch: The epoch in which they were made.
            logits: The current logits of the same samples, shape (B, C). They stand in for what a row leaves out.

        Returns:
            The past logits, shape (B, C), finite everywhere.
        """

    @abstractmethod
    def compare(self, logits: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Gives the current and the past logits over the same outcomes, for the trajectory loss.

        Args:
            logits: The current logits, shape (B, C). Gradients flow through them.
            rows: The past rows, uint8, shape (B, row_bytes).
            epoch: The epoch in which they were made.

        Returns:
            Two tensors of shape (B, M). M is C, or less if classes are merged.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what another codec must share with this one to read its rows, as plain values by name."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepares for batches of ``epoch``. Called before every batch; does nothing in a codec that does not learn."""

    def extra_repr(self) -> str:
        """Shows the arguments when printed."""
        return ", ".join(f"{name}={value}" for name, value in self.describe().items())

    def _refuse_mean(self) -> None:
        """Raises `InvalidArgumentError` if the history keeps a running mean."""
        if self.momentum is not None:
            raise InvalidArgumentError(
                f"momentum={self.momentum} and {type(self).__name__} exclude each other: keep a running mean in "
                "history='dense', 'half' or 'int8'"
            )

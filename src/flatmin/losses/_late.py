"""Says where a training ends before the loss that is added to it begins, for trainers that know how long it is."""

import warnings
from typing import TYPE_CHECKING

from .._warn import depth_in_package
from ..errors import FlatminWarning

if TYPE_CHECKING:
    from ._mesa import MESA
    from ._saf import SAF


def warn_if_late(loss: "SAF | MESA", epochs: int) -> None:
    """Warns where ``loss`` is 0 in all of the epochs.

    Args:
        loss: The loss.
        epochs: How many there are, counted from the first of the training, also where it is resumed.
    """
    first = loss.start_epoch
    lag = getattr(loss, "lag", 0)
    if epochs > max(first, lag) or not loss.coefficient:
        return
    lower = f"start_epoch={first}" if first >= epochs else f"lag={lag}"
    if first >= epochs and lag >= epochs:
        lower += f" and lag={lag}"
    name = type(loss).__name__
    warnings.warn(
        f"{name} is 0 before epoch {max(first, lag)}, counted from 0, and this training has "
        f"{'one epoch' if epochs == 1 else f'{epochs} epochs'}, so that it is trained without: lower {lower}, or train "
        "longer",
        FlatminWarning,
        stacklevel=depth_in_package(),
    )

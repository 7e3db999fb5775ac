"""How a network's output is compared with its average's: which loss, over which positions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice
from .._privacy import clipped
from ..errors import InvalidArgumentError
from ._link import LinkCheck
from ._outputs import find_logits, first_tensor
from ._trajectory import binary_trajectory_loss, feature_distance, resolve_class_dim, trajectory_loss

IGNORED = -100  # the label that cross_entropy leaves out
Distance = str | Callable[[Any, Any], Tensor] | None


class Comparison:
    """Compares outputs in one way.

    Args:
        output: Takes the logits from what a network returns; None: as `find_logits` does.
        class_dim: Which dimension is the classes'; None: the second of two.
        link: "softmax", or "sigmoid" for logits that are independent.
        distance: None, "features", or a function of both outputs.

    Raises:
        InvalidArgumentError: If an argument is none of these, or they exclude each other.
    """

    def __init__(
        self, *, output: Callable[[Any], Any] | None, class_dim: int | None, link: str, distance: Distance
    ) -> None:
        if output is not None and not callable(output):
            raise InvalidArgumentError(f"output must be a function of what model returns, got {output!r}")
        if class_dim is not None and (isinstance(class_dim, bool) or not isinstance(class_dim, int) or class_dim == 0):
            raise InvalidArgumentError(
                f"class_dim must be an integer that is not 0, the batch's dimension, or None, got {class_dim!r}"
            )
        if distance not in (None, "features") and not callable(distance):
            raise InvalidArgumentError(
                f"distance must be 'features', a function of both outputs, or None, got {distance!r}"
            )
        self.output = output
        self.class_dim = class_dim
        self.link = check_choice("link", link, ("softmax", "sigmoid"))
        self.distance = distance
        if distance is not None and link != "softmax":
            raise InvalidArgumentError(f"link={link!r} and distance={distance!r} exclude each other: leave one out")
        self._link_check = LinkCheck("MESA", "write MESA(..., ")

    def chosen(self) -> dict[str, Any]:
        """The arguments that are not the defaults, to be printed."""
        values = {"class_dim": self.class_dim, "link": self.link, "distance": self.distance}
        return {name: value for name, value in values.items() if value not in (None, "softmax")}

    def outputs(self, returned: Any) -> Any:
        """The logits, or features, in what a network has returned."""
        return find_logits(returned, self.output)

    def check(self, logits: Any) -> None:
        """Raises `InvalidArgumentError` if the network's logits cannot be compared in this way."""
        if callable(self.distance):
            first_tensor(logits)
            return
        if not isinstance(logits, Tensor):
            raise InvalidArgumentError(
                f"logits must be a tensor, got {type(logits).__name__}; say where they are in what the model returns, "
                "output=lambda out: out['logits']"
            )
        if not logits.is_floating_point() or logits.ndim == 0:
            raise InvalidArgumentError(
                f"logits must be floating and of shape (batch, classes), got {logits.dtype} of shape "
                f"{tuple(logits.shape)}"
            )
        if self.link == "softmax" and logits.shape[resolve_class_dim(logits, self.class_dim)] == 1:
            raise InvalidArgumentError(
                f"logits must be of two classes at least, got shape {tuple(logits.shape)}: the softmax of a single "
                "logit is constant; write link='sigmoid' for a binary problem, or distance=... for a regression, such "
                "as distance=torch.nn.functional.mse_loss"
            )

    def watch(self, logits: Any) -> None:
        """Looks at the gradient that the network's logits will get, see `LinkCheck`."""
        if self.link == "softmax" and self.distance is None:
            self._link_check(logits, resolve_class_dim(logits, self.class_dim))

    def counted(self, where: Any, kwargs: Mapping[str, Any], logits: Any) -> Tensor | None:
        """Which positions count, bool, on the logits' device; None: all.

        Args:
            where: What the caller said; None: ``labels`` among the arguments say it.
            kwargs: The network's keyword arguments.
            logits: The network's logits.

        Raises:
            InvalidArgumentError: If ``where`` is of another dtype or shape, or there is a distance of the user's own.
        """
        if callable(self.distance):
            if where is not None:
                raise InvalidArgumentError("where must be left out where distance is a function: let it choose itself")
            return None
        single = self.link == "sigmoid"
        shape = list(logits.shape)
        if not single:
            del shape[resolve_class_dim(logits, self.class_dim)]
        if where is None:
            labels = kwargs.get("labels")
            if not isinstance(labels, Tensor) or labels.is_floating_point() or list(labels.shape) != shape:
                return None
            return labels.ne(IGNORED).to(logits.device, non_blocking=True)
        found = list(where.shape) if isinstance(where, Tensor) and where.dtype == torch.bool else None
        if found is None or found != (shape[: len(found)] if single else shape):
            got = f"{where.dtype} of shape {tuple(where.shape)}" if isinstance(where, Tensor) else type(where).__name__
            raise InvalidArgumentError(
                f"where must be a bool tensor of shape {tuple(shape)}, that of the logits without their classes, got "
                f"{got}"
            )
        chosen: Tensor = where
        return chosen.to(logits.device, non_blocking=True)

    def loss(self, logits: Any, target: Any, where: Tensor | None, temperature: float) -> Tensor:
        """The loss, as a mean over what counts; 0 if nothing does.

        Raises:
            InvalidArgumentError: If what the average has returned is no tensor, or of another shape.
        """
        if callable(self.distance):
            return clipped(self.distance(logits, target), first_tensor(logits))
        if not isinstance(target, Tensor) or target.shape != logits.shape:
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            way = (
                "call mesa(logits, x) with what the model was called with, and say where the logits are in what it "
                "returns, output=lambda out: out['logits']"
            )
            if isinstance(target, Tensor) and target.ndim > logits.ndim:  # tokens or pixels, put in rows
                way = (
                    "give it the logits as the model returned them, with class_dim=1 for maps (B, C, H, W) and -1 for "
                    "tokens (B, L, C), and where= says which of them count"
                )
            raise InvalidArgumentError(
                f"the averaged model returned {got} where logits of shape {tuple(logits.shape)} were expected; {way}"
            )
        if self.distance is not None:
            loss = feature_distance(logits, target, class_dim=self.class_dim, mask=where)
        elif self.link == "sigmoid":
            loss = binary_trajectory_loss(logits, target, temperature=temperature, mask=where)
        else:
            loss = trajectory_loss(logits, target, temperature=temperature, mask=where, class_dim=self.class_dim)
        return loss if where is None else loss * (where.numel() / where.sum().clamp(min=1).to(loss.dtype))

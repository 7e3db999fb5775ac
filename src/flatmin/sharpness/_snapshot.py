"""The loss as a function of the weights alone, from the weights and buffers that the model has now."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import _rng
from .._checks import shown
from ..errors import InvalidArgumentError, NoDirectionError, NonFiniteLossError
from ._batches import Batch, Batches, cast
from ._mean import counting

Loss = Callable[[Any, Any], Tensor]
_ONCE = ("is not implemented", "double backward", "differentiate twice", "once_differentiable")
_PRIME = 1_000_003  # between the numbers of two seeds there is room for as many batches


class Snapshot:
    """The mean loss over the batches, its gradient and its Hessian, as functions of one flat vector of weights.

    The model's own parameters and buffers are not touched: copies take their place for the time of a call.

    Args:
        model: In the modes that it is measured in.
        loss_fn: A mean over the batch.
        batches: What to measure on.
        dtype: To compute in.
        normalise_logits: Whether the loss is that of normalised logits.
        batch_statistics: Whether layers are in training mode that move their buffers.

    Attributes:
        weights: The trainable parameters, one after the other, shape (n,).
        shapes: Of these parameters, by name.
        buffers: The model's, by name.
        device: Where the weights are.
        dtype: Of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Batches,
        *,
        dtype: torch.dtype,
        normalise_logits: bool,
        batch_statistics: bool,
    ) -> None:
        self.batches = batches
        self._model, self._loss_fn, self._count = model, loss_fn, counting(loss_fn)
        self._normalise_logits, self._batch_statistics = normalise_logits, batch_statistics
        trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in trainable.items()}
        self.weights = self.flat(trainable, dtype)
        self.device, self.dtype = self.weights.device, dtype
        constants = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self._constants = {name: cast(p, self.device, dtype) for name, p in constants.items()}
        self.buffers = {name: cast(buffer, self.device, dtype).clone() for name, buffer in model.named_buffers()}
        batches.place(self.device, dtype, self._fastest())

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return self.batches.samples

    def loss(self, weights: Tensor, batches: Iterable[Batch] | None = None) -> float:
        """The mean loss over all batches, or over some."""
        total, count = 0.0, 0.0
        with torch.no_grad():
            for number, x, y, size in self._each(batches):
                total += float(self._call(weights, x, y, number)) * size
                count += size
        return total / count

    def gradient(self, weights: Tensor, batches: Iterable[Batch] | None = None) -> tuple[float, Tensor]:
        """The mean loss and its gradient.

        Raises:
            NonFiniteLossError: If one of them is infinite or not a number.
        """
        leaf = weights.detach().requires_grad_()
        total, count, gradient = 0.0, 0.0, torch.zeros_like(weights)
        for number, x, y, size in self._each(batches):
            loss = self._depending(self._call(leaf, x, y, number))
            gradient.add_(torch.autograd.grad(loss, leaf)[0], alpha=size)
            total += float(loss.detach()) * size
            count += size
        check_finite("the loss", total / count)
        check_finite("the gradient's norm", float(gradient.norm()))
        return total / count, gradient / count

    def hessian_product(self, vectors: Tensor) -> Tensor:
        """The Hessian at the model's weights times some vectors, shape (k, n) as is the result.

        Raises:
            NonFiniteLossError: If one is infinite or not a number.
        """
        leaf = self.weights.detach().requires_grad_()
        products, count = torch.zeros_like(vectors), 0.0
        for number, x, y, size in self._each():
            with sdpa_kernel(SDPBackend.MATH), _twice_differentiable():  # fused attention is not
                loss = self._depending(self._call(leaf, x, y, number))
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
                for vector, product in zip(vectors, products, strict=True):
                    if gradient.requires_grad:  # not where the loss is linear
                        (part,) = torch.autograd.grad(gradient, leaf, vector, retain_graph=True)
                        product.add_(part, alpha=size)
            count += size
        check_finite("a product with the Hessian", float(products.sum()))
        return products / count

    def flat(self, tensors: "dict[str, Tensor]", dtype: torch.dtype | None = None) -> Tensor:
        """Puts tensors, by the names of the trainable parameters, one after the other."""
        return torch.cat([tensors[name].detach().reshape(-1).to(dtype or self.dtype) for name in self.shapes])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a flat vector by the parameters' names, as views."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def scales(self, eta: float) -> Tensor:
        """ASAM's ``T``: ``|w| + eta`` for weights of two dimensions and more, 1 for biases and normalisation layers."""
        parts = self.split(self.weights)
        return self.flat({n: p.abs() + eta if p.ndim >= 2 else torch.ones_like(p) for n, p in parts.items()})

    def _each(self, batches: Iterable[Batch] | None = None) -> Iterator[tuple[int, Tensor, Any, float]]:
        """The batches of a pass, all or some, each with its number in it and how much it counts, if it does."""
        empty = True
        for number, (x, y) in enumerate(self.batches if batches is None else batches):
            if count := self.count(y):
                empty = False
                yield number, x, y, count
        if empty:
            raise InvalidArgumentError(
                "the loss ignores every target, so it has no mean: check ignore_index and weight"
            )

    def count(self, y: Any) -> float:
        """How much a batch counts in the mean over all, by its targets: its samples, see `counting`."""
        return len(y) if self._count is None else self._count(y)

    def total(self) -> float:
        """How much all batches count."""
        found = self.samples if self._count is None else sum(self.count(y) for _, y in self.batches)
        if not found:
            raise _nothing_counts()
        return found

    def _call(self, weights: Tensor, x: Tensor, y: Any, number: int) -> Tensor:
        """The loss of a batch; ``number`` draws what the network or the loss draws, the same in every pass."""
        # Running statistics move in training mode: in a copy, that the next pass does not see.
        buffers = self.buffers
        if self._batch_statistics:
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        with _rng.seeded(self.device, (self.batches.seed * _PRIME + number) % 2**63), _said_of(x, y):
            output = functional_call(self._model, ({**self.split(weights), **self._constants}, buffers), (x,))
            loss = self._loss_fn(normalised(output) if self._normalise_logits else output, y)
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidArgumentError(f"loss_fn must return the mean over the batch, got {found}")
        return loss

    def _depending(self, loss: Tensor) -> Tensor:
        """Returns a loss that has a gradient."""
        if not loss.requires_grad:
            raise InvalidArgumentError(
                "the loss does not depend on any parameter with requires_grad, so it has no slope: unfreeze what is to "
                "be perturbed, and look for detach() or no_grad() in the model and the loss_fn"
            )
        return loss

    def check_changes(self) -> None:
        """Refuses a loss that is constant; one without a slope, such as the error rate, has only to change somewhere.

        Raises:
            InvalidArgumentError: If it depends on no weight.
        """
        for number, x, y, _ in self._each():
            loss = self._call(self.weights.detach().requires_grad_(), x, y, number)
            if not loss.requires_grad:
                generator = torch.Generator().manual_seed(0)
                far = (torch.randn(self.weights.shape, generator=generator).to(self.weights) for _ in range(8))
                if all(torch.equal(self._call(weights, x, y, number), loss) for weights in far):
                    self._depending(loss)
            return

    def _fastest(self) -> torch.memory_format:
        """Images with their channels last where the network can take them: twice as fast on a CPU, pooling tenfold."""
        images = self.batches.images()
        if self.device.type != "cpu" or images is None:
            return torch.preserve_format
        x, y = images
        try:
            y = y.to(self.device) if isinstance(y, Tensor) else y
            self._call(self.weights, cast(x, self.device, self.dtype, torch.channels_last), y, 0)
        except InvalidArgumentError as error:
            if type(error.__cause__) is not RuntimeError:
                raise
            return torch.preserve_format  # of a view that this layout does not allow
        return torch.channels_last


def normalised(logits: Tensor) -> Tensor:
    """Each sample's logits, centred and divided by their length, so that nothing but their direction counts.

    As Andriushchenko et al. 2023 do, after Tsuzuku et al. 2020.

    Args:
        logits: Shape (batch, classes, ...), of three classes or more: one number has no direction, and the difference
            of two has but its sign, which does not change by degrees.

    Raises:
        NoDirectionError: If there are fewer classes, or a sample's logits are all equal.
    """
    classes = logits.shape[1] if logits.ndim > 1 else 1
    if classes < 3:
        raise NoDirectionError(
            f"normalise_logits needs at least three logits a sample, got {classes}: of fewer only the sign is left, so "
            "what would be measured is rounding; measure with normalise_logits=False"
        )
    centred = logits - logits.mean(dim=1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    if bool((lengths == 0).any()):
        raise NoDirectionError(
            "normalise_logits: all logits of a sample are equal, as of a head whose weights are 0, so they have no "
            "direction; measure with normalise_logits=False"
        )
    return centred / lengths.clamp_min(1e-10)


@contextmanager
def _said_of(x: Tensor, y: Any) -> Iterator[None]:
    """Says of which batch it is what torch says of shapes and types that do not fit; more special errors pass."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if type(error) not in (RuntimeError, ValueError, TypeError, IndexError) or any(w in str(error) for w in _ONCE):
            raise
        raise InvalidArgumentError(
            f"the model or the loss_fn cannot be called with a batch of x, {shown(x)}, and y, {shown(y)}: "
            f"{' '.join(str(error).split()):.300}"
        ) from error


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Says in words of its own what torch says of a layer without a second derivative."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _ONCE):
            raise
        raise InvalidArgumentError(
            f"the model or the loss_fn has no second derivative, which the Hessian needs ({error}); sam_sharpness and "
            "average_sharpness need none"
        ) from error


def _nothing_counts() -> InvalidArgumentError:
    return InvalidArgumentError("the loss ignores every target, so it has no mean: check its ignore_index and weight")


def check_finite(what: str, value: float) -> float:
    """Returns ``value`` unless it is infinite or not a number."""
    if not math.isfinite(value):
        raise NonFiniteLossError(f"{what} is {value}, so there is nothing to measure; has the training diverged?")
    return value

"""The loss as a function of the weights alone, over fixed batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._checks import check_integer
from .._rng import seed_all
from ..errors import InvalidArgumentError, NonFiniteLossError
from ._state import undisturbed

Loss = Callable[[Any, Any], Tensor]
Batch = tuple[Tensor, Any]
KEPT = 2**28  # bytes of batches that are kept where the model is; more are read again for each pass


class Objective:
    """The mean loss over the batches, its gradient and its Hessian, as functions of one flat vector of weights.

    The model's own parameters and buffers are not touched: copies take their place for the time of a call.

    Attributes:
        weights: The trainable parameters, one after the other, shape (n,).
        shapes: Of these parameters, by name.
        samples: How many there are in all batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Iterable[Any],
        *,
        normalise_logits: bool,
        batch_statistics: bool,
        dtype: torch.dtype,
        samples: int | None,
        seed: int,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.normalise_logits, self.batch_statistics, self.seed = normalise_logits, batch_statistics, seed
        trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in trainable.items()}
        self.weights = self.flat(trainable, dtype)
        self.device, self.dtype = self.weights.device, dtype
        constants = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._constants = {name: self._cast(p.detach()) for name, p in constants.items()}
        self.buffers = {name: self._cast(buffer).clone() for name, buffer in model.named_buffers()}
        self._batches = batches
        self._kept: list[Batch] | None = None
        self._layout = torch.preserve_format
        self._layout = self._fastest()
        sizes = [len(y) for _, y in self]
        if samples is not None:
            self._kept = self._subset(samples, sizes)
            sizes = [len(y) for _, y in self._kept]
        else:
            self._kept = self._small()
        self.samples = sum(sizes)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, where the model is; the same at every call."""
        if self._kept is not None:
            yield from self._kept
            return
        seed_all(self.seed, accelerators=False)  # what loading draws from
        empty = True
        for batch in self._batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
                raise InvalidArgumentError(f"batches must be pairs (x, y), x a tensor, got {type(batch).__name__}")
            x, y = batch
            y = y.to(self.device) if isinstance(y, Tensor) else y
            if len(y) > 0:
                empty = False
                yield self._cast(x, self._layout if x.ndim == 4 else torch.preserve_format), y
        if empty:
            raise InvalidArgumentError("batches are empty: there is no sample to measure the loss on")

    def loss(self, weights: Tensor, batches: Iterable[Batch] | None = None) -> float:
        """The mean loss over all batches, or over some."""
        total, count = 0.0, 0
        with torch.no_grad():
            for x, y in self if batches is None else batches:
                total += float(self._call(weights, x, y)) * len(y)
                count += len(y)
        return total / count

    def gradient(self, weights: Tensor, batches: Iterable[Batch] | None = None) -> tuple[float, Tensor]:
        """The mean loss and its gradient.

        Raises:
            NonFiniteLossError: If one of them is infinite or not a number.
        """
        leaf = weights.detach().requires_grad_()
        total, count, gradient = 0.0, 0, torch.zeros_like(weights)
        for x, y in self if batches is None else batches:
            loss = self._call(leaf, x, y)
            gradient.add_(torch.autograd.grad(loss, leaf)[0], alpha=len(y))
            total += float(loss.detach()) * len(y)
            count += len(y)
        check_finite("the loss", total / count)
        check_finite("the gradient's norm", float(gradient.norm()))
        return total / count, gradient / count

    def hessian_product(self, vectors: Tensor) -> Tensor:
        """The Hessian at the model's weights times some vectors, shape (k, n) as is the result.

        Raises:
            NonFiniteLossError: If one is infinite or not a number.
        """
        leaf = self.weights.detach().requires_grad_()
        products, count = torch.zeros_like(vectors), 0
        for x, y in self:
            # Fused attention has no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                (gradient,) = torch.autograd.grad(self._call(leaf, x, y), leaf, create_graph=True)
                for vector, product in zip(vectors, products, strict=True):
                    if gradient.requires_grad:  # not where the loss is linear
                        (part,) = torch.autograd.grad(gradient, leaf, vector, retain_graph=True)
                        product.add_(part, alpha=len(y))
            count += len(y)
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

    def _call(self, weights: Tensor, x: Tensor, y: Any) -> Tensor:
        # Running statistics move in training mode: in a copy, that the next pass does not see.
        buffers = self.buffers
        if self.batch_statistics:
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(self.model, ({**self.split(weights), **self._constants}, buffers), (x,))
        loss = self.loss_fn(normalised(output) if self.normalise_logits else output, y)
        if loss.ndim > 0:
            raise InvalidArgumentError(f"loss_fn must return the mean over the batch, got shape {tuple(loss.shape)}")
        return loss

    def _cast(self, tensor: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype, memory_format=layout)

    def _fastest(self) -> torch.memory_format:
        """Images with their channels last where the network can take them: twice as fast on a CPU, pooling tenfold."""
        x, y = next(iter(self))
        try:
            if self.device.type == "cpu" and x.ndim == 4:
                self._call(self.weights, x[:2].to(memory_format=torch.channels_last), y[:2])
                return torch.channels_last
        except RuntimeError:  # of a view that this layout does not allow
            pass
        return torch.preserve_format

    def _small(self) -> list[Batch] | None:
        """The batches, if they fit in `KEPT` bytes."""
        kept, size = [], 0
        for x, y in self:
            size += x.nbytes
            if size > KEPT:
                return None
            kept.append((x, y))
        return kept

    def _subset(self, samples: int, sizes: list[int]) -> list[Batch]:
        """Draws samples, and cuts them into batches of the first one's size."""
        total = sum(sizes)
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[:samples].sort().values
        parts, start = [], 0
        for (x, y), size in zip(self, sizes, strict=True):
            own = chosen[(chosen >= start) & (chosen < start + size)] - start
            parts.append((x[own.to(x.device)], y[own.to(y.device)]))
            start += size
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        return list(zip(torch.split(x, sizes[0]), torch.split(y, sizes[0]), strict=True))


@contextmanager
def objective(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    normalise_logits: bool,
    batch_statistics: bool,
    dtype: torch.dtype | None,
    samples: int | None,
    seed: int,
) -> Iterator[Objective]:
    """Checks what all measures take, and gives an `Objective` for as long as the model is `undisturbed`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise InvalidArgumentError(f"the model, {type(model).__name__}, has no parameter with requires_grad")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise InvalidArgumentError(
            f"batches must be something that can be gone through again, such as a list or a DataLoader, got "
            f"{type(batches).__name__}; list(...) makes one of a generator"
        )
    if samples is not None:
        check_integer("samples", samples, least=1)
    check_integer("seed", seed, least=0)
    dtype = dtype or max((torch.promote_types(p.dtype, torch.float32) for p in trainable), key=lambda d: d.itemsize)
    if dtype not in (torch.float32, torch.float64):
        raise InvalidArgumentError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
    with undisturbed(model, trainable[0].device, batch_statistics=batch_statistics):
        yield Objective(
            model,
            loss_fn,
            batches,
            normalise_logits=normalise_logits,
            batch_statistics=batch_statistics,
            dtype=dtype,
            samples=samples,
            seed=seed,
        )


def normalised(logits: Tensor) -> Tensor:
    """Each sample's logits, centred and divided by their length, so that nothing but their direction counts.

    As Andriushchenko et al. 2023 do, after Tsuzuku et al. 2020.

    Args:
        logits: Shape (batch, classes, ...).
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return centred / lengths.clamp_min(1e-10)


def check_finite(what: str, value: float) -> float:
    """Returns ``value`` unless it is infinite or not a number."""
    if not math.isfinite(value):
        raise NonFiniteLossError(f"{what} is {value}, so there is nothing to measure; has the training diverged?")
    return value

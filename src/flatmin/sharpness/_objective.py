"""What is measured: a model, a loss and the batches to take it on, given once for all measures."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .._checks import check_flag, check_function, check_module, check_one_of
from .._distributed import unwrapped
from ..errors import InvalidArgumentError
from ._batches import Batches
from ._snapshot import Loss, Snapshot
from ._state import undisturbed

DTYPES = (torch.float32, torch.float64)

Measure = TypeVar("Measure", bound=Callable[..., Any])


class Objective:
    """The mean loss of a model over fixed batches, which every measure in `flatmin.sharpness` takes.

    Each measure reads the weights and buffers that the model has when it begins, so one objective serves before, during
    and after training. The model is left as it was: weights, buffers, modes, gradients, and the states of all random
    number generators, also when something raises. It is in evaluation mode only while a measure runs.

    The batches are read once, here, and kept on the model's device if their inputs take 256 MiB or less. Larger sets
    are read again in each pass, from the same random numbers. Kept batches are read again only if the model moves to
    another device or dtype.

    Args:
        model: The network; inside DistributedDataParallel, DataParallel or torch.compile the network itself is
            measured. Its parameters with ``requires_grad`` are the weights that are perturbed.
        loss_fn: ``loss_fn(model(x), y)`` returns the mean over the batch, a tensor of no dimension. Use the plain cross
            entropy, without label smoothing, to compare networks. torch's cross entropy and negative log likelihood are
            asked for their ``ignore_index`` and ``weight``, so that the mean over all batches does not depend on how
            the data are cut; of your own function that counts some targets more than others it does: give one batch.
        batches: Pairs ``(x, y)`` that can be iterated repeatedly, such as a list or a DataLoader. Every sample counts
            once, whatever the size of its batch (every target that the loss counts, see ``loss_fn``).
        normalise_logits: Centre each sample's logits and divide them by their length (Andriushchenko et al. 2023). The
            cross entropy, and with it its sharpness, changes with the scale of the logits, which label smoothing, SAF
            and MESA change and which says nothing about flatness. Report both values; `variant` makes the other one.
            With fewer than three logits it is refused (`NoDirectionError`): nothing but their sign would be left.
        batch_statistics: Let batch- and instance-norm layers use each batch's own statistics, as in training. Dropout
            is off in any case.
        dtype: ``torch.float32`` or ``torch.float64``. None: that of the weights, at least float32.
        samples: Measure on this many samples at most, drawn by ``seed``. None: on all.
        seed: Draws the samples, the random vectors of the measures that need some, and what layers draw that are random
            in evaluation mode: a batch's numbers are the same in every pass.

    Attributes:
        samples: Number of samples that are measured on.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> batches = [(torch.randn(8, 4), torch.arange(8) % 3), (torch.randn(2, 4), torch.arange(2))]
        >>> objective = Objective(model, torch.nn.functional.cross_entropy, batches)
        >>> objective.samples
        10
        >>> objective.variant(normalise_logits=True).normalise_logits
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Iterable[Any],
        *,
        normalise_logits: bool = False,
        batch_statistics: bool = False,
        dtype: torch.dtype | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model = check_module("model", model)
        self.loss_fn = check_function("loss_fn", loss_fn, "of (model(x), y)")
        self.dtype = check_one_of("dtype", dtype, (None, *DTYPES), "torch.float32 or torch.float64")
        self.normalise_logits = check_flag("normalise_logits", normalise_logits)
        self.batch_statistics = check_flag("batch_statistics", batch_statistics)
        self._batches = Batches(batches, samples=samples, seed=seed)
        self.seed = self._batches.seed
        with self._snapshot():
            pass  # reads the batches

    @property
    def samples(self) -> int:
        """Number of samples that are measured on."""
        return self._batches.samples

    def variant(self, *, normalise_logits: bool | None = None, batch_statistics: bool | None = None) -> "Objective":
        """Returns this objective with other options, sharing the model and the batches that are kept.

        Args:
            normalise_logits: None: as it is.
            batch_statistics: None: as it is.
        """
        other = copy.copy(self)
        if normalise_logits is not None:
            other.normalise_logits = check_flag("normalise_logits", normalise_logits)
        if batch_statistics is not None:
            other.batch_statistics = check_flag("batch_statistics", batch_statistics)
        return other

    def _where(self) -> tuple[torch.device, torch.dtype]:
        """The device of the weights, and the dtype to compute in.

        Raises:
            InvalidArgumentError: If nothing is trainable, or the dtype cannot be used.
        """
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise InvalidArgumentError(f"the model, {type(self.model).__name__}, has no parameter with requires_grad")
        _check_measurable(self.model)
        kinds = (torch.promote_types(p.dtype, torch.float32) for p in trainable)
        dtype = self.dtype or max(kinds, key=lambda kind: kind.itemsize)
        return trainable[0].device, check_one_of("dtype", dtype, DTYPES, "torch.float32 or torch.float64")

    @contextmanager
    def _snapshot(self) -> Iterator[Snapshot]:
        """The loss as a function of the weights, from those the model has now; the model is `undisturbed`."""
        device, dtype = self._where()
        with undisturbed(self.model, device, self._batches.generators, batch_statistics=self.batch_statistics):
            yield Snapshot(
                unwrapped(self.model),
                self.loss_fn,
                self._batches,
                dtype=dtype,
                normalise_logits=self.normalise_logits,
                batch_statistics=self.batch_statistics,
            )


def _check_measurable(model: nn.Module) -> None:
    """Refuses a network whose loss is no function of its weights, or not one that torch can take derivatives of.

    Raises:
        InvalidArgumentError: The message says what it is.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise InvalidArgumentError(
                f"the model's parameter {name} is complex, and sharpness is measured of real weights only: freeze it, "
                "or hold its real and imaginary parts as two parameters (torch.view_as_real)"
            )
    for name, module in model.named_modules():
        where = f"the model's {name}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise InvalidArgumentError(
                f"{where} is compiled by torch.jit, so other weights cannot take the place of its own: measure the "
                "network that it was made from, with its state dict loaded"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise InvalidArgumentError(
                f"{where}, {type(module).__name__}(max_norm={module.max_norm:g}), overwrites its weights in each "
                "forward pass, so they cannot be perturbed: set its max_norm to None while you measure"
            )


def measure(function: Measure) -> Measure:
    """Makes a function of an objective refuse anything else in one sentence, such as (model, loss_fn, batches)."""
    name = function.__name__
    shared = list(inspect.signature(Objective).parameters)

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        given = [*arguments, *(options[key] for key in ("objective",) if key in options)]
        moved = [each for each in shared if each in options]
        if len(given) != 1 or not isinstance(given[0], Objective):
            found = ", ".join([*(type(each).__name__ for each in given), *moved]) or "nothing"
            raise InvalidArgumentError(
                f"{name} takes one Objective and options by name: {name}(Objective(model, loss_fn, batches), ...), got "
                f"{found}"
            )
        if moved:
            raise InvalidArgumentError(
                f"{name} takes no {' and no '.join(moved)}, which the Objective has: Objective(model, loss_fn, "
                f"batches, {moved[0]}=...)"
            )
        return function(*arguments, **options)

    return cast(Measure, checked)

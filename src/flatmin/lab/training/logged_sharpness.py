"""Sharpness that is logged during training, and what it is measured on."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._rng import preserved
from ...errors import FlatminError, FlatminWarning, NoDirectionError, NonFiniteLossError
from ...sharpness import Objective, hessian_eigenvalues, sam_sharpness
from ..problems.batches import drawn_batches
from ..problems.problem import Problem, class_numbers
from ..problems.source import TRAIN

if TYPE_CHECKING:
    from .trainer import Trainer

Batches = list[tuple[Tensor, Tensor]]
LOGGED = 512  # training samples that sharpness is measured on during training


def evaluated_network(trainer: "Trainer") -> nn.Module:
    """The network that is evaluated, with trainable weights: the one that is trained, or a copy with the average's."""
    if trainer.average is None:
        return trainer.model
    network = copy.deepcopy(trainer.model)
    network.load_state_dict(trainer.evaluated.state_dict())
    return network


def fixed_batches(problem: Problem, samples: int, seed: int, device: torch.device, batch_size: int = 256) -> Batches:
    """Draws training samples, at most all, and reads them as batches; random states stay as they are."""
    prefix = problem.source.prefixed(TRAIN)
    with preserved(device), problem.source.calling(TRAIN):
        batches = drawn_batches(problem.train, samples, seed, batch_size)
        return [(x.to(device), class_numbers(y, problem.num_classes, prefix).to(device)) for x, y in batches]


def epoch_sharpness(trainer: "Trainer", lr: float) -> dict[str, float]:
    """What ``log_sharpness`` and ``log_curvature`` add to an epoch's metrics, if due. Training is not touched.

    Returns:
        ``sharpness`` (SAM's measure, rho 0.05, plain cross entropy, evaluation mode, on at most 512 training samples),
        ``sharpness_normalised`` (the same of normalised logits; not for fewer than three) and ``gradient_norm``;
        ``top_eigenvalue`` of the Hessian, to about 1 %, and ``lr_times_top_eigenvalue``. NaN where nothing
        can be measured.
    """
    recipe, done = trainer.run.recipe, trainer.epoch + 1

    def due(every: int) -> bool:
        return every > 0 and (done % every == 0 or done == recipe.epochs)

    if not (due(recipe.log_sharpness) or due(recipe.log_curvature)):
        return {}
    batches = fixed_batches(trainer.problem, LOGGED, 0, trainer.device)
    objective = Objective(evaluated_network(trainer), F.cross_entropy, batches)
    found: dict[str, float] = {}
    if due(recipe.log_sharpness):
        found |= dict.fromkeys(("sharpness", "sharpness_normalised", "gradient_norm"), math.nan)
        with _ending_no_training():
            raw = sam_sharpness(objective)
            found |= {"sharpness": raw.value, "gradient_norm": raw.gradient_norm}
            try:
                found["sharpness_normalised"] = sam_sharpness(objective.variant(normalise_logits=True)).value
            except NoDirectionError:
                del found["sharpness_normalised"]
    if due(recipe.log_curvature):
        top = math.nan
        with _ending_no_training():
            # Eight vectors find the top one to far less than the tolerance, in nine products of twenty-one.
            top = hessian_eigenvalues(objective, tolerance=0.05, vectors=8).value
        found |= {"top_eigenvalue": top, "lr_times_top_eigenvalue": lr * top}
    return found


@contextmanager
def _ending_no_training() -> Iterator[None]:
    """Lets no measure end the training: a loss that is not finite has none, and what else is wrong is warned of."""
    try:
        yield
    except NonFiniteLossError:
        pass
    except FlatminError as error:
        warnings.warn(f"sharpness could not be logged: {error}", FlatminWarning, stacklevel=4)

"""The network in a run's folder, as it was evaluated, with its problem."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import DataError, FlatminError
from ..problems.load import load_problem
from ..problems.problem import Problem
from ..recipe import Run
from ..results import LAST
from ..training.logged_sharpness import evaluated_network
from ..training.state_check import check_fit
from ..training.trainer import Trainer
from .checkpoint import check_folders, load_checkpoint
from .resume import CHECKED, check_state, find_run, newest, read_run


@dataclass(frozen=True)
class Saved:
    """A network from a checkpoint.

    Attributes:
        folder: Its run's.
        name: Of the run and, if it is not the newest, of the checkpoint.
        run: What was trained.
        problem: What it was trained on.
        model: The network that was evaluated, where the run says or ``device`` does.
        epoch: Epochs done.
    """

    folder: Path
    name: str
    run: Run
    problem: Problem
    model: nn.Module
    epoch: int

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The plain cross entropy, without label smoothing, or the experiment file's criterion."""
        return self.problem.criterion or F.cross_entropy

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device


def open_saved(path: Path, device: str | None = None, *, trust_experiment: bool = False) -> Saved:
    """Builds the network of a run, or of one of its checkpoints.

    Args:
        path: A run's folder, for its newest checkpoint, or a checkpoint.
        device: Where to; None for the run's own.
        trust_experiment: Whether an experiment file that lies in the run's folder may be run.

    Raises:
        FlatminError: If there is none, it is not a checkpoint of this run, or its experiment file cannot be used.
    """
    folder, checkpoint = find_run(path)
    run = read_run(folder, trust_experiment=trust_experiment)
    if device is not None:
        run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, device=device))
    check_folders(folder / Path(LAST).parent)
    found = checkpoint or newest(folder)
    if found is None:
        raise DataError(f"{folder}: the run has no checkpoint yet, so there is no network to measure")
    state = load_checkpoint(found, only=("model", "average", *CHECKED))
    check_state(found, state, run)
    problem = load_problem(run.recipe, run.seed)
    trainer = Trainer(run, problem)
    try:
        check_fit("model", state["model"], trainer.model.state_dict())
        trainer.model.load_state_dict(state["model"])
        if trainer.average is not None:
            check_fit("average", state["average"], trainer.average.state_dict())
            trainer.average.load_state_dict(state["average"])
        epoch = int(state["epoch"])
    except Exception as error:
        what = str(error) if isinstance(error, FlatminError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{found}: not a checkpoint of this run's network: {what:.300}") from error
    name = folder.name if checkpoint is None else f"{folder.name}/{checkpoint.name}"
    return Saved(folder, name, run, problem, evaluated_network(trainer), epoch)

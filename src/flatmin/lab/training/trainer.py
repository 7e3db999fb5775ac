"""The one training loop. The method is a parameter of it."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import CosineAnnealingLR

from ... import _distributed
from ..._attached import apart
from ..._checks import check_integer
from ..._rng import preserved
from ...errors import DataError, InvalidArgumentError
from ..methods import Assembled, Ingredients, get_method
from ..problems.batches import make_loader, rank_batches, size_of
from ..problems.problem import Problem, augmented
from ..problems.source import NETWORK, OPTIMIZER, STEP, TEST, TRAIN
from ..recipe import Run
from . import torchrun
from .compiled import compiled
from .device import resolve_device
from .evaluation import autocast, evaluate, fresh_statistics, statistics_inputs
from .feed import Feed
from .first_losses import FirstLosses
from .layout import in_layout, layout_of, to_layout
from .logged_sharpness import epoch_sharpness
from .private import Private, poisson_loader
from .progress import Progress, StepResult
from .randomness import Randomness
from .state_check import as_here, check_fit, check_optimizer, check_values
from .stepping import Stepping


class Trainer:
    """Trains a network on a problem as a run says.

    Args:
        run: Recipe, method, hyperparameters and seed.
        problem: Data and network, made for the same seed.

    Attributes:
        model: The network, the same on all ranks.
        optimizer: The method's, which makes the step.
        stepping: Makes a step of a batch with it.
        trajectory: SAF, MESA, online label smoothing or None.
        average: The average of the weights that is evaluated in place of the network, or None.
        extra_bytes: Memory that the method needs beyond the base optimizer, in bytes.
        epoch: Number of epochs done.
        progress: How far the next epoch has come.

    Raises:
        FlatminError: If the method, a hyperparameter or the device cannot be used.
    """

    def __init__(self, run: Run, problem: Problem) -> None:
        recipe = run.recipe
        self.run = run
        self.problem = problem
        self.device = resolve_device(recipe.device)
        self._randomness = Randomness(run.seed, self.device)  # before the initial weights are drawn
        self._train = Feed(problem, TRAIN, problem.train, self.device, held=recipe.private is None)
        self._test = Feed(problem, TEST, problem.test, self.device)
        self.model = problem.make_model().to(self.device)
        self._layout = layout_of(problem, recipe, self.device)
        to_layout(self.model, self._layout)
        self._network = torchrun.parallel(self.model)
        if recipe.compile:
            self._network = compiled(self._network)
        self._calling = problem.source.calling
        base = problem.make_optimizer(self.model.parameters())
        with self._calling(OPTIMIZER):
            # The scheduler holds the base optimizer; a wrapper shares its param_groups.
            self.scheduler = CosineAnnealingLR(base, T_max=recipe.epochs)
        make = make_loader if recipe.private is None else poisson_loader
        self.loader = make(
            self._train.dataset, recipe.batch_size, workers=recipe.workers, generator=self._randomness.order
        )
        if len(self.loader) == 0:
            raise InvalidArgumentError(
                f"batch_size={recipe.batch_size} and {problem.sizes()['training samples']} samples, shared by "
                f"{_distributed.size()} processes, leave one of them with fewer than two samples in every batch, and "
                "batch norm needs two: start fewer processes"
            )
        self._batches = rank_batches(self.loader)
        self._scaler = GradScaler(self.device.type, enabled=recipe.precision == "float16")
        ingredients = Ingredients(
            self._network,
            base,
            num_samples=size_of(problem.train),
            num_classes=problem.num_classes,
            steps_per_epoch=len(self.loader),
            epochs=recipe.epochs,
            scaler=self._scaler,
        )
        with self._calling(f"assemble of the method {run.method}"):  # which a user may have registered
            method = get_method(run.method).assemble(ingredients, run.settings)
        if not isinstance(method, Assembled):
            raise InvalidArgumentError(
                f"assemble of the method {run.method} must return flatmin.lab.methods.Assembled, got {method!r:.80}"
            )
        self.optimizer, self.trajectory, self.average = method.optimizer, method.trajectory, method.average
        self._at_epoch_end = method.at_epoch_end
        self._refresh = method.refresh or (None if self.average is None else self.average.refresh)
        self._private = None
        if recipe.private is None and method.attach is not None:
            raise InvalidArgumentError(f"{run.method} trains with differential privacy alone: give private")
        if recipe.private is not None:
            if method.optimizer is not base:
                raise InvalidArgumentError(
                    f"{run.method} has an optimizer of its own, which would train without privacy: leave out private"
                )
            self._private = Private(self.model, base, self.loader, recipe, seed=run.seed, attach=method.attach)
            self.optimizer = self._private.optimizer
        self.extra_bytes = method.extra_bytes
        self.stepping = Stepping(
            run,
            problem,
            self._network,
            method,
            self.optimizer,
            plain=method.optimizer is base,
            scaler=self._scaler,
            device=self.device,
        )
        self.epoch = 0
        self.progress = Progress(totals=torch.zeros(2, device=self.device))
        self._first_losses = FirstLosses(self.device)

    def train_epoch(self, on_step: Callable[[], None] | None = None) -> dict[str, float]:
        """Trains for one epoch and evaluates; after `load_state_dict`, for the rest of the epoch it was in.

        Args:
            on_step: Called after each step, when `state_dict` can be taken; what it raises ends the training.

        Returns:
            ``epoch`` (from 0), ``train_loss`` (with the trajectory term), ``train_loss_vanilla`` (without),
            ``test_loss``, ``test_accuracy`` (a share of 1), ``lr``, ``seconds`` (without the evaluation) and
            ``closure_calls`` (of a step, on average); with privacy ``epsilon``, spent so far; in epochs where it is
            due also what `epoch_sharpness` adds.

        Raises:
            DivergedError: If no loss is finite from the first step of the run on, see `FirstLosses`.
            FlatminError: If something of an experiment file cannot be used.
        """
        progress = self.progress
        batches = self._begin_epoch()
        lr = self.optimizer.param_groups[0]["lr"]
        start = time.perf_counter() - progress.seconds
        for index, x, y in batches:
            with self._calling(TRAIN):
                x = in_layout(augmented(x, self.run.recipe, self._randomness.augmentation), self._layout)
            step = self.step(index, x, y, weight=self._batches.weight(progress.steps))
            progress.add(step, len(y), self._batches.lengths[progress.steps], time.perf_counter() - start)
            if self._first_losses.add(step.loss):
                self._judge(lr)
            if on_step is not None:
                on_step()
        self._judge(lr)
        total, vanilla = progress.means()
        seconds = time.perf_counter() - start
        self.scheduler.step()
        _distributed.broadcast_buffers([self.model])
        with self._calling(STEP):
            self._at_epoch_end()
        self.make_statistics()
        with self._as_evaluated():
            test_loss, test_accuracy = self.evaluate()
            with self._calling(NETWORK), nullcontext() if self._private is None else self._private.measuring():
                measured = epoch_sharpness(self, lr)
        self.epoch += 1
        self.progress = Progress(totals=torch.zeros(2, device=self.device))
        return {
            "epoch": self.epoch - 1,
            "train_loss": total,
            "train_loss_vanilla": vanilla,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": lr,
            "seconds": seconds,
            "closure_calls": progress.calls / progress.steps,
            **({} if self._private is None else {"epsilon": self._private.epsilon()}),
            **measured,
        }

    def _begin_epoch(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Seeds everything and returns the epoch's batches, without those that `progress` counts as done."""
        self._randomness.begin_epoch(self.epoch)
        self._first_losses.begin_epoch(self.epoch, self.progress.steps)
        self.model.train()
        batches = self._train.batches(self.loader)
        if self.progress.steps == 0:
            self.set_epoch(self.epoch)
            if self.epoch == 0 and self.trajectory is not None:
                self.make_statistics()  # for a target that runs in this epoch
        else:
            # Drawn again and dropped, so that data sets and workers that draw random numbers come as far as before.
            deque(islice(batches, self.progress.steps), maxlen=0)
            self._randomness.go_on()
        return batches

    def first_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of the training set as `step` takes it, for measuring; of a new order, which an epoch draws anew."""
        index, x, y = next(self._train.batches(self.loader))
        return index, in_layout(x, self._layout), y

    def _judge(self, lr: float) -> None:
        """Ends a run without a finite loss from its first step on."""
        self._first_losses.judge(self.progress, lr, self.run.recipe.precision, self.extra_bytes)

    def set_epoch(self, epoch: int) -> None:
        """Tells the method which epoch begins."""
        if self.trajectory is not None:
            self.trajectory.set_epoch(epoch)

    def step(self, index: Tensor, x: Tensor, y: Tensor, *, weight: float = 1.0) -> StepResult:
        """Makes one step, see `Stepping.step`."""
        return self.stepping.step(index, x, y, weight=weight)

    def make_statistics(self) -> None:
        """Gives the method's average batch-norm statistics of its own; random states and training are not touched.

        They come from training samples as they are, neither cropped nor flipped, as test samples are.
        """
        if self._refresh is None:
            return
        with preserved(self.device), autocast(self.run.recipe, self.device), self._calling(NETWORK):
            self._refresh(statistics_inputs(self.problem))

    def _as_evaluated(self) -> AbstractContextManager[None]:
        """Inside, and after the last epoch, a network that is evaluated itself has the statistics that it wants."""
        if not self.run.recipe.fresh_statistics or self.average is not None:
            return nullcontext()
        stay = self.epoch + 1 == self.run.recipe.epochs
        return fresh_statistics(self.model, self._network, self.problem, self.run.recipe, self.device, stay=stay)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the one that is trained, or its average."""
        return self.model if self.average is None else self.average.module

    def evaluate(self) -> tuple[float, float]:
        """Returns the plain cross entropy and the accuracy, a share of 1, on the test set, see `evaluate`."""
        return evaluate(self.evaluated, self._test, self.run.recipe, layout=self._layout)

    def place(self) -> dict[str, str | int]:
        """What must be the same for a continued run to be bit-identical to one that was never ended."""
        return {
            "torch": str(torch.__version__),
            "device": self.device.type,
            "processes": _distributed.size(),
            "workers": self.loader.num_workers,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns all that changes in training, as nested dictionaries and lists of tensors and plain values.

        Call it between epochs or after a step, on all ranks together. The tensors are those in use, not copies.
        """
        own = {"totals": self.progress.totals.cpu(), "random": self._randomness.state_dict()}
        with apart():  # what a method attaches to its optimizer is among these by its own name
            optimizer = self.optimizer.state_dict()
        return {
            **self.place(),
            "epoch": self.epoch,
            "progress": self.progress.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "trajectory": {} if self.trajectory is None else self.trajectory.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "scaler": self._scaler.state_dict(),
            "private": {} if self._private is None else self._private.state_dict(),
            "ranks": _distributed.from_all(own),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from where `state_dict` was taken.

        Raises:
            FlatminError: If it is the state of something else; torch may raise its own errors for that too.
        """
        own = self.state_dict()
        same_torch = state["torch"] == own["torch"]  # other versions have other entries
        for name in ("model", "trajectory", "average", "scaler", "progress"):
            check_fit(name, state[name], own[name])
        check_optimizer(state["optimizer"], self.scheduler.optimizer, exact=same_torch)
        check_fit("scheduler", state["scheduler"], own["scheduler"], exact=same_torch)
        epoch = check_integer("epoch", state["epoch"], least=0)
        constants = {name: own["scheduler"][name] for name in ("T_max", "eta_min", "base_lrs")}
        check_values("scheduler", state["scheduler"], {**constants, "last_epoch": epoch, "_step_count": epoch + 1})
        part = self._own_part(state["ranks"])
        self.model.load_state_dict(state["model"])
        with apart():
            self.optimizer.load_state_dict(as_here(state["optimizer"], self.scheduler.optimizer))
        self.scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        if self.trajectory is not None:
            self.trajectory.load_state_dict(state["trajectory"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self._private is not None:
            self._private.load_state_dict(state.get("private", {}))
        self.epoch = epoch
        self.progress = Progress.from_state(state["progress"], part["totals"].to(self.device, copy=True))
        # On fewer processes an epoch may have more steps, see `RankBatches`; then nothing of it is left to do here.
        if self.progress.steps >= len(self.loader) and len(state["ranks"]) == _distributed.size():
            raise DataError(f"progress.steps is {self.progress.steps}, and an epoch has {len(self.loader)} steps")
        self._randomness.load_state_dict(part["random"])

    def _own_part(self, parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The part of a checkpoint that is this rank's own."""
        for number, part in enumerate(parts):
            check_fit(f"ranks.{number}.totals", part["totals"], self.progress.totals)
        if len(parts) == _distributed.size():
            return parts[_distributed.rank()]
        # With another number of ranks, the first takes over the sums of all; the epoch draws other random numbers.
        every = torch.stack([part["totals"] for part in parts]).sum(dim=0)
        return {**parts[0], "totals": every if _distributed.rank() == 0 else torch.zeros_like(every)}

"""Training with differential privacy: batches drawn as Poisson sampling does, and Opacus around the plain optimizer."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ... import _distributed
from ...errors import DataError, InvalidArgumentError, require
from ..problems.batches import RankBatches, size_of
from ..recipe import Recipe

ACCOUNTANT = "rdp"
ORDERS = (1.5, 1.75, *range(2, 64), 128)  # at which privacy is accounted: any give a bound, these a tight one quickly


class PoissonBatches(RankBatches):
    """Batches in which each sample is with probability ``1 / steps``, whatever the others are; some may be empty.

    Args:
        size: Number of samples.
        batch_size: How many are expected in a batch, about.
        generator: Draws them.
        as_tensors: Whether to yield the indices as a tensor, which has a dtype if it is empty; or else as a list.

    Attributes:
        lengths: Size of each batch of the epoch, once it is drawn.
    """

    def __init__(self, size: int, batch_size: int, generator: torch.Generator, *, as_tensors: bool) -> None:
        self.size, self.generator, self.as_tensors = size, generator, as_tensors
        self.lengths = [0] * max(-(-size // batch_size), 1)

    def __iter__(self) -> Iterator[Any]:
        for step in range(len(self)):
            drawn = torch.rand(self.size, generator=self.generator) < 1 / len(self)
            batch = drawn.nonzero().flatten()
            self.lengths[step] = len(batch)
            yield batch if self.as_tensors else batch.tolist()

    def weight(self, step: int) -> float:
        """1: there is one process."""
        return 1.0


def poisson_loader(
    dataset: "Dataset[Any]", batch_size: int, *, workers: int, generator: torch.Generator
) -> "DataLoader[Any]":
    """Returns a loader with `PoissonBatches`.

    Args:
        dataset: Map-style.
        batch_size: How many samples are expected in a batch, about.
        workers: Processes that load data.
        generator: Draws the batches.
    """
    whole = type(dataset) is TensorDataset  # as in `make_loader`
    batches = PoissonBatches(size_of(dataset), batch_size, generator, as_tensors=whole)
    if whole:
        return DataLoader(dataset, batch_size=None, sampler=batches)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=functools.partial(_collated, dataset),
        generator=generator,
        num_workers=workers,
    )


def _collated(dataset: Any, samples: list[Any]) -> Any:
    """A batch; one without samples is that of a sample without it."""
    if samples:
        return default_collate(samples)
    return [each[:0] for each in default_collate([dataset[0]])]


@functools.cache
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The noise with which so many steps spend ``epsilon`` at most, by Renyi accounting, which is quick."""
    from opacus.accountants.utils import get_noise_multiplier

    found = get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=delta,
        sample_rate=sample_rate,
        steps=steps,
        accountant=ACCOUNTANT,
        alphas=ORDERS,
    )
    return float(found)


@functools.cache
def spent(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """The epsilon of steps that were accounted: noise, share of the samples, and number of steps, of each kind."""
    from opacus.accountants import create_accountant

    accountant = create_accountant(ACCOUNTANT)
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta, alphas=ORDERS))


class Private:
    """Opacus' engine, and its optimizer around the plain one.

    Args:
        network: The network, on its device.
        optimizer: The plain optimizer.
        loader: From `poisson_loader`.
        recipe: Has epsilon, delta and the norm to clip to.
        seed: Draws the noise: the same for all methods.
        attach: Called with Opacus' hooks on the network and its optimizer; None for nothing.

    Attributes:
        optimizer: Opacus' optimizer.

    Raises:
        InvalidArgumentError: If the network mixes samples, there are several processes, or epsilon cannot be reached.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        loader: "DataLoader[Any]",
        recipe: Recipe,
        *,
        seed: int,
        attach: Callable[[Any, Any], Any] | None,
    ) -> None:
        if _distributed.size() > 1:
            raise InvalidArgumentError("private trains on one process: start it without torchrun")
        opacus = require("opacus", install="flatmin[opacus]", oldest=(1, 6))
        from opacus.validators import ModuleValidator

        faults = ModuleValidator.validate(network, strict=False)
        if faults:
            raise InvalidArgumentError(
                f"the network cannot train with differential privacy ({' '.join(str(faults[0]).split()):.200}): take "
                "nn.GroupNorm in place of batch norm, as --model cnn-gn does, or an experiment file with such a model()"
            )
        device = next(network.parameters()).device
        self._noise = torch.Generator(device).manual_seed(seed)
        self._delta = recipe.delta
        for message in ("Secure RNG turned off", "Full backward hook is firing", "Optimal order is the"):
            warnings.filterwarnings("ignore", message)  # of Opacus, and of torch about its hooks, in every run
        assert recipe.private is not None
        try:
            noise = noise_multiplier(recipe.private, recipe.delta, 1 / len(loader), len(loader) * recipe.epochs)
        except ValueError as error:
            raise InvalidArgumentError(
                f"private={recipe.private:g} cannot be reached ({error}): give a larger epsilon or delta, or larger "
                "batches"
            ) from error
        self._engine = opacus.PrivacyEngine(accountant=ACCOUNTANT)
        self._hooks, self.optimizer, _ = self._engine.make_private(
            module=network,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise,
            max_grad_norm=recipe.clip,
            noise_generator=self._noise,
            poisson_sampling=False,  # it is already
            wrap_model=False,
        )
        if attach is not None:
            attach(self._hooks, self.optimizer)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, gradients are measured, which Opacus cannot take apart."""
        self._hooks.disable_hooks()
        try:
            yield
        finally:
            self._hooks.enable_hooks()

    def epsilon(self) -> float:
        """What was spent."""
        return spent(tuple(self._engine.accountant.history), self._delta)

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps that were accounted, and the state of the noise."""
        history = [list(entry) for entry in self._engine.accountant.history]
        return {"history": history, "noise": self._noise.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned.

        Raises:
            DataError: If it is of a run without privacy.
        """
        if not state.keys() >= {"history", "noise"}:
            raise DataError("private: the checkpoint has no accounted steps, and this run trains with privacy")
        self._engine.accountant.history = [tuple(entry) for entry in state["history"]]
        self._noise.set_state(state["noise"].cpu())

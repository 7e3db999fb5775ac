"""What comes after training: a finished network with rounded weights, with noise on them, and fine-tuned elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from ..._files import read_json, write_json
from ..._rng import preserved, seed_all
from ...averages._statistics import refresh
from ...errors import DataError
from ..problems.batches import make_loader
from ..problems.checked import logits_of, loss_of, pair, shifted
from ..problems.source import NETWORK, OPTIMIZER, TEST, TRAIN
from ..results import AFTER_FILE
from ..results.after import AFTER, BITS, NOISE
from ..results.values import number
from ..training.evaluation import autocast, evaluate, statistics_inputs
from ..training.feed import Feed
from .measured import Location, OnWord, opened
from .record import command_line, environment
from .saved import Saved

DRAWS = 4  # of the noise, for each level
TUNED_EPOCHS = 0.1  # of the run's, at least one
TUNED_LR = 0.1  # of the learning rate at the start of the run
RULE = (
    "Fresh statistics: those of batch norm are made anew, from training samples, as after rounding and noise; nothing "
    "else is changed. Weights: all parameters but vectors. Rounded: to the nearest of 2^bits levels, symmetric, one "
    "step size for each index of the first dimension (output channel): its largest absolute value / (2^(bits - 1) - "
    "1/2). Noise: Gaussian, its expected norm so many times that of each tensor; the mean over draws. Fine-tuned: on "
    "inputs whose sign is changed, or by the experiment file's shift(x), with the plain optimizer at a tenth of the "
    "learning rate, for a tenth of the epochs; tested on the original and on the shifted test set."
)


@dataclass(frozen=True)
class RunAfter:
    """What `measure_after` returns.

    Attributes:
        test_accuracy: A share of 1, for each name of ``flatmin.lab.results.after.AFTER``.
        path: The file that was written.
        name: Of the run and, if it is not the newest, of the checkpoint.
        method: That the run was trained with.
        epoch: Epochs done at the checkpoint.
    """

    test_accuracy: Mapping[str, float]
    path: Path
    name: str
    method: str
    epoch: int


def measure_after(
    run: Location,
    *,
    device: str | None = None,
    trust_experiment: bool = False,
    on_progress: OnWord | None = None,
) -> RunAfter:
    """Measures what is left of a saved run after training, and writes ``after.json`` into its folder.

    The same as `compare` with ``after``: the accuracy with batch-norm statistics made anew, with weights rounded to 8,
    4, 3 and 2 bits, with noise on them, and after a short fine-tune on inputs whose sign is changed, or by the
    experiment file's ``shift(x)``, on the original and on the shifted test set.

    Args:
        run: The folder of a run, for its newest checkpoint, or a checkpoint, or what `open_saved` returned.
        device: Where to measure. None: where the run was.
        trust_experiment: Whether an experiment file that lies in the run's folder may be run.
        on_progress: Called with a word on what is going on.

    Returns:
        The accuracies, and the path of the file.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used, or inputs have no sign and the experiment
            file no ``shift(x)``.
        DataError: If there is no run, or its checkpoint is of another.
        ExperimentError: If the run's experiment file cannot be used, or is not to be trusted.
        OutputError: If the file cannot be written.

    Example:
        What rounding costs two runs, where both have fresh statistics::

            for run in ("runs/base", "runs/sam"):
                found = flatmin.lab.measure_after(run).test_accuracy
                print(run, found["rounded_2"] - found["fresh"])
    """
    saved = opened(run, device, trust_experiment)
    return RunAfter(
        write_after(saved, on_word=on_progress),
        saved.folder / AFTER_FILE,
        saved.name,
        saved.run.method,
        saved.epoch,
    )


def measured_after(folder: Path, epoch: int) -> dict[str, float] | None:
    """What `write_after` has written of a run's network of this epoch; None if that is not there, or not all of it."""
    try:
        written = read_json(folder / AFTER_FILE)
    except DataError:
        return None
    values = written.get("test_accuracy")
    found = {name: number(values.get(name)) for name in AFTER} if isinstance(values, dict) else {}
    same = [written.get(key) for key in ("rule", "checkpoint", "checkpoint_epoch")] == [RULE, folder.name, epoch]
    shares = {name: value for name, value in found.items() if value is not None and 0 <= value <= 1}
    return shares if same and len(shares) == len(AFTER) else None


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight rounded to ``bits``, as torchao's ``IntxWeightOnlyConfig`` with ``PerAxis(0)`` does.

    ::

        s_i = max_j |w_ij| / (2^(bits - 1) - 1/2)
        q_ij = s_i * clamp(round(w_ij / s_i), -2^(bits - 1), 2^(bits - 1) - 1)

    Args:
        weight: Of shape (channels, ...).
        bits: At least 2.
    """
    half = 2 ** (bits - 1)
    rows = weight.detach().float().flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True).div(half - 0.5).clamp(min=torch.finfo(torch.float32).tiny)
    levels = (rows * (1 / step)).round().clamp(-half, half - 1)  # as torchao: the largest is halfway between two levels
    return (levels * step).view_as(weight).to(weight.dtype)


def noisy(weight: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """A weight with Gaussian noise, whose expected norm is about ``level`` times its own.

    Args:
        weight: Of any shape.
        level: Standard deviation of the noise, as a multiple of the weight's root mean square.
        generator: On the CPU, so that the noise is the same on every device.
    """
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    now = weight.detach().float()
    return (now + level * now.square().mean().sqrt() * noise).to(weight.dtype)


def write_after(
    saved: Saved, *, on_step: Callable[[], None] | None = None, on_word: OnWord | None = None
) -> dict[str, float]:
    """Measures what is left of a saved network after training, and writes it into its run's folder.

    The network is the one that was evaluated: the average's, where the method has one. Random states and the network
    itself are not touched.

    Args:
        saved: The run.
        on_step: Called before each measure and after each step of the fine-tune; what it raises ends the measuring.
        on_word: Called with a word on each measure before it.

    Returns:
        Test accuracy, a share of 1, for each name of `flatmin.lab.results.after.AFTER`.

    Raises:
        FlatminError: If something of an experiment file cannot be used, or the file cannot be written.
    """
    tell = on_word or (lambda word: None)
    draws: dict[str, list[float]] = {}
    with preserved(saved.device):
        seed_all(saved.run.seed)
        bench = _Bench(saved, on_step or (lambda: None))
        for bits in BITS:
            tell(f"{saved.name}: weights rounded to {bits} bits")
            draws[f"rounded_{bits}"] = [bench.changed(lambda weight: rounded(weight, bits))]  # noqa: B023
        for level in NOISE:
            tell(f"{saved.name}: noise of {level} times the weights")
            draws[f"noise_{level}"] = [bench.noisy(level, draw) for draw in range(DRAWS)]
        tell(f"{saved.name}: fine-tune")
        draws["tuned_original"], draws["tuned_shifted"] = ([accuracy] for accuracy in bench.tuned())
        tell(f"{saved.name}: fresh statistics")
        draws["fresh"] = [bench.changed(lambda weight: weight)]  # last: the draws of the others stay as they were
    found = {name: fmean(draws[name]) for name in AFTER}
    write_json(
        saved.folder / AFTER_FILE,
        {
            "method": saved.run.method,
            "seed": saved.run.seed,
            "checkpoint": saved.name,
            "checkpoint_epoch": saved.epoch,
            "test_accuracy": found,
            "draws": draws,
            "rule": RULE,
            "command": command_line(),
            **environment(),
        },
    )
    return found


class _Bench:
    """A copy of a saved network, to be changed and evaluated."""

    def __init__(self, saved: Saved, on_step: Callable[[], None]) -> None:
        self._saved, self._on_step = saved, on_step
        self._problem, self._recipe, self._device = saved.problem, saved.run.recipe, saved.device
        self._test = Feed(self._problem, TEST, self._problem.test, self._device)
        # Made anew, for hooks of the training would be copied too; the first one says which layers are frozen.
        self._model, self._network = (self._problem.make_model().to(self._device) for _ in range(2))
        self._model.train()
        self._state = {name: value.clone() for name, value in saved.model.state_dict().items()}
        self._inputs: Sequence[Tensor] = list(statistics_inputs(self._problem))

    def changed(self, change: Callable[[Tensor], Tensor]) -> float:
        """Accuracy with each weight changed, and statistics made anew."""
        self._on_step()
        self._restore()
        with torch.no_grad():
            for weight in _weights(self._network):
                weight.copy_(change(weight))
        with autocast(self._recipe, self._device), self._problem.source.calling(NETWORK):
            refresh(self._network, self._model, self._inputs)
        return self._accuracy()

    def noisy(self, level: float, draw: int) -> float:
        """Accuracy with a draw of noise, which is the same for all networks of one shape."""
        generator = torch.Generator().manual_seed(draw)
        return self.changed(lambda weight: noisy(weight, level, generator))

    def tuned(self) -> tuple[float, float]:
        """Accuracy on the original and on the shifted test set after a short fine-tune on the shifted training set."""
        self._restore()
        self._fine_tune()
        return self._accuracy(), self._accuracy(self._shifted)

    def _restore(self) -> None:
        self._network.load_state_dict(self._state)
        self._network.eval()

    def _accuracy(self, change: Callable[[Tensor], Tensor] | None = None) -> float:
        return evaluate(self._network, self._test, self._recipe, change=change)[1]

    def _shifted(self, x: Tensor) -> Tensor:
        return shifted(self._problem, x)

    def _fine_tune(self) -> None:
        """In float32; batches come in an order that follows from the run's seed."""
        problem, recipe, network = self._problem, self._recipe, self._network
        optimizer = problem.make_optimizer(network.parameters())
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * TUNED_LR
        order = torch.Generator().manual_seed(self._saved.run.seed)
        loader = make_loader(problem.train, recipe.batch_size, workers=recipe.workers, generator=order)
        network.train()
        for _ in range(max(round(TUNED_EPOCHS * recipe.epochs), 1)):
            for batch in problem.source.reading(TRAIN, loader):
                x, y = (each.to(self._device) for each in pair(problem, TRAIN, batch))
                optimizer.zero_grad()
                logits = logits_of(problem, network, self._shifted(x))
                loss_of(problem, self._saved.loss_fn, logits, y).backward()  # type: ignore[no-untyped-call]
                with problem.source.calling(OPTIMIZER):
                    optimizer.step()
                self._on_step()


def _weights(network: nn.Module) -> list[nn.Parameter]:
    """Parameters but vectors: biases, and what scales channels, stay as they are when weights are quantised."""
    return [
        each
        for each in network.parameters()
        if each.is_floating_point() and each.ndim > 1 and each.numel() > len(each)  # weight norm's lengths are vectors
    ]

"""The one place that calls what a user wrote, and makes one line of whatever comes out of it."""

import copy
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from torch.utils.data import Dataset

from ...errors import DataError, ExperimentError, FlatminError, InvalidArgumentError

T = TypeVar("T")

# What the line says of where it came from; for a function also what is wanted of it.
TRAIN, TEST = "the data set of train_set()", "the data set of test_set()"
NETWORK = "the network of model()"
CRITERION = "the function of criterion()"
SHIFT = "shift(x)"
OPTIMIZER = "the optimizer of optimizer(parameters)"
STEP = "a training step"
MEASURE = "a measurement"
FILE = "the file itself"
WANTED = {
    "model()": "must return a torch.nn.Module",
    "train_set()": "must return a map-style data set of pairs (x, y)",
    "test_set()": "must return a map-style data set of pairs (x, y)",
    "criterion()": "must return a function of (logits, y)",
    "optimizer(parameters)": "must return a torch optimizer of these parameters",
    SHIFT: "must return a batch of inputs of the same shape",
    TRAIN: "must have samples (x, y) of one shape, as many as its length says",
    TEST: "must have samples (x, y) of one shape, as many as its length says",
}


class Source:
    """Where a problem comes from: an experiment file, or names of data and network.

    Args:
        path: The experiment file; None for a problem that is named.
        name: What a problem that is named is called in an error.
    """

    def __init__(self, path: Path | None = None, name: str = "the network") -> None:
        self.path = path
        self.name = name

    def calling(self, part: str) -> "Calling":
        """A context in which ``part`` of the problem runs: what leaves it leaves it as one line.

        Errors of flatmin's own and Ctrl-C pass. Where there is no file, only what the network and the plain optimizer
        raise is a user's mistake: data or a number that they cannot take.
        """
        return Calling(self, part)

    def call(self, part: str, function: Callable[[], T]) -> T:
        """Calls a function of the file."""
        with self.calling(part):
            return function()

    def reading(self, part: str, batches: Iterable[T]) -> Iterator[T]:
        """Goes through the batches of a data set."""
        with self.calling(part):
            iterator = iter(batches)
        while True:
            with self.calling(part):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def refuse(self, said: str) -> NoReturn:
        """Raises what is wrong with a value that the file has given, or the network."""
        raise self._error(said)

    def prefixed(self, part: str) -> str:
        """How a line on wrong data begins; the data of a problem that is named are flatmin's own to describe."""
        return "" if self.path is None else f"{self.path}: {part}: "

    def line(self, part: str, error: BaseException) -> FlatminError:
        """The error that stands for what was raised."""
        what = _what(error)
        if _lacks_memory(error):
            what = f"there is too little memory; lower batch_size, or the size of the network ({what})"
        if self.path is None:
            return self._error(f"{self.name} cannot be used: {what}")
        wanted = f", which {WANTED[part]}" if part in WANTED else ""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_in(self.path, frame.filename)]
        place = f":{frames[-1].lineno}" if frames else ""
        if part in (STEP, MEASURE) and frames:  # of much that is called in one
            wanted = f", in {frames[-1].name}()"
        return ExperimentError(f"{self.path}{place}: {what} (in {part}{wanted})")

    def _error(self, said: str) -> FlatminError:
        return InvalidArgumentError(said) if self.path is None else ExperimentError(f"{self.path}: {said}")


class Calling:
    """The context of `Source.calling`; a class, for it is entered in every step."""

    __slots__ = ("part", "source")

    def __init__(self, source: Source, part: str) -> None:
        self.source = source
        self.part = part

    def __enter__(self) -> None:
        """Nothing is needed before the call."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            return
        if isinstance(error, FlatminError):
            if said := _from_worker(str(error)):
                raise type(error)(said) from error
            return
        if self.source.path is not None or self.part in (NETWORK, OPTIMIZER) or _lacks_memory(error):
            raise self.source.line(self.part, error) from error


class Samples(Dataset[Any]):
    """A user's data set, whose length is asked for once and whose samples are read through `Source.calling`.

    Args:
        dataset: The data set.
        source: Where it comes from.
        part: The function that has returned it.
        length: Its length.
    """

    def __init__(self, dataset: Any, source: Source, part: str, length: int) -> None:
        self.dataset = dataset
        self.length = length
        self._calling = source.calling(part)

    def __len__(self) -> int:
        return self.length

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # while it is made or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        with self._calling:
            return self.dataset[index]


class SampleLists(Samples):
    """The same of a data set that reads several samples at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The samples at these indices."""
        with self._calling:
            found: list[Any] = self.dataset.__getitems__(indices)
            if len(found) != len(indices):
                raise DataError(f"__getitems__ of {len(indices)} indices returned {len(found)} samples")
            return found


def aside(dataset: Any) -> Any:
    """A data set to look at before the run: reading it moves no generator and no counter that the given one keeps.

    Data are not copied. Where the data set cannot be copied, it is itself.
    """
    try:
        copied = copy.copy(dataset)
        for name, value in vars(copied).items():
            if isinstance(value, Dataset):
                copied.__dict__[name] = aside(value)
            elif hasattr(value, "get_state") or hasattr(value, "bit_generator") or hasattr(value, "getstate"):
                copied.__dict__[name] = copy.deepcopy(value)
    except Exception:
        return dataset
    return copied


def _what(error: BaseException) -> str:
    """What was raised, in one line."""
    if isinstance(error, SystemExit):
        return f"sys.exit({'' if error.code is None else repr(error.code)}) was called"
    said = _from_worker(str(error))
    if said:
        return said
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:500]}" if said else type(error).__name__


def _lacks_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def _from_worker(said: str) -> str:
    """What an error says that a loader's worker sent with its whole traceback; empty if none did."""
    if "in DataLoader worker process" not in said:
        return ""
    last = re.split(r"\n(?=\S)", said.strip())[-1]  # the message, which may have several lines
    return " ".join(re.sub(r"^flatmin\.errors\.\w+: ", "", last).split())


def _is_in(path: Path, filename: str) -> bool:
    return Path(filename).name == path.name

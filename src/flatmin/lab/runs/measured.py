"""What measurements of saved runs share: where a run is, and the bounds of what can be asked for."""

from collections.abc import Callable
from os import PathLike

from ..._checks import Bounds
from ...errors import InvalidArgumentError
from ..recipe import SEED
from ..results.files import check_path
from .saved import Saved, open_saved

BOUNDS = {  # of the arguments of `measure_sharpness` and `measure_landscape`, and of the command's options
    "rho": Bounds(above=0, most=1e18),
    "samples": Bounds(integer=True, least=1),
    "seed": SEED,
    "eigenvalues": Bounds(integer=True, least=0, most=1000),
    "points": Bounds(integer=True, least=2, most=10_000),
    "radius": Bounds(above=0),
    "directions": Bounds(integer=True, least=1, most=2),
    "direction_seed": SEED,
}

Location = str | PathLike[str] | Saved  # where a run is, or what `open_saved` returned
OnWord = Callable[[str], None]


def check_bounds(**values: float) -> None:
    """Checks arguments by their `BOUNDS`, before any run is opened.

    Raises:
        InvalidArgumentError: (a ValueError) if one is out of them.
    """
    for name, value in values.items():
        BOUNDS[name].check(name, value)


def opened(run: Location, device: str | None, trust_experiment: bool) -> Saved:
    """What a run's location stands for."""
    if not isinstance(run, Saved):
        return open_saved(check_path("run", run), device, trust_experiment=trust_experiment)
    if device is not None:
        raise InvalidArgumentError(f"device={device!r} is for a path; give it to open_saved, since the run is open")
    return run

"""``flatmin landscape``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...errors import InvalidArgumentError
from ...sharpness import Landscape, loss_landscape
from ..runs.record import command_line, environment, write_json
from ..runs.saved import Saved, open_saved
from ..training.measure import Batches, fixed_batches
from ._shared import Interrupted, app
from ._terminal import Display, out_console

PARTIAL = "landscape.partial"


@app.command()
def landscape(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their checkpoints.")],
    points: Annotated[int, typer.Option(help="Along each axis.", min=2)] = 51,
    radius: Annotated[float, typer.Option(help="How far to each side, in lengths of the filters.")] = 1.0,
    directions: Annotated[int, typer.Option(help="1 for a curve, 2 for a surface.", min=1, max=2)] = 2,
    direction_seed: Annotated[int, typer.Option(help="Draws the directions, the same for all runs.", min=0)] = 0,
    plane: Annotated[bool, typer.Option("--plane", help="The plane through three runs or checkpoints.")] = False,
    samples: Annotated[int, typer.Option(help="Training samples to measure on, at most.", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Draws the samples.", min=0)] = 0,
    float64: Annotated[bool, typer.Option("--float64", help="Compute in double precision.")] = False,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="Normalise with each batch's own statistics, as in training.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to measure.  [default: where the run was]")] = None,
) -> None:
    """Look at the loss around the minimum of each run, and write landscape.json into its folder.

    The directions are random and filter-normalised (Li et al. 2018). After Ctrl-C, the same command goes on where it
    was. With --plane, one landscape of the three goes into the first one's folder.
    """
    opened = [open_saved(run, device) for run in runs]
    if plane and len(opened) != 3:
        raise InvalidArgumentError(f"--plane goes through three runs or checkpoints, got {len(opened)}")
    options: dict[str, Any] = {
        "points": points,
        "radius": radius,
        "directions": directions,
        "direction_seed": direction_seed,
        "batch_statistics": train_mode,
        "dtype": torch.float64 if float64 else None,
    }
    if plane:
        options["plane"] = [saved.model.state_dict() for saved in opened]
    for saved in opened[:1] if plane else opened:
        # In training mode, the statistics of as many samples as can be.
        size = samples if train_mode or plane else 1024
        batches = fixed_batches(saved.problem, samples, seed, saved.device, batch_size=size)
        with Display(unit="points") as display:
            try:
                path, found = write_landscape(
                    saved, batches, opened if plane else [], seed, on_progress=display.tell, **options
                )
            except KeyboardInterrupt:
                kept = saved.folder / PARTIAL
                raise Interrupted(f"what is done is kept in {kept}; the same command goes on with it") from None
        losses = [loss for row in found.loss for loss in (row if isinstance(row, tuple) else (row,))]
        out_console.print(
            f"{saved.name}, {saved.run.method}: loss {found.origin_loss:.4g} at the minimum, {min(losses):.4g} to "
            f"{max(losses):.4g} over {len(losses)} points; written to {path}",
            markup=False,
        )


def write_landscape(
    saved: Saved,
    batches: Batches,
    through: Sequence[Saved],
    seed: int,
    *,
    on_progress: Callable[[int, int, str], None],
    **options: Any,
) -> tuple[Path, Landscape]:
    """Finds the loss around a saved network, or in the plane through several, and writes it into its run's folder."""
    partial = saved.folder / PARTIAL
    found = loss_landscape(
        saved.model,
        saved.loss_fn,
        batches,
        partial=partial,
        on_progress=lambda done, total: on_progress(done, total, saved.name),
        **options,
    )
    path = saved.folder / "landscape.json"
    write_json(
        path,
        {
            "method": saved.run.method,
            "seed": saved.run.seed,
            "checkpoint_epoch": saved.epoch,
            **found.to_json(),
            "radius": options.get("radius", 1.0) if found.radius is None else found.radius,
            "checkpoints": [
                {"name": one.name, "x": x, "y": y} for one, (x, y) in zip(through, found.places, strict=True)
            ],
            "data": {"set": "train", "samples": found.samples, "seed": seed},
            "command": command_line(),
            **environment(),
        },
    )
    partial.unlink(missing_ok=True)
    return path, found

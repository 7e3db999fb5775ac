"""Whether the files of a run are still there while it trains: what somebody removes is missed then, not at the end."""

import os
import shlex
from pathlib import Path

from ...errors import OutputError
from ..results import CONFIG, LAST, METRICS


class Present:
    """The folder of a run and the files in it, as the run knows them; on the first rank.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = identity(folder)
        self._size = 0

    def written(self) -> None:
        """Notes what has been written."""
        metrics = self._folder / METRICS
        self._size = metrics.stat().st_size if metrics.exists() else 0

    def check_folder(self, epochs: int) -> None:
        """Checks that the folder is still the same one.

        Args:
            epochs: Those that are done.

        Raises:
            OutputError: If it is not; it says what is lost.
        """
        if self._made is not None and identity(self._folder) != self._made:
            raise OutputError(
                f"{self._folder}: the folder was removed or moved while the run trained, so the training ends; "
                f"what was written of its {epochs} epochs has gone with it"
            )

    def check(self, epochs: int) -> None:
        """Checks before a line is added to the metrics, and after the checkpoint that has it was written.

        Raises:
            OutputError: If the configuration or the metrics are not as they were left; it says what is lost and what
                remains.
        """
        self.check_folder(epochs)
        remains = f"{epochs} epochs are kept in {self._folder / LAST}"
        if not (self._folder / CONFIG).exists():
            raise OutputError(
                f"{self._folder / CONFIG}: was removed while the run trained, so the training ends; {remains}, which "
                "cannot be continued or measured without that file: put it back if you have it"
            )
        metrics = self._folder / METRICS
        if (metrics.stat().st_size if metrics.exists() else 0) != self._size:
            raise OutputError(
                f"{metrics}: was removed or changed while the run trained, so the training ends; {remains}, with their "
                f"metrics; to write the file anew and go on: flatmin train --resume {shlex.quote(str(self._folder))}"
            )


def identity(path: Path) -> tuple[int, int] | None:
    """Tells a folder from another one of the same name; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino

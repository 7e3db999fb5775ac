"""Where an optimizer's step stands: which of its passes is due, or that all of them are made."""

from collections.abc import Iterator
from contextlib import contextmanager

from .._passes import end_step
from ..errors import InvalidArgumentError
from ._step import NotFiniteError, Passes, Step

ORDER = "backward(), perturb(), backward(), restore(), step()"


class Progress:
    """The step under way.

    Attributes:
        under_way: The step whose passes are being made; None if there is none.
        ready: The step whose passes are all made, which the base optimizer has not made yet; None if there is none.
    """

    def __init__(self) -> None:
        self.under_way: Step | None = None
        self.ready: Step | None = None
        self._passes: Passes | None = None

    @property
    def prepared(self) -> bool:
        """Whether a step is ready that is not dropped."""
        return self.ready is not None and not self.ready.failed

    def begin(self, step: Step, passes: Passes) -> None:
        """Begins a step. One that was ready, and not made, is given up."""
        self.check_idle("another step")
        self.under_way, self._passes, self.ready = step, passes, None

    @contextmanager
    def begun(self, step: Step, passes: Passes) -> Iterator[None]:
        """The same; on leaving, a step that is not made is given up."""
        self.begin(step, passes)
        try:
            yield
        finally:
            if step is self.under_way or step is self.ready:
                self.close()

    def advance(self, step: Step) -> bool:
        """Goes on to where the next pass of ``step`` is due; returns False if none is, and it is ready then.

        Whatever is raised on the way gives the step up.
        """
        passes = self._passes
        if step is not self.under_way or passes is None:
            raise InvalidArgumentError("the step was given up by abandon(); begin another")
        try:
            next(passes)
        except StopIteration:
            step.finish()
        except NotFiniteError as error:
            step.fail(str(error))
        except BaseException:
            self.close()
            raise
        else:
            return True
        self.under_way = self._passes = None
        self.ready = step
        end_step()
        return False

    def take(self) -> Step | None:
        """The step that is ready, once."""
        step, self.ready = self.ready, None
        return step

    def close(self) -> None:
        """Gives the step up: what it has moved is put back."""
        passes = self._passes
        if self.under_way is not None:
            end_step()
        self.under_way = self._passes = self.ready = None
        if passes is not None:
            passes.close()

    def check_idle(self, what: str) -> None:
        """Raises `InvalidArgumentError` if the passes of a step are under way."""
        if self.under_way is not None:
            raise InvalidArgumentError(
                f"{what} while a step is under way, at perturbed weights perhaps: the order is {ORDER}; let its last "
                "pass be made, and call restore(), or second_step() after first_step(), or give it up with abandon()"
            )

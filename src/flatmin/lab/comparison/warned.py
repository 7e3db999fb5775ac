"""The warnings of a comparison, each given once: most are of a method, and come in each of its runs."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..._warn import depth_in_package
from ...errors import FlatminWarning

Found = tuple[str, type[FlatminWarning]]  # the text of a warning, and its class


class Warned:
    """Remembers what was said."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, what this process says is remembered."""
        show = warnings.showwarning

        def noting(message: Warning | str, *others: Any, **named: Any) -> None:
            self._said.add(_without_numbers(str(message)))
            show(message, *others, **named)

        warnings.showwarning = noting
        try:
            yield
        finally:
            warnings.showwarning = show

    def pass_on(self, run: str, found: Found) -> None:
        """Says what a process has said in a run, of this name, unless it was said before.

        Nor what was said of another seed, with other numbers.
        """
        text, category = found
        row, alike = run.rpartition("-seed")[0], _without_numbers(text)
        if self._said.isdisjoint({text, alike, f"{row}: {alike}"}):
            warnings.warn(f"{run}: {text}", category, stacklevel=depth_in_package())
        self._said.update((text, f"{row}: {alike}"))


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", text)


@contextmanager
def sent(send: Callable[[Found], None]) -> Iterator[None]:
    """Inside, flatmin's warnings are sent to the process that compares; all others are shown as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", FlatminWarning)
        show = warnings.showwarning

        def sending(message: Warning | str, category: type[Warning], *others: Any, **named: Any) -> None:
            if issubclass(category, FlatminWarning):
                # one of the user's own is there in this process alone
                known = next(kind for kind in category.__mro__ if kind.__module__ == FlatminWarning.__module__)
                send((str(message), known))
            else:
                show(message, category, *others, **named)

        warnings.showwarning = sending
        yield

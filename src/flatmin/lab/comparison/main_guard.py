"""Whether the script that starts processes can be imported by them without starting everything again."""

import ast
import inspect
import sys
from pathlib import Path
from types import FrameType

from ...errors import FlatminError

ADVICE = (
    'compare starts processes, each of which imports this script again: put the call under `if __name__ == "__main__":`'
)


def check_main_guard() -> None:
    """Checks that the call that is running stands under ``if __name__ == "__main__":`` in a script.

    Calls from a notebook, the interactive interpreter or ``python -c`` need no such line.

    Raises:
        FlatminError: If it does not, or this is already a process that was started by such a call.
    """
    script = vars(sys.modules["__main__"])
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            if frame.f_globals.get("__name__") == "__mp_main__":  # the script, while a process imports it
                raise FlatminError(ADVICE)
            if frame.f_globals is script:
                path = script.get("__file__")
                if path is not None and not _is_guarded(Path(path), frame.f_lineno):
                    raise FlatminError(f"{path}, line {frame.f_lineno}: {ADVICE}")
        frame = frame.f_back


def _is_guarded(path: Path, line: int) -> bool:
    """Whether a line of a script stands under an ``if`` on ``__name__``; also where the script cannot be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True
    return any(
        isinstance(node, ast.If)
        and node.lineno <= line <= (node.end_lineno or line)
        and any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test))
        for node in ast.walk(tree)
    )

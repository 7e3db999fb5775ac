"""Docstrings as the site shows them: written for `help()` and plain text, led into Markdown here."""

import re
from typing import Any

import griffe

# A table of plain text, between rulers of `=`, which Markdown would run together.
TABLE = re.compile(r"^=+(?: +=+)+\n(?:.+\n)+?=+(?: +=+)+$", re.MULTILINE)


def markdown(text: str) -> str:
    """The text with examples as a section of their own, and tables and blocks after ``::`` as code."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\S)::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^ *::\n", "", text, flags=re.MULTILINE)
    return TABLE.sub(lambda found: f"```text\n{found[0]}\n```", text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See `griffe.Extension.on_object`."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Leaves out what torch asks of a module and nobody calls."""
        for name in ("extra_repr", "get_extra_state", "set_extra_state"):
            cls.members.pop(name, None)

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Gives a constant of a module the comment above or beside it as its docstring, so that the site shows it."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_module and attr.name.isupper():
            attr.docstring = griffe.Docstring(comment(attr) or "A constant.", parent=attr)


def comment(attr: griffe.Attribute) -> str:
    """The comment on the lines above a constant, or behind it."""
    path, line = attr.filepath, attr.lineno
    if isinstance(path, list) or line is None:
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    above: list[str] = []
    while lines[line - 2 - len(above)].startswith("#"):
        above.append(lines[line - 2 - len(above)].lstrip("# "))
    behind = re.search(r"  # (.+)$", lines[line - 1])
    return " ".join(reversed(above)) or (behind[1] if behind else "")

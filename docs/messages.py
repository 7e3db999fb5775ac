"""Every error and warning that flatmin raises, read from its source: the site's table of messages is made of them.

By the rule of the house a message names the way out, so that the table needs no text beside it. What a message fills in
is shown as an ellipsis.
"""

import ast
import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "flatmin"

# The parts of the table: folder or file below src/flatmin, and heading; all others come under the last.
PARTS = {
    "losses": "Losses: SAF, MESA, logit squeezing, online label smoothing",
    "optim": "Optimizers: SAM and its family",
    "averages": "Averages of the weights",
    "history": "SAF's history",
    "indices": "Indices",
    "sharpness": "Sharpness and landscapes",
    "integrations/lightning": "Lightning",
    "integrations/transformers": "Transformers",
    "integrations/accelerate": "Accelerate",
    "integrations/timm": "timm",
    "integrations/opacus": "Opacus",
    "integrations/torchao": "torchao",
    "lab/problems": "The command: data, networks, experiment files",
    "lab/methods": "The command: methods and their settings",
    "lab/training": "The command: training",
    "lab/runs": "The command: run folders, checkpoints, resuming",
    "lab/comparison": "The command: comparisons",
    "lab/results": "The command: results",
    "lab/report": "The command: reports",
    "lab": "The command: other",
    "": "Everywhere: arguments, processes, files, state that is attached",
}
# Errors of Python's own that flatmin raises with words.
BUILT_IN = {"ArithmeticError", "AttributeError", "KeyError", "NotADirectoryError", "OSError", "TypeError", "ValueError"}


@dataclass(frozen=True)
class Message:
    """One place that raises or warns.

    Args:
        kind: The class of the error or warning.
        text: What it says, with an ellipsis for each value; empty where it passes on what another one said.
        file: The file, below src/flatmin.
        line: The line in it.
    """

    kind: str
    text: str
    file: str
    line: int

    @property
    def part(self) -> str:
        """The part of the table that it belongs to."""
        return next(part for part in PARTS if not part or self.file.startswith((f"{part}/", f"{part}.py")))


def kinds(source: Path = SOURCE) -> list[str]:
    """The classes of errors and warnings of flatmin's own that are public, in the order of errors.py."""
    tree = ast.parse((source / "errors.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def messages(source: Path = SOURCE) -> list[Message]:
    """Every error that is made and every warning that is given, in the order of files and lines."""
    own = {*kinds(source), *BUILT_IN}
    return [found for path in sorted(source.rglob("*.py")) for found in _of(path, source, own)]


def _of(path: Path, source: Path, own: set[str]) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    given = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        kind = ast.unparse(node.func).rpartition(".")[2]
        if kind == "warn":
            kind = ast.unparse(node.args[1]) if len(node.args) > 1 else "UserWarning"
        elif kind not in own and not (kind.startswith("_") and kind.endswith("Error")):
            continue
        texts = [text for text in (_text(argument, {}) for argument in node.args) if _says(text)]
        texts = texts or [text for text in (_text(argument, given) for argument in node.args) if _says(text)]
        yield Message(kind, max(texts, key=len, default=""), path.relative_to(source).as_posix(), node.lineno)


def _text(node: ast.expr | None, given: dict[str, ast.expr]) -> str:
    """A text as it stands in the source, with an ellipsis for each value that is filled in; empty for no text.

    Args:
        node: The expression.
        given: What was last given to a name in the file.
    """
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value, given) or "…" for value in values)
        case ast.FormattedValue(value=ast.Name() as name):
            return _text(name, given)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{_text(left, given) or '…'}{_text(right, given) or '…'}"
        case ast.IfExp(body=body, orelse=other):
            return " or: ".join(text for text in (_text(body, given), _text(other, given)) if text)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self")), args=[ast.Constant(value=str(text))]):
            return f"…{text}…"
        case ast.Name(id=name) if name in given:
            return _text(given[name], {})
    return ""


def _says(text: str) -> bool:
    return any(map(str.isalpha, text))


def page(found: list[Message]) -> str:
    """The parts of the site's page of messages."""
    parts = []
    for part, title in PARTS.items():
        rows = [message for message in found if message.part == part and message.text]
        kinds = {(" ".join(row.text.split()), row.kind) for row in rows}
        if kinds:
            lines = [
                f"<tr><td><code>{kind}</code></td><td>{html.escape(text)}</td></tr>" for text, kind in sorted(kinds)
            ]
            parts += [f"## {title}", "", "<table>", *lines, "</table>", ""]
    return "\n".join(parts)

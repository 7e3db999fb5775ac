"""Writes the tables of methods: facts from the cards in `flatmin.lab.methods`, costs from the committed results.

Each table stands between two markers, such as ``<!-- methods:begin -->`` and ``<!-- methods:end -->``.

    python docs/tables.py            # write them
    python docs/tables.py --check    # say which are not as they would be written, and fail if any is
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from flatmin.lab.methods import FORMER_NAMES, METHODS, Card, resolve_settings

ROOT = Path(__file__).resolve().parent.parent
STEPS, EPOCHS = 1000, 60  # of a run, over which the cost of a method with a second pass in some steps is averaged

# What a hyperparameter makes of a method's cost, where it is what we recommend.
CHEAPER = {"mesa": ("overhead-mesa.json", "fraction=0.25")}

# "Which one?" of the README: the case, what to take, the row of the results that has its cost, and how to begin.
WHICH = (
    (
        "no cost at all",
        "`logit_squeezing`",
        ("overhead-cpu.json", "logit_squeezing"),
        "loss = criterion(logits, y) + flatmin.logit_squeezing(logits)",
    ),
    (
        "wrong labels",
        "`MESA` on a quarter of each batch",
        (CHEAPER["mesa"][0], f"mesa {CHEAPER['mesa'][1]}"),
        "mesa = flatmin.MESA(model, decay=decay, fraction=0.25)",
    ),
    (
        "twice the time is fine",
        "`SAM`, or [SAM-ON](docs/methods.md#sam)",
        ("overhead-cpu.json", "sam"),
        "optimizer = flatmin.SAM(optimizer, rho=0.05)",
    ),
    (
        "long training on fixed samples",
        "`SAF`",
        ("overhead-cpu.json", "saf"),
        "saf = flatmin.SAF(len(train_set), num_classes)",
    ),
    (
        "streams of data, or mixup",
        "`MESA`",
        ("overhead-cpu.json", "mesa"),
        "mesa = flatmin.MESA(model, decay=decay)",
    ),
)


def read_rows(root: Path, name: str, model: str) -> dict[str, dict[str, Any]]:
    """The rows of an overhead result for one network, by their labels of today."""
    cases = json.loads((root / "benchmarks" / "results" / name).read_text())["cases"]
    (case,) = [case for case in cases if case["model"] == model]
    found = {}
    for row in case["rows"]:
        method, space, settings = row["method"].partition(" ")
        found[f"{FORMER_NAMES.get(method, method)}{space}{settings}"] = row
    return found


def time_per_step(card: Card, row: dict[str, Any]) -> str:
    """What a step costs, on average over a run with the defaults; a range where only the gradients tell."""
    full, plain = row["ratio"], row.get("ratio_of_a_step_that_does_not_pay")
    if plain is None:
        return _times(full)
    settings = resolve_settings(card, {}, epochs=EPOCHS)
    runs = [card.second_pass(step, settings, STEPS) for step in range(STEPS)]
    if None in runs:
        return f"{_times(plain)} to {_times(full)}"
    return _times(fmean(full if second else plain for second in runs))


def _cheaper(root: Path, card: Card) -> str:
    if card.name not in CHEAPER:
        return ""
    name, setting = CHEAPER[card.name]
    row = read_rows(root, name, "resnet18")[f"{card.name} {setting}"]
    return f"; {_times(row['ratio'])} with `{setting}`"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def methods_table(root: Path) -> str:
    """Every method of flatmin's own."""
    large, small = (read_rows(root, "overhead-cpu.json", model) for model in ("resnet18", "cnn"))
    rows = [
        (
            f"`{card.name}`",
            f"`{card.use or getattr(card.stands_for, '__name__', '')}`",
            card.summary,
            card.passes,
            f"{time_per_step(card, large[card.name])} ({time_per_step(card, small[card.name])}){_cheaper(root, card)}",
            card.memory,
            card.choose,
            _linked(card.paper),
        )
        for card in METHODS.values()
    ]
    headings = (
        *("method", "class", "adds", "extra passes", "time per step, ResNet-18 (small CNN)"),
        *("extra memory", "choose it when", "from"),
    )
    return _markdown(headings, rows)


def which_table(root: Path) -> str:
    """The five rows of the README."""
    rows = [
        (case, take, _times(read_rows(root, name, "resnet18")[label]["ratio"]), f"`{line}`")
        for case, take, (name, label), line in WHICH
    ]
    return _markdown(("your case", "take", "time per step", "begin with"), rows)


def averages_tables(root: Path) -> str:
    """The averages of the weights, measured again, as `benchmarks/rivals.py` writes them."""
    return (root / "benchmarks" / "results" / "rivals-averages.md").read_text().strip()


def rivals_tables(root: Path) -> str:
    """The comparisons of all methods, as `benchmarks/rivals.py` writes them."""
    return (root / "benchmarks" / "results" / "rivals.md").read_text().strip()


def _linked(paper: str) -> str:
    """The papers, those on arXiv as links."""
    link = r"[\1](https://arxiv.org/abs/\2)"
    return "; ".join(re.sub(r"^(.+), arXiv (\d+\.\d+)$", link, each) for each in paper.split("; "))


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = f"|{'---|' * len(headings)}"
    head, *body = (f"| {' | '.join(line)} |" for line in (headings, *rows))
    return "\n".join([head, ruler, *body])


# Page and name of the markers -> what stands between them. Only docs/methods.md has to have them.
TABLES: dict[tuple[str, str], Callable[[Path], str]] = {
    ("docs/methods.md", "methods"): methods_table,
    ("README.md", "which"): which_table,
    ("docs/comparison.md", "rivals"): rivals_tables,
    ("docs/comparison.md", "averages"): averages_tables,
}


def written(text: str, name: str, table: str) -> str | None:
    """A page with the table between its markers; None if it has no such markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        return None
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def update(root: Path, *, check: bool) -> list[str]:
    """Writes the tables below ``root``, or says what of them is not as it would be written."""
    wrong = []
    for (page, name), make in TABLES.items():
        path = root / page
        text = path.read_text(encoding="utf-8")
        new = written(text, name, make(root))
        if new is None:
            if page == "docs/methods.md":
                wrong.append(f"{page}: there are no markers <!-- {name}:begin --> and <!-- {name}:end -->")
        elif new != text and check:
            wrong.append(f"{page}: the table {name!r} is not what the cards and the results say")
        elif new != text:
            path.write_text(new, encoding="utf-8")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table would change")
    given = parser.parse_args(arguments)
    wrong = update(ROOT, check=given.check)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong and given.check:
        print("run: python docs/tables.py", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

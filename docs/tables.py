"""Writes the tables of README and docs: facts from the cards of methods, figures from the committed results.

The cards are those in `flatmin.lab.methods`; tables of figures alone are made in docs/result_tables.py and
docs/history_tables.py. Each table stands between two markers, such as ``<!-- methods:begin -->`` and
``<!-- methods:end -->``.

    python docs/tables.py            # write them
    python docs/tables.py --check    # say which are not as they would be written, and fail if any is
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for docs and benchmarks, which are no packages that are installed

import flatmin  # noqa: E402
from benchmarks import rivals  # noqa: E402
from docs import history_tables  # noqa: E402
from docs import result_tables as results  # noqa: E402
from docs.result_tables import markdown  # noqa: E402
from flatmin.lab.methods import FORMER_NAMES, METHODS, Card, resolve_settings  # noqa: E402

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
        "`logit_squeezing` with a coefficient of 2 to 5",
        ("overhead-cpu.json", "logit_squeezing"),
        "loss = criterion(logits, y) + flatmin.logit_squeezing(logits, coefficient=5.0)",
    ),
    (
        "twice the time is fine",
        "`SAM`, or [SAM-ON](docs/methods/sam.md)",
        ("overhead-cpu.json", "sam"),
        "optimizer = flatmin.SAM(optimizer, rho=0.1)",
    ),
    (
        "long training on fixed samples",
        "`SAF`; compare it with `logit_squeezing`",
        ("overhead-cpu.json", "saf"),
        "saf = flatmin.SAF(len(train_set), num_classes)",
    ),
    (
        "streams of data, or mixup",
        "`MESA` on a quarter of each batch",
        (CHEAPER["mesa"][0], f"mesa {CHEAPER['mesa'][1]}"),
        "mesa = flatmin.MESA(model, decay=decay, fraction=0.25)",
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


# Methods whose card stands on another page than docs/methods/NAME.md; the base has none.
SHARED_PAGES = {
    **dict.fromkeys(("sam_on", "late_sam", "ae_sam"), "sam"),
    **dict.fromkeys(("ema", "switch_ema", "lawa"), "averages"),
    "smoothing": "label-smoothing",
}


def page_of(card: Card) -> str:
    """The name of the page in docs/methods that describes a method."""
    return f"{SHARED_PAGES.get(card.name, card.name.replace('_', '-'))}.md"


def methods_table(root: Path) -> str:
    """Every method of flatmin's own, in short."""
    rows = [
        (
            f"`{card.name}`" if card.name == "base" else f"[`{card.name}`]({page_of(card)})",
            card.summary,
            card.passes,
            _cost(root, card),
            card.choose,
        )
        for card in METHODS.values()
    ]
    headings = ("method", "adds", "extra passes", "time per step, ResNet-18 (small CNN)", "choose it when")
    return f"{markdown(headings, rows)}\n\n{results.machines(root, 'overhead-cpu')}"


def _cost(root: Path, card: Card) -> str:
    large, small = (read_rows(root, "overhead-cpu.json", model) for model in ("resnet18", "cnn"))
    if card.name not in large:
        return "not measured"
    return f"{time_per_step(card, large[card.name])} ({time_per_step(card, small[card.name])}){_cheaper(root, card)}"


def card_table(root: Path, name: str) -> str:
    """What there is to know of one method: its card, and what it gained."""
    card = METHODS[name]
    settings = [
        f"{each} {_default(known.default)}" for each, known in card.hyperparameters.items() if each != "smoothing"
    ]
    rows = [
        ("in the command", f"`--methods base,{card.name}`"),
        ("in Python", _use(card)),
        ("adds", card.summary),
        ("choose it when", card.choose),
        ("settings, by default", ", ".join(settings)),
        ("time per step", _cost(root, card)),
        ("extra passes", card.passes),
        ("extra memory", card.memory),
        ("gained, in points", "<br>".join(results.gained(root, card.name)) or "not compared yet"),
        ("from", _linked(card.paper)),
    ]
    return markdown(("method", f"`{card.name}`"), [row for row in rows if row[1]])


def _default(value: object) -> str:
    return "not set" if value is None else f"`{value}`"


def _use(card: Card) -> str:
    """How it is written, with a link to its entry in the API."""
    name = getattr(card.stands_for, "__name__", "")
    use = f"`{card.use or name}`"
    if not name:
        return use if card.use else ""
    *_, room, _private = str(getattr(card.stands_for, "__module__", "")).split(".")
    if not str(getattr(card.stands_for, "__module__", "")).startswith("flatmin."):
        return use
    return f"[{use}](../api/{room}.md#flatmin.{room}.{name})"


def which_table(root: Path) -> str:
    """The five rows of the README."""
    rows = [
        (case, take, _times(read_rows(root, name, "resnet18")[label]["ratio"]), f"`{line}`")
        for case, take, (name, label), line in WHICH
    ]
    return markdown(("your case", "take", "time per step", "begin with"), rows)


def which_from_docs(root: Path) -> str:
    """The same, with links as they are from within docs/."""
    return which_table(root).replace("](docs/", "](")


def written_by_rivals(root: Path, name: str, of: Sequence[str]) -> str:
    """The comparisons of all methods, or of some, as `benchmarks/rivals.py` writes them, with the machines."""
    tables = (root / "benchmarks" / "results" / f"{name}.md").read_text().strip()
    return f"{tables}\n\n{results.machines(root, *of, 'overhead-cpu')}"


def _linked(paper: str) -> str:
    """The papers, those on arXiv as links."""
    link = r"[\1](https://arxiv.org/abs/\2)"
    return "; ".join(re.sub(r"^(.+), arXiv (\d+\.\d+)$", link, each) for each in paper.split("; "))


def names_table(root: Path) -> str:
    """What `import flatmin` gives, with a link to each entry of the API."""
    rows = []
    for name in flatmin.__all__:
        value = getattr(flatmin, name)
        inner = getattr(value, "__name__", "").startswith("flatmin.")
        room = name if inner else value.__module__.split(".")[1]
        link = f"{room}.md" if inner else f"{room}.md#flatmin.{room}.{name}"
        rows.append((f"[`flatmin.{name}`]({link})", str(value.__doc__).partition("\n")[0]))
    return markdown(("name", "what it is"), rows)


# Page and name of the markers -> what stands between them.
TABLES: dict[tuple[str, str], Callable[[Path], str]] = {
    ("README.md", "which"): which_table,
    ("docs/choose.md", "which"): which_from_docs,
    ("docs/choose.md", "decisions"): results.decisions,
    ("docs/api/README.md", "names"): names_table,
    ("docs/methods/README.md", "methods"): methods_table,
    **{
        (f"docs/methods/{page_of(card)}", f"card-{name}"): partial(card_table, name=name)
        for name, card in METHODS.items()
        if name != "base"
    },
    ("docs/methods/history.md", "forms"): history_tables.forms,
    ("docs/methods/history.md", "large"): history_tables.large,
    ("docs/methods/history.md", "means"): history_tables.means,
    ("docs/methods/history.md", "costs"): history_tables.costs,
    ("docs/methods/history.md", "sent"): history_tables.sent,
    ("docs/methods/averages.md", "refreshed"): history_tables.refreshed,
    ("docs/methods/mesa.md", "statistics"): results.mesa_statistics,
    ("docs/methods/mesa.md", "cheaper"): results.cheaper_mesa,
    ("docs/methods/msam.md", "statistics"): results.one_pass_statistics,
    ("docs/findings/comparison.md", "rivals"): partial(written_by_rivals, name="rivals", of=rivals.COMPARISONS),
    ("docs/findings/comparison.md", "averages"): partial(written_by_rivals, name="rivals-averages", of=rivals.AVERAGES),
    ("docs/findings/comparison.md", "one-pass"): partial(written_by_rivals, name="rivals-one-pass", of=rivals.ONE_PASS),
    ("docs/findings/comparison.md", "fresh"): results.comparison("fresh-digits"),
    ("docs/findings/comparison.md", "digits"): results.comparison("digits"),
    ("docs/findings/comparison.md", "fashion-mnist"): results.comparison("fashion-mnist"),
    ("docs/findings/after-training.md", "after"): partial(results.after_table, name="after-digits"),
    ("docs/findings/after-training.md", "after-mnist1d"): partial(results.after_table, name="after-mnist1d"),
    ("docs/findings/after-training.md", "after-bert"): partial(results.after_table, name="after-bert"),
    ("docs/findings/after-training.md", "quantization"): results.quantization,
    ("docs/plug-in/opacus.md", "private"): results.private,
    ("docs/findings/trajectory.md", "targets"): results.targets,
    ("docs/findings/flatness.md", "flatness-mnist1d"): partial(results.flatness, name="flatness-mnist1d"),
    ("docs/findings/flatness.md", "flatness-digits"): partial(results.flatness, name="flatness-digits"),
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
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        new = written(text, name, make(root))
        if new is None:
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

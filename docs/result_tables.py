"""The tables of figures in the docs: each is made of committed JSON files, and names the machine they come from.

Files of benchmarks/results of one table may come from several machines; what was measured on a GPU has tables of its
own. `docs/tables.py` says where each table stands.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import rivals
from flatmin.lab.results.after import AFTER

# What a step may cost in the table of decisions.
PRICES = (("at most 1.1x", 1.1), ("at any price", float("inf")))

# The targets that SAF's loss was given, where the file does not name them.
TARGETS = {
    "uniform": "nothing: the same logit for every class",
    "smoothing": "label smoothing",
    "ols": "online label smoothing",
}
# The measures of sharpness, by their keys in the files.
MEASURES = {
    "sam_sharpness": "SAM, rho 0.05",
    "sam_sharpness_adaptive": "adaptive, rho 0.5",
    "average_sharpness": "average case",
    "top_eigenvalue": "top eigenvalue",
    "hessian_trace": "trace",
}

DPSAT = ("direction", "rho")  # what was chosen for it
# The comparisons of MESA's statistics at several horizons, and what they are on.
HORIZONS = {
    "statistics-horizons-digits": "digits",
    "statistics-horizons-mnist1d": "MNIST-1D",
    "statistics-horizons-mnist1d-noise": "MNIST-1D, 20 % wrong labels",
    "statistics-horizons-fashion": "Fashion-MNIST, 10,000 images, a ResNet",
}


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    head, *body = (f"| {' | '.join(line)} |" for line in (headings, *rows))
    return "\n".join([head, f"|{'---|' * len(headings)}", *body])


def result(root: Path, name: str) -> dict[str, Any]:
    """What a committed file of results holds."""
    found: dict[str, Any] = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def machines(root: Path, *names: str) -> str:
    """A line on where results were measured: processor, cores, torch; and which, where there are several machines."""
    found: dict[str, list[str]] = {}
    for name in names:
        measured = result(root, name)
        hardware, torch = measured["hardware"], measured["versions"]["torch"].partition("+")[0]
        on = hardware["accelerator"] or f"{hardware['processor'].replace('(R)', '')}, {hardware['cores']} cores"
        found.setdefault(f"{on}, torch {torch}", []).append(name)
    parts = [f"{on} ({', '.join(of)})" if len(found) > 1 else on for on, of in found.items()]
    return f"Measured on: {'; '.join(parts)}."


def signed(interval: dict[str, float], digits: int = 2) -> str:
    """A difference with its interval."""
    return f"{interval['mean']:+.{digits}f} ± {interval['half']:.{digits}f}"


def comparisons(root: Path) -> list[tuple[str, list[rivals.Point]]]:
    """The comparisons of all methods, by the data they are on: some are those measured again."""
    files = sorted((root / "benchmarks" / "results").glob("*.json"))
    return _comparisons(root, tuple(file.stat().st_mtime_ns for file in files))


@lru_cache(maxsize=4)
def _comparisons(root: Path, _: tuple[int, ...]) -> list[tuple[str, list[rivals.Point]]]:
    results = root / "benchmarks" / "results"
    first = rivals.read_all(
        [results / f"{name}.json" for name in rivals.COMPARISONS], results / "overhead-cpu.json", rivals.JUDGED_AGAIN
    )
    again = [each for names in (rivals.AVERAGES, rivals.ONE_PASS) for each in rivals.judged_again(names, results)]
    found = [(rivals.title(each), points) for each, points in first]
    for each, points in again:
        (known,) = [points for title, points in found if title == rivals.title(each)]
        known += [point for point in points if point.method in rivals.JUDGED_AGAIN]
    return found


def gained(root: Path, method: str) -> list[str]:
    """What a method gained on each data set, with the settings that were chosen for it."""
    found = []
    for title, points in comparisons(root):
        own = [point for point in points[1:] if point.method == method]
        if own:
            best = max(own, key=lambda point: point.accuracy)
            found.append(f"{title}: {_outcome(best)}")
    return found


def _outcome(point: rivals.Point) -> str:
    settings = point.label.partition(" ")[2]
    return f"{point.difference:+.2f} ± {point.difference_half:.2f}" + (f" (`{settings}`)" if settings else "")


def decisions(root: Path) -> str:
    """The most accurate method of each data set, for what a step may cost."""
    rows = []
    for title, points in comparisons(root):
        cells, before = [], None
        for _, limit in PRICES:
            allowed = [point for point in points[1:] if point.cost <= limit]
            best = max(allowed, key=lambda point: point.difference)
            beyond = best.p_value is not None and best.p_value < 0.05
            text = f"`{best.method}` {best.difference:+.2f} ± {best.difference_half:.2f}"
            cells.append("the same" if best is before else text if beyond else f"{text}, within noise")
            before = best
        rows.append((title, f"{points[0].accuracy:.2f} %", *cells))
    table = markdown(("data", "plain optimizer", *(f"step {name}" for name, _ in PRICES)), rows)
    return f"{table}\n\n{machines(root, *rivals.COMPARISONS, *rivals.AVERAGES, *rivals.ONE_PASS, 'overhead-cpu')}"


def comparison(name: str) -> Callable[[Path], str]:
    """The table of one comparison, as the command prints it."""

    def made(root: Path) -> str:
        rows = []
        for row in result(root, name)["rows"]:
            base, p_value = row["label"] == "base", row.get("p_value_holm")
            rows.append(
                (
                    f"`{row['label']}`",
                    f"{row['accuracy']['mean']:.2f} ± {row['accuracy']['half']:.2f}",
                    "" if base else signed(row["difference"]),
                    "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
                    f"{row['step_ratio']:.2f}x",
                    _bytes(row["extra_bytes"]),
                )
            )
        headings = ("method", "test accuracy %", "paired difference", "p (Holm)", "time/step", "extra memory")
        return f"{markdown(headings, rows)}\n\n{machines(root, name)}"

    return made


def _bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def targets(root: Path) -> str:
    """SAF's loss with other targets than the network's own past."""
    files = [("ablation-mnist1d-noise", "MNIST-1D, 20 % wrong labels"), ("ablation-digits", "digits")]
    columns, names = [], dict(TARGETS)
    for file, _ in files:
        uniform = file.replace("ablation", "ablation-uniform")
        rows = [*result(root, file)["rows"], *result(root, uniform)["rows"]]
        names |= result(root, file)["targets"]
        columns.append({row["method"].removeprefix("saf-"): row for row in rows})
    order = [name for name in columns[0] if name not in ("base", *TARGETS)] + list(TARGETS)
    table = markdown(
        ("the loss compares a sample with", *(title for _, title in files)),
        [(names[name].replace(" .", " 0."), *(_target(column[name]) for column in columns)) for name in order],
    )
    bases = " and ".join(f"{column['base']['accuracy']['mean']:.2f}" for column in columns)
    return (
        f"{table}\n\nDifferences to the plain optimizer in points (bases {bases} %); in brackets the coefficient that "
        f"was chosen. {machines(root, *(file for file, _ in files))}"
    )


def _target(row: dict[str, Any]) -> str:
    chosen = row["settings"].get("coefficient", row["settings"]["smoothing"])
    return f"{signed(row['difference'])} ({chosen:g})"


def flatness(root: Path, name: str) -> str:
    """Measures of sharpness of each method's networks; in bold where the difference to the base is beyond noise."""
    found = result(root, name)
    methods = list(found["rows"])
    rows = []
    for key, title in MEASURES.items():
        for logits in ("raw", "normalised"):
            of = f"{key} {logits}"
            correlation = found["rank_correlation_with_accuracy"][of]["rho"]
            cells = [_measure(found["rows"][method][of]) for method in methods]
            rows.append((f"{title}, {logits} logits", *cells, f"{correlation:+.2f}"))
    accuracy = [f"{found['rows'][method]['test_accuracy']['mean']['mean']:.2f}" for method in methods]
    rows.append(("test accuracy %", *accuracy, ""))
    return f"{markdown(('measure', *methods, 'rank correlation with accuracy'), rows)}\n\n{machines(root, name)}"


def _measure(entry: dict[str, Any]) -> str:
    value, difference = f"{entry['mean']['mean']:.3g}", entry["difference"]
    beyond = difference["half"] > 0 and abs(difference["mean"]) > difference["half"]
    return f"**{value}**" if beyond else value


def cheaper_mesa(root: Path) -> str:
    """What MESA keeps where its average runs on a share of each batch, or in some steps."""
    cases = result(root, "overhead-mesa")["cases"]
    (case,) = [case for case in cases if case["model"] == "resnet18"]
    times = {row["method"].partition(" ")[2]: f"{row['ratio']:.2f}x" for row in case["rows"]}
    data = [("mnist1d", "MNIST-1D, 20 % wrong labels"), ("digits", "digits")]
    columns = []
    for name, _ in data:
        rows = [*result(root, f"mesa-{name}")["rows"], *result(root, f"mesa-interval-{name}")["rows"]]
        columns.append({row["label"].partition(" ")[2]: signed(row["difference"]) for row in rows})
    rows = [
        (f"`{setting}`", times.get(setting, "not measured"), *(column[setting] for column in columns))
        for setting in columns[0]
        if setting
    ]
    return f"{markdown(('', 'step', *(title for _, title in data)), rows)}\n\n{machines(root, 'overhead-mesa')}"


def mesa_statistics(root: Path) -> str:
    """MESA's gain by how its average is normalised, and how far the average looks back."""
    rows = []
    for name, title in HORIZONS.items():
        found = result(root, name)
        mesa = [row for row in found["rows"] if row["method"] == "mesa"]
        for horizon in dict.fromkeys(row["settings"]["ema_epochs"] for row in mesa):
            by = {
                row["settings"]["statistics"]: row["difference"]
                for row in mesa
                if row["settings"]["ema_epochs"] == horizon
            }
            epochs = f"{horizon:g} epoch{'s' if horizon > 1 else ''}"
            kinds = ("averaged", "batch", "fresh")
            rows.append((f"{title}, {len(found['seeds'])} seeds", epochs, *(signed(by[kind]) for kind in kinds)))
    table = markdown(("data", "horizon", "`averaged`", "`batch`", "`fresh`"), rows)
    return f"{table}\n\n{machines(root, *HORIZONS)}"


def private(root: Path) -> str:
    """DP-SAT beside DP-SGD, by the epsilon that was spent."""
    rows = []
    for epsilon in (1, 2, 3):
        base, dpsat = result(root, f"private-fashion-{epsilon}")["rows"]
        settings = ", ".join(f"`{name}={value}`" for name, value in dpsat["settings"].items() if name in DPSAT)
        rows.append((str(epsilon), f"{base['accuracy']['mean']:.2f} %", signed(dpsat["difference"]), settings))
    table = markdown(("epsilon", "DP-SGD", "DP-SAT, points", "settings that were chosen"), rows)
    return f"{table}\n\n{machines(root, 'private-fashion-1')}"


def quantization(root: Path) -> str:
    """A small BERT in few bits: accuracy of what differences are to, and paired differences to it."""
    found = result(root, "quantization")["summary"]
    widths = {"float": "float", "4": "4 bits", "3": "3 bits", "2": "2 bits"}
    rows = []
    for name, by_width in found["rows"].items():
        to = {each["to"] for each in by_width.values() if "to" in each}
        cells = [_converted(by_width.get(width)) for width in widths]
        rows.append((f"`{name}`", *cells, *([f"`{each}`" for each in to] or [""])))
    table = markdown((f"small BERT, {found['seeds']} seeds", *widths.values(), "difference to"), rows)
    return f"{table}\n\n{machines(root, 'quantization')}"


def _converted(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if "difference" not in entry:
        return f"{entry['accuracy']['mean']:.2f} %"
    return signed(entry["difference"]) + ("*" if entry["p_value_holm"] < 0.05 else "")


def after_table(root: Path, name: str) -> str:
    """What is left of each network after training: accuracy of the base, and paired differences to it."""
    found = result(root, name)
    measures = found["rows"][0]["after"]  # a file from before a measure was added has none of it
    headings = [f"{len(found['seeds'])} seeds", "trained", *(AFTER[each] for each in measures)]
    rows = []
    for row in found["rows"]:
        own, after = row["label"], row["after"]
        if row["method"] == "base":
            cells = [f"{each['mean']['mean']:.2f} %" for each in after.values()]
            rows.append([own, f"{row['accuracy']['mean']:.2f} %", *cells])
        else:
            cells = [signed(each["difference"]) + "*" * (each["p_value_holm"] < 0.05) for each in after.values()]
            rows.append([own, signed(row["difference"]) + "*" * (row["p_value_holm"] < 0.05), *cells])
    return f"{markdown(headings, rows)}\n\n{machines(root, name)}"


def one_pass_statistics(root: Path) -> str:
    """What the one-pass methods gain with the batch-norm statistics of their training, and with fresh ones."""
    cells: dict[str, list[str]] = {}
    for name in ("msam-digits", "msam-mnist1d"):
        for row in result(root, name)["rows"]:
            fresh = row["after"]["fresh"]
            if row["method"] == "base":
                own = [f"{row['accuracy']['mean']:.2f} %", f"{fresh['mean']['mean']:.2f} %"]
            else:
                own = [signed(row["difference"]), signed(fresh["difference"])]
            cells.setdefault(row["label"], []).extend(own)
    headings = ("10 seeds", "digits", "digits, fresh", "MNIST-1D", "MNIST-1D, fresh")
    return f"{markdown(headings, [(label, *own) for label, own in cells.items()])}\n\n{machines(root, 'msam-digits')}"

"""The tables of figures on what SAF remembers, and on the statistics of averages; see docs/result_tables.py."""

from pathlib import Path
from statistics import fmean

from docs.result_tables import machines, markdown, result, signed
from flatmin.lab.comparison.stats import interval

# What a row takes, for `C` classes; measured in text-fidelity.json.
ROW_BYTES = {
    "dense": "4 C",
    "half": "2 C",
    "int8": "C + 2",
    "int6": "0.75 C + 2",
    "int4": "0.5 C + 2",
    "lowrank": "96",
    "topk": "98",
    "mean": "4 C, one slot",
    "base": "0",
}


def forms(root: Path) -> str:
    """What each form of history takes, and what it keeps of the dense one's gradient and gain."""
    found = {row["row"]: row for row in result(root, "text-fidelity")["summary"]}
    dense, rows = found["dense"]["bytes_per_sample"], []
    for name, takes in ROW_BYTES.items():
        row = found[name]
        cosine = "" if name == "base" else "another target" if name == "mean" else _cosine(row)
        changes = ["0", "0"]
        if name != "dense":
            loss, accuracy = row["test_loss_minus_dense"], row["accuracy_minus_dense"]
            percent = {key: 100 * accuracy[key] for key in ("mean", "half")}
            changes = [signed(loss, 4), signed(percent)]
        share = 100 * row["bytes_per_sample"] / dense
        title = "no SAF" if name == "base" else f'`"{name}"`'
        rows.append((title, takes, f"{share:.{1 if 0 < share < 10 else 0}f} %", cosine, *changes))
    headings = (
        "`history=`",
        "bytes per row, `C` classes",
        "of dense, `C = 1024`",
        "gradient's cosine to dense",
        "test loss - dense",
        "accuracy - dense, points",
    )
    return f"{markdown(headings, rows)}\n\n{machines(root, 'text-fidelity')}"


def _cosine(row: dict[str, dict[str, float]]) -> str:
    return f"{row['mean_fidelity']['cosine']:.4f}"


def large(root: Path) -> str:
    """Histories of ImageNet's sizes that were made and used."""
    rows = [
        (
            f"ImageNet-{case['name'].partition('-')[2]}",
            f"{case['num_samples']:,} x {case['num_classes']:,}",
            f'`"{case["form"]}"`',
            _gigabytes(case["nbytes"]),
            _gigabytes(case["dense_bytes"]),
        )
        for case in sorted(result(root, "history")["cases"], key=lambda case: (case["num_samples"], case["nbytes"]))
    ]
    headings = ("data", "samples x classes", "`history=`", "takes", "dense would take")
    return f"{markdown(headings, rows)}\n\n{machines(root, 'history')}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e12:.1f} TB" if count >= 1e12 else f"{count / 1e9:.2f} GB"


def means(root: Path) -> str:
    """What a running mean gains, beside the lag, over the seeds that both were run with."""
    rows = {row["settings"].get("mean_momentum"): row for row in result(root, "mean-digits")["rows"]}
    base = rows[None]["test_accuracy"]
    lag = {row["method"]: row for row in result(root, "digits")["rows"]}["saf"]["test_accuracy"][: len(base)]
    table = [("lag 3", _paired(lag, base), "")]
    for momentum in sorted(momentum for momentum in rows if momentum is not None):
        mean = rows[momentum]["test_accuracy"]
        table.append((f"mean, momentum {momentum:g}", _paired(mean, base), _paired(mean, lag)))
    headings = ("compared with", "points to the base", "points to lag 3")
    return (
        f"{markdown(headings, table)}\n\nscikit-learn's digits, {len(base)} seeds, base {fmean(base):.2f} %. "
        f"{machines(root, 'digits', 'mean-digits')}"
    )


def _paired(values: list[float], others: list[float]) -> str:
    found = interval([value - other for value, other in zip(values, others, strict=True)])
    return f"{found.mean:+.2f} ± {found.half:.2f}"


def costs(root: Path) -> str:
    """What a step with SAF takes in each form."""
    rows = []
    for name in ("overhead-histories", "overhead-lowrank"):
        (case,) = result(root, name)["cases"]
        for row in case["rows"]:
            form = row["method"].partition("history=")[2]
            if form:
                again = ", by itself" if name == "overhead-lowrank" else ""
                low, high = row["ratio_quartiles"]
                rows.append((f'`"{form}"`{again}', f"{row['ratio']:.3f}x", f"{low:.2f}x to {high:.2f}x"))
    table = markdown(("`history=`", "step", "quartiles"), rows)
    return f"{table}\n\n{machines(root, 'overhead-histories', 'overhead-lowrank')}"


def sent(root: Path) -> str:
    """What each rank sends in a step."""
    cases = {(case["ranks"], case["form"], case["sharing"]): case for case in result(root, "ranks")["cases"]}
    columns = [(ranks, sharing) for ranks in (2, 4) for sharing in ("replicate", "shard")]
    rows = [
        (form, *(f"{cases[ranks, form, how]['sent_bytes_per_step_and_rank'] / 1e3:.0f}" for ranks, how in columns))
        for form in dict.fromkeys(form for _, form, _ in cases)
    ]
    table = markdown(("form", *(f"{ranks} ranks, {how}" for ranks, how in columns)), rows)
    return f"{table}\n\n{machines(root, 'ranks')}"


def refreshed(root: Path) -> str:
    """Test accuracy of an average with the averaged statistics, and with those made anew."""
    found, rows = result(root, "refresh")["rows"], []
    fresh = {"fresh 512": "fresh, 512 samples", "fresh 2048": "fresh, 2,048", "fresh 10000": "fresh, all"}
    for horizon, epoch in sorted({(row["horizon"], row["epoch"]) for row in found}):
        of = [row for row in found if (row["horizon"], row["epoch"]) == (horizon, epoch)]
        means = [fmean(row[key] for row in of) for key in ("network", "averaged")]
        means += [fmean(row[key]["mean"] for row in of) for key in fresh]
        cells = [f"{mean:.1f}" for mean in means]
        if means[1] < means[0] - 5:
            cells[1] = f"**{cells[1]}**"
        rows.append((f"{horizon} epoch{'s' * (horizon > 1)}", str(epoch), *cells))
    headings = ("average over", "after epoch", "network", "averaged", *fresh.values())
    return f"{markdown(headings, rows)}\n\n{machines(root, 'refresh')}"

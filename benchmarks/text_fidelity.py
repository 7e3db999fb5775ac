"""How faithful the compressed forms of SAF's history are, on the outputs of a network with a thousand classes.

The task is to predict the next token of the Python standard library's own source text, in a byte-pair vocabulary made
on the spot: it needs no download. A sample is a window of tokens and the one that follows; test windows are of other
modules. Four parts, each written to the JSON file as soon as it is done; the same command again goes on where the last
one stopped.

fidelity: in one run, with the dense history at work, each form is fed the same outputs, and the gradient of its loss
    after the logits is compared to that of the dense form.
timing: the training step of each form, the steps of all forms interleaved in one process.
runs: each form trains by itself, from the same weights and with the same order of batches as the others, for each seed.
report: the table, and the plot with --plot. Needs nothing but the JSON file.

    python benchmarks/text_fidelity.py --out benchmarks/results/text-fidelity.json --jobs 2
    python benchmarks/text_fidelity.py --out benchmarks/results/text-fidelity.json --parts report --plot fidelity.svg

It needs `pip install tokenizers matplotlib` beside flatmin[cli].
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import random
import statistics
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin import SAF
from flatmin.errors import require
from flatmin.lab.comparison.stats import holm, interval, paired_p_value
from flatmin.lab.comparison.timing import synchronize
from flatmin.lab.runs.record import command_line, environment, plain, write_json

BASE, DENSE = "base", "dense"

# Label -> arguments of SAF beyond those of `Settings`; None for no SAF at all. The value of "history" may be a codec.
ROWS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    DENSE: {},
    "half": {"history": "half"},
    "int8": {"history": "int8"},
    "int6": {"history": "int6"},
    "int4": {"history": "int4"},
    "topk": {"history": "topk"},
    "lowrank": {"history": "lowrank"},
    "mean": {"history": "mean"},
}

PARTS = ("fidelity", "timing", "runs", "report")
DATA_TABLES = {"encodings", "pydoc_data"}  # tables of characters, and the manual: hardly Python
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
LARGEST_TEST_MODULE = 0.02  # of the corpus, so that no single module makes the test
TIMED_BATCHES = 16
LEAST_SEEDS = 5  # for a difference to be called one


@dataclass(frozen=True)
class Settings:
    """What all rows have in common; a result is continued only under the same.

    From pilot runs of one or two seeds: the base's final test loss is lowest for learning rates of 5e-4 to 1e-3, and at
    1e-3 this coefficient lowers it by several times the differences between seeds, so that a form of the history that
    does not work shows.
    """

    windows: int = 200_000
    test_windows: int = 20_000
    vocabulary: int = 1024
    context: int = 16
    width: int = 256
    embedding: int = 64
    batch: int = 512
    epochs: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.01
    coefficient: float = 1.0
    temperature: float = 5.0
    lag: int = 3
    start_epoch: int = 3
    device: str = "cpu"

    @property
    def first_acting_epoch(self) -> int:
        """From which on the trajectory loss is at work."""
        return max(self.start_epoch, self.lag)


@dataclass(frozen=True)
class Corpus:
    """The windows, each of ``context + 1`` tokens, and what they were made from."""

    train: Tensor
    test: Tensor
    facts: dict[str, Any]


def read_corpus(folder: Path, settings: Settings) -> Corpus:
    """Reads the Python files below ``folder``, splits them by module, makes the vocabulary and draws the windows."""
    files = _files(folder)
    train_texts, test_texts = _split_by_module(files)
    tokenizer = _train_tokenizer(train_texts, settings.vocabulary)
    facts: dict[str, Any] = {
        "source": "the standard library of this Python" if folder == _library() else "another folder",
        "files": len(files),
        "bytes": sum(len(text.encode()) for text in files.values()),
        "digest": _digest(files),
        "vocabulary": tokenizer.get_vocab_size(),
    }
    windows = {}
    for name, texts, count in (
        ("train", train_texts, settings.windows),
        ("test", test_texts, settings.test_windows),
    ):
        documents = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
        windows[name], stride = _draw_windows(documents, settings.context + 1, count)
        facts[name] = {
            "files": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": sum(map(len, documents)),
            "windows": len(windows[name]),
            "stride": stride,
        }
    facts["windows_digest"] = hashlib.sha256(torch.cat(list(windows.values())).numpy().tobytes()).hexdigest()
    return Corpus(windows["train"], windows["test"], facts)


@functools.cache
def read_library(settings: Settings) -> Corpus:
    """`read_corpus` of this Python's standard library, once in a process: it takes a quarter of a minute."""
    return read_corpus(_library(), settings)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files(folder: Path) -> dict[str, str]:
    """Path within ``folder`` -> text, in the paths' order, without files that name the machine they were built on."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    return {
        name: path.read_text(encoding="utf-8", errors="replace")
        for name, path in sorted(paths.items())
        if not NOT_LIBRARY & set(name.split("/")) and _module(name) not in DATA_TABLES and "_sysconfigdata" not in name
    }


def _module(name: str) -> str:
    return name.split("/")[0]


def _digest(files: Mapping[str, str]) -> str:
    whole = hashlib.sha256()
    for name, text in files.items():
        whole.update(f"{name}\0{text}\0".encode())
    return whole.hexdigest()


def _split_by_module(files: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Texts for training, and those for testing, about a tenth; a package goes to one side as a whole."""
    sizes: dict[str, int] = defaultdict(int)
    for name, text in files.items():
        sizes[_module(name)] += len(text)
    whole = sum(sizes.values())
    modules = sorted(sizes)
    random.Random(0).shuffle(modules)
    test: set[str] = set()
    taken = 0
    for module in modules:
        if taken < 0.1 * whole and (sizes[module] <= LARGEST_TEST_MODULE * whole or len(modules) < 10):
            test.add(module)
            taken += sizes[module]
    return (
        [text for name, text in files.items() if _module(name) not in test],
        [text for name, text in files.items() if _module(name) in test],
    )


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level byte-pair encoding."""
    tokenizers = require("tokenizers", install="tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _draw_windows(documents: Sequence[Tensor], length: int, count: int) -> tuple[Tensor, int]:
    """Draws ``count`` windows, none across documents; they overlap only where there would be too few.

    Returns:
        The windows, int16, and the distance of the places they were drawn from.
    """
    for stride in range(length, 0, -1):
        rows = [document.unfold(0, length, stride) for document in documents if len(document) >= length]
        if sum(map(len, rows)) >= count:
            windows = torch.cat(rows)
            chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]
            return windows[chosen].to(torch.int16), stride
    raise SystemExit(f"the corpus is too small for {count} windows of {length} tokens")


def make_network(settings: Settings) -> nn.Module:
    """A network with one hidden layer over the concatenated embeddings of the window."""
    return nn.Sequential(
        nn.Embedding(settings.vocabulary, settings.embedding),
        nn.Flatten(),
        nn.Linear(settings.context * settings.embedding, settings.width),
        nn.LayerNorm(settings.width),
        nn.GELU(),
        nn.Linear(settings.width, settings.vocabulary),
    ).to(settings.device)


def make_saf(row: str, settings: Settings) -> SAF | None:
    """The trajectory loss of a row of the table."""
    extra = ROWS[row]
    if extra is None:
        return None
    extra = dict(extra)
    shared: dict[str, Any] = {
        "coefficient": settings.coefficient,
        "temperature": settings.temperature,
        "lag": settings.lag,
        "start_epoch": settings.start_epoch,
    }
    return SAF(settings.windows, settings.vocabulary, **{**shared, **extra}).to(settings.device)


def describe(row: str) -> dict[str, Any] | None:
    """The arguments of a row as JSON can say them."""
    extra = ROWS[row]
    if extra is None:
        return None
    return {key: repr(value) if callable(value) else value for key, value in extra.items()}


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """The optimizer of all rows."""
    return torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


# Called before each backward pass with the epoch, the step in it, the index, the logits, the criterion's and the
# trajectory loss.
Watch = Callable[[int, int, Tensor, Tensor, Tensor, Tensor], None]


def train(row: str, seed: int, settings: Settings, corpus: Corpus, watch: Watch | None = None) -> dict[str, Any]:
    """Trains one network and returns what there is to know about it."""
    begin = time.perf_counter()
    torch.manual_seed(seed)
    network, saf = make_network(settings), make_saf(row, settings)
    order = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(network, settings)
    steps = settings.epochs * math.ceil(settings.windows / settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    windows = corpus.train.to(settings.device, torch.int64)
    curve = []
    for epoch in range(settings.epochs):
        if saf is not None:
            saf.set_epoch(epoch)
        network.train()
        totals = torch.zeros(2, device=settings.device)
        batches = torch.split(torch.randperm(settings.windows, generator=order), settings.batch)
        for step, index in enumerate(batches):
            batch = windows[index.to(settings.device)]
            optimizer.zero_grad()
            logits = network(batch[:, :-1])
            loss = F.cross_entropy(logits, batch[:, -1])
            penalty = loss.new_zeros(()) if saf is None else saf(logits, index)
            if watch is not None:
                watch(epoch, step, index, logits, loss, penalty)
            (loss + penalty).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            totals += torch.stack([loss.detach(), penalty.detach()]) * len(index)
        train_loss, trajectory = (totals / settings.windows).tolist()
        test_loss, accuracy = evaluate(network, corpus.test, settings)
        curve.append(
            {"train_loss": train_loss, "trajectory_loss": trajectory, "test_loss": test_loss, "accuracy": accuracy}
        )
    return {
        "row": row,
        "seed": seed,
        "test_loss": curve[-1]["test_loss"],
        "accuracy": curve[-1]["accuracy"],
        "bytes_per_sample": 0.0 if saf is None else saf.history.nbytes / settings.windows,
        "seconds": time.perf_counter() - begin,
        "curve": curve,
    }


@torch.no_grad()
def evaluate(network: nn.Module, windows: Tensor, settings: Settings) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the share of next tokens that are the likeliest by the network."""
    network.eval()
    loss, right = 0.0, 0
    for part in torch.split(windows, 4096):
        batch = part.to(settings.device, torch.int64)
        logits = network(batch[:, :-1])
        loss += float(F.cross_entropy(logits, batch[:, -1], reduction="sum"))
        right += int((logits.argmax(dim=1) == batch[:, -1]).sum())
    return loss / len(windows), right / len(windows)


def measure_fidelity(rows: Sequence[str], settings: Settings, corpus: Corpus, every: int) -> list[dict[str, Any]]:
    """Feeds all ``rows`` the outputs of one run of the dense form and compares what each would have added to it.

    Each form sees every batch; every so many steps of the epochs in which the loss is at work, gradients after the
    logits are compared: ``g`` of the form's loss to ``g_dense``.

    Returns:
        For each row, means over the batches of an epoch, and over the epochs: ``cosine`` of ``g`` and ``g_dense``;
        ``relative_error``, ``|g - g_dense| / |g_dense|``; ``whole_error``, ``|g - g_dense|`` as a share of the whole
        gradient that dense trains by, the criterion's included; ``loss_error``, the relative error of the loss.
    """
    forms = {row: saf for row in rows if (saf := make_saf(row, settings)) is not None}
    names = ("cosine", "relative_error", "whole_error", "loss_error")
    seen: dict[str, dict[int, list[tuple[float, ...]]]] = {row: defaultdict(list) for row in forms}

    def watch(epoch: int, step: int, index: Tensor, logits: Tensor, criterion: Tensor, penalty: Tensor) -> None:
        compared = epoch >= settings.first_acting_epoch and step % every == 0
        if compared:
            (wanted,) = torch.autograd.grad(penalty, logits, retain_graph=True)
            (rest,) = torch.autograd.grad(criterion, logits, retain_graph=True)
            wanted = wanted.double()
            whole = (rest + wanted).norm()
        for row, saf in forms.items():
            if step == 0:
                saf.set_epoch(epoch)
            leaf = logits.detach().requires_grad_()  # SAF records nothing of an evaluation
            loss = saf(leaf, index)
            if compared:
                gradient = torch.autograd.grad(loss, leaf)[0].double()
                seen[row][epoch].append(
                    (
                        float(F.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0, eps=0)),
                        float((gradient - wanted).norm() / wanted.norm()),
                        float((gradient - wanted).norm() / whole),
                        float((loss - penalty).detach().abs() / penalty.detach()),
                    )
                )

    train(DENSE, 0, settings, corpus, watch)
    result = []
    for row, saf in forms.items():
        epochs = [
            {"epoch": epoch, **dict(zip(names, map(statistics.fmean, zip(*batches, strict=True)), strict=True))}
            for epoch, batches in seen[row].items()
        ]
        result.append(
            {
                "row": row,
                "bytes_per_sample": saf.history.nbytes / settings.windows,
                "mean": {name: statistics.fmean(epoch[name] for epoch in epochs) for name in names},
                "last": epochs[-1],
                "epochs": epochs,
            }
        )
    return result


def measure_time(rows: Sequence[str], settings: Settings, corpus: Corpus, seconds: float) -> list[dict[str, Any]]:
    """Measures the training step of all ``rows``, base first, in an order drawn anew in each round.

    A few batches stand for the data set, and each was recorded ``lag`` epochs before it is timed.
    """
    torch.manual_seed(0)
    windows = corpus.train.to(settings.device, torch.int64)
    batches = torch.split(torch.randperm(settings.windows)[: TIMED_BATCHES * settings.batch], settings.batch)
    parts = []
    for row in rows:
        torch.manual_seed(0)
        network = make_network(settings)
        parts.append((network, make_saf(row, settings), make_optimizer(network, settings)))

    def step(place: int, index: Tensor, batch: Tensor) -> float:
        network, saf, optimizer = parts[place]
        synchronize(torch.device(settings.device))
        begin = time.perf_counter()
        optimizer.zero_grad()
        logits = network(batch[:, :-1])
        loss = F.cross_entropy(logits, batch[:, -1])
        if saf is not None:
            loss = loss + saf(logits, index)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        synchronize(torch.device(settings.device))
        return time.perf_counter() - begin

    times: list[list[float]] = [[] for _ in rows]
    order = random.Random(0)
    epoch, end = 0, math.inf
    while not times[0] or time.perf_counter() < end:
        for _, saf, _ in parts:
            if saf is not None:
                saf.set_epoch(epoch)
        if epoch == settings.first_acting_epoch:
            end = time.perf_counter() + seconds
        for index in batches:
            batch = windows[index.to(settings.device)]
            for place in order.sample(range(len(rows)), len(rows)):
                elapsed = step(place, index, batch)
                if epoch >= settings.first_acting_epoch:
                    times[place].append(elapsed)
        epoch += 1
    result = []
    for row, each in zip(rows, times, strict=True):
        ratios = [ours / base for ours, base in zip(each, times[0], strict=True)]
        result.append(
            {
                "row": row,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
                "milliseconds": 1e3 * statistics.median(each),
                "rounds": len(each),
            }
        )
    return result


def run_all(
    jobs: Sequence[tuple[str, int]],
    settings: Settings,
    corpus: Corpus,
    workers: int,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Trains all ``jobs``, (row, seed), and calls ``done`` with each result as it comes."""
    if workers == 1:
        for row, seed in jobs:
            done(train(row, seed, settings, corpus))
        return
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool,
    ):
        windows = Path(folder, "windows.pt")
        torch.save((corpus.train, corpus.test), windows)
        try:
            for future in as_completed([pool.submit(_train_saved, *job, settings, windows) for job in jobs]):
                done(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _train_saved(row: str, seed: int, settings: Settings, windows: Path) -> dict[str, Any]:
    train_windows, test_windows = torch.load(windows)
    return train(row, seed, settings, Corpus(train_windows, test_windows, facts={}))


def summarise(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each row: means over the seeds, and differences over the seeds that both rows have."""
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in result.get("runs", []):
        runs[run["row"]][run["seed"]] = run
    fidelity = {entry["row"]: entry for entry in result.get("fidelity", {}).get("rows", [])}
    timing = {entry["row"]: entry for entry in result.get("timing", [])}
    named = {*runs, *fidelity, *timing}
    labels = [row for row in ROWS if row in named] + sorted(named - set(ROWS))
    summary = []
    for row in labels:
        entry: dict[str, Any] = {"row": row, "seeds": len(runs[row])}
        sizes = [*(run["bytes_per_sample"] for run in runs[row].values()), *_get(fidelity, row, "bytes_per_sample")]
        entry["bytes_per_sample"] = sizes[0] if sizes else None
        for name in ("mean", "last"):
            for value in _get(fidelity, row, name):
                entry[f"{name}_fidelity"] = value
        for value in _get(timing, row, "ratio"):
            entry["time_ratio"] = value
        for measure in ("test_loss", "accuracy"):
            if runs[row]:
                entry[measure] = _interval([run[measure] for run in runs[row].values()])
            for other in (BASE, DENSE):
                both = sorted(set(runs[row]) & set(runs[other]))
                if row != other and both:
                    differences = [runs[row][seed][measure] - runs[other][seed][measure] for seed in both]
                    entry[f"{measure}_minus_{other}"] = {
                        **_interval(differences),
                        "seeds": len(both),
                        "p_value": paired_p_value(differences),
                    }
        summary.append(entry)
    for measure in ("test_loss", "accuracy"):
        for other in (BASE, DENSE):
            compared = [entry[key] for entry in summary if (key := f"{measure}_minus_{other}") in entry]
            for difference, p_value in zip(compared, holm([each["p_value"] for each in compared]), strict=True):
                difference["holm"] = p_value
    return summary


def _get(entries: Mapping[str, Mapping[str, Any]], row: str, key: str) -> list[Any]:
    """The value as a list, empty if it is missing."""
    return [entries[row][key]] if row in entries and key in entries[row] else []


def _interval(values: Sequence[float]) -> dict[str, float]:
    found = interval(values)
    return {"mean": found.mean, "half": math.nan if found.half is None else found.half}


def format_table(result: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    summary = summarise(result)
    dense = next((entry["bytes_per_sample"] for entry in summary if entry["row"] == DENSE), None)
    lines = [
        "| form | bytes per sample | share of dense | cosine | relative error | in the last epoch "
        "| as a share of the whole gradient | test loss, nats "
        "| accuracy, % | loss - dense | loss - base | accuracy - dense, % | accuracy - base, % | step / base |",
        "|---|" + "---:|" * 13,
    ]
    for entry in summary:
        size, fidelity = entry["bytes_per_sample"], entry.get("mean_fidelity", {})
        cells = [
            entry["row"],
            _number(size, ",.0f"),
            _number(size / dense if size is not None and dense else None, ".1%"),
            _number(fidelity.get("cosine"), ".5f"),
            _number(fidelity.get("relative_error"), ".2g"),
            _number(entry.get("last_fidelity", {}).get("relative_error"), ".2g"),
            _number(fidelity.get("whole_error"), ".2g"),
            _cell(entry.get("test_loss"), 1, 4),
            _cell(entry.get("accuracy"), 100, 2),
            _cell(entry.get("test_loss_minus_dense"), 1, 4, sign="+"),
            _cell(entry.get("test_loss_minus_base"), 1, 4, sign="+"),
            _cell(entry.get("accuracy_minus_dense"), 100, 2, sign="+"),
            _cell(entry.get("accuracy_minus_base"), 100, 2, sign="+"),
            _number(entry.get("time_ratio"), ".3f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({entry["seeds"] for entry in summary if entry["seeds"]})
    lines += [
        "",
        f"Seeds: {'-'.join(map(str, seeds[:: max(1, len(seeds) - 1)])) or 'none'}. Fidelity is that of the loss's "
        "gradient after the logits, mean over the epochs in which it is at work. ± is the 95 % confidence interval, of "
        "differences the paired one; * where p < 0.05 by the paired t-test, adjusted by Holm's method for the rows of "
        f"the column, and only from {LEAST_SEEDS} seeds on.",
    ]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cell(value: Mapping[str, Any] | None, scale: float, digits: int, sign: str = "") -> str:
    if value is None:
        return ""
    text = f"{scale * value['mean']:{sign}.{digits}f}"
    if value["half"] is not None and math.isfinite(value["half"]):
        text += f" ± {scale * value['half']:.{digits}f}"
    return text + (" *" if value.get("holm", 1) < 0.05 and value["seeds"] >= LEAST_SEEDS else "")


# Okabe and Ito's colours, which people with any colour vision can tell apart; each with a marker of its own.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws fidelity and final test loss against memory."""
    matplotlib = require("matplotlib", install="matplotlib")
    matplotlib.use("agg")
    pyplot = require("matplotlib.pyplot", install="matplotlib")
    ticker = require("matplotlib.ticker", install="matplotlib")
    with matplotlib.rc_context({"svg.hashsalt": "flatmin", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = pyplot.subplots(1, 2, sharex=True, figsize=(10, 4.2), layout="constrained")
        _draw(axes[0], axes[1], plain(summarise(result)))
        labels: dict[str, Any] = {}
        for each in reversed(axes):
            each.set(xlabel="memory of the history (bytes per sample)", xscale="log")
            each.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            each.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
            each.xaxis.set_minor_formatter(ticker.NullFormatter())
            each.grid(visible=True, which="major", alpha=0.3)
            labels.update({label: handle for handle, label in zip(*each.get_legend_handles_labels(), strict=True)})
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=10, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _draw(fidelity: Any, outcome: Any, summary: Sequence[Mapping[str, Any]]) -> None:
    """Draws the two panels; what a row does not have is left out."""
    fidelity.set(title="How far the gradient is off", ylabel="relative error |g - g_dense| / |g_dense|", yscale="log")
    outcome.set(title="What it does to the result", ylabel="test loss minus dense's (nats per token)")
    outcome.axhline(0, color="0.6", linewidth=0.8)
    for place, entry in enumerate(entry for entry in summary if entry["bytes_per_sample"]):
        style = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "none",
            "markersize": 7,
            "label": entry["row"],
        }
        size = entry["bytes_per_sample"]
        error = entry["mean_fidelity"]["relative_error"] if "mean_fidelity" in entry else None
        if error:  # the dense form is exact and has no place on a logarithmic axis
            fidelity.plot(size, error, **style)
        if entry["row"] == DENSE:
            outcome.plot(size, 0, **style)
        elif "test_loss_minus_dense" in entry:
            difference = entry["test_loss_minus_dense"]
            outcome.errorbar(size, difference["mean"], yerr=difference["half"] or 0, capsize=3, **style)
    for entry in summary:
        if entry["row"] == BASE and "test_loss_minus_dense" in entry:
            mean, half = entry["test_loss_minus_dense"]["mean"], entry["test_loss_minus_dense"]["half"] or 0
            outcome.axhline(mean, color="0.4", linestyle="--", label="base (no SAF)")
            outcome.axhspan(mean - half, mean + half, color="0.4", alpha=0.15, linewidth=0)


class Result:
    """The JSON file: what was done before stays, as long as settings, corpus and the rows' arguments are the same."""

    def __init__(self, path: Path, settings: Settings, corpus: Corpus, rows: Sequence[str]) -> None:
        self.path = path
        self.value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        fixed = plain({"settings": dataclasses.asdict(settings), "corpus": corpus.facts})
        arguments = plain({row: describe(row) for row in rows})
        earlier = self.value.get("arguments", {})
        changed = [name for name, wanted in fixed.items() if self.value.get(name, wanted) != wanted]
        changed += [f"arguments of {row}" for row in rows if earlier.get(row, arguments[row]) != arguments[row]]
        if changed:
            raise SystemExit(f"{path}: was made with other {', '.join(changed)}; give --out another file")
        commands = [*self.value.get("commands", []), f"python benchmarks/{command_line()}"]
        self.value = {
            "commands": list(dict.fromkeys(commands)),
            **environment(),
            **fixed,
            **{key: value for key, value in self.value.items() if key != "commands"},
            "arguments": {**earlier, **arguments},
        }
        self.value["versions"]["tokenizers"] = version("tokenizers")

    def save(self, **parts: Any) -> None:
        """Takes ``parts`` over and writes the file."""
        self.value.update(parts)
        write_json(self.path, {**self.value, "summary": summarise(self.value)})

    def done(self, part: str) -> set[str]:
        """The rows that a part has."""
        entries = self.value.get(part, [])
        return {entry["row"] for entry in (entries["rows"] if isinstance(entries, dict) else entries)}


def measure(arguments: argparse.Namespace, settings: Settings, rows: list[str]) -> None:
    """Does what is not done yet of the parts asked for."""
    corpus = read_corpus(arguments.corpus, settings)
    print(json.dumps(corpus.facts), flush=True)
    result = Result(arguments.out, settings, corpus, rows)
    result.save()
    missing = [row for row in rows if ROWS[row] is not None and row not in result.done("fidelity")]
    if "fidelity" in arguments.parts and missing:
        found = measure_fidelity(missing, settings, corpus, arguments.every)
        earlier = result.value.get("fidelity", {}).get("rows", [])
        result.save(fidelity={"seed": 0, "every": arguments.every, "rows": earlier + found})
    if "timing" in arguments.parts and set(rows) - result.done("timing"):
        together = [row for row in ROWS if row in {*rows, *result.done("timing")}]
        result.save(timing=measure_time(together, settings, corpus, arguments.seconds))
    if "runs" in arguments.parts:
        finished = {(run["row"], run["seed"]) for run in result.value.get("runs", [])}
        jobs = [(row, seed) for seed in range(arguments.seeds) for row in rows if (row, seed) not in finished]

        def done(run: dict[str, Any]) -> None:
            result.save(runs=[*result.value.get("runs", []), run])
            print(
                f"{run['row']}, seed {run['seed']}: test loss {run['test_loss']:.4f}, "
                f"accuracy {100 * run['accuracy']:.2f} %, {run['seconds']:.0f} s",
                flush=True,
            )

        run_all(jobs, settings, corpus, arguments.jobs, done)


def main(command: Sequence[str] | None = None) -> None:
    """Measures, and shows what is in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result; what it holds is kept")
    parser.add_argument("--plot", type=Path, help="file for the plot, such as fidelity.svg")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas; report alone measures nothing")
    parser.add_argument("--rows", default=",".join(ROWS), help="with commas, base first")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="processes that train")
    parser.add_argument("--every", type=int, default=10, help="steps from one comparison of gradients to the next")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure times")
    parser.add_argument("--corpus", type=Path, default=_library(), help="folder of Python files")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"default {field.default}",
        )
    arguments = parser.parse_args(command)
    arguments.parts = arguments.parts.split(",")
    rows = arguments.rows.split(",")
    for name, given, known in (("parts", arguments.parts, PARTS), ("rows", rows, ROWS)):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(known)}")
    if "timing" in arguments.parts and rows[0] != BASE:
        parser.error("--rows: timing wants base first")
    if set(arguments.parts) - {"report"}:
        torch.set_num_threads(1)
        settings = Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)})
        measure(arguments, settings, rows)
    if "report" in arguments.parts:
        result = json.loads(arguments.out.read_text())
        print(format_table(result))
        if arguments.plot is not None:
            plot(result, arguments.plot)


if __name__ == "__main__":
    main()

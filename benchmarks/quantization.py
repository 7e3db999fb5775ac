"""Flat minima and few bits: a small BERT on Debian descriptions, float, rounded, and trained for 4, 3 and 2 bits.

    python benchmarks/quantization.py --seeds 5 --out benchmarks/results/quantization.json

It needs `pip install 'flatmin[torchao]' transformers` and Debian's ``apt-cache``, and takes the data of
``examples/transformers_descriptions.py``. Linear layers and word embeddings are quantised, weights alone, symmetric and
per channel, but the last layer's; what is reported is the converted network. All rows train for as many epochs:

* ``base``, ``sam``, ``saf``, ``mesa``: in float, then rounded.
* the others go on from one float network of the seed: ``tuned``, ``tuned sam``: in float, then rounded; ``qat``,
  ``qat sam``: with learned step sizes (LSQ), SAM on the weights alone; ``squat``.

The runs of a seed have the same initial weights and batches. Differences are paired by seed, to ``base`` and to
``tuned``, at the same width; p-values are corrected by Holm for all of them. No setting was chosen by these test
samples: they are flatmin's defaults, and of the optimizer those of the example. A file that is there is continued.
"""

import argparse
import copy
import json
import runpy
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import flatmin
from flatmin.integrations import torchao as prepared
from flatmin.lab.comparison.stats import holm, interval, paired_p_value
from flatmin.lab.runs.record import command_line, environment, write_json

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers_descriptions.py"
BITS = (4, 3, 2)
FLOAT, TUNED, TRAINED = ("base", "sam", "saf", "mesa"), ("tuned", "tuned sam"), ("qat", "qat sam", "squat")
REFERENCE = dict.fromkeys(FLOAT, "base") | dict.fromkeys((*TUNED, *TRAINED), "tuned")
Accuracies = dict[str, dict[str, float]]  # row -> width, "float" or bits -> test accuracy in percent


@dataclass(frozen=True)
class Settings:
    """Sizes and settings; a step takes some 15 ms of one core."""

    each: int = 1200  # descriptions of a section, at most
    words: int = 16  # of a description, at most
    hidden: int = 64
    layers: int = 1
    batch: int = 64
    epochs: int = 6  # in float
    tuned: int = 3  # after them
    lr: float = 2e-3
    tuned_lr: float = 5e-4
    sizes_lr: float = 1e-4  # of step sizes, about a hundredth of their size
    rho: float = 0.05
    decay: float = 0.99  # of MESA's average


@dataclass(frozen=True)
class Data:
    """Numbers of words, 0 where a text has ended, and of sections."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    sections: int
    words: int


class Classifier(nn.Module):
    """BERT for sequences, from numbers of words to logits."""

    def __init__(self, settings: Settings, data: Data) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        size = {"hidden_size": settings.hidden, "intermediate_size": 2 * settings.hidden, "num_attention_heads": 4}
        self.bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=data.words,
                num_labels=data.sections,
                num_hidden_layers=settings.layers,
                max_position_embeddings=settings.words + 1,
                **size,
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of shape (B, sections)."""
        logits: Tensor = self.bert(input_ids=ids, attention_mask=ids.ne(0).long()).logits
        return logits


def read(settings: Settings) -> Data:
    """The descriptions that apt knows, each fifth to test on."""
    text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    example = runpy.run_path(str(EXAMPLE))
    found = example["rows"](text, each=settings.each)
    ids = torch.zeros(len(found), settings.words + 1, dtype=torch.int64)
    for place, row in enumerate(found):
        kept = row["input_ids"][: settings.words + 1]
        ids[place, : len(kept)] = torch.tensor(kept)
    labels = torch.tensor([row["labels"] for row in found])
    tested = torch.arange(len(found)) % 5 == 0
    return Data(ids[~tested], labels[~tested], ids[tested], labels[tested], example["SECTIONS"], example["WORDS"])


def network(settings: Settings, data: Data, seed: int) -> nn.Module:
    """A new network."""
    torch.manual_seed(seed)
    return Classifier(settings, data)


def train(model: nn.Module, data: Data, settings: Settings, method: str, *, epochs: int, lr: float, seed: int) -> None:
    """Trains with AdamW, whose learning rate falls along a cosine, and a method."""
    sizes = prepared.step_sizes(model) if method.startswith(("qat", "squat")) else []
    weights = prepared.weights(model) if sizes else list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": weights, "lr": lr, "weight_decay": 0.01}]
    groups += [{"params": sizes, "lr": settings.sizes_lr, "weight_decay": 0.0}] if sizes else []
    base = AdamW(groups)
    steps = epochs * (len(data.x) // settings.batch)
    schedule = CosineAnnealingLR(base, steps)
    optimizer: Any = base
    if method.endswith("sam"):
        optimizer = flatmin.SAM(base, rho=settings.rho, parameters=weights)
    elif method == "squat":
        optimizer = flatmin.SQuAT(base, step_sizes=sizes, rho=settings.rho)
    saf = flatmin.SAF(len(data.x), data.sections) if method == "saf" else None
    mesa = flatmin.MESA(model, decay=settings.decay) if method == "mesa" else None
    if mesa is not None:
        mesa.attach(base)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    model.train()
    for epoch in range(epochs):
        for trajectory in (saf, mesa):
            if trajectory is not None:
                trajectory.set_epoch(epoch)
        for index in batches(len(data.x), settings.batch, order):
            x, y = data.x[index], data.y[index]

            def closure(x: Tensor = x, y: Tensor = y, index: Tensor = index) -> Tensor:
                optimizer.zero_grad()
                logits = model(x)
                loss = F.cross_entropy(logits, y)
                if saf is not None:
                    loss = loss + saf(logits, index)
                elif mesa is not None:
                    loss = loss + mesa(logits, x)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.detach()

            optimizer.step(closure)
            schedule.step()


def batches(size: int, batch: int, order: torch.Generator) -> Iterator[Tensor]:
    """The whole batches of an epoch."""
    places = torch.randperm(size, generator=order)
    yield from torch.split(places[: size - size % batch], batch)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Test accuracy in percent."""
    model.eval()
    pairs = zip(torch.split(data.test_x, 512), torch.split(data.test_y, 512), strict=True)
    right = [(model(x).argmax(1) == y).sum() for x, y in pairs]
    return 100 * float(sum(right)) / len(data.test_y)


def quantised(module: nn.Module, name: str) -> bool:
    """Linear layers and the embedding of words, but the last layer."""
    return isinstance(module, (nn.Linear, nn.Embedding)) and not any(
        word in name for word in ("classifier", "position", "token_type")
    )


def prepare(model: nn.Module, data: Data, bits: int, *, learned: bool) -> nn.Module:
    """A copy with fake quantisers, whose step sizes are learned, or made of the weights in each pass."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers

    model = copy.deepcopy(model).eval()
    width = getattr(torch, f"int{bits}")
    config = IntxFakeQuantizeConfig(width, "per_channel", is_dynamic=not learned, range_learning=learned)
    quantize_(model, QATConfig(weight_config=config, step="prepare"), quantised)
    if learned:
        initialize_fake_quantizers(model, (data.x[:2],))
    return model


def converted(model: nn.Module, data: Data, bits: int) -> float:
    """Accuracy of a prepared network that is converted to integers."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis

    prepared.convert(model, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0)))
    return accuracy(model, data)


def float_run(model: nn.Module, data: Data) -> dict[str, float]:
    """Accuracies of a float network, as it is and rounded."""
    rounded = {str(bits): converted(prepare(model, data, bits, learned=False), data, bits) for bits in BITS}
    return {"float": accuracy(model, data), **rounded}


def run_row(row: str, stem: nn.Module, data: Data, settings: Settings, seed: int) -> dict[str, float]:
    """Trains one row and returns its accuracies."""
    if row in FLOAT:
        model = network(settings, data, seed)
        train(model, data, settings, row, epochs=settings.epochs + settings.tuned, lr=settings.lr, seed=seed)
        return float_run(model, data)
    how = {"epochs": settings.tuned, "lr": settings.tuned_lr, "seed": seed + 1000}
    if row in TUNED:
        model = copy.deepcopy(stem)
        train(model, data, settings, row, **how)  # type: ignore[arg-type]
        return float_run(model, data)
    found = {}
    for bits in BITS:
        model = prepare(stem, data, bits, learned=True)
        train(model, data, settings, row, **how)  # type: ignore[arg-type]
        found[str(bits)] = converted(model, data, bits)
    return found


def summarise(runs: dict[str, Accuracies]) -> dict[str, Any]:
    """Means, and differences to the row of reference, paired by seed, of the seeds that every row has."""
    whole = [by_row for by_row in runs.values() if set(by_row) == set(REFERENCE)]
    if not whole:
        return {}
    cells: dict[str, dict[str, Any]] = {row: {} for row in REFERENCE}
    tests: list[tuple[str, str, float]] = []
    for row, reference in REFERENCE.items():
        for width in whole[0][row]:
            values = [by_row[row][width] for by_row in whole]
            cells[row][width] = {"accuracy": asdict(interval(values))}
            if row != reference:
                differences = [by_row[row][width] - by_row[reference][width] for by_row in whole]
                cells[row][width] |= {"difference": asdict(interval(differences)), "to": reference}
                tests.append((row, width, paired_p_value(differences)))
    for (row, width, p), corrected in zip(tests, holm([p for *_, p in tests]), strict=True):
        cells[row][width] |= {"p_value": p, "p_value_holm": corrected}
    return {"seeds": len(whole), "rows": cells}


def write(path: Path, settings: Settings, data: Data, runs: dict[str, Accuracies]) -> None:
    """Writes what is done."""
    place = environment()
    place["versions"] |= {name: version(name) for name in ("torchao", "transformers")}
    write_json(
        path,
        {
            "command": f"python benchmarks/{command_line()}",
            **place,
            "settings": asdict(settings),
            "samples": {"train": len(data.x), "test": len(data.test_x), "sections": data.sections},
            "summary": summarise(runs),
            "runs": runs,
        },
    )


def main() -> None:
    """Trains what is missing in the file, and writes it after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    seeds, out = given.pop("seeds"), given.pop("out")
    settings = Settings(**given)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torchao")
    data = read(settings)
    there = json.loads(out.read_text()) if out.exists() else {"settings": asdict(settings), "runs": {}}
    if there["settings"] != asdict(settings):
        parser.error(f"{out} is of other settings; give another file")
    runs: dict[str, Accuracies] = there["runs"]
    for seed in range(seeds):
        done = runs.setdefault(str(seed), {})
        if set(done) == set(REFERENCE):
            continue
        stem = network(settings, data, seed)
        train(stem, data, settings, "base", epochs=settings.epochs, lr=settings.lr, seed=seed)
        for row in REFERENCE:
            if row not in done:
                started = time.perf_counter()
                done[row] = run_row(row, stem, data, settings, seed)
                write(out, settings, data, runs)
                said = ", ".join(f"{width} {value:.2f}" for width, value in done[row].items())
                print(f"seed {seed}, {row}: {said} ({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

"""Is it the trajectory, or plain self-distillation? SAF against the same loss with other targets.

Each variant is SAF's loss with another choice of what a sample is compared with; its coefficient is chosen on held-out
samples from the same four candidates, and so is the strength of label smoothing and of online label smoothing.

    python benchmarks/ablation.py --data mnist1d --label-noise 0.2 --out benchmarks/results/ablation-mnist1d-noise.json
    python benchmarks/ablation.py --data digits --out benchmarks/results/ablation-digits.json
"""

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.lab.comparison.rows import make_rows
from flatmin.lab.comparison.run import Comparison
from flatmin.lab.comparison.select import select
from flatmin.lab.methods import Assembled, Card, Ingredients, register
from flatmin.lab.recipe import Recipe
from flatmin.lab.runs.record import command_line, environment, write_json
from flatmin.losses import trajectory_loss

EPOCHS = {"mnist1d": 40, "digits": 60}
COEFFICIENTS = (0.3, 0.8, 2.0, 5.0)
TEMPERATURE, START = 5.0, 5  # the paper's

# What a sample is compared with; the name after "saf-" in the tables.
TARGETS = {
    "lag1": "its own output 1 epoch ago",
    "lag3": "its own output 3 epochs ago, as in the paper",
    "lag5": "its own output 5 epochs ago",
    "lag10": "its own output 10 epochs ago",
    "random-epoch": "its own output in a past epoch drawn at random, anew each time",
    "mean": "the running mean of its own outputs, momentum .9 (temporal ensembling)",
    "same-class": "the output 3 epochs ago of another sample with its label, drawn anew each time",
    "class-mean": "the mean output 3 epochs ago of all samples with its label",
    "any-sample": "the output 3 epochs ago of any sample, drawn anew each time",
    "uniform": "nothing: the same logit for every class",
}


class Recall(nn.Module):
    """SAF's loss with one of `TARGETS`; remembers every epoch."""

    def __init__(self, target: str, given: Ingredients, *, coefficient: float) -> None:
        super().__init__()
        self.target, self.coefficient = target, coefficient
        self.lag = int(target.removeprefix("lag")) if target.startswith("lag") else 3
        shape = (given.epochs, given.num_samples, given.num_classes)
        self.register_buffer("outputs", torch.full(shape, torch.nan), persistent=False)
        self.register_buffer("mean", torch.full(shape[1:], torch.nan), persistent=False)
        self.register_buffer("labels", torch.full(shape[1:2], -1), persistent=False)
        self.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32)
        self.epoch = 0

    outputs: Tensor
    mean: Tensor
    labels: Tensor

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins."""
        self.epoch = epoch

    def forward(self, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Returns the loss of a batch and remembers its outputs."""
        loss = logits.new_zeros(())
        if self.epoch >= START:
            target = self.recalled(y, index)
            known = target.isfinite().all(dim=1)
            target = target.where(known[:, None], 0)
            loss = self.coefficient * trajectory_loss(logits, target, temperature=TEMPERATURE, mask=known)
        now = logits.detach()
        self.outputs[self.epoch, index], self.labels[index] = now, y
        old = self.mean[index]
        self.mean[index] = torch.where(old.isnan(), now, 0.9 * old + 0.1 * now)
        return loss

    def recalled(self, y: Tensor, index: Tensor) -> Tensor:
        """The targets of a batch, shape (B, C); NaN where there is none."""
        if self.target == "uniform":
            return torch.zeros_like(self.outputs[0, index])
        if self.target == "mean":
            return self.mean[index]
        if self.target == "random-epoch":
            return self.outputs[self._draw(self.epoch, len(index)), index]
        if self.epoch < self.lag:
            return torch.full_like(self.outputs[0, index], torch.nan)
        past = self.outputs[self.epoch - self.lag]
        if self.target == "any-sample":
            return past[self._draw(len(past), len(index))]
        if self.target == "class-mean":
            classes = [past[self.labels == label].mean(dim=0) for label in range(past.shape[1])]
            return torch.stack(classes)[y]
        if self.target == "same-class":
            alike = [(self.labels == label).nonzero().squeeze(1) for label in range(past.shape[1])]
            places = [self._other(alike[int(label)], int(own)) for label, own in zip(y, index, strict=True)]
            return past[torch.tensor(places)]
        return past[index]

    def _other(self, alike: Tensor, own: int) -> int:
        others = alike[alike != own]
        return int(others[self._draw(len(others), 1)]) if len(others) else own

    def _draw(self, bound: int, count: int) -> Tensor:
        return torch.randint(bound, (count,), generator=self.generator)


def _assemble(given: Ingredients, settings: Mapping[str, Any], *, target: str) -> Assembled:
    recall = Recall(target, given, coefficient=settings["coefficient"])
    return Assembled(given.optimizer, recall, lambda logits, y, index, inputs: recall(logits, y, index))


# At import, so that the processes that train know them too.
for _target, _summary in TARGETS.items():
    _assemble_it = functools.partial(_assemble, target=_target)
    register(Card(f"saf-{_target}", _summary, {"coefficient": COEFFICIENTS[0]}, _assemble_it))


class Progress:
    """Prints what is going on, once for each word."""

    def __init__(self) -> None:
        self.said = ""

    def __call__(self, done: int, planned: int, word: str) -> None:
        if word != self.said:
            print(word, file=sys.stderr, flush=True)
        self.said = word


def main() -> None:
    """Chooses, compares and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(EPOCHS), default="mnist1d")
    parser.add_argument("--targets", default=",".join(TARGETS), help="only these, with commas")
    parser.add_argument("--label-noise", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=0, help="another length of the runs")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--select", type=int, default=2, help="seeds that choose the coefficients")
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    recipe = Recipe(
        data=arguments.data,
        model="cnn1d" if arguments.data == "mnist1d" else "cnn",
        epochs=arguments.epochs or EPOCHS[arguments.data],
        label_noise=arguments.label_noise,
    )
    variants = [f"saf-{target}" for target in arguments.targets.split(",")]
    tried = {
        "smoothing": {"smoothing": (0.05, 0.1, 0.2, 0.4)},
        "online_label_smoothing": {"coefficient": (0.1, 0.3, 0.5, 0.8)},
        **{name: {"coefficient": COEFFICIENTS} for name in variants},
    }
    rows = make_rows(["base", "smoothing", "online_label_smoothing", *variants], tried, epochs=recipe.epochs)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"jobs": arguments.jobs, "on_progress": Progress()}
        rows, selection = select(recipe, rows, Path(folder, "selection"), seeds=arguments.select, **options)
        compared = Path(folder, "compared")
        compared.mkdir()
        comparison = Comparison(
            recipe, rows, compared, seeds=arguments.seeds, timed=False, selection=selection, **options
        )
        result = comparison.run().result()
        results = json.loads((compared / "results.json").read_text())
    summary = {"targets": TARGETS, "verdict": result.verdict}
    write_json(arguments.out, {**results, **summary, "command": f"python benchmarks/{command_line()}", **environment()})
    print(result)


if __name__ == "__main__":
    main()

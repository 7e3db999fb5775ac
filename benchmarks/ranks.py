"""What SAF on several ranks sends and how long its call takes: gloo processes of this machine, one thread each.

Batches of 128 a rank, 1,000 classes, 50,000 samples. Each form, shared either way, sees the same few batches in every
epoch, so that from the fifth on all of it is compared. Bytes are counted where they are handed to torch.distributed:
what leaves a rank for another, an all-gather once for each other rank. Calls follow one another at once; in a training
rows travel while the network computes, so that it waits less for them than here. No network is between these ranks.

    python benchmarks/ranks.py --out benchmarks/results/ranks.json
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.multiprocessing import spawn

from flatmin import SAF
from flatmin.lab.runs.record import command_line, environment, write_json

SAMPLES, CLASSES, BATCH, LAG = 50_000, 1000, 128, 3
FORMS = ("dense", "int6", "topk", "lowrank")
SHARINGS = ("replicate", "shard")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the bytes that this rank sends to others, by what they are."""
    sent: Counter[str] = Counter()
    rank, others = distributed.get_rank(), distributed.get_world_size() - 1
    all_gather, all_to_all, all_reduce = (
        distributed.all_gather,
        distributed.all_to_all_single,
        distributed.all_reduce,
    )

    def gather(received: list[Tensor], tensor: Tensor, **options: Any) -> Any:
        sent["indices" if tensor.dtype == torch.int64 else "rows"] += tensor.nbytes * others
        return all_gather(received, tensor, **options)

    def travel(received: Tensor, tensor: Tensor, arriving: list[int], leaving: list[int], **options: Any) -> Any:
        sent["rows"] += sum(part.nbytes for to, part in enumerate(torch.split(tensor, leaving)) if to != rank)
        return all_to_all(received, tensor, arriving, leaving, **options)

    def add(tensor: Tensor, **options: Any) -> Any:
        sent["sums"] += tensor.nbytes  # handed over once; how often it is passed on is the backend's affair
        return all_reduce(tensor, **options)

    with mock.patch.multiple(distributed, all_gather=gather, all_to_all_single=travel, all_reduce=add):
        yield sent


def measure(form: str, sharing: str, batches: int, epochs: int) -> dict[str, Any]:
    """One rank's share of a case: bytes sent in a step, seconds of each call."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    saf = SAF(SAMPLES, CLASSES, lag=LAG, start_epoch=0, history=form, sharing=sharing)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(rank)
    sent: Counter[str] = Counter()
    seconds, compared = [], True
    for epoch in range(LAG + 1 + epochs):
        saf.set_epoch(epoch)
        for step in range(batches):
            index = order[(step * world + rank) * BATCH :][:BATCH]
            logits = torch.randn(BATCH, CLASSES, generator=generator).requires_grad_()
            with counted() as now:
                start = time.perf_counter()
                loss = saf(logits, index)
                elapsed = time.perf_counter() - start
            if epoch > LAG:
                compared = compared and bool(loss.detach() > 0)
                sent.update(now)
                if step > 0:  # the low-rank form makes its basis in the first call of an epoch
                    seconds.append(elapsed)
    if not compared:
        raise SystemExit(f"{form} {sharing} on {world} ranks: nothing was compared")
    steps = batches * epochs
    return {
        "seconds": seconds,
        "index_bytes": sent["indices"] / steps,
        "row_bytes": sent["rows"] / steps,
        "sum_bytes_per_epoch": sent["sums"] / epochs,
        "history_bytes": saf.history.nbytes,
    }


def work(rank: int, world: int, folder: str, forms: list[str], batches: int, epochs: int) -> None:
    """What one rank does: all forms, shared either way."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results = {}
    for form in forms:
        for sharing in SHARINGS if world > 1 else SHARINGS[:1]:
            results[form, sharing] = measure(form, sharing, batches, epochs)
            distributed.barrier()
    torch.save(results, Path(folder, f"{rank}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


def cases(world: int, forms: list[str], batches: int, epochs: int) -> list[dict[str, Any]]:
    """All cases on so many ranks, one row each."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (world, folder, forms, batches, epochs), nprocs=world)  # type: ignore[no-untyped-call]
        ranks = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]
    rows = []
    for form, sharing in ranks[0]:
        each = [rank[form, sharing] for rank in ranks]
        seconds = sorted(second for one in each for second in one["seconds"])
        quartiles = statistics.quantiles(seconds, n=4)
        means = {name: statistics.mean(one[name] for one in each) for name in each[0] if name != "seconds"}
        rows.append(
            {
                "ranks": world,
                "form": form,
                "sharing": sharing if world > 1 else None,
                "milliseconds_per_call": 1e3 * quartiles[1],
                "milliseconds_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
                "calls": len(seconds),
                "sent_bytes_per_step_and_rank": means["index_bytes"] + means["row_bytes"],
                **{f"{name}_per_rank": value for name, value in means.items()},
                "more_ranks_than_cores": world > (os.cpu_count() or 1),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| ranks | form | sharing | sent per step and rank, KB | of that, indices | held per rank, MB | call, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['ranks']} | {row['form']} | {row['sharing'] or ''} | "
            f"{row['sent_bytes_per_step_and_rank'] / 1e3:.1f} | {row['index_bytes_per_rank'] / 1e3:.1f} | "
            f"{row['history_bytes_per_rank'] / 1e6:.1f} | {row['milliseconds_per_call']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, with commas")
    parser.add_argument("--forms", default=",".join(FORMS), help="with commas")
    parser.add_argument("--batches", type=int, default=8, help="batches in an epoch")
    parser.add_argument("--epochs", type=int, default=4, help="epochs that are measured")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    for world in map(int, arguments.ranks.split(",")):
        rows += cases(world, arguments.forms.split(","), arguments.batches, arguments.epochs)
        result = {
            "command": f"python benchmarks/{command_line()}",
            **environment(),
            "load_average_before": load,
            "machine_was_loaded": load > 0.5,
            "samples": SAMPLES,
            "classes": CLASSES,
            "batch_per_rank": BATCH,
            "lag": LAG,
            "cases": rows,
        }
        write_json(arguments.out, result)  # after each number of ranks, so that one that fails costs no other
    print(table(rows))
    if load > 0.5:
        print(f"The machine was at work on something else (load average {load:.1f}): bytes are exact, times are not.")


if __name__ == "__main__":
    main()

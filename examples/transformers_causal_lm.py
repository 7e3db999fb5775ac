"""The standard library as text for a language model, with transformers and a method: base, sam, msam or mesa."""

import math
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import flatmin
from flatmin.integrations.transformers import Sharpness

LENGTH, PAD, IGNORED = 64, 0, -100


class MyTrainer(Sharpness, Trainer): ...


def rows(files: int, each: int = 40) -> list[dict[str, list[int]]]:
    """Pieces of files, byte by byte; what is filled up at the end of a file is not to be learnt."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]:
        text = list(path.read_bytes())
        for start in range(0, min(len(text), each * LENGTH), LENGTH):
            piece = text[start : start + LENGTH]
            rest = LENGTH - len(piece)
            found.append({"input_ids": piece + [PAD] * rest, "labels": piece + [IGNORED] * rest})
    return found


def main(method: str, files: int = 60, epochs: int = 3) -> float:
    data = rows(files)
    train, test = [row for i, row in enumerate(data) if i % 8], data[::8]
    options: dict[str, Any] = {"num_train_epochs": epochs, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    args = TrainingArguments("runs", save_strategy="no", report_to=[], use_cpu=True, **options)
    torch.manual_seed(args.seed)
    ends = {"bos_token_id": PAD, "eos_token_id": PAD}
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=1, n_head=4, **ends)
    methods: dict[str, dict[str, Any]] = {
        "base": {},
        "sam": {"sharpness": partial(flatmin.SAM, rho=0.05)},
        "msam": {"sharpness": partial(flatmin.MSAM, rho=0.3)},
        "mesa": {"penalty": partial(flatmin.MESA, decay=0.98, start_epoch=1, temperature=1.0, class_dim=-1)},
    }
    model = GPT2LMHeadModel(config)
    trainer = MyTrainer(model, args, train_dataset=train, eval_dataset=test, **methods[method])
    trainer.train()
    return float(trainer.evaluate()["eval_loss"]) / math.log(2)


if __name__ == "__main__":
    print(f"{main(sys.argv[1]):.3f} bits a byte on pieces that it has not seen")

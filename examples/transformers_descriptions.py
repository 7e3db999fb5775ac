"""Sections of Debian packages from their descriptions, with transformers and a method: base, sam, saf or mesa."""

import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import flatmin
from flatmin.integrations.transformers import Sharpness

SECTIONS, WORDS = 6, 2000


class MyTrainer(Sharpness, Trainer): ...


def rows(text: str, each: int = 300) -> list[dict[str, Any]]:
    """Ids of a description's words, and the number of its section; as many of each section."""
    fields = [dict(re.findall("^(Section|Description)(?:-en)?: (.+)", part, re.M)) for part in text.split("\n\n")]
    found = [(part["Section"].rpartition("/")[2], part["Description"]) for part in fields if len(part) == 2]
    random.Random(0).shuffle(found)
    split = []
    for label, (name, _) in enumerate(Counter(name for name, _ in found).most_common(SECTIONS)):
        split += [(re.findall("[a-z]+", words.lower()), label) for other, words in found if other == name][:each]
    known = Counter(word for words, _ in split for word in words).most_common(WORDS - 2)
    number = {word: place for place, (word, _) in enumerate(known, start=2)}  # 0 pads, 1 is any other word
    return [{"input_ids": [1, *(number.get(word, 1) for word in words)], "labels": label} for words, label in split]


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], batch_first=True)
    return {"input_ids": ids, "attention_mask": ids.ne(0), "labels": torch.tensor([row["labels"] for row in batch])}


def main(method: str, text: str | None = None, epochs: int = 8) -> float:
    if not (text or shutil.which("apt-cache")):
        sys.exit("apt-cache, which knows Debian's packages, is not here: run this on Debian or Ubuntu")
    data = rows(text or subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout)
    train, test = [row for i, row in enumerate(data) if i % 5], data[::5]
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    args = TrainingArguments("runs", num_train_epochs=epochs, learning_rate=2e-3, save_strategy="no", use_cpu=True)
    torch.manual_seed(args.seed)
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=SECTIONS, **size))
    sharpness = partial(flatmin.SAM, rho=0.05) if method == "sam" else None
    penalties: dict[str, Any] = {"saf": flatmin.SAF(len(train), SECTIONS), "mesa": partial(flatmin.MESA, decay=0.99)}
    given: dict[str, Any] = {"train_dataset": train, "data_collator": collate, "penalty": penalties.get(method)}
    trainer = MyTrainer(model, args, sharpness=sharpness, **given)
    trainer.train()
    return float((trainer.predict(test).predictions.argmax(1) == [row["labels"] for row in test]).mean())


if __name__ == "__main__":
    print(f"test accuracy {100 * main(sys.argv[1]):.2f} %")

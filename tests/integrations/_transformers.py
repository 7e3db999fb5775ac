"""Tiny models with random weights, their data, and methods written out by hand over a Trainer's own micro-batches."""

import copy
from typing import NamedTuple

import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainingArguments, Trainer

from flatmin.integrations.transformers import Sharpness

N, C, VOCABULARY, BATCH, EPOCHS = 44, 3, 30, 8, 2  # six batches an epoch, of which the last is of four samples
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def bert(kind=transformers.BertForSequenceClassification, dropout=0.0, **options):
    torch.manual_seed(0)
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    options = {"num_labels": C, "attn_implementation": "eager", **options}
    return kind(
        transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **SMALL, **drop, **options)
    ).train()


def tokens():
    return bert(transformers.BertForTokenClassification)


def gpt():
    torch.manual_seed(0)
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, attn_implementation="eager", **sizes, **drop)
    return transformers.GPT2LMHeadModel(config).train()


def vit(dropout=0.0):
    torch.manual_seed(0)
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=C, **SMALL, **drop)
    return transformers.ViTForImageClassification(config).train()


class Rows(Dataset):
    """Sentences of some lengths, or images; labels of the sample, of tokens (some -100), or the tokens themselves."""

    def __init__(self, kind="sequence", n=N, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(n):
            length = int(torch.randint(4, 9, (), generator=generator))
            ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            row = {"input_ids": ids, "labels": ids[0] % C}
            if kind == "tokens":
                row["labels"] = [-100, *(each % C for each in ids[1:])]
            elif kind == "causal":
                row["labels"] = [-100, -100, *ids[2:]]
            elif kind == "image":
                row = {"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": ids[0] % C}
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return dict(self.rows[i])


def pad(rows):
    """A collate function that knows its columns alone, and trips over any other."""
    if "pixel_values" in rows[0]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
    assert all(set(row) == {"input_ids", "labels"} for row in rows)
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name, value):
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    ids = filled("input_ids", 0)
    several = isinstance(rows[0]["labels"], list)
    labels = filled("labels", -100) if several else torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": labels}


def arguments(folder, **options):
    known = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": 1,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Seq2SeqTrainingArguments(output_dir=str(folder), **{**known, **options})


class Micro(NamedTuple):
    """What a Trainer gave to a pass."""

    inputs: dict
    items: object
    state: torch.Tensor
    index: torch.Tensor | None
    epoch: float


class Noting(Sharpness, Trainer):
    """Notes each micro-batch, with the state of torch's generator before it, and where steps are made."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.noted = [[]]

    def training_step(self, model, inputs, num_items_in_batch=None):
        clean = {name: value for name, value in inputs.items() if name != "flatmin_index"}
        noted = clean, num_items_in_batch, torch.get_rng_state(), inputs.get("flatmin_index"), self.state.epoch
        self.noted[-1].append(Micro(*noted))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.noted.append([])
        return loss

    @property
    def windows(self):
        """The micro-batches of each step."""
        return [window for window in self.noted if window]


def make(model, folder, data=None, kind=Noting, **options):
    own = {name: options.pop(name) for name in list(options) if name in OWN}
    own = {"data_collator": pad, **own}
    return kind(model, arguments(folder, **options), train_dataset=Rows() if data is None else data, **own)


OWN = (
    "sharpness",
    "penalty",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "eval_dataset",
    "data_collator",
    "compute_loss_func",
    "callbacks",
    "model_init",
    "processing_class",
)


def difference(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def by_hand(
    model, windows, *, rho=0.05, lr=0.1, clip=None, dtype=None, scale=1.0, penalty=None, loss=None, after=lambda: None
):
    """SAM around SGD with momentum 0.9, written out; with ``rho`` of None SGD alone.

    ``penalty(outputs, micro-batch)`` is added to the model's own loss, or to ``loss(outputs, micro-batch)``.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    momenta = [None] * len(parameters)

    def gradients(window):
        model.zero_grad()
        for batch in window:
            torch.set_rng_state(batch.state)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = model(**batch.inputs, num_items_in_batch=batch.items)
            value = outputs.loss.float() if loss is None else loss(outputs, batch)
            value = value if penalty is None else value + penalty(outputs, batch)
            (scale * value).backward()
        return [parameter.grad / scale for parameter in parameters]

    for window in windows:
        before = [parameter.detach().clone() for parameter in parameters]
        if rho is not None:
            first = gradients(window)
            norm = torch.cat([each.flatten() for each in first]).norm()
            with torch.no_grad():
                for parameter, gradient in zip(parameters, first, strict=True):
                    parameter += rho * gradient / (norm + 1e-12)
        found = gradients(window)
        if clip is not None:
            total = torch.cat([each.flatten() for each in found]).norm()
            found = [each * min(1.0, float(clip / (total + 1e-6))) for each in found]
        with torch.no_grad():
            for number, (parameter, weight, gradient) in enumerate(zip(parameters, before, found, strict=True)):
                momentum = gradient if momenta[number] is None else 0.9 * momenta[number] + gradient
                momenta[number] = momentum
                parameter.copy_(weight - lr * momentum)
        after()
    return model


def saf_by_hand(windows, *, coefficient=1.0, temperature=5.0):
    """SAF with lag 1 from epoch 1 on, as a penalty for `by_hand`."""
    history = {}
    total = {id(batch): sum(len(each.index) for each in window) for window in windows for batch in window}

    def penalty(outputs, batch):
        epoch, logits = int(batch.epoch or 0), outputs.logits.float()
        rows = batch.index.tolist()
        past = [history.get((epoch - 1, row)) for row in rows]
        for row, each in zip(rows, logits.detach(), strict=True):
            history[epoch, row] = each.clone()
        if epoch < 1:
            return 0.0
        assert all(each is not None for each in past)
        return coefficient * trajectory(logits, torch.stack(past), temperature).sum() / total[id(batch)]

    return penalty


def mesa_by_hand(model, windows, *, kind="sequence", decay=0.9, coefficient=1.0, temperature=5.0, dtype=None):
    """MESA from epoch 0 on: a penalty for `by_hand`, and what is to be done after each step."""
    average = copied(model).eval()
    for parameter in average.parameters():
        parameter.requires_grad = False

    def counted(batch):
        labels = batch.inputs["labels"]
        if kind == "causal":
            return F.pad(labels[:, 1:] != -100, (0, 1), value=False)
        return labels != -100

    total = {id(batch): sum(int(counted(each).sum()) for each in window) for window in windows for batch in window}

    def penalty(outputs, batch):
        inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
        if kind == "encoder and decoder":
            inputs["labels"] = batch.inputs["labels"]  # of which the decoder's inputs are made
        with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            target = average(**inputs).logits
        return coefficient * trajectory(outputs.logits, target, temperature)[counted(batch)].sum() / total[id(batch)]

    def after():
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.mul_(decay).add_(new, alpha=1 - decay)

    return {"penalty": penalty, "after": after}


def copied(model):
    return copy.deepcopy(model)


def trajectory(logits, target, temperature):
    """T**2 * KL(target || logits) of each position, over the last dimension."""
    now, then = (F.log_softmax(each.float() / temperature, dim=-1) for each in (logits, target.detach()))
    return temperature**2 * (then.exp() * (then - now)).sum(dim=-1)

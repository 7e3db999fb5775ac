"""A penalty that a ``compute_loss`` of the user's adds by hand, in a Trainer that accumulates, is watched."""

import warnings
from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from torch.utils.data import Dataset
from transformers import Trainer

import flatmin
from flatmin.errors import FlatminWarning
from flatmin.integrations.transformers import Sharpness
from tests.integrations._transformers import C, N, Rows, bert, make, pad

LOSSES = {
    "SAF": lambda model: flatmin.SAF(N, C, lag=1, start_epoch=1),
    "MESA": lambda model: flatmin.MESA(model, decay=0.9, start_epoch=0),
    "OnlineLabelSmoothing": lambda model: flatmin.OnlineLabelSmoothing(C),
    "logit_squeezing": lambda model: flatmin.logit_squeezing,
}


class Numbered(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {**Rows().rows[i], "index": i}


def collate(rows):
    index = torch.tensor([row.pop("index") for row in rows])
    return {**pad(rows), "index": index}


def trained(name, folder, *, divide=False, parents=(Trainer,), accumulation=2, **options):
    """Trains with a Trainer as somebody writes it; returns what was warned of."""
    model = bert()
    loss = LOSSES[name](model)
    epoch_of = getattr(loss, "set_epoch", lambda _: None)

    class ByHand(*parents):
        penalty = loss if parents == (Trainer,) else None  # a name that the mixin has too
        loss_is_scaled_for_ga = options.pop("scaled", None)

        def create_optimizer(self, *args, **kwargs):
            super().create_optimizer(*args, **kwargs)
            if name != "logit_squeezing":
                loss.attach(self.optimizer)
            return self.optimizer

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            index, x = inputs.pop("index"), {"attention_mask": inputs["attention_mask"]}
            epoch_of(int(self.state.epoch or 0))
            value, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            given = {"SAF": (index,), "MESA": (inputs["input_ids"],), "OnlineLabelSmoothing": (inputs["labels"],)}
            added = loss(outputs.logits, *given.get(name, ()), **(x if name == "MESA" else {}))
            value = value + added / (self.current_gradient_accumulation_steps if divide else 1)
            return (value, outputs) if return_outputs else value

    options |= {"remove_unused_columns": False, "data_collator": collate, "learning_rate": 0.01}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(model, folder, Numbered(), ByHand, gradient_accumulation_steps=accumulation, **options).train()
    return [str(each.message) for each in caught if issubclass(each.category, FlatminWarning)]


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_said_once_where_it_counts_once_a_micro_batch(name, tmp_path):
    (said,) = trained(name, tmp_path)
    assert f"so that {name} counts gradient_accumulation_steps=2 times" in said
    assert "divide it by self.current_gradient_accumulation_steps" in said


def test_beside_the_mixins_optimizer_too(tmp_path):
    sharpness = partial(flatmin.MSAM, rho=0.05)
    assert len(trained("MESA", tmp_path, parents=(Sharpness, Trainer), sharpness=sharpness)) == 1


@pytest.mark.parametrize("right", [{"divide": True}, {"scaled": False}, {"accumulation": 1}], ids=str)
def test_what_is_right_is_silent(right, tmp_path):
    """Divided by hand, or by the Trainer as it was told to, or not accumulated."""
    assert not trained("MESA", tmp_path, **right)

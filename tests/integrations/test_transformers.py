"""The Trainer with the mixin: the weights are those of the method written out by hand, over the same batches."""

from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch

import flatmin
from tests.integrations._transformers import (
    Rows,
    bert,
    copied,
    difference,
    gpt,
    make,
    sam_by_hand,
    tokens,
    vit,
)

SAM = partial(flatmin.SAM, rho=0.05)

# The model, the data, the Trainer's settings, and the same by hand.
CASES = {
    "plain": (bert, "sequence", {}, {}),
    "dropout": (partial(bert, dropout=0.3), "sequence", {"gradient_accumulation_steps": 2}, {}),
    "accumulation of 2": (bert, "sequence", {"gradient_accumulation_steps": 2}, {}),
    "accumulation of 4, uneven": (bert, "sequence", {"gradient_accumulation_steps": 4}, {}),
    "clipped": (bert, "sequence", {"max_grad_norm": 0.3, "gradient_accumulation_steps": 2}, {"clip": 0.3}),
    "bfloat16": (bert, "sequence", {"bf16": True}, {"dtype": torch.bfloat16}),
    "tokens": (tokens, "tokens", {"gradient_accumulation_steps": 3}, {}),
    "causal": (gpt, "causal", {"gradient_accumulation_steps": 4}, {}),
    "images": (vit, "image", {"gradient_accumulation_steps": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_sam_is_that_by_hand(case, tmp_path):
    network, kind, options, by_hand = CASES[case]
    model = network()
    new, plain = copied(model), copied(model)
    trainer = make(model, tmp_path, Rows(kind), sharpness=SAM, **options)
    trainer.train()
    assert sum(len(window) for window in trainer.windows) == 12
    sam_by_hand(new, trainer.windows, **by_hand)
    assert difference(model, new) < 1e-6
    sam_by_hand(plain, trainer.windows, **{**by_hand, "rho": 1e-12})
    assert difference(model, plain) > 1e-4

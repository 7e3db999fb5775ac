"""SharpnessAware in Lightning: the weights are those of the method written out by hand, over the same batches."""

import pytest

pytest.importorskip("lightning")

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

import flatmin
from flatmin.integrations.lightning import SharpnessAware

from tests.integrations._lightning import Net, difference, fit, half, network, sam_by_hand

one_cycle = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)
SCHEDULE = {0: 1, 1: 3}

# The Trainer's settings, the network's, and the same by hand.
CASES = {
    "plain": ({}, {}, {}),
    "batch norm and dropout": ({}, {"norm": True, "dropout": 0.3}, {}),
    "accumulation of 2": ({"accumulate_grad_batches": 2}, {}, {"accumulate": 2}),
    "accumulation of 3": ({"accumulate_grad_batches": 3}, {"norm": True, "dropout": 0.3}, {"accumulate": 3}),
    "scheduled accumulation": (
        {"callbacks": [GradientAccumulationScheduler(SCHEDULE)]},
        {"dropout": 0.3},
        {"accumulate": SCHEDULE.get},
    ),
    "clipped by norm": ({"gradient_clip_val": 0.1}, {}, {"clip": 0.1}),
    "clipped by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
        {},
        {"clip_value": 0.01, "accumulate": 2},
    ),
    "bfloat16": ({"precision": "bf16-mixed"}, {}, {"dtype": torch.bfloat16}),
    "float16": ({"plugins": [half]}, {}, {"dtype": torch.float16, "scale": 256.0}),
    "float16, accumulated and clipped": (
        {"plugins": [half], "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {},
        {"dtype": torch.float16, "scale": 256.0, "clip": 0.1, "accumulate": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_sam_is_that_by_hand(case):
    options, architecture, by_hand = CASES[case]
    options = dict(options)
    callbacks = options.pop("callbacks", [])
    if "plugins" in options:
        options["plugins"] = [make() for make in options["plugins"]]
    module, net = Net(network(**architecture)), network(**architecture)
    fit(module, SharpnessAware(flatmin.SAM, rho=0.05), *callbacks, **options)
    sam_by_hand(net, **by_hand)
    assert difference(module.net, net) < 1e-6
    assert difference(module.net, network(**architecture)) > 1e-2

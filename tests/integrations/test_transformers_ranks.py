"""The mixin on two ranks: SAM by the rank's and by the global gradient, SAF and MESA, as written out by hand."""

import os
import warnings
from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from torch import distributed

import flatmin
from tests.distributed._spawn import run_ranks

SAF = partial(flatmin.SAF, 48, 3, lag=1, start_epoch=1, coefficient=1.0)
PENALTIES = {
    "SAF": lambda model: SAF(sharing="replicate"),
    "SAF in shards": lambda model: SAF(sharing="shard"),
    "MESA": lambda model: flatmin.MESA(model, decay=0.9, start_epoch=0, coefficient=1.0),
}


def joined():
    """The Trainer's own modules, in a rank."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")
    from tests.integrations import _transformers

    return _transformers


def gathered(value):
    """All ranks' values."""
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def rank_by_hand(model, per_rank, rho=0.05):
    """SAM in which each rank perturbs along its own gradient, around SGD with momentum 0.9."""
    parameters, momenta = list(model.parameters()), None

    def gradient(window):
        model.zero_grad()
        for batch in window:
            model(**batch.inputs, num_items_in_batch=batch.items).loss.backward()
        return [parameter.grad.clone() for parameter in parameters]

    for windows in zip(*per_rank, strict=True):
        before, seconds = [parameter.detach().clone() for parameter in parameters], []
        for window in windows:
            first = gradient(window)
            norm = torch.cat([each.flatten() for each in first]).norm()
            with torch.no_grad():
                torch._foreach_add_(parameters, [rho * each / (norm + 1e-12) for each in first])
            seconds.append(gradient(window))
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
        found = [sum(each) for each in zip(*seconds, strict=True)]  # the Trainer multiplies by the number of ranks
        momenta = found if momenta is None else [0.9 * old + each for old, each in zip(momenta, found, strict=True)]
        with torch.no_grad():
            torch._foreach_sub_(parameters, momenta, alpha=0.1)
    return model


def apart(model):
    """How far ranks are from each other."""
    first, second = gathered({name: value.clone() for name, value in model.state_dict().items()})
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def trained(folder):
    """Of each case the difference between ranks, to the weights by hand, to another method's, and to a resumed run."""
    t = joined()
    found = {}
    for norm, steps in (("rank", 1), ("rank", 2), ("global", 2)):
        model = t.bert()
        new, other = t.copied(model), t.copied(model)
        sharpness = partial(flatmin.SAM, rho=0.05, norm=norm)
        trainer = t.make(model, folder, sharpness=sharpness, gradient_accumulation_steps=steps)
        trainer.train()
        ranks = gathered(trainer.windows)
        together = [first + second for first, second in zip(*ranks, strict=True)]
        new, other = rank_by_hand(new, ranks), t.by_hand(other, together)
        new, other = (new, other) if norm == "rank" else (other, new)
        found[norm, steps] = apart(model), t.difference(model, new), t.difference(model, other), 0.0

    def run(name, resume=None, **options):
        model = t.bert()
        known = {"num_train_epochs": 3, "save_steps": 3, "gradient_accumulation_steps": 2}
        arguments = t.arguments(f"{folder}/{name}", **known, **options)
        data = {"train_dataset": t.Rows(n=48), "eval_dataset": t.Rows(n=6, seed=4), "data_collator": t.pad}
        trainer = t.Noting(model, arguments, penalty=PENALTIES[name](model), **data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    for name in PENALTIES:
        new, plain = t.bert(), t.bert()
        whole = run(name, save_strategy="steps", eval_strategy="epoch")
        together = [first + second for first, second in zip(*gathered(whole.windows), strict=True)]
        hand = t.mesa_by_hand(new, together) if name == "MESA" else {"penalty": t.saf_by_hand(together)}
        t.by_hand(new, together, rho=None, **hand)
        t.by_hand(plain, together, rho=None)
        again = run(name, f"{folder}/{name}/checkpoint-3")  # of two steps an epoch
        model = whole.model
        resumed = t.difference(model, again.model)
        found[name] = apart(model), t.difference(model, new), t.difference(model, plain), resumed
    return found


def test_two_ranks(tmp_path):
    for found in run_ranks(trained, 2, str(tmp_path), timeout=240):
        for name, (ranks, off, other, resumed) in found.items():
            assert ranks == 0, name
            assert off < 1e-6, name
            assert other > 1e-5, name
            assert resumed == 0, name

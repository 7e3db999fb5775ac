"""What the mixin cannot be right with is refused in a sentence that names the way out; and plain Trainers name it."""

import importlib
import sys
from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers
from accelerate.utils import DistributedType
from torch.utils.data import IterableDataset, Subset
from transformers import Trainer

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError, MissingDependencyError
from flatmin.integrations.transformers import Sharpness
from flatmin.integrations.transformers._package import check_package
from tests.contracts._optimizers import EVERY
from tests.integrations._transformers import Noting, Rows, bert, copied, difference, make, tokens

SAM = partial(flatmin.SAM, rho=0.05)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def saf(samples=44, classes=3, **options):
    return flatmin.SAF(samples, classes, lag=1, start_epoch=1, **options)


# What is given, by a function of the model, and the sentence; all of these are refused when the Trainer is made.
ARGUMENTS = {
    "an optimizer": (lambda m: {"sharpness": flatmin.SAM(sgd(m))}, r"got an optimizer: sharpness=flatmin\.SAM"),
    "a plain class": (lambda m: {"sharpness": torch.optim.SGD}, r"sharpness=partial\(flatmin\.SAM, rho=0\.05\)"),
    "no function": (lambda m: {"sharpness": 0.05}, r"sharpness=partial\(flatmin\.SAM, rho=0\.05\), got 0\.05"),
    "ESAM": (lambda m: {"sharpness": partial(flatmin.ESAM, beta=0.5)}, r"loss of each sample.*use flatmin\.SAM"),
    "ESAM made": (
        lambda m: {"optimizers": (flatmin.ESAM(sgd(m)), None)},
        r"loss of each sample.*flatmin\.LookSAM or when=flatmin\.optim\.Every\(2\)",
    ),
    "a scaler": (
        lambda m: {"sharpness": partial(flatmin.SAM, scaler=torch.amp.GradScaler("cpu"))},
        "the Trainer makes one, with fp16=True",
    ),
    "two optimizers": (
        lambda m: {"optimizers": (flatmin.SAM(sgd(m)), None), "sharpness": SAM},
        "optimizers has flatmin's SAM, and sharpness another: give the plain optimizer",
    ),
    "a class with its arguments": (
        lambda m: {"optimizer_cls_and_kwargs": (flatmin.SAM, {"rho": 0.1})},
        r"sharpness=partial\(flatmin\.SAM, \.\.\.\) to the mixin flatmin\.integrations\.transformers\.Sharpness",
    ),
    "the class SAF": (lambda m: {"penalty": flatmin.SAF}, r"penalty=flatmin\.SAF\(len\(train_dataset\), num_labels\)"),
    "another loss": (lambda m: {"penalty": torch.nn.CrossEntropyLoss()}, r"flatmin\.MESA\(model\), or a function"),
    **{
        f"{kind} that needs no mixin": (
            lambda m, penalty=penalty: {"penalty": penalty},
            r"compute_loss_func that adds the loss.*flatmin\.logit_squeezing",
        )
        for kind, penalty in {
            "a function": flatmin.logit_squeezing,
            "a function with arguments": partial(flatmin.logit_squeezing, coefficient=2.0),
            "an object": flatmin.OnlineLabelSmoothing(3),
            "a class": flatmin.OnlineLabelSmoothing,
        }.items()
    },
    "a number": (lambda m: {"penalty": 0.3}, r"penalty must be flatmin\.SAF.*got 0\.3"),
    "steps in backward": (lambda m: {"sharpness": SAM, "optim": "galore_adamw_layerwise"}, "optim='adamw_torch'"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_refused_as_the_trainer_is_made(name, tmp_path):
    given, sentence = ARGUMENTS[name]
    model = bert()
    with pytest.raises(InvalidArgumentError, match=sentence):
        make(model, tmp_path, **given(model))


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
@pytest.mark.parametrize("given", [{"sharpness": SAM}, {"penalty": flatmin.MESA}], ids=["sharpness", "penalty"])
def test_other_strategies_are_refused(kind, given, tmp_path, monkeypatch):
    trainer = make(bert(), tmp_path, **given)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", kind)
    with pytest.raises(InvalidArgumentError, match="one device and for DistributedDataParallel"):
        flatmin.integrations.transformers._checks.check_trainer(trainer)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Rows().rows)


class Regression(transformers.BertForSequenceClassification):
    """A model without logits."""

    def forward(self, **inputs):
        found = super().forward(**inputs)
        return {"loss": found.loss, "scores": found.logits}


class Forgetful(Noting):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Stepping(Noting):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return Trainer.training_step(self, model, {k: v for k, v in inputs.items() if k != "flatmin_index"})


class Making(Noting):
    def create_optimizer(self, *_):
        self.optimizer = sgd(self.model)
        return self.optimizer


class Loading(Noting):
    def get_train_dataloader(self):
        return self.accelerator.prepare(torch.utils.data.DataLoader(self.train_dataset, collate_fn=self.data_collator))


# The model, the data, what is given, and the sentence; all of these are refused in training, before a step is made.
TRAININGS = {
    "a stream and SAF": (bert, Stream, lambda m: {"penalty": saf(), "max_steps": 2}, r"iterable.*use flatmin\.MESA"),
    "SAF and SAM": (bert, Rows, lambda m: {"penalty": saf(), "sharpness": SAM}, "use penalty=.* or SAM, not both"),
    "another number of classes": (bert, Rows, lambda m: {"penalty": saf(44, 5)}, r"made for num_classes=5"),
    "too few samples": (bert, Rows, lambda m: {"penalty": saf(20)}, r"num_samples=20, which must be len\(dataset\)"),
    "SAF and tokens": (
        tokens,
        partial(Rows, "tokens"),
        lambda m: {"penalty": saf()},
        r"for tokens or pixels take flatmin\.MESA\(model, class_dim=\.\.\.\)",
    ),
    "MESA and tokens": (
        tokens,
        partial(Rows, "tokens"),
        lambda m: {"penalty": flatmin.MESA(m, start_epoch=0)},
        r"class_dim=-1 for tokens",
    ),
    "no logits and SAF": (
        partial(bert, Regression),
        Rows,
        lambda m: {"penalty": saf(), "remove_unused_columns": False},
        r"no logits for SAF to compare, but loss, scores: use flatmin\.MESA\(model, output=",
    ),
    "no logits and MESA": (
        partial(bert, Regression),
        Rows,
        lambda m: {"penalty": flatmin.MESA(m, start_epoch=0), "remove_unused_columns": False},
        r"output=lambda out: out\['logits'\]",
    ),
    "one logit": (
        partial(bert, num_labels=1),
        Rows,
        lambda m: {"penalty": flatmin.MESA(m, start_epoch=0)},
        "link='sigmoid' for a binary problem, or distance=",
    ),
    "MESA of another network": (bert, Rows, lambda m: {"penalty": flatmin.MESA(bert())}, "or let it be made, penalty="),
    "a function that makes SAF": (
        bert,
        Rows,
        lambda m: {"penalty": lambda model: saf()},
        r"give SAF as it is, penalty=flatmin\.SAF",
    ),
    "a function that makes no optimizer of ours": (bert, Rows, lambda m: {"sharpness": lambda o: o}, "got SGD"),
    "a part of an indexed data set": (
        bert,
        lambda: Subset(flatmin.indexed(Rows()), range(20)),
        lambda m: {"penalty": saf()},
        "give the Trainer the data set as it is without indices",
    ),
    "compute_loss without super": (bert, Rows, lambda m: {"penalty": saf(), "kind": Forgetful}, "does not call super"),
    "training_step without super": (
        bert,
        Rows,
        lambda m: {"penalty": partial(flatmin.MESA, start_epoch=0), "kind": Stepping},
        "does not call super",
    ),
    "training_step without super, SAM": (
        bert,
        Rows,
        lambda m: {"sharpness": SAM, "kind": Stepping},
        r"the mixin flatmin\.integrations\.transformers\.Sharpness",
    ),
    "create_optimizer without super": (bert, Rows, lambda m: {"sharpness": SAM, "kind": Making}, "has not reached"),
    "a loader of ones own and SAF": (
        bert,
        Rows,
        lambda m: {"penalty": saf(), "kind": Loading},
        r"carries no index: let the loader's data set be flatmin\.indexed",
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_refused_in_training(name, tmp_path):
    network, data, given, sentence = TRAININGS[name]
    model = network()
    before = copied(model)
    with pytest.raises(InvalidArgumentError, match=sentence):
        make(model, tmp_path, data(), **given(model)).train()
    assert difference(model, before) == 0


def test_a_stream_and_mesa_train(tmp_path):
    trainer = make(bert(), tmp_path, Stream(), penalty=flatmin.MESA, sharpness=SAM, max_steps=4)
    trainer.train()
    assert int(trainer.penalty.average.n_averaged) == 5


@pytest.mark.parametrize(
    ("penalty", "said"),
    [
        (lambda model: flatmin.MESA(model), "MESA is 0 before epoch 5, .* lower start_epoch=5, or"),
        (lambda model: flatmin.SAF(44, 3), "SAF is 0 before epoch 5, .* lower start_epoch=5 and lag=3, or"),
        (lambda model: flatmin.SAF(44, 3, start_epoch=1), "SAF is 0 before epoch 3, .* lower lag=3, or"),
    ],
)
def test_a_training_that_ends_before_the_loss_begins_is_told_of(penalty, said, tmp_path):
    model, plain = bert(), bert()
    with pytest.warns(FlatminWarning, match=said) as caught:
        make(model, tmp_path, penalty=penalty(model)).train()
    assert len(caught) == 1
    make(plain, tmp_path, kind=Trainer).train()
    assert difference(model, plain) == 0
    make(model, tmp_path, penalty=flatmin.MESA(model, start_epoch=1)).train()


def test_the_order_of_the_classes():
    with pytest.raises(InvalidArgumentError, match=r"class Wrong\(Sharpness, Trainer\)"):

        class Wrong(Trainer, Sharpness):
            pass

    class Alone(Sharpness):
        pass

    with pytest.raises(InvalidArgumentError, match=r"class MyTrainer\(Sharpness, Trainer\)"):
        Alone(sharpness=SAM)


def test_without_either_it_is_the_trainer(tmp_path):
    one, other = bert(), bert()
    make(one, tmp_path).train()
    make(other, tmp_path, kind=Trainer).train()
    assert difference(one, other) == 0


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_with_or_without_saf(saved, tmp_path):
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    make(bert(), tmp_path, **options, **({"penalty": saf()} if saved else {})).train()
    options = {"num_train_epochs": 3, **({} if saved else {"penalty": saf()})}
    with pytest.warns(FlatminWarning, match="there is no SAF now" if saved else "SAF begins anew"):
        make(bert(), tmp_path, **options).train(resume_from_checkpoint=True)


# Plain Trainers, without the mixin.

TWO_PASSES = [name for name in EVERY if EVERY[name].max_passes == 2 and not EVERY[name].per_sample_closure]
ONE_PASS = [name for name in EVERY if EVERY[name].max_passes == 1]


@pytest.mark.parametrize("name", [*TWO_PASSES, *ONE_PASS])
def test_a_plain_trainer_is_told_of_the_mixin(name, tmp_path):
    model = bert()
    optimizer = EVERY[name](sgd(model), rho=0.1)
    with pytest.raises(InvalidArgumentError, match=r"mixin flatmin\.integrations\.transformers\.Sharpness"):
        make(model, tmp_path, kind=Trainer, optimizers=(optimizer, None)).train()
    with pytest.raises(InvalidArgumentError, match=r"mixin flatmin\.integrations\.transformers\.Sharpness"):
        make(bert(), tmp_path, kind=Trainer, optimizer_cls_and_kwargs=(EVERY[name], {"rho": 0.1})).train()


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4, "max_grad_norm": 0.3}], ids=str)
def test_one_pass_methods_with_model_need_no_mixin(name, options, tmp_path):
    plain, mixed, base = bert(dropout=0.2), bert(dropout=0.2), bert(dropout=0.2)
    optimizer = EVERY[name](sgd(plain), rho=0.1, model=plain)
    make(plain, tmp_path, kind=Trainer, optimizers=(optimizer, None), eval_dataset=Rows(n=5), **options).train()
    make(mixed, tmp_path, sharpness=partial(EVERY[name], rho=0.1), **options).train()
    assert difference(plain, mixed) < 1e-6
    make(base, tmp_path, kind=Trainer, **options).train()
    assert difference(plain, base) > 1e-4


# Packages.


def test_a_version_that_is_too_old(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.23.1")
    with pytest.raises(MissingDependencyError, match=r"5\.23\.1 is too old, 5\.24 is needed; pip install 'flatmin\["):
        check_package()


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_a_missing_package(missing, monkeypatch):
    package = "flatmin.integrations.transformers"
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flatmin\[transformers\]'"):
        importlib.import_module(package)

"""The Trainer with the mixin: the weights are those of the method written out by hand, over the same batches."""

import copy
import warnings
from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers
from accelerate.state import AcceleratorState
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, Trainer

import flatmin
from flatmin.errors import NonFiniteGradientWarning
from flatmin.integrations.transformers import Sharpness
from flatmin.optim import Adaptive, Every
from tests.contracts._optimizers import CLOSURES, EVERY, VISIBLE
from tests.integrations._transformers import (
    Noting,
    Rows,
    bert,
    by_hand,
    copied,
    difference,
    gpt,
    make,
    mesa_by_hand,
    saf_by_hand,
    tokens,
    vit,
)

SAM = partial(flatmin.SAM, rho=0.05)
MESA = partial(flatmin.MESA, decay=0.9, start_epoch=0, coefficient=1.0)


def saf(samples=44, classes=3):
    return flatmin.SAF(samples, classes, lag=1, start_epoch=1, coefficient=1.0)


class Drawing(transformers.TrainerCallback):
    """Draws random numbers between micro-batches, as a log or an augmentation may."""

    def on_substep_end(self, *_, **__):
        torch.rand(3)


# The model, the data, the Trainer's settings, and the same by hand.
CASES = {
    "plain": (bert, "sequence", {}, {}),
    "dropout": (
        partial(bert, dropout=0.3),
        "sequence",
        {"gradient_accumulation_steps": 2, "callbacks": [Drawing()]},
        {},
    ),
    "accumulation of 2": (bert, "sequence", {"gradient_accumulation_steps": 2}, {}),
    "accumulation of 4, uneven": (bert, "sequence", {"gradient_accumulation_steps": 4}, {}),
    "clipped": (bert, "sequence", {"max_grad_norm": 0.3, "gradient_accumulation_steps": 2}, {"clip": 0.3}),
    "bfloat16": (bert, "sequence", {"bf16": True}, {"dtype": torch.bfloat16}),
    "tokens": (tokens, "tokens", {"gradient_accumulation_steps": 3}, {}),
    "causal": (gpt, "causal", {"gradient_accumulation_steps": 4}, {}),
    "images": (vit, "image", {"gradient_accumulation_steps": 2}, {}),
    "checkpointing": (partial(bert, dropout=0.3), "sequence", {"activation_checkpointing": True}, {}),
    "compiled": (
        partial(vit, dropout=0.3),
        "image",
        {"torch_compile": True, "torch_compile_backend": "eager", "gradient_accumulation_steps": 2},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_sam_is_that_by_hand(case, tmp_path):
    network, kind, options, settings = CASES[case]
    model = network()
    new, plain = copied(model), copied(model)
    trainer = make(model, tmp_path, Rows(kind), sharpness=SAM, **options)
    trainer.train()
    assert sum(len(window) for window in trainer.windows) == 12
    by_hand(new, trainer.windows, **settings)
    assert difference(model, new) < 1e-6
    by_hand(plain, trainer.windows, **settings, rho=None)
    assert difference(model, plain) > 1e-4


@pytest.fixture
def half():
    """Makes of a Trainer one for float16 with a scaler, as on a GPU; accelerate does it there alone."""

    def of(trainer, scale=256.0):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        return trainer

    yield of
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.3, "gradient_accumulation_steps": 4}], ids=str)
def test_sam_in_float16_is_that_by_hand(options, half, tmp_path):
    model = bert()
    new = copied(model)
    trainer = half(make(model, tmp_path, sharpness=SAM, **options))
    trainer.train()
    by_hand(new, trainer.windows, dtype=torch.float16, scale=256.0, clip=options.get("max_grad_norm"))
    assert difference(model, new) < 1e-5  # in float16, gradients are rounded
    assert trainer.accelerator.scaler.get_scale() == 256.0


def test_a_scale_that_is_too_large_is_found(half, tmp_path):
    model = bert()
    trainer = half(make(model, tmp_path, sharpness=SAM), scale=2.0**24)
    trainer.train()
    assert 1 < trainer.optimizer.optimizer.skipped_steps < 12
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (24 - trainer.optimizer.optimizer.skipped_steps)
    assert trainer.optimizer.optimizer._steps == 12 - trainer.optimizer.optimizer.skipped_steps
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Every method.

METHODS = {
    **{name: (EVERY[name], VISIBLE.get(name, {})) for name in CLOSURES},
    "Adaptive": (flatmin.SAM, {"when": Adaptive(steps=10)}),
    "Every": (flatmin.SAM, {"when": Every(2)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_that_of_a_loop_with_closures(name, tmp_path):
    method, keywords = METHODS[name]
    model = bert(dropout=0.2)
    new = copied(model)
    kept = copy.deepcopy(keywords)
    trainer = make(
        model,
        tmp_path,
        sharpness=partial(method, **keywords),
        gradient_accumulation_steps=4,
        max_grad_norm=0.3,
    )
    trainer.train()
    optimizer = method(torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9), max_norm=0.3, **kept)
    for window in trainer.windows:

        def closure(window=window):
            optimizer.zero_grad()
            for batch in window:
                torch.set_rng_state(batch.state)
                new(**batch.inputs).loss.backward()

        optimizer.step(closure)
    assert difference(model, new) < 1e-6


def test_an_optimizer_of_flatmins_given_as_it_is(tmp_path):
    model = bert(dropout=0.3)
    new = copied(model)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
    trainer = make(model, tmp_path, optimizers=(optimizer, None), gradient_accumulation_steps=2)
    trainer.train()
    by_hand(new, trainer.windows)
    assert difference(model, new) < 1e-6


def test_a_plain_optimizer_that_is_given_is_wrapped_and_a_second_run_goes_on_with_it(tmp_path):
    model = bert()
    new = copied(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = make(model, tmp_path, optimizers=(base, None), sharpness=SAM, num_train_epochs=1)
    trainer.train()
    trainer.train()
    assert trainer.optimizer.optimizer.base_optimizer is base
    by_hand(new, trainer.windows)
    assert difference(model, new) < 1e-6


def test_model_init_makes_a_new_optimizer_for_each_run(tmp_path):
    when = Adaptive(steps=10)
    options = {"sharpness": partial(flatmin.SAM, when=when), "penalty": MESA, "model_init": lambda: bert()}
    trainer = make(None, tmp_path, **options)
    trainer.train()
    first, average = copied(trainer.model), trainer.penalty
    trainer.train()
    assert difference(first, trainer.model) == 0
    assert trainer.penalty is not average
    assert when.state_dict() == Adaptive(steps=10).state_dict()


def test_the_learning_rate_follows_the_trainers_scheduler(tmp_path):
    rates = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
            rates.append(optimizer.optimizer.base_optimizer.param_groups[0]["lr"])

    make(bert(), tmp_path, sharpness=SAM, lr_scheduler_type="linear", callbacks=[Watch()]).train()
    assert rates == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])


def test_a_step_that_is_not_finite_is_dropped(tmp_path):
    class Broken(Noting):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss * torch.nan if self.state.global_step == 3 else loss
            return (loss, outputs) if return_outputs else loss

    model = bert()
    new = copied(model)
    trainer = make(model, tmp_path, kind=Broken, sharpness=SAM, penalty=MESA(model), gradient_accumulation_steps=2)
    with pytest.warns(NonFiniteGradientWarning):
        trainer.train()
    windows = [window for number, window in enumerate(trainer.windows) if number != 3]
    by_hand(new, windows, **mesa_by_hand(new, windows))
    assert difference(model, new) < 1e-6
    assert trainer.optimizer.optimizer.skipped_steps == 1
    assert int(trainer.penalty.average.n_averaged) == 6


def test_weights_are_restored_where_the_second_pass_fails(tmp_path):
    class Failing(Noting):
        passes = 0

        def compute_loss(self, *args, **kwargs):
            self.passes += 1
            if self.passes == 2:
                raise RuntimeError("of mine")
            return super().compute_loss(*args, **kwargs)

    model = bert()
    new = copied(model)
    trainer = make(model, tmp_path, kind=Failing, sharpness=SAM)
    with pytest.raises(RuntimeError, match="of mine"):
        trainer.train()
    assert difference(model, new) == 0
    trainer.noted = [[]]
    trainer.train()
    by_hand(new, trainer.windows)
    assert difference(model, new) < 1e-6


def test_logs_are_of_the_first_pass_and_what_trl_counts_is_counted_once(tmp_path):
    class Counting(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._metrics = {"train": []}

        def compute_loss(self, *args, **kwargs):
            self._metrics["train"].append(1)
            self.log({"mine": 1.0})
            return super().compute_loss(*args, **kwargs)

    class Mine(Sharpness, Counting):
        pass

    trainer = make(bert(), tmp_path, kind=Mine, sharpness=SAM, gradient_accumulation_steps=2, logging_strategy="steps")
    trainer.train()
    assert len(trainer._metrics["train"]) == 12
    assert sum("mine" in entry for entry in trainer.state.log_history) == 12
    assert "log" not in vars(trainer)


# SAF and MESA.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": Rows(n=5, seed=3)},
        {"remove_unused_columns": False},
        {"sharpness": partial(flatmin.S2SAM, rho=1e-12)},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_saf_is_that_by_hand(options, tmp_path):
    model = bert()
    new, plain = copied(model), copied(model)
    trainer = make(model, tmp_path, penalty=saf(), num_train_epochs=3, **options)
    trainer.train()
    assert sorted(i for window in trainer.windows[-(len(trainer.windows) // 3) :] for b in window for i in b.index) == (
        list(range(44))
    )
    data = Rows()
    for window in trainer.windows:
        for batch in window:
            assert batch.inputs["input_ids"][:, 0].tolist() == [data[int(i)]["input_ids"][0] for i in batch.index]
    by_hand(new, trainer.windows, rho=None, penalty=saf_by_hand(trainer.windows))
    assert difference(model, new) < 1e-6
    by_hand(plain, trainer.windows, rho=None)
    assert difference(model, plain) > 1e-4


@pytest.mark.parametrize("workers", [0, 2])
def test_saf_with_a_data_set_of_datasets_and_columns_that_the_model_does_not_know(workers, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{**row, "text": "x", "index": 7} for row in Rows().rows])
    model, same = bert(), bert()
    context = {"dataloader_multiprocessing_context": "fork"} if workers else {}
    options = {"num_train_epochs": 3, "gradient_accumulation_steps": 2}
    trainer = make(model, tmp_path, data, penalty=saf(), dataloader_num_workers=workers, **context, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        trainer.train()
    assert trainer.train_dataset is data
    assert trainer.data_collator.__name__ == "pad"
    make(same, tmp_path, flatmin.indexed(Rows()), penalty=saf(), **options).train()
    assert difference(model, same) == 0


MESA_CASES = {
    "plain": (bert, "sequence", {}, {}, {}),
    "accumulated": (bert, "sequence", {"gradient_accumulation_steps": 4}, {}, {}),
    "bfloat16": (bert, "sequence", {"bf16": True, "gradient_accumulation_steps": 2}, {}, {"dtype": torch.bfloat16}),
    "tokens": (tokens, "tokens", {"gradient_accumulation_steps": 4}, {"class_dim": -1}, {}),
    "causal": (gpt, "causal", {"gradient_accumulation_steps": 4}, {"class_dim": -1}, {}),
    "images": (vit, "image", {}, {}, {}),
    "in both passes": (bert, "sequence", {"sharpness": SAM, "gradient_accumulation_steps": 4}, {}, {}),
}


@pytest.mark.parametrize("case", MESA_CASES)
def test_mesa_is_that_by_hand(case, tmp_path):
    network, kind, options, keywords, settings = MESA_CASES[case]
    model = network()
    new, plain = copied(model), copied(model)
    made = MESA(model, **keywords) if "sharpness" in options else partial(MESA, **keywords)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Rows(kind, n=5)} if case == "tokens" else {}
    trainer = make(model, tmp_path, Rows(kind), penalty=made, **options, **evaluated)
    trainer.train()
    rho = {"rho": 0.05 if "sharpness" in options else None}
    hand = mesa_by_hand(new, trainer.windows, kind=kind, **settings)
    by_hand(new, trainer.windows, **hand, **rho, **settings)
    assert difference(model, new) < 1e-6
    by_hand(plain, trainer.windows, **rho, **settings)
    assert difference(model, plain) > 1e-5


def test_evaluation_is_left_alone(tmp_path):
    model = bert()
    penalties = [saf(), MESA(model)]
    for penalty in penalties:
        trainer = make(model, tmp_path, penalty=penalty, eval_dataset=Rows(n=9, seed=5))
        trainer.train()
        before = copy.deepcopy(penalty.state_dict())
        found = trainer.evaluate()["eval_loss"]
        assert trainer.predict(Rows(n=3)).metrics["test_loss"] > 0
        plain = make(model, tmp_path, kind=Trainer, eval_dataset=Rows(n=9, seed=5)).evaluate()["eval_loss"]
        assert found == plain
        for name, value in penalty.state_dict().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name]))


def by_mean(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    "own", [{"compute_loss_func": by_mean}, {"label_smoothing_factor": 0.1}], ids=["own", "smooth"]
)
@pytest.mark.parametrize("kind", ["sam", "mesa", "saf"])
def test_another_loss_of_the_trainers(own, kind, tmp_path):
    def loss(outputs, batch):
        labels, smoothing = batch.inputs["labels"], own.get("label_smoothing_factor", 0.0)
        value = F.cross_entropy(outputs.logits, labels, label_smoothing=smoothing, reduction="sum")
        return value / batch.items

    model = bert()
    new = copied(model)
    used = {"sam": {"sharpness": SAM}, "mesa": {"penalty": MESA}, "saf": {"penalty": saf()}}[kind]
    trainer = make(model, tmp_path, gradient_accumulation_steps=4, **own, **used)
    trainer.train()
    windows = trainer.windows
    hand = {"sam": dict, "mesa": lambda: mesa_by_hand(new, windows)}
    hand["saf"] = lambda: {"penalty": saf_by_hand(windows)}
    by_hand(new, windows, loss=loss, rho=0.05 if kind == "sam" else None, **hand[kind]())
    assert difference(model, new) < 1e-6


def test_a_compute_loss_of_ones_own_in_the_class_with_the_mixin(tmp_path):
    class Mine(Noting):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert set(inputs) == {"input_ids", "attention_mask", "labels"}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    model, same = bert(), bert()
    make(model, tmp_path, kind=Mine, penalty=saf()).train()
    make(same, tmp_path, penalty=saf()).train()
    assert difference(model, same) == 0


class Tuples(transformers.BertForSequenceClassification):
    """A model that returns tuples."""

    def forward(self, **inputs):
        return super().forward(**{**inputs, "return_dict": False})


@pytest.mark.parametrize("kind", ["saf", "mesa"])
def test_a_model_that_returns_tuples(kind, tmp_path):
    model, same = bert(Tuples), bert()
    first = {"saf": saf(), "mesa": partial(MESA, output=lambda out: out[0])}[kind]
    options = {"remove_unused_columns": False, "gradient_accumulation_steps": 2}
    make(model, tmp_path, penalty=first, **options).train()
    make(same, tmp_path, penalty=saf() if kind == "saf" else MESA, **options).train()
    assert difference(model, same) == 0


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=30, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).train()


def test_an_encoder_and_decoder_in_the_seq2seq_trainer(tmp_path):
    class Mine(Noting, Seq2SeqTrainer):
        pass

    model = t5()
    new = copied(model)
    trainer = make(model, tmp_path, Rows("causal"), kind=Mine, penalty=partial(MESA, class_dim=-1), sharpness=SAM)
    trainer.train()
    by_hand(new, trainer.windows, **mesa_by_hand(new, trainer.windows, kind="encoder and decoder"))
    assert difference(model, new) < 1e-6


# Resuming.

RESUMED = {
    "SAM": {"sharpness": SAM},
    "LookSAM": {"sharpness": partial(flatmin.LookSAM, k=3)},
    "GSAM": {"sharpness": partial(flatmin.GSAM, alpha=0.5)},
    "FriendlySAM": {"sharpness": partial(flatmin.FriendlySAM, lam=0.6)},
    "S2SAM": {"sharpness": flatmin.S2SAM},
    "Adaptive": {"sharpness": partial(flatmin.SAM, when=Adaptive(steps=10))},
    "SAF": {"penalty": saf},
    "MESA": {"penalty": lambda: partial(MESA, fraction=0.5)},
    "SAM and MESA": {"sharpness": SAM, "penalty": lambda: partial(MESA, interval=2)},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_continues_exactly(name, tmp_path):
    """Between two epochs, and within one; the second after a checkpoint of the first resumed run."""

    def run(folder, resume=None):
        own = {each: value() if each == "penalty" else value for each, value in RESUMED[name].items()}
        trainer = make(
            bert(dropout=0.2),
            folder,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=2 if resume is None else 100,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            **own,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = run(tmp_path / "whole")
    for step in (4, 6):  # an epoch has three steps
        assert difference(whole, run(tmp_path / "again", str(tmp_path / "whole" / f"checkpoint-{step}"))) == 0

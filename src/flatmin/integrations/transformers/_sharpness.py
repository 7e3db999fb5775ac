"""The mixin that makes the passes of SAM and its like inside the Trainer's loop, and adds SAF or MESA to its loss."""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..._rng import CPU, Everywhere
from ...errors import FlatminWarning, InvalidArgumentError
from ...indices import IndexedDataset, indexed, split
from ...indices._collate import Collate
from ...indices._dataset import find
from ...losses import MESA, SAF
from ...losses._late import warn_if_late
from ...optim import SharpnessAware
from ...optim._first_pass import Beginning
from ...optim._surroundings import Buffers
from ._checks import (
    check_network,
    check_order,
    check_penalty,
    check_sharpness,
    check_together,
    check_trainer,
    inside,
    kind_of,
    made_of,
)
from ._penalty import follow, penalty_of, share_of

KEY = "flatmin_index"  # where the index is in a batch
FILE = "flatmin.pt"  # in a checkpoint
_OF_TRL = ("_metrics", "_total_train_tokens")  # what its trainers count in compute_loss
Micro = tuple[Any, Any, Everywhere | None]  # what a micro-batch is called with, and the generators before it


class Sharpness:
    """Trains with SAM or its like, SAF or MESA in a Trainer of transformers, and changes nothing else of it.

    A mixin for ``Trainer``, ``Seq2SeqTrainer`` and trl's: it comes first. With ``sharpness`` the Trainer's own
    optimizer is wrapped, and both passes of a step are made over all of its micro-batches before the Trainer clips,
    unscales and steps: what it does to a gradient happens once, to the one to step with. With ``penalty`` that loss is
    added in training, weighted among micro-batches and ranks as the Trainer weights its own; in evaluation nothing is
    added or recorded. SAF's indices ride with the samples, past collate functions and ``remove_unused_columns``. A
    resumed run continues exactly. What is logged is the loss of the first pass, with the penalty.

    MESA leaves out what has the label -100; give it ``class_dim=-1`` for tokens, as in token classification and
    language models. For one device and DistributedDataParallel.

    Args:
        *args: The Trainer's.
        sharpness: A function of the plain optimizer, such as ``partial(flatmin.SAM, rho=0.05)``. ``model`` and
            ``scaler`` are the Trainer's. None (default): none, or ``optimizers`` has flatmin's optimizer itself.
        penalty: ``flatmin.SAF(len(train_dataset), num_labels)``, made after ``TrainingArguments``; or
            ``flatmin.MESA(model)``, or a function that makes it of the Trainer's model, as ``model_init`` needs it:
            ``partial(flatmin.MESA, decay=0.999)``. SAF does not go with optimizers of two passes.
        **kwargs: The Trainer's.

    Attributes:
        penalty: The loss; None before it is made.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used, or the Trainer does something with which the
            method would not be right.

    Example:
        >>> from functools import partial
        >>> import flatmin
        >>> from flatmin.integrations.transformers import Sharpness
        >>> from transformers import Trainer
        >>> class MyTrainer(Sharpness, Trainer):
        ...     pass
        >>> make_trainer = partial(MyTrainer, sharpness=partial(flatmin.SAM, rho=0.05))
    """

    # Of the Trainer's.
    accelerator: Any
    add_callback: Any
    args: Any
    data_collator: Any
    model: Any
    optimizer: Any
    train_dataset: Any
    _get_collator_with_removed_columns: Any
    _remove_unused_columns: Any

    _window: list[Micro]  # the micro-batches of the step
    _begun: Beginning | None  # how it began
    _index: Tensor | None  # of the samples of the last one
    _training: bool  # whether a pass is being made
    _added: bool  # whether the penalty was added since the last step

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, Sharpness)

    def __init__(
        self,
        *args: Any,
        sharpness: Callable[..., SharpnessAware] | None = None,
        penalty: SAF | MESA | Callable[[Any], MESA] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, Trainer):
            raise InvalidArgumentError(f"{kind_of(self)} is a mixin: class MyTrainer(Sharpness, Trainer)")
        check_sharpness(sharpness)
        check_penalty(penalty)
        made = isinstance(penalty, (SAF, MESA))
        self.sharpness = sharpness
        self.penalty: Any = penalty if made else None
        self._make_penalty: Any = None if made else penalty
        self._settle()
        super().__init__(*args, **kwargs)
        check_trainer(self)
        self.add_callback(_Events(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Wraps the optimizer, and attaches MESA to it, before a checkpoint is loaded."""
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.sharpness is not None and not isinstance(inside(self.optimizer), SharpnessAware):
            keywords: dict[str, Any] = {}
            if "model" in inspect.signature(self.sharpness).parameters:
                keywords["model"] = self.model
            if isinstance(self.sharpness, partial):
                keywords |= self.sharpness.keywords
                if "when" in keywords:
                    keywords["when"] = copy.deepcopy(keywords["when"])  # it may have a state; each run has its own
            self.optimizer = made_of(self.sharpness, self.optimizer, **keywords)
        optimizer = inside(self.optimizer)
        if isinstance(optimizer, SharpnessAware) and self.accelerator.scaler is not None:
            optimizer.scaler = self.accelerator.scaler
        self._prepare_penalty(optimizer)
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """The Trainer's, whose batches carry the samples' indices where SAF needs them."""
        if not isinstance(self.penalty, SAF) or self.train_dataset is None:
            return super().get_train_dataloader()  # type: ignore[misc]
        before = self.train_dataset, self.data_collator
        data = _plain(self.train_dataset)
        if type(data).__module__.partition(".")[0] == "datasets":
            data = self._remove_unused_columns(data, description="training")
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        try:
            self.train_dataset, self.data_collator = IndexedDataset(data, None), Collate(collate, KEY)
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.train_dataset, self.data_collator = before

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        data = data.dataset if isinstance(data, IndexedDataset) else data  # whose lengths and columns are looked at
        return super()._get_train_sampler(data)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Makes the Trainer's; with the last micro-batch of a step also the second pass over all of them."""
        if isinstance(self.penalty, SAF):
            self._index, inputs = split(inputs, KEY)
        optimizer = inside(self.optimizer)
        if not isinstance(optimizer, SharpnessAware):
            if self.sharpness is not None:
                raise InvalidArgumentError(
                    f"sharpness has not reached the optimizer, {kind_of(optimizer)}: let {kind_of(self)}."
                    "create_optimizer call super().create_optimizer() last"
                )
            return self._pass(model, inputs, num_items_in_batch)
        try:
            return self._make_passes(optimizer, model, inputs, num_items_in_batch)
        except BaseException:
            optimizer.abandon()
            self._settle()
            raise

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the Trainer's, and in training adds the penalty."""
        compute: Any = super().compute_loss  # type: ignore[misc]
        if self.penalty is None or not self._training:
            return compute(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        given = dict(inputs)  # the Trainer may take out the labels
        loss, outputs = compute(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        share = share_of(self, given, num_items_in_batch)
        loss = loss + share * penalty_of(self, given, outputs, self._index)
        self._added = True
        return (loss, outputs) if return_outputs else loss

    def _make_passes(self, optimizer: SharpnessAware, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """The passes of a micro-batch: the first, or with the last of a step all that are due."""
        if optimizer.max_passes == 1:
            optimizer.perturb()
            loss = self._pass(model, inputs, num_items)
            optimizer.restore()
            return loss
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        random = Everywhere.on({CPU, *(each.device for each in parameters)}) if optimizer._replay else None
        if self._begun is None:
            buffers = Buffers(optimizer._surroundings.modules(parameters))
            self._begun = Beginning(buffers, [] if random is None else [random], seen=True, inside=True)
        self._window.append((inputs, num_items, random))
        if not self.accelerator.sync_gradients:
            return self._pass(model, inputs, num_items)
        begun, window = self._begun, self._window
        self._begun, self._window = None, []
        with closing(optimizer._passes_beside(begun)) as passes:
            next(passes)
            loss = self._pass(model, inputs, num_items)
            for _ in passes:
                self._second_pass(model, window)
        return loss

    def _second_pass(self, model: nn.Module, window: list[Micro]) -> None:
        """The second pass, over all micro-batches; with several ranks gradients are averaged in the last."""
        with self._quiet():
            for number, (inputs, num_items, random) in enumerate(window, start=1):
                if random is not None:
                    random.set()
                with self.accelerator.no_sync(model) if number < len(window) else nullcontext():
                    self._pass(model, inputs, num_items)

    def _pass(self, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        self._training = True
        try:
            loss: Tensor = super().training_step(model, inputs, num_items)  # type: ignore[misc]
            return loss
        finally:
            self._training = False

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Inside, ``log`` does nothing; on leaving, what trl's trainers count is as it was."""
        counted = {name: copy.deepcopy(vars(self)[name]) for name in _OF_TRL if name in vars(self)}
        known = {name: vars(self)[name] for name in ("log",) if name in vars(self)}
        vars(self)["log"] = lambda *_, **__: None
        try:
            yield
        finally:
            vars(self).pop("log")
            vars(self).update(known)
            vars(self).update(counted)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if isinstance(self.penalty, SAF):
            state = self.penalty.state_dict()  # on all ranks, which may have a share each
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, FILE)
        there, wanted = os.path.isfile(path), isinstance(self.penalty, SAF)
        if there and wanted:
            self.penalty.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif there or wanted:
            says = f"has SAF's history in {FILE}, and" if there else f"has no {FILE}, and SAF begins anew:"
            rest = "there is no SAF now: it was left out" if there else "it was saved without SAF"
            warnings.warn(f"the checkpoint {says} {rest}", FlatminWarning, stacklevel=2)
            if wanted:
                self.penalty._settle_loads()  # or SAF would say the same

    def _prepare_penalty(self, optimizer: Any) -> None:
        """Makes the penalty, if it is to be made, and takes care of it from here on."""
        made = self.penalty
        if self._make_penalty is not None and (made is None or made._networks[1] is not self.model):
            made = self._make_penalty(self.model)
            if not isinstance(made, MESA):
                raise InvalidArgumentError(
                    f"penalty must make flatmin.MESA of the Trainer's model, got {kind_of(made)}; give SAF as it is, "
                    "penalty=flatmin.SAF(len(train_dataset), num_labels)"
                )
            self.penalty = made
        if made is None:
            return
        check_together(made, optimizer)
        made.to(self.args.device)
        made.train()
        if isinstance(made, MESA):
            check_network(made, self.model)
            if made.decay is not None:  # whoever owns an average that was given updates it
                follow(made, optimizer, replicated=self.args.world_size > 1)

    def _settle(self) -> None:
        """Begins anew, whatever a run that was interrupted has left."""
        self._window, self._begun = [], None
        self._index = None
        self._training = False
        self._added = False


class _Events(TrainerCallback):
    """Tells the penalty of epochs, and sees that it is added."""

    def __init__(self, trainer: Sharpness) -> None:
        self._trainer = trainer
        self._epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._settle()
        self._epoch = None
        if self._trainer.penalty is not None:
            warn_if_late(self._trainer.penalty, state.num_train_epochs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        if self._trainer.penalty is not None:
            self._trainer.penalty.set_epoch(self._epoch)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._trainer.penalty is not None and not self._trainer._added:
            name = kind_of(self._trainer)
            raise InvalidArgumentError(
                f"penalty was not added: a compute_loss or training_step of {name} does not call super(); put it into "
                f"a class behind the mixin, class MyBase(Trainer) and class {name}(Sharpness, MyBase)"
            )
        self._trainer._added = False


def _plain(data: Any) -> Any:
    """The data set without indices, of which it is given new ones.

    Raises:
        InvalidArgumentError: If it can have none, or has those of another one.
    """
    data = data.dataset if isinstance(data, IndexedDataset) else data
    if find(data) is not None:
        raise InvalidArgumentError(
            "train_dataset is a part of flatmin.indexed(dataset): give the Trainer the data set as it is without "
            "indices, and SAF its length; the mixin adds them"
        )
    return indexed(data).dataset

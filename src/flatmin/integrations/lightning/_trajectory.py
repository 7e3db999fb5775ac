"""The callback that carries SAF or MESA through Lightning's loop."""

import inspect
import operator
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from torch.utils.hooks import RemovableHandle

from ..._checks import shown
from ..._distributed import broadcast_buffers
from ...errors import FlatminWarning, InvalidArgumentError
from ...indices import Indexed, split
from ...losses import MESA, SAF
from ...losses._late import warn_if_late
from ...optim import SharpnessAware as Optimizer
from ._checks import check_package_of, check_without_saf, kind_of


class TrajectoryLoss(L.Callback):
    """Gives a LightningModule the loss of SAF as ``self.saf(logits)``, or of MESA as ``self.mesa(logits, x)``.

    ``training_step`` adds it to its own loss; in validation, testing and prediction it is 0. The callback tells the
    loss which epoch begins, moves it to the device, and saves and loads it with the Trainer's checkpoints: it is no
    part of the module. The module sees the batches as they are without an index.

    SAF needs the index of each sample: let the training data set be ``flatmin.indexed(dataset)``, or the loader
    ``flatmin.with_indices(loader)``. MESA needs none, and its average is updated after each step of the optimizer. SAF
    does not go with optimizers of two passes.

    Args:
        loss: `flatmin.SAF` or `flatmin.MESA`: an object, or the class with its keywords, of which it is made when a
            fit begins. With several processes give the class where ranks are to have their own share, or a network is
            made in ``configure_model``.
        network: For the class ``MESA``: the name of the network in the module, such as ``"net"`` or
            ``"encoder.head"``, called with what ``self.mesa`` is called with behind the logits. None (default): the
            module itself.
        name: What it is called in the module. None (default): ``"saf"`` or ``"mesa"``.
        key: For SAF, where batches are mappings: where the index is in them, as given to ``flatmin.indexed``.
        **keywords: The arguments of the class.

    Attributes:
        loss: The loss; None before it is made.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used, or a batch of the training carries no index.

    Example:
        >>> import lightning as L, flatmin
        >>> from flatmin.integrations.lightning import TrajectoryLoss
        >>> mesa = TrajectoryLoss(flatmin.MESA, network="net", decay=0.99)
        >>> saf = TrajectoryLoss(flatmin.SAF(num_samples=50_000, num_classes=10))
        >>> trainer = L.Trainer(callbacks=[saf], accelerator="cpu", logger=False)
    """

    loss: SAF | MESA | None
    _trainer: L.Trainer | None
    _module: L.LightningModule | None
    _transfer: Callable[..., Any] | None  # the module's, in whose place the callback's is
    _handle: RemovableHandle | None
    _index: Tensor | None  # of the batch that is trained
    _epoch: int | None  # that the loss was told of
    _called: bool  # in this fit
    _warned: bool

    def __init__(
        self,
        loss: SAF | MESA | type[SAF] | type[MESA],
        *,
        network: str | None = None,
        name: str | None = None,
        key: str = "index",
        **keywords: Any,
    ) -> None:
        kind = loss if isinstance(loss, type) else type(loss)
        if not issubclass(kind, (SAF, MESA)):
            raise InvalidArgumentError(
                f"loss must be flatmin.SAF or flatmin.MESA, or an object of them, got {shown(loss)}; optimizers are "
                "given to the callback SharpnessAware, and logit_squeezing and OnlineLabelSmoothing need no "
                "callback: in training_step, loss + flatmin.logit_squeezing(logits)"
            )
        if not isinstance(loss, type) and (keywords or network is not None):
            raise InvalidArgumentError(
                f"loss is made already, so that {', '.join(keywords) or 'network'} has no use: give it to the loss, or "
                f"give the class, TrajectoryLoss(flatmin.{kind.__name__}, ...)"
            )
        if network is not None and not issubclass(kind, MESA):
            raise InvalidArgumentError("network is for flatmin.MESA; SAF needs none")
        if isinstance(loss, type):
            try:
                inspect.signature(kind).bind(*[None] * issubclass(kind, MESA), **keywords)
            except TypeError as error:
                raise InvalidArgumentError(
                    f"TrajectoryLoss gives its keywords to {kind.__name__}, which refuses them: {error}"
                ) from None
        self.loss = None if isinstance(loss, type) else loss
        self._given = self.loss
        self.network, self.key, self.keywords = network, key, keywords
        self.name = ("saf" if issubclass(kind, SAF) else "mesa") if name is None else name
        self._kind: type[SAF] | type[MESA] = kind
        self._pending: dict[str, Any] | None = None  # a checkpoint's, until the loss is made
        self._clear()

    @property
    def state_key(self) -> str:
        """Under which the loss is in a checkpoint: one for each name."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the module the loss."""
        check_package_of(self, trainer)
        self._trainer, self._module = trainer, pl_module
        if hasattr(pl_module, self.name):
            raise InvalidArgumentError(
                f"{kind_of(pl_module)} has an attribute {self.name!r} already: leave the loss to the callback, or call "
                "it something else, TrajectoryLoss(..., name='penalty')"
            )
        vars(pl_module)[self.name] = Penalty(self)
        self._transfer = pl_module._on_before_batch_transfer
        vars(pl_module)["_on_before_batch_transfer"] = self._without_index

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the loss, if it is not, and follows the optimizer."""
        self.loss = loss = self._make(pl_module) if self._given is None else self._given
        loss.to(pl_module.device)
        loss.train()
        if self._pending is not None:
            loss.load_state_dict(self._pending)
            self._pending = None
        if isinstance(loss, MESA):
            self._follow(loss, trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses optimizers of two passes for SAF, and says where the loss never begins."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Optimizer):
                check_without_saf(optimizer, [self.loss])
        assert self.loss is not None
        epochs = trainer.max_epochs
        if epochs is not None and epochs > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warn_if_late(self.loss, epochs)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Tells the loss of a new epoch."""
        assert self.loss is not None
        if self._epoch != trainer.current_epoch:
            self._epoch = trainer.current_epoch
            self.loss.set_epoch(self._epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warns once if the loss was left out."""
        if not (self._called or self._warned):
            self._warned = True
            warnings.warn(
                f"{kind_of(pl_module)}.training_step has not called self.{self.name} in an epoch, so that it trains "
                f"without it: loss = loss + self.{self.name}(logits{'' if self._by_index() else ', x'})",
                FlatminWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The loss, for the Trainer's checkpoint; called on all ranks."""
        return {} if self.loss is None else {"loss": self.loss.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads it, once it is made."""
        self._pending = state_dict.get("loss")

    def on_exception(self, *_: Any) -> None:
        """Leaves the module as it was."""
        self._remove()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Leaves the module as it was."""
        self._remove()

    def penalty(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the batch that is trained; 0 outside of training."""
        if self.loss is None or self._trainer is None or not self._trainer.training:
            return nothing(logits)
        self._called = True
        if self._by_index() and not (args or kwargs):
            args = (self._index,)
        penalty: Tensor = self.loss(logits, *args, **kwargs)
        return penalty

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(vars(self))
        return {**kept, "_trainer": None, "_module": None, "_transfer": None, "_handle": None}

    def _clear(self) -> None:
        self._trainer = self._module = self._transfer = self._handle = self._index = self._epoch = None
        self._called = self._warned = False

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._module is not None:
            vars(self._module).pop(self.name, None)
            vars(self._module).pop("_on_before_batch_transfer", None)
        self._clear()

    def _by_index(self) -> bool:
        return issubclass(self._kind, SAF)

    def _beside_saf(self) -> bool:
        """Whether another callback is to see the batch with its index."""
        assert self._trainer is not None
        callbacks: list[L.Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(each, TrajectoryLoss) and each._by_index() for each in callbacks)

    def _make(self, module: L.LightningModule) -> SAF | MESA:
        if issubclass(self._kind, SAF):
            return self._kind(**self.keywords)
        network: nn.Module = module
        if self.network is not None:
            try:
                network = operator.attrgetter(self.network)(module)
            except AttributeError as error:
                raise InvalidArgumentError(
                    f"{kind_of(module)} has no network {self.network!r} ({error}); network is its name there"
                ) from None
        elif type(module).forward is L.LightningModule.forward:
            raise InvalidArgumentError(
                f"{kind_of(module)} has no forward(), so that MESA cannot run its average: name the network in it, "
                "TrajectoryLoss(flatmin.MESA, network='net')"
            )
        return self._kind(network, **self.keywords)

    def _without_index(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """In place of the module's hook, which is called on the CPU: takes the index off the batch."""
        assert self._trainer is not None
        assert self._transfer is not None
        if self._trainer.training and self._by_index():
            self._check_not_iterable(batch)
            self._index, batch = split(batch, self.key)
        elif isinstance(batch, Indexed) and (self._by_index() or not self._beside_saf()):
            batch = batch.sample
        return self._transfer(batch, dataloader_idx)

    def _check_not_iterable(self, batch: Any) -> None:
        assert self._trainer is not None
        data = getattr(self._trainer.train_dataloader, "dataset", None)
        if isinstance(data, IterableDataset) and not isinstance(batch, Indexed) and self.key not in batch:
            raise InvalidArgumentError(
                f"the training data set, {kind_of(data)}, is iterable, and its batches carry no index for SAF: use "
                "TrajectoryLoss(flatmin.MESA, network=...), which needs none"
            )

    def _follow(self, mesa: MESA, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Updates the average after each step of the optimizer that trains its network."""
        network = mesa._networks[1]
        own = set(network.parameters())
        if not own <= set(module.parameters()):
            raise InvalidArgumentError(
                f"MESA was made of a network that is not in {kind_of(module)}, so that its average would stay where it "
                "is: give TrajectoryLoss the class and the network's name, TrajectoryLoss(flatmin.MESA, network='net')"
            )
        if mesa.decay is None:  # whoever owns the average updates it
            return
        having = [o for o in trainer.optimizers if any(p in own for group in o.param_groups for p in group["params"])]
        if len(having) != 1:
            raise InvalidArgumentError(
                f"MESA follows the one optimizer that trains its network, and there are {len(having)}: let one have "
                "the network, or call mesa.update() yourself after a step, on_train_batch_end"
            )
        replicated = isinstance(trainer.strategy.model, DistributedDataParallel)

        def update(optimizer: Any, *_: Any) -> None:
            if not getattr(optimizer, "_dropped", False):
                if replicated:
                    broadcast_buffers([network])  # as DDP is about to do, so that averages are the same too
                mesa.update()

        self._handle = having[0].register_step_post_hook(update)


class Penalty:
    """What the module has in the name of the loss. A copy of the module has one that is 0."""

    def __init__(self, callback: TrajectoryLoss | None = None) -> None:
        self._callback = callback

    def __call__(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the loss of the batch."""
        return nothing(logits) if self._callback is None else self._callback.penalty(logits, *args, **kwargs)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def nothing(logits: Tensor) -> Tensor:
    """0, as the losses return it in evaluation mode."""
    return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))

"""MESA, the memory-efficient form of SAF: the trajectory loss against an averaged copy of the network.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083, equations 9 and 12.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .._attached import Attachment, attach
from .._checks import Loaded, check_choice, check_counts, check_integer, check_module, check_number, check_one_of
from .._privacy import check_unmixed
from .._warn import depth_in_package
from ..averages import EMA
from ..averages._average import check_alike
from ..averages._base import warn_if_left_behind, warn_if_updated_twice
from ..averages._copy import refuse_lazy
from ..averages._statistics import CHOICES
from ..errors import FlatminWarning, InvalidArgumentError
from . import _compiled
from ._calls import Calls
from ._captured import Captured
from ._comparison import Comparison
from ._outputs import as_called, check_order, first_tensor, needs_gradient
from ._share import take
from ._side import SIDES
from ._target import IN_PART, Target
from ._undivided import watched

DECAY = 0.9998  # the authors'
MANY = 500  # calls that an epoch seldom has, unless whoever trains tells of epochs later


class MESA(Loaded):
    """Penalises how far the network's output has moved from that of the moving average of its weights.

    ``coefficient * T**2 / B * sum_i KL(softmax(average(x)_i / T) || softmax(logits_i / T))``

    with ``average_t = decay * average_(t-1) + (1 - decay) * model_t``, started at the model's weights. Add it to the
    criterion. The average runs in evaluation mode and without gradient, and not at all before ``start_epoch``. It needs
    no index, and works with mixup and on streams of data. For tokens, pixels, several labels a sample or features see
    ``class_dim``, ``link`` and ``distance``.

    It costs one forward pass, about a third of a step, and one copy of the network. To make it cheaper, run the average
    on less (``fraction``, ``interval``), in lower precision (``autocast``), or share a copy that exists anyway
    (``average``).

    With ``DistributedDataParallel`` pass the wrapped model: the average is then the same on all ranks, batch-norm
    statistics included. With FSDP2 make MESA first, then call ``fully_shard`` on the model and, in the same way, on
    ``mesa.average.module``; each rank averages its own shards.

    Args:
        model: The network that is trained, already on its device, wrapped (DistributedDataParallel, torch.compile) or
            not. It is copied unless ``average`` is given.
        coefficient: Weight of the loss, lambda in the paper; at least 0.
        temperature: ``T`` > 0.
        decay: Decay of the average, in (0, 1). None: 0.9998, the authors'. Make it with `ema_decay` from a horizon in
            epochs.
        start_epoch: First epoch, from 0, in which the loss is not 0.
        fraction: Share of each batch, in (0, 1], on which the average runs and over which the mean is taken. The loss
            is the same on average, and noisier. A generator of MESA's own draws the samples.
        interval: Compute the loss in every ``interval``-th call and return 0 in the others; its mean weight is then
            ``coefficient / interval``. Calls are counted, not steps; the second pass of flatmin's optimizers counts as
            the first. With micro-batches choose an interval that has no divisor in common with their number.
        autocast: Run the average under autocast to ``torch.bfloat16`` or ``torch.float16``. None: inherit the caller's
            autocast state.
        statistics: How the average's batch norm (and instance norm that tracks) normalises. ``"averaged"``: with its
            running statistics, averaged with the weights or, where ``average`` is given, as that has them. ``"batch"``:
            with those of the batch, or of the ``fraction`` it runs on; the running ones do not move. ``"fresh"``: with
            those of the last `refresh`, which you call before each epoch.
        average: An average of the model that you keep up to date: a `flatmin.EMA`, torch's ``AveragedModel``, timm's
            ``ModelEmaV3``, or any module of the model's structure. MESA runs it in evaluation mode, and does not copy,
            update, move or save it. None: MESA makes an `EMA` of its own.
        output: Takes the logits from what the model returns, ``output=lambda out: out[0]``. None: they are what it
            returns, or ``logits`` of a dictionary or an object.
        class_dim: Which dimension of the logits is the classes': 1 for maps (B, C, H, W), -1 for tokens (B, L, C); the
            mean is then over all pixels or tokens. None: 1, for logits of two dimensions alone.
        link: ``"softmax"``: one class of several. ``"sigmoid"``: logits that are independent, of any shape: several
            labels a sample, or yes and no. The loss is then `flatmin.losses.binary_trajectory_loss`.
        distance: In place of a divergence, for networks without classes. ``"features"``: squared error of normalised
            features, `flatmin.losses.feature_distance`, as C-RADIOv4 uses MESA. Or a function of the network's output
            and of the average's, of whatever structure, to a scalar. None: the divergence.
        capture: Record the average's pass as a CUDA graph, for each shape of inputs that comes often, and run it on a
            stream of its own; call `prepare` to run it beside the network's. Same values, less time. Where it cannot be
            recorded, it runs as ever, and a warning says why. The average's Python runs while it is recorded alone: set
            False if it changes what it does. None: True on CUDA, False elsewhere.

    Attributes:
        average: MESA's own `flatmin.EMA`, or the average that was given. ``mesa.average.module`` is the averaged
            network itself, ready to evaluate, save or deploy.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, ``model`` cannot be copied, or
            ``average`` is not of its structure.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mesa = flatmin.MESA(model, decay=0.9, start_epoch=0)
        >>> handle = mesa.attach(optimizer)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> for step in range(2):
        ...     optimizer.zero_grad()
        ...     logits = model(x)
        ...     penalty = mesa(logits, x)
        ...     (torch.nn.functional.cross_entropy(logits, y) + penalty).backward()
        ...     optimizer.step()
        >>> bool(penalty > 0)
        True
    """

    average: nn.Module
    _beside_network: ClassVar[bool] = True  # an average of a network on which it is stored has none

    def __init__(
        self,
        model: nn.Module,
        *,
        coefficient: float = 0.8,
        temperature: float = 5.0,
        decay: float | None = None,
        start_epoch: int = 5,
        fraction: float = 1.0,
        interval: int = 1,
        autocast: torch.dtype | None = None,
        statistics: str = "averaged",
        average: nn.Module | None = None,
        output: Callable[[Any], Any] | None = None,
        class_dim: int | None = None,
        link: Literal["softmax", "sigmoid"] = "softmax",
        distance: Literal["features"] | Callable[[Any, Any], Tensor] | None = None,
        capture: bool | None = None,
    ) -> None:
        super().__init__()
        self.coefficient = check_number("coefficient", coefficient, least=0)
        self.temperature = check_number("temperature", temperature, above=0)
        self.start_epoch = check_integer("start_epoch", start_epoch, least=0)
        self.fraction = check_number("fraction", fraction, above=0, most=1)
        self.interval = check_integer("interval", interval, least=1)
        self.autocast = check_one_of(
            "autocast", autocast, (None, torch.bfloat16, torch.float16), "torch.bfloat16, torch.float16 or None"
        )
        self.statistics = check_choice("statistics", statistics, CHOICES)
        self._comparison = Comparison(output=output, class_dim=class_dim, link=link, distance=distance)
        if average is None:
            kept = "fresh" if self.statistics == "fresh" else "averaged"
            self.average = _own_average(model, DECAY if decay is None else decay, kept)
            target = self.average.module
        else:
            if decay is not None:
                raise InvalidArgumentError(f"decay must be left out where average is given, got {decay!r}")
            if self.statistics == "fresh":
                raise InvalidArgumentError(
                    "statistics must not be 'fresh' where average is given: whoever owns the average makes its "
                    "statistics, flatmin.EMA with statistics='fresh' and refresh(batches) for one"
                )
            target = check_alike(average, check_module("model", model))
            self.__dict__["average"] = average  # past nn.Module: a submodule would be moved and saved with MESA
        self._networks = (target, model)  # in a tuple, so that they are no submodules
        self._epoch = 0
        self._calls = Calls()  # those in which the loss was not switched off
        self.capture = check_one_of("capture", capture, (None, True, False), "True, False or None")
        if capture and (device := self._target().device).type not in SIDES:
            raise InvalidArgumentError(
                f"capture=True needs a model on CUDA, got one on {device}: leave capture out, and the average is "
                "recorded where it can be"
            )
        self._captured = Captured()
        self._handle = _compiled.register(self)
        self._first_epoch: int | None = None
        self._checked = False
        self._told = False  # whether it knows of epochs
        self._untold = 0  # calls for which it did not

    def set_epoch(self, epoch: int) -> None:
        """Tells MESA which epoch begins, from 0. Call it before each epoch.

        Raises:
            InvalidArgumentError: If ``epoch`` is not an integer of at least 0.
        """
        self._epoch = check_integer("epoch", epoch, least=0)
        self._told = True

    def forward(self, logits: Any, *args: Any, where: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Computes the loss of a batch.

        Args:
            logits: The network's logits, floating, shape (B, C), or with more dimensions as ``class_dim`` says; or what
                the network returned, from which they are taken as from what the average returns.
            *args: What the network was called with; the average is called with the same. A batch that is a dictionary
                may be given as it is, and is passed as keyword arguments if the network takes these. With a
                ``fraction`` below 1, the drawn samples are taken of every tensor whose first dimension is B, in tuples,
                lists and dicts too.
            where: Bool, the shape of the logits without their classes: which of them count; the mean is over those.
                None: all, but for tokens or pixels whose entry in the keyword argument ``labels`` is -100. A causal
                language model's labels are those of the token before: there say it yourself.
            **kwargs: The keyword arguments that the network was called with, used in the same way. ``labels`` may be
                among them; a loss that the average computes of them is not used.

        Returns:
            A scalar, float64 if ``logits`` are float64 and float32 otherwise; 0 after ``.eval()`` and for logits that
            need no gradient, as in an evaluation.

        Raises:
            InvalidArgumentError: If the logits are not floating or of another shape than was said, come behind what the
                network was called with, or the average returns another shape.
        """
        compare = self._comparison
        if self.training:
            check_order(logits, args, kwargs)
        logits = logits if isinstance(logits, Tensor) else compare.outputs(logits)
        compare.check(logits)
        trained = self.training and self.coefficient != 0 and needs_gradient(logits)
        if trained:  # from the first epoch on, where the gradient is the criterion's alone
            compare.watch(logits)
        if self._off() or not trained:
            self._count_untold(logits)
            return self._nothing(logits)
        compiling = torch.compiler.is_compiling()
        call = 0 if compiling else self._calls.next()  # each number would be compiled anew
        if call % self.interval:
            return self._nothing(logits)
        if compiling and self.interval > 1 and not _compiled.is_due(first_tensor(logits).detach(), self._handle):
            return self._nothing(logits)
        self._check_updates()
        args, kwargs = as_called(self._networks[0], args, kwargs)
        where = compare.counted(where, kwargs, logits)
        if where is not None or self.fraction < 1:
            part = "where, or labels" if where is not None else "a fraction of the batch"
            check_unmixed(first_tensor(logits), f"MESA's mean over {part}", "leave it out")
        first, target = first_tensor(logits), self._target()
        number = self._calls.seed + call, len(first)
        started = self._captured.start(target, number, (args, kwargs)) if self._records() else None
        if compiling:
            size = target.size(len(first))
            share = None if size == len(first) else _compiled.draw(first.detach(), size, self._handle)
        else:
            share = target.share(number)
        if share is not None:
            logits, where = take((logits, where), share, len(first))
        if started is not None:
            theirs = started.result()
        else:
            if share is not None:
                with torch.no_grad():
                    args, kwargs = take((args, kwargs), share, len(first))
            theirs = target.run(args, kwargs, first, part=share is not None)
        if share is not None and isinstance(theirs, Tensor) and theirs.shape[:1] == first.shape[:1]:
            raise InvalidArgumentError(
                f"the averaged model returned the whole batch, and not a fraction of it: {IN_PART.format(len(first))}"
            )
        return watched(self.coefficient * compare.loss(logits, theirs, where, self.temperature), "MESA")

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Starts the average's pass on a GPU, so that it runs beside the network's; nothing has to be done with it.

        Call it before the network, with what MESA is given after the logits, and under the same ``torch.autocast``.
        Without it MESA is as right, and slower. Nothing is done where no pass is due or none can be recorded, such as
        on the CPU.

        Example:
            >>> import torch, flatmin
            >>> model = torch.nn.Linear(4, 3)
            >>> mesa, x = flatmin.MESA(model, start_epoch=0), torch.randn(8, 4)
            >>> mesa.prepare(x)
            >>> penalty = mesa(model(x), x)
        """
        if not self._records() or self._off() or not torch.is_grad_enabled():
            return
        if (call := self._calls.coming()) % self.interval:
            return
        args, kwargs = as_called(self._networks[0], args, kwargs)
        sizes = [len(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.ndim]
        if sizes:
            self._captured.prepare(self._target(), (self._calls.seed + call, sizes[0]), (args, kwargs))

    @property
    def decay(self) -> float | None:
        """Decay of MESA's own average; None if the average was given."""
        return None if self._own is None else self._own.decay

    def update(self) -> None:
        """Moves MESA's own average towards the model. Call it after each ``optimizer.step()``, or `attach` once.

        Raises:
            InvalidArgumentError: If the average was given, or the model was sharded and its average was not.
        """
        average = self._updated_here()
        average._loads.check(average.model, average.module, self)
        warn_if_updated_twice(self)
        average.update()

    def refresh(self, batches: Iterable[Any]) -> None:
        """Makes the statistics of MESA's own average anew, see `flatmin.averages.WeightAverage.refresh`.

        Raises:
            InvalidArgumentError: If the average was given, or there is no batch.
        """
        self._updated_here().refresh(batches)

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Makes ``optimizer``, a plain one or flatmin's, call `update` after each step, and save and load MESA.

        Attach before a checkpoint is loaded: the average then goes on from there.

        Returns:
            A handle; its ``remove()`` detaches.

        Raises:
            InvalidArgumentError: If the average was given.
        """
        return attach(self, optimizer, network=self._updated_here().model, after_step=type(self).update)

    def train(self, mode: bool = True) -> "MESA":
        """Sets the mode of the loss; its own average stays in evaluation mode, and one that was given as it is."""
        super().train(mode)
        if self._own is not None:
            self.average.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Puts epoch, number of calls and seed into ``state_dict``, as a tensor, which any format can store."""
        return torch.tensor([self._epoch, self._calls.count, self._calls.seed])

    def set_extra_state(self, state: Tensor) -> None:
        """Reads them from a ``state_dict``; one with the epoch alone continues with its own calls and seed."""
        self._epoch, *rest = check_counts("state", state, (1, 3))
        if rest:
            self._calls.count, self._calls.seed = rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = _compiled.register(self)  # a copy draws for itself

    def extra_repr(self) -> str:
        """Shows the hyperparameters when printed."""
        names = ("coefficient", "temperature", "decay", "start_epoch", "fraction", "interval", "autocast", "statistics")
        shown = {name: getattr(self, name) for name in names}
        return ", ".join(f"{name}={value}" for name, value in {**shown, **self._comparison.chosen()}.items())

    def _nothing(self, logits: Any) -> Tensor:
        tensor = first_tensor(logits)
        return tensor.new_zeros((), dtype=torch.promote_types(tensor.dtype, torch.float32))

    @property
    def _own(self) -> EMA | None:
        own = self._modules.get("average")  # one that was given is no submodule
        return own if isinstance(own, EMA) else None

    def _updated_here(self) -> EMA:
        """The average, if it is MESA's own."""
        if self._own is None:
            raise InvalidArgumentError(
                "the average was given as average=..., so whoever owns it updates it: leave out mesa.update, "
                "mesa.attach and mesa.refresh, or let MESA make its own average"
            )
        return self._own

    def _off(self) -> bool:
        return not self.training or self._epoch < self.start_epoch or self.coefficient == 0

    def _records(self) -> bool:
        """Whether the average may run as a graph; a compiled step runs it in its own."""
        return self.capture is not False and not torch.compiler.is_compiling() and self._target().device.type in SIDES

    def _is_due(self) -> bool:
        """Whether this call, of a compiled step, has its turn. The graph breaks there: what follows runs at times."""
        return self._calls.next() % self.interval == 0

    def _draw(self, batch: int) -> Tensor:
        """The samples of a call of a compiled step, which is counted here unless it has been."""
        if self.interval == 1:
            self._calls.next()
        share = self._target().share((self._calls.seed + self._calls.count - 1, batch))
        assert share is not None  # only asked for what is less than all
        return share

    def _target(self) -> Target:
        return Target(
            average=self.average,
            networks=self._networks,
            owned=self._own is not None,
            statistics=self.statistics,
            fraction=self.fraction,
            autocast=self.autocast,
            outputs=self._comparison.outputs,
        )

    def _count_untold(self, logits: Any) -> None:
        """Warns once where ``start_epoch`` is waited for, and set_epoch was forgotten."""
        if self._told or not self.training or torch.compiler.is_compiling() or not needs_gradient(logits):
            return
        self._untold += self._epoch < self.start_epoch
        if self._untold == MANY:
            self._told = True
            warnings.warn(
                f"MESA has returned 0 in {MANY} calls, and set_epoch was never called, without which it waits for "
                f"start_epoch={self.start_epoch} for ever: call mesa.set_epoch(epoch) before each epoch, or make it "
                "with start_epoch=0 (warned once)",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )

    def _check_updates(self) -> None:
        """Warns once when an epoch, or many calls, went without an update: the target is the untrained network."""
        if self._own is not None:
            warn_if_left_behind(self._own, self)
        if self._first_epoch is None:
            self._first_epoch = self._epoch
        untold = self._own is not None and not self._told and not torch.compiler.is_compiling()
        many = untold and self._calls.count > MANY  # in a compiled step each count would be compiled anew
        later = self._epoch > self._first_epoch or many
        if self._checked or not later or not isinstance(self.average, EMA):
            return
        self._checked = True
        counter = self.average.n_averaged
        if counter._version == torch.zeros(())._version and int(counter) == 1:  # to read it waits for the device
            owner = "mesa" if self._own is not None else "average"
            warnings.warn(
                "MESA's average has never been updated, so it is still the network it was made with: call "
                f"{owner}.update() after optimizer.step(), or {owner}.attach(optimizer) once",
                FlatminWarning,
                stacklevel=5,  # _check_updates, forward, nn.Module.__call__ (two frames), the caller
            )


def _own_average(model: nn.Module, decay: float, statistics: str) -> EMA:
    check_number("decay", decay, above=0, below=1)
    refuse_lazy(check_module("model", model))
    try:
        return EMA(model, decay=decay, statistics=statistics)
    except InvalidArgumentError as error:  # it cannot be copied
        raise InvalidArgumentError(f"{error}; or give MESA an average of your own, average=...") from error

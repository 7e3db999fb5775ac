"""SAF, sharpness-aware training for free: the trajectory loss against the network's own past outputs.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083, equation 8 and Algorithm 1.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._attached import Attachment, attach
from .._checks import Loaded, check_counts, check_integer, check_number
from .._passes import current_pass
from .._privacy import check_unmixed
from .._warn import depth_in_package
from ..errors import FlatminWarning, InvalidArgumentError
from ..history import Codec, History, make_history
from ..history._state import of_this_rank
from . import _compiled
from ._fused import Clock, fused_step
from ._link import LinkCheck
from ._masked import masked_filled
from ._trajectory import trajectory_loss
from ._undivided import watched
from ._watch import Watch


class SAF(Loaded):
    """Penalises how far the network's output on a sample has moved in the last ``lag`` epochs.

    ``coefficient * T**2 / B * sum_i KL(softmax(past_i / T) || softmax(logits_i / T))``

    The sum runs over the samples recorded exactly ``lag`` epochs earlier; the others contribute 0. Add it to the
    criterion. Every call in training mode records the detached logits, from the first epoch on. After ``.eval()`` it
    records nothing and returns 0.

    It costs no pass through the network, and no step waits for the accelerator. What it keeps, and in how many bytes
    (``saf.history.nbytes``), depends on ``history``; the rows are on the device that ``.to()`` names. Make SAF after
    ``torch.distributed`` is initialised and call it equally often on all ranks: each sample is then compared with what
    any rank recorded.

    Use it or an optimizer that calls its closure twice, such as SAM, but not both. The samples of a batch count one
    after another, those of several ranks in the order of the ranks; if a sample occurs twice in an epoch, the first
    occurrence contributes and the last is recorded. SAM's second pass would contribute nothing. Logits that are not
    finite are recorded as missing; a logit of -inf beside finite ones, of a class that the network masks out, has no
    part in the loss.

    Args:
        num_samples: Number of samples ``N`` in the data set; indices run from 0 to ``N - 1``.
        num_classes: Number of classes ``C``, at least 2.
        coefficient: Weight of the loss, lambda in the paper; at least 0.
        temperature: ``T`` > 0.
        lag: Compare each output with the one from ``lag`` epochs earlier; at least 1. None: 3, or a running mean.
        start_epoch: First epoch, from 0, in which the loss is not 0. The paper's "after 5 epochs" is 5.
        history: How the past is kept, see `flatmin.history`: "dense" (float32), "half", "int8", "int6", "int4",
            "lowrank" or "topk"; "mean" for the running mean of a sample's logits; "auto" by size; or a codec with
            arguments of your own, such as ``flatmin.history.LowRank(rank=64)``.
        momentum: Momentum of a running mean, in [0, 1), to keep instead of the logits of ``lag`` epochs. None: 0.9
            with "mean", otherwise no mean.
        path: A folder for a scratch file that holds the rows if they exceed memory, see `flatmin.history.History`.
        location: "device" or "host", see `flatmin.history.History`.
        sharing: "replicate", "shard" or "auto", see `flatmin.history.History`.
        grown: True: load the state of a SAF of fewer samples, too, for a data set to which samples were added at its
            end: those begin without a past. False: it is refused.

    Attributes:
        history: The `flatmin.history.History`.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument is out of its bounds, or two exclude each other.
        OutputError: If ``path`` cannot be written or has no room.

    Example:
        >>> import torch, flatmin
        >>> saf = flatmin.SAF(num_samples=100, num_classes=3, lag=1, start_epoch=1)
        >>> index = torch.tensor([7, 42])
        >>> logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]], requires_grad=True)
        >>> saf.set_epoch(0)
        >>> saf(logits, index).item()
        0.0
        >>> saf.set_epoch(1)
        >>> round(saf(2 * logits, index).item(), 4)
        0.1854
    """

    history: History
    _beside_network: ClassVar[bool] = True  # averages of a network on which it is stored have none

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        coefficient: float = 0.3,
        temperature: float = 5.0,
        lag: int | None = None,
        start_epoch: int = 5,
        history: str | Codec = "dense",
        momentum: float | None = None,
        path: str | Path | None = None,
        location: str = "device",
        sharing: str = "auto",
        grown: bool = False,
    ) -> None:
        super().__init__()
        self.num_samples = check_integer("num_samples", num_samples, least=1)
        self.num_classes = check_integer(
            "num_classes",
            num_classes,
            least=2,
            hint="; the softmax of a single logit is constant, so give a binary problem two logits",
        )
        self.coefficient = check_number("coefficient", coefficient, least=0)
        self.temperature = check_number("temperature", temperature, above=0)
        self.start_epoch = check_integer("start_epoch", start_epoch, least=0)
        # Past nn.Module: the history's buffers are no buffers of the network that SAF may be stored on, which DDP would
        # send before every forward pass, and overwrite with those of the first rank.
        self.__dict__["history"] = make_history(
            history,
            self.num_samples,
            self.num_classes,
            lag=None if lag is None else check_integer("lag", lag, least=1),
            momentum=momentum,
            temperature=self.temperature,
            path=path,
            location=location,
            sharing=sharing,
            grown=grown,
        )
        self._watch = Watch(self.num_samples, self.num_classes, self.history.lag)
        self._link_check = LinkCheck("SAF", "take flatmin.MESA(model, ")
        self._epoch = 0
        self._clock = Clock()
        self._handle = _compiled.register(self)
        self._seen = 0  # samples so far in this epoch, counted on the host
        self._warned = False
        self._warned_of_share = False
        self._warned_of_second = False
        self._has_past = False  # whether it has recorded, or was loaded
        self._begins_anew = False  # whether what is recorded next is of another training

    def set_epoch(self, epoch: int) -> None:
        """Tells SAF which epoch begins, from 0. Call it before each epoch, as ``DistributedSampler.set_epoch``.

        Raises:
            InvalidArgumentError: If ``epoch`` is not an integer of at least 0, or an earlier one than the last, but for
                0, with which another training begins.
        """
        epoch = check_integer("epoch", epoch, least=0)
        if 0 < epoch < self._epoch:
            raise InvalidArgumentError(
                f"epoch must not go backwards, got {epoch} after {self._epoch}: SAF has recorded over what it would "
                "compare with; load the state that SAF had in that epoch, or begin with epoch 0"
            )
        self._begins_anew = epoch == 0 and (self._begins_anew or self._epoch > 0)
        self._epoch = epoch
        self._clock.tell(epoch)
        self._seen = 0

    def forward(self, logits: Tensor, index: Tensor) -> Tensor:
        """Computes the loss of a batch and records its logits.

        Args:
            logits: The network's logits, floating, shape (B, C).
            index: The samples' indices in the data set, int64, shape (B,). Leave them on the CPU, where they come
                from: there they are checked, and copied without waiting. Checking values on an accelerator would stall
                the step; there the device itself catches an index out of range.

        Returns:
            A scalar, float64 if ``logits`` are float64 and float32 otherwise. After ``.eval()``, and for logits that
            need no gradient, as in an evaluation, it is 0 and nothing is recorded.

        Raises:
            InvalidArgumentError: If shapes, dtypes, devices or indices do not fit.
        """
        self._check(logits, index)
        if not torch.compiler.is_compiling():
            self._check_range(index)
        zero = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        if not self.training or not logits.requires_grad:  # an evaluation
            return zero
        if torch.compiler.is_compiling():
            return self._compiled_step(logits, index)
        self._link_check(logits, 1)
        if self.history.codec.mixes_samples:
            check_unmixed(logits, f"SAF with history {type(self.history.codec).__name__}", 'take history="int8"')
        self._count(len(index) * self.history.store.ranks.size)
        fused = fused_step(
            self.history,
            logits,
            index,
            self._epoch,
            self._clock,
            begin=max(self.start_epoch, self.history.lag),
            coefficient=self.coefficient,
            temperature=self.temperature,
        )
        if fused is None:
            compared = self._exchange(masked_filled(logits), index)
            loss, mask = (None, None) if compared is None else (self._loss(*compared), compared[2])
        else:
            loss, mask = fused
        self._watch(self._epoch, index, logits, mask)
        return zero if loss is None else watched(loss, "SAF")

    def _exchange(self, logits: Tensor, index: Tensor, *, decode: bool = True) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `History.exchange`; None also where nothing can contribute, which the host knows."""
        begun = self._epoch >= max(self.start_epoch, self.history.lag) and self.coefficient > 0
        return self.history._exchange(index, logits, self._epoch, compare=begun, decode=decode)

    def _loss(self, now: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        return self.coefficient * trajectory_loss(now, past, temperature=self.temperature, mask=mask)

    def _compiled_step(self, logits: Tensor, index: Tensor) -> Tensor:
        """As a step, for a compiler: `_remember` runs as it is, and all else is compiled."""
        logits = masked_filled(logits)
        past, mask = _compiled.remember(logits.detach(), index, self._handle)
        if not self.history.codec.merges:
            return self._loss(logits, past, mask)
        return self._loss(*self.history.codec.compare(logits, past, 0), mask)

    def _remember(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Reads and records, for a compiled step; the past logits, or rows of a codec that merges, and the mask."""
        self._check_range(index)
        self._count(len(index) * self.history.store.ranks.size)
        merges = self.history.codec.merges
        compared = self._exchange(logits, index, decode=not merges)
        self._watch(self._epoch, index, logits, None if compared is None else compared[2])
        past, mask = self._like_remembered(logits)
        if compared is None:
            return past.zero_(), mask.zero_()
        if not merges and compared[0] is not logits:
            raise InvalidArgumentError(
                f"{type(self.history.codec).__name__}.compare gives other outcomes than the logits: say merges = True "
                "in the class, or compile the step without SAF"
            )
        return past.copy_(compared[1]), mask.copy_(compared[2])

    def _like_remembered(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors of the dtypes and shapes that `_remember` returns."""
        if self.history.codec.merges:
            past = logits.new_empty(len(logits), self.history.row_bytes, dtype=torch.uint8)
        else:
            past = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        return past, logits.new_empty(len(logits), dtype=torch.bool)

    @property
    def lag(self) -> int:
        """Each output is compared with the one from so many epochs earlier; 1 with a running mean."""
        return self.history.lag

    def get_extra_state(self) -> Tensor:
        """Puts the epoch, and how many samples it had, into ``state_dict``, as a tensor, which any format can store."""
        return torch.tensor([self._epoch, self._seen])

    def set_extra_state(self, state: Tensor) -> None:
        """Reads them from a ``state_dict``."""
        self._epoch, self._seen = check_counts("state", state, (2,))
        self._has_past, self._begins_anew = True, False
        self._clock.tell(self._epoch)

    def _settle_loads(self) -> None:
        """As of averages: `flatmin._attached` has said that nothing was loaded."""
        self._has_past = True

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Saves and loads SAF with ``optimizer``, a plain one or flatmin's, in whatever checkpoint that is.

        Attach before a checkpoint is loaded. On several ranks a history with ``sharing="shard"`` is saved by each rank
        for itself, since a trainer may save on one rank alone.

        Returns:
            A handle; its ``remove()`` detaches.
        """
        return attach(self, optimizer, save=type(self)._state_of_this_rank)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = _compiled.register(self)  # a copy remembers for itself

    def _state_of_this_rank(self) -> dict[str, Any]:
        """The state, taken without talking to other ranks."""
        if self.history.store.part[1] > 1 and not self._warned_of_share:
            self._warned_of_share = True
            warnings.warn(
                "the optimizer's state_dict has this rank's share of SAF's history alone: save and load it on every "
                "rank, make SAF with sharing='replicate', or save saf.state_dict(), called on all ranks, in its place",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )
        with of_this_rank():
            return self.state_dict()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAF":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.history._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.history.state_dict(destination=destination, prefix=f"{prefix}history.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        inner = f"{prefix}history."
        self.history.check_state(state_dict, inner)  # before anything is loaded
        history = {key.removeprefix(inner): value for key, value in state_dict.items() if key.startswith(inner)}
        own = {key: value for key, value in state_dict.items() if not key.startswith(inner)}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        keys = self.history.load_state_dict(history, strict=False, assign=assign)
        missing_keys += [inner + key for key in keys.missing_keys]
        unexpected_keys += [inner + key for key in keys.unexpected_keys]

    def extra_repr(self) -> str:
        """Shows the hyperparameters when printed."""
        return (
            f"num_samples={self.num_samples}, num_classes={self.num_classes}, coefficient={self.coefficient}, "
            f"temperature={self.temperature}, start_epoch={self.start_epoch}"
        )

    def _check(self, logits: Tensor, index: Tensor) -> None:
        for name, value in (("logits", logits), ("index", index)):
            if not isinstance(value, Tensor):
                raise InvalidArgumentError(f"{name} must be a tensor, got {type(value).__name__}")
        if index.is_floating_point() and not logits.is_floating_point():
            raise InvalidArgumentError(
                f"logits must be floating and index int64, got {_describe(logits)} and {_describe(index)}: the logits "
                "come first, saf(logits, index)"
            )
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not logits.is_floating_point():
            raise InvalidArgumentError(
                f"logits must be floating and of shape (batch, {self.num_classes}), "
                f"got {_describe(logits)}; "
                + (
                    "SAF remembers one row a sample: for tokens or pixels take flatmin.MESA(model, class_dim=...)"
                    if logits.ndim > 2
                    else f"SAF was made for num_classes={self.num_classes}"
                )
            )
        if index.is_floating_point() and index.ndim == 2:
            raise InvalidArgumentError(
                f"index must hold sample indices, got {_describe(index)}, which looks like soft labels: with mixup or "
                "cutmix a sample's past output belongs to another mixture; use flatmin.MESA, whose target sees the "
                "same mixed input"
            )
        if index.dtype not in (torch.int64, torch.int32) or index.shape != logits.shape[:1]:
            raise InvalidArgumentError(
                f"index must be int64 and of shape ({len(logits)},), one sample index for each row of logits, "
                f"got {_describe(index)}; flatmin.with_indices(loader) yields it"
            )
        for elsewhere in self.history.devices - {logits.device}:
            raise InvalidArgumentError(
                f"logits are on {logits.device} and the history is on {elsewhere}; "
                f"move it once, after creating it: saf.to('{logits.device}')"
            )

    def _check_range(self, index: Tensor) -> None:
        if index.device.type == "cpu" and len(index) > 0:
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= self.num_samples:
                raise InvalidArgumentError(
                    f"index must lie in [0, {self.num_samples}), got values from {low} to {high}; "
                    f"SAF was made for num_samples={self.num_samples}, which must be len(dataset)"
                )

    def _count(self, batch: int) -> None:
        """Warns once if an epoch is much longer than the data set: set_epoch was forgotten; or of a second pass."""
        now = current_pass()
        if now is not None and now.second:
            if not self._warned_of_second:
                self._warned_of_second = True
                warnings.warn(
                    "SAF has no past in the second pass of an optimizer such as SAM, which it is to save: use SAF or "
                    "that optimizer, not both; MESA goes with both passes (warned once)",
                    FlatminWarning,
                    stacklevel=depth_in_package(),
                )
            return
        if not self._has_past and self._epoch >= max(self.start_epoch, self.lag):
            self._watch.begin(self._epoch)
            warnings.warn(
                f"SAF records its first samples in epoch {self._epoch}, and compares nothing for {self.lag} "
                f"{'epoch' if self.lag == 1 else 'epochs'}: if a run is resumed, load SAF's state too, by "
                "saf.attach(optimizer) before the optimizer's is loaded, or saf.load_state_dict(...) (warned once)",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )
        if self._begins_anew:
            self._begins_anew = False
            self.history._forget()
        self._has_past = True
        self._seen += batch
        if self._seen > 1.5 * self.num_samples and not self._warned:
            self._warned = True
            warnings.warn(
                f"SAF has seen {self._seen} samples since epoch {self._epoch} began, and the data set has "
                f"{self.num_samples}: call saf.set_epoch(epoch) before each epoch, or it compares nothing; if "
                "samples are meant to occur again within an epoch, only the first occurrence counts",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"

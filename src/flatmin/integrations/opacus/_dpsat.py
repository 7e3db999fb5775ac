"""DP-SAT: DP-SGD at weights moved along the last privatised gradient, at no privacy and no pass of its own.

*Differentially Private Sharpness-Aware Training*, Park et al., ICML 2023, arXiv 2306.05651.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..._checks import check_choice
from ..._warn import depth_in_package
from ...errors import FlatminWarning, InvalidArgumentError, NonFiniteGradientWarning, StateDictError
from ...optim._displaced import Displaced
from ...optim._first_move import faults_of_move
from ...optim._foreach import Scalar, add_, clones, length
from ...optim._memory import Memory
from ...optim._network_hooks import Attached
from ...optim._perturbation import (
    Rho,
    Scaling,
    check_rho,
    check_scaling,
    check_subset,
    moved,
    rho_of,
    unit,
)
from ...optim._surroundings import Surroundings
from ...optim._wrapper import OWN
from ._checks import check_module, check_optimizer


class DPSAT:
    """Takes Opacus' gradients ``rho`` up the slope of the last step: sharpness-aware, private, one pass a step.

    ::

        e = rho * d / (|d| + 1e-12)
        w = step of DP-SGD from w, with the gradient of each sample at w + e

    With ``direction="gradient"``, ``d`` is the last privatised gradient: clipped, summed, noised and scaled by Opacus.
    With ``"step"``, the momentum form, it is the last change of the weights, with the opposite sign. Both are released
    already, so that epsilon is DP-SGD's, to the digit. *Differentially Private Sharpness-Aware Training*, Park et al.,
    ICML 2023.

    It is attached to the objects that ``make_private`` has returned, and the training loop stays as it is: with
    ``BatchMemoryManager``, closures, schedulers of noise and learning rate, ``engine.save_checkpoint``. The first
    training forward (in training mode, with gradients) of a logical step moves the weights, and they stay moved
    through all its physical batches, until Opacus makes the step. Evaluations in between have the clean weights, and so
    has a ``state_dict``. The first step is a plain one of DP-SGD. A step is left out, and stays accounted, if its
    privatised gradient is not finite, since no weight would be finite after it.

    The direction is saved and loaded with the optimizer's state: attach before a checkpoint is loaded. Costs one copy
    of the weights during a step, and one tensor for each to remember.

    Args:
        module: What ``make_private`` returned for the network; with ``wrap_model=False`` the network will do.
        optimizer: What it returned for the optimizer, which is to be a plain one.
        rho: Length of the perturbation, an L2 norm over all perturbed parameters, > 0; default 0.01. Or a function of
            the plain optimizer to it (>= 0, called in each step), such as `RhoByLR`.
        direction: "gradient" (default) or "step".
        parameters: The tensors to perturb, some of the optimizer's. None (default): all.
        scaling: How the direction becomes a perturbation. None (default): divided by its L2 norm over all perturbed
            parameters. `Elementwise`: in proportion to each weight, as in ASAM.

    Attributes:
        rho: As given; it may be set.
        direction: As given.
        skipped_steps: How many steps were left out because the privatised gradient was not finite.

    Raises:
        InvalidArgumentError: (a ValueError) if something is not Opacus', or an argument cannot be used. Also in a step
            whose forward pass was not seen.

    Example:
        >>> import torch, warnings
        >>> from opacus import PrivacyEngine
        >>> from flatmin.integrations.opacus import DPSAT
        >>> model = torch.nn.Linear(4, 3)
        >>> data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
        >>> warnings.filterwarnings("ignore", "Secure RNG|Full backward hook")  # Opacus warns of both in each run
        >>> module, optimizer, loader = PrivacyEngine().make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=torch.utils.data.DataLoader(data, batch_size=8),
        ...     noise_multiplier=1.0,
        ...     max_grad_norm=1.0,
        ... )
        >>> dpsat = DPSAT(module=module, optimizer=optimizer, rho=0.01)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(module(x), y).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        *,
        module: Any,
        optimizer: Any,
        rho: Rho = 0.01,
        direction: Literal["gradient", "step"] = "gradient",
        parameters: Iterable[Tensor] | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self.rho = check_rho(rho)
        self.direction = check_choice("direction", direction, ("gradient", "step"))
        self.skipped_steps = 0
        self._base = base = check_optimizer(optimizer)
        network = check_module(module, base)
        if any(isinstance(getattr(hook, "__self__", None), DPSAT) for hook in base._optimizer_step_pre_hooks.values()):
            raise InvalidArgumentError("optimizer has a DPSAT already: call its remove() before another is attached")
        self._subset = check_subset(parameters, base)
        self._scaling = check_scaling(scaling)
        self._private: Any = optimizer
        self._memory = Memory()
        self._loaded = Memory()
        self._next: tuple[list[Tensor], list[Tensor]] | None = None  # what this step leaves to the next
        self._seen = self._stepped = False  # whether this step's forward was, and whether there was a step
        self._rho: float | None = None  # of this step
        self._norm: Scalar | None = None  # of its direction
        self._check: Callable[..., None] | None = self._check_move  # of the first move
        self.displaced = Displaced()
        self._attached: Attached | None = Attached(network, self)
        self._handles = [
            base.register_step_pre_hook(self._before),
            base.register_step_post_hook(self._after),
            base.register_state_dict_post_hook(self._save),
            base.register_load_state_dict_pre_hook(self._load),
            base.register_load_state_dict_post_hook(self._take_loaded),
        ]

    def remove(self) -> None:
        """Puts the weights back, and detaches: what is trained on is trained by DP-SGD."""
        self._put_back("DPSAT was removed")
        self._attached = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "DPSAT":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @torch.no_grad()
    def move(self) -> None:
        """Moves the weights, once a logical step; called before each training forward of the network."""
        self._seen = True
        if self.displaced.clean or self._attached is None:
            return
        if self._rho is None:
            self._rho = rho_of(self.rho, self._base)
        parameters, directions = self._memory.known("direction", self._candidates())
        if self._rho > 0 and parameters:
            if self._norm is None and self._scaling is unit:
                self._norm = length(directions)
            check, self._check = self._check, None
            move = moved(parameters, directions, self._scaling, rho=self._rho, eps=1e-12, norm=self._norm, check=check)
            self.displaced.move(parameters, move)
            self._attached.held = True

    def owned(self) -> set[Tensor]:
        """The parameters of all groups."""
        return set(self._parameters())

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        """Before the plain optimizer steps, with the privatised gradient, the same on all ranks."""
        self._check_scaler()
        seen = self._seen
        self._put_back()
        self._rho = self._norm = None
        self._seen, self._stepped, self._next = False, True, None
        if not seen:
            raise InvalidArgumentError(
                "DPSAT has seen no forward pass since the last step, so that the gradients are not those at the "
                "perturbed weights, and the step, which is accounted, was left out: module is to be what the loop "
                "calls, in training mode"
            )
        gradients = [gradient for parameter in self._parameters() if (gradient := parameter.grad) is not None]
        if gradients and not length(gradients) < math.inf:
            self._leave_out()
            return
        found = [parameter for parameter in self._candidates() if parameter.grad is not None]
        kept = [parameter.grad for parameter in found] if self.direction == "gradient" else found
        self._next = found, clones(kept)  # type: ignore[arg-type]  # none is None

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self._next is None:
            return
        parameters, tensors = self._next
        if self.direction == "step":
            add_(tensors, [parameter.detach() for parameter in parameters], alpha=-1.0)
        self._memory.replace("direction", parameters, tensors)
        self._memory.commit()
        self._next = None

    def _leave_out(self) -> None:
        """Has the plain optimizer find no gradient."""
        for parameter in self._parameters():
            parameter.grad = None
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            warnings.warn(
                "the privatised gradient of a step is not finite: the step, which is accounted, was left out and the "
                "weights are as they were (warned once; skipped_steps counts them)",
                NonFiniteGradientWarning,
                stacklevel=depth_in_package(),
            )

    def _check_move(self, *move: list[Tensor]) -> None:
        """Warns of what is wrong with the first move."""
        for fault in faults_of_move(
            "DPSAT", *move, rho=self._rho if self._scaling is unit else None, trained=self._parameters()
        ):
            warnings.warn(fault, stacklevel=depth_in_package())

    def _check_scaler(self) -> None:
        """Refuses a GradScaler, which is looked for in the first step."""
        if self._stepped:
            return
        if Surroundings(None).scaler_of(self._private) is not None:
            self._put_back()
            raise InvalidArgumentError(
                "Opacus clips the gradients that a GradScaler has scaled, and the scaler unscales others: train in "
                "float32, or in torch.autocast with bfloat16, without a scaler"
            )

    def _put_back(self, because: str = "") -> None:
        if self._attached is not None:
            self._attached.end(because)
        self.displaced.restore()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._base.param_groups for parameter in group["params"]]

    def _candidates(self) -> list[Tensor]:
        trained = [parameter for parameter in self._parameters() if parameter.requires_grad]
        return [parameter for parameter in trained if self._subset is None or parameter in self._subset]

    def _save(self, base: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = {"direction": self.direction, "state": self._memory.state_dict(base.param_groups)}
        return {**state, OWN: own}

    def _load(self, base: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = state.get(OWN)
        if own is None:
            warnings.warn(
                "the optimizer's state has nothing of DPSAT: its first step will be a plain one of DP-SGD",
                FlatminWarning,
                stacklevel=depth_in_package(),
            )
            own = {}
        if own.get("direction", self.direction) != self.direction:
            raise StateDictError(
                f"the optimizer's state is of DPSAT(direction={own['direction']!r}), and attached is one with "
                f"{self.direction!r}: attach the former, or call remove() before and attach after loading"
            )
        self._loaded = Memory.from_state(own.get("state", {}), base.param_groups)
        return {name: part for name, part in state.items() if name != OWN}

    def _take_loaded(self, _: Optimizer) -> None:
        self._put_back("the optimizer's state was loaded")
        self._memory, self._rho, self._norm = self._loaded, None, None

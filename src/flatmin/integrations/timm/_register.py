"""flatmin's optimizers by name, where timm makes optimizers."""

import inspect
import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ... import optim
from ...errors import InvalidArgumentError
from . import _package

METHODS = (
    optim.ASAM,
    optim.ESAM,
    optim.FriendlySAM,
    optim.GSAM,
    optim.LookSAM,
    optim.MSAM,
    optim.S2SAM,
    optim.SAM,
)
PREFIX = "flatmin_"


def register() -> list[str]:
    """Puts flatmin's optimizers into timm's registry, for ``create_optimizer_v2`` and ``--opt``.

    Their names are ``flatmin_asam``, ``flatmin_esam``, ``flatmin_friendlysam``, ``flatmin_gsam``, ``flatmin_looksam``,
    ``flatmin_msam``, ``flatmin_s2sam`` and ``flatmin_sam``. timm looks for what follows the last underscore, so that
    each has its short name too, such as ``msam``.

    ``base=`` names the optimizer that is wrapped, any of timm's: ``"sgd"`` (default; timm's has Nesterov momentum 0.9)
    or ``"adamw"``. Of the other arguments those that the method has (``rho``, ``max_norm``, ...) are its own, and all
    else, ``lr``, ``weight_decay``, ``momentum``, ``eps`` and ``betas`` among it, goes to the base as timm gives it.
    ``model=`` is the network that ``create_optimizer_v2`` was called with, so that MSAM and S2SAM work in loops without
    a closure, as timm's ``train.py`` is. The other methods make two passes there: they need ``perturb`` and
    ``restore``, or a closure.

    Returns:
        The names.

    Raises:
        MissingDependencyError: If there is no timm.
        InvalidArgumentError: (a ValueError) if timm has another optimizer of one of the names.

    Example:
        >>> from flatmin.integrations.timm import register
        >>> def make_optimizer(model):
        ...     import timm.optim
        ...
        ...     register()
        ...     return timm.optim.create_optimizer_v2(model, "flatmin_msam", lr=0.1, base="sgd", rho=3.0)
    """
    factory = _package.timm("optim._optim_factory")
    registry = factory.default_registry
    names = []
    for method in METHODS:
        short = method.__name__.lower()
        for name in (PREFIX + short, short):
            known = registry.list_optimizers(name)
            if known and not isinstance(registry.get_optimizer_info(name).opt_class, Maker):
                raise InvalidArgumentError(
                    f"timm has an optimizer {name!r} already, which flatmin's would replace: make flatmin."
                    f"{method.__name__}(base, ...) itself, of what create_optimizer_v2 returns"
                )
            if not known:
                about = (inspect.getdoc(method) or "").partition("\n")[0]
                registry.register(
                    factory.OptimInfo(name, Maker(method), about, has_eps=True, has_momentum=True, has_betas=True)
                )
        names.append(PREFIX + short)
    return names


class Maker:
    """Makes a method, and its base, of what timm's factory gives to an optimizer's class.

    Args:
        method: The method's class.
    """

    def __init__(self, method: type[optim.SharpnessAware]) -> None:
        self.method = method
        self.own = set(inspect.signature(method).parameters) - {"base_optimizer"}
        self.__name__ = method.__name__

    def __call__(self, params: Any, *, base: str = "sgd", **given: Any) -> Optimizer:
        """Makes it.

        Args:
            params: The parameters, or groups of them.
            base: The name of timm's optimizer that makes the step.
            **given: Arguments of the method, and of its base.

        Raises:
            InvalidArgumentError: If it was asked for by a name that is not its own, or wraps another of flatmin's.
        """
        caller = sys._getframe(1).f_locals  # of timm's factory, which hands on the parameters of the network alone
        self._check_name(caller.get("opt"))
        if not isinstance(base, str) or base.lower().split("_")[-1] in {method.__name__.lower() for method in METHODS}:
            raise InvalidArgumentError(
                f"base must be the name of one of timm's plain optimizers, such as 'sgd' or 'adamw', got {base!r:.80}"
            )
        if base.lower().startswith("lookahead_"):  # it hides its optimizer's state and hooks
            raise InvalidArgumentError(
                f"base must not be one with Lookahead, got {base!r}: put that around all, as in "
                f"'lookahead_{PREFIX}{self.__name__.lower()}' with base={base[10:]!r}"
            )
        network = caller.get("model_or_params")
        if isinstance(network, nn.Module) and "model" in self.own:
            given.setdefault("model", network)
        own = {name: given.pop(name) for name in self.own & set(given)}
        plain = _package.timm("optim._optim_factory").create_optimizer_v2(params, opt=base, **given)
        if getattr(plain, "is_second_order", False):
            raise InvalidArgumentError(
                f"base must not be {base!r}, which takes derivatives of the gradient, at weights that {self.__name__} "
                "has put back: take another, such as 'adamw'"
            )
        return self.method(plain, **own)

    def _check_name(self, asked: Any) -> None:
        """Refuses a name of which timm has read the end alone: flatmin_look_sam is not SAM."""
        short = self.__name__.lower()
        if isinstance(asked, str) and asked.lower().removeprefix("lookahead_") not in (short, PREFIX + short):
            names = ", ".join(PREFIX + method.__name__.lower() for method in METHODS)
            raise InvalidArgumentError(
                f"timm reads of {asked!r} what follows the last underscore, which is {self.__name__}: take one of "
                f"{names}, and name what it wraps by base=, such as base='adamw'"
            )

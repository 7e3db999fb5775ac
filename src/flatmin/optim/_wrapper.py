"""An optimizer around another one, which is seen through it."""

from typing import Any

from torch.optim import Optimizer

from ..errors import InvalidArgumentError
from ._arguments import check_base


class Around(Optimizer):
    """Shares ``param_groups``, ``state`` and ``defaults`` with its base optimizer, whatever is done to either.

    Args:
        base_optimizer: The optimizer, an instance.

    Raises:
        InvalidArgumentError: (a ValueError) if it is none that can be wrapped.
    """

    base_optimizer: Optimizer

    def __init__(self, base_optimizer: Optimizer) -> None:
        check_base(base_optimizer)
        if isinstance(base_optimizer, Around):
            wrapped = type(base_optimizer).__name__
            raise InvalidArgumentError(f"base_optimizer is a {wrapped} already; wrap the plain optimizer once")
        super().__init__([p for group in base_optimizer.param_groups for p in group["params"]], base_optimizer.defaults)
        self.base_optimizer = base_optimizer
        self._follow()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, which is to itself."""
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.add_param_group(param_group)
        else:  # called by torch's constructor, before there is anything to share
            super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what a subclass adds; hooks and the step a scheduler has patched belong to this object.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()

    def _follow(self) -> None:
        """Shares what the base optimizer has, now and whenever a checkpoint gives it something else."""
        try:
            self.base_optimizer.register_load_state_dict_post_hook(lambda _: self._share())
        except AttributeError:
            kind = type(self.base_optimizer).__name__
            raise InvalidArgumentError(
                f"base_optimizer {kind} leaves out torch.optim.Optimizer.__init__, so that it cannot be followed; "
                f"if it wraps another, wrap that one, and {kind} around it"
            ) from None
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = self.base_optimizer.defaults

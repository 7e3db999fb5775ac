"""``--compile``: the network as `torch.compile` makes it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ...errors import FlatminError, InvalidArgumentError
from ..recipe import Recipe

BACKEND = "inductor"
COMPILERS = ("torch._dynamo", "torch._inductor")


def compiled(network: nn.Module) -> nn.Module:
    """A network that is compiled when it is first called with a batch of some size; an epoch's last has another."""
    made: Any = torch.compile(network, backend=BACKEND, dynamic=False)
    return made  # type: ignore[no-any-return]


@contextmanager
def said(recipe: Recipe) -> Iterator[None]:
    """Says of an error of the compiler's how to do without it.

    Raises:
        InvalidArgumentError: In place of one.
    """
    try:
        with warnings.catch_warnings() if recipe.compile else nullcontext():
            if recipe.compile:  # flatmin's hooks do nothing there that could be done twice
                warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
            yield
    except Exception as error:
        found = error.__cause__ if isinstance(error, FlatminError) and error.__cause__ is not None else error
        if recipe.compile and type(found).__module__.startswith(COMPILERS):
            line = " ".join(str(found).split())
            raise InvalidArgumentError(
                f"the network could not be compiled ({type(found).__name__}: {line:.300}): leave out compile"
            ) from error
        raise

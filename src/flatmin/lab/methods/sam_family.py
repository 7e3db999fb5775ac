"""The cards of the methods that wrap the optimizer."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..._checks import check_choice, check_number, nearest
from ..._distributed import unwrapped
from ...averages._statistics import refresh
from ...errors import InvalidArgumentError
from ...optim import (
    ASAM,
    ESAM,
    GSAM,
    MSAM,
    S2SAM,
    SAM,
    Adaptive,
    Every,
    FriendlySAM,
    Late,
    LookSAM,
    RhoByLR,
    Schedule,
    SharpnessAware,
    Sometimes,
    normalization_parameters,
)
from .card import Card, Settings
from .hyperparameters import taken
from .method import Assembled, Ingredients


def parse_when(text: str | None, steps: int) -> Schedule | None:
    """Reads in which steps the second pass runs.

    Args:
        text: ``always``, ``every:K``, ``late:SHARE``, ``sometimes:PROBABILITY``, ``adaptive``; None for the method's
            own choice.
        steps: Steps of the run.

    Raises:
        InvalidArgumentError: If it is none of them, or its number is out of its bounds.
    """
    if text is None:
        return None
    if text == "always":
        return Every(1)
    kind, _, number = text.partition(":")
    try:
        if kind == "every":
            return Every(int(number))
        if kind == "late":
            return Late(float(number), steps)
        if kind == "sometimes":
            return Sometimes(float(number))
        if text == "adaptive":
            return Adaptive(steps)
    except InvalidArgumentError:
        raise
    except ValueError:
        raise InvalidArgumentError(f"when={text!r}: {number!r} is no number; write such as {_EXAMPLES}") from None
    kinds = ("always", "every", "late", "sometimes", "adaptive")
    raise InvalidArgumentError(f"unknown when {text!r}{nearest(kind, kinds)}; there are {_EXAMPLES}")


_EXAMPLES = "always, every:5, late:0.2, sometimes:0.5, adaptive"


def _second_pass(own: Callable[[Settings], str]) -> Callable[[int, Settings, int], bool | None]:
    """Whether the second pass runs in a step, by its ``when``, or else ``own``."""

    def second_pass(step: int, settings: Settings, steps: int) -> bool | None:
        when = parse_when(settings["when"] or own(settings), steps)
        return True if when is None else when.before(step)

    return second_pass


def _card(
    name: str,
    summary: str,
    source: type[SharpnessAware],
    own: Iterable[str] = (),
    *,
    make: Callable[..., SharpnessAware] | None = None,
    closure_calls: int = 2,
    moved: int = 1,
    whole: int = 0,
    subset: str = "all",
    when: str | None = "always",
    own_when: Callable[[Settings], str] = lambda settings: "always",
    stated: Settings | None = None,
    **facts: Any,
) -> Card:
    """The card of a method whose optimizer takes its hyperparameters by name.

    Args:
        name: Its name.
        summary: A line on it.
        source: The optimizer's class.
        own: Its hyperparameters beside rho, with the defaults of the class.
        make: Makes the optimizer, if not the class alone.
        closure_calls: How often a step with a second pass calls the closure; 1 for a method of one pass.
        moved: Tensors that it has for each perturbed one during a pass.
        whole: Tensors that it has for each parameter during a pass.
        subset: Which parameters it perturbs by default.
        when: In which steps the second pass runs by default.
        own_when: The same, where its ``when`` is None.
        stated: Hyperparameters that the class has not, or whose default is another here.
        **facts: What else stands on the card.
    """
    hyperparameters = taken(source, *own, **(stated or {}))
    taking = tuple(hyperparameters)

    def assemble(given: Ingredients, settings: Settings) -> Assembled:
        norm_layers = check_choice("subset", settings["subset"], ("all", "norm")) == "norm"
        parameters = normalization_parameters(given.model) if norm_layers else None
        options = {option: settings[option] for option in taking}
        if closure_calls > 1:
            options["when"] = parse_when(settings["when"], given.epochs * given.steps_per_epoch)
        optimizer = (make or source)(given.optimizer, parameters=parameters, scaler=given.scaler, **options)
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        size = moved * _bytes(every if parameters is None else parameters) + whole * _bytes(every)
        anew = (
            closure_calls == 1 and check_choice("statistics", settings["statistics"], ("trained", "fresh")) == "fresh"
        )
        return Assembled(
            optimizer,
            extra_bytes=size,
            chooses=optimizer.per_sample_closure,
            refresh=partial(refresh, unwrapped(given.model), given.model) if anew else None,
        )

    # The class perturbs all parameters, in all steps, and takes objects for either; here a word says it. A method of
    # one pass sees each batch at moved weights alone, and so the batch-norm statistics of training are theirs.
    words = {"subset": subset, **({"statistics": "fresh"} if closure_calls == 1 else {"when": when})}
    if closure_calls > 1:
        facts["second_pass"] = _second_pass(own_when)
    return Card(
        name,
        summary,
        {**hyperparameters, **taken(None, **words)},
        assemble,
        stands_for=source,
        closure_calls=closure_calls,
        **facts,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _gsam(base: Optimizer, *, rho: float, rho_min: float, alpha: float, **more: Any) -> GSAM:
    """GSAM whose rho falls with the learning rate of the base optimizer, which is now at its highest."""
    check_number("rho", rho, above=0)
    if check_number("rho_min", rho_min, least=0) > rho:
        raise InvalidArgumentError(f"rho_min must be at most rho, {rho:g}, got {rho_min!r}: rho falls to it; give both")
    lr = float(base.param_groups[0]["lr"])
    return GSAM(base, rho=RhoByLR(rho, rho_min, lr_max=lr) if rho_min != rho else rho, alpha=alpha, **more)


_NORM = {"norm": "rank"}  # as the class has it

CARDS = (
    _card(
        "sam",
        "the gradient taken `rho` up the slope",
        SAM,
        ("rho",),
        stated=_NORM,
        paper="Foret et al. 2021, arXiv 2010.01412",
        choose="twice the time is fine; try a larger `rho` than the default",
        memory="one copy of the weights",
        passes="a second pass",
    ),
    _card(
        "sam_on",
        "SAM that perturbs the normalisation layers alone",
        SAM,
        subset="norm",
        stated={"rho": 0.5, **_NORM},  # the least that its paper recommends; SAM's own would do nothing here
        use="SAM(parameters=normalization_parameters(model))",
        paper="Mueller et al. 2023, arXiv 2306.04226",
        choose="as SAM; its paper has `rho` 0.5 to 1, our comparisons chose 1 and 2",
        memory="one copy of those layers' weights",
        passes="a second pass",
    ),
    _card(
        "late_sam",
        "SAM in the last fifth of the run, the plain optimizer before",
        SAM,
        ("rho",),
        when="late:0.2",
        stated=_NORM,
        use="SAM(when=Late(0.2, steps))",
        paper="Zhou et al. 2025, arXiv 2410.10373",
        choose="half of SAM's gain is enough",
        memory="one copy of the weights",
        passes="a second pass in the last fifth of the run",
    ),
    _card(
        "ae_sam",
        "SAM in the steps whose gradient is large compared with past ones",
        SAM,
        ("rho",),
        when="adaptive",
        stated=_NORM,
        use="SAM(when=Adaptive(steps))",
        paper="Jiang et al. 2023, arXiv 2304.14647",
        choose="part of SAM's gain is enough",
        memory="one copy of the weights",
        passes="a second pass in some steps",
    ),
    _card(
        "asam",
        "SAM relative to each weight's size",
        ASAM,
        ("rho", "eta"),
        stated=_NORM,
        paper="Kwon et al. 2021, arXiv 2102.11600",
        choose="layers of very different scale",
        memory="one copy of the weights",
        passes="a second pass",
    ),
    _card(
        "esam",
        "SAM on random tensors and half of the samples",
        ESAM,
        ("rho", "beta", "gamma"),
        closure_calls=3,
        stated=_NORM,
        paper="Du et al. 2022, arXiv 2110.03141",
        choose="SAM's gain for large networks, a little cheaper",
        memory="one copy of the weights",
        passes="a forward pass, and a second pass on `gamma` of the samples",
    ),
    _card(
        "gsam",
        "SAM that also closes the gap to the loss at the weights",
        GSAM,
        ("rho", "alpha"),
        make=_gsam,
        whole=1,
        stated={"rho_min": 0.02},  # the class has a constant rho; the paper's falls with the learning rate
        use="GSAM(rho=RhoByLR(...))",
        paper="Zhuang et al. 2022, arXiv 2203.08065",
        choose="ViTs, as in its paper",
        memory="two copies of the weights",
        passes="a second pass",
    ),
    _card(
        "look_sam",
        "SAM in every `k`-th step; the others reuse its last correction",
        LookSAM,
        ("rho", "k", "alpha"),
        whole=2,
        when=None,
        own_when=lambda settings: f"every:{settings['k']}",
        paper="Liu et al. 2022, arXiv 2203.02714",
        choose="large batches; tune `alpha` first, 0.7 can hurt",
        memory="three copies of the weights",
        passes="a second pass in every `k`-th step",
    ),
    _card(
        "friendly_sam",
        "SAM along the part of the gradient that is peculiar to the batch",
        FriendlySAM,
        ("rho", "sigma", "lam"),
        moved=3,
        paper="Li et al. 2024, arXiv 2403.12350",
        choose="small batches",
        memory="three copies of the weights",
        passes="a second pass",
    ),
    _card(
        "msam",
        "the gradient taken ahead along the momentum",
        MSAM,
        ("rho",),
        closure_calls=1,
        paper="Becker et al. 2024, arXiv 2401.12033",
        choose="no time for a second pass; tune `rho`",
        memory="one copy of the weights",
    ),
    _card(
        "s2sam",
        "the gradient taken up the slope of the step before",
        S2SAM,
        ("rho",),
        closure_calls=1,
        moved=2,
        paper="Ji et al. 2024, NeurIPS",
        choose="no time for a second pass, and no momentum",
        memory="two copies of the weights",
    ),
)

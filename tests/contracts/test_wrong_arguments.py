"""Every argument of everything public in the library, as None, of a wrong type, of a wrong shape and empty.

Each is taken, where that is right, or refused by an error of flatmin's in a line that names the argument.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin import losses, optim, sharpness
from flatmin.errors import FlatminError, InvalidArgumentError, StateDictError
from tests.library_calls import AVERAGES, CALLS, OPTIMIZERS, WRONG, judge, methods, network, public, takes_none, trained

SHAPES = ("a wrong shape", "an empty tensor")
TAKEN = {
    ("logit_squeezing", "logits", "a wrong shape"),  # maps, of which class_dim=1 says which dimension is the classes'
    *((name, "dataset", wrong) for name in ("indexed", "IndexedDataset") for wrong in SHAPES),  # it has dataset[i]
}
NETWORKS = {  # a batch of another shape is between the network and its user
    (f"{name}.refresh", "batches", "a wrong shape") for name in ("EMA", "LAWA", "MESA", "SwitchEMA")
}
# Of files that are changed elsewhere at this time: what is said of a tensor takes several lines, or is torch's.
WAITING = {
    *(("MESA", argument, "a wrong shape") for argument in ("class_dim", "distance", "output")),
    *((kind.__name__, argument, "a wrong shape") for kind in OPTIMIZERS for argument in ("perturb", "scaling")),
}
# What the table has no call of.
ABSTRACT = {"Codec", "PerSampleClosure", "Schedule", "SharpnessAware", "WeightAverage"}
ASKED = {"before", "after", "observe", "__call__"}  # a schedule, by an optimizer that knows what it gives
CODED = {"bind", "begin_epoch", "encode", "decode", "compare"}  # a codec, by a history that has checked it
PLAIN = {  # read as torch's own are: a flag, or what the base optimizer or the network takes
    "add_param_group",
    "first_step",
    "second_step",
    "train",
    "forward",
}


def is_result(kind):
    """Whether a class is of what a function returns, or a plain tuple."""
    return issubclass(kind, (tuple, sharpness._result.Result))


def test_the_table_has_everything_that_is_public():
    missing = []
    for name, value in public().items():
        if name in ABSTRACT or (inspect.isclass(value) and is_result(value)):
            continue
        left = {*PLAIN}
        if inspect.isclass(value):
            if issubclass(value, optim.Schedule) or name in ("Elementwise", "RhoByLR"):
                left |= ASKED | ({"load_state_dict"} if "load_state_dict" not in vars(value) else set())
            left |= CODED if issubclass(value, flatmin.history.Codec) else set()
            missing += [f"{name}.{method}" for method in methods(value) if method not in left]
        missing += [name]
    assert [name for name in missing if name not in CALLS] == []


@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_order_is_taken(name):
    function, arguments = CALLS[name]()
    function(**arguments)


def test_every_argument_is_taken_or_refused_by_name():
    faults, seen = [], 0
    for name, make in CALLS.items():
        for argument in make()[1]:
            for wrong, value in WRONG.items():
                function, arguments = make()
                before, arguments[argument] = arguments[argument], value()
                fault = judge(name, [argument], function, arguments)
                right = (name, argument, wrong) in TAKEN or name.endswith("set_extra_state")
                right = right or (wrong == "None" and takes_none(function, argument, before))
                seen += 1
                if (name, argument, wrong) in NETWORKS | WAITING:
                    continue
                if fault and not (right and fault.endswith("returned")):
                    faults.append(f"{wrong}: {fault}")
    assert seen > 1000
    assert not faults, f"{len(faults)} of {seen}:\n" + "\n".join(faults)


LOGITS = torch.zeros(2, 3)
KINDS = {"MESA": flatmin.MESA, **{average.__name__: average for average in AVERAGES}}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: losses.trajectory_loss(LOGITS, LOGITS, temperature=0),
            "temperature must be a finite number > 0, got 0",
        ),
        (
            lambda: losses.binary_trajectory_loss(LOGITS, LOGITS, temperature=0),
            "temperature must be a finite number > 0",
        ),
        (lambda: flatmin.logit_squeezing(LOGITS, temperature=0), "temperature must be a finite number > 0"),
        (lambda: flatmin.SAF(8, 3, temperature=0), "temperature must be a finite number > 0"),
        (lambda: flatmin.SAF(8, 1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: flatmin.OnlineLabelSmoothing(1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: flatmin.logit_squeezing(LOGITS[:, :1]), "two classes at least"),
        *(
            (lambda kind=kind: kind(nn.ReLU()), "model has no parameters to average, got ReLU")
            for kind in KINDS.values()
        ),
        (lambda: flatmin.MESA(nn.ReLU(), average=nn.Tanh()), "model has no parameters to average"),
        (lambda: sharpness.Objective(nn.ReLU(), F.mse_loss, [(LOGITS, LOGITS)]), "has no parameter with requires_grad"),
        *(
            (lambda kind=kind: kind(trained()[1], model=network()), "model, Sequential, has none of the parameters")
            for kind in OPTIMIZERS
            if kind.__name__ != "SQuAT"
        ),
    ],
)
def test_what_no_type_says_is_refused_too(call, said):
    with pytest.raises(InvalidArgumentError, match=said):
        call()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_is_attached_to_the_optimizer_of_another_network(kind):
    model, optimizer = trained()
    with pytest.raises(
        InvalidArgumentError, match=f"SGD, trains no parameter of the network that this {kind.__name__}"
    ):
        kind(network()).attach(optimizer)
    kind(model).attach(optim.SAM(optimizer))


def test_epochs_of_saf_go_backwards_with_its_state_alone_or_to_the_beginning():
    saf = flatmin.SAF(8, 3)
    for epoch in (5, 5, 0, 3):
        saf.set_epoch(epoch)
    state = saf.state_dict()
    saf.set_epoch(7)
    with pytest.raises(InvalidArgumentError, match="epoch must not go backwards, got 3 after 7"):
        saf.set_epoch(3)
    saf.load_state_dict(state)
    saf.set_epoch(3)


MEASURES = [getattr(sharpness, name) for name in sharpness.__all__ if name[0].islower()]
WITHOUT_A_SLOPE = {"average_sharpness", "loss_landscape"}  # can be found of an error rate, too


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_a_loss_that_is_constant_is_measured_nowhere_and_an_error_rate_where_no_slope_is_needed(measure):
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    options = {"points": 2} if measure is sharpness.loss_landscape else {}
    for constant in (lambda out, y: torch.tensor(1.0), lambda out, y: out.detach().sum() * 0):
        with pytest.raises(InvalidArgumentError, match="the loss does not depend on any parameter"):
            measure(sharpness.Objective(network(), constant, [(x, y)]), **options)
    torch.manual_seed(0)
    rate = sharpness.Objective(network(), lambda out, y: (out.argmax(dim=1) != y).float().mean(), [(x, y)])
    if measure.__name__ in WITHOUT_A_SLOPE:
        assert measure(rate, **options)
    else:
        with pytest.raises(InvalidArgumentError, match="so it has no slope"):
            measure(rate)


@pytest.mark.parametrize(
    "name", [name for name in CALLS if name.endswith(".load_state_dict") and "Adaptive" not in name]
)
def test_an_empty_state_is_none_and_changes_nothing(name):
    load, _ = CALLS[name]()
    before = repr(load.__self__.state_dict())
    with pytest.raises(StateDictError) as error:
        load({})
    assert isinstance(error.value, RuntimeError)  # as torch's own
    assert isinstance(error.value, FlatminError)
    assert repr(load.__self__.state_dict()) == before


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind.max_passes == 2], ids=lambda kind: kind.__name__)
def test_a_schedule_is_as_before_where_the_base_optimizers_state_does_not_fit(kind):
    load, arguments = CALLS[f"{kind.__name__}.load_state_dict"]()
    optimizer, state = load.__self__, arguments["state_dict"]
    optimizer._when = optim.Adaptive(9)
    with pytest.raises(StateDictError):
        load({**state, "param_groups": []})
    assert optimizer._when.state_dict() == optim.Adaptive(9).state_dict()
    assert not optimizer.base_optimizer.state

"""The modules of a network, which are looked for anew only where they have changed."""

import pytest
from torch import nn

from flatmin._walk import Walk


def network() -> nn.Sequential:
    shared = nn.Linear(2, 2)
    return nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm1d(2)), nn.Module())


CHANGES = {
    "put in": lambda net: net[1].append(nn.ReLU()),
    "taken out": lambda net: net[1].__delitem__(1),
    "replaced": lambda net: net[1].__setitem__(1, nn.BatchNorm1d(2)),
    "deep within": lambda net: net[2].add_module("inner", nn.Sequential(nn.ReLU())),
    "none": lambda net: net.register_module("2", None),
    "past the setter": lambda net: net[1]._modules.update(new=nn.ReLU()),
    "another order": lambda net: net._modules.update({"0": net._modules.pop("0")}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_modules_are_those_that_there_are(change):
    walk = Walk(net := network(), nn.Module.modules)
    first = walk.modules()
    assert first == list(net.modules())
    assert walk.modules() is first
    change(net)
    assert walk.modules() == list(net.modules())
    assert walk.modules() != first

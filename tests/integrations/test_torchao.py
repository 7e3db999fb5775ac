"""torchao's fake quantisers: what is found in a prepared network, SQuAT and SAM on it, and conversion."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError

with warnings.catch_warnings():  # it says that kernels for other processors cannot be loaded
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    qat = pytest.importorskip("torchao.quantization.qat")
    logging.disable(logging.NOTSET)

from flatmin.integrations import torchao as ours
from flatmin.lab.runs.after import rounded

B, TOKENS, C = 16, 20, 3
DTYPES = {4: torch.int4, 3: torch.int3, 2: torch.int2}


class Net(nn.Module):
    """Words, of which an embedding is quantised too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.head = nn.Embedding(TOKENS, 16), nn.Linear(16, 32), nn.Linear(32, C)

    def forward(self, tokens):
        return self.head(torch.tanh(self.first(self.embedding(tokens).mean(1))))


def network(bits=4, *, learned=True, initialized=True):
    torch.manual_seed(0)
    model = Net()
    config = qat.IntxFakeQuantizeConfig(
        DTYPES[bits], "per_channel", is_symmetric=True, is_dynamic=not learned, range_learning=learned
    )
    kinds = (nn.Linear, nn.Embedding)
    prepare = qat.QATConfig(weight_config=config, step="prepare")
    torchao.quantize_(model, prepare, lambda layer, _: isinstance(layer, kinds))
    if learned and initialized:
        qat.initialize_fake_quantizers(model, (tokens()[:2],))
    return model


def tokens():
    return torch.randint(TOKENS, (B, 5), generator=torch.Generator().manual_seed(1))


def train(model, optimizer, steps=4):
    x, y = tokens(), torch.arange(B) % C

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return [float(optimizer.step(closure).detach()) for _ in range(steps)]


def groups(model):
    return [
        {"params": ours.weights(model), "lr": 1e-2},
        {"params": ours.step_sizes(model), "lr": 1e-3, "weight_decay": 0.0},
    ]


def config(bits):
    return torchao.IntxWeightOnlyConfig(weight_dtype=DTYPES[bits], granularity=torchao.PerAxis(0))


def test_step_sizes_weights_and_quantizers_are_told_apart():
    model = network()
    sizes, weights = ours.step_sizes(model), ours.weights(model)
    assert {id(each) for each in (*sizes, *weights)} == {id(each) for each in model.parameters()}
    assert [tuple(each.shape) for each in sizes] == [(TOKENS, 1), (32, 1), (C, 1)]
    assert len(ours.quantizers(model)) == 3
    assert all(tuple(each(model.first.weight).shape) == (32, 16) for each in ours.quantizers(model)[1:2])


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("perturb", ["weights", "quantized"])
def test_what_squat_has_trained_is_what_is_converted(bits, perturb):
    model = network(bits)
    more = {"perturb": perturb, "quantizers": ours.quantizers(model)} if perturb == "quantized" else {}
    optimizer = flatmin.SQuAT(torch.optim.AdamW(groups(model)), step_sizes=ours.step_sizes(model), **more)
    losses = train(model, optimizer, 12)
    assert losses[-1] < losses[0]
    assert all((size > 0).all() for size in ours.step_sizes(model))
    with torch.no_grad():
        fake = model(tokens())
        converted = ours.convert(model, config(bits))(tokens())
    assert torch.equal(fake, converted)
    assert type(model.embedding) is nn.Embedding
    assert type(model.embedding.weight) is not nn.Parameter  # of integers


def test_sam_says_that_it_moves_step_sizes_and_how_it_does_not():
    model = network()
    sam = flatmin.SAM(torch.optim.AdamW(groups(model)))
    with pytest.warns(FlatminWarning, match=r"SAM perturbs the step sizes .*parameters=.*torchao\.weights\(model\)"):
        train(model, sam, 2)
    model = network()
    seen = []
    ours.quantizers(model)[0].register_forward_pre_hook(
        lambda module, _: seen.append([each.detach().clone() for each in ours.step_sizes(model)])
    )
    train(model, flatmin.SAM(torch.optim.AdamW(groups(model)), parameters=ours.weights(model)), 1)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("function", [ours.step_sizes, ours.weights, ours.quantizers])
def test_a_network_that_is_not_ready_is_refused(function):
    with pytest.raises(InvalidArgumentError, match="model has no fake quantisers; prepare it"):
        function(Net())
    with pytest.raises(InvalidArgumentError, match="initialize_fake_quantizers"):
        function(network(initialized=False))
    with pytest.raises(InvalidArgumentError, match="model must be"):
        function(None)


def test_scales_that_are_not_learned_are_no_step_sizes():
    model = network(learned=False)
    with pytest.raises(InvalidArgumentError, match="learn none; prepare it with"):
        ours.step_sizes(model)
    assert len(ours.weights(model)) == len(list(model.parameters()))


def test_the_code_of_the_page_makes_steps_and_converts():
    page = (Path(__file__).parents[2] / "docs" / "plug-in" / "torchao.md").read_text()
    (block,) = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    names = {"torch": torch, "flatmin": flatmin, "model": model, "criterion": nn.CrossEntropyLoss()}
    names |= {"x": torch.randn(12, 4), "y": torch.arange(12) % 3}
    exec(block, names)
    assert names["optimizer"].state_dict()["flatmin"]["step"] == 1
    assert not any("FakeQuantized" in type(module).__name__ for module in model.modules())


def test_the_example():
    path = Path(__file__).parents[2] / "examples" / "torchao_digits.py"
    spec = importlib.util.spec_from_file_location("torchao_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(epochs=6)
    assert found["converted"] == found["squat"] > found["rounded"]
    assert found["converted"] > 0.8


def test_another_width_is_not_converted_to():
    model = network(2)
    with pytest.raises(InvalidArgumentError, match=r"config has weight_dtype torch\.int4, and .* torch\.int2"):
        ours.convert(model, config(4))


def test_activations_alone_are_no_quantised_weights():
    model = Net()
    activations = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    torchao.quantize_(model, qat.QATConfig(activation_config=activations, step="prepare"))
    with pytest.raises(InvalidArgumentError, match="quantises no weights"):
        ours.quantizers(model)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_laboratory_rounds_as_torchao_does(bits):
    """What ``flatmin compare --after`` measures is what a network becomes that torchao converts."""
    torch.manual_seed(0)
    layer = nn.Linear(33, 17)
    found = rounded(layer.weight, bits)
    config = torchao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=torchao.PerAxis(0))
    torchao.quantize_(layer, config)
    torch.testing.assert_close(found, layer.weight.dequantize())

"""What there is in a network that torchao has prepared, and its conversion."""

from typing import Any

from torch import Tensor, nn

from ..._checks import check_module
from ...errors import InvalidArgumentError, require


def step_sizes(model: nn.Module) -> list[nn.Parameter]:
    """Returns the learned step sizes (scales) of a prepared network's fake quantisers.

    Args:
        model: The network, after ``quantize_(model, QATConfig(..., step="prepare"))`` with ``range_learning=True``, and
            after ``initialize_fake_quantizers``.

    Raises:
        InvalidArgumentError: (a ValueError) if it has none, or they are not initialised.
        MissingDependencyError: Without torchao.
    """
    found = [sizes for each in _fake_quantizers(model) if isinstance(sizes := each.scale, nn.Parameter)]
    if not found:
        raise InvalidArgumentError(
            "model: its fake quantisers compute their scales anew in each pass, and learn none; prepare it with "
            "IntxFakeQuantizeConfig(..., is_dynamic=False, range_learning=True)"
        )
    return found


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Returns all trained parameters of a prepared network but what its fake quantisers learn.

    For SAM and its family, which would move step sizes too, below 0 perhaps: ``flatmin.SAM(base,
    parameters=weights(model))``.

    Raises:
        InvalidArgumentError: (a ValueError) if ``model`` has no fake quantisers, or they are not initialised.
        MissingDependencyError: Without torchao.
    """
    learned = {parameter for each in _fake_quantizers(model) for parameter in each.parameters()}
    return [each for each in model.parameters() if each.requires_grad and each not in learned]


def quantizers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that make quantised weights of weights, for ``SQuAT(..., perturb="quantized")``.

    Raises:
        InvalidArgumentError: (a ValueError) if ``model`` has none, or they are not initialised.
        MissingDependencyError: Without torchao.
    """
    found = [each for name, each in _named(model) if name.rpartition(".")[2] == "weight_fake_quantizer"]
    if not found:
        raise InvalidArgumentError("model quantises no weights, only activations")
    return found


def convert(model: nn.Module, config: Any) -> nn.Module:
    """Makes quantised weights of a prepared network's, in place: torchao's conversion, embeddings included.

    ``quantize_(model, QATConfig(config, step="convert"))`` leaves embeddings as they are, and takes another width than
    the network was prepared with, without a word.

    Args:
        model: The network that was prepared and trained.
        config: What to convert with, such as ``IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))``.

    Returns:
        ``model``.

    Raises:
        InvalidArgumentError: (a ValueError) if it was prepared with another width, or not at all.
        MissingDependencyError: Without torchao.
    """
    prepared_layers = _named(model)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, QATConfig

    wanted = getattr(config, "weight_dtype", None)
    for name, each in prepared_layers:
        prepared = getattr(each.config, "dtype", None)
        if wanted is not None and name.rpartition(".")[2] == "weight_fake_quantizer" and prepared != wanted:
            raise InvalidArgumentError(
                f"config has weight_dtype {wanted}, and {name} was prepared with {prepared}; convert with that"
            )
    quantize_(
        model,
        QATConfig(config, step="convert"),
        lambda module, _: isinstance(module, (FakeQuantizedLinear, FakeQuantizedEmbedding)),
    )
    return model


def _fake_quantizers(model: nn.Module) -> list[Any]:
    return [each for _, each in _named(model)]


def _named(model: nn.Module) -> list[tuple[str, Any]]:
    """The fake quantisers with their names, if all of them are ready."""
    require("torchao", install="flatmin[torchao]", oldest=(0, 18))
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    check_module("model", model)
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, FakeQuantizerBase)]
    if not found:
        raise InvalidArgumentError(
            'model has no fake quantisers; prepare it: quantize_(model, QATConfig(..., step="prepare")), whose default '
            "leaves out all but linear layers"
        )
    for name, each in found:
        if getattr(each.config, "range_learning", False) and not isinstance(each.scale, Tensor):
            raise InvalidArgumentError(
                f"{name} is to learn its scale and has none yet: call torchao.quantization.qat."
                "initialize_fake_quantizers(model, example_inputs), before the optimizer is made"
            )
    return found

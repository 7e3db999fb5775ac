"""The networks against the numbers of their papers, and the names that build them."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import flatmin.lab.problems.models
from flatmin.errors import InvalidArgumentError, MissingDependencyError
from flatmin.lab.problems import models

SMALL = {
    "cnn": lambda channels, classes: models.SmallCNN(channels, classes, width=4),
    "resnet18": models.resnet18,
    "wrn-10-1": lambda channels, classes: models.wide_resnet(channels, classes, depth=10, widen=1),
    "wrn-16-2": lambda channels, classes: models.wide_resnet(channels, classes, depth=16, widen=2),
    "pyramidnet-14": lambda channels, classes: models.pyramidnet(channels, classes, depth=14, alpha=9),
}
SIGNALS = {"cnn1d": lambda channels, classes: models.SmallCNN1d(channels, classes, width=8)}
BUILDERS = [models.SmallCNN, models.SmallCNN1d, models.resnet18, models.wide_resnet, models.pyramidnet]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def layers(model, kernel):
    """Counts the convolutions of a kernel size."""
    found = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return sum(module.kernel_size == (kernel, kernel) for module in found)


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


def test_the_api_is_sorted_and_documented():
    assert models.__all__ == sorted(models.__all__)
    assert all(getattr(flatmin.lab.problems.models, name).__doc__ for name in models.__all__)


@pytest.mark.usefixtures("meta")
class TestThePublishedNetworks:
    @pytest.mark.parametrize(("classes", "published"), [(10, 11_173_962), (100, 11_220_132)])
    def test_resnet18(self, classes, published):
        model = models.resnet18(3, classes)
        assert parameters(model) == published
        assert layers(model, 3) + 1 == 18  # and the linear layer
        assert layers(model, 1) == 3

    @pytest.mark.parametrize(("classes", "published"), [(10, 36_479_194), (100, 36_536_884)])
    def test_wide_resnet(self, classes, published):
        model = models.wide_resnet(3, classes)
        assert parameters(model) == published
        assert layers(model, 3) + layers(model, 1) == 28
        assert layers(model, 1) == 3

    # 1.7M, 3.8M and 28.3M in the paper; to the unit in https://github.com/osmr/imgclsmob
    @pytest.mark.parametrize(
        ("alpha", "classes", "published"),
        [(48, 10, 1_772_706), (84, 10, 3_904_446), (84, 100, 3_913_536), (270, 10, 28_485_477)],
    )
    def test_pyramidnet(self, alpha, classes, published):
        model = models.pyramidnet(3, classes, alpha=alpha)
        assert parameters(model) == published
        assert layers(model, 3) + 1 == 110
        assert layers(model, 1) == 0
        assert model.head[-1].in_features == 16 + alpha

    def test_pyramidnet_rounds_halves_up(self):
        model = models.pyramidnet(3, 10, depth=14, alpha=3)
        widths = [block.residual[-1].num_features for block in model.blocks]
        assert widths == [17, 17, 18, 18, 19, 19]

    @pytest.mark.parametrize("name", models.model_names())
    def test_the_registry_builds_them(self, name):
        model = models.create_model(name, 3, 10)
        size = [32] * models.input_dimensions(name)
        assert model(torch.zeros(2, 3, *size)).shape == (2, 10)

    def test_the_registry_takes_the_default_sizes(self):
        count = {name: parameters(models.create_model(name, 3, 10)) for name in models.model_names()}
        assert count == {
            "cnn": 24_346,
            "cnn-gn": 24_346,
            "cnn1d": 13_914,
            "pyramidnet-110": 28_485_477,
            "resnet18": 11_173_962,
            "wrn-28-10": 36_479_194,
        }

    @pytest.mark.parametrize(
        ("build", "stages", "sizes"),
        [
            (models.resnet18, ["stage1", "stage2", "stage3", "stage4"], [32, 16, 8, 4]),
            (models.wide_resnet, ["group1", "group2", "group3"], [32, 16, 8]),
            (models.pyramidnet, ["blocks.17", "blocks.18", "blocks.36", "blocks.53"], [32, 16, 8, 8]),
        ],
    )
    def test_the_image_shrinks_where_it_should(self, build, stages, sizes):
        model, seen = build(3, 10), []
        for stage in stages:
            model.get_submodule(stage).register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
        model(torch.zeros(1, 3, 32, 32))
        assert seen == sizes


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (28, 28)])
def test_networks_for_images_take_any_size(build, size):
    assert build(1, 5)(torch.zeros(2, 1, *size)).shape == (2, 5)


@pytest.mark.parametrize("build", SIGNALS.values(), ids=SIGNALS)
@pytest.mark.parametrize("length", [1, 9, 40])
def test_networks_for_signals_take_any_length(build, length):
    assert build(1, 5)(torch.zeros(2, 1, length)).shape == (2, 5)


@pytest.mark.parametrize("build", [*SMALL.values(), *SIGNALS.values()], ids=[*SMALL, *SIGNALS])
class TestEveryNetwork:
    def test_sends_a_gradient_to_every_parameter(self, build):
        torch.manual_seed(0)
        model = build(2, 5)
        size = (8,) if build in SIGNALS.values() else (8, 8)
        loss = nn.functional.cross_entropy(model(torch.randn(8, 2, *size)), torch.arange(8) % 5)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert [name for name, grad in gradients.items() if grad is None or not grad.norm() > 0] == []

    def test_starts_from_the_weights_of_the_papers(self, build):
        torch.manual_seed(0)
        for module in build(3, 10).modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                assert module.bias is None
                if module.weight.numel() > 1000:  # enough to estimate the deviation
                    fan_out = module.out_channels * math.prod(module.kernel_size)
                    assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()

    def test_is_drawn_from_the_global_generator(self, build):
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(nn.utils.parameters_to_vector(build(1, 2).parameters()))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def test_the_small_cnn_takes_images_of_4x4():
    model = models.SmallCNN(1, 10)
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 10)
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)] == [16, 32, 64]


def test_the_small_cnn_for_signals_doubles_its_channels_and_halves_the_length():
    model, seen = models.SmallCNN1d(1, 10), []
    for layer in model:
        if isinstance(layer, nn.Conv1d):
            layer.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape[1:])))
    model(torch.zeros(2, 1, 40))
    assert seen == [(16, 40), (32, 20), (64, 10)]
    kinds = [nn.Conv1d, nn.BatchNorm1d, nn.ReLU] * 3 + [nn.Sequential]
    assert [type(layer) for layer in model] == kinds


def test_the_small_cnn_for_signals_is_the_same_after_a_shift_inside_zeros():
    model, signal = models.SmallCNN1d(1, 10).eval(), torch.zeros(1, 1, 80)
    signal[..., 30:40] = torch.randn(10)
    torch.testing.assert_close(model(signal), model(signal.roll(8, -1)))  # by a multiple of the strides


@pytest.mark.parametrize(
    ("build", "part", "order"),
    [
        (models.resnet18, "stem", "conv norm relu"),
        (models.resnet18, "stage1.0.residual", "conv norm relu conv norm"),
        (models.resnet18, "stage2.0.shortcut", "conv norm"),
        (models.resnet18, "stage2.1.shortcut", ""),
        (models.wide_resnet, "group1.0.residual", "conv norm relu dropout conv"),
        (models.pyramidnet, "stem", "conv norm"),
        (models.pyramidnet, "blocks.0.residual", "norm conv norm relu conv norm"),
    ],
)
@pytest.mark.usefixtures("meta")
def test_the_layers_come_in_the_order_of_the_papers(build, part, order):
    kinds = {"conv": nn.Conv2d, "norm": nn.BatchNorm2d, "relu": nn.ReLU, "dropout": nn.Dropout}
    assert [type(layer) for layer in build(3, 10).get_submodule(part)] == [kinds[k] for k in order.split()]


def test_resnet_activates_the_sum_of_residual_and_shortcut():
    block = models.resnet18(3, 10).eval().stage2[0]
    x = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(block(x), (block.residual(x) + block.shortcut(x)).clamp(min=0))


def test_pyramidnet_pads_its_shortcut_with_zeros_and_averages_it_where_the_image_shrinks():
    model = models.pyramidnet(3, 10, depth=8, alpha=6).eval()
    block = model.blocks[1]
    nn.init.zeros_(block.residual[-1].weight)  # leaves the shortcut alone
    x = torch.randn(2, 18, 4, 4)
    y = block(x)
    assert y.shape == (2, 20, 2, 2)
    torch.testing.assert_close(y[:, :18], x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)))
    assert (y[:, 18:] == 0).all()


def test_wide_resnet_projects_the_activated_input():
    model = models.wide_resnet(3, 10, depth=10, widen=2).eval()
    block = model.group1[0]
    nn.init.zeros_(block.residual[-1].weight)  # leaves the shortcut alone
    x = torch.randn(2, 16, 4, 4)
    activated = (x / (1 + block.norm.eps) ** 0.5).relu()
    torch.testing.assert_close(block(x), block.project(activated))


def test_dropout_acts_in_training_alone():
    model = models.wide_resnet(3, 10, depth=10, widen=1, dropout=0.5)
    x = torch.randn(4, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


class TestErrors:
    @pytest.mark.parametrize("build", BUILDERS)
    @pytest.mark.parametrize("value", [0, -1, True, 3.0, "3", None])
    def test_sizes(self, build, value):
        with pytest.raises(InvalidArgumentError, match="in_channels must be an integer of at least 1, got"):
            build(value, 10)
        with pytest.raises(InvalidArgumentError, match="num_classes must be an integer of at least 1, got"):
            build(3, value)

    @pytest.mark.parametrize("name", ["cnn", "timm/resnet18", "torchvision/resnet18"])
    def test_sizes_by_name_come_before_any_import(self, name):
        with pytest.raises(InvalidArgumentError, match=r"in_channels .* got 0"):
            models.create_model(name, 0, 10)
        with pytest.raises(InvalidArgumentError, match=r"num_classes .* got 0"):
            models.create_model(name, 3, 0)

    @pytest.mark.parametrize(
        ("build", "arguments", "message"),
        [
            (models.SmallCNN, {"width": 0}, "width .* got 0"),
            (models.SmallCNN1d, {"width": 0}, "width .* got 0"),
            (models.wide_resnet, {"depth": 27}, r"depth must be 6n \+ 4.* got 27"),
            (models.wide_resnet, {"depth": 4}, "depth .* at least 10, got 4"),
            (models.wide_resnet, {"widen": 0}, "widen .* got 0"),
            (models.wide_resnet, {"dropout": 1.0}, "dropout .* got 1.0"),
            (models.wide_resnet, {"dropout": -0.1}, "dropout .* got -0.1"),
            (models.pyramidnet, {"depth": 111}, r"depth must be 6n \+ 2.* got 111"),
            (models.pyramidnet, {"depth": 2}, "depth .* at least 8, got 2"),
            (models.pyramidnet, {"alpha": 0}, "alpha .* got 0"),
        ],
    )
    def test_hyperparameters(self, build, arguments, message):
        with pytest.raises(InvalidArgumentError, match=message):
            build(3, 10, **arguments)

    def test_an_unknown_name_gets_the_nearest_and_all(self):
        with pytest.raises(InvalidArgumentError) as caught:
            models.create_model("RESNET-18", 3, 10)
        assert str(caught.value) == (
            "unknown model 'RESNET-18', did you mean resnet18?; "
            "there are cnn, cnn-gn, cnn1d, pyramidnet-110, resnet18, wrn-28-10, timm/NAME, torchvision/NAME"
        )

    @pytest.mark.parametrize("name", ["", "zzz", "timm", "timm/", "other/resnet18"])
    @pytest.mark.parametrize("ask", [lambda name: models.create_model(name, 3, 10), models.input_dimensions])
    def test_other_unknown_names(self, ask, name):
        with pytest.raises(
            InvalidArgumentError, match=f"unknown model '{name}'.* there are cnn, .*timm/NAME, torchvision/NAME"
        ):
            ask(name)


def test_the_networks_of_libraries_are_for_images_and_need_no_import(monkeypatch):
    for library in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)
        assert models.input_dimensions(f"{library}/resnet18") == 2


@pytest.fixture
def library(monkeypatch):
    """Puts a fake timm and a fake torchvision in place that return what they were called with."""
    timm = ModuleType("timm")
    timm.list_models = lambda: ["resnet18", "resnet50", "vit_tiny"]
    timm.is_model = lambda name: name.split(".")[0] in timm.list_models()
    timm.create_model = lambda *args, **kwargs: SimpleNamespace(args=args, kwargs=kwargs)
    torchvision, tv_models = ModuleType("torchvision"), ModuleType("torchvision.models")
    torchvision.models = tv_models
    tv_models.list_models = lambda module: ["resnet18", "vgg11"] if module is tv_models else ["retinanet"]
    tv_models.get_model = lambda *args, **kwargs: SimpleNamespace(args=args, kwargs=kwargs)
    for module in (timm, torchvision, tv_models):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("library")
class TestAdapters:
    @pytest.mark.parametrize("name", ["resnet50", "vit_tiny.augreg"])
    def test_timm_gets_the_arguments(self, name):
        call = models.create_model(f"timm/{name}", 1, 7)
        assert call.args == (name,)
        assert call.kwargs == {"pretrained": False, "in_chans": 1, "num_classes": 7}

    def test_torchvision_gets_the_arguments(self):
        call = models.create_model("torchvision/vgg11", 3, 7)
        assert call.args == ("vgg11",)
        assert call.kwargs == {"weights": None, "num_classes": 7}

    def test_torchvision_takes_three_channels_only(self):
        with pytest.raises(InvalidArgumentError, match=r"in_channels must be 3 .*, got 1"):
            models.create_model("torchvision/vgg11", 1, 7)

    @pytest.mark.parametrize(
        ("name", "nearest"), [("timm/vit_tin", "timm/vit_tiny"), ("torchvision/vgg", "torchvision/vgg11")]
    )
    def test_an_unknown_network_gets_the_nearest(self, name, nearest):
        message = f"unknown model '{name}', did you mean {nearest}"
        with pytest.raises(InvalidArgumentError, match=message):
            models.create_model(name, 3, 7)

    @pytest.mark.parametrize("name", ["timm/qqq", "torchvision/qqq", "torchvision/retinanet"])
    def test_an_unknown_network_like_no_other(self, name):
        with pytest.raises(InvalidArgumentError, match=f"unknown model '{name}'; {name.split('/')[0]} lists"):
            models.create_model(name, 3, 7)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
class TestALibraryThatCannotBeImported:
    @pytest.fixture(autouse=True)
    def _forgotten(self, library, monkeypatch):
        for name in [name for name in sys.modules if name.split(".")[0] == library]:
            monkeypatch.delitem(sys.modules, name)

    def test_missing(self, library, monkeypatch):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingDependencyError, match=rf"pip install 'flatmin\[{library}\]'"):
            models.create_model(f"{library}/resnet18", 3, 10)

    @pytest.mark.parametrize("error", ["RuntimeError", "AttributeError", "OSError"])
    def test_broken(self, library, error, monkeypatch, tmp_path):
        tmp_path.joinpath(f"{library}.py").write_text(f"raise {error}('torchvision::nms does not exist')")
        monkeypatch.syspath_prepend(tmp_path)
        message = f"{library!r} is installed but .*::nms does not exist"
        with pytest.raises(MissingDependencyError, match=message):
            models.create_model(f"{library}/resnet18", 3, 10)


class TestTheRealLibraries:
    """Skipped where the library is not installed or does not work."""

    @staticmethod
    def create(name, channels):
        try:
            return models.create_model(name, channels, 7)
        except MissingDependencyError as error:
            pytest.skip(str(error))

    @pytest.mark.parametrize(("name", "channels"), [("timm/resnet18", 1), ("torchvision/resnet18", 3)])
    def test_a_network(self, name, channels):
        model = self.create(name, channels).eval()
        assert model(torch.zeros(2, channels, 64, 64)).shape == (2, 7)

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_an_unknown_name(self, library):
        with pytest.raises(InvalidArgumentError, match=f"did you mean {library}/resnet18"):
            self.create(f"{library}/resnett18", 3)

"""flatmin in timm: its registry, tasks with MESA, presets, indices."""

import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.errors import FlatminWarning, InvalidArgumentError, MissingDependencyError
from flatmin.integrations import timm as integration
from flatmin.integrations.timm import PRESETS, MESATask, preset, register
from flatmin.integrations.timm._register import METHODS
from flatmin.integrations.timm._task import _classification
from tests.integrations import _timm

N, C = 24, 4


@pytest.fixture
def timm(monkeypatch):
    with _timm.importable() as timm:
        registry = timm.optim._optim_factory.default_registry
        monkeypatch.setattr(registry, "_optimizers", dict(registry._optimizers))
        yield timm
        _classification.cache_clear()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, C))


def batches(steps=6):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 5, generator=generator), torch.randint(C, (8,), generator=generator)) for _ in range(steps)]


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(task, optimizer, steps, *, scaler=None, start=0, accumulate=1):
    """The loop of timm's train.py; the losses."""
    losses = []
    task.get_trainable_module().train()
    optimizer.zero_grad()
    for number, (x, y) in enumerate(steps):
        result = task(x, y)
        loss = result["loss"] / accumulate
        need_update = (number + 1) % accumulate == 0
        if scaler is not None:
            scaler(loss, optimizer, need_update=need_update)
        else:
            loss.backward()
            if need_update:
                optimizer.step()
        losses.append(loss.item())
        if need_update:
            optimizer.zero_grad()
            task.update_ema(step=start + (number + 1) // accumulate)
    return losses


NAMES = [f"flatmin_{method.__name__.lower()}" for method in METHODS]


def test_every_method_of_the_library_is_registered_and_registering_again_changes_nothing(timm, caplog):
    found = {each for each in vars(flatmin.optim).values() if isinstance(each, type)}
    found = {each for each in found if issubclass(each, flatmin.optim.SharpnessAware)} - {flatmin.optim.SharpnessAware}
    assert set(METHODS) == found - {flatmin.SQuAT}  # which needs a quantised network
    assert register() == register() == NAMES
    assert not caplog.records  # timm logs what is overwritten
    assert timm.optim.get_optimizer_info("flatmin_msam").description.startswith("MSAM: ")


@pytest.mark.parametrize("name", [*NAMES, *(name.removeprefix("flatmin_") for name in NAMES), "Flatmin_SAM"])
@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "rmsprop"])
def test_each_is_made_as_it_is_by_hand(timm, name, base):
    register()
    kind = {method.__name__.lower(): method for method in METHODS}[name.lower().removeprefix("flatmin_")]
    model = network()
    given = {"lr": 0.05, "weight_decay": 0.01, "momentum": 0.8, "eps": 1e-6, "betas": (0.8, 0.9), "foreach": False}
    made = timm.optim.create_optimizer_v2(model, name, base=base, rho=0.3, **given)
    plain = timm.optim.create_optimizer_v2(model, base, **given)
    assert type(made) is kind
    assert made.rho == 0.3
    assert made._surroundings.model is model
    assert type(made.base_optimizer) is type(plain)
    assert made.defaults == plain.defaults
    assert [group["weight_decay"] for group in made.param_groups] == [0.0, 0.01]


def test_the_base_is_sgd_with_the_rest_of_timms_defaults(timm):
    register()
    made = timm.optim.create_optimizer_v2(network().parameters(), "flatmin_sam", lr=0.1)
    assert type(made.base_optimizer) is torch.optim.SGD
    assert made.defaults["nesterov"]
    assert made.defaults["momentum"] == 0.9
    assert made._surroundings.model is None


@pytest.mark.parametrize(
    "name", ["flatmin_look_sam", "flatmin_friendly_sam", "adamw_sam", "flatmin_adamw_msam", "x_sam"]
)
def test_a_name_of_which_timm_reads_the_end_alone_is_refused(timm, name):
    register()
    with pytest.raises(InvalidArgumentError, match=f"'{name}' what follows .* flatmin_looksam.* base='adamw'"):
        timm.optim.create_optimizer_v2(network(), name, lr=0.1)


@pytest.mark.parametrize("base", ["flatmin_sam", "msam", torch.optim.SGD])
def test_a_base_that_is_none_of_timms_is_refused(timm, base):
    register()
    with pytest.raises(InvalidArgumentError, match="plain optimizers, such as 'sgd'"):
        timm.optim.create_optimizer_v2(network(), "flatmin_sam", lr=0.1, base=base)
    with pytest.raises(ValueError, match="Optimizer adamm not found"):
        timm.optim.create_optimizer_v2(network(), "flatmin_sam", lr=0.1, base="adamm")


@pytest.mark.parametrize("name", NAMES)
def test_a_base_with_lookahead_is_refused_which_goes_around_all(timm, name):
    register()
    with pytest.raises(InvalidArgumentError, match=f"as in 'lookahead_{name}' with base='adamw'"):
        timm.optim.create_optimizer_v2(network(), name, lr=0.1, base="Lookahead_adamw")
    around = timm.optim.create_optimizer_v2(network(), f"lookahead_{name}", lr=0.1, base="adamw")
    assert type(around) is timm.optim.Lookahead
    assert type(around._base_optimizer.base_optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("name", NAMES)
def test_a_base_that_takes_second_derivatives_is_refused(timm, name):
    register()
    with pytest.raises(InvalidArgumentError, match="base must not be 'adahessian', which takes derivatives"):
        timm.optim.create_optimizer_v2(network(), name, lr=0.1, base="adahessian")


def test_an_optimizer_of_timms_own_is_not_replaced(timm):
    timm.optim._optim_factory.default_registry.register(timm.optim.OptimInfo("msam", torch.optim.SGD))
    with pytest.raises(InvalidArgumentError, match="timm has an optimizer 'msam' already"):
        register()


def test_the_network_does_not_have_to_be_that_of_the_parameters(timm):
    register()
    model = network()
    made = timm.optim.create_optimizer_v2(model.parameters(), "flatmin_msam", lr=0.1, model=model)
    assert made._surroundings.model is model


@pytest.mark.parametrize("base", ["adopt", "lamb", "laprop", "lion", "muon", "nadamw", "rmsproptf", "sgdw"])
def test_msam_finds_the_momentum_of_timms_own_optimizers(timm, base):
    register()
    model = network()
    optimizer = timm.optim.create_optimizer_v2(model, "flatmin_msam", lr=0.01, base=base, rho=0.5)
    moved = []
    for x, y in batches(4):
        before = weights(model)
        loss = F.cross_entropy(model(x), y)
        moved.append((weights(model) - before).norm().item())  # until backward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert moved[0] == 0
    assert moved[-1] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "kind"), [("flatmin_msam", flatmin.MSAM), ("flatmin_s2sam", flatmin.S2SAM)])
def test_one_pass_methods_in_timms_loop_are_those_of_an_own_loop(timm, name, kind, accumulate):
    register()
    model, other = network(), network()
    task = timm.task.ClassificationTask(model, nn.CrossEntropyLoss())
    train(task, timm.optim.create_optimizer_v2(model, name, lr=0.1, rho=0.5), batches(8), accumulate=accumulate)
    optimizer = kind(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, nesterov=True), rho=0.5)
    for window in zip(*[iter(batches(8))] * accumulate, strict=True):

        def closure(window=window):
            optimizer.zero_grad()
            for x, y in window:
                (F.cross_entropy(other(x), y) / accumulate).backward()

        optimizer.step(closure)
    plain = network()
    train(
        timm.task.ClassificationTask(plain, nn.CrossEntropyLoss()),
        timm.optim.create_optimizer_v2(plain, "sgd", lr=0.1),
        batches(8),
        accumulate=accumulate,
    )
    assert torch.allclose(weights(model), weights(other), atol=1e-6)
    assert (weights(model) - weights(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["flatmin_msam", "flatmin_s2sam", "lookahead_flatmin_msam"])
def test_one_pass_methods_work_with_timms_scaler(timm, name):
    register()
    found = []
    for scaler in (None, timm.utils.NativeScaler("cpu")):
        model = network()
        task = timm.task.ClassificationTask(model, nn.CrossEntropyLoss())
        train(task, timm.optim.create_optimizer_v2(model, name, lr=0.1, rho=0.5), batches(), scaler=scaler)
        found.append(weights(model))
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("flatmin_msam", "flatmin_s2sam")])
@pytest.mark.parametrize("scaled", [False, True])
def test_methods_of_two_passes_say_what_to_do_in_timms_loop(timm, name, scaled):
    register()
    model = network()
    optimizer = timm.optim.create_optimizer_v2(model, name, lr=0.1)
    scaler = timm.utils.NativeScaler("cpu") if scaled else None
    says = "needs a closure" if name == "flatmin_esam" else r"needs a closure.*--opt flatmin_msam or flatmin_s2sam"
    with pytest.raises(InvalidArgumentError, match=says):
        train(timm.task.ClassificationTask(model, nn.CrossEntropyLoss()), optimizer, batches(1), scaler=scaler)


def test_only_where_a_test_asks_for_timm_is_it_seen():
    with _timm.importable():
        assert find_spec("torchvision")
    assert find_spec("timm") is find_spec("torchvision") is None


def test_without_timm_a_sentence_says_what_to_install():
    assert "timm" not in sys.modules
    for call in (register, lambda: MESATask(network(), nn.CrossEntropyLoss())):
        with pytest.raises(MissingDependencyError, match=r"pip install 'flatmin\[timm\]'"):
            call()


# The task


def mesa_task(model, **options):
    return MESATask(model, nn.CrossEntropyLoss(), coefficient=1.5, temperature=2.0, **options)


@pytest.mark.parametrize("start", [0, 3])
def test_the_task_is_mesa_by_hand_against_timms_average(timm, start):
    model, other = network(), network()
    task = mesa_task(model, start_update=start)
    assert isinstance(task, timm.task.ClassificationTask)
    task.setup_ema(decay=0.9)
    losses = train(task, torch.optim.SGD(model.parameters(), lr=0.5), batches())

    average = timm.utils.ModelEmaV3(other, decay=0.9)
    optimizer, expected, penalties = torch.optim.SGD(other.parameters(), lr=0.5), [], []
    for number, (x, y) in enumerate(batches()):
        logits = other(x)
        with torch.no_grad():
            target = F.softmax(average(x) / 2, dim=1)
        penalty = 1.5 * 4 * F.kl_div(F.log_softmax(logits / 2, dim=1), target, reduction="batchmean")
        penalties.append(penalty.item())
        loss = F.cross_entropy(logits, y) + (penalty if number >= start else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(other, step=number + 1)
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(weights(model), weights(other), atol=1e-6)
    assert max(penalties[start:]) > 0.01


def test_there_is_one_average_and_it_is_timms(timm):
    model = network()
    task = mesa_task(model)
    average = task.setup_ema(decay=0.9)
    assert task.mesa.average is average is task.trainable_module_ema
    copies = [m for m in task.modules() if type(m) is nn.Sequential]
    assert len(copies) == 2
    assert {*task.get_checkpoint_state(), *task.get_checkpoint_state(ema=True)} == {
        "state_dict", "task_state", "state_dict_ema",
    }  # fmt: skip


def test_a_run_that_is_resumed_as_train_py_does_goes_on_exactly(timm, tmp_path):
    def run(steps, resume=None, start=0):
        model = network()
        task = mesa_task(model, start_update=2, fraction=0.5, interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        if resume:  # before there is an average
            task.load_checkpoint_state(resume["state_dict"], resume["task_state"])
            optimizer.load_state_dict(resume["optimizer"])
        task.setup_ema(decay=0.9)
        if resume:
            task.load_checkpoint_state(resume["state_dict_ema"], resume.get("task_state_ema"), ema=True)
        losses = train(task, optimizer, steps, start=start)
        path = tmp_path / "last.pth.tar"
        state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
        torch.save({**state, "optimizer": optimizer.state_dict()}, path)
        return losses, torch.load(path, weights_only=True), weights(model)

    torch.manual_seed(3)
    steps = batches(9)
    whole, _, expected = run(steps)
    first, checkpoint, _ = run(steps[:5])
    rest, _, resumed = run(steps[5:], checkpoint, start=5)
    assert first + rest == whole
    assert torch.equal(resumed, expected)
    without = {key: value for key, value in checkpoint.items() if key != "task_state"}
    assert run(steps[5:], {**without, "task_state": None}, start=5)[0] != rest


def test_a_state_is_loaded_into_a_task_with_an_average_too_and_one_without_leaves_it(timm):
    task, other = mesa_task(network()), mesa_task(network())
    task.setup_ema()
    other.setup_ema()
    for _ in range(3):
        task.update_ema()
    other.load_task_state(task.get_task_state())
    assert other.mesa._epoch == task.mesa._epoch == 3
    other.load_task_state(None)
    other.load_task_state({}, ema=True)
    assert other.mesa._epoch == 3


def test_all_ranks_begin_with_the_first_ones_average_as_with_its_network(timm, monkeypatch):
    """Timm's train.py draws other weights on each rank, and makes the average before DDP gives all the first one's."""
    first, here = network(), network()
    with torch.no_grad():
        [parameter.add_(1) for parameter in here.parameters()]

    class Wrapping(timm.task.ClassificationTask):
        def prepare_distributed(self, **options):
            self.trainable_module.load_state_dict(first.state_dict())
            return self

    class Mine(MESATask, Wrapping):
        pass

    def broadcast(group, tensors, size, rank):
        [to.copy_(sent) for to, sent in zip(tensors, [*first.parameters(), *first.buffers()], strict=True)]

    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_group", lambda: None)
    monkeypatch.setattr("torch.distributed._broadcast_coalesced", broadcast)
    monkeypatch.setattr("flatmin._distributed.size", lambda: 2)
    task = Mine(here, nn.CrossEntropyLoss(), start_update=0)
    average = task.setup_ema(decay=0.9)
    assert task.prepare_distributed() is task
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in average.module.state_dict().items())


def test_evaluation_has_no_penalty(timm):
    task = mesa_task(network())
    x, y = batches(1)[0]
    task.trainable_module.eval()
    assert set(task(x, y)) == {"loss", "output"}
    task.trainable_module.train()
    with torch.no_grad():
        assert set(task(x, y)) == {"loss", "output"}


def test_msam_and_the_task_go_together(timm):
    """Both at once are both by hand: the average is of the clean weights, and is run as it is."""
    register()
    model, other = network(), network()
    task = mesa_task(model)
    optimizer = timm.optim.create_optimizer_v2(model, "flatmin_msam", lr=0.1, base="momentum", rho=0.5)
    task.setup_ema(decay=0.9)  # a copy of a network with hooks
    train(task, optimizer, batches())
    average = timm.utils.ModelEmaV3(other, decay=0.9)
    by_hand = flatmin.MSAM(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), rho=0.5)
    for number, (x, y) in enumerate(batches()):

        def closure(x=x, y=y):
            by_hand.zero_grad()
            logits = other(x)
            with torch.no_grad():
                target = F.softmax(average(x) / 2, dim=1)
            penalty = 1.5 * 4 * F.kl_div(F.log_softmax(logits / 2, dim=1), target, reduction="batchmean")
            (F.cross_entropy(logits, y) + penalty).backward()

        by_hand.step(closure)
        average.update(other, step=number + 1)
    assert torch.allclose(weights(model), weights(other), atol=1e-6)
    x = batches(1)[0][0]
    assert torch.allclose(task.get_eval_model(ema=True)(x), average(x), atol=1e-6)


def distillation(timm, name, **options):
    """A task of timm's with a teacher, and MESA."""

    def made(model, dim):
        torch.manual_seed(dim)
        return timm.create_model(model, num_classes=C, img_size=16, patch_size=8, embed_dim=dim, depth=1, num_heads=2)

    kind = type("Mine", (MESATask, getattr(timm.task, name)), {})
    student = made("deit_tiny_distilled_patch16_224" if name == "TokenDistillationTask" else "test_vit", 12)
    return kind(student, made("test_vit", 16), nn.CrossEntropyLoss(), **options)


@pytest.mark.parametrize(
    ("name", "state"), [("LogitDistillationTask", {"mesa"}), ("FeatureDistillationTask", {"mesa", "projection"})]
)
def test_as_a_mixin_it_adds_mesa_to_timms_other_tasks(timm, name, state):
    task = distillation(timm, name, coefficient=1.5, temperature=2.0)
    task.setup_ema(decay=0.9)
    task.train()
    with torch.no_grad():
        [parameter.mul_(3) for parameter in task.get_trainable_module().parameters()]
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % C
    result = task(x, y)
    target = F.softmax(task.get_eval_model(ema=True)(x) / 2, dim=1)
    expected = 6 * F.kl_div(F.log_softmax(result["output"] / 2, dim=1), target, reduction="batchmean")
    assert expected > 0.01
    assert result["mesa_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    rest = result["loss"] - result["mesa_loss"]
    assert rest.item() == pytest.approx((result["task_loss"] + result["kd_loss"]).item(), rel=1e-4)
    assert set(task.get_task_state()) == state
    other = copy.deepcopy(task)
    other.mesa.set_epoch(7)
    task.load_task_state(other.get_task_state())
    assert task.mesa._epoch == 7


def test_a_task_whose_average_has_other_logits_is_refused(timm):
    with pytest.raises(InvalidArgumentError, match=r"two heads apart in training.*take LogitDistillationTask"):
        distillation(timm, "TokenDistillationTask")


def test_a_task_of_several_labels_takes_the_sigmoid(timm):
    if not hasattr(timm.task, "MultiLabelClassificationTask"):
        pytest.skip("an older timm has no such task")

    class Mine(MESATask, timm.task.MultiLabelClassificationTask):
        pass

    with pytest.raises(InvalidArgumentError, match=r"Mine has several labels a sample.*write link='sigmoid'"):
        Mine(network())
    task = Mine(network(), link="sigmoid")
    task.setup_ema()
    x, y = batches(1)[0]
    assert "mesa_loss" in task(x, F.one_hot(y, C).float())


def test_a_task_without_an_average_says_so(timm):
    with pytest.raises(InvalidArgumentError, match=r"setup_ema.*--model-ema"):
        mesa_task(network())(*batches(1)[0])


def test_an_average_on_another_device_is_refused(timm):
    class Elsewhere(timm.task.ClassificationTask):
        def setup_ema(self, **options):
            return super().setup_ema(**options).to("meta")

    class Mine(MESATask, Elsewhere):
        pass

    with pytest.raises(InvalidArgumentError, match=r"on meta, where MESA cannot run.*--model-ema-force-cpu"):
        Mine(network(), nn.CrossEntropyLoss()).setup_ema(decay=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_update": -1}, "start_update"),
        ({"coefficient": -1.0}, "coefficient"),
        ({"temperature": 0.0}, "temperature"),
        ({"link": "probit"}, "link"),
        ({"interval": 0}, "interval"),
        ({"autocast": torch.float64}, "autocast"),
    ],
)
def test_arguments_are_checked_when_the_task_is_made(timm, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        MESATask(network(), nn.CrossEntropyLoss(), **options)


def test_a_loop_that_never_moves_the_average_is_told_so_once(timm):
    task = mesa_task(nn.Linear(5, C))
    task.setup_ema()
    x, y = torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)
    task.mesa.coefficient = 0.0  # to be quick
    with pytest.warns(FlatminWarning, match="1000 training passes since its average was moved") as found:
        [task(x, y) for _ in range(1001)]
    assert [warning.filename for warning in found] == [__file__]


# Presets


def by_hand(name, logits, target):
    """The loss of the authors' code for a network's logits and its average's."""
    family = name.rpartition("_")[0]
    mesa = {"faster_vit_0": 0.1, "mambavision_large": 6.0, "efficientvit_l2": 2.75, "mila_small": 1.5, "vssd_base": 2.0}
    if family in ("faster_vit", "mambavision"):
        p, q = F.log_softmax(logits / 3, dim=1), F.softmax(target / 3, dim=1)
        return mesa[name] * 50.0 * nn.KLDivLoss(reduction="batchmean")(p, q)
    if family == "efficientvit":
        return mesa[name] * nn.BCEWithLogitsLoss()(logits, torch.sigmoid(target))
    return mesa[name] * torch.sum(-target.softmax(dim=-1) * F.log_softmax(logits, dim=-1), dim=-1).mean()


@pytest.mark.parametrize("name", ["faster_vit_0", "mambavision_large", "efficientvit_l2", "mila_small", "vssd_base"])
def test_a_presets_loss_has_the_gradient_of_the_authors_code(name):
    model, average = nn.Linear(5, C), nn.Linear(5, C)
    x = torch.randn(8, 5)
    found = preset(name)
    mesa = flatmin.MESA(model, average=average, **found.loss)
    mesa.set_epoch(found.start_epoch)
    logits = model(x)
    (ours,) = torch.autograd.grad(mesa(logits, x), logits)
    logits = model(x)
    (theirs,) = torch.autograd.grad(by_hand(name, logits, average(x).detach()), logits)
    assert theirs.abs().max() > 1e-4
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_what_it_is_for(timm, name):
    found = preset(name)
    assert found.name == name
    assert found.source
    assert 0 < found.start_epoch < found.epochs
    if found.method == "saf":
        assert flatmin.SAF(10, C, **found.loss).coefficient == found.coefficient
        with pytest.raises(InvalidArgumentError, match=r"make flatmin\.SAF"):
            found.task(100)
        with pytest.raises(InvalidArgumentError, match=r"make flatmin\.SAF"):
            found.decay_at(100)
    else:
        flatmin.MESA(network(), decay=found.decay, **found.loss)
        task = MESATask(network(), nn.CrossEntropyLoss(), **found.task(updates_per_epoch=100))
        task.setup_ema(decay=found.decay)
        assert task.mesa.start_epoch == 100 * found.start_epoch
        steps = integration._presets.IMAGES / found.batch
        assert 1 - found.decay_at(round(steps)) == pytest.approx(1 - found.decay, rel=2e-3)
    if found.optimizer:
        timm.optim.create_optimizer_v2(network(), **found.optimizer)


def test_the_papers_settings_are_those_of_the_paper():
    saf, mesa = preset("paper_saf_resnet"), preset("paper_mesa_vit_small_patch32")
    assert saf.loss == {"coefficient": 0.3, "temperature": 5.0, "start_epoch": 5, "lag": 3}
    assert (saf.epochs, saf.batch, dict(saf.optimizer)) == (90, 4096, {"opt": "momentum", "lr": 1.4, "momentum": 0.9})
    assert mesa.loss == {"coefficient": 0.8, "temperature": 5.0, "start_epoch": 5, "link": "softmax"}
    assert (mesa.epochs, mesa.decay) == (300, 0.9998)


def test_a_shorter_training_starts_after_the_same_share_and_the_papers_after_five_epochs():
    assert preset("mila_tiny", epochs=100).start_epoch == 25
    assert preset("faster_vit_3", epochs=31).start_epoch == 9
    assert preset("paper_saf_resnet", epochs=200).start_epoch == 5
    with pytest.raises(InvalidArgumentError, match="epochs"):
        preset("mila_tiny", epochs=0)


def test_an_unknown_preset_is_named_with_what_there_is():
    with pytest.raises(InvalidArgumentError, match="mila_tiny"):
        preset("mila_tinny")


# The page


def test_the_code_of_the_page_trains(timm):
    page = (Path(__file__).parents[2] / "docs" / "plug-in" / "timm.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 1
    names = {"model": network(), "criterion": nn.CrossEntropyLoss()}
    exec(blocks[0], names)
    train(names["task"], names["optimizer"], batches(2))
    assert names["optimizer"].state_dict()["flatmin"]["step"] == 2
    assert (names["task"].mesa.start_epoch, names["task"].mesa._epoch) == (25 * 1251, 2)


# Indices


class Images(torch.utils.data.Dataset):
    """Each image is its index everywhere; read through ``transform``, as timm's data sets are."""

    transform = None

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.transform(Image.new("L", (2, 2), i)), i % C


def loader(timm, dataset, **options):
    return timm.data.create_loader(
        dataset, (1, 2, 2), 5, True, no_aug=True, mean=(0.0,), std=(1 / 255,), num_workers=0,
        device=torch.device("cpu"), **options,
    )  # fmt: skip


@pytest.mark.parametrize("dataset", [Images, lambda: flatmin.indexed(Images())], ids=["plain", "indexed"])
def test_indices_come_through_timms_loader_without_its_prefetcher(timm, dataset):
    seen = 0
    for index, (x, y) in flatmin.with_indices(loader(timm, dataset(), use_prefetcher=False)):
        assert torch.equal(x[:, 0, 0, 0].round().long(), index)
        assert torch.equal(y, index % C)
        seen += len(index)
    assert seen == 20
    with pytest.raises(InvalidArgumentError, match=r"create_loader\(\.\.\., use_prefetcher=False\)"):
        flatmin.with_indices(loader(timm, dataset()))

"""Ninety experiment files with a mistake each: one line that names the function, exit code 2, no run left.

Each is given to the command and to `lab.train`, which must say the same; a few to `compare`, whose processes meet it.
"""

import math
from pathlib import Path

import pytest
import torch

from flatmin import lab
from flatmin.errors import DivergedError, ExperimentError, FlatminError
from tests.fuzz.harness import command, guarded, left, report

GOOD = {
    "imports": "import sys, os, math, torch\nfrom torch import nn\nfrom torch.utils.data import Dataset, TensorDataset",
    "data": """
def _x(seed, n=20): return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
def _set(seed):
    x = _x(seed)
    return TensorDataset(x, x[:, :3].argmax(dim=1))
class Own(Dataset):
    def __init__(self, seed): self.x = _x(seed)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], int(self.x[i, :3].argmax())
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls = 0
    def forward(self, x): return self.layer(x)
""",
    "model": "def model(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))",
    "train_set": "def train_set(): return _set(1)",
    "test_set": "def test_set(): return _set(2)",
}


def own(body, name="train_set"):
    """A data set of its own class with another method."""
    return {name: f"class Bad_{name}(Own):\n    {body}\ndef {name}(): return Bad_{name}(3)"}


def net(body):
    """A network with another forward."""
    return {"model": f"class Bad(Net):\n    def forward(self, x):\n        {body}\ndef model(): return Bad()"}


def criterion(value):
    """A criterion of one expression."""
    return {"criterion": f"def criterion(): return lambda logits, y: {value}"}


def optimizer(value):
    """An optimizer of one expression."""
    return {"optimizer": f"def optimizer(parameters): return {value}"}


GET, LEN = "def __getitem__(self, i): ", "def __len__(self): "
FILES = {
    # the file itself
    "empty": ({"imports": "", "model": "", "data": "", "train_set": "", "test_set": ""}, "no function model()"),
    "syntax": ({"model": "def model(: pass"}, "SyntaxError"),
    "exit_import": ({"model": "sys.exit(0)"}, "sys.exit(0) was called (in the file itself)"),
    "exit_import_bare": ({"model": "sys.exit()"}, "sys.exit() was called"),
    "exit_import_text": ({"model": "sys.exit('bye')"}, "sys.exit('bye') was called"),
    "raise_import": ({"model": "raise RuntimeError('no\\nluck')"}, "RuntimeError: no luck (in the file itself)"),
    "base_exception": ({"model": "class E(BaseException): pass\nraise E('odd')"}, "E: odd (in the file itself)"),
    "recursion": ({"model": "def model(): return model()"}, "RecursionError"),
    "null_byte": ({"model": "x = '\0'"}, "null bytes"),
    # model()
    "no_model": ({"model": ""}, "no function model()"),
    "model_none": ({"model": "def model(): pass"}, "model() must return a torch.nn.Module, got NoneType"),
    "model_class": ({"model": "def model(): return Net"}, "model() must return a torch.nn.Module, got type"),
    "model_args": ({"model": "def model(size): return Net()"}, "(in model()"),
    "model_exit": ({"model": "def model(): sys.exit(0)"}, "sys.exit(0) was called (in model()"),
    "model_exit_later": (
        {"model": "made = []\ndef model():\n    made.append(0)\n    return Net() if len(made) < 2 else sys.exit(0)"},
        "sys.exit(0) was called (in model()",
    ),
    "model_no_parameters": ({"model": "def model(): return nn.Threshold(9., 1.)"}, "without parameters"),
    "model_frozen": ({"model": "def model(): return Net().requires_grad_(False)"}, "all frozen"),
    "model_number": ({"model": "def model(): return nn.Linear(4, 1)"}, "must return logits of shape (batch, classes)"),
    "model_wrong_in": ({"model": "def model(): return nn.Linear(5, 3)"}, "(in the network of model())"),
    "model_dtype": ({"model": "def model(): return Net().double()"}, "(in the network of model())"),
    "model_images": ({"model": "def model(): return nn.Conv2d(1, 3, 3)"}, "(in the network of model())"),
    "model_tuple": (net("return self.layer(x), x"), "must return logits of shape (batch, classes), got tuple"),
    "model_dict": (net("return {'logits': self.layer(x)}"), "must return logits of shape (batch, classes), got dict"),
    "model_3d": (net("return self.layer(x)[:, :, None]"), "must return logits of shape (batch, classes)"),
    "model_flat": (net("return self.layer(x).flatten()[None]"), "must return logits of shape (batch, classes)"),
    "model_eval_only": (net("return self.layer(x)[:, :3 - self.training]"), "here (16, 3), got (16, 2)"),
    "model_detached": (net("return self.layer(x).detach()"), "logits without a gradient"),
    "forward_raises": (net("raise ValueError('no')"), "ValueError: no (in the network of model())"),
    "forward_late": (
        net("self.calls += 1\n        assert self.calls < 3, 'third'\n        return self.layer(x)"),
        "AssertionError: third (in the network of model())",
    ),
    "forward_train": (net("assert not self.training, 'training'\n        return self.layer(x)"), "AssertionError"),
    "forward_exit": (net("sys.exit(0)"), "sys.exit(0) was called (in the network of model())"),
    "forward_exit_train": (net("return sys.exit(0) if self.training else self.layer(x)"), "sys.exit(0) was called"),
    "backward_raises": (
        {
            "model": "class F(torch.autograd.Function):\n"
            "    @staticmethod\n    def forward(c, x): return x.clone()\n"
            "    @staticmethod\n    def backward(c, g): raise RuntimeError('backwards')\n"
            "class Bad(Net):\n    def forward(self, x): return F.apply(self.layer(x))\ndef model(): return Bad()"
        },
        "RuntimeError: backwards (in a training step",
    ),
    # train_set(), test_set()
    "train_none": ({"train_set": "def train_set(): pass"}, "train_set() must return a map-style data set"),
    "train_iterable": (
        {
            "train_set": "class It(torch.utils.data.IterableDataset):\n    def __iter__(self): yield 1\n"
            "def train_set(): return It()"
        },
        "train_set() must return a map-style",
    ),
    "train_loader": (
        {"train_set": "def train_set(): return torch.utils.data.DataLoader(_set(1))"},
        "train_set() must return a map-style",
    ),
    "train_generator": ({"train_set": "def train_set(): yield 1"}, "train_set() must return a map-style data set"),
    "train_dict": ({"train_set": "def train_set(): return {'x': 1, 'y': 2}"}, "data set of train_set()"),
    "train_exit": ({"train_set": "def train_set(): sys.exit(7)"}, "sys.exit(7) was called (in train_set()"),
    "test_exit": ({"test_set": "def test_set(): sys.exit(0)"}, "sys.exit(0) was called (in test_set()"),
    "train_one": ({"train_set": "def train_set(): return [(_x(1)[0], 0)]"}, "at least two are needed"),
    "test_empty": ({"test_set": "def test_set(): return []"}, "test_set() returned an empty data set"),
    "len_raises": (own(LEN + "raise OSError('gone')"), "OSError: gone (in the data set of train_set()"),
    "len_negative": (own(LEN + "return -3"), "(in the data set of train_set()"),
    "len_float": (own(LEN + "return 3.5"), "(in the data set of train_set()"),
    "len_none": (own(LEN + "return None", "test_set"), "(in the data set of test_set()"),
    "len_huge": (own(LEN + "return 10**30"), "(in the data set of train_set()"),
    "len_lies": (own(LEN + "return 25"), "IndexError"),
    "len_lies_test": (own(LEN + "return 25", "test_set"), "(in the data set of test_set(), which must have samples"),
    "len_exit": (own(LEN + "sys.exit(0)"), "sys.exit(0) was called (in the data set of train_set()"),
    "get_raises": (own(GET + "raise KeyError('x')"), "KeyError: 'x' (in the data set of train_set()"),
    "get_raises_late": (own(GET + "return (self.x[i], 0) if i != 11 else 1 / 0"), "ZeroDivisionError"),
    "get_raises_test": (own(GET + "raise KeyError('x')", "test_set"), "(in the data set of test_set()"),
    "get_exit": (own(GET + "sys.exit(0)"), "sys.exit(0) was called (in the data set of train_set()"),
    "get_exit_late": (own(GET + "return (self.x[i], 0) if i != 11 else sys.exit(0)"), "sys.exit(0) was called"),
    "get_exit_test": (own(GET + "sys.exit(0)", "test_set"), "sys.exit(0) was called (in the data set of test_set()"),
    "get_none": (own(GET + "return None"), "(in the data set of train_set()"),
    "get_alone": (own(GET + "return self.x[i]"), "a sample must be a pair (x, y)"),
    "get_three": (own(GET + "return self.x[i], 0, 1"), "a sample must be a pair (x, y)"),
    "get_three_late": (own(GET + "return (self.x[i], 0) if i in (0, 1, 19) else (self.x[i], 0, 1)"), "the data set of"),
    "get_dict": (own(GET + "return {'x': self.x[i], 'y': 0}"), "a sample must be a pair (x, y)"),
    "get_text": (own(GET + "return 'abc', 0"), "a sample must be a pair (x, y)"),
    "get_object": (own(GET + "return object(), 0"), "(in the data set of train_set()"),
    "getitems_short": (
        own("def __getitems__(self, i): return [self[j] for j in i[1:]]"),
        "__getitems__ of 2 indices returned 1 samples",
    ),
    "getitems_raises": (own("def __getitems__(self, i): raise KeyError('many')"), "KeyError: 'many'"),
    "ragged": (own(GET + "return self.x[i][:3 + i % 2], 0"), "which must have samples (x, y) of one shape"),
    "ragged_late": (own(GET + "return self.x[i][:4 - (i == 11)], 0"), "which must have samples (x, y) of one shape"),
    "ragged_test": (own(GET + "return self.x[i][:4 - (i == 11)], 0", "test_set"), "the data set of test_set()"),
    "test_shape": (
        {"test_set": "def test_set(): return TensorDataset(_x(1)[:, :3], torch.zeros(20).long())"},
        "test_set() has samples of shape (3,), train_set() of (4,)",
    ),
    "test_dtype": (
        {"test_set": "def test_set(): return TensorDataset(_x(1).double(), torch.zeros(20).long())"},
        "(in the network of model())",
    ),
    "test_label": (
        {"test_set": "def test_set(): return TensorDataset(_x(1), torch.arange(20))"},
        "the data set of test_set(): a label is outside the 3 classes: 19",
    ),
    "train_label": (
        {"train_set": "def train_set(): return TensorDataset(_x(1), torch.arange(20) - 1)"},
        "the data set of train_set(): a label is outside the 3 classes: -1",
    ),
    "label_late": (own(GET + "return self.x[i], 7 * (i == 11)"), "a label is outside the 3 classes: 7"),
    "label_float": (
        {"train_set": "def train_set(): return TensorDataset(_x(1), torch.zeros(20))"},
        "the data set of train_set(): labels must be class indices",
    ),
    "label_column": (
        {"train_set": "def train_set(): return TensorDataset(_x(1), torch.zeros(20, 1).long())"},
        "labels must be class indices",
    ),
    "label_text": (own(GET + "return self.x[i], 'cat'"), "labels must be class indices"),
    "label_none": (own(GET + "return self.x[i], None"), "(in the data set of train_set()"),
    # criterion()
    "criterion_none": ({"criterion": "criterion = None"}, "(in criterion(), which must return a function"),
    "criterion_number": ({"criterion": "def criterion(): return 3"}, "criterion() must return a function"),
    "criterion_instance": ({"criterion": "criterion = nn.CrossEntropyLoss()"}, "(in criterion(), which must return"),
    "criterion_exit": ({"criterion": "def criterion(): sys.exit(0)"}, "sys.exit(0) was called (in criterion()"),
    "criterion_raises": (criterion("1 / 0"), "ZeroDivisionError: division by zero (in the function of criterion())"),
    "criterion_vector": (criterion("(logits ** 2).sum(dim=1)"), "got one of shape (16,)"),
    "criterion_float": (criterion("1.5"), "must return the mean loss of the batch, a tensor of shape () made from"),
    "criterion_item": (criterion("logits.sum().item()"), "got a float"),
    "criterion_none_later": (criterion("None"), "got a NoneType"),
    "criterion_constant": (criterion("torch.tensor(1.0)"), "does not follow from them, a constant"),
    "criterion_detached": (criterion("logits.sum().detach()"), "does not follow from them, a constant"),
    "criterion_exits": (criterion("sys.exit(0)"), "sys.exit(0) was called (in the function of criterion())"),
    "criterion_one_argument": ({"criterion": "def criterion(): return lambda x: x.sum()"}, "function of criterion()"),
    # optimizer(parameters)
    "optimizer_none": (optimizer("None"), "optimizer(parameters) must return a torch optimizer, got None"),
    "optimizer_class": (optimizer("torch.optim.SGD"), "optimizer(parameters) must return a torch optimizer"),
    "optimizer_exit": (optimizer("sys.exit(0)"), "sys.exit(0) was called (in optimizer(parameters)"),
    "optimizer_raises": (optimizer("torch.optim.SGD(parameters, lr=-1)"), "(in optimizer(parameters)"),
    "optimizer_twice": (
        {"optimizer": "def optimizer(parameters):\n    list(parameters)\n    return torch.optim.SGD(parameters, lr=1)"},
        "empty parameter list (in optimizer(parameters)",
    ),
    "optimizer_foreign": (
        optimizer("torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)"),
        "none of the network's weights, so nothing would be trained",
    ),
    "optimizer_some_foreign": (
        optimizer("torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(1))], lr=0.1)"),
        "with 1 of its tensors none of the network's",
    ),
    "optimizer_lbfgs": (optimizer("torch.optim.LBFGS(parameters)"), "calls the closure as often as it likes"),
    "optimizer_sparse": (optimizer("torch.optim.SparseAdam(parameters)"), "the optimizer of optimizer(parameters)"),
    "optimizer_no_lr": (
        {"optimizer": "class O(torch.optim.Optimizer):\n    def step(self, closure=None): pass\n"
         "def optimizer(parameters): return O(parameters, {})"},
        "KeyError: 'lr' (in the optimizer of optimizer(parameters))",
    ),
    "optimizer_step_raises": (
        {"optimizer": "class O(torch.optim.SGD):\n    def step(self, closure=None): raise OSError('stepped')\n"
         "def optimizer(parameters): return O(parameters, lr=0.1)"},
        "OSError: stepped (in the optimizer of optimizer(parameters))",
    ),
    "optimizer_step_exits": (
        {"optimizer": "class O(torch.optim.SGD):\n    def step(self, closure=None): sys.exit(0)\n"
         "def optimizer(parameters): return O(parameters, lr=0.1)"},
        "sys.exit(0) was called (in the optimizer",
    ),
    "sparse_gradients": (
        {
            "model": "class E(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.e = nn.Embedding(9, 3, sparse=True)\n"
            "    def forward(self, x): return self.e(x.long().clamp(0, 8)).mean(dim=1)\ndef model(): return E()"
        },
        "sparse",
    ),
}  # fmt: skip
NEVER_FINITE = {
    "nan_weights": {
        "model": "def model():\n    m = Net()\n    nn.init.constant_(m.layer.weight, math.nan)\n    return m"
    },
    "nan_data": {"train_set": "def train_set(): return TensorDataset(_x(1) * math.nan, torch.arange(20) % 3)"},
    "nan_forward": net("return self.layer(x) * (math.nan if self.training else 1)"),
    "nan_criterion": criterion("logits.sum() * math.nan"),
    "inf_criterion": criterion("logits.sum() * 0 + math.inf"),
}
OPTIONS = ["--epochs", 1, "--batch-size", 16, "--device", "cpu"]


def write(name, parts):
    path = Path(f"{name}_experiment.py")
    path.write_text("\n".join({**GOOD, **parts}.values()))
    return path.name


def tried(name, parts, said, method="base"):
    """What is wrong with what the command and `lab.train` say of a file."""
    path = write(name, parts)
    before = left()
    came = command("train", path, *OPTIONS, "--method", method, "--out", "run")
    yield came.fault(wrong=True, said=said, only=True)
    yield "" if left() == before else f"{name}: leaves {left() - before}"
    recipe = lab.Recipe(experiment=path, epochs=1, batch_size=16, device="cpu")
    error, fault = guarded(lambda: lab.train(recipe, method=method, out="run"))
    yield f"lab.train, {name}: {fault}" if fault else ""
    if not isinstance(error, FlatminError):
        yield f"lab.train, {name}: {error!r}, and no FlatminError"
    elif came.errors != [f"flatmin: {' '.join(str(error).split())}"]:
        yield f"lab.train, {name}: {error} is not {came.errors}"


def test_there_are_ninety():
    assert len(FILES) >= 90


@pytest.mark.parametrize("third", range(3))
def test_a_file_with_a_mistake_is_one_line(third):
    cases = [(name, *case) for name, case in FILES.items()][third::3]
    report([fault for case in cases for fault in tried(*case)])


@pytest.mark.parametrize("method", ["sam", "esam", "saf", "mesa", "lawa"])
def test_whatever_the_method(method, draw, times):
    names = [name for name in FILES if method != "esam" or not name.startswith("criterion")]  # refused with esam
    names = [name for name in names if name not in ("sparse_gradients", "optimizer_sparse", "forward_late")]
    chosen = {name: FILES[name] for name in draw.sample(names, min(6 * times, len(names)))}
    if method in ("sam", "esam"):  # whose step is passes and the optimizer's step
        for name in chosen.keys() & {"optimizer_step_raises", "optimizer_step_exits"}:
            parts, said = chosen[name]
            chosen[name] = parts, f"{said.partition(' (in ')[0]} (in a training step, in step())"
    report([fault for name, case in chosen.items() for fault in tried(name, *case, method=method)])


def test_in_a_loaders_worker_too():
    faults = []
    for name in ("get_exit_late", "ragged_late"):
        path = write(name, FILES[name][0])
        came = command("train", path, *OPTIONS, "--method", "base", "--workers", 1, "--out", "run")
        faults.append(came.fault(wrong=True, said=FILES[name][1], only=True))
    report(faults)


NO_WORKER = ("exit_import", "model_exit", "get_exit_late", "forward_exit_train", "ragged_late", "criterion_vector")


def test_the_comparison_says_it_too(times):
    """These before any process is started, since every row's steps are timed first."""
    faults = []
    for name in [*NO_WORKER, *(FILES if times > 1 else ())]:
        path = write(name, FILES[name][0])
        came = command("compare", path, *OPTIONS, "--methods", "base", "--seeds", 1, "--jobs", 1, "--minutes", 0.1)
        faults.append(came.fault(wrong=True, said=FILES[name][1]))
    report(faults)


def test_what_only_a_process_of_the_comparison_meets():
    body = (
        "import multiprocessing\ndef model():\n    multiprocessing.parent_process() and sys.exit(0)\n    return Net()"
    )
    path = write("worker", {"model": body})
    options = [*OPTIONS, "--methods", "base", "--seeds", 1, "--jobs", 1, "--minutes", 0.1, "--out", "run"]
    came = command("compare", path, *options, seconds=120)
    report([came.fault(wrong=True, said="sys.exit(0) was called (in model()")])
    assert not Path("run").exists()


@pytest.mark.parametrize("word", ["sharpness", "landscape"])
@pytest.mark.parametrize("body", ["raise KeyError('measured')", "sys.exit(0)"])
def test_what_only_a_measurement_meets(word, body):
    """Nothing is wrong until the run is finished, and then with large batches alone."""
    fails = f"os.path.exists('fail') and len(x) > 2 and exec({body!r})"
    path = write("measured", net(f"{fails}; return self.layer(x)"))
    assert command("train", path, *OPTIONS, "--method", "base", "--out", "run").code == 0
    Path("fail").touch()
    report([command(word, "run").fault(wrong=True, said="(in a measurement, in ")])


@pytest.mark.parametrize("method", ["base", "sam"])
def test_a_loss_that_is_never_finite_ends_the_run(method):
    said = "the loss was not finite in any of the first 2 steps, so nothing can be learnt: lower the learning rate"
    report([fault for name, parts in NEVER_FINITE.items() for fault in tried(name, parts, said, method)])


def test_one_that_is_finite_once_goes_on():
    once = "made = []\ndef criterion():\n    made.clear()\n    def loss(l, y):\n        made.append(0)\n"
    once += "        return l.sum() * (1 if len(made) < 2 else math.nan)\n    return loss"
    came = command("train", write("once", {"criterion": once}), *OPTIONS, "--method", "base", "--out", "run")
    report([came.fault(wrong=False)])
    assert "warning: the training has diverged" in came.err


def test_the_comparison_goes_on_without_the_row_that_is_never_finite():
    register = """
from flatmin.lab import methods
def assemble(given, settings):
    return methods.Assembled(given.optimizer, penalty=lambda logits, y, index, x: logits.sum() * math.nan)
methods.register(methods.Card("nans", "no loss at all", {}, assemble))
"""
    path = write("row", {"optimizer": register})
    options = [*OPTIONS, "--methods", "base,nans", "--seeds", 1, "--jobs", 1, "--minutes", 0.1, "--out", "run"]
    came = command("compare", path, *options, seconds=120)
    report([came.fault(wrong=False)])
    found = lab.results.read_comparison("run")
    assert [row.diverged for row in found.rows] == [0, 1]
    assert math.isnan(found.rows[0].accuracy.mean) is False
    assert "nans" in came.out
    assert "diverged" in came.out
    assert "diverged with some or all seeds" in came.err
    assert Path("run/runs/nans-seed0/metrics.jsonl").read_text().count("\n") == 1


def test_the_users_traceback_is_behind_debug():
    path = write("forward_raises", FILES["forward_raises"][0])
    plain, debugged = (command("train", path, *OPTIONS, *more, "--method", "base") for more in ([], ["--debug"]))
    assert "Traceback" not in plain.err
    assert "ValueError: no" in debugged.err
    assert "in forward" in debugged.err
    assert debugged.err.splitlines()[-1] == plain.err.splitlines()[-1]


def test_a_good_file_is_good_and_the_look_at_it_changes_no_number(monkeypatch):
    """A data set with a generator of its own, which every read moves."""
    noisy = own(
        "def __init__(self, seed):\n        super().__init__(seed)\n        self.g = torch.Generator().manual_seed(7)\n"
        "    def __getitem__(self, i):\n        return self.x[i] + torch.randn(4, generator=self.g), int(i % 3)"
    )
    path = write("noisy", {**noisy, "test_set": "def test_set(): return _shared\n_shared = Bad_train_set(5)"})
    recipe = lab.Recipe(experiment=path, epochs=2, batch_size=16, device="cpu")
    with_look = lab.train(recipe, method="base", out="one").metrics
    monkeypatch.setattr("flatmin.lab.problems.experiment._look_ahead", lambda *_: None)
    without = lab.train(recipe, method="base", out="two").metrics
    assert {**with_look, "seconds": 0} == {**without, "seconds": 0}


def test_the_errors_are_of_the_kinds_that_are_promised():
    with pytest.raises(ExperimentError):
        lab.train(lab.Recipe(experiment=write("kind", FILES["forward_raises"][0])), method="base")
    recipe = lab.Recipe(experiment=write("never", NEVER_FINITE["nan_data"]), epochs=1, batch_size=16, device="cpu")
    with pytest.raises(DivergedError) as caught:
        lab.train(recipe, method="base")
    assert math.isnan(caught.value.metrics["test_loss"])
    assert torch.get_num_threads() >= 1

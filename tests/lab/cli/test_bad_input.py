"""Every bad input gets one clear line and exit code 2, and leaves nothing half made."""

import struct
from pathlib import Path

import pytest

WRONG_VALUES = {
    "--method saff": "unknown method 'saff', did you mean saf?",
    "--method xyz": "there are base, smoothing, sam, sam_on, late_sam, ae_sam, asam, esam, gsam",
    "--model resnet19": "did you mean resnet18?",
    "--model wrn28-10": "did you mean wrn-28-10?",
    "--model cnn1d": "model 'cnn1d' takes signals, and the data 'digits' are images",
    "--data mnist": "unknown data 'mnist', did you mean mnist1d?",
    "--data digit": "unknown data 'digit', did you mean digits?",
    "--data ixd:folder": "did you mean idx?",
    "--coefficient -1": "coefficient must be a finite number >= 0, got -1.0",
    "--coefficient nan": "coefficient must be a finite number",
    "--temperature 0": "temperature must be a finite number > 0, got 0.0",
    "--lag 0": "lag must be an integer of at least 1, got 0",
    "--lag 1.5": "--lag",
    "--start-epoch -1": "start_epoch must be an integer of at least 0",
    "--method mesa --decay 0": "decay must be a finite number > 0 and < 1, got 0.0",
    "--method mesa --decay 1": "decay must be a finite number > 0 and < 1, got 1.0",
    "--method mesa --coefficient -1": "coefficient must be",
    "--method mesa --ema-epochs 0": "must be a finite number > 0, got 0.0",
    "--method mesa --ema-epochs 3 --decay 0.9": "ema_epochs and decay exclude each other",
    "--method sam --rho 0": "rho must be a finite number > 0, got 0.0",
    "--method sam --rho -0.1": "rho must be",
    "--method base --rho 0.1": "base has no hyperparameter 'rho'",
    "--smoothing 1": "smoothing must be a finite number >= 0 and < 1, got 1.0",
    "--label-noise 1": "label_noise must be a finite number >= 0 and < 1, got 1.0",
    "--epochs 0": "epochs must be an integer of at least 1, got 0",
    "--epochs many": "--epochs",
    "--batch-size 1": "batch_size must be an integer of at least 2",
    "--lr 0": "lr must be a finite number > 0",
    "--optimizer sdg": "unknown optimizer 'sdg', did you mean sgd?",
    "--precision float8": "there are float32, bfloat16",
    "--device cuda:99": "device 'cuda:99' cannot be used here",
    "--seed -1": "--seed",
    "--coefficent 1": "--coefficient",
    "nowhere.py": "nowhere.py: no such experiment file",
    "--data idx:nowhere": "no folder nowhere",
    "--data folder:nowhere": "no folder nowhere",
    "--data folder:empty": "empty has no class folders",
    "--data idx:empty": "empty has none of train-images-idx3-ubyte",
}


def one_line(found, *parts):
    """The command ended with exit code 2 and one line on stderr that has these parts."""
    assert found.code == 2
    assert len(found.err.splitlines()) == 1, found.err
    assert found.err.startswith("flatmin: ")
    for part in parts:
        assert part in found.err


@pytest.mark.parametrize(("options", "said"), WRONG_VALUES.items(), ids=WRONG_VALUES)
def test_one_line_exit_code_two_and_no_folder(flatmin, options, said):
    Path("empty").mkdir()
    one_line(flatmin("train", *options.split()), said)
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize("command", ["trian", "compar", "test"])
def test_an_unknown_command(flatmin, command):
    one_line(flatmin(command), f"No such command '{command}'")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--methods saf,sam", "must include base"),
        ("--methods base,sff", "unknown method 'sff', did you mean saf?"),
        ("--methods base,saf,saf", "has a name twice"),
        ("--methods base --set saf.lag=1", "not among the methods"),
        ("--seeds 0", "--seeds"),
        ("--minutes 0", "--minutes"),
        ("--method saf", "--methods"),
        ("--epochs 0", "epochs must be"),
        ("--select 2", "select has nothing to choose from"),
        ("--select 2 --validation .2 --set saf.lag=1,2", "select holds out samples itself"),
        ("--validation 1", "validation must be"),
        ("--train-samples -1", "train_samples must be"),
    ],
)
def test_the_comparison_refuses_too(flatmin, options, said):
    one_line(flatmin("compare", *options.split()), said)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--set saf.lag=0",
        "--set sam.rho=0",
        "--set sam.when=often",
        "--select 1 --set saf.lag=3,0",
        "--data idx:nowhere",
        "--model rsnet18",
    ],
)
def test_the_comparison_finds_out_before_the_first_run(flatmin, options):
    found = flatmin("compare", *options.split())
    assert found.code == 2
    assert [line for line in found.err.splitlines() if line.startswith("flatmin: ")] == found.err.splitlines()[-1:]
    assert not list(Path().glob("runs/**/runs"))


def test_a_comparison_that_cannot_begin_leaves_no_folder(flatmin):
    flatmin("compare", "--methods", "base,saf", "--set", "saf.lag=0")
    assert not list(Path().glob("runs/*"))


def test_no_parent_folder_is_left_either(flatmin):
    flatmin("train", "--lag", 0, "--out", "new/run")
    assert not Path("new").exists()


class TestOutputFolder:
    def command(self, experiment, out):
        return "train", experiment(), "--method", "base", "--epochs", 1, "--out", out

    def test_one_that_holds_something(self, flatmin, experiment):
        Path("run").mkdir()
        Path("run/notes.txt").write_text("mine")
        one_line(flatmin(*self.command(experiment, "run")), "run: holds something already")
        assert [path.name for path in Path("run").iterdir()] == ["notes.txt"]

    def test_a_file(self, flatmin, experiment):
        Path("run").write_text("mine")
        one_line(flatmin(*self.command(experiment, "run")), "run: is a file; give --out a new folder")
        assert Path("run").read_text() == "mine"

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc")
    def test_one_that_cannot_be_written(self, flatmin, experiment):
        one_line(flatmin(*self.command(experiment, "/proc/run")), "/proc/run: cannot be written")

    def test_the_comparison_checks_it_too(self, flatmin, experiment):
        Path("run").write_text("")
        one_line(flatmin("compare", experiment(), "--methods", "base", "--out", "run"), "run: is a file")


class TestDataFiles:
    @pytest.fixture
    def files(self, tmp_path):
        """Four good IDX files, some of which a test can replace."""
        good = {
            "train-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, 4, 8, 8) + bytes(range(256)),
            "train-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, 4) + bytes([0, 1, 0, 1]),
            "t10k-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, 2, 8, 8) + bytes(128),
            "t10k-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, 2) + bytes([0, 1]),
        }
        for name, content in good.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path

    def train(self, flatmin, data):
        return flatmin("train", "--data", data, "--method", "base", "--epochs", 1, "--out", "run")

    def test_the_good_ones_are_good(self, flatmin, files):
        assert self.train(flatmin, f"idx:{files}").code == 0

    @pytest.mark.parametrize(
        ("name", "change", "said"),
        [
            ("train-images-idx3-ubyte", lambda content: b"", "empty"),
            ("train-images-idx3-ubyte", lambda content: content[:-1], "cut short"),
            ("t10k-labels-idx1-ubyte", lambda content: content[:6], "header"),
            ("train-labels-idx1-ubyte", lambda content: None, "has none of train-labels-idx1-ubyte"),
            ("t10k-labels-idx1-ubyte", lambda content: content[:-1] + b"\7", "test labels [7]"),
            ("train-labels-idx1-ubyte", lambda content: b"hello" + content, "not with those of an IDX file"),
        ],
    )
    def test_a_file_that_is_not(self, flatmin, files, name, change, said):
        content = change((files / name).read_bytes())
        (files / name).unlink() if content is None else (files / name).write_bytes(content)
        one_line(self.train(flatmin, f"idx:{files}"), said)
        assert not Path("run").exists()

    @staticmethod
    def damaged_image(tmp_path):
        for number in range(8):
            path = tmp_path / "images" / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
        return f"folder:{tmp_path / 'images'}"

    def test_an_image_that_is_damaged(self, flatmin, tmp_path):
        one_line(self.train(flatmin, self.damaged_image(tmp_path)), "cannot read the image", ".png")

    def test_an_image_that_is_damaged_leaves_no_folder(self, flatmin, tmp_path):
        self.train(flatmin, self.damaged_image(tmp_path))
        assert not Path("run").exists()


def bad(part, text, said, **marks):
    return pytest.param({part: text}, said, id=f"{part}: {said}", **marks)


LABELS = "def train_set(): return TensorDataset(torch.ones(60, 4), torch.arange(60) % 4)"
TEXT = "def train_set(): return [(torch.ones(4), 'cat')] * 9"
SOFT = "def train_set(): return TensorDataset(torch.ones(60, 4), torch.ones(60, 3) / 3)"
DOUBLE = "def train_set(): return TensorDataset(torch.ones(60, 4, dtype=torch.float64), torch.arange(60) % 3)"
FLOATS = "def train_set(): return TensorDataset(torch.ones(60, 4), torch.arange(60) % 3 * 1.0)"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        bad("model", "", "there is no function model()"),
        bad("test_set", "test_set = None", "there is no function test_set()"),
        bad("model", "def model(:", "SyntaxError"),
        bad("model", "import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        bad("model", "def model(): raise ValueError('two\\nlines')", "tiny_experiment.py:4: ValueError: two lines"),
        bad("train_set", "def train_set(): return 'data'[0:0]", "returned an empty data set"),
        bad("train_set", "def train_set(): return 7", "must return a map-style data set"),
        bad("test_set", "def test_set(): return None", "must return a map-style data set"),
        bad("model", "def model(): return nn.Linear(4, 1)", "logits of shape (batch, classes), got (2, 1)"),
        bad("model", "def model(): return nn.Identity", "must return a torch.nn.Module"),
        bad("criterion", "def criterion(): raise KeyError(1)", "KeyError"),
        bad("train_set", LABELS, "a label is outside the 3 classes: 3"),
        bad("train_set", SOFT, "MESA"),
        bad("test_set", LABELS.replace("train", "test"), "a label is outside the 3 classes: 3"),
        bad("optimizer", "def optimizer(parameters): raise KeyError('lr')", "KeyError: 'lr'"),
        bad("optimizer", "def optimizer(parameters): return None", "optimizer"),
        bad("criterion", "def criterion(): return 3", "criterion"),
        bad("train_set", DOUBLE, "the inputs are torch.float64, the weights torch.float32; return x.to(torch.float32)"),
        bad("train_set", FLOATS, "if they are class indices as floats, return y.long()"),
        bad("train_set", TEXT, "labels must be class indices"),
        bad(
            "train_set", "def train_set(): return [({'a': torch.ones(4)}, 0)] * 9", "must be a pair (x, y) of a tensor"
        ),
        bad("train_set", "def train_set(): return [(torch.ones(4), 0)]", "at least two are needed"),
    ],
)
@pytest.mark.parametrize("command", ["train --method base", "compare --methods base --seeds 1 --jobs 1 --minutes .1"])
def test_an_experiment_file_that_cannot_be_used(flatmin, experiment, parts, said, command):
    name, *options = command.split()
    found = flatmin(name, experiment(**parts), *options, "--epochs", 1)
    assert found.code == 2
    assert "Traceback" not in found.err
    last = found.err.splitlines()[-1]  # compare says before it what it is doing
    assert last.startswith("flatmin: ")
    assert said in last
    assert name == "compare" or len(found.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--lr=5", "lr is set there"),
        ("--momentum=.5", "momentum is set there"),
        ("--data=idx:nope", "data and an experiment file exclude each other"),
        ("--model=resnet18", "model and an experiment file exclude each other"),
    ],
)
def test_an_option_that_the_experiment_file_would_ignore(flatmin, experiment, option, said):
    own = "def optimizer(parameters): return torch.optim.SGD(parameters, lr=0.1)"
    one_line(flatmin("train", experiment(optimizer=own), "--method", "base", "--epochs", 1, option), said)


def test_an_experiment_file_named_as_a_module(flatmin, experiment):
    Path(experiment()).rename("random.py")
    one_line(flatmin("train", "random.py"), "there is a module random already")


def test_labels_that_are_not_int64_are_converted(flatmin, experiment):
    int32 = "def train_set(): x = torch.randn(60, 4); return TensorDataset(x, x[:, :3].argmax(dim=1).int())"
    assert flatmin("train", experiment(train_set=int32), "--method", "base", "--epochs", 1).code == 0


def test_a_damaged_image_in_a_loaders_worker_is_one_line(flatmin, tmp_path):
    damaged = TestDataFiles.damaged_image(tmp_path)
    found = flatmin("train", "--data", damaged, "--epochs", 1, "--method", "base", "--workers", 1)
    one_line(found, "flatmin: cannot read the image")
    assert "Traceback" not in found.err


def test_labels_outside_the_classes_leave_no_folder(flatmin, experiment):
    flatmin("train", experiment(train_set=LABELS), "--method", "base", "--epochs", 1, "--out", "run")
    assert not Path("run").exists()


def test_bad_input_of_a_short_run_is_one_line_too(flatmin, experiment):
    Path("run").write_text("")
    one_line(flatmin("train", experiment(), "--method", "saf", "--epochs", 1, "--out", "run"), "run: is a file")


def test_a_short_run_of_mesa_on_little_data_needs_no_hyperparameter(flatmin, experiment):
    assert flatmin("train", experiment(), "--method", "mesa", "--epochs", 5).code == 0

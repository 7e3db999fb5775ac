"""Where the rows of a history are, and that its state can be saved, loaded, copied and moved."""

import copy
import errno
import gc
import io
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatmin
from flatmin.errors import InvalidArgumentError, OutputError, StateDictError
from flatmin.history import Dense, LowRank, Quantized, TopK
from flatmin.history import _choose as choosing
from flatmin.history import _memory as memory
from tests.live import live

N, C, LAG, BATCH = 30, 20, 2, 8
FORMS: dict[str, dict[str, object]] = {
    "dense": {"history": Dense(), "lag": LAG},
    "half": {"history": Dense(torch.float16), "lag": LAG},
    "int8": {"history": Quantized(8), "lag": LAG},
    "int6": {"history": Quantized(6), "lag": LAG},
    "int4": {"history": Quantized(4), "lag": LAG},
    "topk": {"history": TopK(4), "lag": LAG},
    "lowrank": {"history": LowRank(5), "lag": LAG},
    "mean": {"history": Dense(), "momentum": 0.9},
}
every_form = pytest.mark.parametrize("form", FORMS)
Step = tuple[int, Tensor, Tensor]


def make(form: str, **options: object) -> flatmin.SAF:
    return flatmin.SAF(N, C, start_epoch=0, **{**FORMS[form], **options})


def steps(*epochs: int) -> list[Step]:
    """Batches of shuffled epochs: the epoch, the samples, and the network's logits."""
    result = []
    for epoch in epochs:
        generator = torch.Generator().manual_seed(epoch)
        for index in torch.randperm(N, generator=generator).split(BATCH):
            result.append((epoch, index, 3 * torch.randn(len(index), C, generator=generator)))
    return result


def follow(saf: flatmin.SAF, batches: list[Step]) -> list[Tensor]:
    """Each batch's loss and gradient, one after another."""
    results = []
    for epoch, index, logits in batches:
        if saf._epoch != epoch:
            saf.set_epoch(epoch)
        leaf = logits.clone().requires_grad_()
        loss = saf(live(leaf), index)
        (loss + 0 * leaf.sum()).backward()
        results += [loss.detach(), leaf.grad]
    return results


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def held(saf: flatmin.SAF) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in saf.state_dict().items()}


def mapped(folder: Path) -> list[str]:
    """Files of a folder that this process has mapped, as the system names them."""
    gc.collect()
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/flatmin-history-" in line]


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
not_as_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write everywhere")


@every_form
def test_a_scratch_file_gives_what_memory_gives(form: str, tmp_path: Path) -> None:
    in_memory, on_disk = make(form), make(form, path=tmp_path)
    assert on_disk.history.store.on_host
    assert not in_memory.history.store.on_host
    losses = follow(in_memory, steps(*range(5)))
    assert sum(loss > 0 for loss in losses[::2]) > 6
    assert_same(losses, follow(on_disk, steps(*range(5))))
    assert_same(list(in_memory.history.buffers()), list(on_disk.history.buffers()))


@needs_proc
@pytest.mark.parametrize("form", ["dense", "int6", "lowrank"])
def test_a_scratch_file_has_no_name_and_vanishes(form: str, tmp_path: Path) -> None:
    saf = make(form, path=tmp_path)
    follow(saf, steps(0, 1))
    assert list(tmp_path.iterdir()) == []
    (line,) = mapped(tmp_path)
    assert line.endswith("(deleted)")
    low, high = (int(bound, 16) for bound in line.split()[0].split("-"))
    assert high - low >= saf.history.store.rows.nbytes
    assert mapped(tmp_path / "another") == []
    del saf
    assert mapped(tmp_path) == []


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
        import os, signal, flatmin, torch
        saf = flatmin.SAF(1000, 100, path={str(tmp_path)!r})
        saf(torch.zeros(4, 100, requires_grad=True), torch.arange(4))
        print("made", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    script = "\n".join(line.strip() for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("made\n", -9), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["dense", "int6", "lowrank"])
def test_state_moves_between_a_scratch_file_and_memory(form: str, tmp_path: Path) -> None:
    on_disk = make(form, path=tmp_path)
    follow(on_disk, steps(0, 1, 2))
    in_memory, elsewhere = make(form), make(form, path=tmp_path)
    in_memory.load_state_dict(on_disk.state_dict())
    elsewhere.load_state_dict(in_memory.state_dict())
    expected = follow(on_disk, steps(3, 4))
    assert_same(expected, follow(in_memory, steps(3, 4)))
    assert_same(expected, follow(elsewhere, steps(3, 4)))


@pytest.mark.parametrize("make_folder", [lambda path: None, lambda path: path.write_text("mine")], ids=["none", "file"])
def test_what_is_no_folder_is_named(make_folder: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "scratch"
    make_folder(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"^path '.*scratch': a history of .* GB .*; give a folder that exists"):
        flatmin.SAF(N, C, path=path)
    assert sorted(tmp_path.iterdir()) == before


@not_as_root
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=f"^path '{tmp_path}'.*Permission denied"):
        flatmin.SAF(N, C, path=tmp_path)
    tmp_path.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the permission to mount")
    yield tmp_path
    gc.collect()
    subprocess.run(["umount", str(tmp_path)], check=True)


def assert_is_told_of_a_full_disk(folder: Path) -> None:
    with pytest.raises(OutputError) as error:
        flatmin.SAF(100_000, C, path=folder)
    assert str(error.value).startswith(f"path '{folder}': a history of 0.024 GB cannot be kept there")
    assert "No space left on device" in str(error.value)
    assert str(error.value).endswith("give a folder that exists, on a disk with room")
    assert list(folder.iterdir()) == []


def test_a_full_disk_says_so_at_once_and_keeps_nothing(small_disk: Path) -> None:
    free = os.statvfs(small_disk).f_bfree
    assert_is_told_of_a_full_disk(small_disk)
    assert os.statvfs(small_disk).f_bfree == free
    saf = flatmin.SAF(2000, C, lag=1, path=small_disk)  # the control: what fits is kept there
    assert os.statvfs(small_disk).f_bfree < free
    saf(live(torch.ones(BATCH, C)), torch.arange(BATCH))
    with pytest.raises(OutputError):
        flatmin.SAF(100_000, C, path=small_disk)
    assert saf.history.store.rows.count_nonzero() > 0
    del saf
    gc.collect()
    assert os.statvfs(small_disk).f_bfree == free


def test_a_disk_that_cannot_be_written_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=f"^path '{small_disk}'.*Read-only file system"):
        flatmin.SAF(N, C, path=small_disk)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert_is_told_of_a_full_disk(tmp_path)


def test_where_room_cannot_be_reserved_the_file_is_as_long_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    assert_same(follow(make("int6", path=tmp_path), steps(*range(4))), follow(make("int6"), steps(*range(4))))


@every_form
def test_rows_on_the_host_stay_there_and_their_basis_moves(form: str) -> None:
    saf = make(form, location="host")
    follow(saf, steps(0, 1, 2))
    before = held(saf)
    rows = saf.history.store.rows.data_ptr()
    saf.to(torch.float16).to("meta")
    store = saf.history.store
    assert saf.history.store.on_host
    assert saf.history.device.type == store.epochs.device.type == "cpu"
    assert store.rows.data_ptr() == rows
    assert torch.equal(store.rows, before["history.store.rows"])
    assert torch.equal(store.epochs, before["history.store.epochs"])
    elsewhere = [name for name, buffer in saf.history.named_buffers() if buffer.is_meta]
    assert len(elsewhere) == (7 if form == "lowrank" else 0)
    assert all(buffer.is_meta for buffer in make(form).to("meta").history.buffers())  # the control


@every_form
@pytest.mark.parametrize("move", [lambda saf: saf.half(), lambda saf: saf.to(torch.bfloat16), lambda saf: saf.double()])
def test_another_dtype_of_the_network_changes_nothing(form: str, move: Callable[[flatmin.SAF], flatmin.SAF]) -> None:
    plain, moved = make(form), make(form)
    assert_same(follow(plain, steps(*range(3))), follow(moved, steps(*range(3))))
    moved = move(moved)
    assert_same(follow(plain, steps(*range(3, 6))), follow(moved, steps(*range(3, 6))))


@every_form
def test_the_host_never_waits_for_a_value_on_the_device(form: str) -> None:
    # a meta tensor has no values: whatever would make the host wait for one raises there
    saf = make(form).to("meta")
    for index_device in ("cpu", "meta"):
        for epoch in range(5):
            saf.set_epoch(epoch)
            logits = torch.zeros(3, C, device="meta", requires_grad=True)
            loss = saf(live(logits), torch.zeros(3, dtype=torch.int64, device=index_device))
            (loss + logits.sum()).backward()
        assert loss.requires_grad
        assert loss.device.type == "meta"


@pytest.mark.parametrize(
    ("gigabytes", "classes", "momentum", "expected", "reason"),
    [
        (0.1, 1000, None, {"codec": "Dense", "dtype": "float32"}, "the most exact within"),
        (0.06, 1000, None, {"codec": "Dense", "dtype": "float16"}, "the most exact within"),
        (0.03, 1000, None, {"codec": "Quantized", "bits": 8}, "the most exact within"),
        (0.02, 1000, None, {"codec": "Quantized", "bits": 6}, "the most exact within"),
        (0.0175, 1000, None, {"codec": "LowRank"}, "the most exact within"),
        (0.001, 1000, None, {"codec": "LowRank"}, "the smallest, and more than"),
        (0.035, 1000, 0.9, {"codec": "Dense", "dtype": "float32"}, "the most exact within"),  # one slot
        (0.001, 1000, 0.9, {"codec": "Quantized", "bits": 8}, "the smallest, and more than"),
        (0.0001, 95, None, {"codec": "Quantized", "bits": 6}, "the smallest, and more than"),
    ],
)
def test_auto_chooses_by_size_and_says_why(
    gigabytes: float,
    classes: int,
    momentum: float | None,
    expected: dict[str, object],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(choosing, "_memory", lambda on_host: ("the machine under test", round(gigabytes * 1e9)))
    with caplog.at_level(logging.INFO, logger="flatmin"):
        history = flatmin.SAF(1000, classes, history="auto", momentum=momentum).history
    assert expected.items() <= history.describe().items()
    (record,) = caplog.records
    size = history.nbytes
    assert (record.name, record.levelno) == ("flatmin", logging.INFO)
    assert f": {size / 1e9:.3g} GB, {reason} an eighth of the {gigabytes:.3g} GB of the machine" in record.getMessage()


def test_what_exceeds_the_memory_of_the_machine_says_what_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "physical_memory", lambda: 10_000)
    with pytest.raises(
        InvalidArgumentError, match=r"needs 0.0 GB and .*: take .*'int6' or 'lowrank', or .*path=FOLDER"
    ):
        flatmin.SAF(1000, C)
    assert flatmin.SAF(1000, C, path=tmp_path).history.nbytes > 10_000
    assert flatmin.SAF(10, C).history.nbytes < 10_000


@every_form
@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize("within", [0, 2, None], ids=["after its first batch", "in its midst", "at its end"])
def test_a_second_object_goes_on_bitwise(form: str, epoch: int, within: int | None) -> None:
    before = steps(*range(epoch + 1))
    if within is not None:
        before = before[: epoch * len(steps(0)) + within + 1]
    after = steps(*range(epoch + 4))[len(before) :]
    one, two = make(form), make(form)
    follow(one, before)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    assert two.load_state_dict(torch.load(file, weights_only=True))
    expected = follow(one, after)
    assert sum(loss > 0 for loss in expected[::2]) > 2
    assert_same(expected, follow(two, after))
    assert_same(list(one.history.buffers()), list(two.history.buffers()))
    assert torch.equal(one.get_extra_state(), two.get_extra_state())


def test_low_rank_goes_on_bitwise_after_an_epoch_gone_back_to() -> None:
    one, two = make("lowrank"), make("lowrank")
    follow(one, steps(0, 1, 2, 3, 4))
    one.set_extra_state(torch.tensor([3, 0]))  # set_epoch goes forwards alone
    follow(one, steps(3)[:2])
    two.load_state_dict(one.state_dict())
    rest = steps(3)[2:] + steps(4, 5, 6)
    assert_same(follow(one, rest), follow(two, rest))


@every_form
def test_state_is_complete_and_as_small_as_the_history(form: str) -> None:
    saf = make(form)
    follow(saf, steps(0, 1, 2))
    state = saf.state_dict()
    described = state.pop("_extra_state").nbytes + state.pop("history._extra_state").nbytes
    assert described < 200
    assert set(state) == {f"history.{name}" for name, _ in saf.history.named_buffers()}
    assert sum(tensor.untyped_storage().nbytes() for tensor in state.values()) == saf.history.nbytes
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in state.values())
    file = io.BytesIO()
    torch.save(saf.state_dict(), file)
    assert len(file.getvalue()) < saf.history.nbytes + 8000  # as large as the zip file of a dozen empty tensors


@every_form
def test_state_fits_safetensors(form: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    one, two = make(form), make(form)
    follow(one, steps(0, 1, 2)[:-1])
    safetensors.save_file(one.state_dict(), tmp_path / "state.safetensors")
    two.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    rest = steps(2)[-1:] + steps(3)
    assert_same(follow(one, rest), follow(two, rest))


SIZES = {"num_samples": N, "num_classes": C}
OTHERS: list[tuple[dict[str, object], dict[str, object], str, str]] = [
    (FORMS["dense"], FORMS["int8"], "codec=Quantized.*bits=8", "codec=Dense.*bits=None"),
    (FORMS["int8"], FORMS["topk"], "codec=TopK.*k=4", "codec=Quantized"),
    (FORMS["topk"], FORMS["lowrank"], "codec=LowRank.*rank=5", "codec=TopK"),
    ({"lag": 2}, {"lag": 3}, "lag=3", "lag=2"),
    ({"history": TopK(4)}, {"history": TopK(5)}, "k=5", "k=4"),
    ({"history": TopK(4)}, {"history": TopK(4), "temperature": 2.0}, "temperature=2.0", "temperature=5.0"),
    ({"history": LowRank(5)}, {"history": LowRank(6)}, "rank=6", "rank=5"),
    (FORMS["dense"], FORMS["half"], "dtype=float16", "dtype=float32"),
    (FORMS["half"], {"history": Dense(torch.bfloat16), "lag": LAG}, "dtype=bfloat16", "dtype=float16"),
    (FORMS["int8"], FORMS["int4"], "bits=4", "bits=8"),
    ({"lag": 1}, FORMS["mean"], "momentum=0.9", "momentum=None"),
    (FORMS["mean"], {"momentum": 0.5}, "momentum=0.5", "momentum=0.9"),
    (
        FORMS["int6"],
        {**FORMS["int6"], "num_samples": N + 1},
        "num_samples=31",
        "num_samples=30; has the data set grown or shrunk",
    ),
    # Of 19 classes and of 20, packed in 6 bits, rows are as long.
    (FORMS["int6"], {**FORMS["int6"], "num_classes": C - 1}, "num_classes=19", "num_classes=20"),
]


@pytest.mark.parametrize(("ours", "theirs", "their_name", "our_name"), OTHERS)
@pytest.mark.parametrize("within", ["saf", "module", "history"])
def test_state_of_another_history_is_refused_and_nothing_is_loaded(
    ours: dict[str, object], theirs: dict[str, object], their_name: str, our_name: str, within: str
) -> None:
    safs = [flatmin.SAF(**{**SIZES, **options}) for options in (ours, theirs)]
    for epoch, saf in enumerate(safs):
        saf.set_epoch(epoch + 3)
        saf(live(torch.randn(4, saf.num_classes)), torch.arange(4))
    before = held(safs[0])
    message = f"^the state is of a history with .*{their_name}.* and this one has .*{our_name}.*; nothing was loaded"
    targets = {"saf": safs, "module": [torch.nn.ModuleDict({"loss": saf}) for saf in safs]}
    targets["history"] = [saf.history for saf in safs]
    target, source = targets[within]
    with pytest.raises(StateDictError, match=message):
        target.load_state_dict(source.state_dict())
    after = safs[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert safs[0].get_extra_state().tolist() == [3, 4]


@every_form
def test_state_of_an_earlier_layout_is_refused_in_one_line_and_nothing_is_loaded(form: str) -> None:
    saf = make(form)
    follow(saf, steps(0, 1))
    before = held(saf)
    earlier = {name.replace("codec.", ""): torch.ones_like(tensor) for name, tensor in before.items()}
    description = {"form": "DenseHistory", "num_samples": N, "num_classes": C, "lag": LAG, "momentum": None}
    encoded = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    with pytest.raises(StateDictError) as error:
        saf.load_state_dict({**earlier, "history._extra_state": encoded})
    assert str(error.value).startswith("the state's history was saved by an earlier version of flatmin")
    assert "nothing was loaded" in str(error.value)
    assert "\n" not in str(error.value)
    after = saf.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("bad", [torch.tensor([1, 2]), torch.tensor(list(b"[1]")), "text", torch.tensor([300])])
def test_state_that_describes_no_history_is_refused(bad: object) -> None:
    saf = make("int8")
    with pytest.raises(InvalidArgumentError, match=r"^the state.s _extra_state does not describe a history"):
        saf.load_state_dict({**saf.state_dict(), "history._extra_state": bad})


@every_form
@pytest.mark.parametrize("way", [copy.deepcopy, lambda saf: pickle.loads(pickle.dumps(saf))], ids=["copy", "pickle"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_copy_goes_on_by_itself(
    form: str, way: Callable[[flatmin.SAF], flatmin.SAF], on_disk: bool, tmp_path: Path
) -> None:
    one = make(form, path=tmp_path if on_disk else None)
    follow(one, steps(0, 1, 2)[:-1])
    two = way(one)
    before, rest = held(two), steps(2)[-1:] + steps(3, 4)
    expected = follow(one, rest)
    assert all(torch.equal(before[name], tensor) for name, tensor in two.state_dict().items())
    assert_same(expected, follow(two, rest))


@every_form
def test_no_graph_is_kept(form: str) -> None:
    saf = make(form)
    layer, x = torch.nn.Linear(3, C), torch.randn(BATCH, 3)
    for epoch in range(5):
        saf.set_epoch(epoch)
        logits = layer(x)
        (saf(logits, torch.arange(BATCH)) + logits.logsumexp(1).sum() - logits[:, 0].sum()).backward()
        # which would raise if it led into an earlier epoch
    assert not any(buffer.requires_grad or buffer.grad_fn for buffer in saf.history.buffers())
    logits = layer(x)
    _, past, _ = saf.history.recall(torch.arange(BATCH), logits, 5)
    assert logits.requires_grad
    assert not past.requires_grad


def test_shards_of_one_process_are_the_whole() -> None:
    saf = flatmin.SAF(N, C, lag=1, sharing="shard")
    saf(live(torch.ones(N, C)), torch.arange(N))
    state = saf.state_dict()
    assert state["history.store.rows"].shape[1] == N
    other = flatmin.SAF(N, C, lag=1)
    other.load_state_dict(state)
    assert torch.equal(other.history.store.rows, saf.history.store.rows)


def test_assigned_state_is_copied_and_shared_with_nobody() -> None:
    saf, other = flatmin.SAF(N, C, lag=1), flatmin.SAF(N, C, lag=1)
    saf(live(torch.ones(N, C)), torch.arange(N))
    other.load_state_dict(saf.state_dict(), assign=True)
    other.set_epoch(1)
    other(live(torch.zeros(N, C)), torch.arange(N))
    assert saf.history.store.rows.any()
    assert not other.history.store.rows.any()

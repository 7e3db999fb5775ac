import gzip
import struct
import tracemalloc

import pytest
import torch

from flatmin.errors import DataError
from flatmin.lab.problems.data import load_idx, read_idx


def idx(tensor, kind=8):
    header = bytes([0, 0, kind, tensor.ndim]) + struct.pack(f">{tensor.ndim}I", *tensor.shape)
    return header + bytes(tensor.flatten().tolist())


def pictures(count, seed=0):
    return torch.randint(256, (count, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def labels(*values):
    return torch.tensor(values, dtype=torch.uint8)


def write(folder, dot="-", pack=None, **changed):
    """Writes six training and three test images of the classes 0, 1 and 2."""
    parts = {
        "train_images": pictures(6),
        "train_labels": labels(0, 1, 2, 2, 1, 0),
        "t10k_images": pictures(3, seed=1),
        "t10k_labels": labels(2, 0, 1),
    } | changed
    for name, tensor in parts.items():
        dimensions = 3 if name.endswith("images") else 1
        path = folder / f"{name.replace('_', '-')}{dot}idx{dimensions}-ubyte{'.gz' if pack else ''}"
        path.write_bytes((pack or bytes)(idx(tensor)))
    return folder


def same(first, second):
    pairs = zip((first.train, first.test), (second.train, second.test), strict=True)
    return all(a.equal(b) for one, other in pairs for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1, 2, 3, 4)])
def test_read_idx_gives_what_was_written(tmp_path, shape, pack):
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.uint8).view(shape)
    path = tmp_path / "file"
    path.write_bytes(pack(idx(tensor)))
    assert read_idx(str(path)).equal(tensor)


def test_read_idx_reads_a_file_of_more_than_a_mebibyte(tmp_path):
    tensor = (torch.arange((1 << 20) + 5) % 251).to(torch.uint8)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(tensor), compresslevel=1))
    assert read_idx(path).equal(tensor)


WHOLE = idx(pictures(6))
PACKED = gzip.compress(WHOLE, mtime=0)
DAMAGE = {
    "empty": (b"", "empty"),
    "two bytes": (b"\0\0", "begins with"),
    "no IDX file": (b"<html>", "begins with"),
    "no dimensions": (bytes([0, 0, 8, 0, 1]), "begins with"),
    "many dimensions": (bytes([0, 0, 8, 255]) + bytes([0, 0, 0, 1]) * 255 + b"x", "begins with"),
    "other type": (idx(pictures(6), kind=0x0D), "0x0d"),
    "cut in the header": (WHOLE[:9], "header"),
    "cut in the content": (WHOLE[:-1], "cut short"),
    "trailing byte": (WHOLE + b"\0", "too long"),
    "no samples": (idx(torch.zeros(0, 4, 3)), "no samples"),
    "no pixels": (idx(torch.zeros(6, 0, 3)), "no samples"),
    "empty gzip": (gzip.compress(b""), "empty"),
    "cut gzip": (PACKED[:-9], "ended before"),
    "cut gzip header": (PACKED[:5], "ended before"),
    "gzip with a wrong checksum": (PACKED[:-8] + bytes(4) + PACKED[-4:], "CRC"),
    "gzip with a wrong block": (PACKED[:10] + b"\xff" * 20 + PACKED[30:], "invalid"),
    "gzip with a tail": (PACKED + b"tail", "gzip"),
    "gzip of a longer file": (gzip.compress(WHOLE + b"\0"), "too long"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_named_with_the_reason(tmp_path, content, reason):
    path = write(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        load_idx(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(1 << 31,), (2**32 - 1,) * 8])
def test_a_lying_header_allocates_nothing(tmp_path, shape, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + b"few"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="it has 3"):
            read_idx(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 23


def test_what_is_small_when_packed_is_not_unfolded_without_end(tmp_path, monkeypatch):
    """Of zeros there are a thousand to a byte, so a header may tell the truth and there is no room for it."""
    monkeypatch.setattr("flatmin.lab.problems.data._idx._UNFOLDED", 1 << 20)
    path, header = tmp_path / "file", bytes([0, 0, 8, 1]) + struct.pack(">I", 1 << 24)
    path.write_bytes(gzip.compress(header + bytes(1 << 24)))
    most = max(1 << 20, 100 * path.stat().st_size)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=f"it unfolds to more than {most} bytes; if that is right, unpack it with gun"
        ):
            read_idx(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 23
    path.write_bytes(header + bytes(1 << 24))
    assert len(read_idx(path)) == 1 << 24


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_read_idx_names_what_is_no_file(tmp_path, name):
    with pytest.raises(DataError) as caught:
        read_idx(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_load_idx_scales_and_standardises_by_the_training_set(tmp_path):
    split = load_idx(write(tmp_path))
    mean, std = (pictures(6) / 255).mean(), (pictures(6) / 255).std(correction=0)
    for half, images, expected in (
        (split.train, pictures(6), [0, 1, 2, 2, 1, 0]),
        (split.test, pictures(3, seed=1), [2, 0, 1]),
    ):
        x, y = half.tensors
        torch.testing.assert_close(x, ((images / 255 - mean) / std).unsqueeze(1))
        assert y.tolist() == expected
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (split.num_classes, split.input_shape, split.classes) == (3, (1, 4, 3), ("0", "1", "2"))


@pytest.mark.parametrize(("dot", "pack"), [("-", gzip.compress), (".", None), (".", gzip.compress)])
def test_all_variants_of_the_names_give_the_same(tmp_path, dot, pack):
    plain, variant = tmp_path / "plain", tmp_path / "variant"
    plain.mkdir()
    variant.mkdir()
    assert same(load_idx(write(plain)), load_idx(write(variant, dot, pack)))


def test_constant_images_stay_finite(tmp_path):
    split = load_idx(write(tmp_path, train_images=torch.full((6, 4, 3), 7, dtype=torch.uint8)))
    assert not split.train.tensors[0].any()
    assert split.test.tensors[0].isfinite().all()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        load_idx(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("missing", "known"),
    [
        ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte.gz"),
        ("t10k-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz"),
    ],
)
def test_a_missing_file_is_named_with_its_variants(tmp_path, missing, known):
    (write(tmp_path) / missing).unlink()
    with pytest.raises(DataError) as caught:
        load_idx(tmp_path)
    for part in (str(tmp_path), missing, known):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"train_labels": labels(0, 1, 2)},
            r"train-images-idx3-ubyte holds 6 images .*train-labels.* 3 labels",
        ),
        ({"t10k_labels": labels(0, 1)}, r"t10k-images-idx3-ubyte holds 3 images .*t10k-labels.* 2 labels"),
        ({"t10k_labels": labels(0, 1, 3)}, r"test labels \[3\]"),
        ({"train_labels": labels(0, 0, 2, 2, 0, 0)}, r"test labels \[1\]"),
        ({"t10k_images": torch.zeros(3, 3, 4, dtype=torch.uint8)}, "4x3 pixels and test images of 3x4"),
        ({"train_images": labels(0, 1, 2, 2, 1, 0)}, "train-images-idx3-ubyte holds 6 bytes.*3 are needed"),
        ({"train_labels": pictures(6)}, "train-labels-idx1-ubyte holds 6x4x3 bytes.*1 are needed"),
        ({"train_labels": labels(*[0] * 6), "t10k_labels": labels(0, 0, 0)}, "two classes"),
    ],
)
def test_files_that_do_not_fit_one_another_are_refused(tmp_path, changed, reason):
    write(tmp_path, **changed)
    with pytest.raises(DataError, match=reason) as caught:
        load_idx(tmp_path)
    assert str(tmp_path) in str(caught.value)

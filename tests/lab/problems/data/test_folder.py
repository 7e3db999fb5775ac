import pickle
import sys
from itertools import chain

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from flatmin.errors import DataError, InvalidArgumentError, MissingDependencyError
from flatmin.lab.problems.data import ImageFolder, load_folder

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def save(path, colour=(10, 20, 30), size=(12, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def fill(folder, **counts):
    for name, count in counts.items():
        for number in range(count):
            save(folder / name / f"{number}.png")
    return folder


def bytes_of(item):
    """The pixels of an item in [0, 255], normalisation undone."""
    return (item * STD + MEAN) * 255


def test_halves_are_disjoint_stratified_and_complete(tmp_path):
    split = load_folder(fill(tmp_path, cat=7, ant=4, bee=2))
    assert split.classes == ("ant", "bee", "cat")
    assert (split.num_classes, split.input_shape) == (3, (3, 32, 32))
    assert split.train.targets.bincount().tolist() == [2, 1, 4]
    assert split.test.targets.bincount().tolist() == [2, 1, 3]
    assert set(split.train.paths).isdisjoint(split.test.paths)
    assert sorted(split.train.paths + split.test.paths) == sorted(tmp_path.rglob("*.png"))
    for half in (split.train, split.test):
        assert [split.classes[label] for label in half.targets] == [path.parent.name for path in half.paths]


def test_the_seed_decides_the_halves(tmp_path):
    fill(tmp_path, ant=20, bee=20)
    assert load_folder(tmp_path, seed=1).train.paths == load_folder(tmp_path, seed=1).train.paths
    assert load_folder(tmp_path, seed=1).train.paths != load_folder(tmp_path, seed=2).train.paths


@pytest.mark.parametrize("test", ["test", "val"])
def test_given_sets_are_taken_as_they_are(tmp_path, test):
    fill(tmp_path / "train", ant=1, bee=2, cat=1)
    fill(tmp_path / test, cat=2, ant=1)
    split = load_folder(tmp_path)
    assert split.classes == ("ant", "bee", "cat")
    assert split.train.targets.tolist() == [0, 1, 1, 2]
    assert split.test.targets.tolist() == [0, 2, 2]
    assert all(path.is_relative_to(tmp_path / test) for path in split.test.paths)


def test_test_goes_before_val(tmp_path):
    for name, count in (("train", 1), ("val", 2), ("test", 3)):
        fill(tmp_path / name, ant=count, bee=count)
    assert len(load_folder(tmp_path).test) == 6


def test_files_are_found_sorted_at_any_depth_without_hidden_ones(tmp_path):
    wanted = [save(tmp_path / "ant" / name) for name in ("B.JPG", "a.webp", "deep/er/c.tiff", "z.bmp")]
    for name in ("ant/.hidden.png", "ant/.cache/a.png", ".git/a.png"):
        save(tmp_path / name)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    fill(tmp_path, bee=2)
    split = load_folder(tmp_path)
    assert split.classes == ("ant", "bee")
    found = [path for half in (split.train, split.test) for path in half.paths if "ant" in path.parts]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "gif", "webp", "ppm", "tif", "tiff"])
def test_every_format_is_read(tmp_path, suffix):
    path = save(tmp_path / f"image.{suffix}", (120, 120, 120))
    image, label = ImageFolder([path], torch.tensor([3]), image_size=8)[0]
    assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.float32, 3)
    assert (bytes_of(image) - 120).abs().max() < 3


@pytest.mark.parametrize("size", [(36, 12), (12, 36), (12, 12), (3, 9)])
def test_an_image_is_scaled_to_the_shorter_side_and_its_centre_cut_out(tmp_path, size):
    width, height = size
    image = Image.frombytes("RGB", size, bytes(torch.randint(256, (width * height * 3,)).tolist()))
    image.save(tmp_path / "image.png")
    item, _ = ImageFolder([tmp_path / "image.png"], torch.tensor([0]), image_size=6)[0]

    scaled = image.resize((width * 6 // min(size), height * 6 // min(size)), Image.Resampling.BILINEAR)
    left, top = ((length - 6) // 2 for length in scaled.size)
    expected = list(scaled.crop((left, top, left + 6, top + 6)).tobytes())
    assert (bytes_of(item).permute(1, 2, 0).flatten() - torch.tensor(expected)).abs().max() < 0.01


def test_pixels_keep_their_place_and_channel(tmp_path):
    pixels = torch.randint(256, (5, 5, 3), dtype=torch.uint8)
    Image.frombytes("RGB", (5, 5), bytes(pixels.flatten().tolist())).save(tmp_path / "image.png")
    item, _ = ImageFolder([tmp_path / "image.png"], torch.tensor([0]), image_size=5)[0]
    torch.testing.assert_close(item, (pixels.permute(2, 0, 1) / 255 - MEAN) / STD)


def test_shrinking_is_antialiased(tmp_path):
    image = Image.new("L", (64, 64))
    image.putdata([255 * (column % 2) for _ in range(64) for column in range(64)])
    image.save(tmp_path / "image.png")
    item, _ = ImageFolder([tmp_path / "image.png"], torch.tensor([0]), image_size=8)[0]
    assert (bytes_of(item) - 127.5).abs().max() < 12


@pytest.mark.parametrize(("mode", "colour"), [("L", 9), ("1", 1), ("P", 5), ("RGBA", (1, 2, 3, 4)), ("LA", (5, 6))])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode, colour):
    path = save(tmp_path / "image.png", colour, mode=mode)
    assert ImageFolder([path], torch.tensor([0]))[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I", "tiff"), ("F", "tiff")])
def test_deeper_pixels_are_refused_rather_than_clipped(tmp_path, mode, suffix):
    path = save(tmp_path / f"image.{suffix}", 1000, mode=mode)
    with pytest.raises(DataError, match="8 bits") as caught:
        ImageFolder([path], torch.tensor([0]))[0]
    assert str(path) in str(caught.value)


def damage(content):
    return {"empty": b"", "text": b"no image", "truncated": content[: len(content) // 2]}


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_damaged_image_is_named_when_it_is_read(tmp_path, suffix, kind):
    fill(tmp_path, ant=2, bee=2)
    bad = save(tmp_path / "ant" / f"bad.{suffix}", size=(64, 64))
    bad.write_bytes(damage(bad.read_bytes())[kind])
    split = load_folder(tmp_path)
    with pytest.raises(DataError) as caught:
        list(chain(split.train, split.test))
    assert str(bad) in str(caught.value)


def test_a_file_that_went_away_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png"):
        ImageFolder([tmp_path / "gone.png"], torch.tensor([0]))[0]


def test_a_copy_by_pickle_gives_the_same_items(tmp_path):
    train = load_folder(fill(tmp_path, ant=4, bee=4)).train
    copy = pickle.loads(pickle.dumps(train))
    assert copy.targets.equal(train.targets)
    assert all(copy[i][0].equal(train[i][0]) and copy[i][1] == train[i][1] for i in range(len(train)))


def test_replaced_targets_are_what_an_item_gives(tmp_path):
    train = load_folder(fill(tmp_path, ant=4, bee=4)).train
    assert train.targets.dtype == torch.int64
    train.targets = 1 - train.targets
    assert [label for _, label in train] == [1, 1, 0, 0]
    assert next(iter(DataLoader(train, batch_size=4)))[1].tolist() == [1, 1, 0, 0]


def test_missing_and_empty_folders_are_named(tmp_path):
    for folder, reason in ((tmp_path / "nowhere", "no folder"), (tmp_path, "no class folders")):
        with pytest.raises(DataError, match=reason) as caught:
            load_folder(folder)
        assert str(folder) in str(caught.value)


def test_images_without_class_folders_are_refused(tmp_path):
    save(tmp_path / "image.png")
    with pytest.raises(DataError, match="no class folders"):
        load_folder(tmp_path)


@pytest.mark.parametrize("place", [".", "train", "test"])
def test_a_class_without_images_is_named(tmp_path, place):
    if place != ".":
        fill(tmp_path / "train", ant=2, bee=2, cat=2)
        fill(tmp_path / "test", ant=2)
    fill(tmp_path / place, ant=2, bee=2)
    for old in (tmp_path / place).glob("cat/*"):
        old.unlink()
    (tmp_path / place / "cat").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="has no") as caught:
        load_folder(tmp_path)
    assert str(tmp_path / place / "cat") in str(caught.value)


def test_a_class_of_one_image_cannot_be_halved(tmp_path):
    with pytest.raises(DataError, match="bee has one image"):
        load_folder(fill(tmp_path, ant=2, bee=1))


def test_a_class_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match="class ant alone"):
        load_folder(fill(tmp_path, ant=4))


def test_a_test_class_that_the_training_set_lacks_is_refused(tmp_path):
    fill(tmp_path / "train", ant=2, bee=2)
    fill(tmp_path / "test", ant=2, wasp=1)
    with pytest.raises(DataError, match="wasp"):
        load_folder(tmp_path)


def test_a_training_set_without_a_test_set_is_not_taken_for_a_class(tmp_path):
    fill(tmp_path / "train", ant=2, bee=2)
    fill(tmp_path / "valid", ant=2, bee=2)
    with pytest.raises(DataError, match="neither test/ nor val/"):
        load_folder(tmp_path)


def test_train_may_be_the_name_of_a_class(tmp_path):
    assert load_folder(fill(tmp_path, car=2, train=2)).classes == ("car", "train")


@pytest.mark.parametrize("changed", [{"image_size": 0}, {"image_size": 1.5}, {"seed": -1}])
def test_wrong_arguments_are_named(tmp_path, changed):
    with pytest.raises(InvalidArgumentError, match=next(iter(changed))):
        load_folder(fill(tmp_path, ant=2, bee=2), **changed)


@pytest.mark.parametrize("targets", [torch.tensor([0]), torch.tensor([[0], [1]]), torch.tensor([0.0, 1.0])])
def test_targets_must_fit_the_paths(targets):
    with pytest.raises(InvalidArgumentError, match="targets"):
        ImageFolder(["a.png", "b.png"], targets)


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    split = load_folder(fill(tmp_path, ant=2, bee=2))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flatmin\[cli\]'"):
        split.train[0]


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path, monkeypatch):
    fill(tmp_path, ant=2, bee=2)
    save(tmp_path / "ant" / "0.png", size=(8193, 8192), mode="1", colour=0)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    split = load_folder(tmp_path)
    place = [path.parent.name + path.name for path in split.train.paths + split.test.paths].index("ant0.png")
    half, place = (split.train, place) if place < len(split.train) else (split.test, place - len(split.train))
    with pytest.raises(DataError, match=r"ant/0.png: 8193 x 8192 pixels are more than 67108864; scale it down"):
        half[place]

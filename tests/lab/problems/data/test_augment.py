import pytest
import torch
import torch.nn.functional as F

from flatmin.errors import InvalidArgumentError
from flatmin.lab.problems.data import random_crop, random_flip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_crop_equals_slicing_image_by_image():
    images = torch.rand(16, 3, 5, 7)
    cropped = random_crop(images, 2, generator=seeded())

    tops, lefts = torch.randint(5, (2, 16), generator=seeded()).tolist()
    for image, crop, top, left in zip(images, cropped, tops, lefts, strict=True):
        assert crop.equal(F.pad(image, (2, 2, 2, 2))[:, top : top + 5, left : left + 7])
    assert len(set(zip(tops, lefts, strict=True))) > 4


def test_random_crop_reaches_every_place_about_equally():
    images = torch.zeros(9000, 1, 3, 3)
    images[:, :, 1, 1] = 1
    places = random_crop(images, 1, generator=seeded()).flatten(1).argmax(1).bincount(minlength=9)
    assert places.sum() == 9000
    assert places.min() > 850
    assert places.max() < 1150


def test_random_crop_without_padding_is_a_copy():
    images = torch.rand(2, 1, 4, 4)
    cropped = random_crop(images, 0, generator=seeded())
    assert cropped.equal(images)
    assert cropped.data_ptr() != images.data_ptr()


def test_random_flip_mirrors_half_of_the_images_and_leaves_the_rest():
    images = torch.rand(1000, 2, 3, 4)
    flipped = random_flip(images, generator=seeded())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 420 < mirrored.sum() < 580


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
def test_augmentation_keeps_dtype_and_layout(dtype):
    images = torch.ones(3, 2, 4, 5, dtype=dtype)
    for augmented in (random_crop(images, 1, generator=seeded()), random_flip(images, generator=seeded())):
        assert augmented.dtype == dtype
        assert augmented.shape == images.shape
        assert augmented.is_contiguous()


def test_augmentation_follows_the_generator():
    images = torch.rand(32, 1, 6, 6)
    for augment in (
        lambda g: random_crop(images, 2, generator=g),
        lambda g: random_flip(images, generator=g),
    ):
        assert augment(seeded(1)).equal(augment(seeded(1)))
        assert not augment(seeded(1)).equal(augment(seeded(2)))


def test_augmentation_takes_images_of_another_device_than_the_generators():
    images = torch.empty(4, 3, 8, 8, device="meta")
    for augmented in (random_crop(images, 2, generator=seeded()), random_flip(images, generator=seeded())):
        assert augmented.device.type == "meta"
        assert augmented.shape == images.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cpu_generator_gives_the_same_on_a_gpu():
    images = torch.rand(16, 3, 8, 8)
    assert random_crop(images.cuda(), 2, generator=seeded()).cpu().equal(random_crop(images, 2, generator=seeded()))
    assert random_flip(images.cuda(), generator=seeded()).cpu().equal(random_flip(images, generator=seeded()))


def test_augmentation_refuses_what_is_no_batch():
    image = torch.rand(3, 8, 8)
    with pytest.raises(InvalidArgumentError, match=r"\(3, 8, 8\)"):
        random_crop(image, 2, generator=seeded())
    with pytest.raises(InvalidArgumentError, match=r"\(3, 8, 8\)"):
        random_flip(image, generator=seeded())


@pytest.mark.parametrize("padding", [-1, 1.5, True])
def test_random_crop_refuses_a_wrong_padding(padding):
    with pytest.raises(InvalidArgumentError, match="padding"):
        random_crop(torch.rand(1, 3, 8, 8), padding, generator=seeded())

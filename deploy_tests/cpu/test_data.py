"""Data sets by name, how images are prepared, and what is said about those that will not do."""

import hashlib
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from chip_deploy.pipeline.data import (
    DataSet,
    Images,
    PixelImages,
    default_size,
    known_data,
    normalise,
    open_data,
    prepare,
)
from chip_deploy.pipeline.models import build_model

EVERY = torch.arange


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three training and two test images each, 40 x 30 pixels of noise."""
    root = tmp_path / "pets"
    draw = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                _write(root / split / label / f"{number}.png", draw.integers(0, 256, (30, 40, 3), np.uint8))
    return root


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _open(folder: Path, *, size: int = 32, memory_bytes: int = 2**20) -> DataSet:
    return open_data(f"imagefolder:{folder}", size=size, seed=0, memory_bytes=memory_bytes)


def _all(images: Images) -> torch.Tensor:
    return images.read(EVERY(len(images)))


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_own_pixels_in_a_split_that_no_seed_changes() -> None:
    from sklearn.datasets import load_digits

    whole = load_digits()
    data = open_data("digits", size=8, seed=0)
    grey = torch.cat([_all(data.train), _all(data.test)])[:, 0].numpy()
    found = {image.tobytes() for image in grey}

    assert {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in whole.images} == found
    assert len(data.train) + len(data.test) == 1797
    assert open_data("digits", size=8, seed=5).digest == data.digest


def test_digits_are_split_four_to_one_within_every_digit() -> None:
    data = open_data("digits", size=32, seed=0)
    train, test = (images.labels.bincount() for images in (data.train, data.test))
    assert data.classes == list("0123456789")
    assert ((test / (train + test) - 0.2).abs() < 0.01).all()
    assert (data.n_classes, data.has_accuracy, data.size, data.train.size) == (10, True, 32, 32)


def test_digits_are_grey_on_black_at_the_size_asked_for() -> None:
    image = open_data("digits", size=32, seed=0).train.read(torch.tensor([0]))
    assert image.shape == (1, 3, 32, 32)
    assert image.dtype == torch.uint8
    assert torch.equal(image[:, 0], image[:, 1])
    assert torch.equal(image[:, 0], image[:, 2])
    assert image[0, 0, :, 0].float().mean() < 60 < image.max()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_images_keep_their_pixels_and_classes_are_alphabetical(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    images = {label: draw.integers(0, 256, (32, 32, 3), np.uint8) for label in ("b", "a")}
    for label, pixels in images.items():
        _write(tmp_path / "train" / label / "x.png", pixels)
        _write(tmp_path / "val" / label / "deeper" / "x.webp", pixels)
        Image.fromarray(pixels).save(tmp_path / "val" / label / "deeper" / "x.webp", lossless=True)
    data = open_data(f"imagefolder:{tmp_path}", size=32, seed=0)

    assert data.classes == ["a", "b"]
    for split in (data.train, data.test):
        assert split.labels.tolist() == [0, 1]
        assert np.array_equal(split.read(torch.tensor([1]))[0].permute(1, 2, 0).numpy(), images["b"])


def test_val_is_preferred_where_there_is_also_a_test_folder(folder: Path) -> None:
    shutil.copytree(folder / "train", folder / "val")
    assert len(_open(folder).test) == 6


def test_images_that_do_not_fit_into_memory_are_decoded_when_read_and_come_out_the_same(folder: Path) -> None:
    held, decoded = _open(folder), _open(folder, memory_bytes=0)
    assert held.train.in_memory
    assert not decoded.train.in_memory
    assert torch.equal(_all(held.train), _all(decoded.train))
    assert torch.equal(decoded.train.read(torch.tensor([4, 1])), held.train.read(torch.tensor([4, 1])))


def test_grey_palette_and_transparent_images_become_rgb(folder: Path) -> None:
    grey = Image.linear_gradient("L").resize((32, 32))
    grey.save(folder / "train" / "cat" / "0.png")
    grey.convert("P").save(folder / "train" / "cat" / "1.png", transparency=b"\x00" * 10)
    grey.convert("RGBA").save(folder / "train" / "cat" / "2.png")
    images = _open(folder).train.read(torch.tensor([0, 1, 2]))
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert np.array_equal(images[0, 1].numpy(), np.asarray(grey))


def test_reading_tells_how_far_it_is(folder: Path) -> None:
    told: list[tuple[float, str]] = []
    open_data(f"imagefolder:{folder}", size=32, seed=0, progress=lambda fraction, text: told.append((fraction, text)))
    assert told == [(0.5, "reading image 6 of 6"), (1.0, "reading image 4 of 4")]


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256), (97, 1000)])
def test_large_images_are_prepared_as_torchvision_does_for_imagenet(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (*shape, 3), np.uint8)
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.fromarray(pixels))
    assert np.array_equal(prepare(pixels, size=224), np.asarray(theirs))


def test_small_images_are_resized_whole_as_torchvision_does() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (50, 41, 3), np.uint8)
    assert np.array_equal(prepare(pixels, size=32), np.asarray(transforms.Resize((32, 32))(Image.fromarray(pixels))))


def test_normalisation_is_imagenets() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    theirs = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(pixels.float() / 255)
    assert torch.equal(normalise(pixels), theirs)


# -- bad folders -------------------------------------------------------------------------------------------------------


def _empty_class(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "dog")
    (folder / "test" / "dog").mkdir()


def _one_class(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "dog")
    shutil.rmtree(folder / "test" / "dog")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _loose_images(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    _write(folder / "train" / "x.png", np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_empty, "is empty; expected train/ and val/ or test/"),
        (_one_class, "has only one class ('cat')"),
        (_empty_class, "dog has no images in it"),
        (_loose_images, "train holds no class folders; expected train/CLASS/image.png"),
        (lambda folder: shutil.rmtree(folder / "train"), "has no train/"),
        (lambda folder: shutil.rmtree(folder / "test"), "has no val/ or test/"),
        (lambda folder: shutil.rmtree(folder / "test" / "dog"), "different classes; 'dog' is only in train/"),
        (lambda folder: (folder / "test" / "cow").mkdir(), "cow has no images in it"),
        (
            lambda folder: (folder / "test" / "cat" / "notes.txt").write_text("hi"),
            "notes.txt is not an image; expected",
        ),
        (
            lambda folder: (folder / "train" / "cat" / "0.png").write_text("hi"),
            "0.png is not an image, whatever its name",
        ),
        (
            lambda folder: (folder / "train" / "cat" / "0.png").write_bytes(b""),
            "0.png is not an image, whatever its name",
        ),
        (
            lambda folder: Image.new("I;16", (8, 8)).save(folder / "train" / "cat" / "0.png"),
            "0.png has more than 8 bits a colour (mode I;16). Convert it",
        ),
    ],
)
def test_folders_that_will_not_do_are_refused_in_a_sentence(
    spoil: Callable[[Path], object], sentence: str, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        _open(folder)
    assert str(folder) in str(refused.value)


def test_missing_folders_and_files_in_their_place_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        _open(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="file is a file; expected a folder"):
        _open(tmp_path / "file")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("memory_bytes", [0, 2**20], ids=["decoded when read", "held in memory"])
def test_a_truncated_image_is_named(kind: str, memory_bytes: int, folder: Path) -> None:
    whole = folder / "train" / "dog" / f"9.{kind}"
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8)
    _write(whole, noise)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(
        ValueError, match=rf"image .*9.{kind} cannot be decoded, it may be truncated|9.{kind} is not an"
    ):
        _all(_open(folder, memory_bytes=memory_bytes).train)


# -- digest ------------------------------------------------------------------------------------------------------------


def test_the_digest_is_the_contents_not_the_places_or_the_times(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "copy"
    shutil.copytree(folder, elsewhere)
    os.utime(elsewhere / "train" / "cat" / "0.png", (1, 1))
    assert _open(folder).digest == _open(elsewhere).digest


def _one_pixel(folder: Path) -> None:
    path = folder / "test" / "cat" / "1.png"
    pixels = np.array(Image.open(path))
    pixels[15:18, 15:18] ^= 64
    _write(path, pixels)


@pytest.mark.parametrize("memory_bytes", [0, 2**20], ids=["decoded when read", "held in memory"])
@pytest.mark.parametrize(
    "change",
    [
        _one_pixel,
        lambda folder: (folder / "train" / "cat" / "2.png").unlink(),
        lambda folder: (folder / "train" / "cat" / "2.png").rename(folder / "train" / "dog" / "x.png"),
        lambda folder: [(folder / split / "cat").rename(folder / split / "bird") for split in ("train", "test")],
    ],
    ids=["a pixel", "an image less", "another label", "another class name"],
)
def test_the_digest_changes_with_the_data(change: Callable[[Path], object], memory_bytes: int, folder: Path) -> None:
    before = _open(folder, memory_bytes=memory_bytes).digest
    change(folder)
    assert _open(folder, memory_bytes=memory_bytes).digest != before


def test_the_digest_changes_with_the_size(folder: Path) -> None:
    assert _open(folder, size=32).digest != _open(folder, size=40).digest


# -- noise -------------------------------------------------------------------------------------------------------------


def test_noise_has_images_but_no_accuracy() -> None:
    data = open_data("random:5", size=48, seed=0)
    assert (len(data.train), len(data.test), data.has_accuracy, data.n_classes) == (5, 5, False, 0)
    assert _all(data.train).shape == (5, 3, 48, 48)
    assert not torch.equal(_all(data.train), _all(data.test))
    assert not torch.equal(_all(data.train)[0], _all(data.train)[1])


def test_noise_follows_from_the_seed_image_by_image() -> None:
    one, same, other = (open_data("random:4", size=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(_all(one.train), _all(same.train))
    assert torch.equal(_all(one.train)[3:], same.train.read(torch.tensor([3])))
    assert not torch.equal(_all(one.train), _all(other.train))
    assert one.digest == same.digest != other.digest


# -- torchvision's sets ------------------------------------------------------------------------------------------------


def _write_idx(path: Path, array: np.ndarray) -> None:
    """LeCun's format: two zeros, the type (8 is uint8), the number of axes, their lengths, the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder_name", "flip"), [("mnist", "MNIST", False), ("fashion-mnist", "FashionMNIST", True)]
)
def test_mnist_files_are_read_where_they_lie(name: str, folder_name: str, flip: bool, tmp_path: Path) -> None:
    images = np.random.default_rng(5).integers(0, 256, (10, 28, 28), np.uint8)
    for split in ("train", "t10k"):
        _write_idx(tmp_path / folder_name / "raw" / f"{split}-images-idx3-ubyte", images)
        _write_idx(tmp_path / folder_name / "raw" / f"{split}-labels-idx1-ubyte", np.arange(10, dtype=np.uint8))
    data = open_data(f"{name}:{tmp_path}", size=28, seed=0)
    assert data.test.labels.tolist() == list(range(10))
    assert np.array_equal(_all(data.train)[:, 2].numpy(), images)
    assert (data.n_classes, data.flip) == (10, flip)


def test_cifar_files_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.random.default_rng(6).integers(0, 256, (10, 3072), np.uint8)
    contents = {
        "data_batch_1": {"data": pixels, "labels": [*range(10)]},
        "test_batch": {"data": pixels, "labels": [3] * 10},
    }
    contents["batches.meta"] = {"label_names": [f"class {label}" for label in range(10)]}
    md5 = {}
    for name, content in contents.items():
        (root / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5["batches.meta"]})

    data = open_data(f"cifar10:{tmp_path}", size=32, seed=0)

    assert np.array_equal(_all(data.train).reshape(10, -1).numpy(), pixels)
    assert data.test.labels.tolist() == [3] * 10
    assert data.classes[9] == "class 9"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_absent_sets_say_where_they_were_looked_for_and_are_not_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"in {tmp_path / 'data'}. Name the folder")):
        open_data(name, size=32, seed=0)
    with pytest.raises(FileNotFoundError, match=r"\(--data .+:DIR\), or fetch them there: python -c"):
        open_data(f"{name}:elsewhere", size=32, seed=0)
    assert not list(tmp_path.iterdir())


def test_damaged_sets_are_refused_like_absent_ones(tmp_path: Path) -> None:
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            _write_idx(tmp_path / "MNIST" / "raw" / f"{split}-{kind}-ubyte", np.zeros((2, 28, 28), np.uint8))
    damaged = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(FileNotFoundError, match=re.escape(f"are not (or not whole) in {tmp_path}")):
        open_data(f"mnist:{tmp_path}", size=32, seed=0)


# -- the user's own ----------------------------------------------------------------------------------------------------

OWN = """
from types import SimpleNamespace
import numpy as np
import torch

images = torch.arange(4 * 3 * 16 * 16).reshape(4, 3, 16, 16).to(torch.uint8)

def plain():
    return SimpleNamespace(train=(images, torch.tensor([0, 1, 2, 1])), test=(images.numpy(), np.array([2, 0, 1, 1])))

def named(size, seed):
    made = plain()
    made.classes, made.flip, made.asked = ["x", "y", "z"], False, (size, seed)
    return made

def few_names():
    made = plain()
    made.classes = ["x", "y"]
    return made

def floats():
    return SimpleNamespace(train=(images.float(), torch.zeros(4)), test=(images, torch.zeros(4)))

def short():
    return SimpleNamespace(train=(images, torch.tensor([0, 1])), test=(images, torch.zeros(4)))

def no_test():
    return SimpleNamespace(train=(images, torch.tensor([0, 1, 2, 1])))

def constant():
    return SimpleNamespace(train=(images, torch.zeros(4, dtype=int)), test=(images, torch.zeros(4, dtype=int)))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c_own_data.py").write_text(OWN)
    monkeypatch.delitem(__import__("sys").modules, "c_own_data", raising=False)


@pytest.mark.usefixtures("own")
def test_a_users_factory_gives_tensors_or_arrays() -> None:
    data = open_data("c_own_data:plain", size=16, seed=0)
    assert (data.classes, data.flip, data.test.labels.tolist()) == (["0", "1", "2"], True, [2, 0, 1, 1])
    assert _all(data.train).flatten().tolist() == [number % 256 for number in range(4 * 3 * 16 * 16)]
    assert torch.equal(_all(data.train), _all(data.test))
    named = open_data("c_own_data:named", size=8, seed=0)
    assert (named.classes, named.flip, named.train.size) == (["x", "y", "z"], False, 8)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("floats", "train images are float32 (4, 3, 16, 16); expected uint8 (N, 3, H, W)"),
        ("short", "train labels are int64 (2,); expected 4 class numbers from 0"),
        ("no_test", "expected an object whose `test` is a pair (images, labels)"),
        ("few_names", "label 2 has no name; `classes` lists 2"),
        ("constant", "has only one class ('0')"),
        ("plane", "'plane' is missing in c_own_data. Did you mean 'plain'?"),
    ],
)
def test_factories_that_break_the_contract_are_refused(factory: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        open_data(f"c_own_data:{factory}", size=16, seed=0)


# -- names, sizes, samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("digit", "unknown data 'digit'. Did you mean 'digits'?"),
        ("cifar_10", "unknown data 'cifar_10'. Did you mean 'cifar10'?"),
        ("", "unknown data ''."),
        ("digits:3", "unknown data 'digits:3'."),
        ("imagefolder", "data 'imagefolder' needs a folder: imagefolder:DIR"),
        ("no_such_package:make", "data 'no_such_package:make': no module 'no_such_package'"),
        ("random", "data 'random': expected random:N with N a positive whole number"),
        ("random:0", "data 'random:0': expected random:N"),
        ("random:-5", "data 'random:-5': expected random:N"),
        ("random:2.5", "data 'random:2.5': expected random:N"),
        ("random:many", "data 'random:many': expected random:N"),
        ("random:nan", "data 'random:nan': expected random:N"),
    ],
)
def test_unknown_data_is_refused_in_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        open_data(name, size=32, seed=0)


def test_all_kinds_of_data_are_listed_for_a_wrong_name() -> None:
    with pytest.raises(ValueError, match="unknown data") as refused:
        open_data("pictures", size=32, seed=0)
    assert all(kind in str(refused.value) for kind in known_data())


def test_the_default_size_is_the_models_except_for_digits() -> None:
    small, large = build_model("resnet20", num_classes=10, seed=0), "resnet18"
    assert [default_size(small, name) for name in ("digits", "random:4", "cifar10")] == [32, 32, 32]
    assert [default_size(large, name) for name in ("digits", "random:4", "cifar10")] == [32, 224, 224]


def _numbered(n: int) -> PixelImages:
    return PixelImages(torch.arange(n).to(torch.uint8)[:, None, None, None].expand(n, 3, 8, 8), torch.arange(n))


def test_a_sample_is_drawn_once_per_seed_without_repetition() -> None:
    images = _numbered(50)
    first, again, other = (images.sample(20, seed=seed, what="score.images") for seed in (0, 0, 1))
    assert first.labels.tolist() == again.labels.tolist() != other.labels.tolist()
    assert len({*first.labels.tolist()}) == 20
    assert _all(first)[:, 0, 0, 0].tolist() == first.labels.tolist()
    assert len(images.sample(50, seed=0, what="score.images")) == 50


def test_more_images_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"score.images asks for 51 images, but there are only 50. Ask for fewer"):
        _numbered(50).sample(51, seed=0, what="score.images")


def test_subsets_of_subsets_count_from_the_subset() -> None:
    part = _numbered(50).subset(torch.tensor([10, 20, 30])).subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [30, 10]
    assert _all(part)[:, 0, 0, 0].tolist() == [30, 10]

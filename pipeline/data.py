"""Data sets by name, as square uint8 images: digits, folders, torchvision's, noise, or the user's own factory."""

import functools
import hashlib
import os
import pickle
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .batches import shuffled, stream
from .models import BuiltModel, accepted, import_object, input_size, nearest

# Shape letters: N images of a set, B images of a batch, H W pixels, S pixels a side.

Progress = Callable[[float, str], None]
"""Told the fraction done (0 to 1) and what is being done."""

IN_MEMORY_BYTES = 2**30  # a split that needs no more than this is decoded once and kept; a larger one, batch by batch
SMALL_SIZE = 64  # up to here images are resized as they are; above, the middle of a larger copy is taken
DIGITS_SIZE = 32
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_DECODE_ERRORS = (
    OSError,  # PIL's own, truncated files among them
    SyntaxError,  # PIL's word for a broken PNG
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_BROKEN_SET_ERRORS = (  # torchvision says RuntimeError for absent files; broken ones fail wherever they are parsed
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
)


class Images(ABC):
    """Labelled square images, read by number."""

    labels: Tensor
    size: int
    in_memory: bool

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """The images of those numbers.

        Shapes: (B,) integers -> (B, 3, S, S) uint8.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the images do."""

    def subset(self, indices: Tensor) -> "Images":
        """These images alone, in this order."""
        return _Subset(self, indices)

    def sample(self, n: int, *, seed: int, what: str) -> "Images":
        """n of the images, drawn once for that seed and purpose, in the set's own order.

        Raises: ValueError where there are fewer than n; `what` names the setting that asked.
        """
        if n > len(self):
            raise ValueError(f"{what} asks for {n} images, but there are only {len(self)}. Ask for fewer.")
        return self if n == len(self) else self.subset(shuffled(len(self), seed, what)[:n].sort().values)


class PixelImages(Images):
    """Images held in memory."""

    in_memory = True

    def __init__(self, pixels_N3SS: Tensor, labels_N: Tensor) -> None:
        self.pixels = pixels_N3SS
        self.labels = labels_N
        self.size = pixels_N3SS.shape[-1]

    def read(self, indices: Tensor) -> Tensor:
        """The images of those numbers."""
        return self.pixels[indices]

    def fingerprint(self) -> str:
        """The digest of every pixel."""
        return hashlib.sha256(self.pixels.contiguous().numpy().data).hexdigest()


class Source(Protocol):
    """Where images that are not prepared yet come from."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, of whatever size."""
        ...

    def fingerprint(self) -> str:
        """Changes when the images do."""
        ...


class DecodedImages(Images):
    """Images decoded and resized each time they are read, in as many threads as there are cores."""

    in_memory = False

    def __init__(self, source: Source, labels_N: Tensor, *, size: int) -> None:
        self.source = source
        self.labels = labels_N
        self.size = size

    def read(self, indices: Tensor) -> Tensor:
        """The images of those numbers.

        Raises: ValueError naming the file that cannot be decoded.
        """
        with ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1)) as pool:
            parts = list(pool.map(self._read_some, np.array_split(indices.numpy(), max(1, len(indices) // 16))))
        return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()

    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint()

    def into_memory(self, *, progress: Progress | None = None) -> PixelImages:
        """The same images, decoded once."""
        pixels = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        step = 1024
        for start in range(0, len(self), step):
            indices = torch.arange(start, min(start + step, len(self)))
            pixels[start : start + step] = self.read(indices)
            if progress is not None:
                done = start + len(indices)
                progress(done / len(self), f"reading image {done} of {len(self)}")
        return PixelImages(pixels, self.labels)

    def _read_some(self, indices: np.ndarray) -> np.ndarray:
        shape = (self.size, self.size, 3)
        return np.array([prepare(self.source.open(int(i)), size=self.size) for i in indices], np.uint8).reshape(
            -1, *shape
        )


class NoiseImages(Images):
    """Coloured clouds, each image from its own random stream; all labels are 0."""

    in_memory = False

    def __init__(self, n: int, *, size: int, seed: int, split: str) -> None:
        self.labels = torch.zeros(n, dtype=torch.int64)
        self.size = size
        self.name = ("noise", seed, split)

    def read(self, indices: Tensor) -> Tensor:
        """The images of those numbers: 8 x 8 random colours, enlarged, so that they differ in more than grain."""
        coarse = [torch.rand(3, 8, 8, generator=stream(*self.name, int(i))) for i in indices]
        if not coarse:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        fine = F.interpolate(torch.stack(coarse), size=(self.size, self.size), mode="bilinear", align_corners=False)
        return (fine * 255).round().to(torch.uint8)

    def fingerprint(self) -> str:
        """The name of the random stream, which decides every pixel."""
        return f"{self.name}/{len(self)}/{self.size}"


@dataclass(frozen=True)
class DataSet:
    """Training and test images of the same classes, and what the other stages need to know about them.

    `flip` says that a mirrored image keeps its label; `digest` changes when any image, label or class name does.
    Noise has no classes: has_accuracy is then False and n_classes 0.
    """

    name: str
    classes: list[str]
    train: Images
    test: Images
    has_accuracy: bool
    flip: bool
    digest: str
    size: int

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


def known_data() -> list[str]:
    """What `--data` takes, as a user would type it."""
    return [
        "digits",
        "imagefolder:DIR",
        *(f"{name}[:DIR]" for name in _TORCHVISION_SETS),
        "random:N",
        "package.module:factory",
    ]


def default_size(model: BuiltModel | str, data_name: str) -> int:
    """The side of the images where the recipe names none: 32 for the digits, else what the model is made for."""
    if data_name == "digits":
        return DIGITS_SIZE
    return input_size(model) if isinstance(model, str) else model.input_size


def open_data(
    name: str, *, size: int, seed: int, memory_bytes: int = IN_MEMORY_BYTES, progress: Progress | None = None
) -> DataSet:
    """The data set of that name as square images of `size` pixels; nothing is ever downloaded.

    digits: scikit-learn's 1797 handwritten digits, 8 x 8 enlarged to `size` (bilinear); of each digit every fifth
    image is a test image, whatever the seed. imagefolder:DIR: DIR/train/CLASS/... and DIR/val or DIR/test likewise
    (val where both exist). cifar10, cifar100, mnist, fashion-mnist: torchvision's files, in ./data or in :DIR.
    random:N: N coloured clouds for each of training and test, for structure and latency only.
    package.module:factory: called with size and seed where it takes them; returns an object whose `train` and `test`
    are pairs (images, labels), images (N, 3, H, W) uint8 and labels N class numbers, tensors or arrays, with
    optionally `classes` (a list of names) and `flip` (False where a mirrored image changes its class).

    Up to 64 pixels images are resized to size x size; above, the shorter side to 256/224 of the size, and the middle
    is cut out. A split of at most `memory_bytes` is decoded once.
    Raises: ValueError or FileNotFoundError, one sentence naming what is wrong and where.
    """
    if size < 8:
        raise ValueError(f"data.size is {size}; images need at least 8 pixels a side.")
    kind, colon, where = name.partition(":")
    match kind:
        case "digits" if not colon:
            raw = _digits()
        case "imagefolder":
            raw = _image_folder(where)
        case "random":
            return _noise(name, where, size=size, seed=seed)
        case _ if kind in _TORCHVISION_SETS:
            raw = _torchvision_set(kind, where)
        case _ if colon and kind != "digits":
            raw = _from_factory(name, size=size, seed=seed)
        case _:
            known = known_data()
            close = nearest(name, ["digits", "imagefolder", *_TORCHVISION_SETS, "random"])
            raise ValueError(f"unknown data '{name}'.{close} Data: {', '.join(known)}.")
    _require_classes(name, raw)
    train = _load(raw.train, raw.train_labels, size=size, memory_bytes=memory_bytes, progress=_half(progress, 0.0))
    test = _load(raw.test, raw.test_labels, size=size, memory_bytes=memory_bytes, progress=_half(progress, 0.5))
    return DataSet(
        name=name,
        classes=raw.classes,
        train=train,
        test=test,
        has_accuracy=True,
        flip=raw.flip,
        digest=_digest(raw.classes, train, test),
        size=size,
    )


def normalise(pixels: Tensor) -> Tensor:
    """uint8 images as the networks read them: scaled to [0, 1], ImageNet's mean and deviation taken out.

    Shapes: (..., 3, H, W) uint8 -> the same, float32.
    """
    mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() / 255 - mean) / std


def prepare(image_HW3: np.ndarray, *, size: int) -> np.ndarray:
    """The square image that a network of that input size is shown.

    Shapes: (H, W, 3) uint8 -> (size, size, 3) uint8.
    """
    height, width = image_HW3.shape[:2]
    if (height, width) == (size, size):
        return image_HW3
    image = Image.fromarray(image_HW3)
    if size <= SMALL_SIZE:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    short = round(size * 256 / 224)
    across, down = (short, short * height // width) if width <= height else (short * width // height, short)
    image = image.resize((across, down), Image.Resampling.BILINEAR)
    left, top = round((across - size) / 2), round((down - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


# -- the kinds of data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Raw:
    """Two sources with their labels, before anything is resized."""

    classes: list[str]
    train: Source
    train_labels: Tensor
    test: Source
    test_labels: Tensor
    flip: bool


class _Arrays:
    """Images in memory at their own size: (N, H, W) grey or (N, H, W, 3)."""

    def __init__(self, arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def open(self, index: int) -> np.ndarray:
        image = self.arrays[index]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)

    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.arrays).data).hexdigest()


class _Files:
    """Image files below a folder."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self.root = root
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> np.ndarray:
        return _decode(self.files[index])

    def fingerprint(self) -> str:
        """Names, sizes and times of change: to read a set that exceeds memory only for its hash takes too long."""
        digest = hashlib.sha256()
        for file in self.files:
            stat = file.stat()
            digest.update(f"{file.relative_to(self.root).as_posix()}\n{stat.st_size}\n{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class _Subset(Images):
    def __init__(self, whole: Images, indices: Tensor) -> None:
        self.whole = whole
        self.indices = indices
        self.labels = whole.labels[indices]
        self.size = whole.size
        self.in_memory = whole.in_memory

    def read(self, indices: Tensor) -> Tensor:
        return self.whole.read(self.indices[indices])

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self.indices.contiguous().numpy().data).hexdigest()
        return f"{self.whole.fingerprint()}/{chosen}"


def _digits() -> _Raw:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero().flatten()[4::5]] = True
    return _Raw(
        classes=[str(digit) for digit in range(10)],
        train=_Arrays(pixels[~is_test.numpy()]),
        train_labels=labels[~is_test],
        test=_Arrays(pixels[is_test.numpy()]),
        test_labels=labels[is_test],
        flip=False,
    )


def _image_folder(where: str) -> _Raw:
    if not where:
        raise ValueError(
            "data 'imagefolder' needs a folder: imagefolder:DIR, with DIR/train/CLASS/... and DIR/val or DIR/test."
        )
    root = Path(where).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"data folder {root.absolute()} does not exist.")
    if not root.is_dir():
        raise NotADirectoryError(
            f"data folder {root.absolute()} is a file; expected a folder with train/ and val/ or test/."
        )
    if not any(root.iterdir()):
        raise ValueError(f"data folder {root} is empty; expected train/ and val/ or test/ in it.")
    test_root = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        missing = "train/" if test_root is not None else "val/ or test/"
        raise ValueError(
            f"data folder {root} has no {missing}; expected train/CLASS/... and val/CLASS/... or test/CLASS/..."
        )
    classes, train, train_labels = _read_tree(root / "train")
    test_classes, test, test_labels = _read_tree(test_root)
    if classes != test_classes:
        odd = sorted({*classes} ^ {*test_classes})
        where_odd = "train" if odd[0] in classes else test_root.name
        raise ValueError(
            f"data folder {root}: train/ and {test_root.name}/ have different classes; "
            f"'{odd[0]}' is only in {where_odd}/."
        )
    return _Raw(classes=classes, train=train, train_labels=train_labels, test=test, test_labels=test_labels, flip=True)


def _read_tree(folder: Path) -> tuple[list[str], _Files, Tensor]:
    """The class folders in alphabetical order, every file below them, and the files' classes."""
    class_folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not class_folders:
        raise ValueError(f"data folder {folder} holds no class folders; expected {folder.name}/CLASS/image.png.")
    files: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = _image_files(class_folder)
        files += found
        labels += [label] * len(found)
    return [entry.name for entry in class_folders], _Files(folder, files), torch.tensor(labels, dtype=torch.int64)


def _image_files(class_folder: Path) -> list[Path]:
    found = []
    for base, folders, names in os.walk(class_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(base, name) for name in sorted(names) if not name.startswith(".") and name != "Thumbs.db"]
    for file in found:
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{file} is not an image; expected one of {kinds}. Move it out of the class folders.")
    if not found:
        raise ValueError(f"data folder {class_folder} has no images in it.")
    return found


def _decode(path: Path) -> np.ndarray:
    """The pixels of a file, (H, W, 3) uint8."""
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith(("I", "F"))
            rgb = image if deep else _to_rgb(image)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"image {path} has gone since the folder was listed.") from err
    except Image.UnidentifiedImageError as err:
        raise ValueError(f"{path} is not an image, whatever its name says, or its beginning is lost.") from err
    except _DECODE_ERRORS as err:
        raise ValueError(f"image {path} cannot be decoded, it may be truncated: {err}. Replace or remove it.") from err
    if deep:  # PIL would clip the values instead of scaling them
        raise ValueError(f"image {path} has more than 8 bits a colour (mode {rgb.mode}). Convert it to 8-bit RGB.")
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if "transparency" in image.info:  # otherwise PIL warns about palettes
        image = image.convert("RGBA")
    return image.convert("RGB")


def _torchvision_set(kind: str, where: str) -> _Raw:
    from torchvision import datasets

    builder = getattr(datasets, _TORCHVISION_SETS[kind])
    root = Path(where or "data").expanduser()
    try:
        train, test = (builder(root=root, train=train, download=False) for train in (True, False))
    except _BROKEN_SET_ERRORS as err:
        fetch = f"from torchvision.datasets import {builder.__name__} as D; D({str(root)!r}, download=True)"
        raise FileNotFoundError(
            f"data '{kind}': torchvision's {builder.__name__} files are not (or not whole) in {root.absolute()}. "
            f'Name the folder that has them (--data {kind}:DIR), or fetch them there: python -c "{fetch}"'
        ) from err
    return _Raw(
        classes=[str(label) for label in train.classes],
        train=_Arrays(np.asarray(train.data)),
        train_labels=torch.as_tensor(train.targets, dtype=torch.int64),
        test=_Arrays(np.asarray(test.data)),
        test_labels=torch.as_tensor(test.targets, dtype=torch.int64),
        flip=kind != "mnist",
    )


def _noise(name: str, count: str, *, size: int, seed: int) -> DataSet:
    if not count.isascii() or not count.isdigit() or int(count) == 0:
        raise ValueError(
            f"data '{name}': expected random:N with N a positive whole number of images, such as random:64."
        )
    train, test = (NoiseImages(int(count), size=size, seed=seed, split=split) for split in ("train", "test"))
    return DataSet(
        name=name,
        classes=[],
        train=train,
        test=test,
        has_accuracy=False,
        flip=True,
        digest=_digest([], train, test),
        size=size,
    )


def _from_factory(name: str, *, size: int, seed: int) -> _Raw:
    factory = import_object(name, what="data")
    made = factory(**accepted(factory, {"size": size, "seed": seed}))
    train, train_labels = _pair(name, made, "train")
    test, test_labels = _pair(name, made, "test")
    highest = int(max(train_labels.max(), test_labels.max()))
    classes = [str(label) for label in getattr(made, "classes", None) or range(highest + 1)]
    if highest >= len(classes):
        raise ValueError(
            f"data '{name}': label {highest} has no name; `classes` lists {len(classes)}, numbered from 0."
        )
    return _Raw(
        classes=classes,
        train=train,
        train_labels=train_labels,
        test=test,
        test_labels=test_labels,
        flip=bool(getattr(made, "flip", True)),
    )


def _pair(name: str, made: object, split: str) -> tuple[_Arrays, Tensor]:
    """One split of what a user's factory returned, its contract checked."""
    pair = getattr(made, split, None)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"data '{name}': expected an object whose `{split}` is a pair (images, labels).")
    images, labels = (np.asarray(part) for part in pair)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"data '{name}': {split} images are {images.dtype} {images.shape}; expected uint8 (N, 3, H, W)."
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"data '{name}': {split} labels are {labels.dtype} {labels.shape}; "
            f"expected {len(images)} class numbers from 0."
        )
    return _Arrays(images.transpose(0, 2, 3, 1)), torch.as_tensor(labels.astype(np.int64))


# -- checks, memory, digest --------------------------------------------------------------------------------------------


def _require_classes(name: str, raw: _Raw) -> None:
    if len(raw.classes) < 2:
        only = f" ('{raw.classes[0]}')" if raw.classes else ""
        raise ValueError(f"data '{name}' has only one class{only}; telling classes apart needs at least two.")


def _load(source: Source, labels: Tensor, *, size: int, memory_bytes: int, progress: Progress | None) -> Images:
    images = DecodedImages(source, labels, size=size)
    return images.into_memory(progress=progress) if 3 * size * size * len(source) <= memory_bytes else images


def _half(progress: Progress | None, start: float) -> Progress | None:
    return None if progress is None else functools.partial(_report_half, progress, start)


def _report_half(progress: Progress, start: float, fraction: float, text: str) -> None:
    progress(start + fraction / 2, text)


def _digest(classes: Sequence[str], train: Images, test: Images) -> str:
    digest = hashlib.sha256(repr(list(classes)).encode())
    for images in (train, test):
        digest.update(f"{images.size}/{images.fingerprint()}".encode())
        digest.update(images.labels.contiguous().numpy().data)
    return digest.hexdigest()

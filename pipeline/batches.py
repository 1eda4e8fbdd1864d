"""Batches whose order and augmentation follow from (seed, epoch, batch) alone, so that a killed run can be repeated."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape letters: N images of a set, B images of a batch, C channels, H W pixels, S pixels a side.

SHIFT_PIXELS = 4
SMALL_SIDE = 64  # up to here images are shifted; above, a part of them is enlarged
MIN_AREA, MIN_ASPECT, MAX_ASPECT = 0.35, 3 / 4, 4 / 3


class ImageSet(Protocol):
    """What a batch is drawn from."""

    labels: Tensor
    in_memory: bool

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """(B,) integers -> (B, 3, S, S) uint8."""
        ...


Batch = tuple[Tensor, Tensor, int, int]
"""Images (B, 3, S, S) uint8, labels (B,), the epoch and the number of the batch in it."""


class EpochBatches:
    """One epoch's batches per iteration; `epoch` is asked for at the start of each.

    Every image comes once an epoch, and batches are as even as they can be: none holds a single image, whose statistics
    a batch norm could not use.
    """

    def __init__(self, images: ImageSet, *, batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.images = images
        self.batch = batch
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._split(torch.arange(len(self.images))))

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch()
        order = shuffled(len(self.images), self.seed, "order", epoch)
        for number, (indices, pixels) in enumerate(read_ahead(self.images, self._split(order))):
            yield pixels, self.images.labels[indices], epoch, number

    def _split(self, order: Tensor) -> Sequence[Tensor]:
        return split_evenly(order, batch=self.batch, at_least=min(2, self.batch))


def stream_seed(*parts: object) -> int:
    """A seed of 63 bits for the random stream of that name, unrelated to every other name's.

    >>> stream_seed(0, "order", 1) == stream_seed(0, "order", 1)
    True
    >>> stream_seed(0, "order", 1) == stream_seed(0, "order", 2)
    False
    """
    name = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def stream(*parts: object) -> torch.Generator:
    """A CPU generator at the start of the random stream of that name."""
    return torch.Generator().manual_seed(stream_seed(*parts))


def shuffled(n: int, *name: object) -> Tensor:
    """0..n-1 in the order that the random stream of that name gives."""
    return torch.randperm(n, generator=stream(*name))


def split_evenly(indices: Tensor, *, batch: int, at_least: int = 1) -> Sequence[Tensor]:
    """The indices in as few parts of at most `batch` as possible, whose lengths differ by one at most.

    No part is shorter than `at_least`, even if one must then be longer than `batch`.

    >>> [len(part) for part in split_evenly(torch.arange(129), batch=128)]
    [65, 64]
    >>> [len(part) for part in split_evenly(torch.arange(3), batch=2, at_least=2)]
    [3]
    """
    parts = min(-(-len(indices) // batch), len(indices) // at_least)
    return torch.tensor_split(indices, max(1, parts))


def read_ahead(images: ImageSet, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, pixels) of each batch; what must be decoded is decoded while the batch before is in use."""
    if images.in_memory:
        for indices in batches:
            yield indices, images.read(indices)
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = [reader.submit(images.read, indices) for indices in batches[:1]]
        for number, indices in enumerate(batches):
            pixels = coming.pop().result()
            coming += [reader.submit(images.read, following) for following in batches[number + 1 : number + 2]]
            yield indices, pixels


def augment(pixels_BCHW: Tensor, *, flip: bool, generator: torch.Generator) -> Tensor:
    """The images shifted or cropped at random, and mirrored at random where `flip` says that this keeps the label.

    Up to 64 pixels a side: a shift by up to 4 pixels either way, black moving in. Above: an upright rectangle of 35 to
    100 % of the area, its sides 3:4 to 4:3, enlarged to the full image (bilinear).
    Shapes: (B, C, H, W) uint8 -> the same. The draws are made on the CPU, so a GPU sees the same ones.
    """
    draws = torch.rand(5, len(pixels_BCHW), generator=generator)
    mirrored = draws[0] < 0.5 if flip else torch.zeros(len(pixels_BCHW), dtype=torch.bool)
    if max(pixels_BCHW.shape[2:]) <= SMALL_SIDE:
        return _shift(pixels_BCHW, draws[1], draws[2], mirrored)
    return _crop_and_enlarge(pixels_BCHW, draws[1:], mirrored)


def _shift(pixels: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Each image cut at its own place from a copy with a black margin; one gather for the whole batch."""
    count, _, height, width = pixels.shape
    choices = 2 * SHIFT_PIXELS + 1
    rows = (down * choices).long()[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + (right * choices).long()[:, None]
    padded = F.pad(pixels, (SHIFT_PIXELS,) * 4).permute(0, 2, 3, 1)
    device = pixels.device
    picked = padded[
        torch.arange(count, device=device)[:, None, None], rows[:, :, None].to(device), columns[:, None, :].to(device)
    ]
    return picked.permute(0, 3, 1, 2).contiguous()


def _crop_and_enlarge(pixels: Tensor, draws: Tensor, mirrored: Tensor) -> Tensor:
    """Each image's own rectangle, resampled to the image's size; in grid units the image is [-1, 1] both ways."""
    area = MIN_AREA + (1 - MIN_AREA) * draws[0]
    log_low, log_high = torch.log(torch.tensor([MIN_ASPECT, MAX_ASPECT]))
    ratio = torch.exp(log_low + (log_high - log_low) * draws[1])
    half_width = (area * ratio).sqrt().clamp(max=1.0)
    half_height = (area / ratio).sqrt().clamp(max=1.0)
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = torch.where(mirrored, -half_width, half_width)
    theta[:, 0, 2] = (2 * draws[2] - 1) * (1 - half_width)
    theta[:, 1, 1] = half_height
    theta[:, 1, 2] = (2 * draws[3] - 1) * (1 - half_height)
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    sampled = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)

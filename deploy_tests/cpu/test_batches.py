"""Order and augmentation follow from (seed, epoch, batch) alone, and keep what they must."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chip_deploy.pipeline.batches import EpochBatches, augment, read_ahead, split_evenly, stream
from chip_deploy.pipeline.data import NoiseImages, PixelImages


def _numbered(n: int) -> PixelImages:
    return PixelImages(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.arange(n))


def _order(n: int, *, batch: int, seed: int, epoch: int) -> list[list[int]]:
    batches = EpochBatches(_numbered(n), batch=batch, seed=seed, epoch=lambda: epoch)
    return [labels.tolist() for _, labels, _, _ in batches]


@given(n=st.integers(1, 400), batch=st.integers(1, 130))
def test_every_image_comes_once_an_epoch_in_even_batches(n: int, batch: int) -> None:
    order = _order(n, batch=batch, seed=0, epoch=0)
    lengths = [len(part) for part in order]
    assert sorted(itertools.chain(*order)) == list(range(n))
    assert max(lengths) - min(lengths) <= 1
    assert len(order) == len(EpochBatches(_numbered(n), batch=batch, seed=0, epoch=lambda: 0))
    if batch > 1 and n > 1:
        assert min(lengths) >= 2
        assert max(lengths) <= max(batch, 3)


def test_the_order_follows_from_seed_and_epoch() -> None:
    first = _order(60, batch=16, seed=0, epoch=3)
    assert first == _order(60, batch=16, seed=0, epoch=3)
    assert first != _order(60, batch=16, seed=0, epoch=4)
    assert first != _order(60, batch=16, seed=1, epoch=3)
    assert [*itertools.chain(*first)] != list(range(60))


def test_batches_say_their_epoch_and_number() -> None:
    batches = EpochBatches(_numbered(10), batch=4, seed=0, epoch=lambda: 7)
    assert [(epoch, number) for _, _, epoch, number in batches] == [(7, 0), (7, 1), (7, 2)]


@pytest.mark.parametrize("flip", [True, False])
def test_small_images_are_windows_of_themselves_with_a_black_margin(flip: bool) -> None:
    pixels = torch.randint(0, 256, (300, 3, 6, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shown = augment(pixels, flip=flip, generator=stream("test"))

    places = [_find_window(shown[index], pixels[index]) for index in range(len(pixels))]

    assert {(down, right) for down, right, _ in places} <= {(a, b) for a in range(9) for b in range(9)}
    assert {down for down, _, _ in places} == {right for _, right, _ in places} == set(range(9))
    mirrored = sum(mirror for _, _, mirror in places)
    assert 110 <= mirrored <= 190 if flip else mirrored == 0


def _find_window(shown: torch.Tensor, image: torch.Tensor) -> tuple[int, int, bool]:
    """Where the shown image was cut out of the original with its margin, looking at every place."""
    height, width = image.shape[1:]
    padded = torch.zeros(3, height + 8, width + 8, dtype=torch.uint8)
    padded[:, 4:-4, 4:-4] = image
    for mirror in (False, True):
        for down in range(9):
            for right in range(9):
                window = padded[:, down : down + height, right : right + width]
                if torch.equal(window.flip(2) if mirror else window, shown):
                    return down, right, mirror
    raise AssertionError("no window of the image looks like that")


def test_large_images_are_enlarged_parts_of_themselves() -> None:
    ramp = torch.linspace(0, 255, 96).round().to(torch.uint8)
    columns, rows = ramp.expand(200, 96, 96), ramp[:, None].expand(200, 96, 96)
    shown = augment(torch.stack([columns, rows, columns], dim=1), flip=False, generator=stream("test")).float() / 255
    across = shown[:, 0, :, -1].mean(1) - shown[:, 0, :, 0].mean(1)
    down = shown[:, 1, -1].mean(1) - shown[:, 1, 0].mean(1)
    area, aspect = across * down, across / down

    assert shown.shape == (200, 3, 96, 96)
    assert 0.33 < area.min() < 0.45
    assert 0.85 < area.max() <= 1.0
    assert 0.72 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.39
    assert shown[:, 0].diff(dim=2).min() >= 0, "not mirrored"


def test_large_images_are_mirrored_half_of_the_time() -> None:
    ramp = torch.linspace(0, 255, 96).round().to(torch.uint8).expand(200, 3, 96, 96)
    shown = augment(ramp, flip=True, generator=stream("test")).float()
    assert 70 <= int((shown[:, 0, 0, 0] > shown[:, 0, 0, -1]).sum()) <= 130


@pytest.mark.parametrize("side", [32, 96])
def test_augmentation_repeats_with_its_stream_and_leaves_the_images_alone(side: int) -> None:
    pixels = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8)
    before = pixels.clone()
    first, again, other = (augment(pixels, flip=True, generator=stream(0, "augment", name)) for name in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(pixels, before)
    assert first.dtype == torch.uint8


def test_decoding_runs_ahead_by_one_batch_and_gives_the_same_images() -> None:
    images = NoiseImages(10, size=8, seed=0, split="train")
    readers: list[str] = []

    class Watched(NoiseImages):
        def read(self, indices: torch.Tensor) -> torch.Tensor:
            readers.append(threading.current_thread().name)
            return super().read(indices)

    watched = Watched(10, size=8, seed=0, split="train")
    got = list(read_ahead(watched, split_evenly(torch.arange(10), batch=3)))

    assert torch.equal(torch.cat([pixels for _, pixels in got]), images.read(torch.arange(10)))
    assert torch.cat([indices for indices, _ in got]).tolist() == list(range(10))
    assert len(readers) == 4
    assert threading.main_thread().name not in readers

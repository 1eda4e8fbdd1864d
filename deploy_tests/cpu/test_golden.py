"""Golden images go through a session in batches of its own size, and come from a file that holds arrays only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chip_deploy.export.errors import IntegrityError
from chip_deploy.export.golden import FREE_BATCH, Golden, read_golden, run_in_batches, write_golden


class MeanSession:
    """Gives the mean of each channel, for batches of one size only where `batch` is above zero."""

    input_names = ("pixels",)
    output_names = ("means", "unused")

    def __init__(self, batch: int) -> None:
        self.input_shapes = {"pixels": (batch, 3, 2, 2)}
        self.fed: list[int] = []

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        images = feeds["pixels"]
        self.fed.append(len(images))
        return {"means": images.mean(axis=(2, 3)), "unused": images}

    def bind(self, feeds: Mapping[str, Any]) -> None:
        return None

    def lap(self) -> None:
        return None

    def close(self) -> None:
        return None


@pytest.mark.parametrize(
    ("batch", "images", "fed"), [(1, 3, [1, 1, 1]), (4, 10, [4, 4, 4]), (-1, 40, [FREE_BATCH, 8]), (4, 1, [4])]
)
def test_every_image_gets_its_own_output_whatever_the_batch(batch: int, images: int, fed: list[int]) -> None:
    images_N3HW = np.random.default_rng(0).standard_normal((images, 3, 2, 2))
    session, heard = MeanSession(batch), []
    outputs = run_in_batches(session, images_N3HW, progress=heard.append)
    np.testing.assert_array_equal(outputs, images_N3HW.mean(axis=(2, 3)))
    assert session.fed == fed
    assert heard == sorted(heard)
    assert heard[-1] == 1


def test_golden_images_and_outputs_are_read_as_they_were_written(tmp_path: Path) -> None:
    images, outputs = np.ones((2, 3, 4, 4), np.float32), np.zeros((2, 10), np.float32)
    np.savez(tmp_path / "golden.npz", input=images, output=outputs)
    golden = read_golden(tmp_path)
    np.testing.assert_array_equal(golden.images, images)
    np.testing.assert_array_equal(golden.outputs, outputs)


def test_outputs_of_converted_files_are_kept_under_their_precision_and_in_the_same_bytes(tmp_path: Path) -> None:
    images, outputs = np.ones((2, 3, 4, 4), np.float32), np.zeros((2, 10), np.float32)
    golden = Golden(images, outputs, {"int8": outputs + 1, "fp8": outputs + 2})
    for name in ("golden.npz", "again.npz"):
        write_golden(tmp_path / name, golden)
    found = read_golden(tmp_path)
    assert found.by_precision.keys() == {"int8", "fp8"}
    np.testing.assert_array_equal(found.by_precision["fp8"], outputs + 2)
    np.testing.assert_array_equal(found.outputs, outputs)
    assert (tmp_path / "golden.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    assert Golden(images, outputs).by_precision == {}


def test_a_golden_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    # numpy stores object arrays as pickles, which run code when they are read.
    np.savez(tmp_path / "golden.npz", input=np.array([{}], dtype=object), output=np.zeros((1, 10)))
    with pytest.raises(IntegrityError, match=r"golden\.npz: no golden images and outputs"):
        read_golden(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"PK nonsense"])
def test_a_golden_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "golden.npz").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"golden\.npz: no golden images and outputs"):
        read_golden(tmp_path)


def test_a_golden_file_without_outputs_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", input=np.zeros((1, 3, 4, 4)))
    with pytest.raises(IntegrityError, match=r"golden\.npz: no golden images and outputs"):
        read_golden(tmp_path)

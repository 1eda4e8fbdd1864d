"""Golden images go through a session in batches of its own size, and come from a file that holds arrays only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chip_deploy.export.errors import IntegrityError, ParityFailed
from chip_deploy.export.golden import (
    FREE_BATCH,
    Golden,
    engine_agreement,
    read_golden,
    run_in_batches,
    write_golden,
)
from chip_deploy.export.target import Engine


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


def engine_in(precision: str, *, target: str = "trt", tf32: bool = False) -> Engine:
    return Engine(
        target=target, precision=precision, file="engines/made.engine", sha256="0" * 64, bytes=1, built_for={},
        flags={"tf32": tf32}, versions={}, build_seconds=0.0,
    )  # fmt: skip


def noisy(outputs: np.ndarray, part: float, *, seed: int) -> np.ndarray:
    """The outputs with white noise of that part of their own root mean square."""
    noise = np.random.default_rng(seed).standard_normal(outputs.shape)
    return (outputs + part * np.sqrt(np.mean(outputs**2)) * noise).astype(np.float32)


OUTPUTS = np.random.default_rng(0).standard_normal((8, 1000)).astype(np.float32)
IMAGES = np.ones((8, 3, 4, 4), np.float32)
ROUNDED = [("fp16", "fp16", False), ("bf16", "bf16", False), ("fp32", "tf32", True)]


@pytest.mark.parametrize(("precision", "arithmetic", "tf32"), ROUNDED)
@pytest.mark.parametrize("target", ["trt", "torch"])
def test_an_engine_may_be_as_far_off_as_rounding_takes_its_own_network(precision, arithmetic, tf32, target) -> None:
    golden = Golden(IMAGES, OUTPUTS, {arithmetic: noisy(OUTPUTS, 0.3, seed=1)})
    engine = engine_in(precision, target=target, tf32=tf32)
    agreement = engine_agreement(engine, golden, noisy(OUTPUTS, 0.6, seed=2))
    assert agreement.snr_db == pytest.approx(-20 * np.log10(0.6), abs=0.2)
    for wrong in (noisy(OUTPUTS, 1.1, seed=2), -OUTPUTS, OUTPUTS[::-1]):
        with pytest.raises(ParityFailed, match=f"by more than {arithmetic} explains"):
            engine_agreement(engine, golden, wrong)


@pytest.mark.parametrize(("precision", "arithmetic", "tf32"), ROUNDED)
def test_a_network_that_rounding_hardly_moves_has_the_limits_of_its_arithmetic(precision, arithmetic, tf32) -> None:
    golden = Golden(IMAGES, OUTPUTS, {arithmetic: noisy(OUTPUTS, 1e-3, seed=1)})
    engine = engine_in(precision, tf32=tf32)
    engine_agreement(engine, golden, noisy(OUTPUTS, 0.007, seed=2))  # 43 dB
    with pytest.raises(ParityFailed):
        engine_agreement(engine, golden, noisy(OUTPUTS, 0.3, seed=2))


@pytest.mark.parametrize(("precision", "tf32"), [("fp16", False), ("bf16", False), ("fp32", True)])
def test_a_bundle_that_does_not_tell_what_rounding_costs_has_them_too(precision, tf32) -> None:
    with pytest.raises(ParityFailed):
        engine_agreement(engine_in(precision, tf32=tf32), Golden(IMAGES, OUTPUTS), noisy(OUTPUTS, 0.6, seed=2))


def test_an_engine_that_multiplies_in_fp32_gets_nothing_for_what_tf32_costs() -> None:
    golden = Golden(IMAGES, OUTPUTS, {"tf32": noisy(OUTPUTS, 0.3, seed=1)})
    with pytest.raises(ParityFailed, match="by more than fp32 explains"):
        engine_agreement(engine_in("fp32"), golden, noisy(OUTPUTS, 0.01, seed=2))


@pytest.mark.parametrize(("precision", "arithmetic", "tf32"), ROUNDED)
def test_where_rounding_drowns_the_outputs_they_refuse_no_engine_that_gives_numbers(
    precision, arithmetic, tf32
) -> None:
    golden = Golden(IMAGES, OUTPUTS, {arithmetic: noisy(OUTPUTS, 1.0, seed=1)})
    engine = engine_in(precision, tf32=tf32)
    assert engine_agreement(engine, golden, noisy(OUTPUTS, 1.5, seed=2)).snr_db < 0
    with pytest.raises(ParityFailed, match="not finite"):
        engine_agreement(engine, golden, np.full_like(OUTPUTS, np.nan))

"""Agreement of two runs: hand values, invariants, and what must not pass."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chip_deploy.export.agree import LIMITS, Agreement, compare_outputs, require_agreement
from chip_deploy.export.errors import ParityFailed

REFERENCE = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)


def random_outputs(images: int = 16, outputs: int = 10) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((images, outputs)).astype(np.float32)


def test_a_constant_offset_gives_the_values_worked_out_by_hand() -> None:
    # Signal power (1 + 4 + 9 + 16) / 4 = 7.5, noise power 0.25, ratio 30; largest difference 0.5 of 4.
    agreement = compare_outputs(REFERENCE, REFERENCE + 0.5)
    assert agreement.n == 2
    assert agreement.largest_relative_difference == 0.125
    assert agreement.snr_db == pytest.approx(10 * math.log10(30), abs=1e-12)
    assert agreement.top1_agreement == 1.0


def test_identical_outputs_have_no_noise() -> None:
    agreement = compare_outputs(REFERENCE, REFERENCE.copy())
    assert agreement == Agreement(n=2, largest_relative_difference=0.0, snr_db=None, top1_agreement=1.0)
    require_agreement(agreement, what="the same file twice")


def test_top1_counts_images_whose_largest_output_moved() -> None:
    swapped = REFERENCE[:, ::-1].copy()
    swapped[1] = REFERENCE[1]
    assert compare_outputs(REFERENCE, swapped).top1_agreement == 0.5


@given(scale=st.floats(min_value=1e-20, max_value=1e20))
def test_the_unit_of_the_outputs_does_not_matter(scale: float) -> None:
    reference, other = random_outputs().astype(np.float64), random_outputs().astype(np.float64) + 1e-3
    plain, scaled = compare_outputs(reference, other), compare_outputs(reference * scale, other * scale)
    assert scaled.snr_db == pytest.approx(plain.snr_db, abs=1e-6)
    assert scaled.largest_relative_difference == pytest.approx(plain.largest_relative_difference, rel=1e-9)


def test_noise_of_known_power_is_measured_as_such() -> None:
    # White noise 40 dB below the signal; 100 000 samples pin its power to well under 0.1 dB.
    random = np.random.default_rng(0)
    signal = random.standard_normal((1000, 100))
    noisy = signal + 0.01 * random.standard_normal(signal.shape)
    assert compare_outputs(signal, noisy).snr_db == pytest.approx(40.0, abs=0.1)


def test_further_axes_count_as_outputs() -> None:
    maps = random_outputs(4, 12)
    assert compare_outputs(maps.reshape(4, 3, 2, 2), maps.reshape(4, 3, 2, 2) * 1.001) == compare_outputs(
        maps, maps * 1.001
    )


def test_a_product_of_factors_with_eleven_bits_keeps_the_limits_of_tf32() -> None:
    # A layer as tensor cores compute it: float16 has the 11 bits of mantissa that TF32 has.
    random = np.random.default_rng(0)
    inputs, weights = random.standard_normal((64, 512)), random.standard_normal((512, 100))
    rounded = inputs.astype(np.float16).astype(np.float64) @ weights.astype(np.float16).astype(np.float64)
    agreement = compare_outputs(inputs @ weights, rounded)
    assert agreement.largest_relative_difference > 2**-15, "the rounding was meant to be seen"
    require_agreement(agreement, what="one layer", precision="tf32")


def test_rounding_to_float32_keeps_the_limits_of_fp32() -> None:
    exact = np.random.default_rng(0).standard_normal((16, 10))
    require_agreement(compare_outputs(exact, exact.astype(np.float32)), what="rounded outputs")


@pytest.mark.parametrize("precision", LIMITS)
def test_a_permuted_output_fails_whatever_the_precision(precision: str) -> None:
    outputs = random_outputs()
    with pytest.raises(ParityFailed, match=r"^model\.onnx: outputs differ from the reference"):
        require_agreement(compare_outputs(outputs, outputs[:, ::-1]), what="model.onnx", precision=precision)


@pytest.mark.parametrize("precision", [name for name in LIMITS if name not in ("int8", "fp8")])
def test_one_wrong_output_among_many_fails_where_the_format_sets_the_limit(precision: str) -> None:
    outputs = random_outputs(64, 1000)
    wrong = outputs.copy()
    wrong[7, 3] += 3.0
    with pytest.raises(ParityFailed, match="largest difference"):
        require_agreement(compare_outputs(outputs, wrong), what="an engine", precision=precision)


def test_each_limit_decides_by_itself() -> None:
    good = Agreement(n=8, largest_relative_difference=1e-4, snr_db=80.0, top1_agreement=0.0)
    require_agreement(good, what="an engine at both limits")
    for worse in (
        good.model_copy(update={"snr_db": 79.9}),
        good.model_copy(update={"largest_relative_difference": 2e-4}),
    ):
        with pytest.raises(ParityFailed):
            require_agreement(worse, what="an engine")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_output_that_is_not_finite_is_named(bad: float) -> None:
    wrong = random_outputs()
    wrong[3, 2] = wrong[5, 0] = bad
    with pytest.raises(ParityFailed, match=r"other outputs: output 2 of image 3 is -?(nan|inf) \(2 of 160"):
        compare_outputs(random_outputs(), wrong)


def test_a_reference_that_is_not_finite_fails_too() -> None:
    with pytest.raises(ParityFailed, match="reference outputs"):
        compare_outputs(np.full((2, 2), np.nan), REFERENCE)


def test_outputs_that_are_all_zero_agree_with_themselves_and_with_nothing_else() -> None:
    zeros = np.zeros((2, 2))
    assert compare_outputs(zeros, zeros).snr_db is None
    different = compare_outputs(zeros, REFERENCE)
    assert different.snr_db is not None
    assert math.isfinite(different.snr_db)
    assert math.isfinite(different.largest_relative_difference)
    with pytest.raises(ParityFailed):
        require_agreement(different, what="an engine")


@pytest.mark.parametrize("other", [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros(2)])
def test_shapes_that_differ_are_a_mistake_of_the_caller(other: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shape"):
        compare_outputs(REFERENCE, other)


def test_nothing_to_compare_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="shape"):
        compare_outputs(np.zeros((0, 2)), np.zeros((0, 2)))


def test_an_unknown_precision_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'fp7'\. Available: fp32, tf32, fp16, bf16, int8, fp8"):
        require_agreement(compare_outputs(REFERENCE, REFERENCE), what="an engine", precision="fp7")


def test_limits_widen_with_every_bit_that_is_lost() -> None:
    order = ["fp32", "tf32", "fp16", "bf16", "int8"]
    assert [LIMITS[name].snr_db for name in order] == sorted((LIMITS[name].snr_db for name in order), reverse=True)
    assert LIMITS["int8 file"].snr_db > LIMITS["int8"].snr_db


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_error_as_large_as_the_outputs_is_no_rounding_even_in_8_bits(precision: str) -> None:
    outputs = random_outputs()
    require_agreement(compare_outputs(outputs, 0.9 * outputs), what="an engine", precision=precision)
    with pytest.raises(ParityFailed):
        require_agreement(compare_outputs(outputs, -outputs), what="an engine", precision=precision)


def test_an_agreement_reads_as_a_sentence() -> None:
    assert str(compare_outputs(REFERENCE, REFERENCE)).startswith("identical, largest difference 0.0e+00")
    assert "SNR 14.8 dB" in str(compare_outputs(REFERENCE, REFERENCE + 0.5))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_outputs_that_are_all_zero_agree_with_nothing(precision: str) -> None:
    reference = np.random.default_rng(0).standard_normal((4, 10))
    with pytest.raises(ParityFailed):
        require_agreement(compare_outputs(reference, np.zeros_like(reference)), what="it", precision=precision)

"""How closely two runs of a network agree, output by output, and how closely they have to."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from .errors import ParityFailed

# Shape letters: N images, K outputs of each.


class Agreement(BaseModel):
    """Two runs of one network on the same N images, compared."""

    model_config = ConfigDict(frozen=True)

    n: int
    largest_relative_difference: float
    """Largest difference, as a fraction of the largest reference value."""
    snr_db: float | None
    """Signal power over the power of the difference, in decibel; None when there is no difference."""
    top1_agreement: float
    """Fraction of images whose largest output is the same one."""

    def __str__(self) -> str:
        snr = "identical" if self.snr_db is None else f"SNR {self.snr_db:.1f} dB"
        return (
            f"{snr}, largest difference {self.largest_relative_difference:.1e} of the largest output, "
            f"top-1 the same on {self.top1_agreement:.1%} of {self.n} images"
        )


class Limits(NamedTuple):
    """The worst that still counts as agreement."""

    largest_relative_difference: float
    snr_db: float

    def keeps(self, agreement: Agreement) -> bool:
        """Whether `agreement` is at least as good as both limits."""
        clean = agreement.snr_db is None or agreement.snr_db >= self.snr_db
        return clean and agreement.largest_relative_difference <= self.largest_relative_difference


# By the arithmetic of the engine. A rounding error is relative to the number's precision (24 bits of mantissa: 6e-8;
# 11 bits: 5e-4), grows through the layers, and is some hundred times larger for the worst of many outputs. How far it
# grows is the network's own: these are the limits where nothing is known of that, and of networks that do not magnify
# it. Top-1 has no limit of its own: near ties may flip by rounding alone.
# Measured (benchmarks/results/2026-12-01-parity.json) on 8 images by four ResNets trained on CIFAR-10, and by nine
# networks of torchvision with random weights and settled batch norms, the worst of them mobilenet_v2; each rounding
# emulated by onnxruntime, against torch in FP32.
LIMITS = {
    # torch against onnxruntime: at least 94 dB and at most 2.1e-5.
    "fp32": Limits(largest_relative_difference=1e-4, snr_db=80.0),
    # float32 in and out, multiplied with 11 bits: TensorRT's default for fp32 networks. Trained at least 62 dB and at
    # most 8e-4; with random weights 27 dB and 5e-2, and six of nine do not keep these limits.
    "tf32": Limits(largest_relative_difference=3e-2, snr_db=40.0),
    # Multiplied and stored with 11 bits, so that every layer rounds once more. Trained at least 60 dB and at most 9e-4;
    # with random weights 26 dB and 5e-2, and three of nine do not keep these limits.
    "fp16": Limits(largest_relative_difference=0.1, snr_db=30.0),
    # Three bits fewer: 8 times the error, 18 dB less. Trained at least 40 dB and at most 9e-3; with random weights 12
    # dB and 0.22.
    "bf16": Limits(largest_relative_difference=0.5, snr_db=12.0),
    # What 8 bits cost depends on the network, and top-1 is its measure (ResNet-56: int8 24 dB, fp8 17 dB, top-1 as
    # before). An error as large as the outputs themselves, as outputs that are all zero have, is no rounding any more.
    "int8": Limits(largest_relative_difference=1.0, snr_db=0.1),
    "fp8": Limits(largest_relative_difference=1.0, snr_db=0.1),
    # An engine against its own 8-bit file, run as it is written: values near a step go to the other side of it.
    # Measured between ways to run one file of ResNet-20 and ResNet-56: rightly 26 to 44 dB and at most 7e-2, with
    # biases or pairs handled wrongly 10 dB and less.
    "int8 file": Limits(largest_relative_difference=0.25, snr_db=18.0),
    "fp8 file": Limits(largest_relative_difference=0.25, snr_db=18.0),
}

# Two runs of one network that round in other places are off by about as much. Measured in the same record: torch's own
# 16 bits and onnxruntime's FP16 engines are up to 4.2 dB (1.6 times) and 1.8 times as far off as the emulated file.
# The rest is for what was not measured: GPUs, and FP16 products that are added up in FP16.
MARGIN = 4.0
# Where rounding comes to half of the outputs, they cannot tell a right run from a wrong one; their accuracy still can.
DROWNED = Limits(largest_relative_difference=0.5, snr_db=6.0)


def compare_outputs(reference: np.ndarray, other: np.ndarray) -> Agreement:
    """How closely `other` agrees with `reference`; computed in float64.

    Shapes: (N, K) and (N, K), or (N, ...) both, whose further axes count as outputs.
    Raises: ValueError for shapes that differ or hold nothing; ParityFailed naming the first output that is not finite.
    """
    if reference.shape != other.shape or not reference.size or reference.ndim < 2:
        raise ValueError(f"outputs of shape {reference.shape} and {other.shape}: two of one shape (N, K) expected.")
    reference_NK = _finite_rows(reference, whose="reference")
    other_NK = _finite_rows(other, whose="other")
    difference_NK = other_NK - reference_NK
    return Agreement(
        n=len(reference_NK),
        largest_relative_difference=_ratio(np.abs(difference_NK).max(), np.abs(reference_NK).max()),
        snr_db=_snr_db(reference_NK, difference_NK),
        top1_agreement=float(np.mean(reference_NK.argmax(axis=1) == other_NK.argmax(axis=1))),
    )


def require_agreement(
    agreement: Agreement, *, what: str, precision: str = "fp32", rounding: Agreement | None = None
) -> None:
    """Nothing, if `agreement` keeps the limits of `precision` (an engine's `arithmetic`).

    rounding: what the roundings of that arithmetic cost this very network; `MARGIN` times as much is allowed, too.
    Raises: ParityFailed saying which limit `what` misses; ValueError for an unknown precision.
    """
    if precision not in LIMITS:
        raise ValueError(f"no limits for precision {precision!r}. Available: {', '.join(LIMITS)}.")
    limits = LIMITS[precision] if rounding is None else _widened(LIMITS[precision], rounding)
    if not limits.keeps(agreement):
        raise ParityFailed(
            f"{what}: outputs differ from the reference by more than {precision} explains ({agreement}; allowed: "
            f"{limits.largest_relative_difference:.0e} and {limits.snr_db:.0f} dB). Do not ship it."
        )


def _widened(limits: Limits, rounding: Agreement) -> Limits:
    """The limits, or `MARGIN` times the network's own rounding error where that is more, up to the outputs' own size;
    none where rounding alone drowns the outputs."""
    if rounding.snr_db is None:
        return limits
    if not DROWNED.keeps(rounding):
        return Limits(largest_relative_difference=float("inf"), snr_db=float("-inf"))
    most = LIMITS["int8"]
    difference = min(MARGIN * rounding.largest_relative_difference, most.largest_relative_difference)
    snr_db = max(rounding.snr_db - 20 * float(np.log10(MARGIN)), most.snr_db)
    return Limits(max(limits.largest_relative_difference, difference), min(limits.snr_db, snr_db))


def _finite_rows(outputs: np.ndarray, *, whose: str) -> np.ndarray:
    rows_NK = outputs.reshape(len(outputs), -1).astype(np.float64)
    wrong = np.argwhere(~np.isfinite(rows_NK))
    if len(wrong):
        image, output = wrong[0]
        raise ParityFailed(
            f"{whose} outputs: output {output} of image {image} is {rows_NK[image, output]} "
            f"({len(wrong)} of {rows_NK.size} are not finite). Look for the layer that overflows."
        )
    return rows_NK


def _snr_db(signal_NK: np.ndarray, noise_NK: np.ndarray) -> float | None:
    if not noise_NK.any():
        return None
    ratio = _ratio(np.linalg.norm(signal_NK), np.linalg.norm(noise_NK))
    return float(20 * np.log10(max(ratio, sys.float_info.min)))


def _ratio(part: np.floating, whole: np.floating) -> float:
    """`part / whole`, at most the largest finite number: JSON has no infinity."""
    if part == 0:
        return 0.0
    return min(float(part) / float(whole), sys.float_info.max) if whole else sys.float_info.max

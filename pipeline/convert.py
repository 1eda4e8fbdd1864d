"""Both networks of a run written in another precision, and what that costs the pruned one, on the evaluation images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..export.agree import LIMITS, Agreement, compare_outputs, require_agreement
from ..export.bundle import onnx_name
from ..export.errors import ConversionFailed
from ..export.precision import QUANTISED, Conversion, Converter, QuantizeSettings, Reference, Rest, require_finite
from ..export.quantize import QuantLayer
from ..export.rounding import require_no_overflow, require_same_network
from ..export.sensitivity import ROUNDING, Sensitivity, fewest_left_out
from .report import PrecisionRow

# Shape letters: N images, K outputs of each.

Progress = Callable[[float, str], None]
Judge = Callable[[Reference], np.ndarray]
"""What a network gives for every evaluation image: (N, K)."""


@dataclass(frozen=True)
class Evidence:
    """What a conversion is decided and judged on.

    images: for calibration (M, C, H, W), `what` is their name. outputs: the FP32 file's for every evaluation image
    (N, K). labels: (N,), None where there are none. judge: the same outputs of another file.
    """

    images: np.ndarray
    what: str
    outputs: np.ndarray
    labels: np.ndarray | None
    judge: Judge

    def top1(self, outputs: np.ndarray) -> float | None:
        """The fraction of images whose largest output is that of their label."""
        return None if self.labels is None else float((outputs.argmax(1) == self.labels).mean())


def convert_networks(
    sources: Path,
    folder: Path,
    *,
    precision: str,
    settings: QuantizeSettings,
    rest: Rest,
    evidence: Evidence,
    progress: Progress,
) -> PrecisionRow:
    """The row of the report, once `folder` holds the pruned and the dense network of `sources` in `precision`.

    The dense network leaves out the same layers as the pruned one, so that a comparison speaks of the pruning alone.
    Raises: ConversionFailed when quantising costs more than `settings.max_drop` whatever is left out, or a network
    cannot be converted; ParityFailed for outputs that are not finite, for 8 bits that are further off than they
    explain, and for 16 bits whose file is another network but for its roundings: what those cost is no fault of it.
    """
    asked = {"precision": precision, "settings": settings, "rest": rest, "what": evidence.what}
    converter = Converter(
        sources / onnx_name("model", "fp32"), evidence.images, **asked, progress=_part(progress, 0.0, 0.2)
    )
    ranking = _ranking(converter, evidence.images[: settings.sensitivity_images], _part(progress, 0.2, 0.4))
    name = onnx_name("model", precision)
    attempts = Attempts(converter, folder / name, evidence, _part(progress, 0.4, 0.9))
    conversion, outputs, without = attempts.best([layer for layer, _ in ranking], most=settings.max_drop)
    agreement = compare_outputs(evidence.outputs, outputs)
    _require_right(folder / name, converter, evidence, agreement)
    if precision not in QUANTISED and not LIMITS[precision].keeps(agreement):
        require_no_overflow(folder / name, converter.model, evidence.judge)
    dense = _dense(sources, folder, evidence, without, asked, _part(progress, 0.9, 1.0))
    return PrecisionRow(
        precision=precision,
        onnx_bytes=conversion.bytes,
        dense_onnx_bytes=dense.bytes,
        accuracy=evidence.top1(outputs),
        agreement=agreement,
        conversion=conversion,
        sensitivities=[sensitivity for _, sensitivity in ranking],
        left_out_by_bound=len(without),
        emulated=bool(conversion.emulates),
    )


class Attempts:
    """The converted file, written with more or fewer quantised layers, and what each attempt gave on the evaluation."""

    def __init__(self, converter: Converter, path: Path, evidence: Evidence, progress: Progress) -> None:
        self._converter, self._path, self._evidence, self._progress = converter, path, evidence, progress
        self._outputs: dict[int, np.ndarray] = {}

    def best(
        self, ranked: Sequence[QuantLayer], *, most: float | None
    ) -> tuple[Conversion, np.ndarray, Sequence[QuantLayer]]:
        """The file that lies at its path, its outputs, and the layers it leaves out: as few of the first of `ranked`
        as keep the drop within `most` points of top-1, none without a bound.

        Cost: one evaluation a count that was not tried before.
        Raises: ConversionFailed where none suffice.
        """
        count = 0
        if most is not None and ranked:
            found = fewest_left_out(len(ranked), drop_without=lambda n: self.drop(ranked[:n]), most=most + ROUNDING)
            if found is None:
                raise ConversionFailed(self._too_much(most, ranked))
            count = found
        self.drop(ranked[:count])
        return self._written(ranked[:count], most), self._outputs[count], ranked[:count]

    def drop(self, without: Sequence[QuantLayer]) -> float:
        """Points of top-1 that the file loses when it leaves out these layers; 0 where there are no labels."""
        if len(without) not in self._outputs:
            self._progress(0.5, f"{self._converter.precision}, {len(without)} layers left out")
            self._written(without, None)
            outputs = self._evidence.judge(Reference(self._path))
            require_finite(outputs, what=self._path.name)
            self._outputs[len(without)] = outputs
        after = self._evidence.top1(self._outputs[len(without)])
        before = self._evidence.top1(self._evidence.outputs)
        return 0.0 if before is None or after is None else 100 * (before - after)

    def _written(self, without: Sequence[QuantLayer], most: float | None) -> Conversion:
        reason = "" if most is None else _reason(most)
        return self._converter.write(self._path, left_out={layer.node: reason for layer in without})

    def _too_much(self, most: float, ranked: Sequence[QuantLayer]) -> str:
        precision = self._converter.precision
        return (
            f"{self._path.name}: {precision} loses {self.drop(ranked[:0]):.2f} points of top-1 on the evaluation "
            f"images, and at most {most:g} may be lost; with one of its {len(ranked)} layers left it still loses more. "
            f"Raise --max-drop, or leave {precision} out of --precision."
        )


def _ranking(converter: Converter, images: np.ndarray, progress: Progress) -> list[tuple[QuantLayer, Sensitivity]]:
    if converter.precision not in QUANTISED:
        return []
    return converter.ranking(images, progress=progress)


def _dense(
    sources: Path,
    folder: Path,
    evidence: Evidence,
    without: Sequence[QuantLayer],
    asked: Mapping[str, object],
    progress: Progress,
) -> Conversion:
    """The dense network in the same precision, compared with the FP32 one on a few calibration images.

    Raises: as `_require_right`; ParityFailed for outputs that are not finite.
    """
    name = onnx_name("dense", str(asked["precision"]))
    converter = Converter(sources / onnx_name("dense", "fp32"), evidence.images, **asked, progress=progress)  # pyright: ignore[reportArgumentType]
    keys = {layer.key for layer in without}
    reasons = {layer.node: "the pruned network leaves it out" for layer in converter.layers if layer.key in keys}
    conversion = converter.write(folder / name, left_out=reasons)
    few = evidence.images[: converter.settings.sensitivity_images]
    outputs = Reference(folder / name).outputs(few)
    require_finite(outputs, what=name)
    exact = Reference(sources / onnx_name("dense", "fp32")).outputs(few)
    _require_right(folder / name, converter, evidence, compare_outputs(exact, outputs))
    return conversion


def _require_right(file: Path, converter: Converter, evidence: Evidence, agreement: Agreement) -> None:
    """Raises: ParityFailed for a file in 16 bits that is another network but for its roundings, and for one in 8 bits
    that agrees with FP32 less well than 8 bits explain."""
    if converter.precision in QUANTISED:
        require_agreement(agreement, what=file.name, precision=converter.precision)
    else:
        require_same_network(file, converter.model, evidence.images[: converter.settings.sensitivity_images])


def _reason(most: float) -> str:
    return f"left out with the others, so that the file loses at most {most:g} points of top-1 on the evaluation images"


def _part(progress: Progress, begin: float, end: float) -> Progress:
    """What moves `progress` from `begin` to `end`."""
    return lambda fraction, text: progress(begin + fraction * (end - begin), text)

"""Which layers cost an 8-bit network most, and how few of them have to be left out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from .quantize import QuantLayer

# A count of images is exact, a bound in points a decimal fraction of them: far below one image of any data set.
ROUNDING = 1e-9


class Sensitivity(BaseModel):
    """What a network loses when one layer alone is quantised.

    snr_db: power of the network's outputs over that of their change; None where nothing changed. The lower, the more
    sensitive.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    operator: str
    snr_db: float | None


def ranked(
    layers: Sequence[QuantLayer],
    snr_of: Callable[[QuantLayer], float | None],
    *,
    progress: Callable[[float, str], None] | None = None,
) -> list[tuple[QuantLayer, Sensitivity]]:
    """The layers, the most sensitive first; of equals the earlier one.

    One layer is quantised at a time, and not all but one: that costs as many runs, and its loss is not drowned in
    that of the others.
    """
    found = []
    for number, layer in enumerate(layers):
        if progress is not None:
            progress(number / len(layers), f"sensitivity of {layer.name}")
        found.append((layer, Sensitivity(layer=layer.name, operator=layer.operator, snr_db=snr_of(layer))))
    return sorted(found, key=lambda each: (each[1].snr_db is None, each[1].snr_db))


def fewest_left_out(n: int, *, drop_without: Callable[[int], float], most: float) -> int | None:
    """How many of `n` ranked layers have to be left out, so that the drop is at most `most`; None where none suffice.

    `drop_without(k)` is the drop when the first k are left out, in the unit of `most`. Nothing is quantised without
    any layer, so k = n is no answer. Monotony is assumed: if no layer left out raises the drop, the count is the
    smallest one that holds. Else it is one that was found to hold, and a smaller one may hold too; where all that were
    tried failed, another may have held, and None is said all the same. Few layers are tried first: the curve is flat
    and noisy where many are left out, and halving from the middle would settle there.
    Cost: 1 + 2 log2(k) calls of `drop_without` for k layers left out.
    """
    if drop_without(0) <= most:
        return 0
    fails, holds = 0, 1
    while holds < n and drop_without(holds) > most:
        fails, holds = holds, min(2 * holds, n)
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if drop_without(middle) <= most:
            holds = middle
        else:
            fails = middle
    return holds if holds < n else None

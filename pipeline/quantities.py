"""Numbers as people read them: three significant digits, a unit, a true minus sign."""

from __future__ import annotations

MINUS = "\u2212"


def count(number: int) -> str:
    """A count with its metric prefix: 37_240_000 -> `37.2 M`; below a thousand as it is."""
    return _with_prefix(number, [("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)])


def size(size_bytes: int) -> str:
    """A file's size in decimal units: 44_700_000 -> `44.7 MB` (MB is 10^6 bytes)."""
    return _with_prefix(size_bytes, [("B", 1), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)])


def milliseconds(value_ms: float) -> str:
    """A latency: `4.21 ms`, `0.0862 ms`, `1340 ms`."""
    return f"{significant(value_ms)} ms"


def seconds(value_s: float) -> str:
    """A duration: `0.42 s`, `13.1 s`, `2 min 05 s`, `1 h 04 min`."""
    if value_s < 59.95:
        return f"{value_s:.{2 if value_s < 9.995 else 1}f} s"
    minutes, rest = divmod(round(value_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def factor(value: float) -> str:
    """How many times: `1.62×`, `12.3×`, `140×`."""
    return f"{_factor_digits(value)}×"


def factor_interval(low: float, high: float) -> str:
    """An interval of factors: `1.58–1.66×`."""
    return f"{_factor_digits(low)}–{_factor_digits(high)}×"


def fine_factor(value: float) -> str:
    """A factor near one, where the third decimal matters: `1.002×`."""
    return f"{value:.3f}×"


def fraction(value: float) -> str:
    """A part of a whole that is no accuracy, as a percentage of two significant digits: `0.62 %`, `12 %`."""
    return f"{significant(100 * value, digits=2)} %"


def percent(fraction: float, n: int) -> str:
    """A fraction of `n` images: `98.6 %`, with a second decimal from a thousand images on."""
    return f"{100 * fraction:.{_percent_digits(n)}f} %"


def points(difference: float, n: int) -> str:
    """A difference of two fractions of `n` images, in percentage points: `−0.8 points`."""
    return f"{_signed(100 * difference, digits=_percent_digits(n))} points"


def change(before: float, after: float) -> str:
    """By how much of itself a quantity changed: `−50.5 %`."""
    if before == 0:
        return "none" if after == 0 else "new"
    return f"{_signed(100 * (after - before) / before, digits=1)} %"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never in scientific notation between 1e-6 and 1e15."""
    if value == 0:
        return "0"
    if not 1e-6 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    magnitude = int(f"{abs(value):e}".split("e")[1])
    rounded = round(value, digits - 1 - magnitude)
    magnitude = int(f"{abs(rounded):e}".split("e")[1])
    return f"{rounded:.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS)


def _with_prefix(number: float, units: list[tuple[str, float]]) -> str:
    if abs(number) < 1000:
        return f"{number} {units[0][0]}".strip()
    # The first unit in which the rounded number has at most three digits: 999 960 is 1.00 M, not 1000 k.
    unit, scale = next(((name, s) for name, s in units[1:] if abs(number) / s < 999.5), units[-1])
    return f"{significant(number / scale)} {unit}"


def _factor_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def _percent_digits(n: int) -> int:
    return 1 if n < 1000 else 2


def _signed(value: float, *, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return f"{MINUS if value < 0 else '+'}{text}"

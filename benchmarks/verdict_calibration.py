"""How often the verdict is wrong, on real runs of this machine: equal networks, and one with a planted slow-down.

Equal networks: one ONNX file on both sides, which must hardly ever be found `faster`. Planted: the dense side does real
further computation after each execution, 5 % of its lap, which must be found `faster` for the other side; `unstable`
counts as not found. Every comparison is appended to a file as one JSON line, so that the run can be stopped and
continued. Run it on an idle machine: `python benchmarks/verdict_calibration.py calibration.jsonl --comparisons 200`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from record import write_record
from torchvision import models

from chip_deploy import __version__
from chip_deploy.export.machine import fingerprint, read_machine
from chip_deploy.export.measure import LatencyProtocol, Measured, compare_latency
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.target import Session, parse_target
from chip_deploy.export.targets import make_target
from chip_deploy.export.watch import Watch

KINDS = ("equal", "planted")
SLOWDOWN = 0.05
# The size of the planted work is found whenever a session is opened: from so many laps with it and as many without, in
# blocks as the protocol has them, so many times.
SIZING_LAPS, SIZING_BLOCKS, SIZINGS = 10, 10, 2
FIRST_PRODUCTS = 10
MOST_FALSE, LEAST_FOUND = 0.05, 0.90


class SlowedSession:
    """A session whose laps take a part longer, because they multiply matrices after each execution."""

    def __init__(self, session: Session, *, slowdown: float) -> None:
        self._session = session
        self.input_names, self.output_names = session.input_names, session.output_names
        self.input_shapes = session.input_shapes
        self._matrix = np.full((24, 24), 1e-3, np.float32)
        self._product = np.empty_like(self._matrix)
        self._slowdown = slowdown
        self._products = 0

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Binds, and finds out how many products the slow-down takes, from laps with them and without."""
        self._session.bind(feeds)
        self._products = FIRST_PRODUCTS
        for _ in range(1 + SIZINGS):
            plain_s, slowed_s = [], []
            for _ in range(SIZING_BLOCKS):
                plain_s += [_seconds(self._session.lap) for _ in range(SIZING_LAPS)]
                slowed_s += [_seconds(self.lap) for _ in range(SIZING_LAPS)]
            found = float(np.median(slowed_s) / np.median(plain_s)) - 1
            change = min(max(self._slowdown / max(found, 1e-3), 0.5), 2.0)
            self._products = max(1, round(self._products * change))

    def lap(self) -> None:
        """One execution, then the products."""
        self._session.lap()
        self._multiply()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs of the session itself."""
        return self._session.run(feeds)

    def close(self) -> None:
        """Closes the session itself."""
        self._session.close()

    def _multiply(self) -> None:
        for _ in range(self._products):
            np.matmul(self._matrix, self._matrix, out=self._product)


def main() -> None:
    """Runs what is missing in the file, then prints both figures."""
    options = _options()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.manual_seed(0)
        export_onnx(models.resnet18(num_classes=10).eval(), torch.zeros(1, 3, 32, 32), path)
        setting = {
            "network": "resnet18, 32 x 32, random weights",
            "seconds": options.seconds,
            "slowdown": SLOWDOWN,
            "machine": fingerprint(read_machine()),
            "versions": {"chip_deploy": __version__, "onnxruntime": onnxruntime.__version__},
        }
        rows = [row for row in _rows(options.file) if row["setting"] == setting]
        wanted = {"equal": options.comparisons, "planted": min(options.planted, options.comparisons)}
        for number in range(options.comparisons):
            for kind in KINDS:
                if sum(row["kind"] == kind for row in rows) <= number < wanted[kind]:
                    rows.append({"kind": kind, "setting": setting, **_compare(path, kind, options.seconds, number)})
                    _append(options.file, rows[-1])
                    _say(f"{number + 1:4} {kind:8} {rows[-1]['verdict']:11} {rows[-1]['reason']}")
    figures = _print_figures(rows, setting)
    write_record(options.json, figures={"setting": setting, "shares": figures, "comparisons": _comparisons(rows)})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="JSON lines; a run continues from what is there")
    parser.add_argument("--comparisons", type=int, default=200, help="of equal networks")
    parser.add_argument(
        "--planted", type=int, default=100, help="comparisons with the planted slow-down, at most as many"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write both figures, with machine and versions")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed laps a side, as the protocol has it")
    return parser.parse_args()


def _compare(path: Path, kind: str, seconds: float, number: int) -> dict[str, Any]:
    target = make_target(parse_target("ort-cpu"))
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)

    def opener(*, slowed: bool) -> Callable[[], Session]:
        def opened() -> Session:
            session: Session = target.open_onnx(path)
            if slowed:
                session = SlowedSession(session, slowdown=SLOWDOWN)
            session.bind({session.input_names[0]: image})
            return session

        return opened

    protocol = LatencyProtocol(seconds=seconds, seed=number)
    begun = time.perf_counter()
    measured = compare_latency(opener(slowed=kind == "planted"), opener(slowed=False), protocol, watch=Watch())
    return {**_row(measured), "took_s": round(time.perf_counter() - begun, 2)}


def _row(measured: Measured) -> dict[str, Any]:
    comparison, watch = measured.comparison, measured.watch
    return {
        "verdict": comparison.verdict,
        "reason": comparison.reason,
        "speedup": comparison.speedup.model_dump(),
        "noise": comparison.control.noise if comparison.control else None,
        "others_share": watch.after.others_share if watch else None,
        "p50_ms": [comparison.dense.p50, comparison.pruned.p50],
    }


def _print_figures(rows: list[dict[str, Any]], setting: dict[str, Any]) -> list[dict[str, Any]]:
    machine, figures = read_machine(), []
    _say(f"\n{machine.cpu}, {machine.cores} cores, {machine.system}, load {machine.load}; {setting['versions']}")
    for kind, words, passes in (
        ("equal", f"equal networks found faster, at most {MOST_FALSE:.0%} wanted", lambda share: share <= MOST_FALSE),
        ("planted", f"{SLOWDOWN:.0%} found, at least {LEAST_FOUND:.0%} wanted", lambda share: share >= LEAST_FOUND),
    ):
        verdicts = [row["verdict"] for row in rows if row["kind"] == kind]
        found, n = verdicts.count("faster"), len(verdicts)
        if not n:
            continue
        low, high = exact_interval(found, n)
        _say(
            f"{words}: {found} of {n}, {found / n:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"{verdicts.count('unstable')} unstable: {'as wanted' if passes(found / n) else 'NOT as wanted'}"
        )
        ratios = [row["speedup"]["estimate"] for row in rows if row["kind"] == kind]
        _say(f"  speed-ups: median {np.median(ratios):.4f}, {min(ratios):.4f} to {max(ratios):.4f}")
        figures.append(
            {
                "kind": kind,
                "comparisons": n,
                "faster": found,
                "interval": [low, high],
                "unstable": verdicts.count("unstable"),
                "as_wanted": passes(found / n),
                "median_speedup": float(np.median(ratios)),
            }
        )
    return figures


def _comparisons(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Of each comparison its kind, verdict, speed-up with both ends of the interval, and noise floor."""
    return [
        [
            row["kind"],
            row["verdict"],
            *(round(row["speedup"][end], 4) for end in ("estimate", "low", "high")),
            None if row["noise"] is None else round(row["noise"], 4),
        ]
        for row in rows
    ]


def exact_interval(found: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of Clopper and Pearson for a share of which `found` of `n` were seen.

    Each end is the share with which so many, or as few, would be seen in half of what the level leaves.
    """
    tail = (1 - level) / 2
    low = 0.0 if not found else _share_where(lambda share: 1 - _at_most(found - 1, n, share) >= tail)
    high = 1.0 if found == n else _share_where(lambda share: _at_most(found, n, share) <= tail)
    return low, high


def _share_where(begins: Callable[[float], bool]) -> float:
    """The smallest share from which on the condition is true."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if begins(middle) else (middle, high)
    return high


def _at_most(found: int, n: int, share: float) -> float:
    return math.fsum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(found + 1))


def _seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _rows(path: Path) -> list[dict[str, Any]]:
    """The comparisons in the file; a last line that an interruption cut off is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            _say(f"left out: {line[:40]!r}...")
    return rows


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

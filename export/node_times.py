"""The time of every node of two networks, from the runtime's own profiler, and the torch layers the nodes stand for.

Sessions are opened for this alone: a profiled lap is longer than a measured one.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .layers import LayerMap, LayerWork
from .onnx_graph import read_graph
from .target import NodeLaps, ProfiledSession, Session

# How many laps count on each side, and the turns in which they are run: A B B A, so that a drift falls on both.
MOST_LAPS, FEWEST_LAPS, MOST_TURNS, LAPS_A_TURN = 60, 6, 10, 3
WARMUP_SECONDS = 0.1


@dataclass(frozen=True)
class ProfiledNode:
    """One executed node: the torch layers it stands for (none for the runtime's own), and its median time."""

    layers: tuple[str, ...]
    operator: str
    ms: float


@dataclass(frozen=True)
class Profile:
    """One network on one runtime: every node that was executed, and the work of every torch layer."""

    runtime: str
    batch: int
    laps: int
    nodes: list[ProfiledNode]
    work: dict[str, LayerWork]

    @property
    def total_ms(self) -> float:
        """The times of all nodes together; between nodes the runtime needs a little more."""
        return sum(node.ms for node in self.nodes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(work.macs for work in self.work.values())


def profile_in_turns(
    dense: Session, pruned: Session, images: np.ndarray, *, dense_onnx: Path, pruned_onnx: Path, seconds: float = 0.4
) -> tuple[Profile, Profile]:
    """Both networks profiled on `images`, in turns and after a warm-up; the sessions given are left as they are.

    The ONNX files tell which torch layers the runtime's nodes come from.
    Cost: about three times `seconds`, and six laps of each at least; one more session of each.
    Raises: IntegrityError for an ONNX file that cannot be read; BuildFailed; MeasureFailed.
    """
    maps = [LayerMap(read_graph(path)) for path in (dense_onnx, pruned_onnx)]
    with (
        contextlib.closing(dense.profiled()) as first,
        contextlib.closing(pruned.profiled()) as second,
    ):
        sides = (first, second)
        for side in sides:
            side.bind({side.input_names[0]: images})
        laps = _take_turns(sides, max(_warmed_lap_seconds(side) for side in sides), seconds)
        return _profile(first, maps[0], len(images), laps), _profile(second, maps[1], len(images), laps)


def profile_of(executed: Sequence[NodeLaps], layer_map: LayerMap, *, runtime: str, batch: int) -> Profile:
    """The profile of a network from the times of the nodes that a runtime executed: the median of each over laps."""
    layers = layer_map.layers(executed)
    nodes = [
        ProfiledNode(own, node.operator, float(np.median(node.laps_ms)))
        for node, own in zip(executed, layers, strict=True)
    ]
    laps = len(executed[0].laps_ms) if executed else 0
    return Profile(runtime, batch, laps, nodes, layer_map.work)


def _warmed_lap_seconds(session: ProfiledSession) -> float:
    """How long a lap takes once the session has run for a while."""
    started = time.perf_counter()
    for laps in itertools.count(1):
        session.lap()
        spent = time.perf_counter() - started
        if spent >= WARMUP_SECONDS:
            return spent / laps
    raise AssertionError("the count has no end")


def _take_turns(sides: Sequence[ProfiledSession], lap_seconds: float, seconds: float) -> int:
    """Run both sides in the order A B B A and return how many laps each ran."""
    laps = int(min(MOST_LAPS, max(FEWEST_LAPS, seconds / lap_seconds)))
    turns = min(MOST_TURNS, laps // LAPS_A_TURN)
    for turn in range(turns):
        for side in sides if turn % 2 == 0 else reversed(sides):
            for _ in range(laps // turns):
                side.lap()
    return turns * (laps // turns)


def _profile(session: ProfiledSession, layer_map: LayerMap, batch: int, laps: int) -> Profile:
    return profile_of(session.node_laps(laps), layer_map, runtime=session.runtime, batch=batch)

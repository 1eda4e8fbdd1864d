"""The file with every lap of a measurement: `engines/NAME.latency.json.gz`, compressed JSON."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from .bundle import write_atomic
from .laps import Control, LapMs, Measurement
from .machine import Machine
from .protocol import LatencyProtocol
from .watch import MachineWatch

GZIP = b"\x1f\x8b"


class RecordedLaps(BaseModel):
    """A file `engines/NAME.latency.json.gz`: every lap of all sides, how and where they were run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: LatencyProtocol
    machine: Machine
    watch: MachineWatch | None = None
    """The machine around the measurement; None in a record from before it was watched."""
    control: Control | None = None
    """The dense network against itself; None where it could not be opened twice, or in an old record."""
    complete: bool = True
    """False where the measurement was interrupted: then the laps are what there was, and no verdict is drawn."""
    opened: list[int] = [0]
    """The blocks before which all sessions were opened anew."""
    dense_laps_ms: list[LapMs]
    dense_blocks: list[int]
    pruned_laps_ms: list[LapMs]
    pruned_blocks: list[int]
    control_laps_ms: list[LapMs] = []
    control_blocks: list[int] = []
    round_trips_ms: dict[str, list[LapMs]] = {}
    """Of a GPU: laps of each side with transfers, on the device's clock and on the host's."""

    @property
    def dense(self) -> Measurement:
        """The laps of the dense network."""
        return self._measurement(self.dense_laps_ms, self.dense_blocks)

    @property
    def pruned(self) -> Measurement:
        """The laps of the pruned network."""
        return self._measurement(self.pruned_laps_ms, self.pruned_blocks)

    def _measurement(self, laps_ms: list[float], blocks: list[int]) -> Measurement:
        return Measurement(protocol=self.protocol.id, laps_ms=laps_ms, blocks=blocks, opened=self.opened)


def laps_path(engine_path: Path, *, batch: int | None = None) -> Path:
    """Where the laps of an engine are written: `engines/NAME.latency.json.gz` beside `engines/NAME.engine`.

    Those of a further batch go to `engines/NAME.batch8.latency.json.gz`.
    """
    further = f".batch{batch}" if batch is not None else ""
    return engine_path.with_suffix(f"{further}.latency.json.gz")


def find_laps(engine_path: Path) -> Path:
    """Where the laps of an engine lie: `laps_path`, or the uncompressed file of an older bundle that has only that."""
    path, old = laps_path(engine_path), engine_path.with_suffix(".latency.json")
    return old if old.is_file() and not path.is_file() else path


def every_laps_file(engine_path: Path) -> list[Path]:
    """All files with laps of an engine that are there: of its first batch, of further ones, and an old one."""
    stem = engine_path.name.removesuffix(".engine")
    further = sorted(engine_path.parent.glob(f"{stem}.batch*.latency.json.gz"))
    plain = [laps_path(engine_path), engine_path.with_suffix(".latency.json")]
    return [path for path in (*plain, *further) if path.is_file()]


def is_laps_file(path: Path, engine_path: Path) -> bool:
    """Whether a file, there or not, is one of those with laps of an engine."""
    stem = engine_path.name.removesuffix(".engine")
    plain = (laps_path(engine_path), engine_path.with_suffix(".latency.json"))
    return path in plain or (path.parent == engine_path.parent and path.match(f"{stem}.batch*.latency.json.gz"))


def write_laps(
    path: Path,
    *,
    protocol: LatencyProtocol,
    machine: Machine,
    dense: Measurement,
    pruned: Measurement,
    control_laps: Measurement | None = None,
    control: Control | None = None,
    watch: MachineWatch | None = None,
    round_trips_ms: Mapping[str, list[float]] | None = None,
    complete: bool = True,
) -> None:
    """`path` holds every lap of all sides with protocol and machine, one line a list; the same laps, the same bytes.

    A name that does not end in `.gz` gets plain JSON.
    """
    laps = RecordedLaps(
        protocol=protocol,
        machine=machine,
        watch=watch,
        control=control,
        complete=complete,
        opened=dense.opened,
        dense_laps_ms=dense.laps_ms,
        dense_blocks=dense.blocks,
        pruned_laps_ms=pruned.laps_ms,
        pruned_blocks=pruned.blocks,
        control_laps_ms=control_laps.laps_ms if control_laps else [],
        control_blocks=control_laps.blocks if control_laps else [],
        round_trips_ms=dict(round_trips_ms or {}),
    )
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in laps.model_dump(mode="json").items())
    text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    # Without the time of writing, which gzip would put into its head.
    write_atomic(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def read_laps(path: Path) -> RecordedLaps:
    """The laps in a file of `write_laps`, compressed or, from an older bundle, plain.

    Raises: FileNotFoundError; ValueError when it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no laps here. Run `chip-deploy measure` on the bundle.")
    content = path.read_bytes()
    try:
        return RecordedLaps.model_validate_json(gzip.decompress(content) if content.startswith(GZIP) else content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        raise ValueError(f"{path}: cannot be decompressed ({err}). Measure again.") from err
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ValueError(f"{path}: no laps of this version ({where}: {first['msg']}). Measure again.") from err

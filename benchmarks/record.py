"""What the benchmarks share: options, two clocks, tables, and a JSON file that says where its figures are from."""

import argparse
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import scipy.linalg  # noqa: F401 (a library's threads can be limited only once it is loaded)
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from chip_deploy import __version__
from chip_deploy.export.machine import read_machine
from chip_deploy.pipeline.batches import shuffled
from chip_deploy.pipeline.data import DataSet, Images, default_size, normalise, open_data
from chip_deploy.pipeline.models import BuiltModel, build_model, load_weights
from chip_deploy.pipeline.tune import recalibrate

SCHEMA = "chip-deploy.benchmark/1"
PACKAGES = (
    *("torch", "torchvision", "torch-pruning", "numpy", "scipy", "numba"),
    *("onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx"),
)
RECALIBRATION_IMAGES, RECALIBRATION_BATCH = 64, 16

Result = TypeVar("Result")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--seed, --threads and --json."""
    parser.add_argument("--seed", type=int, default=0, help="decides images, random weights and random maps")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of BLAS [1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with machine and versions")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """--weights and --data, for a network that is real when both are given."""
    parser.add_argument("--weights", type=Path, metavar="FILE", help="trained weights [random ones]")
    parser.add_argument("--data", metavar="NAME", help="as chip-deploy's --data, e.g. imagefolder:DIR [random images]")


def count(text: str) -> int:
    """A whole number above 0, for argparse's `type`."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is no count; a whole number above 0 is expected.")
    return int(text)


def limit_threads(threads: int) -> None:
    """Give torch, and the BLAS libraries of numpy and scipy, so many threads: one that spins would count as work."""
    torch.set_num_threads(threads)
    threadpool_limits(limits=threads)


def cpu_seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """CPU time of this process, all its threads together, that the work takes; and what the work gives."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def cuda_seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """Time between two CUDA events around the work, its waits included; and what the work gives."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, result


def open_network(args: argparse.Namespace, name: str, *, images: int) -> tuple[BuiltModel, DataSet]:
    """The network with its weights, and its images: as many random ones as asked for where no --data is given.

    Without weights the batch norms are recalibrated, so that maps have the scale and the zeros of a working network.
    """
    source = args.data or f"random:{max(images, RECALIBRATION_IMAGES)}"
    data = open_data(source, size=default_size(name, source), seed=args.seed)
    classes = data.n_classes if data.has_accuracy else None
    built = build_model(name, num_classes=classes, seed=args.seed, size=data.size)
    if args.weights is not None:
        load_weights(built.module, args.weights)
    else:
        recalibrate(built.module, data.train, n=RECALIBRATION_IMAGES, batch=RECALIBRATION_BATCH, seed=args.seed)
    return built, data


def drawn(images: Images, *, n: int, seed: int, after: int = 0) -> Images:
    """n of the images in one shuffled order, from place `after` on: two draws can be kept apart.

    Raises: ValueError where there are too few images.
    """
    if after + n > len(images):
        raise ValueError(f"{after + n} images are asked for, but there are only {len(images)}. Ask for fewer.")
    return images.subset(shuffled(len(images), seed, "benchmark")[after : after + n])


def batches_of(images: Images, *, batch: int) -> Iterator[Tensor]:
    """The images as the network reads them, batch by batch.

    Shapes: -> (B, 3, S, S) float32.
    """
    return (normalise(images.read(indices)) for indices in torch.arange(len(images)).split(batch))


def forward(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """The model's own forward pass over all batches, and nothing else."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: the first column to the left, the others to the right."""
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    sys.stdout.write(f"\n{title}\n")
    for row in (columns, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    sys.stdout.flush()


def write_record(path: Path | None, *, figures: Any) -> None:
    """The figures as JSON with the command, the machine and the versions; nothing where no path is given.

    Folders are left out of the command: a record names files, not where one machine keeps them.
    """
    if path is None:
        return
    record = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [re.sub(r"[^\s:=]*/(?=[^/]+$)", "", word) for word in sys.argv],
        "machine": read_machine().model_dump(),
        "threads": torch.get_num_threads(),
        "versions": {"chip-deploy": __version__, **_versions()},
        "figures": figures,
    }
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed

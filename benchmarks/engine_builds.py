"""How long TensorRT-RTX builds, and how large its engines are: dense and pruned, by precision and compute capability.

    python benchmarks/engine_builds.py

Engines are built ahead of time, without a GPU, from networks with drawn weights: their structure decides. The pruned
ones have half the MACs, the same share of every group, widths in steps of --round-to. INT8 is calibrated on random
images, which decides its numbers and not its structure. Every engine is built --rounds times: the median time counts,
and the bytes have to be the same.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from record import (
    add_common_options,
    add_network_options,
    batches_of,
    count,
    drawn,
    limit_threads,
    open_network,
    print_table,
    write_record,
)
from torch import nn

from chip_deploy.chip.allocate import Budget, Rules, allocate
from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.plan import make_plan
from chip_deploy.chip.surgery import apply_plan
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.precision import Converter
from chip_deploy.export.target import Engine, engine_path, parse_target, require_usable
from chip_deploy.export.targets import make_target
from chip_deploy.pipeline.data import Images
from chip_deploy.pipeline.models import BuiltModel

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "resnet56")
PRECISIONS = ("fp32", "fp16", "int8")
MACS_KEPT, MIN_WIDTH = 0.5, 8


@dataclass(frozen=True)
class BuildFigure:
    """One engine: the median time of its builds, its size and that of the ONNX file it was built from."""

    network: str
    size: int
    pruned: bool
    macs: int
    precision: str
    capability: str
    build_seconds: float
    slowest_seconds: float
    engine_bytes: int
    onnx_bytes: int
    identical: bool
    multiplying: dict[str, int]
    """How many of the layers that multiply run in which type, by the ONNX file."""


def main() -> None:
    """Export, convert and build every network, print and write the figures."""
    args = _options()
    limit_threads(args.threads)
    require_usable(make_target(parse_target("trt-rtx")))
    figures = [figure for name in args.networks for figure in measure(name, args)]
    print_figures(figures)
    facts = {"rounds": args.rounds, "calibration_images": args.images, "round_to": args.round_to}
    write_record(args.json, figures={**facts, "rows": [asdict(figure) for figure in figures]})


def measure(name: str, args: argparse.Namespace) -> Iterator[BuildFigure]:
    """The engines of one network, dense and with half its MACs, in every precision and for every capability."""
    built, data = open_network(args, name, images=args.images)
    images = drawn(data.train, n=args.images, seed=args.seed)
    example = next(batches_of(images, batch=1))
    cost = CostModel(built.module, example)
    pruned, macs = halved(built, example, cost, round_to=args.round_to)
    for is_pruned, net, net_macs in ((False, built.module, cost.dense.macs), (True, pruned, macs)):
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(net, images, Path(folder), precisions=args.precisions)
            for precision, onnx in files.items():
                for capability in args.capabilities:
                    engines = [_build(onnx, capability, precision) for _ in range(args.rounds)]
                    seconds = [engine.build_seconds for engine in engines]
                    sys.stderr.write(f"{name} {precision} {capability}: {seconds} s\n")
                    yield BuildFigure(
                        network=name,
                        size=example.shape[-1],
                        pruned=is_pruned,
                        macs=net_macs,
                        precision=precision,
                        capability=capability,
                        build_seconds=statistics.median(seconds),
                        slowest_seconds=max(seconds),
                        engine_bytes=engines[0].bytes,
                        onnx_bytes=onnx.stat().st_size,
                        identical=len({engine.sha256 for engine in engines}) == 1,
                        multiplying=engines[0].layer_types.multiplying if engines[0].layer_types else {},
                    )


def halved(built: BuiltModel, example: torch.Tensor, cost: CostModel, *, round_to: int) -> tuple[nn.Module, int]:
    """A copy of the network with half its MACs, the first channels of every group kept; and its MACs."""
    groups = ChannelGraph(built.module, example).groups
    rules = Rules(round_to=round_to, min_width=MIN_WIDTH)
    widths = allocate(groups, cost, Budget("macs", MACS_KEPT), rules, way="uniform")
    plan = make_plan(
        built.module,
        groups,
        {layer: range(width) for layer, width in widths.items()},
        cost=cost,
        name=built.name,
        num_classes=built.num_classes,
        input_shape=example.shape[1:],
        criterion="none",
        round_to=rules.round_to,
        min_width=rules.min_width,
    )
    return apply_plan(built.module, plan, example), plan.macs_after


def write_files(net: nn.Module, images: Images, folder: Path, *, precisions: list[str]) -> dict[str, Path]:
    """The network's ONNX file in each precision."""
    batch = next(batches_of(images, batch=len(images)))
    fp32 = folder / "fp32.onnx"
    export_onnx(net, batch[:1], fp32)
    files = {"fp32": fp32}
    for precision in precisions:
        if precision != "fp32":
            files[precision] = folder / f"{precision}.onnx"
            Converter(fp32, batch.numpy(), precision=precision).write(files[precision])
    return {precision: files[precision] for precision in precisions}


def print_figures(figures: list[BuildFigure]) -> None:
    """One row an engine."""
    columns = ["network", "size", "MACs", "precision", "for", "build s", "engine MB", "ONNX MB", "layers that multiply"]
    rows = [
        [
            f"{f.network}{' pruned' if f.pruned else ''}",
            str(f.size),
            f"{f.macs / 1e6:.0f} M",
            f.precision,
            f.capability,
            f"{f.build_seconds:.2f}",
            f"{f.engine_bytes / 1e6:.2f}",
            f"{f.onnx_bytes / 1e6:.2f}",
            ", ".join(f"{count} {kind}" for kind, count in f.multiplying.items()),
        ]
        for f in figures
    ]
    print_table("Engines that TensorRT-RTX built ahead of time", columns, rows)
    same = sum(figure.identical for figure in figures)
    sys.stdout.write(f"\nBuilt again with the same bytes: {same} of {len(figures)} engines.\n")


def _build(onnx: Path, capability: str, precision: str) -> Engine:
    target = make_target(parse_target(f"trt-rtx:{capability}"))
    return target.build(onnx, engine_path(onnx.parent, target.spec, precision), precision=precision)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), metavar="NAME", help="[all three]"
    )
    parser.add_argument("--capabilities", nargs="+", default=["sm86", "sm89"], metavar="SM", help="[sm86 sm89]")
    parser.add_argument("--rounds", type=count, default=3, help="builds of each engine [3]")
    parser.add_argument("--images", type=count, default=8, help="images that INT8 is calibrated on [8]")
    parser.add_argument("--round-to", type=count, default=8, help="widths are multiples of it [8]")
    add_network_options(parser)
    add_common_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()

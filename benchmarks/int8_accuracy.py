"""Top-1 of a network in INT8 by the rule that chose its ranges, with and without the fallback for sensitive layers.

    python benchmarks/int8_accuracy.py --weights resnet56.safetensors --data imagefolder:DIR

The network is exported and quantised as `chip-deploy prune --precision int8` does, from training images, and judged by
onnxruntime on a CPU, which runs the file as it is written: INT8 values in float arithmetic, as an integer unit would.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from record import (
    add_common_options,
    add_network_options,
    count,
    drawn,
    limit_threads,
    open_network,
    print_table,
    write_record,
)

from chip_deploy.export.agree import compare_outputs
from chip_deploy.export.calibrate import METHODS
from chip_deploy.export.golden import run_in_batches
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.precision import Converter, QuantizeSettings, Reference
from chip_deploy.pipeline.convert import Attempts, Evidence
from chip_deploy.pipeline.data import Images, normalise

# Shape letters: N images, K outputs of each.


@dataclass(frozen=True)
class Int8Figure:
    """One way to quantise: the drop is in points of top-1 against FP32; a bound of None leaves nothing out."""

    calibration: str
    bound: float | None
    layers: int
    left_out: list[str]
    top1: float
    drop: float
    snr_db: float | None
    seconds: float


def main() -> None:
    """Export, quantise by each rule and bound, print and write the accuracies."""
    args = _options()
    limit_threads(args.threads)
    built, data = open_network(args, args.model, images=max(args.images, args.eval_images))
    test = data.test.sample(min(args.eval_images, len(data.test)), seed=args.seed, what="--eval-images")
    images = pixels(drawn(data.train, n=args.images, seed=args.seed))
    with tempfile.TemporaryDirectory(prefix="int8-accuracy-") as folder:
        source = Path(folder) / "dense.onnx"
        export_onnx(built.module, normalise(test.read(torch.arange(1))), source)
        exact = judged(Reference(source), test)
        evidence = Evidence(images, "calibration images", exact, test.labels.numpy(), lambda net: judged(net, test))
        figures = [each for method in args.methods for each in quantised(source, evidence, method, args)]
    fp32 = evidence.top1(exact)
    print_figures(figures, fp32=fp32, images=len(test), model=args.model)
    facts = {"model": args.model, "fp32": fp32, "eval_images": len(test), "calibration_images": args.images,
             "percentile": args.percentile}  # fmt: skip
    write_record(args.json, figures={**facts, "rows": [asdict(figure) for figure in figures]})


def quantised(source: Path, evidence: Evidence, method: str, args: argparse.Namespace) -> Iterator[Int8Figure]:
    """A figure without a bound and one for each bound, with ranges by one rule."""
    settings = QuantizeSettings.model_validate(
        {"images": args.images, "calibration": method, "percentile": args.percentile}
    )
    begun = time.perf_counter()
    converter = Converter(source, evidence.images, precision="int8", settings=settings)
    ranking = [layer for layer, _ in converter.ranking(evidence.images[: args.sensitivity_images])]
    attempts = Attempts(converter, source.with_name("dense.int8.onnx"), evidence, lambda _, text: _say(method, text))
    for bound in (None, *args.max_drop):
        conversion, outputs, without = attempts.best(ranking, most=bound)
        yield Int8Figure(
            calibration=method,
            bound=bound,
            layers=conversion.layers,
            left_out=[f"{layer.name} {layer.operator}" for layer in without],
            top1=evidence.top1(outputs) or 0.0,
            drop=attempts.drop(without),
            snr_db=compare_outputs(evidence.outputs, outputs).snr_db,
            seconds=round(time.perf_counter() - begun, 1),
        )
        begun = time.perf_counter()


def judged(network: Reference, images: Images) -> np.ndarray:
    """(N, K) outputs of a network for every image."""
    return np.concatenate(
        [run_in_batches(network, pixels(images, indices)) for indices in torch.arange(len(images)).split(100)]
    )


def pixels(images: Images, indices: torch.Tensor | None = None) -> np.ndarray:
    """The images, or those of these numbers, as the network reads them."""
    return normalise(images.read(torch.arange(len(images)) if indices is None else indices)).numpy()


def print_figures(figures: list[Int8Figure], *, fp32: float | None, images: int, model: str) -> None:
    """One row a rule and bound."""
    columns = ["ranges", "bound", "left out", "top-1", "drop, points", "SNR, dB", "seconds"]
    rows = [
        [
            f.calibration,
            "none" if f.bound is None else f"{f.bound:g}",
            f"{len(f.left_out)} of {f.layers}",
            f"{f.top1:.2%}",
            f"{f.drop:+.2f}",
            "inf" if f.snr_db is None else f"{f.snr_db:.1f}",
            f"{f.seconds:.0f}",
        ]
        for f in figures
    ]
    print_table(f"Top-1 of {model} in INT8 on {images} test images; FP32 {fp32 or 0:.2%}", columns, rows)


def _say(method: str, text: str) -> None:
    sys.stderr.write(f"{method}: {text}\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="resnet56", help="as chip-deploy's --model [resnet56]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="all of them")
    parser.add_argument("--percentile", type=float, default=99.99, help="for the rule of that name [99.99]")
    parser.add_argument("--max-drop", nargs="+", type=float, default=[0.5], help="bounds in points of top-1 [0.5]")
    parser.add_argument("--images", type=count, default=512, help="training images for the ranges [512]")
    parser.add_argument("--sensitivity-images", type=count, default=16, help="of them, for the ranking [16]")
    parser.add_argument("--eval-images", type=count, default=10_000, help="test images, at most [10000]")
    add_network_options(parser)
    add_common_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()

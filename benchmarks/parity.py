"""What 16 bits and TF32 cost networks, whether the checks of parity let them pass, and which planted faults they find.

    python benchmarks/parity.py --weights resnet20.safetensors resnet56.safetensors --data imagefolder:DIR

Networks of torchvision have random weights and batch norms that were settled on random images; those of --weights are
trained and see the data's test images. A fault is planted in the FP32 network, which is then converted as the right one
is. "Fixed limits" are those of `agree.LIMITS`; "the check" is the one that a file or an engine has to pass.
"""

import argparse
import contextlib
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from pydantic import BaseModel, ConfigDict
from record import (
    RECALIBRATION_BATCH,
    RECALIBRATION_IMAGES,
    add_common_options,
    count,
    drawn,
    limit_threads,
    open_network,
    print_table,
    write_record,
)

from chip_deploy.export.agree import MARGIN, Agreement, compare_outputs, require_agreement
from chip_deploy.export.errors import ParityFailed
from chip_deploy.export.golden import run_in_batches
from chip_deploy.export.low_precision import lowered
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.precision import Converter, Reference
from chip_deploy.export.rounding import in_tf32, unrounded
from chip_deploy.pipeline.data import normalise, open_data
from chip_deploy.pipeline.models import build_model
from chip_deploy.pipeline.prepared import reference_target
from chip_deploy.pipeline.tune import recalibrate

# Shape letters: N images, K outputs of each.

NETWORKS = (
    *("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0"),
    *("mnasnet1_0", "densenet121", "regnet_y_400mf", "squeezenet1_1"),
)
SIXTEEN_BITS = {"fp16": torch.float16, "bf16": torch.bfloat16}
ACTIVATIONS = ("Relu", "Clip", "HardSwish", "Sigmoid", "HardSigmoid")

Plant = Callable[[onnx.ModelProto], None]


class Rounded(BaseModel):
    """A right network in one arithmetic: how it agrees with torch in FP32, and which rules let it pass."""

    model_config = ConfigDict(frozen=True)

    network: str
    arithmetic: str
    file: Agreement
    """Each rounding emulated."""
    torch: Agreement | None
    """torch itself in that type; None in TF32."""
    engine: Agreement | None
    """onnxruntime's engine for the file, optimised; in FP16 alone."""
    unrounded: Agreement | None
    """The file without its roundings, against the FP32 file; None in TF32, which has no file of its own."""
    passes_fixed_limits: bool
    passes_check: bool


class Fault(BaseModel):
    """A wrong network in one arithmetic: whether the wrong file, and an engine of it, are found."""

    model_config = ConfigDict(frozen=True)

    network: str
    arithmetic: str
    fault: str
    effect: Agreement
    """The wrong network in FP32, against the right one."""
    wrong: Agreement
    """The wrong network in its arithmetic, against torch in FP32."""
    found_by_fixed_limits: bool
    found_in_file: bool | None
    """None in TF32, which has no file of its own."""
    found_in_engine: bool


@dataclass(frozen=True)
class Subject:
    """One network in FP32 and right in every arithmetic, and what it gives.

    images: (N, 3, H, W). golden: (N, K), torch's outputs in FP32; exact: the FP32 file's. files: how each arithmetic
    agrees with torch in FP32. kept: the nodes that stay in FP32, by precision.
    """

    name: str
    net: torch.nn.Module
    images: torch.Tensor
    golden: np.ndarray
    exact: np.ndarray
    model: onnx.ModelProto
    low: dict[str, onnx.ModelProto]
    files: dict[str, Agreement]
    kept: dict[str, dict[str, str]]


def main() -> None:
    """Measure every network, print and write what was found."""
    args = _options()
    limit_threads(args.threads)
    right: list[Rounded] = []
    faults: list[Fault] = []
    fp32: dict[str, Agreement] = {}
    for weights in [*(None for _ in args.networks), *args.weights]:
        name = weights.stem if weights else args.networks[len(fp32)]
        begun = time.perf_counter()
        subject = make_subject(name, weights, args)
        fp32[subject.name] = compare_outputs(subject.golden, subject.exact)
        right += [rounded(subject, kind) for kind in subject.low]
        faults += [each for fault in FAULTS for each in planted(subject, fault)]
        sys.stderr.write(f"{subject.name}: {time.perf_counter() - begun:.0f} s\n")
    print_right(right, fp32)
    print_faults(faults)
    figures = {"images": args.images, "size": args.size, "margin": MARGIN}
    figures["fp32"] = {name: agreement.model_dump() for name, agreement in fp32.items()}
    figures["right"] = [each.model_dump() for each in right]
    figures["faults"] = [each.model_dump() for each in faults]
    write_record(args.json, figures=figures)


def make_subject(name: str, weights: Path | None, args: argparse.Namespace) -> Subject:
    """The network with its images, exported, and converted to every arithmetic."""
    net, images = _network(name, weights, args)
    golden = _torch_outputs(net, images, torch.float32)
    low, kept = {}, {}
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(net, images[:1], path)
        exact = Reference(path).outputs(images.numpy())
        low["tf32"] = in_tf32(onnx.load(path))
        for precision in SIXTEEN_BITS:
            converter = Converter(path, images.numpy(), precision=precision)
            low[precision], kept[precision] = converter.converted()
    files = {kind: compare_outputs(golden, Reference(each).outputs(images.numpy())) for kind, each in low.items()}
    shown = f"{name}, trained" if weights else name
    return Subject(shown, net, images, golden, exact, converter.model, low, files, kept)


def rounded(subject: Subject, kind: str) -> Rounded:
    """The right network in one arithmetic."""
    file, sixteen = subject.files[kind], kind in SIXTEEN_BITS
    half = _torch_outputs(subject.net, subject.images, SIXTEEN_BITS[kind]) if sixteen else None
    engine = _engine_outputs(subject.low[kind], subject.images.numpy()) if kind == "fp16" else None
    in_torch = None if half is None else compare_outputs(subject.golden, half)
    in_engine = None if engine is None else compare_outputs(subject.golden, engine)
    plain = _without_roundings(subject, subject.low[kind]) if sixteen else None
    seen = [each for each in (file, in_torch, in_engine) if each is not None]
    return Rounded(
        network=subject.name,
        arithmetic=kind,
        file=file,
        torch=in_torch,
        engine=in_engine,
        unrounded=plain,
        passes_fixed_limits=all(passes(each, kind) for each in seen),
        passes_check=all(passes(each, kind, rounding=file) for each in seen) and (plain is None or passes(plain)),
    )


def planted(subject: Subject, fault: str) -> Iterator[Fault]:
    """The network with the fault in every arithmetic; nothing where that is no fault, as of a bias that is zero."""
    wrong = copy.deepcopy(subject.model)
    FAULTS[fault](wrong)
    effect = compare_outputs(subject.exact, Reference(wrong).outputs(subject.images.numpy()))
    if passes(effect):
        return
    for kind, rounding in subject.files.items():
        sixteen = kind in SIXTEEN_BITS
        low = lowered(wrong, kind, keep=subject.kept[kind])[0] if sixteen else in_tf32(wrong)
        agreement = compare_outputs(subject.golden, Reference(low).outputs(subject.images.numpy()))
        yield Fault(
            network=subject.name,
            arithmetic=kind,
            fault=fault,
            effect=effect,
            wrong=agreement,
            found_by_fixed_limits=not passes(agreement, kind),
            found_in_file=not passes(_without_roundings(subject, low)) if sixteen else None,
            found_in_engine=not passes(agreement, kind, rounding=rounding),
        )


def passes(agreement: Agreement, precision: str = "fp32", *, rounding: Agreement | None = None) -> bool:
    """Whether the check of parity lets it pass."""
    try:
        require_agreement(agreement, what="it", precision=precision, rounding=rounding)
    except ParityFailed:
        return False
    return True


def transposed(model: onnx.ModelProto) -> None:
    """Height and width of a kernel in the middle change places."""
    _change(model, 1, lambda values: values.swapaxes(2, 3), large=True)


def swapped(model: onnx.ModelProto) -> None:
    """The first convolution reads blue for red."""
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    _replace(model, first.input[1], lambda values: values[:, ::-1])


def without_bias(model: onnx.ModelProto) -> None:
    """A convolution in the middle, or the classifier, adds no bias."""
    _change(model, 2, np.zeros_like)


def without_activation(model: onnx.ModelProto) -> None:
    """An activation in the middle passes on what it reads."""
    found = [node for node in model.graph.node if node.op_type in ACTIVATIONS]
    node = found[len(found) // 2]
    node.op_type = "Identity"
    del node.input[1:], node.attribute[:]


def scaled(model: onnx.ModelProto) -> None:
    """The weights of a convolution in the middle are a tenth too large."""
    _change(model, 1, lambda values: values * np.float32(1.1))


FAULTS: dict[str, Plant] = {
    "kernel transposed": transposed,
    "channels swapped": swapped,
    "bias missing": without_bias,
    "activation dropped": without_activation,
    "scale off by 10 %": scaled,
}


def print_right(right: list[Rounded], fp32: dict[str, Agreement]) -> None:
    """One row a network and arithmetic."""
    worst = min(fp32.items(), key=lambda pair: pair[1].snr_db or np.inf)
    sys.stdout.write(f"\nFP32 files against torch: the furthest off is {worst[0]}: {worst[1]}.\n")
    columns = [
        "network",
        "in",
        "file, dB",
        "largest",
        "torch, dB",
        "engine, dB",
        "unrounded, dB",
        "fixed limits",
        "check",
    ]
    rows = [
        [
            each.network,
            each.arithmetic,
            _decibel(each.file),
            f"{each.file.largest_relative_difference:.1e}",
            _decibel(each.torch),
            _decibel(each.engine),
            _decibel(each.unrounded),
            "pass" if each.passes_fixed_limits else "REFUSED",
            "pass" if each.passes_check else "REFUSED",
        ]
        for each in right
    ]
    print_table("Right networks, each rounding emulated, against torch in FP32", columns, rows)


def print_faults(faults: list[Fault]) -> None:
    """How many of the planted faults are found, by kind and arithmetic."""
    columns = ["fault", "in", "planted", "by fixed limits", "in the file", "in an engine"]
    rows = []
    for fault in FAULTS:
        for kind in ("tf32", *SIXTEEN_BITS):
            of = [each for each in faults if (each.fault, each.arithmetic) == (fault, kind)]
            in_file = "no file" if kind == "tf32" else str(sum(bool(each.found_in_file) for each in of))
            by_limits = sum(each.found_by_fixed_limits for each in of)
            rows.append(
                [fault, kind, str(len(of)), str(by_limits), in_file, str(sum(each.found_in_engine for each in of))]
            )
    print_table("Planted faults that are found", columns, rows)


def _network(name: str, weights: Path | None, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network, trained or settled, and its images."""
    if weights is not None:
        given = argparse.Namespace(weights=weights, data=args.data, seed=args.seed)
        built, data = open_network(given, name, images=args.images)
    else:
        data = open_data(f"random:{max(args.images, RECALIBRATION_IMAGES)}", size=args.size, seed=args.seed)
        built = build_model(name, num_classes=None, seed=args.seed, size=args.size)
        settle = {"n": RECALIBRATION_IMAGES, "batch": RECALIBRATION_BATCH, "seed": args.seed}
        recalibrate(built.module, data.train, **settle)
    images = drawn(data.test, n=args.images, seed=args.seed)
    return built.module.eval(), normalise(images.read(torch.arange(args.images)))


def _without_roundings(subject: Subject, low: onnx.ModelProto) -> Agreement:
    return compare_outputs(subject.exact, Reference(unrounded(low, subject.model)).outputs(subject.images.numpy()))


def _torch_outputs(net: torch.nn.Module, images: torch.Tensor, kind: torch.dtype) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(net).to(kind)(images.to(kind)).float().numpy()


def _engine_outputs(low: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """What onnxruntime makes of a file with all its optimisations."""
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "model.fp16.onnx"
        onnx.save(low, path)
        with contextlib.closing(reference_target().open_onnx(path)) as session:
            return run_in_batches(session, images)


def _change(
    model: onnx.ModelProto, place: int, change: Callable[[np.ndarray], np.ndarray], *, large: bool = False
) -> None:
    """A constant of the convolution in the middle that has one; large: of those whose kernel is larger than a pixel."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) > place]
    nodes = [node for node in nodes if not large or weights[node.input[1]].dims[-1] > 1]
    nodes = nodes or [node for node in model.graph.node if node.op_type == "Gemm"]
    if nodes:
        _replace(model, nodes[len(nodes) // 2].input[place], change)


def _replace(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == name)
    values = np.ascontiguousarray(change(numpy_helper.to_array(tensor)), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def _decibel(agreement: Agreement | None) -> str:
    if agreement is None:
        return ""
    return "same" if agreement.snr_db is None else f"{agreement.snr_db:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS, metavar="NAME", help="of torchvision [nine]")
    parser.add_argument(
        "--weights", nargs="*", type=Path, default=[], metavar="FILE", help="trained; MODEL.safetensors"
    )
    parser.add_argument("--data", metavar="NAME", help="test images for the trained ones, e.g. imagefolder:DIR")
    parser.add_argument("--size", type=count, default=64, help="pixels a side for torchvision's networks [64]")
    parser.add_argument("--images", type=count, default=8, help="compared, in each network [8]")
    add_common_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""A network in the precision that is asked for: written into its ONNX file, once, on the host.

FP16 and BF16 are types of tensors (low_precision), INT8 and FP8 are Q/DQ pairs (quantize) whose ranges come from real
images (calibrate). What the network's own numbers forbid is found by running it: nothing ships that overflows on the
images at hand. Whether the result is good enough is for its reader to say: `Conversion` holds what was done.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from .agree import compare_outputs
from .bundle import write_atomic
from .calibrate import Magnitudes, Method, reaches
from .errors import ConversionFailed, IntegrityError, ParityFailed
from .layers import LayerMap
from .low_precision import (
    ELEMENT_TYPES,
    FLOAT,
    QUANTIZATION,
    Kept,
    element_types,
    emulated,
    holds_16_bits,
    lowered,
    noted_layer,
    opset_of,
    overflowing,
    prepared,
    raised,
)
from .onnx_graph import read_graph
from .quantize import FLOAT8_OPSET, QuantLayer, excluded, infinite, quantizable, quantized, tensors_read
from .sensitivity import Sensitivity, ranked
from .target import PRECISIONS

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# Shape letters: N images, K outputs of each.

QUANTISED = ("int8", "fp8")
# Images at once where the network leaves the batch free: enough to amortise a call, few enough for all its tensors.
OBSERVED_BATCH = 8
# onnxruntime's severities: 3 is "error".
LOG_ERRORS_ONLY = 3

Rest = Literal["fp32", "fp16"]
Progress = Callable[[float, str], None]


class QuantizeSettings(BaseModel):
    """How 8 bits are chosen: from how many images, by which rule, and which layers are left out.

    `rest`: the type of what is not quantised; auto is fp16 where TensorRT alone runs it. `exclude`: layers by name, or
    with `*`. `max_drop`: points of top-1 that int8 may lose; the most sensitive layers are left out until it holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    images: int = Field(default=512, ge=1)
    calibration: Method = "entropy"
    percentile: float = Field(default=99.99, gt=50, le=100)
    first_last: bool = False
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    rest: Literal["auto", "fp32", "fp16"] = "auto"
    max_drop: float | None = Field(default=None, ge=0, le=100)
    sensitivity_images: int = Field(default=16, ge=1)


class LeftOut(BaseModel):
    """A layer that could be quantised and is not, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    operator: str
    reason: str


class Conversion(BaseModel):
    """What was written: one ONNX file in one precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: str
    opset: int
    bytes: int
    images: int = 0
    """Images that the network was looked at with before; 0 where none were needed."""
    rest: Rest = "fp32"
    """The type of what is not quantised."""
    calibration: str = ""
    """The rule by which the ranges were chosen; empty where nothing is quantised."""
    layers: int = 0
    """Layers that can be quantised: those with a weight, and residual additions."""
    left_out: list[LeftOut] = []
    """Those of them that are not."""
    kept: list[Kept] = []
    """Nodes that compute in FP32 in a 16-bit graph."""

    @property
    def quantised(self) -> int:
        """How many layers are quantised."""
        return self.layers - len(self.left_out)

    @property
    def emulates(self) -> str:
        """The 16-bit type whose roundings `Reference` emulates in FP32 to run the file; empty where there is none."""
        if self.precision in ELEMENT_TYPES:
            return self.precision
        return "fp16" if self.rest == "fp16" else ""


class Converter:
    """A network that was looked at, ready to be written in one precision as often as needed.

    Cost: one run of the network on every calibration image, at construction; none for bf16.
    """

    def __init__(
        self,
        source: Path,
        images: np.ndarray,
        *,
        precision: str,
        settings: QuantizeSettings | None = None,
        rest: Rest = "fp32",
        what: str = "calibration images",
        progress: Progress | None = None,
    ) -> None:
        """`images` (N, C, H, W) float32 as the network reads them, `what` is the name that reasons give them.

        Raises: ValueError for a precision that is no conversion, for images that do not fit, or for an excluded layer
        that there is not; IntegrityError for a source that is no ONNX file; ConversionFailed for a network whose
        outputs are not finite in FP32, or that reads what is not in every layer that 8 bits were asked for.
        """
        if precision not in PRECISIONS or precision == "fp32":
            known = ", ".join(name for name in PRECISIONS if name != "fp32")
            raise ValueError(f"a network is not converted to '{precision}'. Available: {known}.")
        self.precision = precision
        self.rest: Rest = rest
        self.settings = settings or QuantizeSettings()
        self.what, self._images = what, len(images)
        self.model, self.layer_of = _read(source)
        _require_fitting(self.model, images, what=source.name)
        self.layers = quantizable(self.model, self.layer_of) if precision in QUANTISED else []
        self.excluded = excluded(self.layers, self.settings.exclude, first_last=self.settings.first_last)
        if precision in QUANTISED:
            _require_layers(self.layers, self.excluded, precision, source.name)
        read = tensors_read(self.model, self.layers)
        seen = _observed(self.model, images, counted=read, progress=progress) if precision != "bf16" else {}
        if precision in QUANTISED:
            finite = {name for name in read if seen[name].finite}
            self.excluded = infinite(self.model, self.layers, finite) | self.excluded
            _require_finite_layers(self.layers, self.excluded, precision, source.name)
        self._largest = {name: found.largest for name, found in seen.items()}
        asked = {"method": self.settings.calibration, "percentile": self.settings.percentile}
        self._reaches = reaches({name: seen[name] for name in read}, **asked)

    def write(self, out: Path, *, left_out: Mapping[str, str] | None = None) -> Conversion:
        """`out` holds the network in the precision, whole; the same network and images give the same bytes.

        `left_out`: nodes that are not quantised besides those the settings exclude, with the reason.
        Raises: ConversionFailed.
        """
        without = {**(left_out or {}), **self.excluded}
        model, kept = self.converted(each.node for each in self.layers if each.node not in without)
        data = model.SerializeToString(deterministic=True)
        write_atomic(out, data)
        nodes = {node.name: node for node in model.graph.node}
        rest: Rest = self.rest if self.layers else "fp32"
        return Conversion(
            precision=self.precision,
            opset=opset_of(model),
            bytes=len(data),
            images=self._images if self.precision != "bf16" else 0,
            rest=rest,
            calibration=self._rule() if self.layers else "",
            layers=len(self.layers),
            left_out=[
                LeftOut(layer=each.name, operator=each.operator, reason=without[each.node])
                for each in self.layers
                if each.node in without
            ],
            kept=[
                Kept(
                    layer=self.layer_of.get(name) or noted_layer(nodes[name]) or name,
                    operator=nodes[name].op_type,
                    reason=reason,
                )
                for name, reason in kept.items()
                if nodes[name].op_type not in QUANTIZATION  # a pair is a part of the layer that reads it
            ],
        )

    def converted(self, nodes: Collection[str] | Iterator[str] = ()) -> tuple[onnx.ModelProto, dict[str, str]]:
        """The network in the precision with `nodes` quantised, and the nodes that a 16-bit graph keeps in FP32."""
        if self.precision not in QUANTISED:
            keep = self._overflows(self.model) if self.precision == "fp16" else {}
            return lowered(self.model, self.precision, keep=keep, layers=self.layer_of)
        model = quantized(self.model, self._reaches, list(nodes), kind=self.precision, layers=self.layer_of)
        if self.rest == "fp32":
            return model, {}
        model = raised(model, FLOAT8_OPSET)
        return lowered(model, "fp16", keep=self._overflows(model), layers=self.layer_of)

    def ranking(self, images: np.ndarray, *, progress: Progress | None = None) -> list[tuple[QuantLayer, Sensitivity]]:
        """The layers that may be quantised, the most sensitive first: each alone in 8 bits, the others in FP32.

        Cost: as many runs of the network on `images` as it has layers.
        """
        exact = Reference(self.model).outputs(images)

        def snr_db(layer: QuantLayer) -> float | None:
            model = quantized(self.model, self._reaches, [layer.node], kind=self.precision)
            return compare_outputs(exact, Reference(model).outputs(images)).snr_db

        return ranked([each for each in self.layers if each.node not in self.excluded], snr_db, progress=progress)

    def _overflows(self, model: onnx.ModelProto) -> dict[str, str]:
        return overflowing(model, self._largest, images=self._images, what=self.what)

    def _rule(self) -> str:
        if self.settings.calibration == "percentile":
            return f"percentile {self.settings.percentile:g}"
        return self.settings.calibration


class Reference:
    """An ONNX file run by onnxruntime node by node, on one thread of the CPU: no Q/DQ pair is fused away.

    What it gives is what the file says: 8-bit steps are exact, and a tensor in 16 bits is computed in FP32 and rounded
    to them, or infinite where it does not fit. An engine may do otherwise and be right: the one for `ort-cpu` fuses
    pairs into integer kernels and leaves FP16 tensors between two nodes in FP32; a GPU adds up in an order of its own.
    """

    def __init__(self, model: Path | onnx.ModelProto) -> None:
        """A network with 16-bit tensors is emulated: onnxruntime's CPU has convolutions in neither FP16 nor BF16.

        Raises: ConversionFailed with onnxruntime's own words; IntegrityError for a file that is not whole; ValueError
        for a network that takes something else than one input.
        """
        proto = _loaded(model) if isinstance(model, Path) else model
        if holds_16_bits(proto):
            proto = emulated(proto)
        what = str(model) if isinstance(model, Path) else "the network"
        self._session = _session(proto.SerializeToString(), what=what)
        inputs = self._session.get_inputs()
        _require_one([each.name for each in inputs], what=what)
        given = inputs[0]
        shape = tuple(axis if isinstance(axis, int) else -1 for axis in given.shape)
        self.input_names = [given.name]
        self.output_names = [each.name for each in self._session.get_outputs()]
        self.input_shapes = {given.name: shape}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs for `feeds`, by name."""
        values: list[Any] = list(self._session.run(None, dict(feeds)))
        return dict(zip(self.output_names, values, strict=True))

    def outputs(self, images: np.ndarray) -> np.ndarray:
        """The first output for every image.

        Shapes: (N, C, H, W) -> (N, K).
        """
        name, first = self.input_names[0], self.output_names[0]
        fixed = self.input_shapes[name][0]
        found = [self.run({name: batch})[first][:size] for batch, size in _batches(images, fixed)]
        return np.concatenate(found)


def require_quantisable(source: Path, settings: QuantizeSettings) -> None:
    """Nothing, if the network has layers that can be quantised, and all that `settings` exclude are among them.

    Raises: ValueError as `Converter`, without a look at any image.
    """
    model, layer_of = _read(source)
    layers = quantizable(model, layer_of)
    _require_layers(layers, excluded(layers, settings.exclude, first_last=settings.first_last), "int8", source.name)


def require_finite(outputs: np.ndarray, *, what: str) -> None:
    """Nothing, if every output is finite. Raises: ParityFailed naming `what`."""
    wrong = int(np.count_nonzero(~np.isfinite(outputs)))
    if wrong:
        raise ParityFailed(
            f"{what}: {wrong} of {outputs.size} outputs are not finite, and the FP32 network's are. It overflows on "
            "images that it was not calibrated on: raise quantize.images, or leave this precision out."
        )


def _read(source: Path) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The network, and the torch layer of each of its nodes. Raises: IntegrityError; ConversionFailed."""
    import onnx

    graph = read_graph(source)
    try:
        model = prepared(_loaded(source))
    except onnx.shape_inference.InferenceError as err:
        raise _unreadable(source, err) from err
    layers = LayerMap(graph)
    return model, {node.name: layers.layer(node) for node in graph.nodes if node.name}


def _loaded(path: Path) -> onnx.ModelProto:
    """The network with all its weights. Raises: IntegrityError where weights that lie beside the file are missing."""
    import onnx

    try:
        return onnx.load(path)
    except onnx.checker.ValidationError as err:
        raise _unreadable(path, err) from err


def _unreadable(path: Path, err: Exception) -> IntegrityError:
    first = str(err).strip().splitlines()[0].rstrip(".")
    return IntegrityError(f"{path}: onnx cannot read it: {first}. Export it again, with all its files beside it.")


def _require_layers(layers: Sequence[QuantLayer], without: Collection[str], precision: str, what: str) -> None:
    """Raises: ValueError where no layer is left to quantise."""
    if len(layers) == len(without):
        raise ValueError(
            f"{what}: {precision} was asked for, and no layer is left to quantise: it has {len(layers)} that can be, "
            f"and the recipe excludes them. Exclude fewer, or leave {precision} out."
        )


def _require_finite_layers(layers: Sequence[QuantLayer], without: Mapping[str, str], precision: str, what: str) -> None:
    """Raises: ConversionFailed where no layer is left to quantise once those are left out that read infinity."""
    if len(layers) == len(without):
        reasons = "; ".join(f"{each.name}: {without[each.node]}" for each in layers)
        raise ConversionFailed(f"{what}: no layer is left to quantise ({reasons}). Leave {precision} out.")


def _require_fitting(model: onnx.ModelProto, images: np.ndarray, *, what: str) -> None:
    """Raises: ValueError unless the images are float32 batches of what the network's one input takes."""
    _require_one([value.name for value in model.graph.input], what=what)
    given = model.graph.input[0]
    expected = [axis.dim_value or -1 for axis in given.type.tensor_type.shape.dim]
    fits = images.ndim == len(expected) and all(
        want in (-1, got) for want, got in zip(expected[1:], images.shape[1:], strict=True)
    )
    if not fits or images.dtype != np.float32 or not len(images):
        wanted = ", ".join(["N", *map(str, expected[1:])])
        raise ValueError(
            f"calibration images of shape {images.shape} and type {images.dtype}, but {what} takes ({wanted}) float32. "
            "Give images at the size and with the preprocessing of the network."
        )


def _require_one(inputs: Sequence[str], *, what: str) -> None:
    """Raises: ValueError unless the network takes one input."""
    if len(inputs) != 1:
        raise ValueError(
            f"{what}: a network with one input, its images, is expected; it takes {', '.join(inputs) or 'none'}. "
            "Give one that does, or leave it in fp32."
        )


def _observed(
    model: onnx.ModelProto, images: np.ndarray, *, counted: Collection[str], progress: Progress | None
) -> dict[str, Magnitudes]:
    """The magnitudes of every float tensor on all images: counted for those named, the largest alone for the others.

    Raises: ConversionFailed where an output is not finite. What is not may be right elsewhere: a mask is, in a softmax.
    """
    session = Reference(_showing_all(model))
    seen = {name: Magnitudes() for name in (*session.input_names, *session.output_names)}
    fixed = session.input_shapes[session.input_names[0]][0]
    done = 0
    for batch, size in _batches(images, fixed):
        feeds = {session.input_names[0]: batch}
        values_of = {**feeds, **session.run(feeds)}
        for name, values in values_of.items():
            seen[name].add(values) if name in counted else seen[name].add_largest(values)
        for output in model.graph.output:
            if not seen[output.name].finite:
                row = int(np.argwhere(~np.isfinite(values_of[output.name]))[0][0])
                raise ConversionFailed(_overflow(model, seen, output.name, f"image {done + row + 1} of {len(images)}"))
        done += size
        if progress is not None:
            progress(done / len(images), f"{done} of {len(images)} calibration images")
    return seen


def _overflow(model: onnx.ModelProto, seen: Mapping[str, Magnitudes], output: str, image: str) -> str:
    """That an output is not finite, and where that may have begun."""
    names = (model.graph.input[0].name, *(name for node in model.graph.node for name in node.output))
    first = next(name for name in (*names, output) if name in seen and not seen[name].finite)
    return (
        f"output '{output}' is not finite in FP32 already, on {image}. The first tensor that is not is '{first}': look "
        "for what overflows from there on, no lower precision can hold it."
    )


def _showing_all(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with every float tensor that a node writes as an output."""
    import onnx

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    types = element_types(model.graph)
    have = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if types.get(name) == FLOAT and name not in have:
                shown.graph.output.append(onnx.helper.make_tensor_value_info(name, FLOAT, None))
    return shown


def _batches(images: np.ndarray, fixed: int) -> Iterator[tuple[np.ndarray, int]]:
    """The images as many at a time as the network takes, and how many of those count; the last are repeated."""
    at_once = fixed if fixed > 0 else OBSERVED_BATCH
    for start in range(0, len(images), at_once):
        batch = images[start : start + at_once]
        yield (np.resize(batch, (fixed, *batch.shape[1:])) if fixed > 0 else batch), len(batch)


def _session(data: bytes, *, what: str) -> onnxruntime.InferenceSession:
    """Raises: ConversionFailed with onnxruntime's own words."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = LOG_ERRORS_ONLY
    # Optimised, Q/DQ pairs are moved and fused and biases become int32, whose scale FP16 cannot hold where a channel is
    # almost dead: that is another network than the file's. Of FP8 pairs those transformations make invalid graphs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except _foreign_errors() as err:
        first = " ".join(str(err).split("\n")[0].split())
        raise ConversionFailed(f"{what}: onnxruntime {onnxruntime.__version__} cannot open it: {first}") from err


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Every exception that onnxruntime's own code raises; they share no base class but Exception."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError)

"""A torch network becomes one ONNX file: the same bytes for the same weights, and nothing in it about this machine."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .bundle import write_atomic
from .errors import ExportFailed
from .onnx_optimize import optimize

if TYPE_CHECKING:
    import onnx

OPSET = 18
# TensorRT 10.3 and onnxruntime from 1.18 on read files up to this version.
LARGEST_IR_VERSION = 10
# What one protobuf message can hold, less room for the graph itself.
LARGEST_FILE_BYTES = 2**31 - 2**20
INPUT = "input"
OUTPUT = "output"
# Which module of the network a node came from. Everything else that the exporter notes down is dropped: it repeats
# the graph, or holds absolute paths of the machine that exported.
KEPT_METADATA = ("namespace", "pkg.torch.onnx.name_scopes")


class OnnxInfo(BaseModel):
    """What an ONNX file is, as a report or a manifest names it."""

    model_config = ConfigDict(frozen=True)

    opset: int
    ir_version: int
    bytes: int
    sha256: str
    input: str
    output: str


def export_onnx(model: nn.Module, example: Tensor, path: Path, *, dynamic_batch: bool = False) -> OnnxInfo:
    """`path` holds `model` in evaluation mode as ONNX, whole and checked; the model itself is left as it was.

    The batch is that of `example`, or free. One input tensor, one output tensor.
    Raises: ExportFailed with one sentence, and no file, when the network does not run, does not export, or gives
    anything but one tensor.
    """
    example = example.to(_device(model))
    with evaluation_mode(model), torch.no_grad():
        _require_one_tensor(model, example)
        proto = _export(model, example, dynamic_batch=dynamic_batch)
    _drop_metadata(proto)
    proto.ir_version = min(proto.ir_version, LARGEST_IR_VERSION)
    data = _checked_bytes(proto)
    write_atomic(path, data)
    return OnnxInfo(
        opset=OPSET,
        ir_version=proto.ir_version,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        input=INPUT,
        output=OUTPUT,
    )


def _export(model: nn.Module, example: Tensor, *, dynamic_batch: bool) -> onnx.ModelProto:
    """The network as the dynamo exporter writes it. Raises: ExportFailed with the first cause the exporter names."""
    shapes = None
    if dynamic_batch:
        # A batch of one would be taken for a constant.
        example = example.expand(2, *example.shape[1:]) if len(example) == 1 else example
        shapes = ({0: torch.export.Dim("batch")},)
    try:
        with _silent_failure():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as err:
        raise ExportFailed(
            f"the network cannot be exported to ONNX: {_first_cause(err)}. "
            "Replace the layer or the Python code it comes from."
        ) from err
    assert program is not None, "the dynamo exporter returns a program"
    optimize(program.model)
    # Named last: a network that gives back its input has one tensor for both until then.
    for name in (INPUT, OUTPUT):
        if parameter := program.model.graph.initializers.get(name):
            parameter.name = f"{name}.parameter"
    program.model.graph.inputs[0].name, program.model.graph.outputs[0].name = INPUT, OUTPUT
    proto = program.model_proto
    _require_batch(proto, example, dynamic_batch=dynamic_batch)
    return proto


def _require_one_tensor(model: nn.Module, example: Tensor) -> None:
    """Raises: ExportFailed when the network does not run, gives no single tensor, or is too large for one file."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size > LARGEST_FILE_BYTES:
        raise ExportFailed(f"the network holds {size / 1e9:.1f} GB of weights, and one ONNX file at most 2.1 GB.")
    try:
        output = model(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as err:
        raise ExportFailed(
            f"the network does not run on an input of shape {tuple(example.shape)}: {_first_line(err)}. "
            "Give an example of the size the network expects."
        ) from err
    if not isinstance(output, Tensor):
        raise ExportFailed(
            f"the network returns a {type(output).__name__}, one tensor expected. Return the logits only, "
            "for instance by building it without auxiliary heads."
        )


def _require_batch(proto: onnx.ModelProto, example: Tensor, *, dynamic_batch: bool) -> None:
    """Raises: ExportFailed unless the batch leaves the network as it enters it.

    A network that writes its batch into a reshape exports without complaint, and mixes images up.
    """
    given, returned = (_batch(values[0]) for values in (proto.graph.input, proto.graph.output))
    expected = "batch" if dynamic_batch else len(example)
    if given != expected or returned != expected:
        raise ExportFailed(
            f"the batch enters the network as {given!r} and leaves it as {returned!r}, {expected!r} expected for both. "
            "Look for a reshape or a mean that takes the batch for a constant."
        )


def _batch(value: onnx.ValueInfoProto) -> str | int | None:
    axes = value.type.tensor_type.shape.dim
    return (axes[0].dim_param or axes[0].dim_value) if axes else None


def _drop_metadata(proto: onnx.ModelProto) -> None:
    """Remove notes and doc strings in place, except from which module each node came."""
    for noted in (proto, *proto.functions):
        noted.doc_string = ""
        del noted.metadata_props[:]
    for function in proto.functions:
        _drop_from_nodes(function.node)
    _drop_from_graph(proto.graph)


def _drop_from_graph(graph: onnx.GraphProto) -> None:
    for noted in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        noted.doc_string = ""
        del noted.metadata_props[:]
    _drop_from_nodes(graph.node)


def _drop_from_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        kept = [prop for prop in node.metadata_props if prop.key in KEPT_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
        for attribute in node.attribute:
            attribute.doc_string = ""
            # Reading `g` of an attribute that has none is harmless; writing to it would give it one.
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _drop_from_graph(graph)


def _checked_bytes(proto: onnx.ModelProto) -> bytes:
    """The file's content. Raises: ExportFailed when it is no valid ONNX of the version we promise."""
    import onnx

    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset != OPSET:
        raise ExportFailed(f"the exporter wrote opset {opset}, {OPSET} expected. Use torch 2.11 or newer.")
    data = proto.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportFailed(f"the exported network is no valid ONNX: {_first_line(err)}.") from err
    return data


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside the block, and afterwards each in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _silent_failure() -> Iterator[None]:
    """What the block prints is held back, and dropped if it fails: torch.export prints whole graphs, then raises."""
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        yield
    sys.stdout.write(printed.getvalue())
    sys.stderr.write(complained.getvalue())


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _first_cause(err: BaseException) -> str:
    while err.__cause__ is not None:
        err = err.__cause__
    return _first_line(err)


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(err).__name__

"""A plan from an ONNX file, by TensorRT 10, 11 or TensorRT-RTX: where they differ, the API is asked what it has.

Networks are strongly typed: every number type is the one that the ONNX file has. Nothing here needs a GPU by itself;
standard TensorRT does, because it times its kernels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import BuildFailed, IntegrityError
from .layers import LayerMap
from .onnx_graph import OnnxGraph, read_graph
from .shapes import Profile, profiles_for
from .target import BuildOptions
from .trt_caches import CacheFile
from .trt_log import Log, construct, release
from .trt_stop import stoppable_build

MIB = 1 << 20
# Operators of this version of ONNX are the newest there are as this is written; TensorRT does not look at the number.
NEWEST_OPSET = 28
HOST_CODE = (
    "the engine is version compatible: it carries host code, which every machine that loads it executes. "
    "Load it only where you trust who built it."
)
COMPATIBILITY_LEVELS = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


class Plan(NamedTuple):
    """A serialised engine, as the buffer that TensorRT gives, and the flags it was built with."""

    data: Any
    flags: dict[str, Any]


def build_plan(
    trt: Any,
    onnx_path: Path,
    options: BuildOptions,
    *,
    capabilities: Sequence[str] = (),
    timing_cache: CacheFile | None = None,
) -> Plan:
    """The engine that `trt` builds from an ONNX file, serialised, with the flags that describe it.

    capabilities: GPUs to build for, by name, where it builds ahead of time. timing_cache: kernel timings to begin with
    and to add to.
    Cost: standard TensorRT times kernels for seconds to minutes; TensorRT-RTX takes about a second.
    Raises: BuildFailed with what TensorRT logged and the ways out, or naming the option that its API does not have;
    ValueError for shapes that do not fit the network.
    """
    graph = _readable_graph(trt, onnx_path)
    log = Log(trt)
    builder = construct(lambda: trt.Builder(log.logger), log, what=f"{onnx_path}: {release(trt)} makes no builder")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, log, onnx_path, graph)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_options(trt, config, options, onnx_path)
    _set_capabilities(trt, config, capabilities, onnx_path)
    profiles = _add_profiles(builder, network, config, options, onnx_path)
    used = _use_timings(config, timing_cache)
    with stoppable_build(trt, config):
        data = builder.build_serialized_network(network, config)
    if data is None:
        ways_out = "Leave these options out, or take" if options.chosen() else "Take"
        raise BuildFailed(
            f"{onnx_path}: {release(trt)} built no engine{_with_options(options)}: {log.text()}. "
            f"{ways_out} another precision or target."
        )
    flags: dict[str, Any] = {
        "strongly_typed": True,
        "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
        "profiles": [{name: [list(shape) for shape in reach] for name, reach in each.items()} for each in profiles],
        "warnings": [*([HOST_CODE] if options.version_compatible else []), *log.warnings()],
    }
    if timing_cache is not None:
        flags["timing_cache"] = _keep_timings(config, timing_cache, used)
    if options.strip:
        flags["weights"] = {"file": onnx_path.name, "sha256": hashlib.sha256(onnx_path.read_bytes()).hexdigest()}
    return Plan(data, flags)


def _readable_graph(trt: Any, onnx_path: Path) -> OnnxGraph:
    """The graph of the file. TensorRT's parser is asked afterwards: it takes any bytes for an empty network.

    Raises: BuildFailed when the file is no ONNX file, is cut off, or needs a version of ONNX that there is not yet.
    """
    try:
        graph = read_graph(onnx_path)
    except IntegrityError as err:
        raise BuildFailed(
            f"{onnx_path}: {release(trt)} cannot read it: it is no whole ONNX file ({err.__cause__}). Export it again."
        ) from err
    if graph.opset > NEWEST_OPSET:
        raise BuildFailed(
            f"{onnx_path}: {release(trt)} cannot read it: it is written in opset {graph.opset}, and {NEWEST_OPSET} is "
            "the newest that is known. Export it with an older opset."
        )
    return graph


def _parse(trt: Any, network: Any, log: Log, onnx_path: Path, graph: OnnxGraph) -> None:
    """Fill `network` from an ONNX file.

    Raises: BuildFailed with every error of the parser, the node that it names, and the ways out.
    """
    parser = trt.OnnxParser(network, log.logger)
    # The path lets the parser find weights that lie beside the file.
    if parser.parse(onnx_path.read_bytes(), str(onnx_path)):
        return
    layer_map = LayerMap(graph)
    layers = {node.name: layer_map.layer(node) for node in graph.nodes if node.name}
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = dict.fromkeys(_parser_error(error, graph, layers) for error in errors)
    raise BuildFailed(
        f"{onnx_path}: {release(trt)} cannot read it: {'; '.join(found) or log.text()}. "
        "Replace what it names in the network, or take another precision or target."
    )


def _parser_error(error: Any, graph: OnnxGraph, layers: dict[str, str]) -> str:
    """What the parser says of a node, with the node's name, operator and torch layer, as far as they are known."""
    text = " ".join(error.desc().split()).rstrip(".")
    if text == "false":  # all that an assertion says whose condition is just that
        text = error.code().name.lower().replace("_", " ")
    name, operator, index = error.node_name(), error.node_operator(), error.node()
    if not operator:
        return text
    if not name and 0 <= index < len(graph.nodes):
        name = graph.nodes[index].name or (graph.nodes[index].outputs or ("",))[0]
    layer = layers.get(name, name)
    return f"node '{name}' ({operator}{f', layer {layer}' if layer != name else ''}): {text}"


def _set_options(trt: Any, config: Any, options: BuildOptions, onnx_path: Path) -> None:
    """Tell the builder what was asked for. Raises: BuildFailed for an option that this TensorRT does not have."""
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip,
        "REFIT_IDENTICAL": options.strip and not options.refit,  # the weights that it is loaded with are its own
    }
    for name, asked in flags.items():
        if asked:
            config.set_flag(_member(trt, "BuilderFlag", name, onnx_path))
    if options.hardware_compatibility != "none":
        level = COMPATIBILITY_LEVELS[options.hardware_compatibility]
        config.hardware_compatibility_level = _member(trt, "HardwareCompatibilityLevel", level, onnx_path)


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[str], onnx_path: Path) -> None:
    """Tell the builder which GPUs the engine is for. Raises: BuildFailed when it does not know one."""
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        member = _member(trt, "ComputeCapability", name.upper(), onnx_path)
        if not config.set_compute_capability(member, index):
            raise BuildFailed(f"{onnx_path}: {release(trt)} cannot build for {name}. Leave it out of the target.")


def _member(trt: Any, kind: str, name: str, onnx_path: Path) -> Any:
    """A member of one of TensorRT's enumerations. Raises: BuildFailed where this version does not have it."""
    member = getattr(getattr(trt, kind, None), name, None)
    if member is None:
        raise BuildFailed(
            f"{onnx_path}: {release(trt)} has no {kind}.{name}. Leave the option out, or use a newer one."
        )
    return member


def _add_profiles(builder: Any, network: Any, config: Any, options: BuildOptions, onnx_path: Path) -> list[Profile]:
    """The optimization profiles of the network's free shapes, after telling `config`.

    Raises: ValueError for shapes that do not fit the network; BuildFailed when TensorRT takes a profile for wrong.
    """
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    profiles = profiles_for(options.shapes, {tensor.name: tuple(tensor.shape) for tensor in tensors})
    for each in profiles:
        profile = builder.create_optimization_profile()
        for name, reach in each.items():
            profile.set_shape(name, *reach)
        if config.add_optimization_profile(profile) < 0:
            raise BuildFailed(f"{onnx_path}: TensorRT does not take the shapes {', '.join(map(str, each.values()))}.")
    return profiles


def _use_timings(config: Any, file: CacheFile | None) -> str:
    """`used` once the builder has taken the timings that are kept, `new` where there are none that it takes."""
    if file is None:
        return ""
    kept = file.read()
    cache = config.create_timing_cache(kept) if kept else None
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return "used"
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return "new"


def _keep_timings(config: Any, file: CacheFile, used: str) -> str:
    """Keep what the builder has timed; the sidecar's word for how the cache was used."""
    cache = config.get_timing_cache()
    timings = cache.serialize() if cache is not None else None
    reason = file.write(bytes(timings)) if timings is not None else "the builder gave none back"
    return used if reason is None else f"{used}, not kept ({reason})"


def _with_options(options: BuildOptions) -> str:
    """The options that are not the default ones, for an error that they may have caused."""
    chosen = options.chosen()
    return f" (with {', '.join(f'{name}={json.dumps(value)}' for name, value in chosen.items())})" if chosen else ""

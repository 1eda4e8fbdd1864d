"""Every name that is asked of TensorRT exists in its bindings: of TensorRT-RTX here, and of 10.3, 10.16 and 11.4.

`tensorrt_names.json` holds the public names that the wheels of the standard package have, as their bindings gave them.
"""

import ast
import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chip_deploy.export import target_trt, trt_build, trt_log, trt_session, trt_stop
from chip_deploy.export.target_trt import load_cudart

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
needs_rtx = pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx is not installed (it has wheels for x86-64 only)")

Names = dict[str, set[str]]

# Module -> expression in its source -> the class of the bindings that it is; "module" is the package itself.
KINDS: dict[ModuleType, dict[str, str]] = {
    target_trt: {"trt": "module"},
    trt_log: {"trt": "module", "base.Severity": "ILogger", "trt.IProfiler": "IProfiler"},
    trt_build: {
        "trt": "module",
        "trt.BuilderFlag": "BuilderFlag",
        "trt.MemoryPoolType": "MemoryPoolType",
        "trt.NetworkDefinitionCreationFlag": "NetworkDefinitionCreationFlag",
        "trt.ProfilingVerbosity": "ProfilingVerbosity",
        "builder": "Builder",
        "cache": "ITimingCache",
        "config": "IBuilderConfig",
        "error": "ParserError",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "profile": "IOptimizationProfile",
        "tensor": "ITensor",
    },
    trt_stop: {"trt": "module", "trt.IProgressMonitor": "IProgressMonitor"},
    trt_session: {
        "trt": "module",
        "self._trt": "module",
        "trt.LayerInformationFormat": "LayerInformationFormat",
        "trt.TensorIOMode": "TensorIOMode",
        "self._trt.LayerInformationFormat": "LayerInformationFormat",
        "config": "IRuntimeConfig",
        "context": "IExecutionContext",
        "engine": "ICudaEngine",
        "inspector": "EngineInspector",
        "parser": "OnnxParserRefitter",
        "refitter": "Refitter",
        "runtime": "Runtime",
        "self._context": "IExecutionContext",
        "self._engine": "ICudaEngine",
    },
}
# What only TensorRT-RTX has, or only later releases; each is asked for with hasattr first, or behind one that was.
GUARDED = {
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.create_runtime_config",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "module.DynamicShapesKernelSpecializationStrategy",
}


def recorded_names() -> dict[str, Names]:
    """Version of the standard package -> class -> its public names."""
    found = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
    return {version: {kind: set(names.split()) for kind, names in kinds.items()} for version, kinds in found.items()}


def names_used(source: str, kinds: dict[str, str]) -> Names:
    """Class of the bindings -> the attributes that `source` asks of expressions of that class."""
    used: Names = {kind: set() for kind in kinds.values()}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (kind := kinds.get(ast.unparse(node.value))) and node.attr != "__init__":
            used[kind].add(node.attr)
    return used


def all_names_used() -> Names:
    used: Names = {}
    for module, kinds in KINDS.items():
        for kind, names in names_used(inspect.getsource(module), kinds).items():
            used.setdefault(kind, set()).update(names)
    return used


def missing(used: Names, there: Names) -> set[str]:
    return {f"{kind}.{name}" for kind, names in used.items() for name in names - there.get(kind, set())}


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_standard_tensorrt_has_every_name_that_is_not_guarded(version: str) -> None:
    assert missing(all_names_used(), recorded_names()[version]) <= GUARDED


def test_every_guard_is_needed_by_some_version() -> None:
    used = all_names_used()
    assert set.union(*(missing(used, there) for there in recorded_names().values())) == GUARDED


def test_every_expression_of_the_tables_occurs_in_the_source() -> None:
    for module, kinds in KINDS.items():
        found = {ast.unparse(node) for node in ast.walk(ast.parse(inspect.getsource(module)))}
        assert [expression for expression in kinds if expression not in found] == []


@needs_rtx
def test_tensorrt_rtx_has_every_name() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    there = {kind: set(dir(trt if kind == "module" else getattr(trt, kind))) for kind in all_names_used()}
    assert missing(all_names_used(), there) == set()


def test_a_name_that_does_not_exist_would_be_found() -> None:
    used = names_used("self._context.execute_async_v4(stream)", KINDS[trt_session])
    assert missing(used, recorded_names()["10.3.0"]) == {"IExecutionContext.execute_async_v4"}


@pytest.mark.parametrize(
    ("kind", "names", "lacking"),
    [
        ("BuilderFlag", ("VERSION_COMPATIBLE", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"), {}),
        ("HardwareCompatibilityLevel", ("AMPERE_PLUS",), {}),
        ("HardwareCompatibilityLevel", ("SAME_COMPUTE_CAPABILITY",), {"10.3.0"}),
    ],
)
def test_options_are_members_of_the_enumerations_they_are_looked_up_in(
    kind: str, names: tuple[str, ...], lacking: Any
) -> None:
    for version, there in recorded_names().items():
        assert all(name in there[kind] for name in names) is (version not in lacking)


@needs_rtx
def test_every_cuda_call_exists_in_cuda_python() -> None:
    cudart = load_cudart()
    calls = [
        node.args[0].value
        for node in ast.walk(ast.parse(inspect.getsource(trt_session)))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("self._cuda", "self._tried")
        and isinstance(node.args[0], ast.Constant)
    ]
    assert len(calls) >= 15
    assert [name for name in calls if not hasattr(cudart, str(name))] == []
    assert hasattr(cudart.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    copies = ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice")
    assert all(hasattr(cudart.cudaMemcpyKind, name) for name in copies)
    assert hasattr(cudart, "cudaStreamNonBlocking")
    assert hasattr(cudart, "cudaGetLastError")

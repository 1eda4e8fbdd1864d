"""onnxruntime on the CPU: the saved engine is the optimised graph, and only for the CPU that optimised it."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.transformers import float16
from torch import nn

from chip_deploy.export import ort_session, target_ort
from chip_deploy.export.errors import BuildFailed, MachineMismatch, MeasureFailed
from chip_deploy.export.layers import LayerMap
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import OnnxGraph, OnnxNode
from chip_deploy.export.ort_session import OrtSession, foreign_errors
from chip_deploy.export.target import Engine, cpu_isa, engine_path, parse_target, width_step
from chip_deploy.export.target_ort import OrtCpuTarget

SPEC = parse_target("ort-cpu")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10)).eval()


@pytest.fixture(scope="module")
def onnx_path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(1, 3, 32, 32), path)
    return path


@pytest.fixture(scope="module")
def built(onnx_path: Path) -> tuple[Path, Engine]:
    path = engine_path(onnx_path.parent, SPEC, "fp32")
    return path, OrtCpuTarget(SPEC).build(onnx_path, path)


@pytest.fixture
def session(built: tuple[Path, Engine]) -> Iterator[OrtSession]:
    session = OrtCpuTarget(SPEC).open(built[0])
    assert isinstance(session, OrtSession)
    yield session
    session.close()


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 3, 32, 32), dtype=np.float32)


def test_the_engine_computes_what_torch_computes(net: nn.Module, session: OrtSession) -> None:
    with torch.no_grad():
        expected = net(torch.from_numpy(image())).numpy()
    # Float32 sums in another order: a few units in the last place (6e-8), with room for other instruction sets.
    np.testing.assert_allclose(session.run({"input": image()})["output"], expected, atol=1e-5 * np.abs(expected).max())


def test_the_engine_gives_the_bits_of_the_file_it_was_built_from(onnx_path: Path, session: OrtSession) -> None:
    plain = onnxruntime.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    expected = np.asarray(plain.run(None, {"input": image()})[0])
    assert np.array_equal(session.run({"input": image()})["output"], expected)


def test_the_dense_control_runs_under_the_settings_of_the_engines(onnx_path: Path) -> None:
    target = OrtCpuTarget(SPEC, threads=2)
    control = target.open_onnx(onnx_path)
    assert isinstance(control, OrtSession)
    options = control._open_session().get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert control._open_session().get_providers() == ["CPUExecutionProvider"]


def test_the_saved_graph_is_not_optimised_a_second_time(session: OrtSession) -> None:
    options = session._open_session().get_session_options()
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


@pytest.mark.skipif("avx" not in cpu_isa(), reason="onnxruntime lays channels out in blocks where there is AVX")
def test_the_engine_holds_convolutions_laid_out_for_this_cpu(built: tuple[Path, Engine]) -> None:
    nodes = {(node.domain, node.op_type) for node in onnx.load(built[0]).graph.node}
    assert ("com.microsoft.nchwc", "Conv") in nodes


@pytest.mark.skipif("avx" not in cpu_isa(), reason="onnxruntime lays channels out in blocks where there is AVX")
def test_the_width_step_is_the_block_to_which_onnxruntime_pads_channels(built: tuple[Path, Engine]) -> None:
    # 24 and 40 output channels become 32 and 48 in blocks of 16; in blocks of 8 they stay.
    filters = [tensor.dims[0] for tensor in onnx.load(built[0]).graph.initializer if len(tensor.dims) == 4]
    step = width_step(SPEC, "fp32")
    assert sorted(filters) == [-(-24 // step) * step, -(-40 // step) * step]


def test_two_builds_give_the_same_bytes(onnx_path: Path, built: tuple[Path, Engine], tmp_path: Path) -> None:
    again = OrtCpuTarget(SPEC).build(onnx_path, engine_path(tmp_path, SPEC, "fp32"))
    assert again.sha256 == built[1].sha256


def test_the_sidecar_names_cpu_version_and_threads(onnx_path: Path, tmp_path: Path) -> None:
    engine = OrtCpuTarget(SPEC, threads=2).build(onnx_path, engine_path(tmp_path, SPEC, "fp32"))
    assert engine.built_for["isa"].split() == list(cpu_isa())
    assert engine.versions["onnxruntime"] == onnxruntime.__version__
    assert engine.flags["threads"] == 2


def test_float32_runs_in_float32(built: tuple[Path, Engine]) -> None:
    types = built[1].layer_types
    assert types is not None
    assert (types.source, types.multiplying, types.other_type, types.unfused) == ("engine", {"fp32": 3}, [], [])


@pytest.mark.skipif("avx" not in cpu_isa(), reason="onnxruntime lays channels out in blocks where there is AVX")
def test_the_way_back_from_the_blocked_layout_is_a_layer_that_only_reformats(built: tuple[Path, Engine]) -> None:
    nodes = [node.op_type for node in onnx.load(built[0]).graph.node]
    assert built[1].layer_types is not None
    assert built[1].layer_types.reformats == nodes.count("ReorderOutput") + nodes.count("ReorderInput") > 0


def test_float16_on_a_cpu_is_told_to_run_in_float32(onnx_path: Path, tmp_path: Path) -> None:
    half = float16.convert_float_to_float16(onnx.load(onnx_path), keep_io_types=True)
    onnx.save(half, tmp_path / "model.fp16.onnx")
    path = engine_path(tmp_path, SPEC, "fp16")
    engine = OrtCpuTarget(SPEC).build(tmp_path / "model.fp16.onnx", path, precision="fp16")
    assert onnx.TensorProto.FLOAT16 not in {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert engine.layer_types is not None
    assert engine.layer_types.multiplying == {"fp32": 3}
    assert engine.layer_types.other_type == ["0", "3", "7"]
    assert engine.layer_types.sentence.startswith("Asked for fp16, but all 3 multiplying layers run in fp32.")


def test_quantised_layers_are_told_apart_from_those_that_stayed_in_float() -> None:
    nodes = [
        OnnxNode("a_quant", "QuantizeLinear", ("input", "s", "z"), ("a",), ()),
        OnnxNode("conv1", "QLinearConv", ("a", "s", "z", "w1", "s", "z", "s", "z"), ("b",), ()),
        OnnxNode("b_dequant", "DequantizeLinear", ("b", "s", "z"), ("c",), ()),
        OnnxNode("conv2", "FusedConv", ("c", "w2"), ("d",), ()),
        OnnxNode("order", "ReorderOutput", ("d",), ("e",), ()),
        OnnxNode("fc", "Gemm", ("e", "w3"), ("output",), ()),
    ]
    types = {"input": "fp32", "a": "int8", "b": "int8", "c": "fp32", "d": "fp32", "e": "fp32"}
    known = LayerMap(OnnxGraph())
    found = target_ort.optimised_types(OnnxGraph(nodes=nodes, types=types), known, "int8")
    assert found.multiplying == {"fp32": 2, "int8": 1}
    assert (found.other_type, found.unfused, found.reformats) == (["conv2", "fc"], ["a_quant", "b_dequant"], 1)
    assert found.sentence.startswith("Asked for int8, but of 3 multiplying layers 2 run in fp32: conv2, fc.")


def test_an_engine_for_another_instruction_set_is_refused_with_both_named(built: tuple[Path, Engine]) -> None:
    other = built[1].model_copy(update={"built_for": {**built[1].built_for, "isa": "avx avx1024"}})
    reason = OrtCpuTarget(SPEC).cannot_run(other)
    assert reason == f"it was optimised for isa 'avx avx1024', and this machine has '{' '.join(cpu_isa())}'"


def test_an_engine_of_another_onnxruntime_is_refused_with_both_named(built: tuple[Path, Engine]) -> None:
    other = built[1].model_copy(update={"versions": {"onnxruntime": "1.0.0"}})
    reason = OrtCpuTarget(SPEC).cannot_run(other)
    assert reason == f"it was optimised by onnxruntime 1.0.0, and this one is {onnxruntime.__version__}"


def test_an_engine_that_cannot_run_here_is_not_opened(onnx_path: Path, tmp_path: Path) -> None:
    path = engine_path(tmp_path, SPEC, "fp32")
    OrtCpuTarget(SPEC).build(onnx_path, path)
    sidecar = path.with_suffix(".json")
    sidecar.write_text(
        sidecar.read_text().replace(f'"onnxruntime": "{onnxruntime.__version__}"', '"onnxruntime": "1.0"')
    )
    with pytest.raises(MachineMismatch, match=r"cannot run here: it was optimised by onnxruntime 1\.0, and this one"):
        OrtCpuTarget(SPEC).open(path)


def test_bound_inputs_are_copies(session: OrtSession) -> None:
    array = image()
    session.bind({"input": array})
    expected = session.outputs()["output"]
    array[:] = 0
    session.lap()
    assert np.array_equal(session.outputs()["output"], expected)


def test_a_lap_computes_the_outputs_anew(session: OrtSession) -> None:
    session.bind({"input": image()})
    expected = session.outputs()["output"]
    held = session._bound().get_outputs()[0]
    held.update_inplace(np.zeros((1, 10), dtype=np.float32))
    assert not session.outputs()["output"].any()
    session.lap()
    assert np.array_equal(session.outputs()["output"], expected)


def test_other_inputs_give_other_outputs_after_binding_again(session: OrtSession) -> None:
    first = session.run({"input": image(0)})["output"]
    second = session.run({"input": image(1)})["output"]
    assert not np.array_equal(first, second)
    assert np.array_equal(session.run({"input": image(0)})["output"], first)


def test_outputs_survive_the_next_run(session: OrtSession) -> None:
    first = session.run({"input": image(0)})["output"]
    kept = first.copy()
    session.run({"input": image(1)})
    assert np.array_equal(first, kept)


def test_a_free_batch_runs_with_any_number_of_images(net: nn.Module, tmp_path: Path) -> None:
    export_onnx(net, torch.zeros(2, 3, 32, 32), tmp_path / "model.onnx", dynamic_batch=True)
    path = engine_path(tmp_path, SPEC, "fp32")
    OrtCpuTarget(SPEC).build(tmp_path / "model.onnx", path)
    session = OrtCpuTarget(SPEC).open(path)
    assert session.input_shapes == {"input": (-1, 3, 32, 32)}
    batch = np.concatenate([image(0), image(1), image(2)])
    together = session.run({"input": batch})["output"]
    alone = [session.run({"input": batch[k : k + 1]})["output"] for k in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)


def test_a_profiled_session_computes_the_same_and_times_every_node(session: OrtSession) -> None:
    expected = session.run({"input": image()})["output"]
    profiled = session.profiled()
    assert np.array_equal(profiled.run({"input": image()})["output"], expected)
    for _ in range(5):
        profiled.lap()
    nodes = profiled.node_laps(4)
    graph = onnx.load(session._name).graph
    assert [node.name for node in nodes] == [node.name for node in graph.node]
    assert all(len(node.laps_ms) == 4 for node in nodes)
    assert sum(sum(node.laps_ms) for node in nodes) > 0


def test_a_profiled_lap_is_what_onnxruntime_itself_wrote_down(
    session: OrtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[dict]] = []
    read = ort_session.json.loads
    monkeypatch.setattr(ort_session.json, "loads", lambda text: written.append(read(text)) or written[-1])
    profiled = session.profiled()
    profiled.bind({"input": image()})
    for _ in range(3):
        profiled.lap()
    nodes = profiled.node_laps(3)
    runs = sorted(event["ts"] for event in written[0] if event["name"] == "model_run")
    kernels = [
        event["dur"] for event in written[0] if event["name"].endswith("_kernel_time") and event["ts"] >= runs[-3]
    ]
    assert sum(sum(node.laps_ms) for node in nodes) == pytest.approx(sum(kernels) / 1e3)


def test_the_measured_session_is_not_profiled(session: OrtSession) -> None:
    session.profiled().close()
    assert session._open_session().get_session_options().enable_profiling is False


@pytest.mark.parametrize("ending", ["closed", "read", "closed unused"])
def test_a_profile_leaves_no_file_behind(session: OrtSession, tmp_path: Path, ending: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_session.tempfile, "tempdir", str(tmp_path))
        profiled = session.profiled()
        assert list(tmp_path.iterdir()) != []
        if ending != "closed unused":
            profiled.run({"input": image()})
        if ending == "read":
            profiled.node_laps(1)
        profiled.close()
        profiled.close()
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_read_is_one_sentence(session: OrtSession, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_session.tempfile, "tempdir", str(tmp_path))
        profiled = session.profiled()
    profiled.run({"input": image()})
    path = Path(profiled._open_session().end_profiling())
    path.write_bytes(path.read_bytes()[:100])
    profiled._session = type("Ended", (), {"end_profiling": lambda self: str(path)})()
    with pytest.raises(
        MeasureFailed, match=r"wrote no profile that can be read \(.+\)\. Look for free space in"
    ) as caught:
        profiled.node_laps(1)
    assert "\n" not in str(caught.value)
    profiled.close()


def test_a_profile_is_silent(session: OrtSession, capfd: pytest.CaptureFixture[str]) -> None:
    profiled = session.profiled()
    profiled.run({"input": image()})
    profiled.node_laps(1)
    assert capfd.readouterr() == ("", "")


def test_a_profiled_session_is_not_profiled_again(session: OrtSession) -> None:
    profiled = session.profiled()
    with pytest.raises(MeasureFailed, match="is profiled already"):
        profiled.profiled()
    profiled.close()


def test_a_lap_before_binding_is_refused(session: OrtSession) -> None:
    with pytest.raises(MeasureFailed, match=r"no inputs are bound\. Call bind first"):
        session.lap()


def test_a_closed_session_is_refused(session: OrtSession) -> None:
    session.close()
    with pytest.raises(MeasureFailed, match="the session is closed"):
        session.run({"input": image()})


def test_building_and_opening_are_silent(onnx_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = engine_path(tmp_path, SPEC, "fp32")
    OrtCpuTarget(SPEC).build(onnx_path, path)
    OrtCpuTarget(SPEC).open(path).run({"input": image()})
    assert capfd.readouterr() == ("", "")


def test_onnxruntime_alone_would_have_warned(
    onnx_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    onnxruntime.InferenceSession(str(onnx_path), options, providers=["CPUExecutionProvider"])
    assert "hardware specific" in capfd.readouterr().err


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_a_mistake(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads: {threads} given, at least 1 expected"):
        OrtCpuTarget(SPEC, threads=threads)


def test_a_node_that_onnxruntime_does_not_know_is_named(tmp_path: Path) -> None:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in ("input", "output")]
    node = onnx.helper.make_node("Foo", ["input"], ["output"], name="strange")
    graph = onnx.helper.make_graph([node], "graph", values[:1], values[1:])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(BuildFailed, match=r"onnxruntime .* cannot open it: .*strange.*Foo"):
        OrtCpuTarget(SPEC).build(tmp_path / "model.onnx", engine_path(tmp_path, SPEC, "fp32"))


def test_a_saved_graph_that_computes_something_else_is_no_engine(onnx_path: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export_onnx(other, torch.zeros(1, 3, 32, 32), tmp_path / "other.onnx")
    target = OrtCpuTarget(SPEC)
    one, two = target.open_onnx(onnx_path), target.open_onnx(tmp_path / "other.onnx")
    assert isinstance(one, OrtSession)
    assert isinstance(two, OrtSession)
    with pytest.raises(BuildFailed, match=r"model\.onnx: output 'output' changes when the graph"):
        target_ort._require_same_outputs(one, two, onnx_path)


def test_every_exception_of_onnxruntime_is_mapped() -> None:
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented"):
        assert issubclass(getattr(state, name), foreign_errors())


def test_ordinary_mistakes_in_our_code_are_not_taken_for_onnxruntime_errors() -> None:
    assert not any(issubclass(kind, foreign_errors()) for kind in (KeyError, TypeError, AttributeError, OSError))

"""Why (not) faster: real profiles of onnxruntime mapped to torch layers, and hand-made ones with known reasons."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from chip_deploy.export import node_times
from chip_deploy.export.errors import IntegrityError, MeasureFailed
from chip_deploy.export.layers import LayerMap, LayerWork
from chip_deploy.export.node_times import Profile, ProfiledNode, profile_in_turns, profile_of
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import read_graph
from chip_deploy.export.ort_session import read_trace
from chip_deploy.export.profile import LayerComparison, LayerTime, compare_layers
from chip_deploy.export.target import NodeLaps, cpu_isa, parse_target, width_step
from chip_deploy.export.target_ort import OrtCpuTarget
from chip_deploy.pipeline.models import build_model

SPEC = parse_target("ort-cpu")
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (models.resnet18, 64),
    "resnet56": (lambda: build_model("resnet56", num_classes=10, seed=0).module, 32),
    "mobilenet_v2": (models.mobilenet_v2, 64),
}


def small_net(width: int) -> nn.Module:
    """Two convolutions with a residual sum between them, of this width, and a head."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, width, 3, padding=1)
            self.norm = nn.BatchNorm2d(width)
            self.body = nn.Conv2d(width, width, 3, padding=1)
            self.head = nn.Linear(width, 10)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            maps = torch.relu(self.norm(self.stem(image)))
            return self.head(torch.relu(maps + self.body(maps)).mean((2, 3)))

    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    for name, width in (("dense.onnx", 32), ("model.onnx", 31)):
        export_onnx(small_net(width), torch.zeros(1, 3, 32, 32), folder / name)
    return folder / "dense.onnx", folder / "model.onnx"


@pytest.fixture(scope="module")
def profiles(pair: tuple[Path, Path]) -> tuple[Profile, Profile]:
    target = OrtCpuTarget(SPEC)
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)
    with (
        contextlib.closing(target.open_onnx(pair[0])) as dense,
        contextlib.closing(target.open_onnx(pair[1])) as pruned,
    ):
        return profile_in_turns(dense, pruned, images, dense_onnx=pair[0], pruned_onnx=pair[1], seconds=0.02)


# A real runtime -----------------------------------------------------------------------------------------------------


def test_rows_add_up_to_what_the_runtime_spent_in_nodes(profiles: tuple[Profile, Profile]) -> None:
    rows = compare_layers(*profiles).rows
    for profile, times in zip(
        profiles, ([row.dense_ms for row in rows], [row.pruned_ms or 0.0 for row in rows]), strict=True
    ):
        assert profile.total_ms > 0
        assert sum(times) == pytest.approx(sum(node.ms for node in profile.nodes))


def test_every_layer_of_the_network_has_a_row_of_its_own(profiles: tuple[Profile, Profile]) -> None:
    rows = compare_layers(*profiles).rows
    assert [row.layer for row in rows if row.dense_macs] == ["stem", "body", "head"]
    assert all(row.dense_ms > 0 and row.pruned_ms for row in rows if row.dense_macs)


def test_a_profile_says_on_what_and_how_often_it_was_made(profiles: tuple[Profile, Profile]) -> None:
    version = onnxruntime.__version__
    comparison = compare_layers(*profiles)
    assert profiles[0].laps == profiles[1].laps >= 6
    assert comparison.profiled_on == f"onnxruntime {version}, 1 thread, batch 1, median of {profiles[0].laps} laps"


@pytest.mark.skipif("avx" not in cpu_isa(), reason="onnxruntime lays channels out in blocks where there is AVX")
def test_a_width_that_leaves_the_blocked_layout_is_seen_in_the_operators(profiles: tuple[Profile, Profile]) -> None:
    body = next(row for row in compare_layers(*profiles).rows if row.layer == "body")
    assert body.operators[0] == "Conv (blocked)"
    assert "Conv (blocked)" not in body.operators[1:]
    assert len(body.operators) > 1


def test_the_sessions_that_are_profiled_are_left_as_they_were(pair: tuple[Path, Path]) -> None:
    session = OrtCpuTarget(SPEC).open_onnx(pair[0])
    images = np.ones((1, 3, 32, 32), np.float32)
    before = session.run({"input": images})["output"]
    profile_in_turns(session, session, images, dense_onnx=pair[0], pruned_onnx=pair[0], seconds=0.01)
    session.lap()
    assert np.array_equal(session.run({"input": images})["output"], before)
    session.close()


def test_an_unreadable_onnx_file_is_refused_before_anything_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    session = OrtCpuTarget(SPEC).open_onnx(pair[0])
    images = np.ones((1, 3, 32, 32), np.float32)
    with pytest.raises(IntegrityError, match="no ONNX file"):
        profile_in_turns(session, session, images, dense_onnx=pair[0], pruned_onnx=tmp_path / "model.onnx")
    session.close()


def trace_of(path: Path, folder: Path, *, laps: int) -> list[dict]:
    """What onnxruntime itself writes about so many runs."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "trace")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    node = session.get_inputs()[0]
    for _ in range(laps):
        session.run(None, {node.name: np.zeros(node.shape, np.float32)})
    return json.loads(Path(session.end_profiling()).read_text())


@pytest.fixture(scope="module", params=list(NETS))
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, int, Path, list[dict]]:
    make, size = NETS[request.param]
    torch.manual_seed(0)
    net = make().eval()
    folder = tmp_path_factory.mktemp("traced")
    export_onnx(net, torch.zeros(1, 3, size, size), folder / "model.onnx")
    return net, size, folder / "model.onnx", trace_of(folder / "model.onnx", folder, laps=3)


def test_each_convolution_that_ran_is_mapped_to_the_layer_with_its_weight(
    traced: tuple[nn.Module, int, Path, list[dict]],
) -> None:
    """onnxruntime notes the shape of the weight it used, padded to whole blocks; torch knows the layer's own."""
    net, _, path, events = traced
    step = width_step(SPEC, "fp32")
    modules = dict(net.named_modules())
    executed = read_trace(events, laps=1)
    used = {
        event["name"].removesuffix("_kernel_time"): next(iter(event["args"]["input_type_shape"][1].values()))
        for event in events
        if event["cat"] == "Node" and "Conv" in event["args"]["op_name"]
    }
    seen = []
    for node, layers in zip(executed, LayerMap(read_graph(path)).layers(executed), strict=True):
        if node.name not in used:
            continue
        (layer,) = layers
        weight = modules[layer].weight.shape
        for ran, own in zip(used[node.name], weight, strict=True):
            assert ran in (own, -(-own // step) * step), (node.name, layer)
        seen.append(layer)
    assert sorted(seen) == sorted(name for name, module in modules.items() if isinstance(module, nn.Conv2d))


def test_convolutions_in_a_row_are_mapped_in_the_order_in_which_torch_runs_them(
    traced: tuple[nn.Module, int, Path, list[dict]],
) -> None:
    """A shortcut's convolution may run before or after its block; all others have one order."""
    net, size, path, events = traced
    ran_in_torch: list[str] = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran_in_torch.append(name))
    with torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    mapped = LayerMap(read_graph(path))
    claims = [layers[0] for layers in mapped.layers(read_trace(events, laps=1)) if layers]
    in_a_row = [layer for layer in claims if mapped.work[layer].macs and "downsample" not in layer]
    assert in_a_row == [name for name in ran_in_torch if "downsample" not in name]


def test_what_the_runtime_added_is_all_that_no_layer_claims(
    traced: tuple[nn.Module, int, Path, list[dict]],
) -> None:
    _, _, path, events = traced
    executed = read_trace(events, laps=1)
    claims = LayerMap(read_graph(path)).layers(executed)
    unclaimed = {node.operator for node, layers in zip(executed, claims, strict=True) if not layers}
    assert unclaimed <= {"ReorderInput", "ReorderOutput"}


def test_the_layers_of_one_lap_add_up_to_the_kernels_of_the_trace(
    traced: tuple[nn.Module, int, Path, list[dict]],
) -> None:
    _, _, path, events = traced
    profile = profile_of(read_trace(events, laps=1), LayerMap(read_graph(path)), runtime="onnxruntime", batch=1)
    last = max((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    kernels = [event["dur"] for event in events if event["name"].endswith("_kernel_time") and event["ts"] >= last["ts"]]
    rows = compare_layers(profile, profile).rows
    assert sum(row.dense_ms for row in rows) == pytest.approx(sum(kernels) / 1e3)


class Noting:
    """A session that notes in a list shared with another when it runs."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def lap(self) -> None:
        self.notes.append(self.name)


@pytest.mark.parametrize(
    ("lap_seconds", "laps", "turn"), [(1e-6, 60, 6), (0.02, 20, 3), (0.1, 6, 3), (10.0, 6, 3)], ids=str
)
def test_the_sides_take_turns_as_a_b_b_a_and_run_equally_often(lap_seconds: float, laps: int, turn: int) -> None:
    notes: list[str] = []
    sides = [Noting("A", notes), Noting("B", notes)]
    counted = node_times._take_turns(sides, lap_seconds, 0.4)  # pyright: ignore[reportArgumentType]
    turns = ["".join(notes[k : k + turn]) for k in range(0, len(notes), turn)]
    assert notes.count("A") == notes.count("B") == counted
    assert counted <= laps
    assert turns == [side * turn for side in "ABBAABBAABBAABBAABBA"[: len(turns)]]


# Hand-made traces ---------------------------------------------------------------------------------------------------


def event(name: str, start: int, duration: int, category: str = "Node", operator: str = "Conv") -> dict:
    return {"name": name, "ts": start, "dur": duration, "cat": category, "args": {"op_name": operator}}


TRACE = [
    event("session_initialization", 0, 90, "Session"),
    event("a_nchwc_kernel_time", 101, 50),  # the first run is the warm-up
    event("model_run", 100, 60, "Session"),
    event("a_nchwc_kernel_time", 201, 10),
    event("b_fence_before", 212, 1),
    event("b_kernel_time", 212, 4, operator="Relu"),
    event("model_run", 200, 20, "Session"),
    event("a_nchwc_kernel_time", 301, 12),
    event("a_nchwc_kernel_time", 314, 3),
    event("model_run", 300, 20, "Session"),
]


@pytest.mark.parametrize("order", [1, -1], ids=["as written", "backwards"])
def test_a_trace_is_cut_into_its_latest_laps(order: int) -> None:
    assert read_trace(TRACE[::order], laps=2) == [
        NodeLaps("a_nchwc", "Conv (blocked)", "a", [0.010, 0.015]),
        NodeLaps("b", "Relu", "b", [0.004, 0.0]),
    ]


def test_a_trace_with_too_few_laps_is_refused() -> None:
    with pytest.raises(ValueError, match="3 laps instead of 4"):
        read_trace(TRACE, laps=4)


# Hand-made profiles -------------------------------------------------------------------------------------------------


def conv(macs: int, width_in: int, width_out: int, *, moved: int = 1000, depthwise: bool = False) -> LayerWork:
    return LayerWork(macs, moved, 0, width_in, width_out, depthwise)


def profile(
    times: list[tuple[str, str, float]], work: dict[str, LayerWork], *, runtime: str = "onnxruntime"
) -> Profile:
    """`times` are layers (joined by +, none for the runtime's own), operator and ms."""
    nodes = [ProfiledNode(tuple(filter(None, layers.split("+"))), kind, ms) for layers, kind, ms in times]
    return Profile(runtime, 1, 20, nodes, work)


# A machine that starts a node in 0.005 ms, multiplies 1e9 MACs a ms ("fast") and moves 1e6 values a ms ("copy").
FAST, COPY = conv(1_000_000_000, 64, 64), LayerWork(0, 1_000_000, 0, 64, 64, depthwise=False)
MACHINE = [("fast", "Conv", 1.0), ("copy", "Copy", 1.0), ("tiny", "Reshape", 0.005)]
MACHINE_WORK = {"fast": FAST, "copy": COPY, "tiny": LayerWork(0, 64, 0, 64, 64, depthwise=False)}


def judged(
    dense_ms: float,
    pruned_ms: float,
    dense: LayerWork,
    pruned: LayerWork,
    *,
    kinds: tuple[str, str] = ("Conv", "Conv"),
) -> LayerTime:
    """The row of one layer on the machine above."""
    sides = [
        profile([*MACHINE, ("layer", kind, ms)], {**MACHINE_WORK, "layer": work})
        for kind, ms, work in ((kinds[0], dense_ms, dense), (kinds[1], pruned_ms, pruned))
    ]
    return next(row for row in compare_layers(*sides, width_step=16).rows if row.layer == "layer")


def test_a_layer_is_predicted_by_the_macs_that_are_left() -> None:
    row = judged(0.4, 0.1, conv(80_000, 64, 64), conv(20_000, 32, 32))
    assert row.predicted_ms == pytest.approx(0.1)
    assert (row.dense_macs, row.pruned_macs, row.why, row.widths) == (80_000, 20_000, "", "64 -> 32 in, 64 -> 32 out")


def test_a_layer_whose_blocks_stayed_as_many_is_not_faster_for_that_reason() -> None:
    row = judged(0.4, 0.39, conv(64_000_000, 64, 64), conv(50_000_000, 64, 50))
    assert (row.why, row.widths) == ("not faster", "64 in, 64 -> 50 out: the same number of 16-channel blocks")


def test_a_layer_that_lost_a_block_and_no_time_is_blamed_on_the_width_that_is_no_multiple() -> None:
    row = judged(0.4, 0.39, conv(64_000_000, 64, 64), conv(32_000_000, 45, 48))
    assert (row.why, row.widths) == ("not faster", "64 -> 45 in, 64 -> 48 out: 45 is no multiple of 16")


def test_a_layer_that_left_the_blocked_layout_is_named_with_its_input_width() -> None:
    kinds = ("Conv (blocked)", "FusedConv")
    row = judged(0.4, 0.5, conv(64_000_000, 64, 64), conv(32_000_000, 45, 45), kinds=kinds)
    assert (row.why, row.operators) == ("not faster", list(kinds))
    assert row.widths == "64 -> 45 in, 64 -> 45 out: off the blocked layout with 45 input channels"


def test_a_layer_near_the_cheapest_node_is_launch_bound() -> None:
    row = judged(0.012, 0.012, conv(64_000, 64, 64), conv(16_000, 32, 32))
    assert (row.why, row.widths) == ("launch-bound", "64 -> 32 in, 64 -> 32 out")


def test_a_depthwise_layer_that_moves_as_fast_as_the_machine_is_memory_bound() -> None:
    dense = conv(9 * 50_000, 64, 64, moved=100_000, depthwise=True)
    pruned = conv(9 * 40_000, 48, 48, moved=80_000, depthwise=True)
    row = judged(0.1, 0.1, dense, pruned)
    assert (row.why, row.widths) == ("memory-bound", "64 -> 48 channels")


def test_a_layer_that_moves_little_at_a_low_rate_is_not_excused_by_memory() -> None:
    dense = conv(9 * 50_000, 64, 64, moved=10_000, depthwise=True)
    pruned = conv(9 * 40_000, 48, 48, moved=8_000, depthwise=True)
    assert judged(0.1, 0.1, dense, pruned).why == "not faster"


def test_as_many_blocks_as_before_explain_more_than_memory_does() -> None:
    dense = conv(9 * 50_000, 64, 64, moved=100_000, depthwise=True)
    pruned = conv(9 * 40_000, 51, 51, moved=80_000, depthwise=True)
    row = judged(0.1, 0.1, dense, pruned)
    assert (row.why, row.widths) == ("not faster", "64 -> 51 channels: the same number of 16-channel blocks")


def test_a_layer_that_was_hardly_cut_needs_no_excuse() -> None:
    assert judged(0.4, 0.4, conv(64_000_000, 64, 64), conv(63_000_000, 64, 63)).why == ""


def test_a_layer_that_became_slower_though_hardly_cut_is_not_faster() -> None:
    row = judged(0.4, 0.55, conv(64_000_000, 64, 64), conv(63_000_000, 63, 64))
    assert row.why == "not faster"
    assert row.widths == "64 -> 63 in, 64 out: the same number of 16-channel blocks"


@pytest.mark.parametrize(("pruned_ms", "why"), [(0.24, ""), (0.28, "fell behind"), (0.32, "not faster")])
def test_a_layer_that_saved_most_of_what_was_promised_kept_up_and_one_in_between_fell_behind(
    pruned_ms: float, why: str
) -> None:
    assert judged(0.4, pruned_ms, conv(64_000_000, 64, 64), conv(32_000_000, 32, 64)).why == why


def test_nodes_of_the_runtime_have_a_row_of_their_own_at_the_end() -> None:
    work = {"a": conv(100, 4, 4)}
    dense = profile([("a", "Conv", 1.0), ("", "ReorderOutput", 0.1)], work)
    pruned = profile([("", "ReorderInput", 0.2), ("a", "Conv", 1.0), ("", "ReorderOutput", 0.3)], work)
    last = compare_layers(dense, pruned).rows[-1]
    assert (last.layer, last.why, last.predicted_ms) == ("runtime: reorder", "overhead", None)
    assert (last.dense_ms, last.pruned_ms) == (0.1, pytest.approx(0.5))


def test_an_activation_that_is_no_longer_fused_is_overhead() -> None:
    work = {"a": conv(100, 4, 4), "relu": LayerWork(0, 8, 0, 4, 4, depthwise=False)}
    dense, pruned = profile([("a", "Conv", 1.0)], work), profile([("a", "Conv", 1.0), ("relu", "Relu", 0.2)], work)
    row = compare_layers(dense, pruned).rows[-1]
    assert (row.layer, row.dense_ms, row.pruned_ms, row.why) == ("relu", 0.0, 0.2, "overhead")


def test_layers_that_one_network_runs_as_one_share_a_row() -> None:
    work = {name: conv(100, 4, 4) for name in ("a", "b", "c", "d")}
    dense = profile([("a", "Conv", 1.0), ("b", "Conv", 2.0), ("c", "Conv", 3.0), ("d", "Conv", 4.0)], work)
    pruned = profile([("a+b", "fusion", 1.5), ("b+c", "fusion", 0.5), ("d", "Conv", 2.0)], work)
    first, second = compare_layers(dense, pruned).rows
    assert (first.layer, first.dense_ms, first.pruned_ms, first.dense_macs) == ("a ... c (3 layers)", 6.0, 2.0, 300)
    assert (second.layer, second.dense_ms, second.pruned_ms) == ("d", 4.0, 2.0)


def test_a_layer_that_one_network_never_ran_by_itself_has_no_time_there() -> None:
    work = {"a": conv(100, 4, 4), "b": conv(50, 4, 4)}
    dense, pruned = profile([("a", "Conv", 1.0), ("b", "Conv", 0.5)], work), profile([("a", "Conv", 1.0)], work)
    row = compare_layers(dense, pruned).rows[-1]
    assert (row.layer, row.dense_ms, row.pruned_ms, row.why) == ("b", 0.5, None, "")


def test_efficiency_is_the_speed_up_over_the_macs_reduction() -> None:
    dense = profile([("a", "Conv", 1.0)], {"a": conv(100, 4, 4)})
    pruned = profile([("a", "Conv", 0.8)], {"a": conv(50, 2, 4)})
    assert compare_layers(dense, pruned).efficiency == pytest.approx(1.25 / 2)
    measured = compare_layers(dense, pruned, speedup=1.5)
    assert measured.efficiency == pytest.approx(0.75)
    assert measured.sentences[0] == "MACs fell 2.00 times and the speed-up is 1.50: an efficiency of 75%."


def test_the_sentences_say_what_was_promised_what_came_and_where_the_rest_was_lost() -> None:
    work = {f"layer{k}.{n}": conv(10_000_000, 64, 64) for k in (1, 2, 3) for n in (0, 1)}
    cut = {layer: conv(5_000_000, 64, 50 if layer.startswith("layer3") else 32) for layer in work}
    dense = profile([(layer, "Conv", 1.0) for layer in work], work)
    times = dict.fromkeys(work, 0.5) | {"layer3.0": 0.9, "layer3.1": 1.0, "layer2.0": 0.6}
    pruned = profile([*((layer, "Conv", ms) for layer, ms in times.items()), ("", "ReorderInput", 1.0)], cut)
    efficiency, promise, lost, fixed = compare_layers(dense, pruned, width_step=16).sentences
    assert efficiency == "MACs fell 2.00 times and the speed-up of the profiles is 1.20: an efficiency of 60%."
    assert promise == "Layers with MACs were promised to save 3 ms of 6 ms; they saved 2 ms."
    # 0.4 and 0.5 of layer3, 0.1 of layer2 and 1.0 of the runtime.
    assert lost == "50% of the time lost is in runtime: reorder: 1 ms where 0 ms was before (overhead)."
    assert fixed == (
        "Of the pruned time, 1 ms (20%) go to nodes that the runtime added or no longer fuses "
        "(reorder; 0 ms in the dense network)."
    )


def test_the_stage_that_lost_most_is_named_with_its_worst_layer_and_its_widths() -> None:
    work = {f"layer{k}.{n}": conv(10_000_000, 64, 64) for k in (1, 2, 3) for n in (0, 1)}
    cut = {layer: conv(5_000_000, 64, 50) for layer in work}
    dense = profile([(layer, "Conv", 1.0) for layer in work], work)
    times = dict.fromkeys(work, 0.5) | {"layer3.0": 0.9, "layer3.1": 1.0, "layer2.0": 0.6}
    pruned = profile([(layer, "Conv", ms) for layer, ms in times.items()], cut)
    assert compare_layers(dense, pruned, width_step=16).sentences[2] == (
        "90% of the time lost is in layer3.*, the worst in layer3.1: 1 ms where 0.5 ms was promised "
        "(not faster; 64 in, 64 -> 50 out: the same number of 16-channel blocks)."
    )


def test_a_network_that_kept_its_promise_gets_two_sentences() -> None:
    dense = profile([("a", "Conv", 1.0)], {"a": conv(100, 4, 4)})
    pruned = profile([("a", "Conv", 0.5)], {"a": conv(50, 2, 4)})
    assert compare_layers(dense, pruned).sentences[1:] == [
        "Layers with MACs were promised to save 0.5 ms of 1 ms; they saved 0.5 ms."
    ]


def test_a_comparison_survives_json() -> None:
    dense = profile([("a", "Conv", 1.0)], {"a": conv(100, 4, 4)})
    comparison = compare_layers(dense, dense)
    assert LayerComparison.model_validate_json(comparison.model_dump_json()) == comparison


@given(st.data())
def test_rows_add_up_whatever_ran_and_whatever_was_fused(data: st.DataObject) -> None:
    names = ["a", "b.c", "b.d", "e"]
    work = {name: conv(100 * place, 8, 8) for place, name in enumerate(names)}
    layers = st.lists(st.sampled_from(names), max_size=3, unique=True).map("+".join)
    times = st.floats(0, 100, allow_nan=False)
    node = st.tuples(layers, st.sampled_from(["Conv", "ReorderInput", "Add"]), times)
    sides = [profile(data.draw(st.lists(node, max_size=6)), work) for _ in range(2)]
    rows = compare_layers(*sides).rows
    assert sum(row.dense_ms for row in rows) == pytest.approx(sides[0].total_ms)
    assert sum(row.pruned_ms or 0.0 for row in rows) == pytest.approx(sides[1].total_ms)
    assert sum(row.dense_macs for row in rows) == sides[0].macs
    assert len({row.layer for row in rows}) == len(rows)


def test_a_runtime_that_tells_no_times_is_one_sentence(pair: tuple[Path, Path]) -> None:
    session = OrtCpuTarget(SPEC).open_onnx(pair[0]).profiled()
    session.bind({"input": np.ones((1, 3, 32, 32), np.float32)})
    with pytest.raises(MeasureFailed, match=r"wrote no profile that can be read \(1 laps instead of 2\)"):
        session.node_laps(2)
    session.close()

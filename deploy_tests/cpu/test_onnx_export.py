"""Networks become ONNX files: the same function, the same bytes, and no trace of the machine."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from chip_deploy.export import onnx_export
from chip_deploy.export.errors import ExportFailed
from chip_deploy.export.onnx_export import export_onnx

# Float32 sums of the same weights in another order: nine torchvision networks gave at most 1.2e-6 of the largest
# output.
TOLERANCE = 1e-5
EXPORT_ELSEWHERE = """
import sys
import torch
from pathlib import Path
from torch import nn
from chip_deploy.export.onnx_export import export_onnx
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
export_onnx(net, torch.zeros(1, 3, 16, 16), Path(sys.argv[1]))
"""


class Net(nn.Module):
    """A residual net with the odd widths of a pruned one, whose ReLU is used twice."""

    def __init__(self, width: int = 13) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 10)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.relu(self.norm(self.stem(image)))
        maps = self.relu(maps + self.body(maps))
        return self.head(self.drop(maps.mean(dim=(2, 3))))


class Reshaping(nn.Module):
    """A net with the batch of its author written into a reshape."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch = batch

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).reshape(self.batch, -1)


class Branching(nn.Module):
    """A net that decides by the values it sees, which no graph can say."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) if image.sum() > 0 else image.amax((2, 3))


class Untranslatable(nn.Module):
    """A net with an operation that ONNX does not have."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.svdvals(image).mean((1, 2))[:, None]


class Calculating(nn.Module):
    """A net that ends in a formula of its author."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.register_buffer("eps", torch.tensor(1e-5))

    def forward(self, image: Tensor) -> Tensor:
        return self.formula(image).flatten(1) + self.eps**2


class Activating(nn.Module):
    """A net with a batch norm, an addition of 0 and multiplications by 1: those of its author, and of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, image: Tensor) -> Tensor:
        maps = nn.functional.elu(self.norm(self.stem(image)))
        return 1.0 * (nn.functional.softplus(maps) + 0.0).mean((2, 3)) / 1.0


class TwoHeads(nn.Module):
    """A net that returns a tuple, like one with auxiliary heads in training."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image.mean((2, 3)), image.amax((2, 3))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def exported(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(net, torch.zeros(1, 3, 16, 16), path)
    return path


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def onnx_outputs(path: Path, inputs: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": inputs.numpy()})[0])


def largest_difference(net: nn.Module, path: Path, inputs: Tensor) -> float:
    """Between torch and onnxruntime, as a fraction of the largest output."""
    with torch.no_grad():
        expected = net.eval()(inputs).numpy()
    return float(np.abs(onnx_outputs(path, inputs) - expected).max() / np.abs(expected).max())


def all_metadata(graph: onnx.GraphProto) -> set[str]:
    holders = [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    return {prop.key for holder in holders for prop in holder.metadata_props}


def test_onnxruntime_computes_what_torch_computes(net: Net, exported: Path) -> None:
    assert largest_difference(net, exported, images(1, 16)) < TOLERANCE


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_resnet18_computes_the_same(tmp_path: Path, *, dynamic_batch: bool) -> None:
    torch.manual_seed(0)
    net = models.resnet18(num_classes=10)
    export_onnx(net, images(1, 32), tmp_path / "model.onnx", dynamic_batch=dynamic_batch)
    for batch in (1, 3) if dynamic_batch else (1,):
        assert largest_difference(net, tmp_path / "model.onnx", images(batch, 32)) < TOLERANCE


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_tiny_addend_still_keeps_a_division_from_nan(tmp_path: Path, *, dynamic_batch: bool) -> None:
    net = Calculating(lambda image: image / (image.sum((1, 2, 3), keepdim=True) + 1e-8))
    export_onnx(net, images(1, 4), tmp_path / "model.onnx", dynamic_batch=dynamic_batch)
    black = torch.zeros(1, 3, 4, 4)
    assert largest_difference(net, tmp_path / "model.onnx", black) == 0


@pytest.mark.parametrize(
    ("formula", "number"),
    [
        (lambda image: image + 1e-8, 1e-8),
        (lambda image: image - 1e-9, 1e-9),
        (lambda image: 1.000005 * image, 1.000005),
        (lambda image: image / 0.999995, 0.999995),
        (lambda image: image, 1e-10),  # the square of a buffer, which becomes one number in the file
    ],
)
def test_a_number_next_to_one_that_changes_nothing_is_kept(tmp_path: Path, formula, number: float) -> None:
    export_onnx(Calculating(formula), images(1, 4), tmp_path / "model.onnx")
    constants = [onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert any(each.shape == () and each == pytest.approx(number, rel=1e-6) for each in constants)


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_the_graph_is_as_small_as_the_one_that_torch_optimizes_itself(tmp_path: Path, *, dynamic_batch: bool) -> None:
    net, shapes = Activating().eval(), ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    torch.onnx.export(net, (images(2, 8),), tmp_path / "own.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    export_onnx(net, images(2, 8), tmp_path / "model.onnx", dynamic_batch=dynamic_batch)
    files = (onnx.load(tmp_path / name) for name in ("own.onnx", "model.onnx"))
    own, ours = ([node.op_type for node in file.graph.node] for file in files)
    assert ours == own
    assert not {"BatchNormalization", "Mul", "Add", "Div"} & {*ours}


def test_a_network_that_changes_nothing_has_an_input_and_an_output_of_their_names(tmp_path: Path) -> None:
    export_onnx(nn.Identity(), images(1, 4), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert ([each.name for each in graph.input], [each.name for each in graph.output]) == (["input"], ["output"])


def test_a_free_batch_accepts_any_number_of_images(net: Net, tmp_path: Path) -> None:
    export_onnx(net, images(1, 16), tmp_path / "model.onnx", dynamic_batch=True)
    for batch in (1, 2, 5):
        assert largest_difference(net, tmp_path / "model.onnx", images(batch, 16)) < TOLERANCE


def test_without_a_free_batch_another_batch_is_refused(exported: Path) -> None:
    with pytest.raises(Exception, match="Got: 2 Expected: 1"):
        onnx_outputs(exported, images(2, 16))


def test_the_file_is_of_the_versions_that_older_readers_take(exported: Path) -> None:
    model = onnx.load(exported)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18}
    assert model.ir_version <= 10


def test_input_and_output_have_their_fixed_names_and_sizes(exported: Path) -> None:
    graph = onnx.load(exported).graph
    sizes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert sizes == {"input": [1, 3, 16, 16], "output": [1, 10]}


def test_the_info_describes_the_file(net: Net, tmp_path: Path) -> None:
    info = export_onnx(net, images(1, 16), tmp_path / "model.onnx")
    data = (tmp_path / "model.onnx").read_bytes()
    model = onnx.load_from_string(data)
    assert (info.bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (info.opset, info.ir_version) == (model.opset_import[0].version, model.ir_version)
    assert (info.input, info.output) == (model.graph.input[0].name, model.graph.output[0].name)


def test_every_weight_is_inside_the_one_file(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["model.onnx"]
    for tensor in onnx.load(exported, load_external_data=False).graph.initializer:
        assert tensor.data_location == onnx.TensorProto.DEFAULT


def test_batch_norm_and_dropout_are_those_of_evaluation(exported: Path) -> None:
    assert not {"BatchNormalization", "Dropout"} & {node.op_type for node in onnx.load(exported).graph.node}


def test_each_module_keeps_the_mode_it_had(net: Net, tmp_path: Path) -> None:
    net.train()
    net.norm.eval()
    export_onnx(net, images(1, 16), tmp_path / "model.onnx")
    assert [net.training, net.norm.training, net.drop.training] == [True, False, True]


def test_statistics_and_weights_are_left_as_they_were(net: Net, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export_onnx(net.train(), images(4, 16), tmp_path / "model.onnx")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_nothing_in_the_file_tells_of_the_machine(exported: Path) -> None:
    data = exported.read_bytes()
    traces = [sys.prefix, f"{Path.home()}/", str(Path(__file__).parent), "site-packages", ".py"]
    assert [trace for trace in traces if trace.encode() in data] == []
    assert re.findall(rb"(?:/[\w.-]+){3,}", b" ".join(re.findall(rb"[ -~]{8,}", data))) == []


def test_the_exporter_alone_would_have_left_such_traces(net: Net) -> None:
    program = torch.onnx.export(net.eval(), (images(1, 16),), dynamo=True, verbose=False)
    assert program is not None
    assert b"site-packages" in program.model_proto.SerializeToString()


def test_of_the_metadata_only_the_origin_of_each_node_is_kept(exported: Path) -> None:
    graph = onnx.load(exported).graph
    assert all_metadata(graph) == {"namespace", "pkg.torch.onnx.name_scopes"}
    scopes = [prop.value for node in graph.node for prop in node.metadata_props if prop.key.endswith("name_scopes")]
    assert any("'body'" in scope for scope in scopes)


def test_metadata_inside_a_branch_is_dropped_as_well() -> None:
    inner = onnx.helper.make_node("Identity", ["x"], ["y"], doc_string="here")
    inner.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/somewhere/net.py")
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    branch = onnx.helper.make_graph([inner], "branch", [], [output])
    condition = onnx.helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    model = onnx.helper.make_model(onnx.helper.make_graph([condition], "graph", [], []))
    onnx_export._drop_metadata(model)
    assert b"somewhere" not in model.SerializeToString()
    assert b"here" not in model.SerializeToString()


def test_the_same_weights_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there, here = tmp_path / "there.onnx", tmp_path / "here.onnx"
    subprocess.run([sys.executable, "-c", EXPORT_ELSEWHERE, str(there)], check=True, env=environment, cwd=tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export_onnx(net, torch.zeros(1, 3, 16, 16), here)
    assert there.read_bytes() == here.read_bytes()


def test_what_was_exported_before_does_not_change_the_bytes(net: Net, exported: Path, tmp_path: Path) -> None:
    export_onnx(Net(width=5), images(2, 16), tmp_path / "other.onnx", dynamic_batch=True)
    export_onnx(net, torch.ones(1, 3, 16, 16), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def test_another_weight_gives_other_bytes(exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = Net()
    with torch.no_grad():
        other.head.bias[0] += 1e-3
    export_onnx(other, torch.zeros(1, 3, 16, 16), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() != exported.read_bytes()


def test_an_export_is_silent(net: Net, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(net, images(1, 16), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_what_the_network_itself_prints_is_not_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Talking(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            sys.stdout.write("I am a network\n")
            return image.mean((2, 3))

    export_onnx(Talking(), images(1, 16), tmp_path / "model.onnx")
    assert capfd.readouterr().out.startswith("I am a network\n")


@pytest.mark.parametrize(
    ("broken", "dynamic_batch", "sentence"),
    [
        (Branching(), False, r"cannot be exported to ONNX: Could not guard on data-dependent expression"),
        (Untranslatable(), False, r"cannot be exported to ONNX: No ONNX function found for .*linalg"),
        (TwoHeads(), False, r"returns a tuple, one tensor expected"),
        (nn.Linear(5, 2), False, r"does not run on an input of shape \(2, 3, 16, 16\): .*shapes cannot be multiplied"),
        (Reshaping(1), False, r"enters the network as 2 and leaves it as 1, 2 expected for both"),
        (Reshaping(2), True, r"enters the network as 'batch' and leaves it as 2, 'batch' expected for both"),
    ],
    ids=["branching", "untranslatable", "two heads", "wrong size", "batch constant", "free batch constant"],
)
def test_a_network_that_cannot_be_exported_is_one_sentence_and_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], broken: nn.Module, sentence: str, *, dynamic_batch: bool
) -> None:
    with pytest.raises(ExportFailed, match=sentence) as caught:
        export_onnx(broken, images(2, 16), tmp_path / "model.onnx", dynamic_batch=dynamic_batch)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_network_too_large_for_one_file_is_refused_before_the_work(tmp_path: Path) -> None:
    huge = nn.Module()
    huge.weight = nn.Parameter(torch.zeros(1).expand(2**30), requires_grad=False)
    with pytest.raises(ExportFailed, match=r"4\.3 GB of weights, and one ONNX file at most 2\.1 GB"):
        export_onnx(huge, images(1, 16), tmp_path / "model.onnx")


class Named(nn.Module):
    """Its parameters are called as the file's input and output are."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))
        self.output = nn.Parameter(torch.tensor([5.0, 6.0, 7.0]))

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) * self.input + self.output


def test_parameters_may_be_called_as_the_input_and_the_output_are(tmp_path):
    export_onnx(Named(), torch.zeros(1, 3, 4, 4), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"input": np.ones((1, 3, 4, 4), np.float32)})
    np.testing.assert_array_equal(found, [[7.0, 9.0, 11.0]])

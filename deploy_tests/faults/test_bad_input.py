"""Bad input: one clear sentence, the documented exit code, no traceback, nothing half-written."""

import numpy as np
import pytest
import torch
from PIL import Image

from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.models import build_model

GOOD = ["--model", "resnet20", "--data", "random:8", "--macs", "0.6", "--target", "ort-cpu",
        "--set", "prune.round_to=4", "--set", "tune.epochs=0"]  # fmt: skip


def _refused(capsys, code, *words, arguments, out):
    assert main(["prune", *arguments, "--out", str(out)]) == code
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, captured.err
    assert "Traceback" not in captured.err
    for word in words:
        assert word in error[0], error[0]
    assert not out.exists()


def _with(**changes):
    """GOOD with options replaced (underscores for dashes), dropped where None."""
    options = dict(zip(GOOD[:8:2], GOOD[1:8:2], strict=True)) | {f"--{k}": v for k, v in changes.items()}
    return [word for key, value in options.items() if value is not None for word in (key, value)] + GOOD[8:]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model": "resnet19"}, 2, ["resnet19", "Did you mean"]),
        ({"model": "timm:resnet1"}, 2, ["timm"]),
        ({"model": "nowhere.module:net"}, 2, ["nowhere"]),
        ({"data": "digts"}, 2, ["digts", "Did you mean 'digits'"]),
        ({"data": "imagefolder:/nowhere/at/all"}, 2, ["/nowhere/at/all"]),
        ({"data": "random:0"}, 2, ["random:0"]),
        ({"data": "random:many"}, 2, ["random:many"]),
        ({"criterion": "chp"}, 2, ["chp", "chip"]),
        ({"target": "ort-gpu"}, 2, ["ort-gpu", "ort-cpu"]),
        ({"target": "trt-rtx:sm99"}, 2, ["sm99", "sm89"]),
        ({"target": "trt"}, 3, ["trt-rtx:sm89", "chip-deploy build"]),
        ({"precision": "fp17"}, 2, ["fp17", "fp32"]),
        ({"precision": "fp32,int8"}, 2, ["INT8", "random:8", "--data"]),
        ({"precision": "bf16"}, 3, ["'ort-cpu' takes no bf16"]),
        ({"target": "torch:eager", "precision": "int8"}, 3, ["'torch:eager' takes no int8"]),
        ({"target": "torch:compile"}, 2, ["compile", "Did you mean 'compiled'"]),
        ({"target": "ort-cuda:sm89"}, 2, ["ort-cuda takes nothing after a colon"]),
        ({"macs": "0"}, 2, ["macs", "0"]),
        ({"macs": "1"}, 2, ["macs"]),
        ({"macs": "-0.5"}, 2, ["macs", "-0.5"]),
        ({"macs": "nan"}, 2, ["macs"]),
        ({"macs": "half"}, 2, ["macs", "half"]),
        ({"params": "0.5"}, 2, ["macs", "params"]),
        ({"macs": None}, 2, ["budget"]),
        ({"macs": "0.01"}, 2, ["cannot be reached", "smallest reachable", "prune.round_to"]),
        ({"ratio": "0.01", "macs": None}, 2, ["nothing would be cut"]),
        ({"weights": "/nowhere/model.pt"}, 2, ["/nowhere/model.pt"]),
        ({"set": "prune.critereon=chip"}, 2, ["prune.critereon", "Did you mean"]),
        ({"set": "score.images=9"}, 2, ["score.images", "9", "8"]),
        ({"set": "measure.batch=4"}, 2, ["export.dynamic_batch"]),
        ({"set": "targets=[]", "target": None}, 2, ["no target"]),
        ({"set": "build.builds=3"}, 2, ["build.builds has no effect on target 'ort-cpu'", "takes none"]),
        ({"set": "build.timing_cache=false", "target": "trt-rtx:sm86"}, 2, ["timing_cache has no", "runtime_cache"]),
        ({"set": "build.builds=3", "target": "trt-rtx:sm86"}, 2, ["TensorRT-RTX times no kernels"]),
        ({"set": "build.version_compatible=true", "target": "trt-rtx:sm86"}, 2, ["without the lean runtime"]),
        ({"set": "build.optimization_level=2", "target": "trt-rtx:sm86"}, 2, ["optimization_level has no effect"]),
    ],
)  # fmt: skip
def test_is_refused(changes, code, words, capsys, tmp_path):
    if changes.get("target") == "trt":
        from chip_deploy.export.target import parse_target
        from chip_deploy.export.targets import make_target

        if make_target(parse_target("trt")).unusable() is None:
            pytest.skip("TensorRT and a driver are here, so the target is usable")
    _refused(capsys, code, *words, arguments=_with(**changes), out=tmp_path / "bundle")


def _folder(root, *, classes=("a", "b"), per_class=3):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for n in range(per_class):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                    root / split / name / f"{n}.png"
                )
    return root


def test_an_empty_folder(capsys, tmp_path):
    (tmp_path / "data").mkdir()
    _refused(capsys, 2, "train", arguments=_with(data=f"imagefolder:{tmp_path}/data"), out=tmp_path / "bundle")


def test_a_folder_with_one_class(capsys, tmp_path):
    data = _folder(tmp_path / "data", classes=("only",))
    _refused(capsys, 2, "class", arguments=_with(data=f"imagefolder:{data}"), out=tmp_path / "bundle")


def test_a_truncated_image_is_named(capsys, tmp_path):
    data = _folder(tmp_path / "data")
    broken = data / "train" / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:600])
    _refused(capsys, 2, "1.png", arguments=_with(data=f"imagefolder:{data}"), out=tmp_path / "bundle")


def test_weights_that_are_no_checkpoint(capsys, tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"hello")
    _refused(capsys, 2, "model.pt", arguments=_with(weights=str(weights)), out=tmp_path / "bundle")


def test_weights_of_another_architecture_name_three_mismatches(capsys, tmp_path):
    weights = tmp_path / "model.pt"
    torch.save(build_model("resnet32", num_classes=10, seed=0).module.state_dict(), weights)
    _refused(capsys, 2, "do not fit", "layer1.3", arguments=_with(weights=str(weights)), out=tmp_path / "bundle")


def test_a_pickled_model_is_refused(capsys, tmp_path):
    weights = tmp_path / "model.pt"
    torch.save(build_model("resnet20", num_classes=10, seed=0).module, weights)
    _refused(capsys, 2, "model.pt", arguments=_with(weights=str(weights)), out=tmp_path / "bundle")


def test_infinite_activations_name_the_layer(capsys, tmp_path):
    net = build_model("resnet20", num_classes=10, seed=0).module
    with torch.no_grad():
        net.layer2[0].conv1.weight[3] = float("inf")
    weights = tmp_path / "model.pt"
    torch.save(net.state_dict(), weights)
    _refused(capsys, 2, "layer2.0.conv2", "finite", arguments=_with(weights=str(weights)), out=tmp_path / "bundle")


def test_an_output_folder_that_is_a_file(capsys, tmp_path):
    out = tmp_path / "bundle"
    out.write_text("mine")
    assert main(["prune", *GOOD, "--out", str(out)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_an_output_folder_with_other_things_in_it(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["prune", *GOOD, "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_output_folder_below_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert main(["prune", *GOOD, "--out", str(tmp_path / "file" / "bundle")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_turing_is_refused_before_any_work(capsys, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform")
    _refused(capsys, 3, "sm75", "'linear'", arguments=_with(target="trt-rtx:sm75"), out=tmp_path / "bundle")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["build.shapes=['image:1x3x32x32']"], ["no input 'image'", "The network has: input."]),
        (["build.shapes=['input:4x3x32x32']"], ["axis 0", "is fixed", "export.dynamic_batch=true"]),
        (["build.shapes=['input:1x3x16x16']", "export.dynamic_batch=true"], ["axis 2 of (any, 3, 32, 32) is fixed"]),
        (["build.shapes=['input:4x3x32x32']", "export.dynamic_batch=true"], ["measure.batch is 1", "input:1x3x32x32"]),
        (["measure.batch=64", "export.dynamic_batch=true"], ["measure.batch is 64", "1x3x32x32/1x3x32x32/32x3x32x32"]),
    ],
)
def test_shapes_that_an_engine_cannot_have_are_refused_before_any_work(settings, words, capsys, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform")
    monkeypatch.setattr("chip_deploy.pipeline.prepared.ChannelGraph", lambda *_: pytest.fail("work began"))
    more = [word for setting in settings for word in ("--set", setting)]
    _refused(capsys, 2, *words, arguments=[*_with(target="trt-rtx:sm86"), *more], out=tmp_path / "bundle")


def test_a_batch_of_any_size_is_for_a_target_that_is_built_for_no_shapes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--set", "measure.batch=64", "--set", "export.dynamic_batch=true"]
    assert main(["prune", *GOOD, *more, "--dry-run"]) == 0, capsys.readouterr().err


def test_a_build_option_goes_to_the_targets_that_take_it_and_the_others_go_without_aloud(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("chip_deploy.export.target_trt.TensorRTTarget.unusable", lambda _: None)
    more = ["--target", "trt", "--target", "trt-rtx:sm86", "--set", "build.builds=3", "--set", "build.tf32=false"]
    assert main(["prune", *GOOD, *more, "--dry-run"]) == 0, capsys.readouterr().err
    said = " ".join("".join(capsys.readouterr()).split())
    assert "without effect on target 'ort-cpu', and left out there: build.tf32, build.builds" in said
    assert "without effect on target 'trt-rtx:sm86', and left out there: build.builds" in said
    assert "target 'trt'," not in said


@pytest.mark.parametrize("option", ["refit", "strip"])
def test_what_tensorrt_rtx_builds_on_a_gpu_alone_is_refused_without_one_before_any_work(
    option, capsys, tmp_path, monkeypatch
):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform")
    monkeypatch.setattr("chip_deploy.export.target_trt.find_gpu", lambda: "no CUDA driver")
    monkeypatch.setattr("chip_deploy.pipeline.prepared.open_data", lambda *_, **__: pytest.fail("work began"))
    asked = _with(set=f"build.{option}=true", target="trt-rtx:sm86")
    _refused(capsys, 3, "needs a GPU", f"build.{option}=false", arguments=asked, out=tmp_path / "bundle")


def test_a_name_that_is_too_long(capsys, tmp_path):
    assert main(["prune", *GOOD, "--out", str(tmp_path / ("y" * 300))]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_dry_run_refuses_what_a_run_would_refuse(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "usernet_glu.py").write_text(
        "from torch import nn\n"
        "def build(num_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.GLU(1), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    arguments = [*_with(model="usernet_glu:build"), "--set", "data.size=16", "--set", "prune.min_width=1"]
    assert main(["prune", *arguments, "--dry-run"]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_network_that_cannot_be_cut_is_refused_with_the_reason(capsys, tmp_path):
    arguments = [*_with(model="shufflenet_v2_x0_5", data="random:8"), "--set", "data.size=64"]
    _refused(capsys, 1, "cannot", arguments=arguments, out=tmp_path / "bundle")

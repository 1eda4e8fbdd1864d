"""What every target keeps to, whichever runtime is behind it; one that cannot build here says why."""

import hashlib
import json
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chip_deploy.export import target as target_module
from chip_deploy.export.errors import BuildFailed, ExportError, IntegrityError, MachineMismatch, TargetUnavailable
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.target import (
    CAPABILITIES,
    PRECISIONS,
    Engine,
    Session,
    Target,
    TargetSpec,
    engine_path,
    parse_target,
    read_engine,
    require_precision,
    require_usable,
    sidecar_path,
    width_step,
)
from chip_deploy.export.target_torch import program_path, write_program
from chip_deploy.export.targets import make_target

# Every name of the table, and where it takes more behind a colon, that as well: torch runs in one way at a time.
SPECS = [
    *(TargetSpec(name=name) for name in CAPABILITIES),
    *(TargetSpec(name="torch", capabilities=(way,)) for way in CAPABILITIES["torch"]),
    TargetSpec(name="trt-rtx", capabilities=CAPABILITIES["trt-rtx"][2:4]),
]
# Where the engine comes from is named in what a failed build says.
SOURCES = r"model\.onnx: onnxruntime|model\.onnx: tensorrt|model\.pt2: torch"
every_target = pytest.mark.parametrize("spec", SPECS, ids=str)


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(1, 3, 16, 16), path)
    write_program(net, torch.zeros(1, 3, 16, 16), program_path(path))
    return path


def no_network(folder: Path) -> Path:
    """A file that is no ONNX file, with what is no torch program beside it."""
    for name in ("model.onnx", "model.pt2"):
        (folder / name).write_bytes(b"this is no network")
    return folder / "model.onnx"


def usable(spec: TargetSpec) -> Target:
    target = make_target(spec)
    if reason := target.unusable():
        pytest.skip(f"{spec}: {reason}")
    return target


def build(spec: TargetSpec, onnx_path: Path, bundle: Path) -> tuple[Target, Path, Engine]:
    target = usable(spec)
    path = engine_path(bundle, spec, "fp32")
    return target, path, target.build(onnx_path, path)


def opened(spec: TargetSpec, onnx_path: Path, bundle: Path) -> Session:
    target, path, engine = build(spec, onnx_path, bundle)
    if reason := target.cannot_run(engine):
        pytest.skip(f"{spec}: {reason}")
    return target.open(path)


def is_one_sentence(text: str) -> bool:
    return "\n" not in text and "Traceback" not in text and text.strip() == text and text.endswith(".")


@every_target
def test_a_spec_survives_being_written_and_read(spec: TargetSpec) -> None:
    assert parse_target(str(spec)) == spec


@every_target
def test_a_slug_is_fit_for_a_file_name_and_names_the_whole_spec(spec: TargetSpec) -> None:
    assert set(spec.slug) <= set(string.ascii_lowercase + string.digits + "-")
    assert spec.slug == "-".join([spec.name, *spec.capabilities])


@every_target
def test_the_table_makes_a_target_of_that_spec(spec: TargetSpec) -> None:
    target = make_target(spec, threads=2)
    assert isinstance(target, Target)
    assert target.spec == spec
    assert repr(str(spec)) in repr(target)


@every_target
def test_a_target_that_cannot_build_says_so_before_any_work(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    target = make_target(spec)
    reason = target.unusable()
    if reason is None:
        require_usable(target)
        return
    assert is_one_sentence(reason)
    with pytest.raises(TargetUnavailable, match=re.escape(f"target '{spec}' cannot be used here: {reason}")):
        target.build(onnx_path, engine_path(tmp_path, spec, "fp32"))
    assert list(tmp_path.iterdir()) == []


@every_target
def test_the_sidecar_describes_the_engine_completely(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    _, path, engine = build(spec, onnx_path, tmp_path)
    data = path.read_bytes()
    assert engine.file == path.relative_to(tmp_path).as_posix()
    assert (engine.target, engine.precision) == (str(spec), "fp32")
    assert (engine.sha256, engine.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert engine.build_seconds > 0
    assert engine.built_for
    assert engine.flags
    assert len(engine.versions) == 2
    assert all(re.match(r"\d+\.\d+", version) for version in engine.versions.values())


@every_target
def test_the_sidecar_lies_beside_the_engine_as_json(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    _, path, engine = build(spec, onnx_path, tmp_path)
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([path.name, f"{spec.slug}.fp32.json"])
    assert json.loads(sidecar_path(path).read_text()) == engine.model_dump(mode="json")
    assert read_engine(path) == engine


@every_target
def test_the_engine_is_the_runtimes_bytes_and_nothing_of_ours(
    spec: TargetSpec, onnx_path: Path, tmp_path: Path
) -> None:
    _, path, _ = build(spec, onnx_path, tmp_path)
    data = path.read_bytes()
    assert not data.startswith(b"{")
    for ours in (b"chip_deploy", b"build_seconds", b"built_for", str(tmp_path).encode()):
        assert ours not in data


@every_target
def test_an_engine_opens_or_says_why_not(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    target, path, engine = build(spec, onnx_path, tmp_path)
    reason = target.cannot_run(engine)
    if reason is None:
        assert target.open(path).run({"input": np.zeros((1, 3, 16, 16), np.float32)})["output"].shape == (1, 10)
        return
    assert is_one_sentence(reason + ".")
    with pytest.raises(MachineMismatch, match=re.escape(f"cannot run here: {reason}. ")):
        target.open(path)
    with pytest.raises(ExportError, match=re.escape(reason)):
        target.open_onnx(onnx_path)


@every_target
def test_an_engine_that_was_changed_is_never_given_to_the_runtime(
    spec: TargetSpec, onnx_path: Path, tmp_path: Path
) -> None:
    target, path, _ = build(spec, onnx_path, tmp_path)
    path.write_bytes(path.read_bytes() + b'{"metadata": "glued on"}')
    with pytest.raises(IntegrityError, match=r"but its sidecar says .*never into the engine file"):
        target.open(path)


@every_target
@pytest.mark.parametrize("damage", ["missing", "empty", "another schema"])
def test_an_engine_without_a_readable_sidecar_is_not_opened(
    spec: TargetSpec, onnx_path: Path, tmp_path: Path, damage: str
) -> None:
    target, path, _ = build(spec, onnx_path, tmp_path)
    sidecar = sidecar_path(path)
    match damage:
        case "missing":
            sidecar.unlink()
        case "empty":
            sidecar.write_text("")
        case _:
            sidecar.write_text('{"target": "ort-cpu"}')
    with pytest.raises(IntegrityError, match="sidecar") as caught:
        target.open(path)
    assert is_one_sentence(str(caught.value))


@every_target
def test_an_engine_of_another_target_is_refused(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    target, _, engine = build(spec, onnx_path, tmp_path)
    reason = target.cannot_run(engine.model_copy(update={"target": "abacus"}))
    assert reason == f"{engine.file} was built for target 'abacus', not for '{spec}'"


@every_target
def test_a_build_that_fails_leaves_no_trace(spec: TargetSpec, tmp_path: Path) -> None:
    target = usable(spec)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    with pytest.raises(BuildFailed, match=SOURCES) as caught:
        target.build(no_network(tmp_path), engine_path(bundle, spec, "fp32"))
    assert is_one_sentence(str(caught.value).rstrip(".") + ".")
    assert list(bundle.iterdir()) == []


@every_target
def test_a_build_that_fails_leaves_the_earlier_engine(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    target, path, engine = build(spec, onnx_path, tmp_path)
    with pytest.raises(BuildFailed, match=SOURCES):
        target.build(no_network(tmp_path), path)
    assert read_engine(path) == engine
    assert len(list(path.parent.iterdir())) == 2


@every_target
def test_building_again_gives_the_same_engine(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    if spec.name == "trt":
        pytest.skip("standard TensorRT times kernels while it builds, so its engines differ")
    target, path, engine = build(spec, onnx_path, tmp_path)
    assert target.build(onnx_path, path).sha256 == engine.sha256


@every_target
def test_mistakes_in_paths_and_precision_are_told_before_any_work(
    spec: TargetSpec, onnx_path: Path, tmp_path: Path
) -> None:
    target = make_target(spec)
    path = engine_path(tmp_path, spec, "fp32")
    with pytest.raises(ValueError, match=r"precision 'int9' cannot be built\. Available: fp32"):
        target.build(onnx_path, path, precision="int9")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx: no such ONNX file"):
        target.build(tmp_path / "nowhere.onnx", path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        target.build(onnx_path, engine_path(tmp_path / "nowhere", spec, "fp32"))
    with pytest.raises(ValueError, match=r"an engine file is named \*\.engine"):
        target.build(onnx_path, path.with_suffix(".plan"))
    with pytest.raises(FileNotFoundError, match=r"\.engine: no such engine"):
        target.open(path)
    assert list(tmp_path.iterdir()) == []


@every_target
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_that_a_target_refuses_is_told_before_any_work(
    spec: TargetSpec, precision: str, onnx_path: Path, tmp_path: Path
) -> None:
    target = make_target(spec)
    reason = target.refuses(precision)
    if reason is None:
        require_precision(target, precision)
        return
    assert is_one_sentence(reason)
    with pytest.raises(TargetUnavailable, match=re.escape(f"target '{spec}' takes no {precision}: {reason}")):
        require_precision(target, precision)
    with pytest.raises(TargetUnavailable):
        target.build(onnx_path, engine_path(tmp_path, spec, precision), precision=precision)
    assert list(tmp_path.iterdir()) == []


@every_target
def test_every_target_takes_float32(spec: TargetSpec) -> None:
    assert make_target(spec).refuses("fp32") is None


@every_target
@pytest.mark.parametrize(
    ("feeds", "sentence"),
    [
        ({}, r"inputs \[\] given, \['input'\] expected"),
        ({"image": np.zeros((1, 3, 16, 16), np.float32)}, r"inputs \['image'\] given, \['input'\] expected"),
        ({"input": np.zeros((1, 3, 16, 16))}, r"input 'input': dtype float64 given, float32 expected"),
        ({"input": np.zeros((1, 4, 16, 16), np.float32)}, r"shape \(1, 4, 16, 16\) given, \(1, 3, 16, 16\) expected"),
        ({"input": np.zeros((2, 3, 16, 16), np.float32)}, r"shape \(2, 3, 16, 16\) given, \(1, 3, 16, 16\) expected"),
        ({"input": np.zeros((3, 16, 16), np.float32)}, r"shape \(3, 16, 16\) given, \(1, 3, 16, 16\) expected"),
        ({"input": [[0.0]]}, r"a list given, a numpy array or __dlpack__ expected"),
    ],
    ids=["no input", "another name", "float64", "channels", "batch", "no batch", "a list"],
)
def test_wrong_inputs_are_one_sentence(
    spec: TargetSpec, onnx_path: Path, tmp_path: Path, feeds: dict[str, object], sentence: str
) -> None:
    session = opened(spec, onnx_path, tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        session.run(feeds)
    assert is_one_sentence(str(caught.value))


@every_target
def test_a_torch_tensor_is_taken_as_it_is(spec: TargetSpec, onnx_path: Path, tmp_path: Path) -> None:
    session = opened(spec, onnx_path, tmp_path)
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = session.run({"input": image.numpy()})["output"]
    assert np.array_equal(session.run({"input": image})["output"], expected)
    with pytest.raises(ValueError, match="Detach it and move it there"):
        session.run({"input": image.clone().requires_grad_()})


@every_target
def test_an_array_with_strides_is_taken_for_the_values_it_shows(
    spec: TargetSpec, onnx_path: Path, tmp_path: Path
) -> None:
    session = opened(spec, onnx_path, tmp_path)
    image = np.random.default_rng(0).standard_normal((1, 16, 16, 3), dtype=np.float32).transpose(0, 3, 1, 2)
    expected = session.run({"input": image.copy(order="C")})["output"]
    assert np.array_equal(session.run({"input": image})["output"], expected)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tr", r"unknown target 'tr'\. Did you mean 'trt'\? Available: ort-cpu, ort-cuda, torch, trt, trt-rtx\."),
        ("ORT-CPU", r"unknown target 'ORT-CPU'\. Did you mean 'ort-cpu'\?"),
        ("trtrtx:sm89", r"unknown target 'trtrtx'\. Did you mean 'trt-rtx'\?"),
        ("", r"unknown target ''\. Available"),
        ("trt-rtx:sm88", r"unknown compute capability 'sm88'\. Did you mean 'sm8\d'\? Available: sm75, sm80"),
        ("trt-rtx:89", r"unknown compute capability '89'\. Did you mean 'sm89'\?"),
        ("trt-rtx:", r"unknown compute capability ''"),
        ("trt-rtx:sm86,,sm89", r"unknown compute capability ''"),
        ("trt:sm89", r"target 'trt:sm89': trt takes nothing after a colon\. Write --target trt\."),
        ("ort-cpu:avx2", r"ort-cpu takes nothing after a colon\. Write --target ort-cpu\."),
        ("torch:compile", r"unknown way to run 'compile'\. Did you mean 'compiled'\? Available: eager, compil"),
        ("torch:eager,compiled", r"one way to run at a time\. Give --target torch:eager and another\."),
    ],
)
def test_a_misspelt_target_is_told_the_nearest(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_target(text)
    assert is_one_sentence(str(caught.value))


@given(st.lists(st.sampled_from(CAPABILITIES["trt-rtx"]), min_size=1, max_size=8))
def test_one_set_of_capabilities_has_one_spelling(asked: list[str]) -> None:
    spec = parse_target(f" trt-rtx:{' , '.join(asked)} ")
    assert spec == parse_target(f"trt-rtx:{','.join(reversed(asked))}")
    assert set(spec.capabilities) == set(asked)
    assert parse_target(str(spec)) == spec


def test_a_name_outside_the_table_makes_no_target() -> None:
    with pytest.raises(ValueError, match=r"unknown target 'abacus'\. Available: ort-cpu, ort-cuda, torch, trt, tr"):
        make_target(TargetSpec(name="abacus"))


@pytest.mark.parametrize(("isa", "step"), [(("avx", "avx2", "avx512f"), 16), (("avx", "avx2"), 8), (("neon",), 8)])
def test_onnxruntime_pays_for_channels_by_the_vector(
    monkeypatch: pytest.MonkeyPatch, isa: tuple[str, ...], step: int
) -> None:
    monkeypatch.setattr(target_module, "cpu_isa", lambda: isa)
    assert width_step(parse_target("ort-cpu"), "fp32") == step


@pytest.mark.parametrize("name", ["trt", "trt-rtx:sm89"])
def test_tensorrt_pays_for_channels_by_8_and_by_32_in_int8(name: str) -> None:
    spec = parse_target(name)
    assert [width_step(spec, precision) for precision in ("fp32", "fp16", "int8")] == [8, 8, 32]


def test_a_width_step_for_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision 'int9' cannot be built\. Available: fp32, fp16, bf16, int8, fp8"):
        width_step(parse_target("trt"), "int9")

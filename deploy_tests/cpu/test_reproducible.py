"""The same network gives the same bytes in every process: as ONNX, as a torch program, as an engine built ahead."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chip_deploy.export.target import engine_path, parse_target

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx has no wheel for this platform"
)
EXPORT = """
import sys
from pathlib import Path
import torch
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.target_torch import program_path, write_program
from chip_deploy.pipeline.models import build_model

network = build_model("resnet20", num_classes=10, seed=3, size=32).module
example = torch.zeros(1, 3, 32, 32)
for free in (False, True):
    path = Path(sys.argv[1]) / f"{'free' if free else 'fixed'}.onnx"
    export_onnx(network, example, path, dynamic_batch=free)
    write_program(network, example, program_path(path), dynamic_batch=free)
"""
BUILD = """
import sys
from pathlib import Path
from chip_deploy.export.target import parse_target
from chip_deploy.export.targets import make_target

print(make_target(parse_target(sys.argv[1])).build(Path(sys.argv[2]), Path(sys.argv[3])).sha256)
"""

SCORE = """
import torch
from chip_deploy.chip import nuclear

torch.manual_seed(0)
shapes = (16, 1024), (40, 60), (48, 9)
print([nuclear.channel_independence(torch.randn(4, *shape).relu()).sum(0).tolist() for shape in shapes])
"""


def in_a_process(code: str, *arguments: object, seed: int, **more: str) -> str:
    """What a new Python prints, whose sets and dicts of texts are in another order for every seed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), **more}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two processes that exported the same network, with a fixed and with a free batch."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for seed, folder in enumerate(folders, start=1):
        in_a_process(EXPORT, folder, seed=seed)
    return folders


def test_two_processes_export_the_same_bytes(exports: tuple[Path, Path]) -> None:
    one, two = map(digests, exports)
    assert one == two
    assert sorted(one) == ["fixed.onnx", "fixed.pt2", "free.onnx", "free.pt2"]
    assert len(set(one.values())) == 4


@pytest.fixture
def engines(exports: tuple[Path, Path], tmp_path: Path) -> Callable[[str, str], list[bytes]]:
    """What two processes build from the same network for a target, each from its own export."""

    def built(name: str, target: str) -> list[bytes]:
        found = []
        for seed, folder in enumerate(exports, start=1):
            (tmp_path / str(seed)).mkdir()
            path = engine_path(tmp_path / str(seed), parse_target(target), "fp32")
            told = in_a_process(BUILD, target, folder / name, path, seed=seed)
            found.append(path.read_bytes())
            assert hashlib.sha256(found[-1]).hexdigest() == told
        return found

    return built


@needs_rtx
@pytest.mark.parametrize("target", ["trt-rtx:sm89", "trt-rtx:sm86,sm120"])
def test_two_processes_build_the_same_engine_ahead_of_time(
    engines: Callable[[str, str], list[bytes]], target: str
) -> None:
    one, two = engines("fixed.onnx", target)
    assert one == two


@needs_rtx
def test_with_a_free_batch_only_the_numbers_of_internal_tensors_differ(
    engines: Callable[[str, str], list[bytes]],
) -> None:
    """TensorRT-RTX 1.7 numbers some tensors of free size anew in every build, in one process as in two."""
    one, two = (re.sub(rb"__mye\d+", b"", engine) for engine in engines("free.onnx", "trt-rtx:sm89"))
    assert one == two


@needs_rtx
def test_another_network_gives_another_engine(exports: tuple[Path, Path], tmp_path: Path) -> None:
    told = [
        in_a_process(BUILD, "trt-rtx:sm89", exports[0] / name, tmp_path / "engines" / f"{name}.engine", seed=1)
        for name in ("fixed.onnx", "free.onnx")
    ]
    assert told[0] != told[1]


def test_scores_by_code_that_was_just_compiled_are_those_by_code_that_was_kept(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    compiled, kept = (in_a_process(SCORE, seed=seed, NUMBA_CACHE_DIR=str(tmp_path)) for seed in (1, 2))
    assert list(tmp_path.rglob("*_small*.nbc")), "nothing was kept"
    assert compiled == kept

"""The output folder of a run: whose it is, whether it is finished, and how files come into it and go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..export.bundle import WORK, onnx_name, sha256_file, verify_bundle, writing_atomically
from ..export.errors import IntegrityError
from ..export.golden import GOLDEN
from ..export.target import PRECISIONS
from ..export.target_torch import PROGRAM_PRECISIONS, program_path
from . import report as reports
from .journal import StageResult
from .prepared import Prepared
from .provenance import source_digest, versions
from .recipe import Recipe, load_recipe, recipe_digest

RECIPE_FILE = "recipe.toml"
BUNDLE_FILES = (
    RECIPE_FILE,
    "plan.json",
    "scores.safetensors",
    "model.safetensors",
    *(onnx_name(network, precision) for network in ("model", "dense") for precision in PRECISIONS),
    GOLDEN,
    *(
        program_path(Path(onnx_name(network, precision))).name
        for network in ("model", "dense")
        for precision in PROGRAM_PRECISIONS
    ),
)


def require_folder(out: Path) -> None:
    """Nothing, if `out` is a folder that can be written, or can become one.

    Raises: ValueError, NotADirectoryError, PermissionError.
    """
    try:
        present = out.exists()
    except OSError as err:
        raise ValueError(f"--out cannot be used ({err.strerror}): {str(out)[:40]}... Give another --out.") from err
    if present and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; --out needs a folder. Give another --out.")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{out} cannot be written: {parent} is not a writable folder. Give another --out.")


def require_own_folder(out: Path, recipe: Recipe) -> None:
    """Raises: as `require_folder`; ValueError for a folder that holds anything but a run of this recipe."""
    require_folder(out)
    if not out.exists() or (
        {path.name for path in out.iterdir()} <= {WORK} and not (out / WORK / RECIPE_FILE).exists()
    ):
        return  # new, empty, or killed before it began
    found = [path for path in (out / RECIPE_FILE, out / WORK / RECIPE_FILE) if path.is_file()]
    if not found:
        raise ValueError(f"{out} is not empty and holds no run of this tool. Give another --out, or empty it.")
    if not all(_holds(path, recipe) for path in found):
        raise ValueError(f"{out} holds the run of another recipe. Give another --out, or remove {out}.")


def is_finished(out: Path, ready: Prepared) -> bool:
    """Whether the folder holds a whole bundle, made from the same inputs with the same versions."""
    try:
        manifest = verify_bundle(out)
    except IntegrityError:
        return False
    return manifest.versions == versions() and origin_of(ready).items() <= manifest.lineage.items()


def origin_of(ready: Prepared) -> dict[str, str]:
    """Digests of everything that a run starts from."""
    weights = ready.recipe.model.weights
    return {
        "recipe_sha256": recipe_digest(ready.recipe),
        "data_sha256": ready.data.digest,
        "network_sha256": ready.network,
        "training_code_sha256": source_digest(ready.recipe.tune.train or ""),
        **({"scores_file_sha256": sha256_file(Path(ready.recipe.score.file))} if ready.recipe.score.file else {}),
        **({"weights_file_sha256": sha256_file(Path(weights))} if weights else {}),
    }


def make_folder(path: Path) -> None:
    """The folder is there, and those above it. Raises: PermissionError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise PermissionError(f"{path.parent} cannot be written ({err.strerror}). Give another --out.") from err


def clear_folder(out: Path) -> None:
    """Remove what this tool wrote there, and nothing else."""
    for name in ("manifest.json", reports.REPORT, *reports.PAGES, *reversed(BUNDLE_FILES)):  # recipe.toml goes last:
        for path in (out / f".{name}.part", out / name):  # it says whose folder this is
            if name == RECIPE_FILE:
                for folder in ("engines", WORK):
                    shutil.rmtree(out / folder, ignore_errors=True)
            path.unlink(missing_ok=True)


def place_files(out: Path, stages: Mapping[str, StageResult]) -> None:
    """What the stages made, copied to where a bundle has it."""
    sources = {
        RECIPE_FILE: out / WORK / RECIPE_FILE,
        "plan.json": stages["plan"].file("plan.json"),
        "scores.safetensors": stages["score"].file("scores.safetensors"),
        "model.safetensors": stages["tune"].file("model.safetensors"),
        **{name: stages["export"].file(name) for name in ("model.onnx", "dense.onnx", GOLDEN)},
        **{path.name: path for path in _converted_files(stages)},
    }
    programs = [path for name in ("export", "convert") if name in stages for path in stages[name].folder.glob("*.pt2")]
    for name, source in [*sources.items(), *((path.name, path) for path in sorted(programs))]:
        _copy_atomically(source, out / name)
    shutil.rmtree(out / "engines", ignore_errors=True)
    (out / "engines").mkdir()
    engines = sorted(stages["build"].file("engines").iterdir())
    laps = sorted(stages["measure"].folder.glob("*.latency.json.gz"))
    for path in (*engines, *laps):
        _copy_atomically(path, out / "engines" / path.name)


def _holds(path: Path, recipe: Recipe) -> bool:
    """Whether a file has that recipe; what an earlier version did not know yet is as it is by default."""
    try:
        return load_recipe(path) == recipe
    except ValueError:
        return False


def _converted_files(stages: Mapping[str, StageResult]) -> list[Path]:
    """The ONNX files in other precisions, and the golden outputs that hold theirs as well."""
    if "convert" not in stages:
        return []
    return [*sorted(stages["convert"].folder.glob("*.onnx")), stages["convert"].file(GOLDEN)]


def _copy_atomically(source: Path, target: Path) -> None:
    with writing_atomically(target) as unfinished:
        shutil.copyfile(source, unfinished)

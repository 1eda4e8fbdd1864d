"""The dense network of a run: given, or trained once on a small data set and kept for later runs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ..export.bundle import sha256_file, write_atomic
from .evaluation import accuracy_of, evaluation_key
from .journal import Journal, StageResult, digest_of
from .prepared import Prepared
from .stage_files import tensors_of
from .tune import train


def dense_stage(ready: Prepared, journal: Journal, *, judged: bool = True) -> StageResult:
    """The dense weights: given, or trained on a small data set and kept in the cache; and accuracy, if `judged`."""
    recipe, data = ready.recipe, ready.data

    def make(folder: Path) -> Mapping[str, Any]:
        model, record, notes = ready.built.module, None, []
        if ready.trains_dense:
            cached = cached_dense(ready)
            if filled_from(cached, model):
                notes.append(
                    f"no weights were given: the dense model is one that an earlier run trained ({cached.name})."
                )
            else:
                work = journal.work / "dense.epochs"
                record = train(
                    model, data, recipe.dense, seed=recipe.seed, work=work, progress=journal.display.progress
                )
                with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run its time
                    cached.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(cached, save(tensors_of(model)))
                shutil.rmtree(work, ignore_errors=True)
                notes.append(
                    f"no weights were given: the dense model was trained first, {record.epochs} epochs on "
                    f"{min(len(data.train), recipe.dense.max_images or len(data.train)):,} images."
                )
        elif not data.has_accuracy and recipe.model.weights is None:
            notes.append("the dense weights are random: structure and latency are real, accuracy does not exist.")
        write_atomic(folder / "dense.safetensors", save(tensors_of(model)))
        accuracy = accuracy_of(model, ready, journal) if judged else None
        return {"accuracy": accuracy, "training": record.model_dump() if record else None, "notes": notes}

    inputs = {
        "model": recipe.model.name,
        "weights": sha256_file(Path(recipe.model.weights)) if recipe.model.weights else _dense_digest(ready),
        "network": ready.network,
        "test": evaluation_key(ready),
    }
    result = journal.stage("dense", inputs, make)
    for note in result.facts["notes"]:
        journal.display.note(note)
    ready.built.module.load_state_dict(load_file(result.file("dense.safetensors")))
    ready.built.module.eval()
    return result


def cached_dense(ready: Prepared) -> Path:
    """Where a dense network trained for such a run lies, if one was."""
    return _cache_folder() / f"{_dense_digest(ready)}.safetensors"


def filled_from(cached: Path, model: nn.Module) -> bool:
    """Whether the model now holds the cached tensors; a damaged file counts as none."""
    try:
        model.load_state_dict(load_file(cached))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _dense_digest(ready: Prepared) -> str:
    """What the trained dense model depends on; names its file in the cache."""
    recipe = ready.recipe
    settings = recipe.dense.model_dump() if ready.data.has_accuracy else None
    return digest_of(
        recipe.model.name,
        ready.built.num_classes,
        ready.data.digest,
        ready.data.size,
        ready.network,
        settings,
        recipe.seed,
        metadata.version("torch"),
    )[:32]


def _cache_folder() -> Path:
    base = os.environ.get("CHIP_DEPLOY_CACHE_DIR")
    if base:
        return Path(base) / "dense"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chip-deploy" / "dense"

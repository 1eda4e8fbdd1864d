"""The file of scores: where one may be written, and whether one holds the scores of this network."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..chip.groups import ChannelGroup
from ..chip.plan import weights_digest
from ..chip.scores import ChannelScores
from ..export.bundle import require_place
from .recipe import Recipe


def score_place(out_file: Path) -> Path:
    """Where the scores are written, links followed. Raises: FileNotFoundError, PermissionError, ValueError."""
    place = require_place(out_file, [])
    try:
        with tempfile.TemporaryFile(dir=place.parent):
            return place
    except OSError as err:
        raise PermissionError(f"{out_file.parent} cannot be written ({err.strerror}). Give another --out.") from err


def require_score_file(path: Path) -> None:
    """Raises: IsADirectoryError, FileNotFoundError."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, but a score file is expected. Give the .safetensors file.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such score file. Write one with `chip-deploy score --out {path}`.")


def read_scores(
    recipe: Recipe, groups: Sequence[ChannelGroup], model: nn.Module, *, check_weights: bool
) -> ChannelScores:
    """The scores in the recipe's file. Raises: FileNotFoundError; ValueError when they belong to something else."""
    path = Path(str(recipe.score.file))
    require_score_file(path)
    found = ChannelScores.from_file(str(path))
    expected = {group.layer: group.width for group in groups if group.protected is None}
    held = {layer: len(vector) for layer, vector in found.scores.items()}
    asked = recipe.score
    if found.criterion != asked.label:
        name = found.criterion.removesuffix(" joint")
        same = (
            f"Set score.joint={str(found.criterion != name).lower()}"
            if name == asked.criterion
            else f"Give --criterion {name}"
        )
        raise ValueError(
            f"{path} holds scores by '{found.criterion}', and the recipe asks for '{asked.label}'. {same}, or score "
            "the model anew."
        )
    again = f"Score this model with `chip-deploy score --out {path}`."
    if held != expected:
        layer = min(layer for layer in {**held, **expected} if held.get(layer) != expected.get(layer))
        there, here = (f"{of[layer]} channels" if layer in of else "no such group" for of in (held, expected))
        raise ValueError(
            f"{path} holds the scores of another model: for '{layer}', {there} there and {here} here. {again}"
        )
    if check_weights and found.weights_sha256 != weights_digest(model):
        raise ValueError(f"{path} holds the scores of another model: the same network with other weights. {again}")
    if recipe.prune.allocation == "interaction" and set(found.strengths) != set(found.scores):
        raise ValueError(
            f"{path} does not say how strongly the channels of each group act together, and prune.allocation = "
            "'interaction' goes by that. Score with `chip-deploy score --criterion "
            f"{asked.criterion} --set prune.allocation=interaction --out {path}`."
        )
    return found

"""Channel scores: one vector per channel group, with what they were made from."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

SCHEMA = "chip-deploy.scores/1"


@dataclass(frozen=True)
class LayerEvidence:
    """What the scores of one group rest on.

    stability: share of the kept set that stays the same in 95 % (or the rule's confidence) of bootstrap resamples of
    the images, the worst over the watched widths (`stability.kept_overlaps`); None where no rule watched.
    settled: whether that was enough for the rule.
    seconds: spent on the group, over all processes. On a GPU only until the work was queued.
    """

    images: int
    stability: float | None
    settled: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Scored:
    """scores: group -> (C,) float64, in the order of the group's channels; layers: what each rests on.

    strengths: group -> how much its channels act together, where the criterion found that out.
    """

    scores: dict[str, Tensor]
    layers: dict[str, LayerEvidence]
    strengths: dict[str, float] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """The most images that any group needed."""
        return max((layer.images for layer in self.layers.values()), default=0)


@dataclass(frozen=True)
class ChannelScores:
    """layer path of each group's root -> (C,) float64, in the order of the group's channels.

    Unit: that of the criterion where its scores rank the channels of all groups; else none, and 1 is an average
    channel of its group.
    images: the most that any group needed; 0 where none was looked at.
    weights_sha256: digest of the model that was scored.
    layers: group -> what its scores rest on; without the seconds in the file, so that the same scores are the same
    bytes.
    strengths: group -> how much its channels act together; empty where nobody asked.
    """

    scores: Mapping[str, Tensor]
    criterion: str
    images: int
    weights_sha256: str
    layers: Mapping[str, LayerEvidence] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The safetensors file, the same bytes for the same scores."""
        metadata = {
            "schema": SCHEMA,
            "criterion": self.criterion,
            "images": str(self.images),
            "weights_sha256": self.weights_sha256,
            "layers": {
                name: {"images": layer.images, "stability": layer.stability, "settled": layer.settled}
                for name, layer in self.layers.items()
            },
            **({"strengths": dict(self.strengths)} if self.strengths else {}),
        }
        return save(
            {name: scores.contiguous() for name, scores in sorted(self.scores.items())},
            {"scores": json.dumps(metadata, sort_keys=True)},
        )

    @classmethod
    def from_file(cls, path: str) -> "ChannelScores":
        """Read back what `to_bytes` wrote.

        Raises: FileNotFoundError; ValueError when the file is no score file, or holds a score that is no finite number.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["scores"])
                if metadata["schema"] != SCHEMA:
                    raise ValueError(metadata["schema"])
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                criterion, images, digest = metadata["criterion"], int(metadata["images"]), metadata["weights_sha256"]
                layers = {name: _evidence(**found) for name, found in metadata.get("layers", {}).items()}
                strengths = {name: float(strength) for name, strength in metadata.get("strengths", {}).items()}
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as err:
            raise ValueError(
                f"{path} is no score file of this tool ({SCHEMA}), or is damaged. Write one with `chip-deploy score`."
            ) from err
        for name, vector in scores.items():
            if vector.ndim != 1 or not vector.is_floating_point() or not bool(torch.isfinite(vector).all()):
                raise ValueError(
                    f"{path}: the scores of '{name}' are no vector of finite numbers. Score the model again with "
                    "`chip-deploy score`."
                )
        for name, strength in strengths.items():
            if name not in scores or not 0 <= strength < math.inf:
                raise ValueError(
                    f"{path}: the strength of '{name}' is {strength}, and a finite one of a scored group is expected. "
                    "Score the model again with `chip-deploy score`."
                )
        return cls(scores, criterion, images, digest, layers, strengths)


def _evidence(*, images: int, stability: float | None, settled: bool) -> LayerEvidence:
    return LayerEvidence(int(images), None if stability is None else float(stability), bool(settled))

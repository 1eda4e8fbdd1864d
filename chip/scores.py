"""Channel scores: one vector per channel group, with what they were made from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

SCHEMA = "chip-deploy.scores/1"


@dataclass(frozen=True)
class ChannelScores:
    """layer path of each group's root -> (C,) float64, in the order of the group's channels.

    Unit: none; every consumer's scores were divided by their mean, so 1 is an average channel.
    weights_sha256: digest of the model that was scored.
    """

    scores: Mapping[str, Tensor]
    criterion: str
    images: int
    weights_sha256: str

    def to_bytes(self) -> bytes:
        """The safetensors file, the same bytes for the same scores."""
        metadata = {
            "schema": SCHEMA,
            "criterion": self.criterion,
            "images": str(self.images),
            "weights_sha256": self.weights_sha256,
        }
        return save(
            {name: scores.contiguous() for name, scores in sorted(self.scores.items())},
            {"scores": json.dumps(metadata, sort_keys=True)},
        )

    @classmethod
    def from_file(cls, path: str) -> "ChannelScores":
        """Read back what `to_bytes` wrote.

        Raises: ValueError when the file is no score file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["scores"])
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                criterion, images, digest = metadata["criterion"], int(metadata["images"]), metadata["weights_sha256"]
        except (SafetensorError, KeyError, ValueError) as err:
            raise ValueError(
                f"{path} is no score file of this tool ({SCHEMA}): write one with `chip-deploy score`."
            ) from err
        return cls(scores, criterion, images, digest)

"""A parameter-free shortcut that puts every input channel where it belongs among the output channels."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shape letters: B images, I input channels, O output channels, H W pixels.

ZERO = -1  # the source of an output channel that no input channel feeds


class ChannelMap(nn.Module):
    """The option-A shortcut: output channel o is input channel source[o], or zero; every stride-th pixel.

    Dense, the I input channels sit in the middle of the O output channels, (O - I) // 2 from the front. After a cut the
    same original channels still meet: `keep` renumbers the sources instead of shifting the padding. Where the sources
    form one run the forward pass is a slice and a pad, otherwise a gather.

    Shapes: (B, I, H, W) -> (B, O, ceil(H / stride), ceil(W / stride)).
    Source (exact): He et al., Deep residual learning, CVPR 2016, section 4.2, option A.
    """

    source: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if in_channels > out_channels:
            raise ValueError(
                f"ChannelMap: {in_channels} input channels do not fit into {out_channels}; option A only widens."
            )
        front = (out_channels - in_channels) // 2
        self.in_channels = in_channels
        self.stride = stride
        self.register_buffer("source", torch.empty(0, dtype=torch.long), persistent=False)
        self._set_source([ZERO] * front + [*range(in_channels)] + [ZERO] * (out_channels - in_channels - front))

    @property
    def out_channels(self) -> int:
        """How many channels come out."""
        return len(self.source)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """The shortcut's value, aligned with the residual branch."""
        picked = x_BIHW[:, :, :: self.stride, :: self.stride]
        if self._run is None:
            zero = torch.zeros_like(picked[:, :1])
            return torch.cat([picked, zero], dim=1)[:, self.source]
        start, length, front = self._run
        back = self.out_channels - front - length
        if length < self.in_channels:
            picked = picked[:, start : start + length]
        return F.pad(picked, (0, 0, 0, 0, front, back)) if front or back else picked

    def keep_inputs(self, kept: Sequence[int]) -> None:
        """Keep these input channels, in this order; outputs fed by any other become zero."""
        new_position = {old: new for new, old in enumerate(kept)}
        self.in_channels = len(kept)
        self._set_source([new_position.get(old, ZERO) for old in self.sources()])

    def keep_outputs(self, kept: Sequence[int]) -> None:
        """Keep these output channels, in this order."""
        sources = self.sources()
        self._set_source([sources[old] for old in kept])

    def sources(self) -> list[int]:
        """The input channel behind each output channel, -1 where there is none."""
        return cast("list[int]", self.source.tolist())

    def extra_repr(self) -> str:
        """The widths and the stride, for print(model)."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"

    def _set_source(self, source: Sequence[int]) -> None:
        self._run = _one_run(source)
        self.source = torch.tensor(list(source), dtype=torch.long, device=self.source.device)


def _one_run(source: Sequence[int]) -> tuple[int, int, int] | None:
    """(first input, length, first output) where the sources are one ascending run between zeros, else None."""
    fed = [position for position, value in enumerate(source) if value != ZERO]
    if not fed:
        return None
    front, length, start = fed[0], len(fed), source[fed[0]]
    return (start, length, front) if list(source[front : front + length]) == [*range(start, start + length)] else None

"""Channel groups as their layers hold them: the weights of every channel, and what vanishes with one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .cost import CostModel, removed_at
from .criterion import Filters, GroupWeights
from .groups import MATRIX_LAYERS, CannotCut, ChannelGroup

# Shape letters: K channels that one layer holds, N weights of one of them; O output channels, I input channels of a
# convolution, T taps of its kernel.

_Conv = nn.modules.conv._ConvNd
_BatchNorm = nn.modules.batchnorm._BatchNorm


def group_weights(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    cost: CostModel,
    *,
    gradients: Mapping[str, Tensor] | None = None,
) -> dict[str, GroupWeights]:
    """What the layers of every group that may be cut hold of its channels; on the CPU, in float64.

    A row is what one channel has in one layer: of a producer its filter, of a consumer the slice that reads it. A
    depthwise convolution produces its channels; a channel map holds nothing. A linear behind a flatten has several
    columns for one channel, side by side in its row. A layer that has more positions for some channels than for others
    comes in several parts.

    gradients: parameter name -> the gradient of the loss, summed over images, of the parameter's shape. Producers and
    scales show it; no criterion asks for those of consumers.
    Raises: CannotCut for a layer whose weight is no parameter of its own.
    Cost: a copy of the weights in float64, twice where a layer's channels are both produced and read.
    """
    return {group.layer: _of_group(model, group, cost, gradients or {}) for group in groups if group.protected is None}


def weight_names(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[str]:
    """The parameters that `group_weights` reads, by name, each once."""
    members = (member for group in groups if group.protected is None for member in group.members)
    names = dict.fromkeys(f"{member.layer}.weight" for member in members)
    held = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if name in held and _holds_channels(model.get_submodule(name.rpartition(".")[0]))]


def _of_group(model: nn.Module, group: ChannelGroup, cost: CostModel, gradients: Mapping[str, Tensor]) -> GroupWeights:
    places = {channel: place for place, channel in enumerate(group.channels)}
    held: dict[str, list[Filters]] = {"out": [], "in": [], "scale": []}
    for (layer, side), positions in _positions(group, places).items():
        try:
            module = model.get_submodule(layer)
        except AttributeError:  # a free parameter, such as a layer scale
            continue
        if isinstance(module, MATRIX_LAYERS):
            held[side] += _filters(layer, module, side, positions, gradients if side == "out" else {})
        elif isinstance(module, _BatchNorm) and module.weight is not None:
            held["scale"] += _filters(layer, module, side, positions, gradients)
    macs, params = cost.gone_with(removed_at([group], {group.layer: group.width - 1}))
    return GroupWeights(
        group.layer, group.width, tuple(held["out"]), tuple(held["in"]), tuple(held["scale"]), macs, params
    )


def _positions(group: ChannelGroup, places: Mapping[int, int]) -> dict[tuple[str, str], dict[int, list[int]]]:
    """Layer and side -> place in the group -> that side's positions, ascending and each once."""
    found: dict[tuple[str, str], dict[int, set[int]]] = {}
    for member in group.members:
        side = found.setdefault((member.layer, member.side), {})
        for position, root in zip(member.positions, member.roots, strict=True):
            side.setdefault(places[root], set()).add(position)
    return {key: {place: sorted(side[place]) for place in sorted(side)} for key, side in found.items()}


def _filters(
    layer: str,
    module: nn.Module,
    side: str,
    positions: Mapping[int, Sequence[int]],
    gradients: Mapping[str, Tensor],
) -> Iterator[Filters]:
    """What the layer holds, in one part for each number of positions that a channel has there."""
    layout = _Layout.of(module, side)
    gradient = gradients.get(f"{layer}.weight")
    for count in sorted({len(of) for of in positions.values()}):
        channels = tuple(place for place, of in positions.items() if len(of) == count)
        index = torch.tensor([positions[place] for place in channels])
        values = layout.rows(_own_weight(layer, module), index)
        yield Filters(layer, channels, values, None if gradient is None else layout.rows(gradient, index), layout.taps)


@dataclass(frozen=True)
class _Layout:
    """Where a weight tensor holds its channels: `axis` of (groups, per group on axis 0, per group on axis 1, T).

    axis 1: the channels are numbered along the first axis of the tensor; axis 2: along the second, anew in each group.
    """

    axis: int
    groups: int
    taps: int

    @classmethod
    def of(cls, module: nn.Module, side: str) -> "_Layout":
        if not isinstance(module, _Conv):
            return cls(1 if side == "out" else 2, 1, 1)
        first = side == ("in" if module.transposed else "out")
        return cls(1 if first else 2, module.groups, prod(module.kernel_size))

    def rows(self, weight: Tensor, index_Kn: Tensor) -> Tensor:
        """The weights at each channel's positions, side by side. Shapes: (K, n) positions -> (K, N) float64."""
        whole = weight.detach().double().cpu()
        split_GabT = whole.reshape(self.groups, len(whole) // self.groups, -1, self.taps)
        own = split_GabT if self.axis == 1 else split_GabT.transpose(1, 2)
        return own.flatten(0, 1)[index_Kn].flatten(1)


def _own_weight(layer: str, module: nn.Module) -> nn.Parameter:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise CannotCut(
            f"'{layer}' computes its weight from others (a weight norm, a parametrisation); it cannot be cut. "
            "Merge it first: torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm."
        )
    return weight


def _holds_channels(module: nn.Module) -> bool:
    return isinstance(module, (*MATRIX_LAYERS, _BatchNorm))

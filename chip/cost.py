"""What a network costs, dense and after any cut: multiply-accumulates and parameters, by counting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .groups import MATRIX_LAYERS, ChannelGroup

Side = tuple[str, Literal["in", "out"]]  # one side of one layer
Removed = Mapping[Side, float]  # how many of that side's positions go


@dataclass(frozen=True)
class Cost:
    """macs: multiply-accumulates of convolutions and linears for one image; params: all parameters."""

    macs: int
    params: int


@dataclass(frozen=True)
class _Matrix:
    """A convolution or linear: rows x columns x taps weights, used at so many positions."""

    rows: int
    columns: int
    taps: int
    groups: int
    depthwise: bool
    bias: bool
    positions: int

    def weights(self, rows_gone: float, columns_gone: float) -> float:
        rows = self.rows - rows_gone
        columns = self.columns / self.groups if self.depthwise else (self.columns - columns_gone) / self.groups
        return rows * columns * self.taps


class CostModel:
    """Counts once on the dense network; every later question is arithmetic.

    A layer that runs several times in one forward pass counts every time. Layers that the pass never reaches cost
    parameters only.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        positions = _positions(model, example)
        self._matrices = {
            name: _matrix(module, positions.get(name, 0))
            for name, module in model.named_modules()
            if isinstance(module, MATRIX_LAYERS)
        }
        self._per_channel = {
            name: sum(p.numel() for p in module.parameters(recurse=False)) / width
            for name, module in model.named_modules()
            if name not in self._matrices and (width := _channel_width(module))
        }
        self._per_channel |= {
            name: 1.0
            for name, _ in model.named_parameters()
            if (owner := name.rpartition(".")[0]) not in self._matrices and owner not in self._per_channel
        }
        self._params = sum(p.numel() for p in model.parameters())
        self.dense = self.after({})

    def layer_macs(self, removed: Removed) -> dict[str, float]:
        """The multiply-accumulates of every convolution and linear once these positions are gone."""
        return {
            name: matrix.weights(removed.get((name, "out"), 0), removed.get((name, "in"), 0)) * matrix.positions
            for name, matrix in self._matrices.items()
        }

    def after(self, removed: Removed) -> Cost:
        """The cost once these positions are gone. Fractions are allowed and rounded at the end."""
        macs, params = self._left(removed)
        return Cost(round(macs), round(params))

    def gone_with(self, removed: Removed) -> tuple[float, float]:
        """The multiply-accumulates and the parameters that vanish with these positions, not rounded."""
        before, after = self._left({}), self._left(removed)
        return before[0] - after[0], before[1] - after[1]

    def _left(self, removed: Removed) -> tuple[float, float]:
        params = float(self._params)
        for name, matrix in self._matrices.items():
            rows, columns = removed.get((name, "out"), 0), removed.get((name, "in"), 0)
            weights = matrix.weights(rows, columns)
            params -= matrix.weights(0, 0) - weights + (rows if matrix.bias else 0)
        for (name, side), count in removed.items():
            if side == "out" and name in self._per_channel:
                params -= self._per_channel[name] * count
        return sum(self.layer_macs(removed).values()), params


def removed_at(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> dict[Side, float]:
    """How many positions go on every side when each named group keeps so many channels, evenly spread."""
    removed: dict[Side, float] = {}
    for group in groups:
        share = 1 - widths.get(group.layer, group.width) / group.width
        for member in group.members:
            side = (member.layer, member.side)
            removed[side] = removed.get(side, 0) + share * len(member.positions)
    return removed


def removed_by(groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> dict[Side, float]:
    """How many positions go on every side when each named group keeps exactly these channels."""
    removed: dict[Side, float] = {}
    for group in groups:
        gone = set(group.channels) - set(kept.get(group.layer, group.channels))
        for member in group.members:
            side = (member.layer, member.side)
            removed[side] = removed.get(side, 0) + sum(root in gone for root in member.roots)
    return removed


def paper_flops(model: nn.Module, example: Tensor) -> int:
    """What CHIP's authors print for a pruned net: multiply-accumulates, plus convolution biases, plus 2 per BN value.

    Their dense figures leave the batch norms out, so their reductions are 1 - paper_flops(pruned) / macs(dense).
    Source (code): the counts of the README of Eclipsess/CHIP_NeurIPS2021 come out to the digit.
    """
    positions = _positions(model, example)
    total = CostModel(model, example).dense.macs
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.bias is not None:
            total += module.out_channels * positions.get(name, 0)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            total += 2 * module.num_features * positions.get(name, 0)
    return total


def _positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """At how many places each layer is applied for one image."""
    counted: dict[str, int] = {}

    def counter(name: str, module: nn.Module):  # noqa: ANN202 (a hook)
        def count(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            source = inputs[0] if inputs else next(iter(named.values()))
            spread = source if getattr(module, "transposed", False) else output
            channels = spread.shape[-1] if isinstance(module, nn.Linear) else spread.shape[1]
            counted[name] = counted.get(name, 0) + spread.numel() // (spread.shape[0] * channels)

        return count

    counting = (*MATRIX_LAYERS, nn.modules.batchnorm._BatchNorm)
    hooks = [
        module.register_forward_hook(counter(name, module), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, counting)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return counted


def _matrix(module: nn.Module, positions: int) -> _Matrix:
    if isinstance(module, nn.Linear):
        return _Matrix(
            module.out_features,
            module.in_features,
            taps=1,
            groups=1,
            depthwise=False,
            bias=module.bias is not None,
            positions=positions,
        )
    assert isinstance(module, nn.modules.conv._ConvNd)
    taps = int(torch.tensor(module.kernel_size).prod())
    depthwise = module.groups == module.out_channels > 1
    return _Matrix(
        module.out_channels, module.in_channels, taps, module.groups, depthwise, module.bias is not None, positions
    )


def _channel_width(module: nn.Module) -> int:
    """How many channels a per-channel layer with parameters has, else 0."""
    match module:
        case nn.modules.batchnorm._BatchNorm() | nn.modules.instancenorm._InstanceNorm():
            return module.num_features
        case nn.LayerNorm():
            return int(module.normalized_shape[-1])
        case nn.GroupNorm():
            return module.num_channels
        case nn.PReLU():
            return module.num_parameters if module.num_parameters > 1 else 0
        case _:
            return 0

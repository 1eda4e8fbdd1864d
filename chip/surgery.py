"""Apply a plan to a copy of the dense model, then prove that the copy computes what the plan says."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .cost import CostModel, Side
from .groups import MATRIX_LAYERS, PER_CHANNEL_LAYERS, CannotCut, ChannelGraph, ChannelGroup
from .plan import PrunePlan
from .shortcut import ZERO, ChannelMap

TOLERANCE = 1e-10  # float64: four digits above the rounding of the deepest networks seen
PROOF_IMAGES = 3
REDRAWS = 4  # how often constants are drawn again where a consumer of cut channels turns out to be dead


class SurgeryRefused(RuntimeError):
    """The cut network does not compute what the plan says; it must not be used."""


def apply_plan(dense: nn.Module, plan: PrunePlan, example: Tensor, *, weights: bool = True) -> nn.Module:
    """A pruned copy of the dense model, in evaluation mode; the dense model stays as it is.

    weights=False skips the check of the dense weights: for rebuilding the structure before loading pruned tensors.
    Raises: ValueError when the plan was made for another model; CannotCut or SurgeryRefused when the cut goes wrong.
    """
    plan.require_model(dense, weights=weights)
    pruned = copy.deepcopy(dense)
    groups = _cut(pruned, plan, example)
    _check(dense, pruned, plan, groups, example)
    return pruned


def prove(dense: nn.Module, plan: PrunePlan, example: Tensor, *, seed: int = 0) -> float:
    """The largest relative gap between the cut network and the dense one with the same channels silenced.

    In float64, on copies whose weights, biases, norms and free parameters are redrawn and whose batch-norm statistics
    are set by one forward pass (a freshly initialised GoogLeNet ignores its input: any cut would pass). In the dense
    copy the columns of every consumer that read a cut channel are zero, and layer and group norms see kept channels
    only. Every consumer of cut channels must matter to the output, or the comparison would prove nothing about it.
    Raises: SurgeryRefused when the gap exceeds 1e-10, or naming a consumer that stays dead however often the constants
    are redrawn.
    """
    groups = _cut(copy.deepcopy(dense), plan, example)
    redrawn, images = _living(dense, example, groups, plan.kept, seed)
    pruned = copy.deepcopy(redrawn)
    _cut(pruned, plan, example.double())
    silenced = copy.deepcopy(redrawn)
    _silence(silenced, groups, plan.kept)
    with torch.no_grad():
        expected, got = (_flat(net.eval()(images)) for net in (silenced, pruned))
    if got.shape != expected.shape:
        raise SurgeryRefused(f"the cut network's output has {got.shape[-1]} values an image, not {expected.shape[-1]}.")
    gap = float((got - expected).abs().max()) / float(expected.abs().max())
    if not gap <= TOLERANCE:
        raise SurgeryRefused(
            f"the cut network differs from the dense one with the same channels silenced by {gap:.1e} (relative, "
            f"float64; at most {TOLERANCE:.0e} is rounding). Its channels are wired in a way that torch-pruning did "
            "not see; protect the layers concerned or leave this network dense."
        )
    return gap


def _cut(model: nn.Module, plan: PrunePlan, example: Tensor) -> list[ChannelGroup]:
    """Cut in place; returns the groups of the uncut network."""
    graph = ChannelGraph(model, example)
    groups = {group.layer: group for group in graph.groups}
    for cut in plan.groups:
        group = groups.get(cut.layer)
        if group is None or group.width != cut.width_before or not set(cut.kept) <= set(group.channels):
            raise ValueError(f"this plan does not fit the model: group '{cut.layer}' is another one here.")
        if cut.removed and group.protected:
            raise ValueError(f"this plan cuts '{cut.layer}', which must not be cut: {group.protected}.")
        if cut.removed:
            graph.cut(cut.layer, cut.removed)
    for (layer, side), order in _new_orders(graph.groups, plan.kept).items():
        _reorder(model.get_submodule(layer) if _is_module(model, layer) else model.get_parameter(layer), side, order)
    return graph.groups


def _check(
    dense: nn.Module, pruned: nn.Module, plan: PrunePlan, groups: Sequence[ChannelGroup], example: Tensor
) -> None:
    for (layer, side), width in _planned_widths(groups, plan.kept).items():
        if not _is_module(pruned, layer):
            continue
        found = _width(pruned.get_submodule(layer), side)
        if found != width:
            raise SurgeryRefused(f"'{layer}' has {found} {side}put channels after the cut; the plan says {width}.")
    with torch.no_grad():
        try:
            after = pruned.eval()(example)
        except (RuntimeError, ValueError, IndexError, TypeError) as err:
            first = (str(err).splitlines() or [""])[0]
            raise SurgeryRefused(
                f"the cut network does not run ({first}): a width is kept outside its layers. It cannot be cut."
            ) from err
        before = copy.deepcopy(dense).eval()(example)
    if _flat(after).shape != _flat(before).shape:
        raise SurgeryRefused("the cut network's output has another shape: its output layer was not recognised.")
    cost = CostModel(pruned, example).dense
    if (cost.macs, cost.params) != (plan.macs_after, plan.params_after):
        raise SurgeryRefused(
            f"the cut network has {cost.macs:,} MACs and {cost.params:,} parameters; the plan says "
            f"{plan.macs_after:,} and {plan.params_after:,}."
        )


def _planned_widths(groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> dict[Side, int]:
    widths: dict[Side, int] = {}
    whole: dict[Side, int] = {}
    for group in groups:
        stay = set(kept.get(group.layer, group.channels))
        for member in group.members:
            side = (member.layer, member.side)
            widths[side] = widths.get(side, 0) + sum(root in stay for root in member.roots)
            whole[side] = whole.get(side, 0) + len(member.positions)
    return widths


def _new_orders(groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> dict[Side, list[int]]:
    """The new order of every side whose kept channels are not ascending, in the numbering after the cut."""
    sides: dict[Side, dict[int, list[int]]] = {}
    for group in groups:
        order = list(kept.get(group.layer, group.channels))
        stay = set(order)
        rank = {channel: place for place, channel in enumerate(order)}
        for member in group.members:
            pairs = [(p, r) for p, r in zip(member.positions, member.roots, strict=True) if r in stay]
            slots = sorted(p for p, _ in pairs)
            filled = [p for p, _ in sorted(pairs, key=lambda pair: (rank[pair[1]], pair[0]))]
            sides.setdefault((member.layer, member.side), {}).update(zip(slots, ([p] for p in filled), strict=True))
    orders: dict[Side, list[int]] = {}
    for side, filled in sides.items():
        slots = sorted(filled)
        number = {position: place for place, position in enumerate(slots)}
        order = [number[filled[slot][0]] for slot in slots]
        if order != list(range(len(order))):
            orders[side] = order
    return orders


def _reorder(thing: nn.Module | nn.Parameter, side: str, order: list[int]) -> None:
    index = torch.tensor(order)
    match thing:
        case ChannelMap():
            thing.keep_inputs(order) if side == "in" else thing.keep_outputs(order)
        case nn.Linear() | nn.modules.conv._ConvNd():
            rows = 1 if isinstance(thing, nn.modules.conv._ConvTransposeNd) else 0
            grouped = thing.groups > 1 if isinstance(thing, nn.modules.conv._ConvNd) else False
            if grouped and not (side == "out" and thing.groups == thing.out_channels):
                raise CannotCut("a grouped convolution cannot be reordered.")
            thing.weight.data = thing.weight.data.index_select(rows if side == "out" else 1 - rows, index)
            if side == "out" and thing.bias is not None:
                thing.bias.data = thing.bias.data[index]
        case nn.modules.batchnorm._BatchNorm():
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(thing, name)
                if tensor is not None:
                    tensor.data = tensor.data[index]
        case _:
            raise CannotCut(f"a {type(thing).__name__} cannot be reordered.")


def _living(
    dense: nn.Module, example: Tensor, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]], seed: int
) -> tuple[nn.Module, Tensor]:
    """A redrawn copy in which every consumer of cut channels has influence on the output; and the images used."""
    dead: str | None = None
    for attempt in range(REDRAWS):
        redrawn, images = _redrawn(dense, example, seed + attempt)
        dead = _dead_consumer(redrawn, images, groups, kept)
        if dead is None:
            return redrawn, images
    raise SurgeryRefused(
        f"what '{dead}' reads never reaches the output, whatever the constants: the cut cannot be proved there."
    )


def _redrawn(dense: nn.Module, example: Tensor, seed: int) -> tuple[nn.Module, Tensor]:
    """A float64 copy, weights and constants redrawn, batch-norm statistics measured; and the images used."""
    generator = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(dense).cpu().double().eval()

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.data = torch.empty(tensor.shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    for module in net.modules():
        scale = 0.25 if isinstance(module, nn.PReLU) else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, MATRIX_LAYERS) and name == "weight":
                fan_in = max(1, parameter[0].numel())
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * fan_in**-0.5
                continue
            centre = 0.0 if name == "bias" else scale
            uniform(parameter, centre - scale / 2, centre + scale / 2)
    images = torch.randn((PROOF_IMAGES, *example.shape[1:]), dtype=torch.float64, generator=generator)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        net(images)
    return net.eval(), images


def _dead_consumer(
    net: nn.Module, images: Tensor, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> str | None:
    """The first consumer whose columns for cut channels have no influence on the output; None when all have."""
    out = _flat(net(images))
    weights = {name: layer.weight for name, layer in net.named_modules() if isinstance(layer, MATRIX_LAYERS)}
    mixed = (out * torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))).sum()
    slopes = dict(zip(weights, torch.autograd.grad(mixed, list(weights.values()), allow_unused=True), strict=True))
    for group in groups:
        stay = set(kept.get(group.layer, group.channels))
        for member in group.consumers:
            gone = [p for p, root in zip(member.positions, member.roots, strict=True) if root not in stay]
            if not gone or member.layer not in weights:
                continue
            slope = slopes[member.layer]
            if slope is None or not bool(_columns(net.get_submodule(member.layer), slope, gone).any()):
                return member.layer
    return None


def _columns(module: nn.Module, weight: Tensor, positions: Sequence[int]) -> Tensor:
    """The entries of a weight that read these input positions."""
    match module:
        case nn.modules.conv._ConvTransposeNd():
            return weight[list(positions)]
        case nn.modules.conv._ConvNd():
            columns, rows = module.in_channels // module.groups, module.out_channels // module.groups
            blocks = weight.unflatten(0, (module.groups, rows))
            return torch.stack([blocks[p // columns, :, p % columns] for p in positions])
        case _:
            return weight[:, list(positions)]


def _silence(net: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> None:
    """Zero the columns that read a cut channel; let layer and group norms see kept channels only."""
    for group in groups:
        stay = set(kept.get(group.layer, group.channels))
        for member in group.members:
            gone = [p for p, root in zip(member.positions, member.roots, strict=True) if root not in stay]
            if not gone or not _is_module(net, member.layer):
                continue
            module = net.get_submodule(member.layer)
            if member.side == "in":
                _zero_columns(module, gone)
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                _replace(net, member.layer, _KeptNorm(module, gone))
            elif isinstance(module, _KeptNorm):
                module.drop(gone)


def _zero_columns(module: nn.Module, gone: Sequence[int]) -> None:
    with torch.no_grad():
        match module:
            case ChannelMap():
                module._set_source([ZERO if source in set(gone) else source for source in module.sources()])
            case nn.Linear():
                module.weight[:, list(gone)] = 0
            case nn.modules.conv._ConvTransposeNd():
                module.weight[list(gone)] = 0
            case nn.modules.conv._ConvNd():
                columns, rows = module.in_channels // module.groups, module.out_channels // module.groups
                for position in gone:
                    block = position // columns
                    module.weight[block * rows : (block + 1) * rows, position % columns] = 0
            case _:
                raise CannotCut(f"a {type(module).__name__} reads channels in a way that cannot be silenced.")


class _KeptNorm(nn.Module):
    """A layer or group norm of a wide map that computes its statistics over the kept channels only."""

    def __init__(self, norm: nn.LayerNorm | nn.GroupNorm, gone: Sequence[int]) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm)
        width = norm.num_channels if isinstance(norm, nn.GroupNorm) else int(norm.normalized_shape[-1])
        self.kept = [p for p in range(width) if p not in set(gone)]
        self.width = width

    def drop(self, gone: Sequence[int]) -> None:
        """Let it see fewer channels still."""
        self.kept = [p for p in self.kept if p not in set(gone)]

    def forward(self, x: Tensor) -> Tensor:
        """The norm of the kept channels in their places; the others are passed on as they are."""
        dim = x.ndim - 1 if type(self.norm) is nn.LayerNorm else 1
        index = torch.tensor(self.kept)
        small = copy.deepcopy(self.norm)
        if small.weight is not None:
            small.weight = nn.Parameter(small.weight[index])
        if small.bias is not None:
            small.bias = nn.Parameter(small.bias[index])
        if isinstance(small, nn.GroupNorm):
            small.num_channels = len(index)
        else:
            small.normalized_shape = (len(index),)
        return x.index_copy(dim, index, small(x.index_select(dim, index)))


def _replace(net: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, new)


def _is_module(net: nn.Module, name: str) -> bool:
    try:
        net.get_submodule(name)
    except AttributeError:
        return False
    return True


def _width(module: nn.Module, side: str) -> int:
    match module:
        case nn.Linear():
            return module.out_features if side == "out" else module.in_features
        case ChannelMap() | nn.modules.conv._ConvNd():
            return module.out_channels if side == "out" else module.in_channels
        case nn.modules.batchnorm._BatchNorm() | nn.modules.instancenorm._InstanceNorm():
            return module.num_features
        case nn.GroupNorm():
            return module.num_channels
        case nn.LayerNorm():
            return int(module.normalized_shape[-1])
        case nn.PReLU():
            return module.num_parameters
        case _:
            assert not isinstance(module, PER_CHANNEL_LAYERS)
            raise CannotCut(f"a {type(module).__name__} has no channels to count.")


def _flat(out: object) -> Tensor:
    """All outputs side by side, one row an image."""
    if isinstance(out, Tensor):
        return out.flatten(1)
    values = out.values() if isinstance(out, Mapping) else out
    assert isinstance(values, Sequence) or isinstance(out, Mapping)
    return torch.cat([_flat(value) for value in values], dim=1)  # pyright: ignore[reportGeneralTypeIssues]

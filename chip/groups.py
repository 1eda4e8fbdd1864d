"""Which channels of a network must be cut together: our typed view of torch-pruning's DependencyGraph and Group."""

import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import DependencyGraph, Group, Node
from torch_pruning.pruner.function import BasePruningFunc

from .shortcut import ChannelMap

TRACE_LIMIT_S = 120
MATRIX_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)  # rows and columns: the layers that produce and consume channels
PER_CHANNEL_LAYERS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
)


class CannotCut(RuntimeError):
    """This network cannot be cut rightly; the sentence says why."""


@dataclass(frozen=True)
class Member:
    """One side of one layer in a group: its position positions[k] belongs to the root's channel roots[k].

    side "out": rows of a producer, or the values of a per-channel layer; "in": columns of a consumer.
    A linear layer behind a flatten has several positions for one channel.
    """

    layer: str
    side: Literal["in", "out"]
    positions: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together, named by the first layer that produces them.

    channels: the root layer's output channels in this group, nearly always all of them.
    atoms: sets of channels that can only be cut together: one channel each, or, where a grouped convolution or a group
    norm is coupled, the same position of every one of its groups.
    protected: why the group must not be cut, or None.
    """

    layer: str
    channels: tuple[int, ...]
    members: tuple[Member, ...]
    atoms: tuple[tuple[int, ...], ...]
    protected: str | None

    @property
    def width(self) -> int:
        """How many channels the group has."""
        return len(self.channels)

    @property
    def coupled(self) -> list[str]:
        """The other layers whose outputs are cut with the root's."""
        return [member.layer for member in self.members if member.side == "out" and member.layer != self.layer]

    @property
    def consumers(self) -> list[Member]:
        """The convolutions, linears and channel maps that read the group's channels."""
        return [member for member in self.members if member.side == "in"]


def why_protected(groups: Sequence[ChannelGroup]) -> str:
    """Each reason with the first three groups it holds for, and how many more."""
    reasons: dict[str, list[str]] = {}
    for group in groups:
        reasons.setdefault(group.protected or "", []).append(f"'{group.layer}'")
    parts = [
        f"{', '.join(layers[:3])}{f' and {len(layers) - 3} more' if len(layers) > 3 else ''}: {reason}"
        for reason, layers in reasons.items()
    ]
    return "; ".join(parts) or "it has no convolution and no linear layer"


class ChannelMapPruner(BasePruningFunc):
    """Teaches torch-pruning the option-A shortcut: its inputs and outputs are cut independently."""

    TARGET_MODULES = ChannelMap  # pyright: ignore[reportAssignmentType] (annotated as None upstream)

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop these output channels."""
        assert isinstance(layer, ChannelMap)
        layer.keep_outputs(_others(layer.out_channels, idxs))
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop these input channels."""
        assert isinstance(layer, ChannelMap)
        layer.keep_inputs(_others(layer.in_channels, idxs))
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        """The output width."""
        assert isinstance(layer, ChannelMap)
        return layer.out_channels

    def get_in_channels(self, layer: nn.Module) -> int:
        """The input width."""
        assert isinstance(layer, ChannelMap)
        return layer.in_channels


class ChannelGraph:
    """The channel groups of one network, and the means to cut them in place.

    The network is put into evaluation mode. Groups come in the order of the network's own layer list.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """Raises: CannotCut with the reason when the network cannot be traced."""
        self.model = model
        self._names = {id(thing): name for name, thing in [*model.named_modules(), *model.named_parameters()]}
        self._graph, output_functions = _traced(model, example)
        self._outputs = {
            node
            for node in self._graph.module2node.values()
            if not node.outputs or node.grad_fn in output_functions or node.type == ops.OPTYPE.OUTPUT
        }
        self.groups = self._all_groups()

    def cut(self, layer: str, channels: Sequence[int]) -> None:
        """Remove these output channels of that root layer, and whatever is coupled with them.

        Raises: CannotCut when torch-pruning fails on the way.
        """
        with _translated(f"cutting {len(channels)} channels of '{layer}'"):
            self._group(self.model.get_submodule(layer), channels).prune(record_history=False)

    def _all_groups(self) -> list[ChannelGroup]:
        groups: list[ChannelGroup] = []
        covered: dict[str, set[int]] = {}
        for name, module in self.model.named_modules():
            if not isinstance(module, MATRIX_LAYERS) or module not in self._graph.module2node:
                continue
            free = [c for c in range(_out_width(module)) if c not in covered.get(name, ())]
            if not free:
                continue
            with _translated(f"following the channels of '{name}'"):
                group = self._typed(name, free, self._group(module, free))
            groups.append(group)
            for member in group.members:
                if member.side == "out":
                    covered.setdefault(member.layer, set()).update(member.positions)
        return groups

    def _group(self, module: nn.Module, channels: Sequence[int]) -> Group:
        pruner = self._graph.get_pruner_of_module(module)
        assert pruner is not None
        return self._graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))

    def _typed(self, name: str, channels: list[int], group: Group) -> ChannelGroup:
        members = tuple(self._members(group))
        reason = self._protection(group)
        blocks = [
            (member, count)
            for member in members
            if (count := _position_groups(self._thing(member.layer), member.side)) > 1
        ]
        atoms, broken = _atoms(channels, blocks, self._thing)
        if len({len(atom) for atom in atoms}) > 1:
            broken = "its grouped layers do not split it evenly"
        if len(channels) != _out_width(self.model.get_submodule(name)):
            broken = f"only a part of '{name}' belongs to it, the rest to another group"
        return ChannelGroup(name, tuple(channels), members, atoms, reason or broken)

    def _members(self, group: Group) -> Iterator[Member]:
        for item in group.items:
            target = item.dep.target.module
            if id(target) not in self._names or (isinstance(target, nn.PReLU) and target.num_parameters == 1):
                continue  # an operation, or one slope for all channels: nothing of it goes
            separate = isinstance(target, (*MATRIX_LAYERS, ChannelMap)) and not _depthwise(target)
            reads = separate and self._graph.is_in_channel_pruning_fn(item.dep.handler)
            roots = item.root_idxs  # pyright: ignore[reportAttributeAccessIssue] (set on the instance by torch-pruning)
            yield Member(self._names[id(target)], "in" if reads else "out", tuple(item.idxs), tuple(roots))

    def _protection(self, group: Group) -> str | None:
        for item in group.items:
            node: Node = item.dep.target
            target = node.module
            reads = (
                isinstance(target, MATRIX_LAYERS)
                and not _depthwise(target)
                and self._graph.is_in_channel_pruning_fn(item.dep.handler)
            )
            if node in self._outputs and not reads:
                return "its channels reach the network's output"
            known = (*MATRIX_LAYERS, *PER_CHANNEL_LAYERS, ChannelMap, nn.Parameter)
            if id(target) in self._names and not isinstance(target, known):
                return f"it is coupled with '{self._names[id(target)]}', a {type(target).__name__}"
        return None

    def _thing(self, name: str) -> nn.Module | nn.Parameter:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return self.model.get_parameter(name)


def _others(width: int, removed: Sequence[int]) -> list[int]:
    gone = set(removed)
    return [position for position in range(width) if position not in gone]


def _depthwise(module: object) -> bool:
    """As torch-pruning draws the line: its input and output channels are one and the same."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def _out_width(module: nn.Module) -> int:
    width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    assert isinstance(width, int)
    return width


def _position_groups(thing: nn.Module | nn.Parameter, side: str) -> int:
    """Into how many groups a layer splits its channels on that side; within each the same positions must be kept."""
    if isinstance(thing, nn.modules.conv._ConvNd) and not _depthwise(thing):
        return thing.groups
    if isinstance(thing, nn.GroupNorm) and side == "out":
        return thing.num_groups
    return 1


def _atoms(
    channels: list[int], blocks: list[tuple[Member, int]], thing: Any
) -> tuple[tuple[tuple[int, ...], ...], str | None]:
    """The finest partition of the channels that respects the positions of every grouped layer."""
    parent = {channel: channel for channel in channels}

    def find(channel: int) -> int:
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    for member, count in blocks:
        layer = thing(member.layer)
        if isinstance(layer, nn.GroupNorm):
            width = layer.num_channels
        else:
            width = layer.out_channels if member.side == "out" else layer.in_channels
        if len(member.positions) != width:
            return tuple((c,) for c in channels), f"only a part of the grouped layer '{member.layer}' belongs to it"
        first: dict[int, int] = {}
        for position, root in zip(member.positions, member.roots, strict=True):
            anchor = first.setdefault(position % (width // count), root)
            parent[find(root)] = find(anchor)
    sets: dict[int, list[int]] = {}
    for channel in channels:
        sets.setdefault(find(channel), []).append(channel)
    return tuple(tuple(members) for members in sets.values()), None


def _traced(model: nn.Module, example: Tensor) -> tuple[DependencyGraph, set[object]]:
    outputs: list[Tensor] = []

    def remember(out: object) -> object:
        outputs.extend(_tensors(out))
        return out

    with _translated("tracing the network"), torch.enable_grad():
        graph = DependencyGraph().build_dependency(
            model,
            example,
            forward_fn=_forward,
            output_transform=remember,
            customized_pruners={ChannelMap: ChannelMapPruner()},
            verbose=False,
        )
    return graph, {tensor.grad_fn for tensor in outputs}


def _forward(model: nn.Module, example: Any) -> Any:
    """torch-pruning 1.6's own call begins without the batch and drops whatever that raises, a Ctrl-C among it."""
    return model(example)


def _tensors(out: object) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from _tensors(value)


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """torch-pruning's own failures, and its endless loops, as one sentence."""
    try:
        with _time_limit(TRACE_LIMIT_S), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except TimeoutError as err:
        raise CannotCut(
            f"{doing}: torch-pruning's dependency graph did not end within {TRACE_LIMIT_S} s (known of Swin and "
            "MaxViT, whose windows fold pixels into channels); this network cannot be cut."
        ) from err
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as err:
        if isinstance(err, CannotCut):
            raise
        raise CannotCut(
            f"{doing}: torch-pruning cannot follow this network ({type(err).__name__}: {_first_line(err)}); it cannot "
            "be cut. Channel shuffles and uneven splits are known causes."
        ) from err


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds, where the platform can interrupt (POSIX, main thread)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(signum: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [""])[0][:160]

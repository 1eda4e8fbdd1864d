"""What the consumers of channel groups read: maps that stream by in a pass of the model, scored on the spot."""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .groups import MATRIX_LAYERS, CannotCut, ChannelGroup, Member
from .shortcut import ChannelMap

# Shape letters: B images, C channels, P values of one channel in one image, H W pixels.

_POOLS = frozenset({"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "mean", "amax"})
_MIXES = frozenset({"linear", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "einsum", "scaled_dot_product_attention"})
_ORIGIN = "_chip_deploy_pooled_from"

Score = Callable[[Tensor, tuple[int, int]], Tensor]
"""Maps (B, C, P) and the height and width of one of them -> what is kept of them, a row an image."""


class Reading(NamedTuple):
    """By which score, the root layer of which group, as which of its consumers reads it."""

    by: str
    layer: str
    consumer: str


class MapSink:
    """What the consumers of the groups read in one batch, put through every score that still wants the group.

    wanted: name of a score -> the groups that it is to see; may be made smaller from batch to batch.
    seconds: spent by each score on each group. On a GPU only until the work was queued.
    """

    def __init__(
        self,
        groups: Mapping[str, ChannelGroup],
        scores: Mapping[str, Score],
        *,
        join: Callable[[Sequence[Tensor], int], Tensor] | None = None,
    ) -> None:
        self.groups = groups
        self.scores = scores
        self.wanted: dict[str, Collection[str]] = {by: list(groups) for by in scores}
        self.join = join or _mean_of_calls
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._seen: list[_Seen] = []
        self._found: dict[Reading, list[Tensor]] = {}
        self._only_look = False

    def run(self, model: nn.Module, images: Tensor) -> tuple[Any, dict[Reading, Tensor]]:
        """The model's output, and what each score made of the maps: (B, C) or (B, C, P), one row an image.

        Where a consumer is called several times for one image, `join` makes one row of what it read.
        Raises: ValueError naming the layer, image and channel that are not finite.
        """
        output = self._pass(model, images)
        found = {reading: self.join(values, len(images)) for reading, values in self._found.items()}
        self._found = {}
        flags = [values.isfinite().all() for values in found.values()]
        if flags and not bool(torch.stack(flags).all()):
            self._only_look = True
            self._pass(model, images)
            raise AssertionError("a criterion gave no number for finite maps")
        return output, found

    def read(self, group: ChannelGroup, member: Member, x: Tensor, module: nn.Module) -> None:
        """Score what a consumer is about to read. Raises: CannotCut when the graph has its channels wrong."""
        asking = [by for by, layers in self.wanted.items() if group.layer in layers]
        if not asking:
            return
        pooled_from = getattr(x, _ORIGIN, None)
        tensor = x if pooled_from is None else pooled_from
        channels_last = isinstance(module, nn.Linear) and (pooled_from is None or tensor.ndim != 4)
        if max(member.positions) >= x.shape[-1 if isinstance(module, nn.Linear) else 1]:
            raise CannotCut(
                f"'{member.layer}' reads fewer channels of '{group.layer}' than the dependency graph says; this "
                "network cannot be cut."
            )
        started = time.perf_counter()
        maps_BCP, sides = _maps(tensor.detach(), member, channels_last=channels_last, spread=pooled_from is None)
        if self._only_look:
            _require_finite(maps_BCP, member.layer)
        elif not self._counted_already(group, member, tensor):
            for by in asking:
                values = self.scores[by](maps_BCP, sides)
                self._found.setdefault(Reading(by, group.layer, member.layer), []).append(values)
                self.seconds[by, group.layer] += time.perf_counter() - started
                started = time.perf_counter()

    def _pass(self, model: nn.Module, images: Tensor) -> Any:
        self._seen.clear()
        self._found = {}
        return model(images)

    def _counted_already(self, group: ChannelGroup, member: Member, tensor: Tensor) -> bool:
        """Whether another consumer read these very maps in this pass; remembers them if not.

        Tensors are told apart by identity and version: an address is given out again once a tensor is gone, and an
        activation in place changes what the same tensor holds.
        """
        for other in self._seen:
            same = (other.group, other.version, other.positions) == (group.layer, tensor._version, member.positions)
            if same and other.tensor() is tensor and other.layer != member.layer:
                return True
        self._seen.append(_Seen(group.layer, member.layer, member.positions, weakref.ref(tensor), tensor._version))
        return False


@dataclass(frozen=True)
class _Seen:
    """Maps that a consumer read in the present pass; the tensor is not kept alive."""

    group: str
    layer: str
    positions: tuple[int, ...]
    tensor: "weakref.ref[Tensor]"
    version: int


@contextmanager
def watched(model: nn.Module, sink: MapSink, *, gradients: bool = False) -> Iterator[None]:
    """The model in evaluation mode, its passes read by the sink; with gradients=True they can be differentiated.

    Every module's training mode and the hooks are afterwards as they were.
    """
    readers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in sink.groups.values():
        for member in _readers(model, group):
            readers.setdefault(member.layer, []).append((group, member))

    def reader(entries: list[tuple[ChannelGroup, Member]]) -> Callable[..., None]:
        def read(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            with torch.no_grad():
                for group, member in entries:
                    sink.read(group, member, x, module)

        return read

    with evaluating(model), ExitStack() as stack:
        for layer, entries in readers.items():
            handle = model.get_submodule(layer).register_forward_pre_hook(reader(entries), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        stack.enter_context(_PoolTracker())
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode is as before in the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def covered_places(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[tuple[str, str], list[int]]:
    """Group and consumer -> the places in the group of the channels that this consumer reads, ascending."""
    found: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        for member in _readers(model, group):
            read = set(member.roots)
            found[group.layer, member.layer] = [n for n, channel in enumerate(group.channels) if channel in read]
    return found


def side_by_side(values: Sequence[Tensor], images: int) -> Tensor:
    """All maps of one image as pixels of the same channels. Shapes: (n B, C, P) each -> (B, C, all pixels)."""
    rows = [value.reshape(images, -1, *value.shape[1:]).movedim(1, 2).flatten(2) for value in values]
    return torch.cat(rows, -1)


def _mean_of_calls(values: Sequence[Tensor], images: int) -> Tensor:
    """The mean over a consumer's calls, and over the maps of one image where a call sees several."""
    rows = [value.reshape(images, -1, *value.shape[1:]).mean(1) if len(value) != images else value for value in values]
    return rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)


def _require_finite(maps_BCP: Tensor, layer: str) -> None:
    finite_BC = torch.isfinite(maps_BCP).all(-1)
    if not bool(finite_BC.all()):
        image, channel = (~finite_BC).nonzero()[0].tolist()
        raise ValueError(
            f"the maps that '{layer}' reads: image {image}, channel {channel} is not finite, so the network cannot be "
            "scored. Look for weights or images that overflow."
        )


def _readers(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """The consumers that count: convolutions and linears; a channel map only where nothing else reads the group."""
    layers = [m for m in group.consumers if isinstance(model.get_submodule(m.layer), MATRIX_LAYERS)]
    return layers or [m for m in group.consumers if isinstance(model.get_submodule(m.layer), ChannelMap)]


def _maps(x: Tensor, member: Member, *, channels_last: bool, spread: bool) -> tuple[Tensor, tuple[int, int]]:
    """The group's rows among the channels of x, (B, C, P), in the order of `covered_places`, and their sides.

    A linear layer behind a flatten reads several values of one channel; they become that channel's P.
    """
    x = x.movedim(-1, 1) if channels_last and x.ndim > 2 else x
    rows_BCP = x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
    height, width = (x.shape[2], x.shape[3]) if x.ndim == 4 else (rows_BCP.shape[2], 1)
    if member.positions == tuple(range(rows_BCP.shape[1])) == member.roots:
        return rows_BCP, (height, width)
    by_root: dict[int, list[int]] = {}
    for position, root in zip(member.positions, member.roots, strict=True):
        by_root.setdefault(root, []).append(position)
    covered = sorted(by_root)
    if not spread:  # the pool's input: one map a channel, whatever the flatten behind the pool did
        index = torch.tensor([by_root[root][0] for root in covered], device=x.device)
        return rows_BCP.index_select(1, index), (height, width)
    if len({len(positions) for positions in by_root.values()}) > 1:
        raise CannotCut(
            f"'{member.layer}' reads some channels more often than others; their maps cannot be compared. Choose a "
            "criterion that reads weights."
        )
    index = torch.tensor([sorted(by_root[root]) for root in covered], device=x.device)
    picked_BCP = rows_BCP.index_select(1, index.flatten()).reshape(len(x), len(covered), -1)
    return picked_BCP, (index.shape[1] * height, width)


class _PoolTracker(TorchFunctionMode):
    """Marks what a global pool computed, and what is computed from it channel by channel, with the pool's input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is None or not isinstance(result, Tensor):
            return result
        origin = getattr(source, _ORIGIN, None)
        name = getattr(func, "__name__", "")
        if origin is not None and result.numel() == source.numel() and name not in _MIXES:
            setattr(result, _ORIGIN, origin)
        elif name in _POOLS and _is_global_pool(source, result):
            setattr(result, _ORIGIN, source)
        return result


def _is_global_pool(source: Tensor, result: Tensor) -> bool:
    return (
        source.ndim == 4
        and source.shape[2] * source.shape[3] > 1
        and result.shape[:2] == source.shape[:2]
        and result.numel() == source.shape[0] * source.shape[1]
    )

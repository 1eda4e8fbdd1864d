"""One pass of the model over plain images: what every channel group's consumers read, scored as it streams by."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .criterion import Criterion
from .groups import MATRIX_LAYERS, CannotCut, ChannelGroup, Member
from .shortcut import ChannelMap

# Shape letters: B images, C channels, P values of one channel in one image, H W pixels.

_POOLS = frozenset({"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "mean", "amax"})
_MIXES = frozenset({"linear", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "einsum", "scaled_dot_product_attention"})
_ORIGIN = "_chip_deploy_pooled_from"


@dataclass
class _Tally:
    """The scores of one group by one of its consumers, summed over images."""

    sums: Tensor
    covered: list[int]
    images: int = 0


@dataclass
class _Sink:
    groups: Mapping[str, ChannelGroup]
    criterion: Criterion
    tallies: dict[tuple[str, str], _Tally] = field(default_factory=dict)
    seen: list["_Seen"] = field(default_factory=list)

    def read(self, group: ChannelGroup, member: Member, x: Tensor, module: nn.Module) -> None:
        """Score what a consumer is about to read. Raises: CannotCut when the graph has its channels wrong."""
        pooled_from = getattr(x, _ORIGIN, None)
        tensor = x if pooled_from is None else pooled_from
        channels_last = isinstance(module, nn.Linear) and (pooled_from is None or tensor.ndim != 4)
        if max(member.positions) >= x.shape[-1 if isinstance(module, nn.Linear) else 1]:
            raise CannotCut(
                f"'{member.layer}' reads fewer channels of '{group.layer}' than the dependency graph says; this "
                "network cannot be cut."
            )
        maps_BCP, covered = _maps(tensor, member, channels_last=channels_last, spread=pooled_from is None)
        if self._counted_already(group, member, tensor):
            return
        try:
            scores_BC = self.criterion.score_maps(maps_BCP)
        except ValueError as err:
            raise ValueError(f"the maps that '{member.layer}' reads: {err} The network cannot be scored.") from err
        tally = self.tallies.setdefault(
            (group.layer, member.layer), _Tally(torch.zeros(len(covered), dtype=torch.float64), covered)
        )
        tally.sums += scores_BC.sum(0).cpu()
        tally.images += len(scores_BC)

    def _counted_already(self, group: ChannelGroup, member: Member, tensor: Tensor) -> bool:
        """Whether another consumer read these very maps in this pass; remembers them if not.

        Tensors are told apart by identity and version: an address is given out again once a tensor is gone, and an
        activation in place changes what the same tensor holds.
        """
        for other in self.seen:
            same = (other.group, other.version, other.positions) == (group.layer, tensor._version, member.positions)
            if same and other.tensor() is tensor and other.layer != member.layer:
                return True
        self.seen.append(_Seen(group.layer, member.layer, member.positions, weakref.ref(tensor), tensor._version))
        return False


@dataclass(frozen=True)
class _Seen:
    """Maps that a consumer read in the present pass; the tensor is not kept alive."""

    group: str
    layer: str
    positions: tuple[int, ...]
    tensor: "weakref.ref[Tensor]"
    version: int


def score_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The score of every channel of every group that may be cut.

    Maps are read where the consumers read them: at the input of each convolution or linear that takes the group's
    channels, or, where a global pool lies between, at the pool's input. Consumers that read the very same tensor count
    once. Rule for a group: each consumer's scores, averaged over images, are divided by their mean over the group's
    channels; the group's score is the average over its consumers. So every consumer has the same say, whatever the
    scale of its maps.

    Shapes: batches of (B, 3, H, W) -> group -> (C,) float64, in the order of the group's channels.
    Unit: none; 1 is an average channel, 0 a dead one.
    Cost: one forward pass and one small eigendecomposition per image and consumer; nothing is stored.
    Raises: ValueError naming the layer whose maps are not finite.
    """
    wanted = {group.layer: group for group in groups if group.protected is None}
    sink = _Sink(wanted, criterion)
    training = model.training
    done = 0
    try:
        model.eval()
        with torch.no_grad(), _hooked(model, sink), _PoolTracker():
            for batch in batches:
                sink.seen.clear()
                model(batch)
                done += len(batch)
                if progress is not None:
                    progress(done)
    finally:
        model.train(training)
    return {layer: _combined(group, sink.tallies) for layer, group in wanted.items()}


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


@contextmanager
def _hooked(model: nn.Module, sink: _Sink) -> Iterator[None]:
    """Pre-hooks on every consumer; they run outside autograd and see exactly what the consumer sees."""
    readers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in sink.groups.values():
        for member in _readers(model, group):
            readers.setdefault(member.layer, []).append((group, member))

    def reader(entries: list[tuple[ChannelGroup, Member]]) -> Callable[..., None]:
        def read(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            for group, member in entries:
                sink.read(group, member, x, module)

        return read

    with ExitStack() as stack:
        for layer, entries in readers.items():
            handle = model.get_submodule(layer).register_forward_pre_hook(reader(entries), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _readers(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """The consumers that count: convolutions and linears; a channel map only where nothing else reads the group."""
    layers = [m for m in group.consumers if isinstance(model.get_submodule(m.layer), MATRIX_LAYERS)]
    return layers or [m for m in group.consumers if isinstance(model.get_submodule(m.layer), ChannelMap)]


def _maps(x: Tensor, member: Member, *, channels_last: bool, spread: bool) -> tuple[Tensor, list[int]]:
    """The group's rows among the channels of x, (B, C, P), and which of the group's channels they are.

    A linear layer behind a flatten reads several values of one channel; they become that channel's P.
    """
    by_root: dict[int, list[int]] = {}
    for position, root in zip(member.positions, member.roots, strict=True):
        by_root.setdefault(root, []).append(position)
    covered = sorted(by_root)
    rows_BCP = (x.movedim(-1, 1) if channels_last else x).flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
    if not spread:  # the pool's input: one map a channel, whatever the flatten behind the pool did
        index = torch.tensor([by_root[root][0] for root in covered], device=x.device)
        return rows_BCP.index_select(1, index), covered
    index = torch.tensor([sorted(by_root[root]) for root in covered], device=x.device)
    picked = rows_BCP.index_select(1, index.flatten())
    return picked.reshape(len(x), len(covered), -1), covered


def _combined(group: ChannelGroup, tallies: Mapping[tuple[str, str], _Tally]) -> Tensor:
    place = {channel: n for n, channel in enumerate(group.channels)}
    total, count = torch.zeros(group.width, dtype=torch.float64), torch.zeros(group.width, dtype=torch.float64)
    for (layer, _), tally in tallies.items():
        if layer != group.layer:
            continue
        mean_C = tally.sums / tally.images
        index = torch.tensor([place[channel] for channel in tally.covered])
        average = mean_C.mean()
        total[index] += mean_C / average if average > 0 else mean_C
        count[index] += 1
    return total / count.clamp(min=1)

"""One pass of the model over plain images: what every channel group's consumers read, scored as it streams by."""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .criterion import Criterion
from .groups import MATRIX_LAYERS, CannotCut, ChannelGroup, Member
from .joint import Reader, joint_scores
from .scores import LayerEvidence
from .shards import Shards
from .shortcut import ChannelMap
from .stability import ReaderScores, StoppingRule, group_scores, kept_overlaps

# Shape letters: B images, C channels, P values of one channel in one image, H W pixels.

_POOLS = frozenset({"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "mean", "amax"})
_MIXES = frozenset({"linear", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "einsum", "scaled_dot_product_attention"})
_ORIGIN = "_chip_deploy_pooled_from"
_HELD_BYTES = 2**30

Key = tuple[str, str]
"""A group's root layer and one of its consumers."""
ALONE = Shards()


@dataclass(frozen=True)
class Scored:
    """scores: group -> (C,) float64, in the order of the group's channels; layers: what each rests on."""

    scores: dict[str, Tensor]
    layers: dict[str, LayerEvidence]

    @property
    def images(self) -> int:
        """The most images that any group needed."""
        return max((layer.images for layer in self.layers.values()), default=0)


def score_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    batches: Iterable[Tensor],
    *,
    stopping: StoppingRule | None = None,
    shards: Shards = ALONE,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """The score of every channel of every group that may be cut.

    Maps are read where the consumers read them: at the input of each convolution or linear that takes the group's
    channels, or, where a global pool lies between, at the pool's input. Consumers that read the very same tensor count
    once. Rule for a group: each consumer's scores, averaged over images, are divided by their mean over the group's
    channels; the group's score is the average over its consumers. So every consumer has the same say, whatever the
    scale of its maps.

    With a stopping rule, a group whose kept set has become stable is not looked at any more, and when all have settled
    no further image is. With `shards`, `batches` are those of this process (`Shards.own`), and every process returns
    what one alone would have found on all batches.

    Shapes: batches of (B, 3, H, W), on any device -> group -> (C,) float64 on the CPU.
    Unit: none; 1 is an average channel, 0 a dead one.
    Cost: one forward pass and the criterion's time per image and consumer; B x C scores are kept, no maps. On a GPU the
    device is waited for once a batch.
    Raises: ValueError naming the layer whose maps are not finite.
    """
    wanted = {group.layer: group for group in groups if group.protected is None}
    sink = _Sink(wanted, criterion.score_maps)
    record = _Record(wanted, _covered_of(model, wanted.values()), stopping)
    source = iter(batches)
    with _watched(model, sink):
        while record.open:
            batch = next(source, None)
            found = None if batch is None else _found(sink, model, batch, shards)
            everything = [rows for rows in shards.gather(found) if rows is not None]
            if not everything:
                break
            for rows in everything:
                if isinstance(rows, str):
                    raise ValueError(rows)
                record.add(rows)
            sink.groups = record.open
            if progress is not None:
                progress(record.images)
    seconds = shards.gather(sink.seconds)
    return record.result({layer: sum(of.get(layer, 0.0) for of in seconds) for layer in wanted})


def joint_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """The scores of `joint.joint_scores` for every group that may be cut: of two identical channels one stays.

    The maps of a group's consumers are held at once, so as many groups are taken together as fit into 1 GiB, and the
    model passes over the batches again for the next. Consumers are those of `score_groups`.

    Shapes, Unit, Raises: as `score_groups`.
    Cost: a few passes of the model, and per removed channel a downdate of each image; minutes where `score_groups`
    takes seconds.
    """
    wanted = {group.layer: group for group in groups if group.protected is None}
    if not batches:
        raise ValueError("joint scores need at least one batch of images.")
    covered = _covered_of(model, wanted.values())
    images = sum(len(batch) for batch in batches)
    scores: dict[str, Tensor] = {}
    layers: dict[str, LayerEvidence] = {}
    while len(scores) < len(wanted):
        left = {layer: group for layer, group in wanted.items() if layer not in scores}
        sink = _Sink(left, torch.clone, join=_side_by_side)  # a clone: what follows may work in place
        with _watched(model, sink):
            held = sink.hold(model, batches)
        for layer, group in sink.groups.items():
            started = time.perf_counter()
            place = {channel: n for n, channel in enumerate(group.channels)}
            readers = [Reader(held[key], [place[c] for c in covered[key]]) for key in held if key[0] == layer]
            scores[layer] = joint_scores(readers, width=group.width).cpu()
            layers[layer] = LayerEvidence(images, None, settled=False, seconds=time.perf_counter() - started)
            if progress is not None:
                progress(len(scores))
    return Scored({layer: scores[layer] for layer in wanted}, {layer: layers[layer] for layer in wanted})


class _Record:
    """The scores of all images so far, and which groups still need more."""

    def __init__(
        self,
        groups: Mapping[str, ChannelGroup],
        covered: Mapping[Key, Sequence[int]],
        stopping: StoppingRule | None,
    ) -> None:
        self.groups = groups
        self.covered = covered
        self.stopping = stopping
        self.open = dict(groups)
        self.images = 0
        self.readers: dict[str, dict[str, ReaderScores]] = {layer: {} for layer in groups}
        self.stability: dict[str, float] = {}
        self.seen: dict[str, int] = dict.fromkeys(groups, 0)
        self.settled: set[str] = set()
        self._once: set[str] = set()
        self._next_look = stopping.least if stopping else 0

    def add(self, rows: Mapping[Key, Tensor]) -> None:
        """One batch's scores; what came for groups that have settled meanwhile is left out."""
        images = 0
        for (layer, consumer), scores_BC in rows.items():
            images = len(scores_BC)
            if layer not in self.open:
                continue
            readers = self.readers[layer]
            readers.setdefault(consumer, ReaderScores(self.covered[layer, consumer])).add(scores_BC)
        self.images += images
        for layer in self.open:
            self.seen[layer] = self.images
        if self.stopping and self.images >= self._next_look:
            self._next_look = min(
                self.images + max(self.stopping.least, self.images // 2), max(self.stopping.most, self.images + 1)
            )
            self._look(self.stopping, last=self.images >= self.stopping.most)

    def result(self, seconds: Mapping[str, float]) -> Scored:
        """The scores, and what they rest on; groups that were still open when images ran out get a last look."""
        if self.stopping:
            self._look(self.stopping, last=True)
        scores = {
            layer: group_scores(group, list(self.readers[layer].values())) for layer, group in self.groups.items()
        }
        layers = {
            layer: LayerEvidence(self.seen[layer], self.stability.get(layer), layer in self.settled, seconds[layer])
            for layer in self.groups
        }
        return Scored(scores, layers)

    def _look(self, rule: StoppingRule, *, last: bool) -> None:
        """Close the groups found stable twice in a row; at the last look once is enough, and all are closed."""
        stable = {layer for layer in self.open if self._is_stable(layer, rule)}
        self.settled |= stable if last else stable & self._once
        self.open = {layer: group for layer, group in self.open.items() if not last and layer not in self.settled}
        self._once = stable

    def _is_stable(self, layer: str, rule: StoppingRule) -> bool:
        group = self.groups[layer]
        overlaps = kept_overlaps(group, list(self.readers[layer].values()), rule)
        self.stability[layer] = min(overlaps.values())
        return rule.is_stable(group, overlaps)


class _Sink:
    """What the consumers of the groups read in one batch, each put through `score`."""

    def __init__(
        self,
        groups: Mapping[str, ChannelGroup],
        score: Callable[[Tensor], Tensor],
        *,
        join: Callable[[Sequence[Tensor], int], Tensor] | None = None,
    ) -> None:
        self.groups = groups
        self.score = score
        self.join = join or _mean_of_calls
        self.seconds: dict[str, float] = defaultdict(float)
        self._seen: list[_Seen] = []
        self._found: dict[Key, list[Tensor]] = {}
        self._only_look = False

    def run(self, model: nn.Module, batch: Tensor) -> dict[Key, Tensor]:
        """Key -> what `score` made of the batch's maps, (B, C) or (B, C, P), one row an image.

        Where a consumer is called several times for one image, `join` makes one row of what it read.
        Raises: ValueError naming the layer, image and channel that are not finite.
        """
        self._pass(model, batch)
        found = {key: self.join(values, len(batch)) for key, values in self._found.items()}
        self._found = {}
        flags = [values.isfinite().all() for values in found.values()]
        if flags and not bool(torch.stack(flags).all()):
            self._only_look = True
            self._pass(model, batch)
            raise AssertionError("a criterion gave no number for finite maps")
        return found

    def hold(self, model: nn.Module, batches: Sequence[Tensor]) -> dict[Key, Tensor]:
        """The maps of as many groups as fit into memory, over all batches; at least those of one."""
        images = sum(len(batch) for batch in batches)
        first = self.run(model, batches[0])
        fitting: dict[str, ChannelGroup] = {}
        held_bytes = 0
        for layer, group in self.groups.items():
            own_bytes = sum(maps.nbytes for key, maps in first.items() if key[0] == layer)
            held_bytes += own_bytes * images // len(batches[0])
            if fitting and held_bytes > _HELD_BYTES:
                break
            fitting[layer] = group
        self.groups = fitting
        parts = {key: [maps] for key, maps in first.items() if key[0] in fitting}
        del first
        for batch in batches[1:]:
            for key, maps in self.run(model, batch).items():
                parts[key].append(maps)
        return {key: torch.cat(maps) for key, maps in parts.items()}

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
        started = time.perf_counter()
        maps_BCP = _maps(tensor, member, channels_last=channels_last, spread=pooled_from is None)
        if self._only_look:
            _require_finite(maps_BCP, member.layer)
        elif not self._counted_already(group, member, tensor):
            self._found.setdefault((group.layer, member.layer), []).append(self.score(maps_BCP))
            self.seconds[group.layer] += time.perf_counter() - started

    def _pass(self, model: nn.Module, batch: Tensor) -> None:
        self._seen.clear()
        self._found = {}
        model(batch)

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


def _found(sink: _Sink, model: nn.Module, batch: Tensor, shards: Shards) -> dict[Key, Tensor] | str:
    """The scores of one batch; for other processes, which must hear of it, what is wrong with its maps."""
    try:
        return _on_cpu(sink.run(model, batch))
    except ValueError as err:
        if shards.world == 1:
            raise
        return str(err)


def _on_cpu(found: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The scores of one batch off the device, in one copy."""
    flat = torch.cat([scores_BC.flatten() for scores_BC in found.values()]).cpu() if found else torch.zeros(0)
    sizes = [scores_BC.numel() for scores_BC in found.values()]
    parts = zip(found.items(), flat.split(sizes), strict=True)
    return {key: part.reshape(scores_BC.shape) for (key, scores_BC), part in parts}


def _mean_of_calls(values: Sequence[Tensor], images: int) -> Tensor:
    """The mean over a consumer's calls, and over the maps of one image where a call sees several."""
    rows = [value.reshape(images, -1, *value.shape[1:]).mean(1) if len(value) != images else value for value in values]
    return rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)


def _side_by_side(values: Sequence[Tensor], images: int) -> Tensor:
    """All maps of one image as pixels of the same channels. Shapes: (n B, C, P) each -> (B, C, all pixels)."""
    rows = [value.reshape(images, -1, *value.shape[1:]).movedim(1, 2).flatten(2) for value in values]
    return torch.cat(rows, -1)


def _require_finite(maps_BCP: Tensor, layer: str) -> None:
    finite_BC = torch.isfinite(maps_BCP).all(-1)
    if not bool(finite_BC.all()):
        image, channel = (~finite_BC).nonzero()[0].tolist()
        raise ValueError(
            f"the maps that '{layer}' reads: image {image}, channel {channel} is not finite. "
            "The network cannot be scored."
        )


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
def _watched(model: nn.Module, sink: _Sink) -> Iterator[None]:
    """Pre-hooks on every consumer, in evaluation mode; they see exactly what the consumer sees."""
    readers: dict[str, list[tuple[str, Member]]] = {}
    for group in sink.groups.values():
        for member in _readers(model, group):
            readers.setdefault(member.layer, []).append((group.layer, member))

    def reader(entries: list[tuple[str, Member]]) -> Callable[..., None]:
        def read(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            for layer, member in entries:
                if layer in sink.groups:
                    sink.read(sink.groups[layer], member, x, module)

        return read

    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        model.eval()
        for layer, entries in readers.items():
            handle = model.get_submodule(layer).register_forward_pre_hook(reader(entries), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_PoolTracker())
        yield


def _covered_of(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[Key, list[int]]:
    """Which of its group's channels each consumer reads."""
    return {
        (group.layer, member.layer): sorted(set(member.roots)) for group in groups for member in _readers(model, group)
    }


def _readers(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """The consumers that count: convolutions and linears; a channel map only where nothing else reads the group."""
    layers = [m for m in group.consumers if isinstance(model.get_submodule(m.layer), MATRIX_LAYERS)]
    return layers or [m for m in group.consumers if isinstance(model.get_submodule(m.layer), ChannelMap)]


def _maps(x: Tensor, member: Member, *, channels_last: bool, spread: bool) -> Tensor:
    """The group's rows among the channels of x, (B, C, P), in the order of `_covered_of`.

    A linear layer behind a flatten reads several values of one channel; they become that channel's P.
    """
    rows_BCP = (x.movedim(-1, 1) if channels_last else x).flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
    if member.positions == tuple(range(rows_BCP.shape[1])) == member.roots:
        return rows_BCP
    by_root: dict[int, list[int]] = {}
    for position, root in zip(member.positions, member.roots, strict=True):
        by_root.setdefault(root, []).append(position)
    covered = sorted(by_root)
    if not spread:  # the pool's input: one map a channel, whatever the flatten behind the pool did
        index = torch.tensor([by_root[root][0] for root in covered], device=x.device)
        return rows_BCP.index_select(1, index)
    index = torch.tensor([sorted(by_root[root]) for root in covered], device=x.device)
    return rows_BCP.index_select(1, index.flatten()).reshape(len(x), len(covered), -1)

"""One pass of a model over images, and what has come of it for each criterion: scores of maps, gradients, images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .criterion import Criterion, MapCriterion, require_classes
from .groups import ChannelGroup
from .maps import MapSink, Reading, covered_places, watched
from .scores import LayerEvidence, Scored
from .shards import Shards
from .stability import ReaderScores, StoppingRule, group_scores, kept_overlaps
from .weights import weight_names

# Shape letters: B images, C channels, H W pixels.

Key = tuple[str, str]
"""A group's root layer and one of its consumers."""


class Batch(NamedTuple):
    """Images (B, 3, H, W) as the model reads them, on its device, and their classes (B,), where they are known."""

    images: Tensor
    labels: Tensor | None = None


class Share(NamedTuple):
    """What one batch gave, as the other processes must hear of it. kept: for masked runs, on the CPU."""

    images: int
    rows: dict[Reading, Tensor]
    kept: Batch | None


class ImagePass:
    """The images as they go by, once, and what has come of them for each criterion."""

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, ChannelGroup],
        criteria: Sequence[Criterion],
        *,
        stopping: StoppingRule | None,
        run_images: int,
        shards: Shards,
    ) -> None:
        names = [criterion.name for criterion in criteria]
        if len(set(names)) != len(names):
            raise ValueError(
                f"criteria are told apart by name, and two share one: {', '.join(names)}. Score them apart."
            )
        by_maps = {criterion.name: criterion for criterion in criteria if isinstance(criterion, MapCriterion)}
        covered = covered_places(model, groups.values()) if by_maps else {}
        self.model, self.groups, self.criteria, self.shards = model, groups, criteria, shards
        self.records = {name: _Record(groups, covered, stopping) for name in by_maps}
        self.sink = MapSink(groups if by_maps else {}, {name: by_maps[name].score_maps for name in by_maps})
        self.gradients = _Gradients(model, groups.values()) if self._asking("gradients") else None
        self.keeps = run_images if self._asking("masked runs") else 0
        self.kept: list[Batch] = []
        self.images = 0
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def take(self, batches: Iterable[Batch], progress: Callable[[int], None] | None) -> None:
        """As many batches as anyone wants. Raises: ValueError where they are not what a criterion needs."""
        source = iter(batches)
        asking = [*self.records, *self._asking("gradients"), *self._asking("masked runs")]
        with ExitStack() as stack:
            stack.enter_context(watched(self.model, self.sink, gradients=self.gradients is not None))
            if self.gradients is not None:
                stack.enter_context(self.gradients.watching())
            while self._passing or self._keeping:
                batch = next(source, None)
                shares = self.shards.gather(None if batch is None else self._heard(batch))
                if all(share is None for share in shares):
                    break
                for share in shares:
                    self._add(share)
                self.sink.wanted = {name: record.open for name, record in self.records.items()}
                if progress is not None:
                    progress(self.images)
        if asking and not self.images:
            raise ValueError(f"criterion '{asking[0]}' needs images, and there are none. Give at least one batch.")

    def images_seen(self, criterion: Criterion) -> int:
        """How many images a criterion without maps rests on."""
        return self.images if "gradients" in criterion.needs else 0

    def summed_gradients(self) -> dict[str, Tensor] | None:
        """Parameter name -> its gradient summed over the images of all processes; None where nobody asked."""
        if self.gradients is None:
            return None
        parts = self.shards.gather({name: gradient.cpu() for name, gradient in self.gradients.summed.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        summed = {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}
        for name, gradient in summed.items():
            if not bool(gradient.isfinite().all()):
                raise ValueError(
                    f"the gradient of the loss by '{name}' is not finite, so the network cannot be scored by it. Look "
                    "for weights or images that overflow, or choose a criterion that needs no gradients."
                )
        return summed

    def by_maps(self, criterion: MapCriterion) -> Scored:
        """The scores of a map criterion, from the images that each group saw."""
        everyone = self.shards.gather(dict(self.sink.seconds))
        seconds = {layer: sum(of.get((criterion.name, layer), 0.0) for of in everyone) for layer in self.groups}
        return self.records[criterion.name].result(seconds)

    def kept_images(self) -> tuple[Tensor, Tensor]:
        """The first images and their labels, of all processes, on the model's device."""
        images = torch.cat([batch.images for batch in self.kept])[: self.keeps]
        labels = torch.cat([batch.labels for batch in self.kept if batch.labels is not None])[: self.keeps]
        return images.to(self._device), labels.to(self._device)

    @property
    def _passing(self) -> bool:
        """Whether the next images have to go through the model."""
        return self.gradients is not None or any(record.open for record in self.records.values())

    @property
    def _keeping(self) -> bool:
        return sum(len(batch.images) for batch in self.kept) < self.keeps

    def _asking(self, need: str) -> list[str]:
        return [criterion.name for criterion in self.criteria if need in criterion.needs]

    def _heard(self, batch: Batch) -> Share | str:
        """What one batch gives; where there are other processes, which must hear of it, what is wrong with it."""
        try:
            return self._share(batch)
        except ValueError as err:
            if self.shards.world == 1:
                raise
            return str(err)

    def _share(self, batch: Batch) -> Share:
        images, labels = batch
        unserved = self._asking("labels")
        if labels is None and unserved:
            raise ValueError(
                f"criterion '{unserved[0]}' needs labels, and these images have none. Give labelled images, or choose "
                "another criterion."
            )
        # Before the pass: a network may work on its input in place.
        kept = Batch(images.cpu().clone(), None if labels is None else labels.cpu()) if self._keeping else None
        rows: dict[Reading, Tensor] = {}
        if self._passing:
            output, found = self.sink.run(self.model, images)
            rows = _on_cpu(found)
            if self.gradients is not None and labels is not None:
                self.gradients.add(output, labels)
        return Share(len(images), rows, kept)

    def _add(self, share: Share | str | None) -> None:
        if isinstance(share, str):
            raise ValueError(share)
        if share is None:
            return
        self.images += share.images
        for name, record in self.records.items():
            record.add({reading[1:]: scores_BC for reading, scores_BC in share.rows.items() if reading.by == name})
        if share.kept is not None:
            self.kept.append(share.kept)


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
        if not self.open:
            return
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


class _Gradients:
    """The gradient of the cross-entropy, summed over images, of every weight that holds channels of the groups."""

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        names = weight_names(model, list(groups))
        self.summed: dict[str, Tensor] = {}
        self._weights = {name: model.get_parameter(name) for name in names}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Weights that the user froze count like the others meanwhile."""
        frozen = [weight for weight in self._weights.values() if not weight.requires_grad]
        try:
            for weight in frozen:
                weight.requires_grad = True
            yield
        finally:
            for weight in frozen:
                weight.requires_grad = False

    def add(self, logits: Any, labels: Tensor) -> None:
        """One batch's gradients. Raises: ValueError where the labels are no classes of the network's output."""
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(
                "gradients are taken of a classifier's loss, and this network does not give one row of class scores an "
                "image. Choose a criterion that needs no gradients."
            )
        require_classes(labels, classes=logits.shape[1])
        loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        if not loss.requires_grad:
            raise ValueError(
                "the network's output depends on no weight that could be scored: its forward pass switches gradients "
                "off (torch.no_grad, detach). Remove that, or choose a criterion that needs no gradients."
            )
        found = torch.autograd.grad(loss, list(self._weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(self._weights.items(), found, strict=True):
            held = self.summed.setdefault(name, torch.zeros_like(weight, dtype=torch.float64))
            if gradient is not None:
                held += gradient


def _on_cpu(found: Mapping[Reading, Tensor]) -> dict[Reading, Tensor]:
    """The scores of one batch off the device, in one copy."""
    flat = torch.cat([scores_BC.flatten() for scores_BC in found.values()]).cpu() if found else torch.zeros(0)
    sizes = [scores_BC.numel() for scores_BC in found.values()]
    parts = zip(found.items(), flat.split(sizes), strict=True)
    return {reading: part.reshape(scores_BC.shape) for (reading, scores_BC), part in parts}

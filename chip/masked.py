"""What a network makes of its images when only some of a group's channels are alive."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .criterion import require_classes
from .groups import CannotCut, ChannelGroup, Member
from .maps import evaluating

# Shape letters: B images, K classes, C channels of a group, S masks, W values that a consumer reads at one place.

BATCH = 256
_FEW = 4  # masks for which finding out what stays the same costs more than it saves
_SAME = 1e-4  # of the largest class score: kernels for other batch sizes round differently


class MaskedRuns:
    """Runs of a network with some of a group's channels set to zero where every consumer reads them.

    That is what the consumers would see had the channels been cut, as long as no layer norm or group norm sees the
    channels first: those still see all of them here. The value of an image is log(p / (1 - p)) with p the probability
    of its label.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[ChannelGroup], images: Tensor, labels: Tensor, *, batch: int = BATCH
    ) -> None:
        """images: (B, ...) as the network reads them, on its device; labels: (B,). batch: most rows of one pass.

        Raises: ValueError where images and labels do not go together.
        """
        if len(images) == 0 or labels.shape != (len(images),):
            raise ValueError(
                f"masked runs: {len(images)} images came with labels of shape {tuple(labels.shape)}. Give at "
                "least one image, and one label for each."
            )
        self.model = model
        self.images = images
        self.labels = labels.to(images.device)
        self.batch = batch
        self._groups = {group.layer: group for group in groups}

    def runs(self, layer: str) -> "LayerRuns":
        """The runs of the group that this layer names.

        Raises: ValueError where there is no such group, or nothing reads it.
        """
        group = self._groups.get(layer)
        if group is None:
            raise ValueError(f"masked runs: there is no group '{layer}'; there are {', '.join(self._groups)}.")
        if not group.consumers:
            raise ValueError(
                f"masked runs: no layer reads the channels of '{layer}', so they cannot be switched off. "
                "Choose a criterion that needs no masked runs, or protect the layer."
            )
        return LayerRuns(self.model, group, self.images.split(self.batch), self.labels.split(self.batch), self.batch)


class LayerRuns:
    """The runs of one group: a `criterion.Runs` that can also play many masks together.

    What the network computes before the first consumer reads is the same under every mask. The outputs of modules that
    end before it are taken from one pass, where a trial shows that the network gives the same scores that way.

    Cost: a forward pass of all images per mask, or of its part behind the first consumer; plus two passes per call of
    `many` and a few of two images.
    """

    def __init__(
        self, model: nn.Module, group: ChannelGroup, images: Sequence[Tensor], labels: Sequence[Tensor], batch: int
    ) -> None:
        self.model = model
        self.group = group
        self.images = images
        self.labels = labels
        # A batch norm without statistics of its own mixes the rows of a pass: then one mask at a time.
        self.batch = 0 if any(_mixes_rows(module) for module in model.modules()) else batch
        self._shared: list[nn.Module] | None = None

    def __call__(self, alive_C: Tensor) -> Tensor:
        """The value of every image with these channels alive. Shapes: (C,) bool -> (B,) float64 on the CPU."""
        return self.many(alive_C[None])[0]

    def many(self, alive_SC: Tensor) -> Tensor:
        """The values under many masks, as many in one pass as the batch has room for.

        Shapes: (S, C) bool -> (S, B) float64 on the CPU.
        Raises: ValueError for labels that the network has no output for, naming the first image whose value is not
        finite, or where the outputs are not one row of class scores an image.
        """
        if alive_SC.ndim != 2 or alive_SC.shape[1] != self.group.width:
            raise ValueError(
                f"masked runs: '{self.group.layer}' has {self.group.width} channels, but the mask has shape "
                f"{tuple(alive_SC.shape)}. Give one truth value a channel."
            )
        values = []
        with evaluating(self.model), torch.no_grad():
            if self._shared is None and len(alive_SC) >= _FEW:
                self._shared = self._modules_before(self.images[0][:2])
            for images, labels in zip(self.images, self.labels, strict=True):
                values.append(label_margins(self._scores(images, alive_SC), labels).cpu())
        values_SB = torch.cat(values, 1)
        self._require_finite(values_SB)
        return values_SB

    def _scores(self, images: Tensor, alive_SC: Tensor) -> Tensor:
        prefix = _Prefix(self.model, self.group, images) if self._shared and len(alive_SC) >= _FEW else None
        if prefix is not None and prefix.modules != self._shared:
            prefix = None
        with prefix.replayed() if prefix else nullcontext():
            return torch.cat(
                [self._together(images, part, prefix) for part in alive_SC.split(max(1, self.batch // len(images)))]
            )

    def _together(self, images: Tensor, alive_SC: Tensor, prefix: "_Prefix | None") -> Tensor:
        if prefix is not None:
            prefix.begin(copies=len(alive_SC))
        alive = {self.group.layer: alive_SC}
        return masked_scores(self.model, images, [self.group], alive, masks=len(alive_SC))

    def _modules_before(self, images: Tensor) -> list[nn.Module]:
        """The modules whose outputs may be kept; none where that changes what the network computes."""
        prefix = _Prefix(self.model, self.group, images)
        extremes_SC = torch.tensor([[True], [False]]).expand(2, self.group.width)
        parts = extremes_SC.split(2 if self.batch else 1)
        expected = torch.cat([self._together(images, part, None) for part in parts])
        try:
            with prefix.replayed():
                found = torch.cat([self._together(images, part, prefix) for part in parts])
        except RuntimeError:  # a module whose output is no row an image: its copies fit nowhere
            return []
        tolerance = _SAME * float(expected.abs().max())
        same = found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=tolerance)
        return prefix.modules if same else []

    def _require_finite(self, values_SB: Tensor) -> None:
        finite_B = values_SB.isfinite().all(0)
        if not bool(finite_B.all()):
            image = int((~finite_B).nonzero()[0])
            raise ValueError(
                f"with channels of '{self.group.layer}' set to zero, the scores of image {image} are not finite; "
                "masked runs compare scores. Look for weights that overflow, or choose a criterion that needs no "
                "masked runs."
            )


def masked_scores(
    model: nn.Module, images: Tensor, groups: Sequence[ChannelGroup], alive: Mapping[str, Tensor], *, masks: int
) -> Tensor:
    """The class scores under so many masks, played in one pass on as many copies of the images; gradients flow.

    alive: group -> which of its channels, in their order, each mask leaves alive; groups that are not named live. The
    model's mode is left to the caller; its hooks are as before in the end.
    Shapes: images (B, ...), alive (S, C) bool each -> (S, B, K).
    Raises: ValueError where the outputs are not one row of class scores an image, or where several masks would meet in
    a batch norm that has no statistics of its own; CannotCut where a consumer does not read what the dependency graph
    says.
    """
    if masks > 1 and any(_mixes_rows(module) for module in model.modules()):
        raise ValueError(
            "a batch norm of this network has no statistics of its own, so it mixes the rows of a pass, and masks "
            "cannot be played together. Give batch norms that track statistics."
        )
    readers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in groups:
        for member in group.consumers if group.layer in alive else []:
            readers.setdefault(member.layer, []).append((group, member))
    with ExitStack() as stack:
        for layer, entries in readers.items():
            silencer = _Silencer(layer, [_reads(group, member, alive[group.layer]) for group, member in entries], masks)
            stack.callback(model.get_submodule(layer).register_forward_pre_hook(silencer, with_kwargs=True).remove)
        scores = model(images.repeat(masks, *[1] * (images.ndim - 1)))
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != masks * len(images) or scores.shape[1] < 2:
        shape = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(
            f"masked runs need one row of scores an image, for two classes or more; the network gave {shape} for "
            f"{masks * len(images)} images. Choose a criterion that needs no masked runs."
        )
    return scores.unflatten(0, (masks, len(images)))


def label_margins(scores_BK: Tensor, labels_B: Tensor) -> Tensor:
    """log(p / (1 - p)) of each label's probability, from the scores: the label's less the log-sum-exp of the others'.

    Never from p, which rounds to 1 long before the scores do anything of the kind. Gradients flow.
    Shapes: (..., B, K), (B,) integers -> (..., B) float64.
    Raises: ValueError for a label that has no score.
    """
    classes = scores_BK.shape[-1]
    require_classes(labels_B, classes=classes)
    scores = scores_BK.double()
    is_label = torch.nn.functional.one_hot(labels_B.long(), classes).bool().expand_as(scores)
    own = scores.masked_fill(~is_label, 0).sum(-1)
    return own - scores.masked_fill(is_label, -torch.inf).logsumexp(-1)


# -- setting channels to zero ------------------------------------------------------------------------------------------


class _Silencer:
    """A pre-hook that sets what one consumer reads to zero; part s of the stacked batch under mask s."""

    def __init__(self, layer: str, reads: Sequence[tuple[Tensor, Tensor]], masks: int) -> None:
        """reads: per group the positions that the consumer reads, and which of them are dead, (S, positions)."""
        self.layer = layer
        self.reads = reads
        self.masks = masks

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if inputs:
            return (self._silenced(module, inputs[0]), *inputs[1:]), named
        name = next(iter(named))
        return inputs, {**named, name: self._silenced(module, named[name])}

    def _silenced(self, module: nn.Module, x: Tensor) -> Tensor:
        dim = x.ndim - 1 if isinstance(module, nn.Linear) else 1
        if len(x) % self.masks or max(int(positions.max()) for positions, _ in self.reads) >= x.shape[dim]:
            raise CannotCut(
                f"'{self.layer}' reads values of shape {tuple(x.shape)}, but the dependency graph says otherwise; its "
                "channels cannot be switched off. Choose a criterion that needs no masked runs."
            )
        dead_SW = torch.zeros(self.masks, x.shape[dim], dtype=torch.bool)
        for positions, dead in self.reads:
            dead_SW[:, positions] |= dead
        parts = x.unflatten(0, (self.masks, -1))
        shape = [self.masks] + [1] * x.ndim
        shape[dim + 1] = x.shape[dim]
        return parts.masked_fill(dead_SW.to(x.device).view(shape), 0).flatten(0, 1)


def _reads(group: ChannelGroup, member: Member, alive_SC: Tensor) -> tuple[Tensor, Tensor]:
    place = {channel: n for n, channel in enumerate(group.channels)}
    return torch.tensor(member.positions), ~alive_SC.cpu()[:, [place[root] for root in member.roots]]


def _mixes_rows(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


# -- computing once what no mask changes -------------------------------------------------------------------------------


class _Prefix:
    """Outputs of the outermost modules that begin and end before any consumer of the group reads.

    Between those modules the network runs as ever, on copies: what works in place spoils nothing.
    """

    def __init__(self, model: nn.Module, group: ChannelGroup, images: Tensor) -> None:
        self._consumers = {model.get_submodule(member.layer) for member in group.consumers}
        self._kept: list[tuple[nn.Module, Tensor]] = []
        self._marks: list[int] = []
        self._reached = False
        self._copies = 1
        self._calls: Counter[nn.Module] = Counter()
        with ExitStack() as stack:
            for module in model.modules():
                if module is not model:
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
            self._rows = len(images)
            model(images.clone())  # a network may work on its input in place

    @property
    def modules(self) -> list[nn.Module]:
        """Whose outputs are kept, in the order of their calls."""
        return [module for module, _ in self._kept]

    def begin(self, *, copies: int) -> None:
        """A new pass, of so many copies of the images."""
        self._copies = copies
        self._calls.clear()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """While it lasts, the modules give what they gave, in place of computing it."""
        outputs: dict[nn.Module, list[Tensor]] = {}
        for module, output in self._kept:
            outputs.setdefault(module, []).append(output)
        with ExitStack() as stack:
            for module, kept in outputs.items():
                stack.callback(_put_back, module, module.__dict__.get("forward"))
                module.__dict__["forward"] = self._replay(module, module.forward, kept)
            yield

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._reached = self._reached or module in self._consumers
        self._marks.append(len(self._kept))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        mark = self._marks.pop()
        if not self._reached and isinstance(output, Tensor) and output.ndim and len(output) == self._rows:
            self._kept[mark:] = [(module, output.clone())]

    def _replay(self, module: nn.Module, compute: Callable[..., Any], kept: Sequence[Tensor]) -> Callable[..., Any]:
        def forward(*inputs: Any, **named: Any) -> Any:
            number = self._calls[module]
            self._calls[module] += 1
            if number >= len(kept):
                return compute(*inputs, **named)
            return kept[number].repeat(self._copies, *[1] * (kept[number].ndim - 1))

        return forward


def _put_back(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own

"""The order of kept channels that turns option-A shortcuts into a slice and a pad."""

from collections.abc import Mapping, Sequence

from torch import nn

from .groups import ChannelGroup
from .shortcut import ZERO, ChannelMap

Channel = tuple[str, int]  # group, channel of its root


def aligned_order(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """The kept channels of every group, ordered so that each ChannelMap's sources form one run where that is possible.

    Within a group: first the channels that only come in through a shortcut, then those that come in and go on, then
    those that only go on, then the rest; ties by the same classes in the other groups, so that both ends of a shortcut
    agree. With the stem uncut this gives one run wherever a shortcut still feeds a kept channel; else it may remain
    a gather, which is exact too. Groups that no ChannelMap touches stay ascending.
    """
    links = _links(model, groups)
    alive = {(layer, channel) for layer, channels in kept.items() for channel in channels}
    ahead = {a: b for a, b in links if a in alive and b in alive}
    behind = {b: a for a, b in ahead.items()}
    touched = list(dict.fromkeys(layer for link in links for layer, _ in link))

    def kind(node: Channel) -> int:
        match node in behind, node in ahead:
            case True, False:
                return 0
            case True, True:
                return 1
            case False, True:
                return 2
            case _:
                return 3

    def key(node: Channel) -> tuple[int, ...]:
        run = _chain(node, behind, ahead)
        return (kind(node), *(kind(run[layer]) if layer in run else 4 for layer in touched), run_start(run))

    def run_start(run: Mapping[str, Channel]) -> int:
        return min(touched.index(layer) * 10**6 + channel for layer, channel in run.values())

    return {
        layer: [c for _, c in sorted(((layer, c) for c in channels), key=key)] if layer in touched else list(channels)
        for layer, channels in kept.items()
    }


def _links(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[tuple[Channel, Channel]]:
    """(channel that goes in, channel that comes out) for every fed output of every ChannelMap."""
    ends: dict[tuple[str, str], dict[int, Channel]] = {}
    for group in groups:
        for member in group.members:
            places = ends.setdefault((member.layer, member.side), {})
            places |= {p: (group.layer, r) for p, r in zip(member.positions, member.roots, strict=True)}
    links = []
    for name, module in model.named_modules():
        if isinstance(module, ChannelMap):
            into, out = ends.get((name, "in"), {}), ends.get((name, "out"), {})
            links += [
                (into[source], out[position])
                for position, source in enumerate(module.sources())
                if source != ZERO and source in into and position in out
            ]
    return links


def _chain(node: Channel, behind: Mapping[Channel, Channel], ahead: Mapping[Channel, Channel]) -> dict[str, Channel]:
    """Every channel that this one is handed on from or to, by group."""
    run = {node[0]: node}
    for step in (behind, ahead):
        at = node
        while at in step:
            at = step[at]
            run[at[0]] = at
    return run

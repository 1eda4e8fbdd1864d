"""How many images each layer's scores need: the stopping rule beside fixed numbers, all against a gold standard.

    python benchmarks/ci_images.py --weights resnet56.safetensors --data imagefolder:DIR

The gold standard are the channels kept by the scores of 5,000 images that no other run sees. Every other run reads the
same images in the same order. Overlap: the share of the kept channels that the gold standard keeps too. Seconds are
CPU time of whole runs, all threads together, forward passes included; those of one group are the time on the clock
while its maps were scored.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from record import (
    add_common_options,
    add_network_options,
    batches_of,
    count,
    cpu_seconds,
    drawn,
    limit_threads,
    open_network,
    print_table,
    write_record,
)
from torch import Tensor, nn

from chip_deploy.chip.allocate import Budget, Rules, allocate, kept_channels
from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.evidence import LayerEvidence, score_groups
from chip_deploy.chip.groups import ChannelGraph, ChannelGroup
from chip_deploy.chip.independence import ChannelIndependence
from chip_deploy.chip.stability import MOST_IMAGES, StoppingRule
from chip_deploy.pipeline.recipe import PruneSection

RULE = "stopping rule"


@dataclass(frozen=True)
class RunFigure:
    """One run at one cut, over its groups; image_passes: images that a group was scored on, summed over the groups."""

    removed: float
    run: str
    images_mean: float
    images_most: int
    image_passes: int
    seconds: float
    overlap_mean: float
    overlap_worst: float
    groups: int
    groups_alike: int


@dataclass(frozen=True)
class GroupFigure:
    """One group under the stopping rule at one cut, beside the largest fixed number of images."""

    removed: float
    layer: str
    channels: int
    kept: int
    images: int
    stability: float
    settled: bool
    seconds: float
    fixed_images: int
    fixed_seconds: float
    overlap: float


@dataclass(frozen=True)
class Run:
    """The scores that a run ended with, what it says of every group, and the CPU time it took."""

    scores: Mapping[str, Tensor]
    layers: Mapping[str, LayerEvidence]
    seconds: float


def main() -> None:
    """Score by the gold standard, the fixed numbers and the rule; print and write what each took and kept."""
    args = _options()
    limit_threads(args.threads)
    most = max(*args.fixed, args.most)
    built, data = open_network(args, args.model, images=args.gold + most)
    gold_images = drawn(data.train, n=args.gold, seed=args.seed)
    images = drawn(data.train, n=most, seed=args.seed, after=args.gold)
    batches = [*batches_of(images, batch=args.batch)]
    graph, cost = ChannelGraph(built.module, batches[0][:1]), CostModel(built.module, batches[0][:1])
    score(built.module, graph.groups, batches[:1])  # whatever is compiled is compiled now
    gold = score(built.module, graph.groups, [*batches_of(gold_images, batch=args.batch)])
    fixed = {n: score(built.module, graph.groups, _first(batches, n)) for n in sorted(args.fixed)}

    runs, groups = [], []
    for percent in args.cuts:
        rules = Rules(round_to=1, min_width=PruneSection().min_width)
        widths = allocate(graph.groups, cost, Budget("macs", 1 - percent / 100), rules, way="uniform")
        rule = StoppingRule(widths, most=args.most, seed=args.seed)
        stopped = score(built.module, graph.groups, _first(batches, args.most), stopping=rule)
        named = {RULE: stopped, **{f"fixed {n}": run for n, run in fixed.items()}}
        for name, run in named.items():
            runs.append(judge(run, gold, graph.groups, widths, removed=percent / 100, name=name))
        beside = fixed[max(fixed)]
        groups += compare(stopped, beside, gold, graph.groups, widths, removed=percent / 100)
        sys.stderr.write(f"{percent} % fewer MACs: done\n")
    print_runs(runs, gold=args.gold, model=args.model)
    print_groups(groups)
    figures = {"model": args.model, "gold_images": args.gold, "gold_seconds": gold.seconds}
    rows = {"runs": [asdict(row) for row in runs], "groups": [asdict(row) for row in groups]}
    write_record(args.json, figures={**figures, **rows})


def score(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Tensor], *, stopping: StoppingRule | None = None
) -> Run:
    """One scoring run and its CPU time."""
    seconds, found = cpu_seconds(lambda: score_groups(model, groups, ChannelIndependence(), batches, stopping=stopping))
    return Run(found.scores, found.layers, seconds)


def judge(
    run: Run, gold: Run, groups: Sequence[ChannelGroup], widths: Mapping[str, int], *, removed: float, name: str
) -> RunFigure:
    """A run's images and time, and how near its kept channels are to the gold standard's."""
    cut = _cut(groups, widths)
    overlaps = [overlap(run, gold, group, widths[group.layer]) for group in cut]
    images = [run.layers[group.layer].images for group in cut]
    return RunFigure(
        removed=removed,
        run=name,
        images_mean=fmean(images),
        images_most=max(images),
        image_passes=sum(images),
        seconds=run.seconds,
        overlap_mean=fmean(overlaps),
        overlap_worst=min(overlaps),
        groups=len(cut),
        groups_alike=sum(value == 1 for value in overlaps),
    )


def compare(
    stopped: Run, fixed: Run, gold: Run, groups: Sequence[ChannelGroup], widths: Mapping[str, int], *, removed: float
) -> list[GroupFigure]:
    """Group by group, what the rule used and what the fixed number of images took."""
    figures = []
    for group in _cut(groups, widths):
        ours, theirs = stopped.layers[group.layer], fixed.layers[group.layer]
        assert ours.stability is not None  # a rule watched
        figures.append(
            GroupFigure(
                removed=removed,
                layer=group.layer,
                channels=group.width,
                kept=widths[group.layer],
                images=ours.images,
                stability=ours.stability,
                settled=ours.settled,
                seconds=ours.seconds,
                fixed_images=theirs.images,
                fixed_seconds=theirs.seconds,
                overlap=overlap(stopped, gold, group, widths[group.layer]),
            )
        )
    return figures


def overlap(run: Run, gold: Run, group: ChannelGroup, width: int) -> float:
    """The share of the channels that a run keeps of a group which the gold standard keeps too."""
    ours, best = (set(kept_channels(group, width, of.scores[group.layer].tolist())) for of in (run, gold))
    return len(ours & best) / width


def print_runs(figures: Sequence[RunFigure], *, gold: int, model: str) -> None:
    """One row a cut and run."""
    columns = ["fewer MACs", "run", "images a group", "most", "CPU s", "overlap", "worst", "groups alike"]
    rows = [
        [
            f"{f.removed:.0%}",
            f.run,
            f"{f.images_mean:.1f}",
            f"{f.images_most}",
            f"{f.seconds:.2f}",
            f"{f.overlap_mean:.2%}",
            f"{f.overlap_worst:.2%}",
            f"{f.groups_alike} of {f.groups}",
        ]
        for f in figures
    ]
    print_table(f"Kept channels of {model} against a gold standard of {gold} other images", columns, rows)


def print_groups(figures: Sequence[GroupFigure]) -> None:
    """One row a group and cut."""
    columns = [
        "group",
        "fewer MACs",
        "kept",
        "images",
        "stability",
        "settled",
        "s",
        "fixed images",
        "fixed s",
        "overlap",
    ]
    rows = [
        [
            f.layer,
            f"{f.removed:.0%}",
            f"{f.kept} of {f.channels}",
            f"{f.images}",
            f"{f.stability:.3f}",
            "yes" if f.settled else "no",
            f"{f.seconds:.3f}",
            f"{f.fixed_images}",
            f"{f.fixed_seconds:.3f}",
            f"{f.overlap:.2%}",
        ]
        for f in figures
    ]
    print_table("Group by group under the stopping rule", columns, rows)


def _cut(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> list[ChannelGroup]:
    """The groups that lose channels; the others keep all of them whatever their scores are."""
    return [group for group in groups if widths.get(group.layer, group.width) < group.width]


def _first(batches: Sequence[Tensor], n: int) -> list[Tensor]:
    """The first n images, in the same batches."""
    size = len(batches[0])
    whole, rest = list(batches[: n // size]), n % size
    return [*whole, batches[n // size][:rest]] if rest else whole


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="resnet56", help="as chip-deploy's --model [resnet56]")
    parser.add_argument("--cuts", nargs="+", type=count, default=[30, 50, 70], help="percent fewer MACs [30 50 70]")
    parser.add_argument("--fixed", nargs="+", type=count, default=[640, 256], help="fixed numbers [640 256]")
    parser.add_argument("--most", type=count, default=MOST_IMAGES, help=f"the rule's upper bound [{MOST_IMAGES}]")
    parser.add_argument("--gold", type=count, default=5000, help="images of the gold standard [5000]")
    parser.add_argument("--batch", type=count, default=32, help="images that are scored together [32]")
    add_network_options(parser)
    add_common_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()

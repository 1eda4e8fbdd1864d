"""Accuracy right after the cut, and after batch-norm recalibration, by the criterion that chose the channels.

    python benchmarks/ci_ablation.py --weights resnet56.safetensors --data imagefolder:DIR

All criteria cut the same widths: the same share of every group, in steps of one channel, until 30, 50 and 70 % of the
MACs are gone. Nothing is trained after the cut. The random criterion is drawn three times: its mean and range.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean

import torch
from record import (
    add_common_options,
    add_network_options,
    batches_of,
    count,
    drawn,
    limit_threads,
    open_network,
    print_table,
    write_record,
)
from torch import Tensor, nn

from chip_deploy.chip.allocate import Budget, Rules, allocate, kept_channels
from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.evidence import joint_groups, score_groups
from chip_deploy.chip.groups import MATRIX_LAYERS, ChannelGraph, ChannelGroup
from chip_deploy.chip.independence import ChannelIndependence
from chip_deploy.chip.plan import PrunePlan, make_plan
from chip_deploy.chip.surgery import apply_plan
from chip_deploy.pipeline.data import DataSet, Images, normalise
from chip_deploy.pipeline.models import BuiltModel
from chip_deploy.pipeline.recipe import PruneSection, TuneSection
from chip_deploy.pipeline.tune import evaluate, recalibrate

# Shape letters: B images, C channels, S pixels a side.

RANDOM_SEEDS = 3

Scorer = Callable[[nn.Module, ChannelGraph, Sequence[Tensor]], Mapping[str, Tensor]]
"""Model, groups and batches of (B, 3, S, S) -> group -> (C,), larger stays longer."""


@dataclass(frozen=True)
class AblationFigure:
    """One criterion at one cut: top-1, the mean over its draws beside the smallest and the largest."""

    removed: float
    criterion: str
    draws: int
    macs_left: float
    after_cut: float
    after_cut_low: float
    after_cut_high: float
    recalibrated: float
    recalibrated_low: float
    recalibrated_high: float


def main() -> None:
    """Score once by each criterion, cut by each at every size, print and write the accuracies."""
    args = _options()
    limit_threads(args.threads)
    built, data = open_network(args, args.model, images=max(args.score_images, args.eval_images))
    test = data.test.sample(min(args.eval_images, len(data.test)), seed=args.seed, what="--eval-images")
    batches = [*batches_of(drawn(data.train, n=args.score_images, seed=args.seed), batch=args.batch)]
    graph = ChannelGraph(built.module, batches[0][:1])
    scores = {
        name: [scorer(built.module, graph, batches) for scorer in scorers] for name, scorers in criteria(args).items()
    }
    figures = [
        measure(name, draws, removed=percent / 100, built=built, graph=graph, data=data, test=test, seed=args.seed)
        for percent in args.cuts
        for name, draws in scores.items()
    ]
    dense = evaluate(built.module, test).top1
    print_figures(figures, dense=dense, images=len(test), model=args.model)
    facts = {"model": args.model, "dense": dense, "eval_images": len(test), "score_images": args.score_images}
    write_record(args.json, figures={**facts, "rows": [asdict(figure) for figure in figures]})


def criteria(args: argparse.Namespace) -> dict[str, Sequence[Scorer]]:
    """Name -> how the channels are scored; more than one scorer are draws of one criterion."""
    table: dict[str, Sequence[Scorer]] = {
        "chip": [one_shot],
        "chip joint": [joint],
        "l1": [filter_norms],
        "random": [partial(random_scores, seed=args.seed + draw) for draw in range(RANDOM_SEEDS)],
    }
    return {name: scorers for name, scorers in table.items() if name in args.criteria}


def one_shot(model: nn.Module, graph: ChannelGraph, batches: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """Channel independence as published: every channel against all the others."""
    return score_groups(model, graph.groups, ChannelIndependence(), batches).scores


def joint(model: nn.Module, graph: ChannelGraph, batches: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """Channel independence against the channels that are still there: greedy removal."""
    return joint_groups(model, graph.groups, batches).scores


def filter_norms(model: nn.Module, graph: ChannelGraph, batches: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The sum of the absolute weights that produce a channel, the mean over the layers that produce it together."""
    del batches  # the weights tell all
    return {group.layer: _norms(model, group) for group in graph.groups if group.protected is None}


def random_scores(
    model: nn.Module, graph: ChannelGraph, batches: Sequence[Tensor], *, seed: int
) -> Mapping[str, Tensor]:
    """Scores that know nothing."""
    del model, batches
    draw = torch.Generator().manual_seed(seed)
    return {group.layer: torch.rand(group.width, generator=draw) for group in graph.groups if group.protected is None}


def measure(
    name: str,
    draws: Sequence[Mapping[str, Tensor]],
    *,
    removed: float,
    built: BuiltModel,
    graph: ChannelGraph,
    data: DataSet,
    test: Images,
    seed: int,
) -> AblationFigure:
    """Cut by each draw's scores, and evaluate right after the cut and after recalibration."""
    settings = TuneSection()
    n = min(settings.recalibrate_images, len(data.train))
    macs_left, after_cut, recalibrated = [], [], []
    for scores in draws:
        pruned, plan = cut(built, graph, data, scores, removed=removed, criterion=name)
        macs_left.append(plan.macs_after / plan.macs_before)
        after_cut.append(evaluate(pruned, test).top1)
        recalibrate(pruned, data.train, n=n, batch=settings.batch, seed=seed)
        recalibrated.append(evaluate(pruned, test).top1)
        sys.stderr.write(f"{removed:.0%} {name}: {after_cut[-1]:.2%}, recalibrated {recalibrated[-1]:.2%}\n")
    return AblationFigure(
        removed=removed,
        criterion=name,
        draws=len(draws),
        macs_left=fmean(macs_left),
        after_cut=fmean(after_cut),
        after_cut_low=min(after_cut),
        after_cut_high=max(after_cut),
        recalibrated=fmean(recalibrated),
        recalibrated_low=min(recalibrated),
        recalibrated_high=max(recalibrated),
    )


def cut(
    built: BuiltModel,
    graph: ChannelGraph,
    data: DataSet,
    scores: Mapping[str, Tensor],
    *,
    removed: float,
    criterion: str,
) -> tuple[nn.Module, PrunePlan]:
    """A copy of the network without the channels that these scores rank last, and its plan."""
    example = normalise(data.test.read(torch.arange(1)))
    cost, rules = CostModel(built.module, example), Rules(round_to=1, min_width=PruneSection().min_width)
    widths = allocate(graph.groups, cost, Budget("macs", 1 - removed), rules, way="uniform")
    groups = [group for group in graph.groups if group.layer in widths]
    kept = {group.layer: kept_channels(group, widths[group.layer], scores[group.layer].tolist()) for group in groups}
    plan = make_plan(
        built.module,
        graph.groups,
        kept,
        cost=cost,
        name=built.name,
        num_classes=built.num_classes,
        input_shape=example.shape[1:],
        criterion=criterion,
        round_to=rules.round_to,
        min_width=rules.min_width,
    )
    return apply_plan(built.module, plan, example), plan


def print_figures(figures: Sequence[AblationFigure], *, dense: float, images: int, model: str) -> None:
    """One row a cut and criterion."""
    columns = ["fewer MACs", "criterion", "MACs left", "after the cut", "range", "recalibrated", "range"]
    rows = [
        [
            f"{f.removed:.0%}",
            f.criterion,
            f"{f.macs_left:.1%}",
            f"{f.after_cut:.2%}",
            _range(f.after_cut_low, f.after_cut_high, draws=f.draws),
            f"{f.recalibrated:.2%}",
            _range(f.recalibrated_low, f.recalibrated_high, draws=f.draws),
        ]
        for f in figures
    ]
    print_table(f"Top-1 of {model} on {images} test images; dense {dense:.2%}", columns, rows)


def _norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """(C,) in the order of the group's channels."""
    place = {channel: n for n, channel in enumerate(group.channels)}
    total, producers = torch.zeros(group.width), torch.zeros(group.width)
    for member in group.members:
        layer = model.get_submodule(member.layer) if member.side == "out" else None
        if not isinstance(layer, MATRIX_LAYERS) or isinstance(layer, nn.modules.conv._ConvTransposeNd):
            continue
        index = torch.tensor([place[root] for root in member.roots])
        norms = layer.weight.detach().flatten(1).abs().sum(1)[list(member.positions)]
        total.index_add_(0, index, norms)
        producers.index_add_(0, index, torch.ones(len(index)))
    return total / producers


def _range(low: float, high: float, *, draws: int) -> str:
    return f"{100 * low:.2f}-{high:.2%}" if draws > 1 else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    names = ["chip", "chip joint", "l1", "random"]
    parser.add_argument("--model", default="resnet56", help="as chip-deploy's --model [resnet56]")
    parser.add_argument("--criteria", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cuts", nargs="+", type=count, default=[30, 50, 70], help="percent fewer MACs [30 50 70]")
    parser.add_argument("--score-images", type=count, default=640, help="training images that are scored [640]")
    parser.add_argument("--eval-images", type=count, default=10_000, help="test images, at most [10000]")
    parser.add_argument("--batch", type=count, default=32, help="images that are scored together [32]")
    add_network_options(parser)
    add_common_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()

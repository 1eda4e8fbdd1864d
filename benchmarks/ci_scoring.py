"""How long channel independence takes: against one SVD per channel, and against the network's own forward pass.

    python benchmarks/ci_scoring.py
    python benchmarks/ci_scoring.py --shapes 512x784 16x1024
    python benchmarks/ci_scoring.py --shapes 16x1024 32x256 64x64 --way cholesky
    python benchmarks/ci_scoring.py --network resnet56 --weights W.safetensors --data imagefolder:DIR --profile
    python benchmarks/ci_scoring.py --network resnet50 --images 64 --profile
    python benchmarks/ci_scoring.py --network resnet50 --memory

Every figure is a ratio within one run: A B A B, CPU time of all threads together (--device cuda: CUDA events), the
median over the rounds beside the smallest and the largest. A is the published method as it would be written fairly:
for one image, one float32 nuclear norm of all the maps and one for each channel with that channel set to zero; the
published script copies its whole batch for every channel instead of the one image. All channels are timed. --way picks
what ours is: what is used on this machine, or one of the forms that other machines use.
"""

import argparse
import contextlib
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from record import (
    add_common_options,
    add_network_options,
    batches_of,
    count,
    cpu_seconds,
    cuda_seconds,
    drawn,
    forward,
    limit_threads,
    open_network,
    print_table,
    write_record,
)
from torch import Tensor, nn

from chip_deploy.chip import nuclear
from chip_deploy.chip.evidence import score_groups
from chip_deploy.chip.groups import ChannelGraph, ChannelGroup
from chip_deploy.chip.independence import ChannelIndependence
from chip_deploy.chip.nuclear import channel_independence

# Shape letters: B images, C channels, P pixels.

LARGE = ("64x12544", "64x3136", "256x3136", "128x784", "512x784", "512x196", "1024x196", "2048x49", "64x50176")
SMALL = ("16x1024", "32x256", "64x64")
REQUIRED, REQUIRED_NARROW, NARROW = 200.0, 150.0, 128
IMAGES = {"resnet56": 640, "resnet50": 64}
REQUIRED_OF_FORWARD = {"resnet56": 1.0, "resnet50": 2.0}
REQUIRED_MEMORY_BYTES = 2**30

MAPS_BYTES = 128 * 2**20  # of one batch of maps
MOST_MAPS = 128  # images in one batch of maps
TURN_SECONDS = 0.05  # shorter turns of ours are repeated until they take so long
FEWEST_ROUNDS, MOST_ROUNDS = 2, 20
ZEROS = 0.4

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "used": channel_independence,
    "eigenvectors": lambda maps_BCP: nuclear._bounded(maps_BCP.double(), nuclear._by_eigenvectors),
    "cholesky": lambda maps_BCP: nuclear._bounded(maps_BCP.double(), nuclear._by_cholesky),
}

Clock = Callable[[Callable[[], Tensor | None]], tuple[float, Tensor | None]]


@dataclass(frozen=True)
class ShapeFigure:
    """One shape: milliseconds an image, medians over the rounds; ratio = published / ours of the same round.

    largest_gap: how far the two are apart anywhere, as a share of the largest score: float32 rounding, no more.
    """

    channels: int
    pixels: int
    images: int
    rounds: int
    published_ms: float
    ours_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    required: float
    met: bool
    largest_gap: float


@dataclass(frozen=True)
class NetworkFigure:
    """A whole network: seconds for all images, medians over the rounds; ratio = (scoring - forward) / forward."""

    network: str
    size: int
    images: int
    batch: int
    groups: int
    rounds: int
    forward_s: float
    scoring_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    required: float
    met: bool
    forward_images_per_s: float
    scoring_images_per_s: float


@dataclass(frozen=True)
class ProfileRow:
    """What the criterion spends on all consumers that read maps of one shape; share: of all that scoring adds."""

    channels: int
    pixels: int
    consumers: int
    ms_per_consumer: float
    ms: float
    share: float


@dataclass(frozen=True)
class MemoryFigure:
    """Peak resident memory of a process that runs the forward pass, and of one that scores."""

    network: str
    batch: int
    forward_bytes: int
    scoring_bytes: int
    above_bytes: int
    required_bytes: int
    met: bool


def main() -> None:
    """Measure what the command line asks for, print it and write it."""
    args = _options()
    limit_threads(args.threads)
    if args.peak is not None:
        sys.stdout.write(f"{peak_bytes(args, args.peak)}\n")
        return
    if args.memory:
        figure = measure_memory(args)
        print_memory(figure)
        write_record(args.json, figures=asdict(figure))
        return
    clock = cuda_seconds if args.device == "cuda" else cpu_seconds
    if args.network is None:
        figures = [measure_shape(*shape, clock=clock, args=args) for shape in args.shapes]
        print_shapes(figures, device=args.device)
        write_record(args.json, figures=[asdict(figure) for figure in figures])
        return
    figure, profile = measure_network(args, clock)
    print_network(figure, profile, device=args.device)
    write_record(args.json, figures={"network": asdict(figure), "profile": [asdict(row) for row in profile]})


def correlated_maps(images: int, channels: int, pixels: int, *, seed: int) -> Tensor:
    """Maps as a ReLU leaves them: channels mixed at random, so that few directions carry most, and 40 % zeros.

    Shapes: -> (B, C, P) float32.
    """
    draw = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, channels + 1).float().rsqrt()
    mixing = torch.randn(channels, channels, generator=draw) * decay
    mixing /= torch.linalg.vector_norm(mixing, dim=1, keepdim=True)
    shift = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * ZEROS))
    return torch.stack([(mixing @ torch.randn(channels, pixels, generator=draw) + shift).relu() for _ in range(images)])


def published(maps_CP: Tensor) -> Tensor:
    """The published method for one image: the nuclear norm of all maps less that without each channel.

    Shapes: (C, P) float32 -> (C,) float32.
    Cost: C + 1 singular value decompositions.
    """
    whole = torch.linalg.matrix_norm(maps_CP, ord="nuc")
    scores = []
    for channel in range(len(maps_CP)):
        without = maps_CP.clone()
        without[channel] = 0
        scores.append(whole - torch.linalg.matrix_norm(without, ord="nuc"))
    return torch.stack(scores)


def measure_shape(channels: int, pixels: int, *, clock: Clock, args: argparse.Namespace) -> ShapeFigure:
    """Ours against the published method on maps of one shape."""
    images = args.images or max(1, min(MOST_MAPS, MAPS_BYTES // (4 * channels * pixels)))
    maps_BCP = correlated_maps(images, channels, pixels, seed=args.seed).to(args.device)
    ours = WAYS[args.way]
    ours(maps_BCP)  # whatever is compiled is compiled now
    torch.linalg.matrix_norm(maps_BCP[0], ord="nuc")
    turns = max(1, math.ceil(TURN_SECONDS / max(clock(lambda: ours(maps_BCP))[0], 1e-6)))

    theirs_s, ours_s, gaps = [], [], []
    while len(theirs_s) < FEWEST_ROUNDS or (sum(theirs_s) < args.seconds and len(theirs_s) < MOST_ROUNDS):
        image = len(theirs_s) % images
        seconds, expected = clock(partial(published, maps_BCP[image]))
        theirs_s.append(seconds)
        seconds, found = clock(lambda: [ours(maps_BCP) for _ in range(turns)][-1])
        ours_s.append(seconds / (turns * images))
        assert expected is not None
        assert found is not None
        gaps.append(float((found[image] - expected).abs().max() / expected.abs().max()))
    ratios = [theirs / ours for theirs, ours in zip(theirs_s, ours_s, strict=True)]
    required = REQUIRED_NARROW if channels <= NARROW else REQUIRED
    return ShapeFigure(
        channels=channels,
        pixels=pixels,
        images=images,
        rounds=len(ratios),
        published_ms=1e3 * median(theirs_s),
        ours_ms=1e3 * median(ours_s),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        required=required,
        met=median(ratios) >= required,
        largest_gap=max(gaps),
    )


def measure_network(args: argparse.Namespace, clock: Clock) -> tuple[NetworkFigure, list[ProfileRow]]:
    """Scoring against the forward pass, and with --profile where the time of scoring goes."""
    net, groups, batches = prepare_network(args, images=args.images or IMAGES[args.network])
    images = sum(len(batch) for batch in batches)

    def score() -> None:
        score_groups(net, groups, ChannelIndependence(), batches)

    def run() -> None:
        forward(net, batches)

    forward(net, batches[:1])
    score_groups(net, groups, ChannelIndependence(), batches[:1])  # whatever is compiled is compiled now
    rounds = [(clock(run)[0], clock(score)[0]) for _ in range(args.rounds)]
    ratios = [(scoring - alone) / alone for alone, scoring in rounds]
    forward_s, scoring_s = (median(column) for column in zip(*rounds, strict=True))
    required = REQUIRED_OF_FORWARD[args.network]
    figure = NetworkFigure(
        network=args.network,
        size=batches[0].shape[-1],
        images=images,
        batch=args.batch,
        groups=sum(group.protected is None for group in groups),
        rounds=args.rounds,
        forward_s=forward_s,
        scoring_s=scoring_s,
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        required=required,
        met=median(ratios) <= required,
        forward_images_per_s=images / forward_s,
        scoring_images_per_s=images / scoring_s,
    )
    return figure, profile_network(net, groups, batches, clock, extra_s=scoring_s - forward_s) if args.profile else []


class TimedIndependence(ChannelIndependence):
    """Channel independence that keeps count of the time it takes for each shape of maps."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.seconds: dict[tuple[int, int], list[float]] = {}

    def score_maps(self, maps_BCP: Tensor, sides: tuple[int, int]) -> Tensor:
        """The scores of the plain criterion."""
        seconds, scores_BC = self.clock(partial(super().score_maps, maps_BCP, sides))
        assert scores_BC is not None
        self.seconds.setdefault((maps_BCP.shape[1], maps_BCP.shape[2]), []).append(seconds)
        return scores_BC


def profile_network(
    net: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Tensor], clock: Clock, *, extra_s: float
) -> list[ProfileRow]:
    """Milliseconds an image that the criterion takes, by the shape of the maps, the dearest shape first."""
    criterion = TimedIndependence(clock)
    score_groups(net, groups, criterion, batches)
    images = sum(len(batch) for batch in batches)
    rows = [
        ProfileRow(
            channels=channels,
            pixels=pixels,
            consumers=len(seconds) // len(batches),
            ms_per_consumer=1e3 * sum(seconds) / images / (len(seconds) / len(batches)),
            ms=1e3 * sum(seconds) / images,
            share=sum(seconds) / extra_s,
        )
        for (channels, pixels), seconds in criterion.seconds.items()
    ]
    return sorted(rows, key=lambda row: -row.ms)


def measure_memory(args: argparse.Namespace) -> MemoryFigure:
    """Two processes of their own: one that runs two batches through the network, one that scores them."""
    peaks = {}
    for what in ("forward", "scoring"):
        command = [sys.executable, __file__, "--network", args.network, "--peak", what, "--batch", str(args.batch)]
        command += ["--seed", str(args.seed), "--threads", str(args.threads)]
        command += [word for key in ("weights", "data") if (value := vars(args)[key]) for word in (f"--{key}", value)]
        peaks[what] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    above = peaks["scoring"] - peaks["forward"]
    return MemoryFigure(
        network=args.network,
        batch=args.batch,
        forward_bytes=peaks["forward"],
        scoring_bytes=peaks["scoring"],
        above_bytes=above,
        required_bytes=REQUIRED_MEMORY_BYTES,
        met=above <= REQUIRED_MEMORY_BYTES,
    )


def peak_bytes(args: argparse.Namespace, what: str) -> int:
    """The peak resident memory of this process while it does nothing but that.

    Imports and the reading of the channel groups come before: they belong to a run whether it scores or not.
    """
    net, groups, batches = prepare_network(args, images=2 * args.batch)
    with contextlib.suppress(OSError):  # only Linux can forget the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    if what == "forward":
        forward(net, batches)
    else:
        score_groups(net, groups, ChannelIndependence(), batches)
    return _high_water_bytes()


def prepare_network(args: argparse.Namespace, *, images: int) -> tuple[nn.Module, list[ChannelGroup], list[Tensor]]:
    """The network, its channel groups, and its images in memory: reading them is nobody's time."""
    built, data = open_network(args, args.network, images=images)
    batches = [
        batch.to(args.device) for batch in batches_of(drawn(data.train, n=images, seed=args.seed), batch=args.batch)
    ]
    groups = ChannelGraph(built.module, batches[0][:1].cpu()).groups
    return built.module.eval().to(args.device), groups, batches


def print_shapes(figures: Sequence[ShapeFigure], *, device: str) -> None:
    """One row a shape."""
    columns = ["shape", "images", "rounds", "published ms", "ours ms", "ratio", "range", "required", "met", "gap"]
    rows = [
        [
            f"{f.channels}x{f.pixels}",
            f"{f.images}",
            f"{f.rounds}",
            f"{f.published_ms:.2f}",
            f"{f.ours_ms:.4f}",
            f"{f.ratio:.1f}",
            f"{f.ratio_low:.1f}-{f.ratio_high:.1f}",
            f"{f.required:.0f}",
            _yes(f.met),
            f"{f.largest_gap:.0e}",
        ]
        for f in figures
    ]
    print_table(f"Channel independence, {_unit(device)} of one image", columns, rows)


def print_network(figure: NetworkFigure, profile: Sequence[ProfileRow], *, device: str) -> None:
    """The network's row, and the profile where there is one."""
    f = figure
    columns = ["network", "images", "batch", "rounds", "forward s", "scoring s", "extra/forward", "range", "at most"]
    columns += ["met", "forward images/s", "scoring images/s"]
    row = [f.network, f"{f.images}", f"{f.batch}", f"{f.rounds}", f"{f.forward_s:.3f}", f"{f.scoring_s:.3f}"]
    row += [f"{f.ratio:.2f}", f"{f.ratio_low:.2f}-{f.ratio_high:.2f}", f"{f.required:.1f}", _yes(f.met)]
    row += [f"{f.forward_images_per_s:.1f}", f"{f.scoring_images_per_s:.1f}"]
    print_table(f"Scoring all {f.groups} groups at {f.size} pixels, {_unit(device)}", columns, [row])
    if not profile:
        return
    rows = [
        [f"{p.channels}x{p.pixels}", f"{p.consumers}", f"{p.ms_per_consumer:.4f}", f"{p.ms:.3f}", f"{p.share:.1%}"]
        for p in profile
    ]
    extra_ms = 1e3 * (f.scoring_s - f.forward_s) / f.images
    inside_ms = sum(p.ms for p in profile)
    rows.append(["hooks, sums", "", "", f"{extra_ms - inside_ms:.3f}", f"{1 - inside_ms / extra_ms:.1%}"])
    rows.append(["forward pass", "", "", f"{1e3 * f.forward_s / f.images:.3f}", ""])
    print_table(
        "Where scoring's time goes, of one image",
        ["maps", "consumers", "ms a consumer", "ms", "of what scoring adds"],
        rows,
    )


def print_memory(figure: MemoryFigure) -> None:
    """One row: MiB of both processes and of the difference."""
    f = figure
    mib = [f"{size / 2**20:.0f}" for size in (f.forward_bytes, f.scoring_bytes, f.above_bytes, f.required_bytes)]
    columns = ["network", "batch", "forward MiB", "scoring MiB", "above", "at most", "met"]
    print_table("Peak resident memory", columns, [[f.network, f"{f.batch}", *mib, _yes(f.met)]])


def _high_water_bytes() -> int:
    """Linux keeps two: the one of getrusage includes what the parent held when it started this process."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _options() -> argparse.Namespace:
    about = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="CxP", default=[*map(_shape, (*LARGE, *SMALL))])
    parser.add_argument("--way", choices=[*WAYS], default="used", help="with --shapes: how ours is computed [used]")
    parser.add_argument("--network", choices=[*IMAGES], help="a whole network instead of shapes")
    parser.add_argument("--profile", action="store_true", help="with --network: where the time goes")
    parser.add_argument("--memory", action="store_true", help="with --network: peak memory instead of time")
    parser.add_argument("--images", type=count, metavar="N", help="images of the network, or of ours in one batch")
    parser.add_argument("--batch", type=count, default=32, help="images in one batch of the network [32]")
    parser.add_argument("--rounds", type=count, default=3, help="A B pairs with --network [3]")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help=f"A B pairs of a shape: until A has taken so long, {FEWEST_ROUNDS} to {MOST_ROUNDS} [2.0]",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: CUDA events, images/s")
    parser.add_argument("--peak", choices=["forward", "scoring"], help=argparse.SUPPRESS)
    add_network_options(parser)
    add_common_options(parser)
    args = parser.parse_args()
    if args.network is None and (args.profile or args.memory):
        parser.error("--profile and --memory need a --network.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here. Leave --device out.")
    return args


def _shape(text: str) -> tuple[int, int]:
    channels, x, pixels = text.partition("x")
    if not (x and channels.isdecimal() and pixels.isdecimal() and int(channels) and int(pixels)):
        raise argparse.ArgumentTypeError(f"'{text}' is no shape; CHANNELSxPIXELS is expected, for example 512x784.")
    return int(channels), int(pixels)


def _unit(device: str) -> str:
    return "CUDA event time" if device == "cuda" else f"CPU time, {torch.get_num_threads()} thread(s)"


def _yes(met: object) -> str:
    return "yes" if met else "NO"


if __name__ == "__main__":
    main()

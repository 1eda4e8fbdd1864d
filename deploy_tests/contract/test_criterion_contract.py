"""What every criterion keeps to, whatever it looks at; the table says which there are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.criteria import CRITERIA, make_criterion
from chip_deploy.chip.criterion import (
    Criterion,
    Filters,
    Grade,
    GroupWeights,
    MapCriterion,
    Need,
    RunCriterion,
    WeightCriterion,
)
from chip_deploy.chip.evidence import score_all
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.image_pass import Batch

KINDS = (MapCriterion, WeightCriterion, RunCriterion)
CLOSE = 1e-9  # in shares of the average score: sums in another order, in float64
TWINS = 2e-6  # nuclear norms keep 1e-7 of the largest singular value, and of seven twins each scores a 13th of it
WIDTH = 7

# Where dead channels need not come last, and why.
SPARES_THE_DEAD = {
    "fpgm": "zeros may lie far from the other filters",
    "random": "a draw knows no weights",
}

KIND = {name: next(kind for kind in KINDS if isinstance(make_criterion(name), kind)) for name in CRITERIA}


def criteria_but(*left_out: str, kinds: tuple[type[Criterion], ...] = KINDS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [n for n in CRITERIA if n not in left_out and KIND[n] in kinds])


every_criterion = criteria_but()
the_map_criteria = criteria_but(kinds=(MapCriterion,))
the_weight_criteria = criteria_but(kinds=(WeightCriterion,))
those_that_know_the_dead = criteria_but(*SPARES_THE_DEAD)


@dataclass(frozen=True)
class Channels:
    """One group of channels as every kind of criterion may be shown it: what layers hold, maps, and a game of runs.

    order: which of the drawn channels stands where. dead: of the drawn channels, those that hold and show nothing.
    """

    seed: int = 0
    width: int = WIDTH
    order: tuple[int, ...] | None = None
    dead: tuple[int, ...] = ()
    alike: bool = False
    sides: tuple[int, int] = (4, 6)
    images: int = 5
    dtype: torch.dtype = torch.float64
    _draw: torch.Generator = field(default_factory=torch.Generator, repr=False)

    def drawn(self, *shape: int) -> Tensor:
        """Normal numbers, channels first, in the order of the channels."""
        values = torch.randn(self.width, *shape, generator=self._draw, dtype=torch.float64).to(self.dtype)
        values = values[:1].expand_as(values).clone() if self.alike else values
        values[list(self.dead)] = 0
        return values if self.order is None else values[list(self.order)]

    def weights(self, needs: frozenset[Need]) -> GroupWeights:
        """A producer of nine taps, one on some channels only, two consumers and two batch norms; what `needs` names."""
        self._draw.manual_seed(self.seed)
        everywhere = tuple(range(self.width))
        producers = [self._layer("conv", (3, 9), taps=9, needs=needs), self._layer("linear", (4,), needs=needs)]
        consumers = [self._layer("next", (5, 9), taps=9, needs=needs), self._layer("flat", (6,), needs=needs)]
        scales = [Filters(bn, everywhere, self.drawn(1).double()) for bn in ("bn1", "bn2")]
        priced = "cost" in needs
        return GroupWeights(
            "conv",
            self.width,
            tuple(producers),
            tuple(consumers) if "consumer weights" in needs else (),
            tuple(scales),
            100.0 if priced else float("nan"),
            10.0 if priced else float("nan"),
        )

    def _layer(self, layer: str, shape: tuple[int, ...], *, needs: frozenset[Need], taps: int = 1) -> Filters:
        values, gradients = (self.drawn(*shape).flatten(1).double() for _ in range(2))
        everywhere = tuple(range(self.width))
        return Filters(layer, everywhere, values, gradients if "gradients" in needs else None, taps)

    def maps_BCP(self) -> Tensor:
        """What a rectified layer shows."""
        self._draw.manual_seed(self.seed)
        height, width = self.sides
        return self.drawn(self.images, height * width).relu().transpose(0, 1).contiguous()

    def runs(self) -> Callable[[Tensor], Tensor]:
        """A game in which every living channel helps, and the more the fewer there are."""
        self._draw.manual_seed(self.seed)
        brought_CB = self.drawn(self.images).abs().double()
        return lambda alive_C: (alive_C.double() @ brought_CB).sqrt()


def scores(criterion: Criterion, channels: Channels) -> Tensor:
    """The criterion's score of the group, shown in its own way."""
    match criterion:
        case WeightCriterion():
            return criterion.score_weights({"conv": channels.weights(criterion.needs)})["conv"]
        case MapCriterion():
            return criterion.score_maps(channels.maps_BCP(), channels.sides).mean(0)
        case RunCriterion():
            return criterion.score_runs(channels.runs(), channels.width).importance_C
        case _:
            raise AssertionError(f"{criterion.name} is none of {KINDS}")


def assert_scores(found: Tensor, width: int) -> None:
    assert found.shape == (width,)
    assert found.dtype == torch.float64
    assert found.isfinite().all()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = CLOSE) -> None:
    scale = max(float(expected.abs().mean()), 1e-12)
    assert float((found - expected).abs().max()) <= tolerance * scale, f"{found} is not {expected}"


@every_criterion
def test_a_criterion_says_what_it_is(name: str) -> None:
    criterion = make_criterion(name)
    assert criterion.name == name
    assert isinstance(criterion, KINDS)
    assert criterion.needs
    assert criterion.needs <= set(get_args(Need))
    assert criterion.grade in get_args(Grade)
    assert "Source" in (type(criterion).__doc__ or "")


@every_criterion
def test_needs_are_those_of_its_kind(name: str) -> None:
    criterion = make_criterion(name)
    must = {MapCriterion: "maps", WeightCriterion: "weights", RunCriterion: "masked runs"}[KIND[name]]
    assert must in criterion.needs
    if criterion.needs & {"gradients", "masked runs"}:
        assert "labels" in criterion.needs


@every_criterion
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 2, WIDTH, 12])
def test_scores_are_one_finite_number_a_channel(name: str, width: int, dtype: torch.dtype) -> None:
    assert_scores(scores(make_criterion(name), Channels(width=width, dtype=dtype)), width)


@every_criterion
def test_the_same_seed_gives_the_same_scores(name: str) -> None:
    first, second = (scores(make_criterion(name, seed=3), Channels(seed=1)) for _ in range(2))
    assert torch.equal(first, second)


@every_criterion
def test_nothing_is_drawn_from_the_random_numbers_of_the_process(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    scores(make_criterion(name), Channels())
    assert torch.equal(torch.get_rng_state(), before)


@every_criterion
def test_scoring_again_changes_nothing(name: str) -> None:
    criterion = make_criterion(name)
    first = scores(criterion, Channels())
    scores(criterion, Channels(seed=1, width=4))
    assert torch.equal(scores(criterion, Channels()), first)


@every_criterion
@pytest.mark.parametrize("seed", range(3))
def test_permuted_channels_have_permuted_scores(name: str, seed: int) -> None:
    criterion = make_criterion(name)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed)).tolist()
    dead = (2, 4) if seed else ()
    plain = scores(criterion, Channels(seed=seed, dead=dead))
    assert_close(scores(criterion, Channels(seed=seed, dead=dead, order=tuple(order))), plain[order])


@every_criterion
def test_channels_all_alike_score_alike(name: str) -> None:
    found = scores(make_criterion(name), Channels(alike=True))
    assert_scores(found, WIDTH)
    assert_close(found, found[:1].expand(WIDTH), TWINS)


@those_that_know_the_dead
@pytest.mark.parametrize("seed", range(3))
def test_dead_channels_come_last(name: str, seed: int) -> None:
    dead = [1, 5]
    found = scores(make_criterion(name), Channels(seed=seed, dead=tuple(dead)))
    assert_scores(found, WIDTH)
    living = [channel for channel in range(WIDTH) if channel not in dead]
    assert float(found[dead].max()) < float(found[living].min())


@every_criterion
def test_a_group_that_is_dead_throughout_still_has_numbers(name: str) -> None:
    found = scores(make_criterion(name), Channels(dead=tuple(range(WIDTH))))
    assert_scores(found, WIDTH)
    assert_close(found, found[:1].expand(WIDTH))


@the_weight_criteria
def test_one_group_does_not_hang_on_another_but_for_the_cost(name: str) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, WeightCriterion)
    own = Channels().weights(criterion.needs)
    others = {"dead": Channels(dead=tuple(range(WIDTH))).weights(criterion.needs)}
    others["narrow"] = Channels(seed=2, width=1).weights(criterion.needs)
    together = criterion.score_weights({**others, "conv": own})
    assert list(together) == ["dead", "narrow", "conv"]
    assert torch.equal(together["conv"], criterion.score_weights({"conv": own})["conv"])
    assert_scores(together["dead"], WIDTH)
    assert_scores(together["narrow"], 1)


@the_weight_criteria
def test_no_group_is_no_score(name: str) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, WeightCriterion)
    assert criterion.score_weights({}) == {}


@the_weight_criteria
def test_weights_are_left_as_they_were(name: str) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, WeightCriterion)
    group = Channels().weights(criterion.needs)
    layers = (*group.producers, *group.consumers, *group.scales)
    before = [layer.values_KN.clone() for layer in layers]
    criterion.score_weights({"conv": group})
    assert all(torch.equal(layer.values_KN, was) for layer, was in zip(layers, before, strict=True))


@the_map_criteria
def test_maps_are_left_as_they_were(name: str) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, MapCriterion)
    maps = Channels().maps_BCP()
    criterion.score_maps(maps, Channels().sides)
    assert torch.equal(maps, Channels().maps_BCP())


@criteria_but("random", kinds=(WeightCriterion,))
def test_weights_that_are_no_numbers_are_not_hidden(name: str) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, WeightCriterion)
    group = Channels().weights(criterion.needs)
    for layer in (*group.producers, *group.scales):
        layer.values_KN[3] = float("nan")
    assert not criterion.score_weights({"conv": group})["conv"][3].isfinite()


@criteria_but("random", kinds=(WeightCriterion,))
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scores_do_not_see_the_scale_of_all_weights(name: str, scale: float) -> None:
    """Channels are ranked within a layer, and a layer's scale is the next batch norm's business."""
    criterion = make_criterion(name)
    assert isinstance(criterion, WeightCriterion)
    group = Channels().weights(criterion.needs)
    assert_close(criterion.score_weights({"conv": _scaled(group, scale)})["conv"], scores(criterion, Channels()))


@the_map_criteria
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_shares_do_not_see_the_scale_of_all_maps(name: str, scale: float) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, MapCriterion)
    plain = scores(criterion, Channels())
    found = criterion.score_maps(Channels().maps_BCP() * scale, Channels().sides).mean(0)
    assert_close(found / found.mean(), plain / plain.mean(), 1e-6)


@the_map_criteria
@pytest.mark.parametrize("sides", [(4, 6), (24, 1), (1, 1), (1, 5)])
def test_an_image_is_scored_by_itself_whatever_the_batch(name: str, sides: tuple[int, int]) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, MapCriterion)
    maps = Channels(sides=sides).maps_BCP()
    whole = criterion.score_maps(maps, sides)
    assert whole.shape == maps.shape[:2]
    assert whole.isfinite().all()
    for sizes in ([1] * 5, [2, 3], [4, 1]):
        assert_close(torch.cat([criterion.score_maps(part, sides) for part in maps.split(sizes)]), whole)
    assert_close(criterion.score_maps(maps.flip(0), sides), whole.flip(0))


@the_map_criteria
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sides", [(4, 6), (24, 1)])
def test_maps_that_are_not_finite_have_no_score(name: str, bad: float, sides: tuple[int, int]) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, MapCriterion)
    maps = Channels(sides=sides).maps_BCP()
    maps[2, 3, 1] = bad
    found = criterion.score_maps(maps, sides)
    assert found[2, 3].isnan()
    assert found[[0, 1, 3, 4]].isfinite().all()


@the_map_criteria
def test_no_image_is_no_score(name: str) -> None:
    criterion = make_criterion(name)
    assert isinstance(criterion, MapCriterion)
    found = criterion.score_maps(torch.zeros(0, 3, 4), (2, 2))
    assert (found.shape, found.dtype) == ((0, 3), torch.float64)


# On a whole network, through the pass over the images and the layout of its layers.

ORDER = [3, 0, 5, 1, 4, 2]


def network(order: list[int], *, dead: int | None = None) -> nn.Module:
    """Two convolutions with batch norms and a classifier; the channels of the first one stand in this order."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 4),
    ).double()
    first, norm, second = (net.get_submodule(name) for name in "013")
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.2, 0.2)
        if dead is not None:
            for values in (first.weight[dead], norm.weight[dead], norm.bias[dead], second.weight[:, dead]):
                values.zero_()
        for values in (first.weight, norm.weight, norm.bias):
            values.copy_(values[order].clone())
        second.weight.copy_(second.weight[:, order].clone())
    return net.eval()


def batches(*sizes: int, backwards: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (12,), generator=generator)
    if backwards:
        images, labels = images.flip(0), labels.flip(0)
    return [Batch(*part) for part in zip(images.split(sizes), labels.split(sizes), strict=True)]


def network_scores(net: nn.Module, shown: list[Batch]) -> dict[str, dict[str, Tensor]]:
    """Criterion -> group -> scores, all from one pass."""
    example = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    groups = ChannelGraph(net, example).groups
    criteria = [make_criterion(name) for name in CRITERIA]
    found = score_all(net, groups, criteria, shown, cost=CostModel(net, example))
    return {name: scored.scores for name, scored in found.items()}


@pytest.fixture(scope="module")
def plain_scores() -> dict[str, dict[str, Tensor]]:
    return network_scores(network(list(range(6))), batches(12))


@pytest.fixture(scope="module")
def other_batches() -> dict[str, dict[str, Tensor]]:
    return network_scores(network(list(range(6))), batches(5, 4, 2, 1, backwards=True))


@pytest.fixture(scope="module")
def permuted_scores() -> dict[str, dict[str, Tensor]]:
    return network_scores(network(ORDER), batches(12))


@pytest.fixture(scope="module")
def scores_with_a_dead_channel() -> dict[str, dict[str, Tensor]]:
    return network_scores(network(list(range(6)), dead=2), batches(12))


@every_criterion
def test_scores_are_shares_of_the_group_unless_they_compare_as_they_are(
    name: str, plain_scores: dict[str, dict[str, Tensor]]
) -> None:
    compares = name in ("cpmc", "interactions", "lamp", "random")
    assert make_criterion(name).comparable == compares
    for found in plain_scores[name].values():
        assert (abs(float(found.mean()) - 1) < CLOSE) == (not compares)


@every_criterion
def test_order_and_size_of_batches_change_nothing(
    name: str, plain_scores: dict[str, dict[str, Tensor]], other_batches: dict[str, dict[str, Tensor]]
) -> None:
    assert list(plain_scores[name]) == list(other_batches[name]) == ["0", "3"]
    for layer, found in other_batches[name].items():
        assert_scores(found, 6 if layer == "0" else 5)
        assert_close(found, plain_scores[name][layer], TWINS)


@every_criterion
def test_permuted_channels_of_a_network_have_permuted_scores(
    name: str, plain_scores: dict[str, dict[str, Tensor]], permuted_scores: dict[str, dict[str, Tensor]]
) -> None:
    assert_close(permuted_scores[name]["0"], plain_scores[name]["0"][ORDER], TWINS)


@those_that_know_the_dead
def test_a_dead_channel_of_a_network_counts_least(
    name: str, scores_with_a_dead_channel: dict[str, dict[str, Tensor]]
) -> None:
    """A channel that does harm may score below nothing, so it is the size that counts."""
    sizes = scores_with_a_dead_channel[name]["0"].abs()
    assert sizes.argmin() == 2
    assert (sizes == sizes[2]).sum() == 1


def test_every_exception_is_in_the_table() -> None:
    assert set(SPARES_THE_DEAD) <= set(CRITERIA)


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown criterion 'chop'; available: chip, cpmc, .*random"):
        make_criterion("chop")


def _scaled(group: GroupWeights, scale: float) -> GroupWeights:
    parts: Mapping[str, tuple[Filters, ...]] = {
        part: tuple(replace(layer, values_KN=layer.values_KN * scale) for layer in getattr(group, part))
        for part in ("producers", "consumers", "scales")
    }
    return replace(group, **parts)

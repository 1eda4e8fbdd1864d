"""Importance and strength against exact enumeration over all coalitions of six players."""

import itertools
import math

import pytest
import torch
from torch import nn

from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.interactions import FilterInteractions
from chip_deploy.chip.masked import MaskedRuns

PLAYERS = 6
IMAGES = 3


def _coalitions(players):
    """Every subset of these players."""
    return [frozenset(c) for size in range(len(players) + 1) for c in itertools.combinations(players, size)]


def _random_game(seed=0):
    """A value for every coalition, in every image."""
    generator = torch.Generator().manual_seed(seed)
    coalitions = _coalitions(range(PLAYERS))
    values = torch.randn(len(coalitions), IMAGES, dtype=torch.float64, generator=generator)
    return dict(zip(coalitions, values, strict=True))


def _pair_game(seed=0):
    """Channels act alone or in pairs, and no three together."""
    generator = torch.Generator().manual_seed(seed)
    alone = torch.randn(PLAYERS, IMAGES, dtype=torch.float64, generator=generator)
    pairs = torch.randn(PLAYERS, PLAYERS, IMAGES, dtype=torch.float64, generator=generator)
    return {
        s: sum(
            [alone[i] for i in s] + [pairs[i, j] for i, j in itertools.combinations(sorted(s), 2)],
            start=torch.zeros(IMAGES, dtype=torch.float64),
        )
        for s in _coalitions(range(PLAYERS))
    }


def _shapley(game, players, player):
    """The average, over all orders of the players, of what this one adds to those before it."""
    others = [p for p in players if p != player]
    n = len(players)
    return sum(
        math.factorial(len(s)) * math.factorial(n - len(s) - 1) / math.factorial(n) * (game(s | {player}) - game(s))
        for s in _coalitions(others)
    )


def _merged_interaction(game, players, i, j):
    """What i and j are worth as one player, less what each is worth where the other is not in the game."""
    rest = [p for p in players if p not in (i, j)]
    as_one = _shapley(lambda s: game((s - {"ij"}) | {i, j} if "ij" in s else s), [*rest, "ij"], "ij")
    return as_one - _shapley(game, [*rest, i], i) - _shapley(game, [*rest, j], j)


def _pair_interaction(game, players, i, j):
    """The weighted sum over the coalitions of the others of v(S+i+j) - v(S+i) - v(S+j) + v(S)."""
    rest, n = [p for p in players if p not in (i, j)], len(players)
    return sum(
        math.factorial(len(s)) * math.factorial(n - len(s) - 2) / math.factorial(n - 1)
        * (game(s | {i, j}) - game(s | {i}) - game(s | {j}) + game(s))
        for s in _coalitions(rest)
    )  # fmt: skip


class Game:
    """Plays a table, one mask at a time, and counts."""

    def __init__(self, table):
        self.table = table
        self.played = 0

    def __call__(self, alive_C):
        self.played += 1
        return self.table[frozenset(alive_C.nonzero().flatten().tolist())]


def _score(table, width=PLAYERS, **settings):
    return FilterInteractions(**settings).score_runs(Game(table), width)


def _enumerated_shapley(table):
    return torch.stack([_shapley(table.__getitem__, range(PLAYERS), i).mean() for i in range(PLAYERS)])


def test_both_definitions_of_an_interaction_agree_and_their_mean_over_partners_needs_four_values_only():
    table = _random_game()
    everyone, none = frozenset(range(PLAYERS)), frozenset()
    for i in range(PLAYERS):
        partners = [j for j in range(PLAYERS) if j != i]
        by_sum = [_pair_interaction(table.__getitem__, range(PLAYERS), i, j) for j in partners]
        merged = [_merged_interaction(table.__getitem__, range(PLAYERS), i, j) for j in partners]
        assert torch.allclose(torch.stack(by_sum), torch.stack(merged), rtol=0, atol=1e-12)
        four = table[everyone] - table[everyone - {i}] - table[frozenset({i})] + table[none]
        assert torch.allclose(torch.stack(by_sum).mean(0), four / (PLAYERS - 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("game", [_random_game, _pair_game])
@pytest.mark.parametrize("samples", [0, 2])
def test_strength_is_the_mean_size_of_the_enumerated_interactions_in_shares_of_a_contribution(game, samples):
    table = game()
    sizes = [
        torch.stack([_pair_interaction(table.__getitem__, range(PLAYERS), i, j) for j in range(PLAYERS) if j != i])
        .mean(0)
        .abs()
        .mean()
        for i in range(PLAYERS)
    ]
    together = (table[frozenset(range(PLAYERS))] - table[frozenset()]).abs().mean()
    expected = float(torch.stack(sizes).mean() / (together / PLAYERS))
    assert _score(table, samples=samples).strength == pytest.approx(expected, rel=1e-12)


def test_importance_is_the_shapley_value_where_channels_act_alone_or_in_pairs():
    table = _pair_game()
    assert torch.allclose(_score(table).importance_C, _enumerated_shapley(table), rtol=0, atol=1e-12)


def test_importance_is_the_mean_of_the_first_and_the_last_contribution():
    values = {(): 1.0, (0,): 4.0, (1,): 2.0, (2,): 1.0, (1, 2): 3.0, (0, 2): 6.0, (0, 1): 11.0, (0, 1, 2): 10.0}
    table = {frozenset(s): torch.tensor([v], dtype=torch.float64) for s, v in values.items()}
    played = _score(table, 3)
    assert played.importance_C.tolist() == [(7 + 3) / 2, (4 + 1) / 2, (-1 + 0) / 2]
    assert played.strength == pytest.approx(((4 + 3 + 1) / 3 / 2) / (9 / 3))


def test_sampled_importance_is_within_its_standard_error_of_the_shapley_value():
    table, draws = _random_game(), 200
    single = torch.stack([_score(table, samples=1, seed=seed).importance_C for seed in range(draws)])
    error_C = single.std(0) / draws**0.5
    distance_C = (single.mean(0) - _enumerated_shapley(table)).abs()
    assert bool((error_C > 0).all())
    assert bool((distance_C < 4 * error_C).all())  # all six within 4 of them but once in 3000


def test_sixteen_times_the_samples_leave_about_a_quarter_of_the_error():
    table = _random_game()
    exact = _enumerated_shapley(table)

    def error(samples):
        found = torch.stack([_score(table, samples=samples, seed=seed).importance_C for seed in range(30)])
        return float((found - exact).square().mean().sqrt())

    assert error(32) == pytest.approx(error(2) / 4, rel=0.25)  # 180 values give a root mean square to about 5 %


def test_sampled_importances_sum_to_what_all_channels_do_together():
    table = _random_game()
    together = float((table[frozenset(range(PLAYERS))] - table[frozenset()]).mean())
    assert float(_score(table, samples=3).importance_C.sum()) == pytest.approx(together, rel=1e-12)


def test_channels_that_add_up_have_no_strength_and_their_own_value_as_importance():
    own = torch.tensor([[1.0, 3.0], [-2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    table = {s: own[sorted(s)].sum(0) for s in _coalitions(range(3))}
    for samples in (0, 4):
        played = _score(table, 3, samples=samples)
        assert played.importance_C.tolist() == [2.0, -1.0, 0.0]
        assert played.strength == 0


def test_a_single_channel_has_its_contribution_and_no_strength():
    table = {frozenset(): torch.tensor([1.0, 2.0]), frozenset({0}): torch.tensor([4.0, 3.0])}
    for samples in (0, 2):
        played = _score(table, 1, samples=samples)
        assert played.importance_C.tolist() == [2.0]
        assert played.strength == 0


def test_a_group_that_does_nothing_has_neither_importance_nor_strength():
    table = {s: torch.tensor([2.0, 5.0], dtype=torch.float64) for s in _coalitions(range(4))}
    played = _score(table, 4)
    assert played.importance_C.tolist() == [0.0] * 4
    assert played.strength == 0


def test_two_channels_that_cancel_each_other_act_together_at_a_finite_strength():
    values = {(): 0.0, (0,): 3.0, (1,): 3.0, (0, 1): 0.0}
    table = {frozenset(s): torch.tensor([v], dtype=torch.float64) for s, v in values.items()}
    played = _score(table, 2)
    assert played.importance_C.tolist() == [0.0, 0.0]
    assert played.strength == 2.0  # each has an interaction of -6 and does 3 either way


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_named(bad):
    table = _random_game()
    table[frozenset({4})] = torch.tensor([0.0, bad, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"with 1 of 6 channels alive, the value of image 1 is"):
        _score(table)


@pytest.mark.parametrize(("samples", "runs"), [(0, 2 * 6 + 2), (3, 2 * 6 + 2 + 3 * 2 * 5)])
def test_the_cost_is_what_the_docstring_says_and_progress_ends_at_one(samples, runs):
    game, told = Game(_random_game()), []
    FilterInteractions(samples=samples).score_runs(game, PLAYERS, progress=told.append)
    assert game.played == runs
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="samples is -1; 0"):
        FilterInteractions(samples=-1)


def test_the_criterion_on_a_network_gives_what_cutting_each_channel_by_hand_gives():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 70, 3), nn.ReLU(), nn.Conv2d(70, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).double().eval()  # fmt: skip
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])
    table = MaskedRuns(net, ChannelGraph(net, images[:1]).groups, images, labels, batch=10)
    played = FilterInteractions().score_runs(table.runs("0"), 70)  # more masks than are played between two words

    def value(alive_C):
        with torch.no_grad():
            maps = net[:2](images) * alive_C.double().view(1, -1, 1, 1)
            p = net[2:](maps).softmax(1)[torch.arange(4), labels]
        return (p / (1 - p)).log()

    def contributions(i):
        own = torch.arange(70) == i
        last = value(torch.ones(70)) - value(~own)
        return last, value(own) - value(torch.zeros(70))

    expected = torch.stack([sum(contributions(i)).mean() / 2 for i in range(70)])
    assert torch.allclose(played.importance_C, expected, rtol=0, atol=1e-12)
    together = (value(torch.ones(70)) - value(torch.zeros(70))).abs().mean()
    parts = torch.stack([(last - first).abs().mean() for last, first in map(contributions, range(70))])
    assert played.strength == pytest.approx(float(parts.mean() / 69 / (together / 70)), rel=1e-10)

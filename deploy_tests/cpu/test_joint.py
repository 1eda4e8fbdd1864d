"""Joint channel independence against a greedy removal that knows nothing but singular value decompositions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chip_deploy.chip import joint
from chip_deploy.chip.joint import TIE, Reader, joint_scores
from chip_deploy.chip.nuclear import channel_independence, channel_independence_svd

# In shares of an average channel. The nodes of the quadrature end at 1.7e-8 of the largest singular value, so a twin
# that differs by about that much is worst; everything else is below 3e-9.
CLOSE = 1e-8


def _maps(seed, images, channels, pixels):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, pixels, generator=generator, dtype=torch.float64).relu()


def _reader(maps):
    return Reader(maps, range(maps.shape[1]))


def _greedy(readers, width):
    """Channels in the order of their removal, and the scores: the definition, one SVD per image, channel and step."""
    means = [float(channel_independence_svd(reader.rows_BCP).mean()) or 1.0 for reader in readers]
    left = sorted({c for r in readers for row, c in enumerate(r.covered) if bool((r.rows_BCP[:, row] != 0).any())})
    order, scores, last = [], torch.zeros(width, dtype=torch.float64), 0.0
    while left:
        shares = {channel: [] for channel in left}
        for reader, mean in zip(readers, means, strict=True):
            rows = [row for row, channel in enumerate(reader.covered) if channel in shares]
            values = channel_independence_svd(reader.rows_BCP[:, rows]).mean(0) / mean
            for row, value in zip(rows, values.tolist(), strict=True):
                shares[reader.covered[row]].append(value)
        values = {channel: sum(found) / len(found) for channel, found in shares.items()}
        channel = max(c for c in left if values[c] <= min(values.values()) + TIE)
        last = max(last, values[channel])
        scores[channel] = last
        order.append(channel)
        left.remove(channel)
    return order, scores


def _order(scores):
    return [channel for channel in scores.argsort().tolist() if scores[channel] > 0]


def _assert_greedy(readers, width):
    order, expected = _greedy(readers, width)
    found = joint_scores(readers, width=width)
    assert _order(found) == order
    assert torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    channels=st.integers(1, 14),
    pixels=st.integers(1, 24),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_order_and_scores_are_those_of_greedy_removal_by_definition(seed, channels, pixels, scale):
    readers = [_reader(_maps(seed, 2, channels, pixels) * scale), _reader(_maps(seed + 1, 1, channels, 9))]
    _assert_greedy(readers, channels)


@pytest.mark.parametrize(("channels", "pixels"), [(24, 24), (40, 12), (20, 60)])
def test_many_removals_do_not_add_up_rounding(channels, pixels):
    _assert_greedy([_reader(_maps(3, 2, channels, pixels))], channels)


def test_of_twins_one_stays_where_the_one_shot_rule_would_lose_both():
    maps = torch.zeros(1, 4, 5, dtype=torch.float64)
    maps[0, 0, 0] = 3.0
    maps[0, 1, 1] = maps[0, 3, 1] = 2.0
    maps[0, 2, 2] = 1.5
    twin = 2 * (math.sqrt(2) - 1)
    mean = (3 + 1.5 + 2 * twin) / 4
    one_shot = channel_independence(maps)[0]
    assert max(one_shot[1], one_shot[3]) < one_shot[2]
    found = joint_scores([_reader(maps)], width=4)
    assert torch.allclose(found * mean, torch.tensor([3, 2, 1.5, twin], dtype=torch.float64), rtol=CLOSE)


@pytest.mark.parametrize("shape", [(2, 12, 30), (2, 16, 7)])
def test_three_identical_channels_and_a_doubled_one_leave_one_each(shape):
    maps = _maps(4, *shape)
    maps[:, 5] = maps[:, 7] = maps[:, 2]
    maps[:, 9] = 2 * maps[:, 1]
    _assert_greedy([_reader(maps)], shape[1])


@pytest.mark.parametrize("distance", [1e-5, 1e-7, 1e-9, 1e-11])
def test_nearly_identical_channels_are_as_good_as_identical(distance):
    maps = _maps(5, 2, 12, 30)
    maps[:, 7] = maps[:, 2] + distance * _maps(6, 2, 12, 30)[:, 7]
    expected = _greedy([_reader(maps)], 12)[1]
    found = joint_scores([_reader(maps)], width=12)
    # which of the two goes may hang on the last digit; what both are worth does not
    pair = torch.tensor([2, 7])
    assert torch.allclose(found[pair].sort().values, expected[pair].sort().values, rtol=CLOSE, atol=CLOSE)
    others = torch.tensor([c for c in range(12) if c not in (2, 7)])
    assert torch.allclose(found[others], expected[others], rtol=10 * distance + CLOSE)


@pytest.mark.parametrize("channels", [20, 40])
def test_rank_deficient_maps_keep_their_digits_on_both_sides(channels):
    _assert_greedy([_reader(_maps(7, 2, channels, 4) @ _maps(8, 2, 4, 30))], channels)


def test_a_badly_conditioned_image_keeps_its_digits():
    _assert_greedy([_reader(_maps(9, 2, 16, 30) * torch.logspace(-5, 0, 30, dtype=torch.float64))], 16)


def test_cancellation_in_a_downdate_is_noticed_and_undone(monkeypatch):
    maps = _maps(3, 3, 16, 7)
    maps[:, 5] = maps[:, 7] = maps[:, 2]
    expected = _greedy([_reader(maps)], 16)[1]
    assert float((joint_scores([_reader(maps)], width=16) - expected).abs().max()) < CLOSE
    monkeypatch.setattr(joint, "_MOST_LOST", math.inf)
    assert float((joint_scores([_reader(maps)], width=16) - expected).abs().max()) > 2 * CLOSE


@pytest.mark.parametrize("shape", [(3, 26, 26), (3, 40, 12)])
def test_short_blocks_for_want_of_memory_change_nothing(shape, monkeypatch):
    readers = [_reader(_maps(10, *shape))]
    usual = joint_scores(readers, width=shape[1])
    monkeypatch.setattr(joint, "_DOWNDATE_BYTES", 1)  # one downdate, then an exact decomposition
    exact = joint_scores(readers, width=shape[1])
    assert _order(exact) == _order(usual)
    assert torch.allclose(exact, usual, rtol=CLOSE)
    assert not torch.equal(exact, usual)  # the last digits tell that the blocks were shorter indeed


def test_dead_channels_score_exactly_zero():
    maps = _maps(11, 3, 8, 30)
    maps[:, 3] = maps[:, 6] = 0
    maps[1, 2] = 0  # dead in one image only
    found = joint_scores([_reader(maps)], width=8)
    assert (found == 0).nonzero().flatten().tolist() == [3, 6]
    _assert_greedy([_reader(maps)], 8)


def test_a_channel_dead_for_one_consumer_lives_by_the_other():
    dead = _maps(12, 2, 6, 20)
    dead[:, 4] = 0
    readers = [_reader(dead), _reader(_maps(13, 2, 6, 20))]
    assert joint_scores(readers, width=6)[4] > 0
    _assert_greedy(readers, 6)


def test_consumers_may_cover_different_channels_in_any_order():
    _assert_greedy([Reader(_maps(14, 3, 5, 30), [0, 3, 4, 6, 1]), Reader(_maps(15, 2, 4, 3), [6, 5, 2, 0])], 8)


def test_a_channel_that_nobody_reads_scores_zero():
    found = joint_scores([Reader(_maps(16, 2, 2, 9), [0, 2])], width=4)
    assert (found > 0).tolist() == [True, False, True, False]


def test_maps_that_are_all_zero_and_no_reader_at_all_score_zero():
    assert torch.equal(joint_scores([_reader(torch.zeros(2, 5, 7))], width=5), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(joint_scores([], width=3), torch.zeros(3, dtype=torch.float64))


def test_a_silent_consumer_halves_every_score_and_keeps_the_order():
    maps = _maps(17, 2, 6, 20)
    alone = joint_scores([_reader(maps)], width=6)
    beside = joint_scores([_reader(maps), _reader(torch.zeros_like(maps))], width=6)
    assert torch.allclose(beside, alone / 2, rtol=1e-12)


def test_of_equal_channels_the_smallest_index_stays_and_scores_still_differ():
    found = joint_scores([_reader(torch.eye(5, 9, dtype=torch.float64)[None])], width=5)
    assert _order(found) == [4, 3, 2, 1, 0]
    assert torch.allclose(found, torch.ones(5, dtype=torch.float64), rtol=CLOSE)


def test_the_best_k_are_found_again_when_the_rest_is_gone():
    maps = _maps(18, 3, 12, 20)
    order = _order(joint_scores([_reader(maps)], width=12))
    for gone in (3, 7, 10):
        kept = sorted(order[gone:])
        again = _order(joint_scores([_reader(maps[:, kept])], width=len(kept)))
        assert [kept[place] for place in again] == order[gone:]


@pytest.mark.parametrize("power", [-40, 40])
def test_the_scale_of_a_consumer_does_not_matter(power):
    first, second = _maps(19, 2, 9, 20), _maps(20, 2, 9, 5)
    plain = joint_scores([_reader(first), _reader(second)], width=9)
    scaled = joint_scores([_reader(first), _reader(second * 2.0**power)], width=9)
    assert torch.equal(scaled, plain)  # powers of two change no digit


@pytest.mark.parametrize(("channels", "pixels"), [(1, 33), (1, 1)])
def test_a_single_channel_is_its_own_average(channels, pixels):
    maps = _maps(21, 4, channels, pixels) + 0.1
    assert torch.allclose(joint_scores([_reader(maps)], width=1), torch.ones(1, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_maps_are_scored_as_their_float64_values(dtype):
    maps = _maps(22, 2, 8, 30).to(dtype)
    assert torch.equal(joint_scores([_reader(maps)], width=8), joint_scores([_reader(maps.double())], width=8))


def test_the_maps_are_left_as_they_were():
    maps = _maps(23, 2, 8, 5)
    before = maps.clone()
    joint_scores([_reader(maps)], width=8)
    assert torch.equal(maps, before)


def test_progress_counts_the_channels_that_went():
    maps = _maps(24, 1, 6, 9)
    maps[:, 2] = 0
    seen = []
    joint_scores([_reader(maps)], width=6, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_the_reader_whose_maps_are_not_finite_is_named():
    maps = _maps(25, 3, 4, 5)
    maps[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match="reader 1 of a channel group: image 1, channel 7 is not finite"):
        joint_scores([_reader(_maps(26, 1, 4, 5)), Reader(maps, [4, 5, 7, 6])], width=8)


@pytest.mark.parametrize("covered", [[0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_rows_that_do_not_match_the_covered_channels_are_refused(covered):
    with pytest.raises(ValueError, match=r"reader 0 .* covers .* expected one place in 0\.\.2 a row, each once"):
        joint_scores([Reader(_maps(27, 1, 3, 5), covered)], width=3)


@pytest.mark.parametrize(
    "maps", [torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(0, 2, 3), torch.zeros(1, 2, 0)]
)
def test_maps_of_another_kind_or_of_no_image_are_refused(maps):
    with pytest.raises(ValueError, match=r"floating maps of shape \(B, C, P\)"):
        joint_scores([Reader(maps, range(maps.shape[1]))], width=maps.shape[1])

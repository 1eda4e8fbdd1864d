"""Channel independence against the definition, hand values and invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chip_deploy.chip.nuclear import channel_independence, channel_independence_svd


def _maps(seed, images, channels, pixels):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, pixels, generator=generator, dtype=torch.float64).relu()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    channels=st.integers(1, 24),
    pixels=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_scores_are_those_of_the_definition(seed, channels, pixels, scale):
    maps = _maps(seed, 2, channels, pixels) * scale
    expected = channel_independence_svd(maps)
    found = channel_independence(maps)
    # 1e-7 of the largest singular value: the square root of float64's rounding, which the Gram product costs
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7 * float(maps.norm()))
    assert torch.isfinite(found).all()
    assert (found >= 0).all()


def test_orthogonal_rows_score_their_own_norms():
    basis, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    norms = torch.arange(1.0, 6.0, dtype=torch.float64)
    assert torch.allclose(channel_independence((basis[:5] * norms[:, None])[None])[0], norms, rtol=1e-9)


def test_twin_rows_score_root_two_minus_one_of_their_norm():
    row = torch.randn(1, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = channel_independence(row.expand(1, 2, 50))
    assert torch.allclose(scores / row.norm(), torch.full((1, 2), math.sqrt(2) - 1, dtype=torch.float64), rtol=1e-6)


def test_a_dead_channel_scores_exactly_zero_among_living_ones():
    maps = _maps(2, 3, 6, 30)
    maps[:, 4] = 0
    scores = channel_independence(maps)
    assert (scores[:, 4] == 0).all()
    assert (scores[:, :4] > 0).all()


def test_all_zero_maps_score_zero():
    assert (channel_independence(torch.zeros(2, 5, 7)) == 0).all()


@pytest.mark.parametrize("shape", [(1, 40, 9), (1, 9, 40)])
def test_rank_one_maps_agree_with_the_definition_on_both_sides(shape):
    generator = torch.Generator().manual_seed(3)
    left = torch.rand(shape[1], 1, generator=generator, dtype=torch.float64)
    right = torch.rand(1, shape[2], generator=generator, dtype=torch.float64)
    maps = (left @ right)[None]
    assert torch.allclose(channel_independence(maps), channel_independence_svd(maps), atol=1e-6)


def test_a_single_channel_scores_its_norm():
    maps = _maps(4, 2, 1, 33)
    assert torch.allclose(channel_independence(maps), maps.norm(dim=-1), rtol=1e-9)


def test_permuting_channels_permutes_scores():
    maps = _maps(5, 2, 10, 64)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(channel_independence(maps)[:, order], channel_independence(maps[:, order]), rtol=1e-9)


def test_no_score_exceeds_the_norm_of_its_channel():
    maps = _maps(6, 4, 30, 20)
    assert (channel_independence(maps) <= maps.norm(dim=-1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_maps_are_scored_as_their_float64_values(dtype):
    maps = _maps(7, 2, 8, 30).to(dtype)
    assert torch.equal(channel_independence(maps), channel_independence(maps.double()))


def test_feature_maps_are_flattened():
    maps = _maps(8, 2, 6, 20)
    assert torch.equal(channel_independence(maps.reshape(2, 6, 4, 5)), channel_independence(maps))


def test_the_first_channel_that_is_not_finite_is_named():
    maps = _maps(9, 3, 4, 5)
    maps[1, 2, 3] = math.inf
    with pytest.raises(ValueError, match="image 1, channel 2 is not finite"):
        channel_independence(maps)


def test_integer_maps_are_refused():
    with pytest.raises(ValueError, match="floating maps"):
        channel_independence(torch.zeros(1, 2, 3, dtype=torch.long))

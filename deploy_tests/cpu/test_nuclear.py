"""Channel independence against the definition, hand values and invariants, by each of its three ways."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chip_deploy.chip import nuclear
from chip_deploy.chip.nuclear import channel_independence, channel_independence_svd, independence_or_nan, quadrature
from chip_deploy.pipeline.data import normalise, open_data
from chip_deploy.pipeline.models import build_model, load_weights


def _by_eigenvectors(maps):
    return nuclear._bounded(maps.flatten(2).double(), nuclear._by_eigenvectors)


def _by_cholesky(maps):
    return nuclear._bounded(maps.flatten(2).double(), nuclear._by_cholesky)


WAYS = [channel_independence, _by_eigenvectors, _by_cholesky]


@pytest.fixture(params=WAYS, ids=["installed", "eigenvectors", "cholesky"])
def independence(request):
    """Compiled code where numba is installed; eigenvectors without it; Cholesky factors as on a GPU."""
    return request.param


def _maps(seed, images, channels, pixels):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, pixels, generator=generator, dtype=torch.float64).relu()


def _close(found, maps):
    # 1e-7 of the largest singular value: the square root of float64's rounding, which the Gram product costs
    expected = channel_independence_svd(maps)
    largest = torch.linalg.svdvals(maps.flatten(2).double())[:, 0].max()
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7 * float(largest))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    channels=st.integers(1, 40),
    pixels=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    way=st.sampled_from(WAYS),
    dead=st.integers(0, 3),
    twins=st.booleans(),
)
def test_scores_are_those_of_the_definition(seed, channels, pixels, scale, way, dead, twins):
    maps = _maps(seed, 2, channels, pixels) * scale
    maps[:, :dead] = 0
    if twins:
        maps[:, -1] = maps[:, channels // 2]
    _close(way(maps), maps)


@pytest.mark.parametrize("shape", [(140, 200), (129, 129), (200, 40), (300, 1)])
def test_maps_too_wide_for_the_small_kernels_are_scored_alike(independence, shape):
    maps = _maps(10, 2, *shape)
    _close(independence(maps), maps)


@pytest.mark.parametrize("shape", [(2, 2), (7, 30), (16, 1024), (40, 40), (64, 64), (100, 100), (140, 150), (60, 20)])
@pytest.mark.parametrize("kind", ["all ones", "two of a kind", "saturated", "half the image", "a tenth"])
def test_maps_of_very_low_rank_score_as_the_definition_says(independence, shape, kind):
    """What is left of a Gram matrix after its few true directions are gone is rounding, and must do no harm."""
    noise = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps = {
        "all ones": torch.ones(1, *shape),
        "two of a kind": noise[:, :2].repeat(1, shape[0] // 2 + 1, 1)[:, : shape[0]],
        "saturated": (6 + noise * (noise > 0.5) - 0.5).clamp(0, 6),
        "half the image": (torch.arange(shape[1]) < shape[1] / 2).expand(1, *shape).double(),
        "a tenth": torch.full((1, *shape), 0.1, dtype=torch.float32),
    }[kind]
    _close(independence(maps), maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 1e38])
def test_single_precision_maps_of_any_size_score_as_the_definition_says(independence, dtype, size):
    maps = (_maps(17, 2, 12, 30) / 4 * size).to(dtype)
    _close(independence(maps), maps)


@pytest.mark.parametrize("distance", [1e-9, 1e-5])
def test_nearly_duplicated_rows_score_as_the_definition_says(independence, distance):
    maps = _maps(11, 2, 20, 60)
    maps[:, 1] = maps[:, 0] + distance * maps[:, 1]
    _close(independence(maps), maps)


def test_rows_of_very_different_size_score_as_the_definition_says(independence):
    maps = _maps(12, 2, 24, 80) * torch.logspace(-8, 0, 24, dtype=torch.float64)[:, None]
    _close(independence(maps), maps)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
def test_scores_scale_with_maps_of_any_size(independence, scale):
    maps = _maps(13, 2, 6, 20)
    power = 2.0 ** round(math.log2(scale))  # a power of two changes no digit
    assert torch.allclose(independence(maps * power), independence(maps) * power, rtol=1e-12)


def test_the_ways_agree_with_each_other():
    maps = _maps(14, 3, 30, 70)
    first, *others = [way(maps) for way in WAYS]
    assert all(torch.allclose(first, other, rtol=1e-8) for other in others)


def test_the_thread_count_changes_no_bit():
    maps, threads = _maps(15, 7, 12, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = channel_independence(maps)
        torch.set_num_threads(3)
        assert torch.equal(channel_independence(maps), alone)
    finally:
        torch.set_num_threads(threads)


def test_compiled_code_loads_where_numba_may_write_nowhere():
    pytest.importorskip("numba")
    code = (
        "from numba.core import caching\n"
        "caching.FunctionCache._impl_class._locator_classes = []\n"
        "from chip_deploy.chip import compiled\n"
        "print(compiled._OPTIONS['cache'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["False"], run.stderr


def test_the_nodes_integrate_square_roots():
    nodes, weights = quadrature(torch.device("cpu"))
    lam = torch.logspace(-13, 0, 40, dtype=torch.float64)  # sqrt(lam) = (2 / pi) * integral of lam / (lam + s^2) ds
    assert torch.allclose((lam[:, None] / (lam[:, None] + nodes)) @ weights, lam.sqrt(), rtol=1e-7, atol=1e-9)


def test_real_maps_keep_the_same_channels_as_the_definition(shared, cifar10_test):
    """Layer scores within 1e-6, and the same channels at 30, 50 and 70 % in each of the 55 layers."""
    net = build_model("resnet56", num_classes=10, seed=0).module
    load_weights(net, str(shared / "weights" / "resnet56.safetensors"))
    data = open_data(f"imagefolder:{cifar10_test}", size=32, seed=0)
    maps = _consumer_maps(net.eval(), normalise(data.test.read(torch.arange(0, 10_000, 2_500))))
    assert len(maps) == 55
    for layer, rows in maps.items():
        found, expected = channel_independence(rows).mean(0), channel_independence_svd(rows).mean(0)
        assert ((found - expected).abs() <= 1e-6 * expected.abs().mean()).all(), layer
        for share in (0.3, 0.5, 0.7):
            kept = round(len(found) * (1 - share))
            assert set(found.topk(kept).indices.tolist()) == set(expected.topk(kept).indices.tolist()), layer


def _consumer_maps(net, images):
    """What each convolution but the first, and the classifier's pool, reads."""
    maps, handles = {}, []
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "conv1":
            handles.append(
                module.register_forward_pre_hook(lambda _m, x, name=name: maps.update({name: x[0].detach()}))
            )
    handles.append(net.layer3.register_forward_hook(lambda _m, _x, y: maps.update({"linear": y.detach()})))
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return maps


def test_orthogonal_rows_score_their_own_norms(independence):
    basis, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    norms = torch.arange(1.0, 6.0, dtype=torch.float64)
    assert torch.allclose(independence((basis[:5] * norms[:, None])[None])[0], norms, rtol=1e-9)


def test_twin_rows_score_root_two_minus_one_of_their_norm(independence):
    row = torch.randn(1, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = independence(row.expand(1, 2, 50))
    assert torch.allclose(scores / row.norm(), torch.full((1, 2), math.sqrt(2) - 1, dtype=torch.float64), rtol=1e-6)


def test_a_dead_channel_scores_exactly_zero_among_living_ones(independence):
    maps = _maps(2, 3, 6, 30)
    maps[:, 4] = 0
    scores = independence(maps)
    assert (scores[:, 4] == 0).all()
    assert (scores[:, :4] > 0).all()


def test_all_zero_maps_score_zero(independence):
    assert (independence(torch.zeros(2, 5, 7)) == 0).all()


@pytest.mark.parametrize("shape", [(1, 40, 9), (1, 9, 40)])
def test_rank_one_maps_agree_with_the_definition_on_both_sides(independence, shape):
    generator = torch.Generator().manual_seed(3)
    left = torch.rand(shape[1], 1, generator=generator, dtype=torch.float64)
    right = torch.rand(1, shape[2], generator=generator, dtype=torch.float64)
    maps = (left @ right)[None]
    assert torch.allclose(independence(maps), channel_independence_svd(maps), atol=1e-6)


def test_a_single_channel_scores_its_norm(independence):
    maps = _maps(4, 2, 1, 33)
    assert torch.allclose(independence(maps), maps.norm(dim=-1), rtol=1e-9)


def test_permuting_channels_permutes_scores(independence):
    maps = _maps(5, 2, 10, 64)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(independence(maps)[:, order], independence(maps[:, order]), rtol=1e-9)


def test_no_score_exceeds_the_norm_of_its_channel(independence):
    maps = _maps(6, 4, 30, 20)
    assert (independence(maps) <= maps.norm(dim=-1)).all()


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


@pytest.mark.parametrize("way", [independence_or_nan, _by_eigenvectors, _by_cholesky])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_image_that_is_not_finite_is_nan_and_leaves_the_others_alone(way, bad):
    maps = _maps(16, 3, 5, 9)
    alone = way(maps)
    maps[1, 2, 3] = bad
    scores = way(maps)
    assert scores[1].isnan().all()
    assert torch.equal(scores[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_maps_have_empty_or_zero_scores(shape):
    assert torch.equal(channel_independence(torch.zeros(shape)), torch.zeros(shape[:2], dtype=torch.float64))


def test_integer_maps_are_refused():
    with pytest.raises(ValueError, match="floating maps"):
        channel_independence(torch.zeros(1, 2, 3, dtype=torch.long))

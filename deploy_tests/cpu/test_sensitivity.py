"""Which layers cost an 8-bit network most, and how few have to be left out: against brute force."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chip_deploy.export.quantize import QuantLayer
from chip_deploy.export.sensitivity import fewest_left_out, ranked


def layers(n: int) -> list[QuantLayer]:
    return [QuantLayer(f"node{number}", f"layer{number}", "Conv") for number in range(n)]


def test_the_layer_with_the_lowest_ratio_comes_first_and_one_that_costs_nothing_last() -> None:
    snr_db = {"node0": 30.0, "node1": None, "node2": 12.5, "node3": 30.0}
    found = ranked(layers(4), lambda layer: snr_db[layer.node])
    assert [layer.node for layer, _ in found] == ["node2", "node0", "node3", "node1"]
    assert [told.snr_db for _, told in found] == [12.5, 30.0, 30.0, None]
    assert (found[0][1].layer, found[0][1].operator) == ("layer2", "Conv")


def test_every_layer_is_asked_once_and_progress_names_it() -> None:
    asked, told = [], []
    ranked(
        layers(3), lambda layer: asked.append(layer.node) or 1.0, progress=lambda part, text: told.append((part, text))
    )
    assert asked == ["node0", "node1", "node2"]
    assert told[1] == (pytest.approx(1 / 3), "sensitivity of layer1")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 100))
def test_the_count_is_the_smallest_that_holds_where_every_layer_left_out_helps(costs, most) -> None:
    calls = []

    def drop_without(count: int) -> float:
        calls.append(count)
        return float(sum(costs[count:]))

    expected = next((count for count in range(len(costs)) if sum(costs[count:]) <= most), None)
    assert fewest_left_out(len(costs), drop_without=drop_without, most=most) == expected
    assert len(calls) <= 1 + 2 * math.ceil(math.log2(len(costs) + 1))
    assert len(calls) == len(set(calls))


def test_what_is_said_to_hold_was_found_to_hold_even_where_leaving_out_does_not_always_help() -> None:
    drops = [9.0, 8.0, 7.0, 0.2, 6.0, 5.0, 0.3, 0.1]
    count = fewest_left_out(len(drops), drop_without=drops.__getitem__, most=1.0)
    assert count is None or drops[count] <= 1.0
    flat = [0.03, 0.02, 0.01, 0.03, 0.01, 0.03, 0.01, 0.01, 0.01]
    assert fewest_left_out(len(flat), drop_without=flat.__getitem__, most=0.025) == 1


def test_leaving_out_all_of_them_is_no_answer() -> None:
    assert fewest_left_out(4, drop_without=lambda count: 5.0 - count, most=1.5) is None
    assert fewest_left_out(1, drop_without=lambda _: 5.0, most=1.5) is None


def test_nothing_is_left_out_where_the_bound_holds_at_once() -> None:
    assert fewest_left_out(8, drop_without=lambda _: 0.5, most=0.5) == 0

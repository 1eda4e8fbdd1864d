"""The shapes an engine is built for: how they are written, which networks they fit, which profile runs a batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chip_deploy.export.shapes import (
    DYNAMIC_BATCH,
    Profile,
    ShapeRange,
    parse_shapes,
    profile_holding,
    profiles_for,
    shape_text,
)

FREE = {"input": (-1, 3, 32, 32)}
FIXED = {"input": (1, 3, 32, 32)}

shapes = st.lists(st.integers(1, 4096), min_size=1, max_size=5).map(tuple)


def batches(*ranges: tuple[int, int, int]) -> list[Profile]:
    return [{"input": ShapeRange(*((size, 3) for size in sizes))} for sizes in ranges]


def test_one_shape_is_smallest_expected_and_largest() -> None:
    assert parse_shapes("input:1x3x32x32") == {"input": ShapeRange(*[(1, 3, 32, 32)] * 3)}


def test_three_shapes_are_a_range_and_spaces_do_not_matter() -> None:
    expected = {"input": ShapeRange((1, 3), (8, 3), (32, 3)), "scale": ShapeRange((1,), (1,), (1,))}
    assert parse_shapes(" input:1x3/8x3/32x3 , scale:1 ") == expected


def test_a_name_may_hold_a_colon_as_tensorflows_do() -> None:
    assert list(parse_shapes("serving:0:1x3")) == ["serving:0"]


@given(st.dictionaries(st.from_regex(r"[a-z]\w{0,8}", fullmatch=True), shapes, min_size=1, max_size=3))
def test_what_is_written_is_read_again(inputs: dict[str, tuple[int, ...]]) -> None:
    ranges = {name: ShapeRange(shape, shape, shape) for name, shape in inputs.items()}
    assert parse_shapes(",".join(f"{name}:{reach}" for name, reach in ranges.items())) == ranges


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"shapes '': NAME:SHAPE or NAME:MIN/OPT/MAX expected, for example input:1x3"),
        ("1x3x32x32", "NAME:SHAPE or NAME:MIN/OPT/MAX expected"),
        (":1x3", "NAME:SHAPE or NAME:MIN/OPT/MAX expected"),
        ("input:1x3/8x3", "NAME:SHAPE or NAME:MIN/OPT/MAX expected"),
        ("input:1x3/2x3/3x3/4x3", "NAME:SHAPE or NAME:MIN/OPT/MAX expected"),
        ("input:1x3,", "NAME:SHAPE or NAME:MIN/OPT/MAX expected"),
        ("input:1,3,32,32", "NAME:SHAPE or NAME:MIN/OPT/MAX expected"),
        ("input:", "'' is no shape such as 1x3x32x32"),
        ("input:1*3", r"'1\*3' is no shape such as"),
        ("input:-1x3", "'-1x3' is no shape such as"),
        ("input:0x3", "'0x3' has an axis of 0"),
        ("input:1x99999999999999999999", "has an axis of 2..31 or more"),
        ("input:1x3,input:2x3", "input 'input' is given twice"),
        ("input:8x3/1x3/32x3", "8x3/1x3/32x3 is not in the order smallest, expected, largest"),
        ("input:1x3/8x3/32x2", "is not in the order smallest, expected, largest"),
        ("input:1x3/8x3x4/32x3", "have different numbers of axes"),
    ],
)
def test_a_misspelt_shape_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_shapes(text)
    assert str(caught.value).endswith(".")


def test_a_fixed_network_has_no_profile_with_or_without_its_own_shape() -> None:
    assert profiles_for([], FIXED) == []
    assert profiles_for(["input:1x3x32x32"], FIXED) == []


def test_a_free_batch_without_shapes_has_the_default_one() -> None:
    assert profiles_for([], FREE) == [{"input": ShapeRange(*((size, 3, 32, 32) for size in DYNAMIC_BATCH))}]


def test_every_text_is_a_profile_and_inputs_that_are_fixed_may_be_left_out() -> None:
    inputs = {**FREE, "scale": (2,)}
    found = profiles_for(["input:1x3x32x32", "input:1x3x32x32/8x3x32x32/32x3x32x32"], inputs)
    assert [str(profile["input"]) for profile in found] == ["1x3x32x32", "1x3x32x32/8x3x32x32/32x3x32x32"]
    assert [str(profile["scale"]) for profile in found] == ["2", "2"]


@pytest.mark.parametrize(
    ("text", "inputs", "sentence"),
    [
        ("image:1x3x32x32", FREE, r"no input 'image'\. The network has: input\."),
        ("input:1x3x32", FREE, r"shape 1x3x32 given, \(any, 3, 32, 32\) expected"),
        ("input:1x4x32x32", FREE, r"shape 1x4x32x32 given, but axis 1 of \(any, 3, 32, 32\) is fixed\.$"),
        ("input:1x3x32x32/1x3x64x64/1x3x64x64", FREE, "axis 2 .* is fixed"),
        ("input:2x3x32x32", FIXED, r"axis 0 .* is fixed\. Export it with --set export\.dynamic_batch=true"),
        ("input:1x3x32x32/1x3x32x32/8x3x32x32", FIXED, "axis 0 .* is fixed"),
        ("input:1x3x32x32", {**FREE, "other": (-1, 2)}, r"input 'other' \(any, 2\) has a free axis"),
    ],
)
def test_a_shape_that_does_not_fit_the_network_is_one_sentence(
    text: str, inputs: dict[str, tuple[int, ...]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        profiles_for([text], inputs)


def test_the_same_profile_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes 'input:1x3x32x32': this profile is given twice"):
        profiles_for(["input:1x3x32x32/1x3x32x32/1x3x32x32", "input:1x3x32x32"], FREE)


def test_a_free_axis_that_is_no_batch_has_no_default() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3, any, any\); only a free batch has shapes by default"):
        profiles_for([], {"input": (1, 3, -1, -1)})


@pytest.mark.parametrize(("batch", "place"), [(1, 1), (8, 0), (4, 0), (16, 0), (17, None), (64, 2)])
def test_the_profile_that_expects_a_batch_runs_it_before_others_that_hold_it(batch: int, place: int | None) -> None:
    profiles = batches((1, 8, 16), (1, 1, 32), (64, 64, 64))
    profiles[1] = batches((1, 1, 16))[0]
    assert profile_holding(profiles, {"input": (batch, 3)}) == place


def test_of_profiles_that_expect_something_else_the_one_that_reaches_least_far_runs_a_batch() -> None:
    assert profile_holding(batches((1, 1, 64), (1, 1, 8)), {"input": (4, 3)}) == 1


@given(
    st.lists(st.tuples(*[st.integers(1, 20)] * 3).map(sorted).map(tuple), min_size=1, max_size=4), st.integers(1, 25)
)
def test_a_profile_is_found_exactly_where_one_holds_the_batch(ranges: list[tuple[int, int, int]], batch: int) -> None:
    place = profile_holding(batches(*ranges), {"input": (batch, 3)})
    holding = [low <= batch <= high for low, _, high in ranges]
    assert (place is not None) == any(holding)
    assert place is None or holding[place]


def test_a_free_axis_is_any_in_a_text() -> None:
    assert shape_text((-1, 3)) == "(any, 3)"

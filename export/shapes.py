"""Which input shapes an engine is built for: trtexec's syntax in, optimization profiles out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]

# Smallest, expected and largest batch of an engine whose ONNX file leaves the batch free.
DYNAMIC_BATCH = (1, 1, 32)
EXAMPLE = "input:1x3x32x32/8x3x32x32/32x3x32x32"


class ShapeRange(NamedTuple):
    """The shapes that one input may have: smallest and largest, and the one to be fastest at between them."""

    smallest: Shape
    expected: Shape
    largest: Shape

    def __str__(self) -> str:
        shapes = dict.fromkeys(self) if len(set(self)) == 1 else self
        return "/".join("x".join(map(str, shape)) for shape in shapes)

    def holds(self, shape: Shape) -> bool:
        """Whether `shape` lies in the range on every axis."""
        return len(shape) == len(self.smallest) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest, strict=True)
        )


# The range of every input by its name; an engine has one or more of these.
Profile = dict[str, ShapeRange]


def parse_shapes(text: str) -> Profile:
    """The profile that `text` spells: one shape an input, or smallest, expected and largest one.

    >>> str(parse_shapes("image:1x3x32x32/8x3x32x32/32x3x32x32,scale:1x2")["scale"])
    '1x2'

    Raises: ValueError saying which part is not of that form.
    """
    profile: Profile = {}
    for part in text.split(","):
        name, colon, ranges = part.strip().rpartition(":")
        spelled = ranges.split("/")
        if not (colon and name) or len(spelled) not in (1, 3):
            raise ValueError(f"shapes {text!r}: NAME:SHAPE or NAME:MIN/OPT/MAX expected, for example {EXAMPLE}.")
        if name in profile:
            raise ValueError(
                f"shapes {text!r}: input '{name}' is given twice. Give a second profile as a second entry."
            )
        shapes = [_parse_shape(each, text) for each in spelled]
        profile[name] = _ordered(name, ShapeRange(*(shapes * 3 if len(shapes) == 1 else shapes)))
    return profile


def profiles_for(texts: Sequence[str], inputs: Mapping[str, Shape]) -> list[Profile]:
    """The profiles that an engine of a network with those inputs is built for; none where nothing of it is free.

    A free axis is -1 in `inputs`. Without `texts` a free batch gets DYNAMIC_BATCH.
    Raises: ValueError for shapes that do not fit the network, a profile given twice, or a free axis without a shape.
    """
    free = [name for name, shape in inputs.items() if -1 in shape]
    if not texts:
        return [{name: _default_range(name, inputs[name]) for name in free}] if free else []
    profiles = [_fitted(parse_shapes(text), inputs, text) for text in texts]
    for place, profile in enumerate(profiles):
        if profile in profiles[:place]:
            raise ValueError(f"shapes {texts[place]!r}: this profile is given twice. Leave one of them out.")
    return profiles if free else []


def profile_holding(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The place of the profile that is to run `shapes`; None where none holds them.

    One that expects just these goes first, then the one that reaches least far.
    """
    holding = [
        place
        for place, profile in enumerate(profiles)
        if all(profile[name].holds(shape) for name, shape in shapes.items())
    ]

    def rank(place: int) -> tuple[bool, int]:
        ranges = {name: profiles[place][name] for name in shapes}
        unexpected = any(ranges[name].expected != shape for name, shape in shapes.items())
        return unexpected, sum(math.prod(reach.largest) for reach in ranges.values())

    return min(holding, key=rank, default=None)


def shape_text(shape: Shape) -> str:
    """A shape as an error names it: `(any, 3, 32, 32)` where the first axis is free."""
    return f"({', '.join('any' if axis == -1 else str(axis) for axis in shape)})"


def _parse_shape(spelled: str, text: str) -> Shape:
    if not re.fullmatch(r"\d+(x\d+)*", spelled.strip()):
        raise ValueError(f"shapes {text!r}: {spelled!r} is no shape such as 1x3x32x32. Write, for example, {EXAMPLE}.")
    shape = tuple(int(size) for size in spelled.strip().split("x"))
    if 0 in shape:
        raise ValueError(f"shapes {text!r}: {spelled!r} has an axis of 0. Every axis is at least 1.")
    if max(shape) >= 1 << 31:
        raise ValueError(f"shapes {text!r}: {spelled!r} has an axis of 2**31 or more. Every axis is below that.")
    return shape


def _ordered(name: str, reach: ShapeRange) -> ShapeRange:
    """`reach`, once its shapes are found to be of one rank and in ascending order on every axis."""
    ranks = {len(shape) for shape in reach}
    if len(ranks) > 1:
        raise ValueError(f"shapes of input '{name}': {reach} have different numbers of axes. Give all of them.")
    if not all(low <= middle <= high for low, middle, high in zip(*reach, strict=True)):
        raise ValueError(f"shapes of input '{name}': {reach} is not in the order smallest, expected, largest.")
    return reach


def _fitted(profile: Profile, inputs: Mapping[str, Shape], text: str) -> Profile:
    """The profile for every input of the network. Raises: ValueError for the first input that it does not fit."""
    for name, reach in profile.items():
        if name not in inputs:
            raise ValueError(f"shapes {text!r}: no input '{name}'. The network has: {', '.join(inputs)}.")
        _require_fit(name, reach, inputs[name])
    for name, shape in inputs.items():
        if -1 in shape and name not in profile:
            raise ValueError(
                f"shapes {text!r}: input '{name}' {shape_text(shape)} has a free axis. Give its shape too."
            )
    return {name: profile.get(name) or ShapeRange(shape, shape, shape) for name, shape in inputs.items()}


def _require_fit(name: str, reach: ShapeRange, shape: Shape) -> None:
    if len(reach.smallest) != len(shape):
        raise ValueError(f"input '{name}': shape {reach} given, {shape_text(shape)} expected. Give every axis.")
    for axis, size in enumerate(shape):
        sizes = {given[axis] for given in reach}
        if size != -1 and sizes != {size}:
            remedy = " Export it with --set export.dynamic_batch=true to free the batch." if axis == 0 else ""
            raise ValueError(
                f"input '{name}': shape {reach} given, but axis {axis} of {shape_text(shape)} is fixed.{remedy}"
            )


def _default_range(name: str, shape: Shape) -> ShapeRange:
    batch, *rest = shape
    if batch != -1 or -1 in rest:
        raise ValueError(
            f"input '{name}': shape {shape_text(shape)}; only a free batch has shapes by default. "
            f"Give them, for example --shapes {EXAMPLE}."
        )
    return ShapeRange(*((size, *rest) for size in DYNAMIC_BATCH))

"""Arrays that lie on a CUDA device already, whoever made them: torch, CuPy, Numba, anything that says where it is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np


class DeviceArray(NamedTuple):
    """A contiguous array in device memory; `owner` keeps that memory alive."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: Any

    @property
    def nbytes(self) -> int:
        """What it occupies."""
        return math.prod(self.shape) * self.dtype.itemsize


def device_array(name: str, value: Any) -> DeviceArray | None:
    """`value` as it lies on a CUDA device; None for what lies on the host.

    It is asked by `__cuda_array_interface__`, so no library is imported.
    Raises: ValueError for an array that cannot be read as it is: it requires gradients, has gaps between its values,
    or a type that numpy does not have.
    """
    try:
        told = getattr(value, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError) as err:
        raise ValueError(f"input '{name}': not readable on the device ({err}). Detach it first.") from err
    if told is None:
        return None
    dtype, shape = np.dtype(told["typestr"]), tuple(told["shape"])
    if not _is_contiguous(shape, told.get("strides"), dtype.itemsize):
        raise ValueError(f"input '{name}': its values have gaps between them on the device. Make it contiguous first.")
    return DeviceArray(int(told["data"][0]), shape, dtype, value)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> bool:
    """Whether values lie row by row without gaps; the stride of an axis of one value does not matter."""
    if strides is None:
        return True
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

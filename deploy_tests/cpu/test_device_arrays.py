"""Arrays on a CUDA device, told by the interface that torch, CuPy and Numba share; no device is needed to ask."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chip_deploy.export.device_arrays import device_array


def interface(**changes: Any) -> SimpleNamespace:
    told = {"shape": (2, 3, 4), "typestr": "<f4", "data": (4096, False), "strides": None, "version": 2, **changes}
    return SimpleNamespace(__cuda_array_interface__=told)


def test_an_array_on_a_device_is_known_with_its_place_shape_and_type() -> None:
    value = interface()
    array = device_array("input", value)
    assert array is not None
    assert (array.address, array.shape, array.dtype, array.nbytes) == (4096, (2, 3, 4), np.float32, 96)
    assert array.owner is value


@pytest.mark.parametrize("value", [np.zeros(3), torch.zeros(3), [1.0]])
def test_what_lies_on_the_host_is_not_on_a_device(value: Any) -> None:
    assert device_array("input", value) is None


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((2, 3, 4), (48, 16, 4), True),
        ((2, 3, 4), (96, 16, 4), False),
        ((2, 3, 4), (4, 8, 24), False),
        ((1, 3, 4), (7, 16, 4), True),
        ((2, 1, 4), (16, 999, 4), True),
        ((), (), True),
    ],
)
def test_values_without_gaps_are_told_by_their_strides_as_numpy_tells_them(
    shape: tuple[int, ...], strides: tuple[int, ...], contiguous: bool
) -> None:
    assert np.lib.stride_tricks.as_strided(np.zeros(1, "f4"), shape, strides).flags.c_contiguous is contiguous
    if contiguous:
        assert device_array("input", interface(shape=shape, strides=strides)) is not None
        return
    with pytest.raises(ValueError, match=r"input 'input': its values have gaps between them on the device\. Make it"):
        device_array("input", interface(shape=shape, strides=strides))


def test_a_tensor_that_requires_gradients_is_refused() -> None:
    class Learning:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")

    with pytest.raises(ValueError, match=r"input 'input': not readable on the device \(.*requires grad\)\. Detach it"):
        device_array("input", Learning())

"""Every target there is, each imported only when it is asked for."""

from __future__ import annotations

from .target import CAPABILITIES, BuildOptions, Target, TargetSpec


def make_target(spec: TargetSpec, *, threads: int = 1, options: BuildOptions | None = None) -> Target:
    """The target that `spec` names; `threads` counts the CPU threads of one execution, of which a GPU target has none.

    `options` are for TensorRT; `ort-cuda` takes two of them.

    Raises: ValueError for an unknown name.
    """
    match spec.name:
        case "ort-cpu":
            from .target_ort import OrtCpuTarget

            return OrtCpuTarget(spec, threads=threads)
        case "ort-cuda":
            from .target_ort import OrtCudaTarget

            return OrtCudaTarget(spec, options=options)
        case "torch":
            from .target_torch import TorchTarget

            return TorchTarget(spec, threads=threads)
        case "trt" | "trt-rtx":
            from .target_trt import TensorRTTarget

            return TensorRTTarget(spec, options=options)
        case _:
            raise ValueError(f"unknown target {spec.name!r}. Available: {', '.join(CAPABILITIES)}.")

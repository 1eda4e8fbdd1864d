"""The exceptions of the export wing: what the machine, a runtime or a file did, never what the user typed.

ExportError
├── TargetUnavailable   a target cannot be used on this machine
├── MachineMismatch     numbers or an engine belong to another machine
├── ExportFailed        the network could not be written as ONNX
├── ConversionFailed    the network could not be written in a lower precision within its bounds
├── BuildFailed         a runtime made no engine, or could not open one
├── ParityFailed        outputs are not those of the reference
├── MeasureFailed       no latency could be measured
└── IntegrityError      a file of a bundle is missing, changed or unexpected

A mistake in the input (an unknown target, a wrong shape) is a ValueError instead. Each message is one sentence or
two: what, where, what was expected, what to do next; the foreign error is kept as the cause.
"""


class ExportError(Exception):
    """Anything that the export wing could not do."""


class TargetUnavailable(ExportError):
    """A target cannot be used on this machine; the message holds the ways out."""


class MachineMismatch(ExportError):
    """Numbers or an engine belong to another machine than this one."""


class ExportFailed(ExportError):
    """The network could not be written as ONNX."""


class ConversionFailed(ExportError):
    """The network could not be written in a lower precision, or not within the bound on what it may lose."""


class BuildFailed(ExportError):
    """A runtime made no engine from an ONNX file, or could not open the one it was given."""


class ParityFailed(ExportError):
    """Outputs differ from the reference by more than the precision explains."""


class MeasureFailed(ExportError):
    """No latency could be measured."""


class IntegrityError(ExportError):
    """A file of a bundle is missing, changed or unexpected."""

"""Errors that end an export."""

from __future__ import annotations

from zeta_core.contract.job.status import StatusReason
from zeta_core.failures import TrainingFailed


class ExportRejected(TrainingFailed):
    """The exported files don't answer like the checkpoint. ``code`` names the difference."""

    code = "export_rejected"
    reason = StatusReason.EXPORT_REJECTED


class ConverterUnavailable(TrainingFailed):
    """The environment with the GGUF converter can't be used. A worker that is connected later may have one."""

    code = "converter_unavailable"
    reason = StatusReason.LAUNCH_FAILED


class CannotConvert(TrainingFailed):
    """The converter does not support the model."""

    code = "cannot_convert"
    reason = StatusReason.INVALID_MODEL

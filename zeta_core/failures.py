"""Why a training ends without success: one class for each reason of the contract, and one way to tell any exception."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Mapping

from pydantic import JsonValue

from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.advice import Patch, in_words
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import REASON_SENTENCES, StatusReason


class TrainingFailed(ZetaError):
    """A training that cannot start or go on; ``reason`` is the contract's word for it, ``hint`` the cure.

    ``patch`` is the cure as a JSON merge patch of the spec, ``evidence`` what was measured. As a string it says all but
    the evidence, so that a script's traceback ends with the advice.
    """

    type = "training_error"
    code = "train_error"
    reason: StatusReason = StatusReason.TRAIN_ERROR

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        patch: Patch | None = None,
        evidence: Mapping[str, JsonValue] | None = None,
        code: str | None = None,
        param: str | None = None,
    ):
        super().__init__(message, code=code, param=param)
        self.hint = hint
        self.patch = patch
        self.evidence = dict(evidence or {})

    def __str__(self) -> str:
        return in_words(self.message, self.hint, self.patch)


class InvalidData(TrainingFailed):
    """The data cannot be trained on; the message names the file and the line."""

    code = "invalid_data"
    reason = StatusReason.INVALID_DATA


class InvalidModel(TrainingFailed):
    """The model cannot be built, loaded or called."""

    code = "invalid_model"
    reason = StatusReason.INVALID_MODEL


class NonFiniteLoss(TrainingFailed):
    """The loss or a gradient is not finite; the update was not made."""

    code = "non_finite_loss"
    reason = StatusReason.NON_FINITE_LOSS


class OutOfMemory(TrainingFailed):
    """Memory ran out, or what is surely needed is more than there is."""

    code = "out_of_memory"
    reason = StatusReason.OUT_OF_MEMORY


class NoRoom(TrainingFailed):
    """The disk has no room for the next checkpoint, which was not begun."""

    code = "disk_full"
    reason = StatusReason.DISK_FULL


class CannotResume(TrainingFailed):
    """What ``resume_from_checkpoint`` names is not there, is damaged, or belongs to a run that was set up otherwise."""

    code = "cannot_resume"


class CannotTrain(TrainingFailed):
    """The options cannot take effect on this machine or with this model."""

    code = "cannot_train"


def explain(error: BaseException) -> tuple[StatusReason, JobError]:
    """The reason and the error object of the contract for any exception that ended a training."""
    if isinstance(error, TrainingFailed):
        evidence = JobErrorEvidence.model_validate(error.evidence)
        return error.reason, JobError(
            code=error.code, message=error.message, hint=error.hint, patch=error.patch, evidence=evidence
        )
    if isinstance(error, ZetaError):
        return StatusReason.TRAIN_ERROR, JobError(code=error.code, message=error.message)
    reason = StatusReason.TRAIN_ERROR
    if is_out_of_memory(error):
        reason = StatusReason.OUT_OF_MEMORY
    elif is_disk_full(error):
        reason = StatusReason.DISK_FULL
    text = "".join(traceback.format_exception(error))
    return reason, JobError(
        code=reason.value,
        message=f"{type(error).__name__}: {error}",
        hint=REASON_SENTENCES[reason],
        evidence=JobErrorEvidence(log_tail=text[-4000:]),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host (where the kernel mostly kills instead)."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _is_cpu_allocation(error)


def is_disk_full(error: BaseException) -> bool:
    """Python's own error, or that of safetensors, which tells it in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(error)


def _is_cpu_allocation(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)

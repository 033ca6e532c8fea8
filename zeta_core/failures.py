"""Errors that end a run: one class per reason of the contract, and the explanation of any exception."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from zeta_core.contract.errors import ErrorDetail, ZetaError
from zeta_core.contract.job.advice import Patch, advice_text
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import REASON_SENTENCES, StatusReason

_RUST_PANIC = "PanicException"  # pyo3_runtime.PanicException, which cannot be imported


class TrainingFailed(ZetaError):
    """A run cannot start or continue. ``reason`` is one of the contract's, and ``hint`` says how to fix the problem.

    ``patch`` is the fix as a JSON merge patch of the spec, and ``evidence`` contains measurements. The string contains
    everything except the evidence, so a script's traceback ends with the advice.
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
        details: Sequence[ErrorDetail] = (),
    ):
        super().__init__(message, code=code, param=param, details=details)
        self.hint = hint
        self.patch = patch
        self.evidence = dict(evidence or {})

    def __str__(self) -> str:
        return advice_text(self.message, self.hint, self.patch)


class InvalidData(TrainingFailed):
    """The data is not valid for training; the message names the file and the line."""

    code = "invalid_data"
    reason = StatusReason.INVALID_DATA


class InvalidModel(TrainingFailed):
    """The model cannot be built, loaded or called."""

    code = "invalid_model"
    reason = StatusReason.INVALID_MODEL


class WeightsReplaced(InvalidModel):
    """The checkpoint to answer with was removed, or replaced by another one, since it was requested."""

    code = "weights_replaced"


class NonFiniteLoss(TrainingFailed):
    """The loss or a gradient is not finite; the update was not applied."""

    code = "non_finite_loss"
    reason = StatusReason.NON_FINITE_LOSS


class OutOfMemory(TrainingFailed):
    """Memory ran out, or the minimum that a run needs exceeds the available memory."""

    code = "out_of_memory"
    reason = StatusReason.OUT_OF_MEMORY


class DiskFull(TrainingFailed):
    """There is not enough disk space for the next checkpoint, which was not started."""

    code = "disk_full"
    reason = StatusReason.DISK_FULL


class FileTooLarge(TrainingFailed):
    """A file of the run reached the maximum size that the worker or the file system allows."""

    code = "file_limit"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "Train a smaller model, whose checkpoints are smaller, or set a larger ZETA_JOB_FILE_BYTES on the "
        "worker.",
    ):
        super().__init__(message, hint=hint)


class CannotResume(TrainingFailed):
    """The checkpoint to resume from is missing, is damaged, or belongs to a run with different settings."""

    code = "cannot_resume"


class NodesUnreachable(TrainingFailed):
    """The nodes of a run cannot connect: allow all ports, or correct ZETA_WORKER_ADDRESS or ZETA_PORTS."""

    code = "nodes_unreachable"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "Allow connections between all workers of the job on every port, or set ZETA_WORKER_ADDRESS to an "
        "address that the other workers can reach.",
    ):
        super().__init__(message, hint=hint)


class CannotTrain(TrainingFailed):
    """The options cannot take effect on this machine or with this model."""

    code = "cannot_train"


def explain(error: BaseException) -> tuple[StatusReason, JobError]:
    """The contract's reason and error object for any exception that ended a run."""
    if isinstance(error, TrainingFailed):
        evidence = JobErrorEvidence.model_validate(error.evidence)
        return error.reason, JobError(
            code=error.code, message=error.message, hint=error.hint, patch=error.patch, evidence=evidence
        )
    if isinstance(error, ZetaError):
        return StatusReason.TRAIN_ERROR, JobError(code=error.code, message=error.message)
    if (failure := tokenizer_failure(error)) is not None:
        return explain(failure)
    if _is_file_limit(error):
        return explain(FileTooLarge(f"A file of the run exceeded the maximum size ({error})."))
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


def tokenizer_failure(error: BaseException) -> InvalidModel | None:
    """The failure of a tokenizer's own code as `InvalidModel`; ``None`` if something else raised ``error``.

    A damaged ``tokenizer.json`` makes the Rust library panic (a ``BaseException``), or raise a plain ``Exception``, so
    the code that raised the error identifies it.
    """
    if isinstance(error, OSError | MemoryError | KeyboardInterrupt | SystemExit | ZetaError):
        return None
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if type(error).__name__ != _RUST_PANIC and not any(map(_is_tokenizer_code, modules)):
        return None
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
    return InvalidModel(
        f"The tokenizer failed: {reason}.", hint="Repair the files of the tokenizer, or use another tokenizer."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host (where the kernel usually kills the process instead)."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _is_cpu_allocation(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk or the quota is full. The error of safetensors indicates this only in its text."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(error)


def _is_file_limit(error: BaseException) -> bool:
    """Whether a file would have become too large. The error of safetensors indicates this only in its text."""
    if isinstance(error, OSError):
        return error.errno == errno.EFBIG
    return type(error).__name__ == "SafetensorError" and os.strerror(errno.EFBIG) in str(error)


def _is_cpu_allocation(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _is_tokenizer_code(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package == "tokenizers" or (package == "transformers" and "tokenization_" in rest)

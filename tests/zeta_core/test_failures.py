"""Every exception that can end a run has a reason of the contract."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from zeta_core.failures import InvalidData, explain


def _no_memory() -> None:
    torch.empty(1 << 60)


def test_a_failed_allocation_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        _no_memory()
    reason, error = explain(raised.value)
    assert (reason, error.code) == ("out_of_memory", "out_of_memory")
    assert error.hint is not None
    assert "batch_size" in error.hint
    assert explain(torch.OutOfMemoryError("CUDA out of memory"))[0] == "out_of_memory"


def test_a_full_disk_is_recognized_whichever_library_reports_it() -> None:
    assert explain(OSError(errno.ENOSPC, "No space left on device"))[0] == "disk_full"
    reported = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert explain(reported)[0] == "disk_full"
    assert explain(SafetensorError("Error while deserializing header"))[0] == "train_error"


def test_a_file_above_the_limit_is_recognized_whichever_library_reports_it() -> None:
    reported = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    for raised in (OSError(errno.EFBIG, "File too large"), reported):
        assert explain(raised)[1].code == "file_limit"


def test_our_errors_keep_their_message_and_others_their_traceback() -> None:
    reason, error = explain(InvalidData("x.jsonl, line 3 is not JSON."))
    assert (reason, error.code, error.message) == ("invalid_data", "invalid_data", "x.jsonl, line 3 is not JSON.")
    reason, error = explain(KeyError("weight"))
    assert reason == "train_error"
    assert "KeyError" in (error.evidence.log_tail or "")

"""Files as the `openai` client reads them, and the purposes that both interfaces give them."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from server.database.file_tables import FileRow
from server.uploads.multipart import FormRules
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.responses import FilePurpose, StoredFile
from zeta_core.contract.spec.validation import shown

OpenAIPurpose = Literal["fine-tune", "fine-tune-results", "batch", "batch_output", "user_data"]
RESULTS: OpenAIPurpose = "fine-tune-results"
BATCH_RESULTS: OpenAIPurpose = "batch_output"
# The purposes of uploads by OpenAI's names. A model, which OpenAI has no purpose for, is `user_data`.
UPLOADABLE: dict[str, FilePurpose] = {"fine-tune": "dataset", "batch": "batch", "user_data": "model"}
SHOWN: dict[str, OpenAIPurpose] = {"dataset": "fine-tune", "model": "user_data", "batch": "batch"}
LISTED: dict[str, FilePurpose] = {"fine-tune": "dataset", "user_data": "model", "batch": "batch"}
DEFAULT_SUFFIX = ".jsonl"  # of a file without a name, such as bytes
FORM = FormRules(purposes=UPLOADABLE, default_suffix=DEFAULT_SUFFIX)


class FileObject(BaseModel):
    """A file. ``created_at`` is a Unix time in seconds. A stored file is always ``processed``."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: OpenAIPurpose
    status: Literal["processed"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None


def to_file_object(file: FileRow | StoredFile) -> FileObject:
    time: datetime = file.created_at
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(time.timestamp()),
        filename=file.filename,
        purpose=SHOWN[file.purpose],
    )


def require_uploadable(purpose: str) -> FilePurpose:
    """The stored purpose. Raises `InvalidRequest` for a purpose that this service has no use for."""
    if purpose not in UPLOADABLE:
        listed = " or ".join(repr(name) for name in UPLOADABLE)
        raise InvalidRequest(
            f"purpose is {shown(purpose)}; it must be {listed}.", code="invalid_value", param="purpose"
        )
    return UPLOADABLE[purpose]

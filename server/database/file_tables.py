"""The tables of uploaded files, and of uploads in parts."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from server.database.tables import BigNumber, Table


class FileRow(Table):
    """An uploaded file."""

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_project_created_at_id", "project", "created_at", "id"),
        Index("ix_files_project_sha256_created_at_id", "project", "sha256", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigNumber)
    sha256: Mapped[str]
    purpose: Mapped[str]
    created_at: Mapped[datetime]


class UploadRow(Table):
    """A file that is uploaded in parts; ``bytes`` is its announced size, and ``file_id`` is set when it is complete."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigNumber)
    purpose: Mapped[str]
    status: Mapped[str]  # pending, completed or cancelled
    file_id: Mapped[str | None]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)


class UploadPartRow(Table):
    """A stored part of an upload, until the upload is completed, cancelled or expired."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    project: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int] = mapped_column(BigNumber)
    created_at: Mapped[datetime]

"""The tables of receipts, and of the key that signs them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from server.database.tables import Table


class ReceiptRow(Table):
    """The receipt of an ended job; ``envelope`` is null until it has been signed."""

    __tablename__ = "receipts"
    __table_args__ = (
        Index(
            "ix_receipts_unsigned",
            "created_at",
            sqlite_where=text("signed_at IS NULL"),
            postgresql_where=text("signed_at IS NULL"),
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    created_at: Mapped[datetime]
    signed_at: Mapped[datetime | None]  # also if there is no checkpoint, and so no envelope
    envelope: Mapped[dict[str, Any] | None]


class ReceiptKeyRow(Table):
    """The single row with the Ed25519 key of this installation, in base 64."""

    __tablename__ = "receipt_keys"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    private_key: Mapped[str]
    created_at: Mapped[datetime]

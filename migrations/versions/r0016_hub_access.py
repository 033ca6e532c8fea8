"""Let the operator's project ``default`` use the operator's token for the Hugging Face Hub; other projects may not."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
PROJECTS = sa.table("projects", sa.column("name", sa.String()), sa.column("limits", DOCUMENT))


def upgrade() -> None:
    _store("default", {**_limits("default"), "hub": "operator-token"})


def downgrade() -> None:
    for name in list(op.get_bind().scalars(sa.select(PROJECTS.c.name))):
        _store(name, {limit: value for limit, value in _limits(name).items() if limit != "hub"})


def _limits(project: str) -> dict[str, Any]:
    return op.get_bind().scalar(sa.select(PROJECTS.c.limits).where(PROJECTS.c.name == project)) or {}


def _store(project: str, limits: dict[str, Any]) -> None:
    op.get_bind().execute(PROJECTS.update().where(PROJECTS.c.name == project).values(limits=limits))

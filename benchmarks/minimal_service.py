"""The peer of the submission benchmark: FastAPI and SQLAlchemy, which insert one row per request and commit it.

``python -m benchmarks.minimal_service DATABASE_URL PORT`` serves it in one uvicorn process, with the durability of this
project's server: WAL and ``synchronous=FULL`` on SQLite, the database's defaults on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import JSON, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    created_at: Mapped[datetime]
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)


class Spec(BaseModel):
    model: dict[str, Any]
    dataset: dict[str, Any]
    max_steps: int
    entity_name: str
    metadata: dict[str, str]


class Created(BaseModel):
    id: str
    status: str
    created_at: datetime
    spec: dict[str, Any]


def engine_of(url: str) -> AsyncEngine:
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_size=8, max_overflow=8)
    engine = create_async_engine(url, pool_size=1, max_overflow=0)  # more writers are slower

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def create_app(engine: AsyncEngine) -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    async def _healthz() -> str:  # pyright: ignore[reportUnusedFunction]
        return "ok"

    @app.post("/v1/jobs", status_code=201)
    async def _submit(spec: Spec) -> Created:  # pyright: ignore[reportUnusedFunction]
        row = Row(id=f"job_{uuid4().hex}", status="queued", created_at=datetime.now(UTC), spec=spec.model_dump())
        async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
            session.add(row)
        return Created(id=row.id, status=row.status, created_at=row.created_at, spec=row.spec)

    return app


async def serve(url: str, port: int) -> None:
    engine = engine_of(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    config = uvicorn.Config(create_app(engine), port=port, access_log=False, log_level="warning")
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2])))

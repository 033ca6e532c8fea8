"""The commands about bytes: checkpoints, download, upload, files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from zeta.cli.app import ARTIFACTS, AsJson, JobId, app


@app.command(rich_help_panel=ARTIFACTS)
def checkpoints(job_id: JobId, as_json: AsJson = False) -> None:
    """List a job's checkpoints."""
    from zeta.cli.output import print_list, size
    from zeta.cli.table import print_table
    from zeta.client import Client
    from zeta.job_ids import full_id

    with Client() as client:
        found = client.checkpoints(full_id(client, job_id))
    if as_json:
        print_list(found)
        return
    rows = [
        (
            manifest.name,
            manifest.step,
            manifest.tokens,
            size(sum(file.size for file in manifest.files)),
            manifest.created_at,
            ", ".join(f"{name} {value:.4f}" for name, value in manifest.metrics.items()) or None,
        )
        for manifest in found
    ]
    print_table(("NAME", "STEP", "TOKENS", "SIZE", "CREATED", "METRICS"), rows, none="There is no checkpoint yet.")


@app.command(rich_help_panel=ARTIFACTS)
def download(
    job_id: JobId,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="step-N, best, final or latest; unset: final, else latest.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only files whose path fits.")] = None,
    state: Annotated[bool, typer.Option("--state", help="With what resuming needs, too.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Of an adapter only the merged model (lora.save_merged).")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to; unset: JOB-CHECKPOINT here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files with other content.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint, every file verified.

    It goes on where an earlier download stopped, and compares every file with its SHA-256.
    """
    from zeta.cli.output import print_json, size
    from zeta.cli.transfer import shown_download
    from zeta.client import Client
    from zeta.job_ids import full_id
    from zeta_core.contract.printable import printable

    with Client() as client, shown_download(sys.stderr) as on_progress:
        done = client.download(
            full_id(client, job_id),
            checkpoint,
            output,
            include=include or (),
            state=state,
            merged=merged,
            overwrite=force,
            on_progress=on_progress,
        )
    if as_json:
        files = [{**file.model_dump(mode="json"), "verified": True} for file in done.files]
        print_json({"checkpoint": done.manifest.name, "directory": str(done.directory), "files": files})
        return
    width = max(len(file.path) for file in done.files)
    for file in done.files:
        print(f"{printable(file.path).ljust(width)}  {size(file.size):>10}  sha256 {file.sha256} verified")
    print(f"{done.manifest.name} (step {done.manifest.step}) is in {done.directory}")


@app.command(rich_help_panel=ARTIFACTS)
def upload(
    path: Annotated[
        Path, typer.Argument(help="A data file; or a model: a Hugging Face folder, a .tar of one, a .gguf.")
    ],
    purpose: Annotated[
        Literal["dataset", "model"] | None, typer.Option(help="What it is for; unset, its name tells.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a data file or a model.

    Bytes that the service has already are not sent again.
    """
    from zeta.cli.output import notice, print_json, size
    from zeta.cli.transfer import shown_upload
    from zeta.client import Client
    from zeta.local_inputs import looks_like_a_model, upload_model, uploaded
    from zeta_core.contract.printable import printable

    purpose = purpose or ("model" if looks_like_a_model(path) else "dataset")
    with Client() as client, shown_upload(sys.stderr) as on_bytes:

        def send(file: Path, what: Literal["dataset", "model"]):
            return client.upload(file, what, on_bytes=on_bytes)

        stored = upload_model(path, send) if purpose == "model" else send(path, purpose)
    if purpose == "dataset" and stored.filename != path.name:
        notice(f"{uploaded(path, stored)}.", as_json=as_json)
    if as_json:
        print_json(stored)
    else:
        print(f"{stored.id}  {printable(stored.filename)}  {size(stored.bytes)}  sha256 {stored.sha256}")


@app.command(rich_help_panel=ARTIFACTS)
def files(
    sha256: Annotated[str | None, typer.Option(help="Only files of these bytes.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    show_all: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    as_json: AsJson = False,
) -> None:
    """List uploaded files."""
    from zeta.cli.output import print_list, size
    from zeta.cli.table import print_table
    from zeta.client import Client

    with Client() as client:
        found = client.files(sha256=sha256, limit=None if show_all else limit)
    if as_json:
        print_list(found)
        return
    rows = [(file.id, file.filename, file.purpose, size(file.bytes), file.sha256, file.created_at) for file in found]
    print_table(("ID", "NAME", "PURPOSE", "SIZE", "SHA256", "CREATED"), rows, none="There is no such file yet.")

"""The commands for checkpoints and files: checkpoints, download, upload, files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zeta.cli.app import ARTIFACTS, AsJson, JobId, app

if TYPE_CHECKING:
    from zeta_core.contract.job.checkpoint import Manifest

MIN_SHA256_WIDTH = 12  # in a narrow terminal, checksums are shortened to this


@app.command(rich_help_panel=ARTIFACTS)
def checkpoints(job_id: JobId, as_json: AsJson = False) -> None:
    """List a job's checkpoints."""
    from zeta.cli.output import print_list, size
    from zeta.cli.table import Column, print_table
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        manifests = client.checkpoints(resolve_job_id(client, job_id))
    if as_json:
        print_list(manifests)
        return
    rows = [
        (
            manifest.name,
            manifest.step,
            manifest.tokens,
            size(sum(file.size for file in manifest.files)),
            manifest.created_at,
            _metrics(manifest),
        )
        for manifest in manifests
    ]
    columns = (
        Column("NAME"),
        Column("STEP"),
        Column("TOKENS", drop_order=3),
        Column("SIZE"),
        Column("CREATED", drop_order=2),
        Column("METRICS", min_width=24, drop_order=1),
    )
    print_table(columns, rows, none="No checkpoints yet.")


def _metrics(manifest: Manifest) -> str | None:
    """The metrics in one line, those of held-out data first, because a narrow table cuts the others."""
    ordered = sorted(manifest.metrics.items(), key=lambda metric: not metric[0].startswith("eval_"))
    return ", ".join(f"{name} {value:.4f}" for name, value in ordered) or None


@app.command(rich_help_panel=ARTIFACTS)
def download(
    job_id: JobId,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="step-N, best, final or latest. Default: final, or latest if none is final."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Download only files whose path matches. Repeatable.")
    ] = None,
    state: Annotated[bool, typer.Option("--state", help="Include the training state, for resuming.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Download only the merged model of an adapter (lora.save_merged).")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Target directory. Default: JOB-CHECKPOINT."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files whose content differs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint and verify every file.

    The SHA-256 of every file is checked. An interrupted download is resumed.
    """
    from zeta.cli.output import print_json, print_text, size, terminal_size
    from zeta.cli.progress_bars import download_progress
    from zeta.cli.table import cut_middle
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id
    from zeta_core.contract.printable import printable

    with Client() as client, download_progress(sys.stderr) as on_progress:
        done = client.download(
            resolve_job_id(client, job_id),
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
        line = f"{printable(file.path).ljust(width)}  {size(file.size):>10}  sha256 "
        left = terminal_size().columns - len(line) - len(" verified")
        shown = cut_middle(file.sha256, max(left, MIN_SHA256_WIDTH)) if sys.stdout.isatty() else file.sha256
        print(f"{line}{shown} verified")
    print_text(f"{done.manifest.name} (step {done.manifest.step}) is in {done.directory}")


@app.command(rich_help_panel=ARTIFACTS)
def upload(
    path: Annotated[
        Path, typer.Argument(help="A data file, or a model: a Hugging Face folder, a .tar of one, or a .gguf file.")
    ],
    purpose: Annotated[
        Literal["dataset", "model"] | None, typer.Option(help="Purpose of the file. Default: inferred from its name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a data file or a model.

    A file that the service already has is not sent again.
    """
    from zeta.cli.output import notice, print_json, size
    from zeta.cli.progress_bars import upload_progress
    from zeta.client import Client
    from zeta.local_inputs import looks_like_a_model, upload_message, upload_model
    from zeta_core.contract.job.responses import FilePurpose
    from zeta_core.contract.printable import printable

    purpose = purpose or ("model" if looks_like_a_model(path) else "dataset")
    with Client() as client, upload_progress(sys.stderr) as on_bytes:

        def send(file: Path, what: FilePurpose):
            return client.upload(file, what, on_bytes=on_bytes)

        stored = upload_model(path, send) if purpose == "model" else send(path, purpose)
    if purpose == "dataset" and stored.filename != path.name:
        notice(f"{upload_message(path, stored)}.", as_json=as_json)
    if as_json:
        print_json(stored)
    else:
        print(f"{stored.id}  {printable(stored.filename)}  {size(stored.bytes)}  sha256 {stored.sha256}")


@app.command(rich_help_panel=ARTIFACTS)
def files(
    sha256: Annotated[str | None, typer.Option(help="List only files with this SHA-256.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of files.")] = 20,
    show_all: Annotated[bool, typer.Option("--all", help="List all files.")] = False,
    as_json: AsJson = False,
) -> None:
    """List uploaded files, newest first."""
    from zeta.cli.output import print_list, size
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.files(sha256=sha256, limit=None if show_all else limit)
    if as_json:
        print_list(listed)
        return
    rows = [(file.id, file.filename, file.purpose, size(file.bytes), file.sha256, file.created_at) for file in listed]
    columns = (
        Column("ID"),
        Column("NAME", min_width=7),
        Column("PURPOSE", drop_order=2),
        Column("SIZE", drop_order=1),
        Column("SHA256", min_width=12, drop_order=4),
        Column("CREATED", drop_order=3),
    )
    print_table(columns, rows, none="No files found; `zeta upload PATH` uploads one.")

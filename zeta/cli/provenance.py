"""The commands about where a model comes from: receipt, verify, lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zeta.cli.app import ARTIFACTS, AsJson, app, completing


@app.command(rich_help_panel=ARTIFACTS)
def receipt(
    job_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]",
            help="A job id, the beginning of one, or @last for the newest job.",
            autocompletion=completing("job"),
        ),
    ] = None,
    key: Annotated[
        bool, typer.Option("--key", help="Print the public key of the installation instead, in PEM format.")
    ] = False,
) -> None:
    """Print the signed receipt of an ended job.

    It names the files of the model, the spec, the data, the machines and the software.
    """
    from zeta.cli.output import print_json
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id
    from zeta_core.contract.errors import InvalidRequest

    if key == (job_id is not None):
        raise InvalidRequest("Give either the id of a job, or --key.", param="ID")
    with Client() as client:
        if job_id is None:
            print(client.receipts.key().public_key, end="", flush=True)
        else:
            signed = client.receipts.get(resolve_job_id(client, job_id))
            print_json(signed.model_dump(mode="json", by_alias=True))


@app.command(rich_help_panel=ARTIFACTS)
def verify(
    receipt_file: Annotated[Path, typer.Argument(metavar="RECEIPT", help="The file of a receipt.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a downloaded checkpoint.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The public key (`zeta receipt --key`). Default: that of the server."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify that a folder contains exactly the model of a receipt. With --key, this needs no server.

    Every file that differs is named, and the exit status is then 1.
    """
    from zeta.cli.output import print_json, print_text
    from zeta.receipts import read_receipt
    from zeta.receipts import verify as compare

    found = compare(read_receipt(receipt_file), _public_key(key), directory)
    if as_json:
        print_json(
            {
                "valid": found.is_valid,
                "job": found.training.job,
                "checkpoint": found.training.checkpoint,
                "verified": found.num_verified,
                "differences": found.differences,
                "extra": found.extra,
                "omitted": found.omitted,
            }
        )
    else:
        for name, difference in found.differences.items():
            print_text(f"{name}: {difference}")
        for name in found.extra:
            print_text(f"{name}: not in the receipt")
        files = f"{found.num_verified} file{'' if found.num_verified == 1 else 's'}"
        whose = f"checkpoint {found.training.checkpoint} of {found.training.job}"
        if found.is_valid:
            state = " The training state was not downloaded." if found.omitted else ""
            print_text(f"Verified: {files} of {whose}, signed by the installation.{state}")
        else:
            print_text(f"Not the model of the receipt: {files} match {whose}, and the files above do not.")
    if not found.is_valid:
        raise typer.Exit(1)


@app.command(rich_help_panel=ARTIFACTS)
def lineage(
    object_id: Annotated[
        str,
        typer.Argument(
            metavar="FILE|ID",
            help="The id of a file, or of a job (or its beginning, or @last).",
            autocompletion=completing("file or job"),
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List the models that saw a file, or the files of a model.

    Files that a model saw through checkpoints of other jobs are included.
    """
    if object_id.startswith("file_"):
        _print_jobs(object_id, as_json)
    else:
        _print_files(object_id, as_json)


def _public_key(file: Path | None) -> str:
    from zeta.client import Client
    from zeta_core.contract.errors import InvalidRequest

    if file is None:
        with Client() as client:
            return client.receipts.key().public_key
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--key is {str(file)!r}, which cannot be read: {error}.", param="--key") from error


def _print_jobs(file_id: str, as_json: bool) -> None:
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        uses = client.jobs_of_file(file_id)
    if as_json:
        print_list(uses)
        return
    columns = (
        Column("JOB"),
        Column("NAME", min_width=8, drop_order=4),
        Column("STATUS", drop_order=1),
        Column("SAW THE FILE", drop_order=2),
        Column("CHECKPOINTS", min_width=12, drop_order=3),
        Column("CREATED", drop_order=5),
    )
    rows = [
        (
            use.id,
            use.entity_name,
            use.status,
            "directly" if use.base is None else f"through {use.base}",
            ", ".join(use.checkpoints) or None,
            use.created_at,
        )
        for use in uses
    ]
    print_table(columns, rows, none="No model saw this file.")


def _print_files(job_id: str, as_json: bool) -> None:
    from zeta.cli.output import print_json, print_text
    from zeta.cli.table import Column, print_table
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        full_id = resolve_job_id(client, job_id)
        found = client.files_of_job(full_id)
    if as_json:
        value: dict[str, Any] = {
            "job": full_id,
            "files": [vars(file) for file in found.files],
            "bases": found.bases,
            "deleted_jobs": found.deleted_jobs,
        }
        print_json(value)
        return
    columns = (
        Column("FILE"),
        Column("NAME", min_width=7),
        Column("SHA256", min_width=12, drop_order=2),
        Column("SEEN BY", drop_order=1),
    )
    rows = [
        (file.id, file.filename, file.sha256, "the job itself" if file.job == full_id else file.job)
        for file in found.files
    ]
    print_table(columns, rows, none="The model saw no uploaded file.")
    for deleted in found.deleted_jobs:
        print_text(f"{deleted} was deleted, so the files that it saw are unknown.")

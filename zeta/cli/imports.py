"""`zeta import`: create jobs from the exported jobs of other services."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from zeta.cli.app import JOBS, AsJson, app

import_app = typer.Typer(
    help="Create a job from an exported job of another service.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(import_app, name="import", rich_help_panel=JOBS)


@import_app.command(name="openai")
def import_openai(
    export: Annotated[
        Path,
        typer.Argument(metavar="JOB.json", help="The JSON object of OpenAI's GET /v1/fine_tuning/jobs/{id}."),
    ],
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="The job's training file.")] = None,
    validation_data: Annotated[Path | None, typer.Option(metavar="FILE", help="The job's validation file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import a fine-tuning job of OpenAI. It trains here with the same settings; those that can't be used are listed.

    Its model needs a name here (`zeta models add`). Local files are uploaded first.
    """
    from zeta.cli.output import notice, print_json, print_text
    from zeta.client import Client
    from zeta.openai_import import read_export
    from zeta_core.contract.spec.validation import shown

    exported = read_export(export)
    with Client() as client:
        job, not_imported = client.import_openai_job(
            exported, data, validation_data=validation_data, on_upload=partial(notice, as_json=as_json)
        )
    if as_json:
        print_json({"job": job.model_dump(mode="json"), "not_imported": not_imported})
        return
    if not_imported:
        print_text("These settings of the exported job have no equivalent here, or need a file:")
        for setting, value in not_imported.items():
            print_text(f"  {setting}: {shown(value)}{_fix(setting)}")
    print_text(f"{job.id} is {job.status}. Follow it: zeta wait {job.id}")


def _fix(setting: str) -> str:
    return "; name its file with --validation-data FILE" if setting == "validation_file" else ""

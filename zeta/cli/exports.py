"""`zeta export`: convert a job's checkpoint to another format."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from zeta.cli.app import ARTIFACTS, AsJson, JobId, app


@app.command(rich_help_panel=ARTIFACTS)
def export(
    job_id: JobId,
    to: Annotated[
        Literal["merged", "adapter", "gguf"],
        typer.Option(help="merged: a complete model; adapter: a peft adapter; gguf: a file for llama.cpp and Ollama."),
    ],
    weight_type: Annotated[
        Literal["f16", "bf16", "q8_0"] | None,
        typer.Option("--type", help="Type of the weights. Default: bf16 for merged, f16 for gguf. q8_0 is for gguf."),
    ] = None,
    checkpoint: Annotated[str, typer.Option(metavar="NAME", help="step-N, best, final or latest.")] = "final",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the export until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a checkpoint to another format.

    The export is a job that needs no GPU. It is compared with the checkpoint, and fails if it answers differently;
    certificate.json has the result.
    """
    from zeta.cli.follow import follow as follow_job
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client

    with Client() as client:
        job = client.export(job_id, to, type=weight_type, checkpoint=checkpoint)
        if as_json:
            print_json(job)
        else:
            hint = "" if follow else f" Follow it: zeta wait {job.id}; then: zeta download {job.id}"
            print_text(f"{job.id} is {job.status}.{hint}")
        if follow:
            raise typer.Exit(follow_job(client, job.id, as_json=as_json))

"""`zeta chat`: talk to a job's checkpoint in the terminal, and compare its answers with those of its base model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeta.cli.app import JOBS, AsJson, JobId, app

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zeta.chat import Answer, ChatMessage
    from zeta.client import Client

TUNED, BASE = "tuned", "base"


@app.command("chat", rich_help_panel=JOBS)
def chat(
    job_id: JobId,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Ask once and exit. Default: a conversation.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also show the answers of the model that was trained.")] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="'step-N', 'best' or 'final'. Default: the final or the newest one.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Continue the prompt as a text, for models without a chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="The system message of the conversation.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the most probable token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a job's checkpoint. The model is loaded on a free device of a worker with the first question.

    Without PROMPT, questions are read line by line; in a pipe, the whole input is one question. With --base, the
    answers of the trained model and of its base are shown together.
    """
    from zeta.cli.chat_display import show_answers
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id
    from zeta_core.contract.errors import InvalidRequest

    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if system is not None and text:
        raise InvalidRequest("--system has no effect with --text; put it into the prompt.", param="--system")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise InvalidRequest("The standard input is empty; give a question as PROMPT or in the input.")
    if prompt is None and as_json:
        raise InvalidRequest("--json needs a question, as PROMPT or in the standard input.", param="--json")
    with Client() as client:
        job = resolve_job_id(client, job_id)
        if checkpoint is not None:
            client.checkpoint(job, checkpoint)  # its error is about this job
        models = {TUNED: job if checkpoint is None else f"{job}/{checkpoint}"}
        if base:
            models[BASE] = f"{job}/{BASE}"
        conversations = {name: _first_messages(system) for name in models}
        if prompt is not None:
            _add_turns(conversations, prompt)
            show_answers(client, models, prompt if text else conversations, options, as_json=as_json)
            return
        _converse(client, models, conversations, options, is_text=text)


def _converse(
    client: Client,
    models: dict[str, str],
    conversations: dict[str, list[ChatMessage]],
    options: dict[str, Any],
    *,
    is_text: bool,
) -> None:
    """Read questions until the end of the input. Ctrl-C interrupts an answer."""
    from zeta.chat import ChatMessage
    from zeta.cli.chat_display import show_answers
    from zeta.cli.output import notice

    notice("Type a question; Ctrl-D ends the conversation.", as_json=False)
    while (question := _typed_line()) is not None:
        if not question:
            continue
        _add_turns(conversations, question)
        answers: Sequence[Answer] = ()
        try:
            answers = show_answers(client, models, question if is_text else conversations, options)
        except KeyboardInterrupt:
            notice("\nInterrupted; the question is not part of the conversation.", as_json=False)
        for name, turns in conversations.items():
            answer = next((answer for answer in answers if answer.model == models[name]), None)
            if answer is None:
                turns.pop()
            else:
                turns.append(ChatMessage(role="assistant", content=answer.text))


def _typed_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def _first_messages(system: str | None) -> list[ChatMessage]:
    from zeta.chat import ChatMessage

    return [] if system is None else [ChatMessage(role="system", content=system)]


def _add_turns(conversations: dict[str, list[ChatMessage]], question: str) -> None:
    from zeta.chat import ChatMessage

    for turns in conversations.values():
        turns.append(ChatMessage(role="user", content=question))

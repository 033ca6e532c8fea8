"""The demo: a real model learns something new, and the result is downloaded, verified and asked.

It starts `zeta up` in a temporary folder, submits a job as a user would, follows it, downloads the final model, and
compares the answers from before and after the training. At the end, also after a failure, it stops `zeta up` with
SIGINT, and thereby all of its processes. Only the downloaded model stays.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from zeta.cli.exit_status import ExitStatus
from zeta.cli.follow import show
from zeta.cli.output import duration, size
from zeta.client import Client
from zeta.demo import answers
from zeta.demo.jobs import DemoJob, choose_job
from zeta.demo.service import DemoFailed, running_service
from zeta.up.home import Home, UpState
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.events import ProgressEvent


class DemoTimes:
    """The duration of each part of the demo."""

    def __init__(self, setup_seconds: float) -> None:
        self._parts = {"set-up": setup_seconds} if setup_seconds else {}
        self._started_at = time.monotonic()

    def end_of(self, part: str) -> None:
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._started_at
        self._started_at = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {duration(seconds)}" for part, seconds in self._parts.items())
        return f"{duration(sum(self._parts.values()))} ({parts})"


def main() -> int:
    """Run the demo and return the exit status: 0 if every step succeeded."""
    parser = argparse.ArgumentParser(prog="python -m zeta.demo")
    parser.add_argument("--output", type=Path, default=Path("demo-model"), help="folder for the trained model")
    parser.add_argument("--setup-seconds", type=float, default=0.0, help="duration of the set-up, for the summary")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts a command with `&` makes it ignore SIGINT
        signal.signal(number, _as_interrupt)
    watch = DemoTimes(given.setup_seconds)
    try:
        with tempfile.TemporaryDirectory(prefix="zeta-demo-") as folder:
            job = choose_job(Path(folder), print)
            home = Home(Path(folder) / "home")
            with running_service(home) as state:
                watch.end_of("start")
                _train_and_download(job, state, home, given.output, watch)
            watch.end_of("stop")
        _compare(job, given.output)
        watch.end_of("questions")
    except (DemoFailed, ZetaError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    except KeyboardInterrupt:
        print("The demo was interrupted; all processes have stopped.", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    print(f"All processes have stopped. The demo took {watch}.")
    print(
        f"To ask it more, one question per line:\n  {_shown_python()} -m zeta_core ask {shlex.quote(str(given.output))}"
    )
    return ExitStatus.SUCCEEDED


def _train_and_download(job: DemoJob, state: UpState, home: Home, output: Path, watch: DemoTimes) -> None:
    key = home.admin_key.read_text().strip()
    with Client(state.url, key, certificate=state.certificate) as client:
        print(job.description, flush=True)
        submitted = client.submit(job.spec, on_upload=_print_now)
        print(f"Submitted {submitted.id}.", flush=True)
        if show(client, submitted.id).status != "succeeded":
            log = "".join(client.logs(submitted.id, tail=20))
            raise DemoFailed(f"{submitted.id} did not succeed. The end of its log:\n{log}")
        losses = [
            event.loss
            for event in client.stored_events(submitted.id)
            if isinstance(event, ProgressEvent) and event.loss is not None
        ]
        if not losses or losses[-1] >= losses[0]:
            raise DemoFailed(f"the loss did not fall: {losses}")
        print(f"First loss {losses[0]:.4f}, last loss {losses[-1]:.4f} (nats per token).", flush=True)
        watch.end_of("training")
        done = client.download(submitted.id, directory=output, merged=job.is_adapter, overwrite=True)
    print(f"Downloaded the {'merged ' if job.is_adapter else ''}model to {output}:")
    for file in done.files:
        print(f"  {file.path}  {size(file.size)}  sha256 {file.sha256} verified")
    watch.end_of("download")


def _compare(job: DemoJob, output: Path) -> None:
    """Ask the models from before and after the training, and show their answers."""
    print(f"Asking {len(job.questions)} questions that are not in the training data ...", flush=True)
    if job.base is None:
        (after,) = answers.ask([output], job.questions)
        for question, answer in zip(job.questions, after, strict=True):
            print(f"Generated text: {question.text}{answer}")
        return
    before, after = answers.ask([job.base, output], job.questions)
    answers.show_side_by_side(job.questions, before, after)
    num_before, num_after = (answers.num_right(job.questions, texts) for texts in (before, after))
    print(f"Right answers: {num_before} of {len(job.questions)} before, {num_after} after.", flush=True)
    if num_after <= num_before:
        raise DemoFailed("the model learned no fact.")


def _print_now(text: str) -> None:
    print(text, flush=True)


def _shown_python() -> str:
    """This interpreter as a command, relative to the current folder if it is inside."""
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path))


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""``make demo``: the whole workflow on this machine, in a temporary folder.

It starts `zeta up` as a user would, submits a job that trains a small Llama from scratch on the Python language
reference, follows it, downloads the final checkpoint, verifies every file, loads it with transformers and generates a
line of text. At the end, also after a failure, it stops `zeta up` with SIGINT, and thereby all of its processes.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from zeta.cli.exit_status import ExitStatus
from zeta.cli.follow import show
from zeta.cli.output import duration, size
from zeta.client import Client
from zeta.up.child import end_with_parent
from zeta.up.home import Home, UpState
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.events import ProgressEvent
from zeta_core.system.settings import process_environment

START_SECONDS = 180.0
STOP_SECONDS = 90.0
GENERATE_SECONDS = 180.0
PROMPT = "The statement "

# About a minute on two slow cores. The tokens are bytes, so the loss falls from ln(384) = 5.95 nats per byte.
SPEC: dict[str, Any] = {
    "entity_name": "demo",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 384,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        }
    },
    "tokenizer": {"builtin": "bytes"},
    "dataset": {"builtin": "python-docs"},
    "seq_len": 256,
    "batch_size": 8,
    "gradient_accumulate_every": 1,
    "learning_rate": 3e-3,
    "max_steps": 200,
    "checkpointing_steps": 100,
    "seed": 0,
}

# Runs in a separate process, because the package zeta must not import torch.
GENERATE = """
import sys, warnings
warnings.filterwarnings("ignore")
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging
logging.set_verbosity_error()
folder, prompt = sys.argv[1:]
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
written = model.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.5, top_k=20, pad_token_id=0)
print(" ".join(tokenizer.decode(written[0], skip_special_tokens=True).split()))
"""


class DemoFailed(Exception):
    """A step of the demo failed; the message describes it."""


def main() -> int:
    """Run the demo and return the exit status: 0 if every step succeeded."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts a command with `&` makes it ignore SIGINT
        signal.signal(number, _as_interrupt)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="zeta-demo-") as folder:
            home = Home(Path(folder) / "home")
            with _service(home) as state:
                _run_job(state, home, Path(folder) / "checkpoint")
        print(f"All processes have stopped. The demo took {duration(time.monotonic() - started)}.")
    except (DemoFailed, ZetaError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    except KeyboardInterrupt:
        print("The demo was interrupted; all processes have stopped.", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    return ExitStatus.SUCCEEDED


def _run_job(state: UpState, home: Home, checkpoint: Path) -> None:
    key = home.admin_key.read_text().strip()
    with Client(state.url, key) as client:
        job = client.submit(SPEC)
        print(f"Submitted {job.id}: a byte-level Llama, trained on the Python language reference.", flush=True)
        if show(client, job.id).status != "succeeded":
            raise DemoFailed(f"{job.id} did not succeed. The end of its log:\n{''.join(client.logs(job.id, tail=20))}")
        losses = [
            event.loss
            for event in client.stored_events(job.id)
            if isinstance(event, ProgressEvent) and event.loss is not None
        ]
        if not losses or losses[-1] >= losses[0]:
            raise DemoFailed(f"the loss did not fall: {losses}")
        print(f"First loss {losses[0]:.4f}, last loss {losses[-1]:.4f} (nats per byte).")
        done = client.download(job.id, directory=checkpoint)
    for file in done.files:
        print(f"  {file.path}  {size(file.size)}  sha256 {file.sha256} verified")
    print("Generated text: " + _generated(checkpoint))


def _generated(checkpoint: Path) -> str:
    """One line of text that the downloaded model generates."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", GENERATE, str(checkpoint), PROMPT],
            env=process_environment() | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            capture_output=True,
            text=True,
            timeout=GENERATE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"the model generated no text within {GENERATE_SECONDS:g} s.") from error
    line = done.stdout.strip()
    if done.returncode != 0 or not line:
        raise DemoFailed(f"the downloaded model cannot be loaded or generates no text:\n{done.stderr.strip()[-2000:]}")
    return line


@contextmanager
def _service(home: Home) -> Generator[UpState]:
    """Run `zeta up` on a free port, and stop it at the end, also after a failure."""
    print("Starting the service (Valkey, API, one worker) ...", flush=True)
    # Settings of a service that this user is already running must not affect this one.
    variables = {name: value for name, value in process_environment().items() if not name.startswith("ZETA_")}
    log_file = home.path.with_name("up.log")
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zeta", "up", "--home", str(home.path), "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            process_group=0,  # a Ctrl-C in the terminal reaches only this process, which stops `zeta up` itself
            preexec_fn=end_with_parent(signal.SIGINT),
        )
    try:
        yield _ready(process, home, log_file)
    finally:
        _stop(process)


def _ready(process: subprocess.Popen[bytes], home: Home, log_file: Path) -> UpState:
    deadline = time.monotonic() + START_SECONDS
    while True:
        state = home.running()
        if state is not None and state.state == "ready":
            print(f"The service is ready at {state.url}.")
            return state
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            raise DemoFailed(f"`zeta up` exited before it was ready:\n{log_file.read_text(errors='replace')[-2000:]}")
        if time.monotonic() >= deadline:
            raise DemoFailed(f"`zeta up` was not ready within {START_SECONDS:g} s.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop `zeta up`, or kill it (and with it its children) after `STOP_SECONDS` or a second Ctrl-C."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_SECONDS)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
        raise


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

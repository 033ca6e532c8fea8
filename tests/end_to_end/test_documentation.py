"""Every command and program in the documentation works as it is written.

Each page runs as one script in its own folder, with a tiny model in the place of the named ones. README.md,
docs/openai.md and docs/data.md have tests of their own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.snippets import DOCS, ROOT, run_script, script, snippets
from tests.end_to_end.specs import TINY_LLAMA
from tests.harness.ports import free_loopback_port
from tests.harness.service import ZETA, clean_environment
from tests.zeta_core.data.chat_templates import CHATML

TUTORIAL = ("tutorial/1-first-job.md", "tutorial/2-your-data.md", "tutorial/3-your-model.md")
WITH_A_SERVICE = (
    "answers.md",
    "commands.md",
    "concepts/exact-resume.md",
    "export.md",
    "how-to/evaluate.md",
    "how-to/ollama.md",
    "how-to/other-trainers.md",
    "how-to/resume.md",
    "how-to/several-gpus.md",
    "how-to/sweep.md",
    "operations/monitoring.md",
    "security.md",
)
WITHOUT_A_SERVICE = ("concepts/loss.md",)
OWN_HOME = ("operations/backup.md",)
OWN_TESTS = {
    "README.md": "test_readme.py",
    "docs/openai.md": "test_openai_page.py",
    "docs/data.md": "test_data_page.py",
    "docs/webhooks.md": "test_cli_webhooks.py",
}
NUM_NOT_RUN = {
    "README.md": 1,
    "docs/answers.md": 1,
    "docs/export.md": 1,
    "docs/how-to/object-storage.md": 2,
    "docs/how-to/ollama.md": 2,
    "docs/how-to/several-hosts.md": 3,
    "docs/operations/monitoring.md": 1,
    "docs/operations/tls.md": 1,
}  # each has its reason in the page
# Examples of commands with their output, by the page and the word that tells which test runs the command.
TRANSCRIPTS = {
    "docs/openai.md": {"curl https://api.openai.com": "is a request to OpenAI", "zeta import openai": "test_import.py"},
    "docs/commands.md": {"zeta sweep": "test_cli_sweeps.py", "zeta data show": "test_data_show.py"},
}
NAMED_MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "org/name")
CHATS = [
    {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "1, 2" * n}]}
    for n in range(1, 41)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny-chat"
    program = (
        "import sys, json; from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM\n"
        "config = json.loads(sys.argv[2]); config.pop('model_type')\n"
        "LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(sys.argv[1])\n"
        "tokenizer = ByT5Tokenizer(); tokenizer.chat_template = sys.argv[3]; tokenizer.save_pretrained(sys.argv[1])"
    )
    config = {**TINY_LLAMA, "max_position_embeddings": 1024}
    subprocess.run([sys.executable, "-c", program, folder, json.dumps(config), CHATML], check=True, timeout=120)
    return folder


@contextmanager
def user(home: Path) -> Generator[dict[str, str]]:
    """The environment of a user with this home and a free port; a service that is left running is stopped."""
    port = str(free_loopback_port())
    path = f"{ZETA.parent}:{clean_environment()['PATH']}"
    environment = {**clean_environment(), "HOME": str(home), "PATH": path, "ZETA_PORT": port, "TERM": "dumb"}
    try:
        yield environment
    finally:
        subprocess.run([str(ZETA), "down"], env=environment, capture_output=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user whose service is running."""
    with user(tmp_path_factory.mktemp("user")) as variables:
        subprocess.run([str(ZETA), "up", "--detach"], env=variables, check=True, capture_output=True, timeout=150)
        yield variables


def run_pages(names: tuple[str, ...], folder: Path, environment: Mapping[str, str], model: Path) -> str:
    """Run the snippets of the pages in ``folder``, which contains a file of conversations."""
    text = script([DOCS / name for name in names])
    for name in NAMED_MODELS:
        text = text.replace(name, str(model))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return run_script(text, folder, environment, timeout_seconds=550)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorial_works(tmp_path: Path, model: Path) -> None:
    with user(tmp_path) as environment:
        output = run_pages(TUTORIAL, tmp_path, environment, model)
    assert (tmp_path / "first-model" / "model.safetensors").exists()
    assert "131,392 parameters" in output
    assert (tmp_path / "bigram" / "final").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WITH_A_SERVICE)
def test_the_commands_of_a_page_work(name: str, tmp_path: Path, environment: dict[str, str], model: Path) -> None:
    if name in ("answers.md", "export.md"):  # their commands use the newest job
        spec = {"model": str(model), "dataset": "chats.jsonl", "lora": {}, "max_steps": 2, "seq_len": 256}
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
        (tmp_path / "chat.json").write_text(json.dumps(spec))
        run_script("zeta submit chat.json --follow", tmp_path, environment, timeout_seconds=200)
    run_pages((name,), tmp_path, environment, model)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OWN_HOME)
def test_the_commands_of_a_page_work_on_a_new_home(name: str, tmp_path: Path, model: Path) -> None:
    with user(tmp_path) as environment:
        run_pages((name,), tmp_path, environment, model)


@pytest.mark.parametrize("name", WITHOUT_A_SERVICE)
def test_the_programs_of_a_page_work(name: str, tmp_path: Path) -> None:
    run_script(script([DOCS / name]), tmp_path, clean_environment(), timeout_seconds=60)


def test_every_snippet_is_run_or_has_a_reason() -> None:
    run = {f"docs/{name}" for name in (*TUTORIAL, *WITH_A_SERVICE, *WITHOUT_A_SERVICE, *OWN_HOME)} | OWN_TESTS.keys()
    not_run: dict[str, int] = {}
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        name = str(page.relative_to(ROOT))
        found = snippets(page)
        assert len(found) == len(re.findall(r"^```(?:sh|python|bash|console)$", page.read_text(), re.MULTILINE)), name
        if reasons := [snippet.reason for snippet in found if snippet.reason]:
            not_run[name] = len(reasons)
        assert name in run or len(found) == not_run.get(name, 0), f"{name} has snippets that no test runs"
    assert not_run == NUM_NOT_RUN
    assert all(list((ROOT / "tests").rglob(test)) for test in OWN_TESTS.values())


def test_every_example_with_output_names_a_tested_command() -> None:
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        known = TRANSCRIPTS.get(str(page.relative_to(ROOT)), {})
        for command in re.findall(r"^    \$ (.*)$", page.read_text(), re.MULTILINE):
            assert any(command.startswith(beginning) for beginning in known), command

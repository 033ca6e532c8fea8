"""Every command and script of the README works word for word."""

import json
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.specs import TINY_LLAMA
from tests.harness.service import Service, clean_environment, running_service

ROOT = Path(__file__).parents[2]
PORT = 8400  # as in the README
CHATS = [
    {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "1, 2" * n}]}
    for n in range(1, 41)
]


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section of the README."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def readme_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT}, which the README names, is taken by another program")
    with running_service(tmp_path_factory.mktemp("user") / ".zeta", port=PORT) as service:
        yield service


def run(script: str, service: Service, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block with bash in ``folder``, as the user whose home contains the service's ``.zeta``."""
    if not (folder / ".venv").exists():
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "zeta").symlink_to(Path(sys.executable).parent / "zeta")
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env={**clean_environment(), "HOME": str(service.home.parent), "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + service.log()
    return done


@pytest.mark.extended
@pytest.mark.timeout(400)
def test_the_curl_session_works(readme_service: Service, tmp_path: Path) -> None:
    (session,) = blocks("A session with curl", "sh")
    done = run(session, readme_service, tmp_path)
    assert "event: end" in done.stdout
    job = next(line for line in done.stdout.splitlines() if line.startswith('{"id":"job_'))
    assert json.JSONDecoder().raw_decode(job)[0]["status"] == "succeeded"
    with tarfile.open(tmp_path / "final.tar") as archive:
        assert any(name.endswith("model.safetensors") for name in archive.getnames())


@pytest.mark.extended
@pytest.mark.timeout(400)
def test_the_zeta_commands_work_in_the_same_folder(readme_service: Service, tmp_path: Path) -> None:
    (session,) = blocks("A session with curl", "sh")
    until_job_json = session.split("JOB=$(")[0]
    (commands,) = blocks("The `zeta` command", "sh")
    done = run(until_job_json + commands, readme_service, tmp_path)
    assert "trained on" in done.stdout, "zeta data show"
    assert (tmp_path / "my-model" / "model.safetensors").exists()


@pytest.mark.extended
@pytest.mark.timeout(400)
def test_the_recipes_are_accepted(readme_service: Service, tmp_path: Path) -> None:
    (recipes,) = blocks("Recipes", "sh")
    make_model(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    commands = recipes.replace("org/name", "./model")
    done = run("export PATH=$PWD/.venv/bin:$PATH\n" + commands, readme_service, tmp_path)
    with readme_service.http() as http:
        jobs = [job for job in http.get("/v1/jobs").json()["data"] if job["id"] in done.stdout]
        assert len(jobs) == commands.count("zeta submit")
        for job in jobs:
            http.post(f"/v1/jobs/{job['id']}/cancel")


def make_model(folder: Path) -> None:
    """Save a tiny Llama with a byte-level tokenizer, as a user's ``save_pretrained`` does."""
    script = (
        "import sys, json; from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM\n"
        "config = json.loads(sys.argv[2]); config.pop('model_type')\n"
        "LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(sys.argv[1])\n"
        "ByT5Tokenizer().save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, folder, json.dumps(TINY_LLAMA)], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_script_with_the_trainer_works(tmp_path: Path) -> None:
    (script,) = blocks("The Trainer by itself", "python")
    (tmp_path / "script.py").write_text(script)
    environment = {**clean_environment(), "HOME": str(tmp_path), "ZETA_HOME": str(tmp_path / ".zeta")}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "models" / "final" / "model.safetensors").exists()
    assert (tmp_path / "models" / "checkpoint.pt").exists()

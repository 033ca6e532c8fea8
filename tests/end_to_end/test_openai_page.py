"""The commands and programs of docs/openai.md run as they are written, with a small model and another port."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.specs import TINY_LLAMA
from tests.harness.ports import free_loopback_port
from tests.harness.service import ZETA, clean_environment

PAGE = (Path(__file__).parents[2] / "docs/openai.md").read_text()
MODEL_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user whose home is ``tmp_path``; the service that the page starts is stopped at the end."""
    path = f"{ZETA.parent}:{clean_environment()['PATH']}"
    port = str(free_loopback_port())
    variables = {**clean_environment(), "HOME": str(tmp_path), "PATH": path, "ZETA_PORT": port, "ZETA_HOME": ""}
    try:
        yield variables
    finally:
        subprocess.run([str(ZETA), "down"], env=variables, capture_output=True, timeout=100, check=False)


@pytest.mark.timeout(400)
def test_the_commands_of_the_page_train_a_model(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_LLAMA, "max_position_embeddings": 256}))
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(12)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shell = "\n".join(blocks("sh")).replace(MODEL_ON_THE_HUB, "config.json")
    shell = shell.replace(":8400/", f":{environment['ZETA_PORT']}/")
    assert "config.json" in shell
    (tmp_path / "script.py").write_text("\n".join(blocks("python")))
    program = f"set -eu\n{shell}\n{sys.executable} script.py\n"
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=350,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^ft:gpt-4o-mini-2024-07-18:default:support:\w+$", done.stdout, re.MULTILINE)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["custom_id"] for answer in answers] == ["r0", "r1", "r2"]
    assert (tmp_path / "metrics.csv").read_text().startswith("step,train_loss,train_accuracy,")
    with tarfile.open(tmp_path / "model.tar") as tar:
        assert {"manifest.json", "model.safetensors", "config.json"} <= set(tar.getnames())

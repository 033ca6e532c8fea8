"""The README's curl session works word for word."""

import json
import re
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.harness.service import clean_environment, running_service

README = Path(__file__).parents[2] / "README.md"
PORT = 8400  # the README's own words


def curl_session() -> str:
    section = README.read_text().split("## A session with curl")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


@pytest.mark.timeout(400)
def test_the_curl_session_in_the_readme_works_verbatim(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT}, which the README names, is taken by another program")
    user_home, folder = tmp_path / "user", tmp_path / "folder"
    folder.mkdir()
    with running_service(user_home / ".zeta", port=PORT) as service:
        session = subprocess.run(
            ["bash", "-e", "-c", curl_session()],
            cwd=folder,
            env={**clean_environment(), "HOME": str(user_home)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert session.returncode == 0, session.stdout[-3000:] + session.stderr[-3000:] + service.log()
    assert "event: end" in session.stdout
    job = next(line for line in session.stdout.splitlines() if line.startswith('{"id":"job_'))
    end = job.index('{"id"')
    assert json.JSONDecoder().raw_decode(job[end:])[0]["status"] == "succeeded"
    with tarfile.open(folder / "final.tar") as archive:
        assert any(name.endswith("model.safetensors") for name in archive.getnames())

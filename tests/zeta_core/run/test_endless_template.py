"""A run whose chat template never ends can be cancelled, and leaves nothing behind."""

import json
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.waiting import wait_until
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.run_directories import end_of, make_run, start
from zeta_core.contract.wire.run_directory import file_key

LOOP = "{% for i in range(99999) %}"
ENDLESS = LOOP * 4 + "{% endfor %}" * 4
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]}


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="templates are rendered in a process of their own on Linux")
def test_a_run_is_cancelled_while_its_template_renders_without_end(tmp_path: Path) -> None:
    files = tmp_path / "artifacts" / "files"
    files.mkdir(parents=True)
    byte_tokenizer(ENDLESS).save_pretrained(tmp_path / "tokenizer")
    with tarfile.open(tmp_path / "artifacts" / file_key("file_tokenizer"), "w") as archive:
        archive.add(tmp_path / "tokenizer", "tokenizer")
    (tmp_path / "artifacts" / file_key("file_rows")).write_text(json.dumps(ROW) + "\n")
    known = {"file_tokenizer": {"filename": "tokenizer.tar"}, "file_rows": {"filename": "rows.jsonl"}}
    spec: dict[str, Any] = {"tokenizer": {"file": "file_tokenizer"}, "dataset": {"file": "file_rows"}}
    run_dir = make_run(tmp_path, spec=spec, resolved_spec={"files": known})
    process = start(run_dir)
    training = psutil.Process(process.pid)

    def rendering() -> list[psutil.Process]:
        assert process.poll() is None, (run_dir / "train.log").read_text()
        return [child for child in training.children(recursive=True) if child.cpu_times().user > 1]

    [renderer] = wait_until(rendering, 120, "the template to be rendered")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert (end_of(run_dir).status, end_of(run_dir).reason) == ("queued", "handed_back")
    assert not renderer.is_running()

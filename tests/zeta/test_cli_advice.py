"""Advice: every view of a job shows the command that applies it, and the command works as printed."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.harness.service import Service
from tests.zeta.conftest import TINY_JOB
from zeta.client import Client
from zeta.spec_file import apply_settings
from zeta_core.contract.job.advice import advice_text, rerun_command, set_options, suggest_less_memory


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_printed_command_fixes_the_job_and_warns_of_what_remains(
    service: Service, client: Client, tmp_path: Path
) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps({**TINY_JOB, "overlong": "error", "learning_rate": 3.0}))
    ended = service.command("submit", str(spec), "--follow", timeout_seconds=240)
    assert ended.returncode == 1, ended.stderr
    (job_id,) = set(re.findall(r"job_\w+", ended.stdout))
    command = f"zeta rerun {job_id} --set overlong=truncate"
    for words in (("job", job_id), ("wait", job_id), ("events", job_id), ("logs", job_id)):
        shown = service.command(*words).stdout
        assert "Raise seq_len, or set overlong to 'truncate' or 'drop'." in shown, words
        assert re.search(rf"{re.escape(command)}$", shown, re.MULTILINE), (words, shown)
    assert re.search(rf"{re.escape(command)}$", ended.stdout, re.MULTILINE)
    job = client.job(job_id)
    assert job.error is not None
    assert (job.status_reason, job.error.patch) == ("invalid_data", {"overlong": "truncate"})

    rerun = service.command(*shlex.split(command)[1:], "--follow", timeout_seconds=240)
    assert rerun.returncode == 0, rerun.stdout + rerun.stderr
    (new_id,) = set(re.findall(r"job_\w+", rerun.stdout)) - {job_id}
    corrected = f"zeta rerun {new_id} --set learning_rate=0.002"
    assert re.search(rf"^warning: learning_rate is 3, .* Apply it: {re.escape(corrected)}$", rerun.stdout, re.MULTILINE)
    assert corrected in service.command("job", new_id).stdout
    (warning,) = (found for found in client.job(new_id).warnings if found["code"] == "unusual_learning_rate")
    assert warning["patch"] == {"learning_rate": 0.002}


@pytest.mark.parametrize(
    "patch",
    [
        {"batch_size": 2, "gradient_accumulate_every": 8},
        {"learning_rate": 3e-5, "warmup_steps": 0.1, "mixed_precision": "no"},
        {"model": {"config": {"vocab_size": 400}}, "tokenizer": None},
        {"use_activation_checkpointing": True, "entity_name": "it's $5; rm *", "lora": {}, "metadata": {"k": "true"}},
    ],
)
def test_a_shell_parses_the_printed_command_into_the_patch(patch: dict[str, Any]) -> None:
    words = shlex.split(rerun_command("job_1", patch))
    assert words[:3] == ["zeta", "rerun", "job_1"]
    assert words[3::2] == ["--set"] * len(set_options(patch))
    assert apply_settings({}, words[4::2]) == patch


def test_advice_is_worded_for_a_job_and_for_a_script() -> None:
    suggestion = suggest_less_memory({"batch_size": 4, "gradient_accumulate_every": 4})
    assert advice_text("Memory ran out.", suggestion.hint, suggestion.patch, "job_1") == (
        "Memory ran out. Use batch_size 2 with gradient_accumulate_every 8: the global batch stays the same. "
        "Apply it: zeta rerun job_1 --set batch_size=2 --set gradient_accumulate_every=8"
    )
    assert advice_text("Memory ran out.", suggestion.hint, suggestion.patch).endswith(
        "Set batch_size=2, gradient_accumulate_every=8."
    )
    assert advice_text("Memory ran out.", None, None, "job_1") == "Memory ran out."
    assert suggest_less_memory({"batch_size": 1, "use_activation_checkpointing": True, "seq_len": 128}).patch is None

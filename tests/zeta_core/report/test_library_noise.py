"""Library messages that are hidden in logs, and those that are not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.zeta_core.run.test_run_directory import install_builder
from tests.zeta_core.run_directories import end_of, make_run, start

# Messages of libraries about themselves are hidden; all others are kept.
BUILDER = """
import logging, warnings
from tests.zeta_core.models import llama

def build():
    warnings.warn("mine-future", FutureWarning, stacklevel=1)
    warnings.warn("mine-user", stacklevel=1)
    for module in ("torch.nn.modules.module", "transformers", "zeta_core.model.lora"):
        warnings.warn_explicit("old-interface", FutureWarning, "library.py", 1, module=module)
        warnings.warn_explicit("library-user", UserWarning, f"{module}.py", 1, module=module)
    warnings.warn_explicit("torchlike-future", FutureWarning, "x.py", 1, module="torchlike")
    step = "Detected call of `lr_scheduler.step()` before `optimizer.step()`. In PyTorch ..."
    warnings.warn_explicit(step, UserWarning, "lr_scheduler.py", 1, module="torch.optim.lr_scheduler")
    flags = logging.getLogger("transformers.generation.configuration_utils")
    flags.warning("The following generation flags are not valid and may be ignored: %s", ["top_k"])
    flags.warning("another message about generation")
    logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU")
    logging.getLogger("DeepSpeed").error("deepspeed-error")
    logging.getLogger("builder").warning("mine-logged")
    return llama()
"""


@pytest.mark.extended
def test_a_job_log_omits_what_users_cannot_act_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = install_builder(tmp_path, monkeypatch, "noisy", BUILDER, "build")
    spec = {"model": {"builder": builder}, "max_steps": 1}
    run_dir = make_run(tmp_path / "run", spec=spec)
    root = Path(__file__).resolve().parents[3]
    process = start(run_dir, PYTHONPATH=f"{tmp_path / 'installed'}:{root}")
    assert process.wait(timeout=120) == 0, (run_dir / "train.log").read_text()
    log = (run_dir / "train.log").read_text()
    for kept in ("mine-future", "mine-user", "torchlike-future", "mine-logged", "another message", "deepspeed-error"):
        assert kept in log, log
    assert log.count("library-user") >= 3
    for hidden in (
        "old-interface",
        "lr_scheduler.step()",
        "flags are not valid",
        "Setting accelerator",
        "Failed to load",
    ):
        assert hidden not in log, log
    assert end_of(run_dir).status == "succeeded"


# Trains, and then loads the checkpoint as a model, which transformers shows with a progress bar.
SCRIPT = """
import sys, zeta
config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "vocab_size": 384, "max_position_embeddings": 32}
first = zeta.Trainer(dataset="data.txt", model={"config": config}, max_steps=1, output_dir="first")
zeta.Trainer(dataset="data.txt", model=str(first.checkpoint), max_steps=1, output_dir="second")
"""


@pytest.mark.extended
def test_a_trainer_script_prints_only_the_report(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("a few words " * 100)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "ZETA_HOME": str(tmp_path / "home")}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Saved final (step 1") == 2
    assert process.stderr == "", process.stderr

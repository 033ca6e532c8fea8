"""What a job's log has of the messages that libraries and the user's own code write."""

from pathlib import Path

import pytest

from tests.zeta_core.run.test_run_directory import install_builder
from tests.zeta_core.run_directories import end_of, make_run, start

# Each message with whether it stays: what the libraries write about themselves goes, all else stays.
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


def test_a_log_has_what_its_reader_can_act_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = install_builder(tmp_path, monkeypatch, "noisy", BUILDER, "build")
    spec = {"model": {"builder": builder}, "max_steps": 1}
    run_dir = make_run(tmp_path / "run", spec=spec)
    root = Path(__file__).resolve().parents[3]
    process = start(run_dir, PYTHONPATH=f"{tmp_path / 'installed'}:{root}")
    assert process.wait(timeout=120) == 0, (run_dir / "train.log").read_text()
    log = (run_dir / "train.log").read_text()
    for stays in ("mine-future", "mine-user", "torchlike-future", "mine-logged", "another message", "deepspeed-error"):
        assert stays in log, log
    assert log.count("library-user") >= 3
    for goes in (
        "old-interface",
        "lr_scheduler.step()",
        "flags are not valid",
        "Setting accelerator",
        "Failed to load",
    ):
        assert goes not in log, log
    assert end_of(run_dir).status == "succeeded"

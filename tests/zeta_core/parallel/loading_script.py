"""Measures the memory of each rank while FSDP2 loads and saves a model, then trains a small model and resumes it.

``loading_script.py RESULT_FILE LARGE SMALL``: the two model directories. If the folder of the result contains a run of
an earlier launch, the script only resumes that.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from zeta import Trainer
from zeta_core.checkpoint.shared_weights import SharedWeights
from zeta_core.checkpoint.staging import Staging
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.data.sources import SourceLocations
from zeta_core.environment import ProcessRank, home
from zeta_core.memory.usage import num_bytes
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.model.quantization import quantize
from zeta_core.model.sources import locate_model
from zeta_core.parallel.deferred_weights import defer_weights
from zeta_core.parallel.fsdp import FullySharded
from zeta_core.parallel.processes import Processes
from zeta_core.plan import PlanInputs, decide_plan, with_length


def anonymous_bytes() -> int:
    """The memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Peak:
    """The peak of `anonymous_bytes` above its value at the start."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return max(self.peak, anonymous_bytes()) - self.before

    def _sample(self) -> None:
        while not self._ended.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())


class Measured(FullySharded):
    """Ends the measurement when the weights are read, before the first block is gathered."""

    peak: Peak

    def _read_weights(self) -> None:
        super()._read_weights()
        self.used = self.peak.end()


@contextmanager
def loaded(directory: str, processes: Processes, *, quantizes: bool = False) -> Generator[Measured]:
    options = TrainerOptions(
        use_fsdp=True, batch_size=1, gradient_accumulate_every=1, seq_len=8, max_steps=1, warmup_steps=0
    )
    inputs = PlanInputs(processes.world_size, "cpu", False, 1, 256, 1, 1 << 30, True, "data")
    plan = with_length(decide_plan(options, inputs, None), options, processes.world_size)
    located = locate_model(directory, SourceLocations(any_path=True), home() / "cache")
    Measured.peak = Peak()
    assert located.build_exact is not None
    model: nn.Module = located.build_exact()
    if quantizes:
        quantize(model, "nf4", torch.bfloat16, torch.device("cpu"), deferred=True)
    weights = defer_weights(model, torch.float32)
    engine = Measured(model, plan, processes, blocks=repeated_blocks(model), weights=weights)
    yield engine
    engine.close()


def save(engine: FullySharded, folder: Path) -> int:
    """The additional memory of this rank for writing the weights, and for exporting them on the first rank."""
    peak = Peak()
    weights = engine.stage_weights(Staging(), engine.module.state_dict().keys())
    rows = engine.staged_rows(weights)
    assert rows is not None
    shared = SharedWeights(folder, rows, torch.bfloat16)
    engine.processes.from_main(shared.create)
    shared.write()
    engine.processes.gather(None)
    if engine.processes.is_main:
        save_file(shared.exported(), folder / "exported.safetensors")
    return peak.end()


def train(model: str, folder: Path, steps: int, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "seq_len": 32,
        "learning_rate": 1e-2,
        "seed": 42,
        "lr_scheduler": "constant",
        **options,
    }
    result = Trainer(model=model, output_dir=folder / "run", max_steps=steps, **values)
    return {"loss": result.train_loss, "steps_trained": result.steps_trained}


def main(result_file: str, large: str, small: str) -> None:
    rank = ProcessRank.from_environment()
    processes = Processes(rank, need_group=True)
    folder = Path(result_file).parent
    split = {"use_fsdp": True, "batch_size": 12 // rank.world_size, "gradient_accumulate_every": 1}
    found: dict[str, Any] = {}
    if (folder / "run").exists():
        found["resumed"] = train(small, folder, 6, **split, resume_from_checkpoint=folder / "run")
    else:
        with loaded(small, processes):
            pass  # imports the libraries
        with loaded(small, processes, quantizes=True):
            pass  # imports the kernels for 4 bits
        with loaded(large, processes, quantizes=True) as engine:
            held = num_bytes(engine.module.parameters())
            found["quantized"] = processes.gather({"shard": held, "loading": engine.used})
        with loaded(large, processes) as engine:
            shard = num_bytes(engine.module.parameters())
            measured = {"shard": shard, "loading": engine.used, "saving": save(engine, folder)}
            found["memory"] = processes.gather(measured)
        train(small, folder, 2, **split)
        found["resumed"] = train(small, folder, 4, **split, resume_from_checkpoint=folder / "run")
    processes.close()
    if rank.is_main:
        Path(result_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

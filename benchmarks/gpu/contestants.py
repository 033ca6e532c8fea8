"""``python -m benchmarks.gpu.contestants NAME WORKLOAD OUT``: train a workload with a library, and write the result.

Each contestant has a process of its own, so that none inherits the memory or the settings of another. Steps are timed
between the ends of optimizer steps, after the device has finished them, in the same way for every library.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import workload as common
from benchmarks.gpu.workloads import (
    LORA_ALPHA,
    LORA_RANK,
    MEASURED_STEPS,
    MEASURING_SECONDS,
    MIN_MEASURED_STEPS,
    REHEARSAL,
    WARM_UP_STEPS,
    WORKLOADS,
    GpuWorkload,
    Measurement,
    build_model,
)
from zeta_core.failures import OutOfMemory

STEPS = WARM_UP_STEPS + MEASURED_STEPS


@dataclass
class StepTimer:
    """The times at which optimizer steps were finished on the device."""

    ends: list[float] = field(default_factory=list[float])

    @contextmanager
    def running(self) -> Generator[None]:
        def end_step(*_: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        hook = register_optimizer_step_post_hook(end_step)
        try:
            yield
        finally:
            hook.remove()

    @property
    def is_done(self) -> bool:
        """Whether enough steps were measured."""
        num_measured = len(self.ends) - WARM_UP_STEPS
        is_slow = num_measured >= MIN_MEASURED_STEPS and self.ends[-1] - self.ends[0] >= MEASURING_SECONDS
        return num_measured >= MEASURED_STEPS or is_slow

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(np.diff(self.ends[WARM_UP_STEPS - 1 :]).tolist())


def train_zeta(workload: GpuWorkload, folder: Path, timer: StepTimer) -> str:
    """Train with this project. It stops before it would save, because the others don't save."""
    tokens = folder / "tokens.npy"
    ids = np.random.default_rng(0).integers(0, workload.shape["vocab_size"], 2 * STEPS * workload.tokens_per_step)
    np.save(tokens, ids.astype(np.uint32))
    options: dict[str, Any] = {"seq_len": workload.seq_len, "batch_size": workload.batch_size}
    options |= {"max_steps": 10 * STEPS, "use_activation_checkpointing": True, "dataset": tokens}
    if workload.lora:
        options["lora"] = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0}
    model = build_model(workload, _device(), attention="sdpa")
    with timer.running():
        common.train_zeta(model, folder / "zeta", stop=lambda: "cancel" if timer.is_done else None, **options)
    lines = map(json.loads, (folder / "zeta" / "events.jsonl").read_text().splitlines())
    return next(line["resolved_spec"]["attn_implementation"] for line in lines if line.get("resolved_spec"))


def train_bare(workload: GpuWorkload, folder: Path, timer: StepTimer) -> str:
    """Only the necessary calls, with torch's flash attention on a GPU."""
    del folder
    device = _device()
    model = build_model(workload, device, attention="sdpa")
    if workload.lora:
        model = _with_adapter(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=common.LEARNING_RATE, betas=common.BETAS, fused=True)
    ids = torch.randint(0, workload.shape["vocab_size"], (STEPS, workload.batch_size, workload.seq_len), device=device)
    kernel = SDPBackend.FLASH_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    with timer.running(), sdpa_kernel(kernel):
        for batch in ids:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, common.MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            if timer.is_done:
                break
    return "torch's flash attention" if device.type == "cuda" else "torch's attention without a fused kernel"


def train_trl(workload: GpuWorkload, folder: Path, timer: StepTimer) -> str:
    """Train with `trl.SFTTrainer` on the same sequences, already tokenized."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
            control.should_training_stop = timer.is_done or control.should_training_stop

    trl: Any = import_module("trl")  # only `make gpu` installs it
    rows = np.random.default_rng(0).integers(
        0, workload.shape["vocab_size"], (STEPS * workload.batch_size, workload.seq_len)
    )
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=workload.batch_size,
        max_steps=STEPS,
        max_length=workload.seq_len,
        bf16=True,
        gradient_checkpointing=True,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    adapter = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=build_model(workload, _device(), attention="sdpa"),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=_tokenizer(),
        peft_config=adapter if workload.lora else None,
        callbacks=[Stop()],
    )
    with timer.running():
        trainer.train()
    return "sdpa"


CONTESTANTS: dict[str, Callable[[GpuWorkload, Path, StepTimer], str]] = {
    "zeta": train_zeta,
    "bare loop": train_bare,
    "TRL": train_trl,
}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.enable_input_require_grads()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _tokenizer() -> Any:
    """TRL requires a tokenizer, although the rows are token ids. This one has bytes and works offline."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def measure(name: str, workload: GpuWorkload) -> Measurement:
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        try:
            attention = CONTESTANTS[name](workload, Path(folder), timer)
        except (torch.cuda.OutOfMemoryError, OutOfMemory):
            return Measurement(failure="out of memory")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Measurement(timer.seconds_per_step, peak, attention)


def main(name: str, title: str, out: str) -> None:
    [workload] = [each for each in (*WORKLOADS, *REHEARSAL) if each.title == title]
    Path(out).write_text(json.dumps(asdict(measure(name, workload))))


if __name__ == "__main__":
    main(*sys.argv[1:])

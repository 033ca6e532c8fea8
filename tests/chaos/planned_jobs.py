"""The jobs that the users of the fault suite submit: real and small runs, determined by the seed.

A real run is ``python -m zeta_core`` on a tiny model with dropout, as in production. Each kind is first run
without faults on the same fleet, for comparison. A small run is also a real process with a run directory, a
journal, checkpoints and a stop file, but without torch. It needs almost no CPU time, so many can run at once, and the
weights of its undisturbed run can be computed.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from random import Random
from typing import Any, Literal, get_args

from tests.worker.small_training import next_weights

Kind = Literal["small", "small, two nodes", "real", "real, uploaded text", "real, two ranks", "real, two nodes"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# The number of jobs of each kind in a hundred, and the shares of jobs that a user cancels or pauses.
SHARES: dict[Kind, int] = {
    "small": 58,
    "small, two nodes": 8,
    "real": 14,
    "real, uploaded text": 10,
    "real, two ranks": 5,
    "real, two nodes": 5,
}
CANCELLED_SHARE, PAUSED_SHARE = 0.06, 0.10
MANY_RETRIES = 30  # enough that random faults alone never exhaust them; a failed job then means a defect

TEXT = "\n\n".join(topics[name] for name in sorted(topics)[:12]).encode()
GPT2_WITH_DROPOUT: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 384,
    "n_positions": 128,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}


@dataclass(frozen=True)
class PlannedJob:
    """One job to submit, and the command that its user sends once it has reached ``after_step``."""

    key: str  # the Idempotency-Key
    kind: Kind
    spec: dict[str, Any]
    command: Literal["cancel", "pause"] | None = None
    after_step: int = 0

    @property
    def computed_weights(self) -> str | None:
        """The SHA-256 of the final weights of an undisturbed small run; ``None`` for a real one."""
        if not is_small(self.kind):
            return None
        weights = b""
        for step in range(1, int(self.spec["metadata"]["steps"]) + 1):
            weights = next_weights(weights, step)
        return hashlib.sha256(weights).hexdigest()


def is_small(kind: Kind) -> bool:
    return kind in ("small", "small, two nodes")


def plan_jobs(num_jobs: int, rng: Random, file_id: str, shares: Mapping[Kind, int] = SHARES) -> list[PlannedJob]:
    """``num_jobs`` jobs of all kinds, according to ``shares``, in random order."""
    kinds: list[Kind] = []
    for kind in KINDS:
        kinds.extend(itertools.repeat(kind, round(shares.get(kind, 0) * num_jobs / 100)))
    kinds.extend(itertools.repeat(KINDS[0], max(0, num_jobs - len(kinds))))
    rng.shuffle(kinds)
    return [_planned_job(f"job-{number}", kind, rng, file_id) for number, kind in enumerate(kinds, 1)]


def reference_jobs(planned: Sequence[PlannedJob], file_id: str) -> list[PlannedJob]:
    """The undisturbed run of each kind of real job among these."""
    kinds = {job.kind for job in planned}
    return [
        PlannedJob(f"reference-{kind}", kind, spec_of(kind, file_id) | {"max_retries": 0})
        for kind in KINDS
        if kind in kinds and not is_small(kind)
    ]


def spec_of(kind: Kind, file_id: str, *, steps: int = 60, seconds_per_step: float = 0.1) -> dict[str, Any]:
    several: dict[str, Any] = {}
    if kind.endswith(("two ranks", "two nodes")):
        several = {"resources": {"gpus": 0, "processes" if kind.endswith("ranks") else "nodes": 2}}
    if is_small(kind):
        metadata = {"steps": f"{steps}", "seconds_per_step": f"{seconds_per_step:.3f}", "checkpoint_every": "10"}
        return _spec(metadata={"training": "small", **metadata}, max_steps=steps, **several)
    dataset = {"file": file_id} if kind == "real, uploaded text" else {"builtin": "python-docs"}
    return _spec(dataset=dataset, max_steps=120, checkpointing_steps=15, metadata={"training": "real"}, **several)


def _planned_job(key: str, kind: Kind, rng: Random, file_id: str) -> PlannedJob:
    spec = spec_of(kind, file_id, steps=rng.randint(40, 120), seconds_per_step=rng.uniform(0.05, 0.15))
    draw = rng.random()
    command = "cancel" if draw < CANCELLED_SHARE else "pause" if draw < CANCELLED_SHARE + PAUSED_SHARE else None
    return PlannedJob(key, kind, spec, command, after_step=rng.randint(0, 40))


def _spec(**fields: Any) -> dict[str, Any]:
    return {
        "model": {"config": GPT2_WITH_DROPOUT},
        "dataset": {"builtin": "python-docs"},
        "seq_len": 64,
        "batch_size": 2,
        "gradient_accumulate_every": 2,
        "learning_rate": 0.003,
        "seed": 11,
        "max_retries": MANY_RETRIES,
        **fields,
    }

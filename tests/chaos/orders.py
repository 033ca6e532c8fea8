"""What the users of the fault suite order: real trainings and small ones, all from the seed.

A real training is ``python -m zeta_core`` on a tiny model with dropout, as in production; its undisturbed run is made
first, on the same fleet, once for each kind. A small one is a real process as well, which speaks the worker's language
(run directory, journal, checkpoints, stop file) without torch: it costs no CPU, so that many jobs can be under way at
once, and what its undisturbed run ends with is computed.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from random import Random
from typing import Any, Literal, get_args

from tests.worker.small_training import trained

Kind = Literal["small", "real", "real, uploaded text", "real, two ranks"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Of a hundred jobs: how many are of which kind, and of how many a user changes his mind.
SHARES: dict[Kind, int] = {"small": 66, "real": 16, "real, uploaded text": 12, "real, two ranks": 6}
CANCELLED_SHARE, PAUSED_SHARE = 0.06, 0.10
MANY_RETRIES = 30  # so that bad luck, which would be a true end too, does not hide a fault of ours

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
class Order:
    """One job that a user wants, and what else he will ask for once it has made ``after_step`` steps."""

    key: str  # the Idempotency-Key
    kind: Kind
    spec: dict[str, Any]
    command: Literal["cancel", "pause"] | None = None
    after_step: int = 0

    @property
    def computed_weights(self) -> str | None:
        """The sha256 of the weights that an undisturbed small training ends with; ``None`` for a real one."""
        if self.kind != "small":
            return None
        weights = b""
        for step in range(1, int(self.spec["metadata"]["steps"]) + 1):
            weights = trained(weights, step)
        return hashlib.sha256(weights).hexdigest()


def orders(num_jobs: int, dice: Random, file_id: str, shares: Mapping[Kind, int] = SHARES) -> list[Order]:
    """``num_jobs`` of all kinds in their shares, in an order of their own."""
    kinds: list[Kind] = []
    for kind in KINDS:
        kinds.extend(itertools.repeat(kind, round(shares.get(kind, 0) * num_jobs / 100)))
    kinds.extend(itertools.repeat(KINDS[0], max(0, num_jobs - len(kinds))))
    dice.shuffle(kinds)
    return [_order(f"order-{number}", kind, dice, file_id) for number, kind in enumerate(kinds, 1)]


def reference_orders(wanted: Sequence[Order], file_id: str) -> list[Order]:
    """The undisturbed run of each real kind among these."""
    ordered = {order.kind for order in wanted}
    return [
        Order(f"reference-{kind}", kind, spec_of(kind, file_id) | {"max_retries": 0})
        for kind in KINDS
        if kind in ordered and kind != "small"
    ]


def spec_of(kind: Kind, file_id: str, *, steps: int = 60, seconds_per_step: float = 0.1) -> dict[str, Any]:
    if kind == "small":
        metadata = {"steps": f"{steps}", "seconds_per_step": f"{seconds_per_step:.3f}", "checkpoint_every": "10"}
        return _spec(metadata={"training": "small", **metadata}, max_steps=steps)
    ranks: dict[str, Any] = {"resources": {"gpus": 0, "processes": 2}} if kind == "real, two ranks" else {}
    dataset = {"file": file_id} if kind == "real, uploaded text" else {"builtin": "python-docs"}
    return _spec(dataset=dataset, max_steps=120, checkpointing_steps=15, metadata={"training": "real"}, **ranks)


def _order(key: str, kind: Kind, dice: Random, file_id: str) -> Order:
    spec = spec_of(kind, file_id, steps=dice.randint(40, 120), seconds_per_step=dice.uniform(0.05, 0.15))
    luck = dice.random()
    command = "cancel" if luck < CANCELLED_SHARE else "pause" if luck < CANCELLED_SHARE + PAUSED_SHARE else None
    return Order(key, kind, spec, command, after_step=dice.randint(0, 40))


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

"""Calling a model for its loss: next-token cross-entropy, summed over the targets.

A model returns its loss or logits in one of four ways (`Convention`). `loss_probe` finds out which one before training,
and `isolation_probe` finds the arguments that keep packed documents apart. Logits take most of the memory of a small
model with a large vocabulary. So if the model can omit the logits of positions without a target, it does
(`supports_logit_positions`), and many logits are computed in chunks (`chunked_loss`) if the model's head can be
separated.

Shapes: B sequences, T tokens, K positions with logits, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from zeta_core.contract.job.status import StopAction
from zeta_core.data.sequences import IGNORED, MicroBatch, Sequences
from zeta_core.failures import InvalidModel
from zeta_core.objective.chunked_loss import HeadLoss, LossTargets, OutputHead, returning_losses
from zeta_core.objective.isolation import Isolation
from zeta_core.parallel.processes import Engine

STOP_CHECK_INTERVAL = 16  # micro-batches between checks for a stop request, in passes that may take long


class Convention(Enum):
    LOGITS = "logits"  # returns the (B, T, V) logits, or an object that contains them
    LABELS = "labels"  # returns the mean loss for labels that it shifts itself (Hugging Face)
    TARGETS = "targets"  # returns the mean loss for targets that are already shifted (nanoGPT)
    RETURN_LOSS = "return_loss"  # returns the mean loss over a whole sequence, which it shifts itself (Zeta's wrappers)


@dataclass(frozen=True)
class Metrics:
    """What a loss measures besides itself, as means; ``None`` if it does not measure it.

    ``token_accuracy`` is the share of the targets with the highest logit of their position. ``rewards`` are those of
    `preference.PreferenceLoss`.
    """

    token_accuracy: float | None = None
    rewards: dict[str, float] | None = None


@dataclass(frozen=True)
class LossFunction:
    """Calls a model on a batch. The model may have been wrapped since the convention was found."""

    convention: Convention
    ids_name: str | None  # the keyword of the ids; None: they are the first positional argument
    isolation: Isolation | None = None  # how packed documents are kept apart; None: they are not
    fixed: tuple[tuple[str, Any], ...] = ()
    auxiliary_weight: float = 0.0
    needs_mask: bool = False  # the forward requires a mask; if nothing is masked, it gets ones (B, T)
    looks_ahead: bool = False  # its output for a token depends on later tokens, which it must predict
    supports_logit_positions: bool = False  # can compute logits for the requested positions only (`logits_to_keep`)
    logits_at: int | None = None  # the index of the logits if the model returns several tensors
    head: OutputHead | None = None  # the part of the model that computes the logits, if it can be separated
    sums: list[torch.Tensor] = field(default_factory=list[torch.Tensor], compare=False)  # see `take_sums`

    is_likelihood: ClassVar[bool] = True  # its mean is the logarithm of the perplexity

    @property
    def isolates(self) -> bool:
        return self.isolation is not None

    def check_labels(self, name: str, *, needed: bool) -> None:
        """Raise `InvalidModel` if only some tokens are trained on and the model computes its loss without labels."""
        if needed and self.convention is Convention.RETURN_LOSS:
            raise InvalidModel(
                f"{name} returns a loss over all tokens, so it cannot be trained on the answers alone; let its forward "
                "return logits, or set train_on to 'all'."
            )

    def before_batch(
        self,
        engine: Engine,
        sequences: Sequences,
        window: NDArray[np.int64],
        micro_batch: int,
        agreed_stop: Callable[[], StopAction | None] = lambda: None,
    ) -> StopAction | None:
        """Prepare what the losses of a global batch share; nothing by default. All ranks must call this together.

        ``window`` contains the indices of its ``sequences``. A preparation that may take long calls ``agreed_stop``
        from time to time. If it returns a stop action, nothing is prepared, and the action is returned.
        """
        return None

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum of the targets' cross-entropies in nats, and the model's auxiliary loss or None.

        Only the sum is scaled by token counts. If a convention returns a mean, the mean is multiplied by the number of
        targets, by which the step divides. This includes `RETURN_LOSS`, whose mean also covers the first tokens of
        documents within a sequence. Filler rows without a target are not passed to the model.
        """
        if self.convention is Convention.LOGITS and self.uses_chunks(batch):
            result, rows_N = self.call_in_chunks(model, batch, each=False)
            num_targets = (shifted(batch.labels_BT).flatten()[rows_N] != IGNORED).sum()
            self.sums.append(torch.stack((result.num_correct, num_targets)))
            return result.loss, result.auxiliary
        if self.convention is Convention.LOGITS:
            output = self.call(model, batch)
            logits_BKV = self.logits_in(output)
            assert logits_BKV is not None
            auxiliary = getattr(output, "aux_loss", None) if self.auxiliary_weight else None
            targets_BK = self.targets(batch)
            self.sums.append(_correct_and_all(logits_BKV, targets_BK))
            total = cross_entropy_sum(logits_BKV, targets_BK)
            return total, None if auxiliary is None else auxiliary * self.auxiliary_weight
        num_targets = batch.num_targets
        labels_BT = batch.labels_BT if num_targets else batch.ids_BT  # a mean over no targets is NaN
        if self.convention is Convention.LABELS:
            mean = find_loss(self.call(model, batch, labels=labels_BT))
        elif self.convention is Convention.TARGETS:
            mean = find_loss(self.call(model, batch, targets=shifted(labels_BT)))
        else:
            has_target_B = (batch.labels_BT != IGNORED).any(1)
            shown = replace(batch, ids_BT=batch.ids_BT[has_target_B]) if num_targets else batch
            mean = find_loss(self.call(model, shown, return_loss=True))
        assert mean is not None
        return mean.float() * num_targets, None

    @property
    def separates_rows(self) -> bool:
        """Whether `row_losses` accepts several rows of different lengths, which are padded on the right."""
        return self.convention is Convention.LOGITS and not self.looks_ahead

    def row_losses(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The sum of the targets' cross-entropies in each row (B), and no auxiliary loss.

        A model that returns a mean, or whose output depends on later tokens, takes one row.
        """
        if not self.separates_rows:
            assert len(batch.ids_BT) == 1, "the rows of this model can't be separated"
            return self(model, batch)[0].reshape(1)
        losses_B, num_correct, _ = self.separate_rows(model, batch)
        num_targets = (batch.labels_BT[:, 1:] != IGNORED).sum()
        self.sums.append(torch.stack((num_correct, num_targets)))
        return losses_B

    def separate_rows(
        self, model: nn.Module, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The sum of the losses in each row (B), in float32, the number of correct targets, and the auxiliary loss.

        Correct targets have the highest logit. Their number is 0 while gradients are enabled.
        """
        if self.uses_chunks(batch):
            result, rows_N = self.call_in_chunks(model, batch, each=True)
            none_T = result.loss.new_zeros(batch.ids_BT.numel())
            losses_B = none_T.index_copy(0, rows_N, result.loss).view_as(batch.ids_BT).sum(1)
            return losses_B, result.num_correct, result.auxiliary
        output = self.call(model, batch)
        logits_BKV = self.logits_in(output)
        assert logits_BKV is not None
        auxiliary = getattr(output, "aux_loss", None) if self.auxiliary_weight else None
        auxiliary = None if auxiliary is None else auxiliary * self.auxiliary_weight
        targets_BK = self.targets(batch)
        losses = F.cross_entropy(
            logits_BKV.flatten(0, 1).float(), targets_BK.flatten(), ignore_index=IGNORED, reduction="none"
        )
        losses_B = losses.view(targets_BK.shape).sum(1)
        if torch.is_grad_enabled():
            return losses_B, torch.zeros((), dtype=torch.long, device=losses_B.device), auxiliary
        return losses_B, _correct_and_all(logits_BKV, targets_BK)[0], auxiliary

    def take_sums(self) -> torch.Tensor | None:
        """The sums of the metrics over the calls since the last time, for `metrics`; ``None`` if nothing was measured.

        Here, they are the number of correct predictions and the number of targets, of models that return their logits.
        """
        taken = torch.stack(self.sums).sum(0).double() if self.sums else None
        self.sums.clear()
        return taken

    def metrics(self, sums: Sequence[float] | None) -> Metrics:
        """The means, from the sums of `take_sums` over all ranks and steps."""
        if sums is None:
            return Metrics()
        num_correct, num_targets = sums
        return Metrics(token_accuracy=num_correct / num_targets if num_targets else None)

    def call(self, model: nn.Module, batch: MicroBatch, **more: Any) -> Any:
        values: dict[str, Any] = {**dict(self.fixed), **more}
        if self.needs_mask:
            values["attention_mask"] = torch.ones_like(batch.ids_BT)
        if self.isolation is not None and batch.segments_BT is not None:
            values |= self.isolation.arguments(batch)
        if self.supports_logit_positions and batch.logit_positions_K is not None:
            values["logits_to_keep"] = batch.logit_positions_K
        if self.ids_name is not None:
            return model(**{self.ids_name: batch.ids_BT}, **values)
        return model(batch.ids_BT, **values)

    def uses_chunks(self, batch: MicroBatch) -> bool:
        """Whether the logits of this batch are so many that they are computed in chunks."""
        num_rows, length = batch.ids_BT.shape
        if self.supports_logit_positions and batch.logit_positions_K is not None:
            length = len(batch.logit_positions_K)
        return self.head is not None and self.head.exceeds_a_chunk(num_rows * length)

    def call_in_chunks(self, model: nn.Module, batch: MicroBatch, *, each: bool) -> tuple[HeadLoss, torch.Tensor]:
        """The loss, and its rows: positions in the flattened (B x T) tokens.

        With ``each``, there is a loss for each row (N); otherwise their sum. `uses_chunks` must be true.
        """
        assert self.head is not None
        targets_X = shifted(batch.labels_BT).flatten()
        if targets_X.device.type == "cpu":
            rows_N = (targets_X != IGNORED).nonzero()[:, 0]
        else:  # finding them would wait for the device
            rows_N = torch.arange(len(targets_X), device=targets_X.device)
            if batch.logit_positions_K is not None:
                rows_N = rows_N.view_as(batch.ids_BT)[:, batch.logit_positions_K].flatten()
        rows_N = rows_N if len(rows_N) else rows_N.new_zeros(1)  # a filler row has no target, and its loss is 0
        targets = LossTargets(rows_N, targets_X[rows_N], each=each)
        with returning_losses(model, self.head):
            result: HeadLoss = self.call(model, replace(batch, logit_positions_K=None), loss_targets=targets)
        auxiliary = result.auxiliary if self.auxiliary_weight else None
        return result._replace(auxiliary=None if auxiliary is None else auxiliary * self.auxiliary_weight), rows_N

    def logits_in(self, output: Any) -> torch.Tensor | None:
        """The (B, K, V) logits in the result of a call, if there are any."""
        return find_logits(output if self.logits_at is None else output[self.logits_at])

    def targets(self, batch: MicroBatch) -> torch.Tensor:
        """The (B, K) targets of the logits that a call with this batch returns."""
        targets_BT = shifted(batch.labels_BT)
        return (
            targets_BT[:, batch.logit_positions_K]
            if self.supports_logit_positions and batch.logit_positions_K is not None
            else targets_BT
        )


def shifted(labels_BT: torch.Tensor) -> torch.Tensor:
    """The label of the next position for each position; the last position has none."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def cross_entropy_sum(logits_BKV: torch.Tensor, targets_BK: torch.Tensor) -> torch.Tensor:
    """The sum in float32, whatever the type of the logits. Shifting copies the labels and not the logits."""
    logits, targets = logits_BKV.flatten(0, 1).float(), targets_BK.flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def _correct_and_all(logits_BKV: torch.Tensor, targets_BK: torch.Tensor) -> torch.Tensor:
    """The number of targets with the highest logit (the first one, if several are equal), and of all targets."""
    is_correct_BK = logits_BKV.argmax(-1) == targets_BK  # never true for `IGNORED`, which is negative
    return torch.stack((is_correct_BK.sum(), (targets_BK != IGNORED).sum()))


def find_logits(output: Any) -> torch.Tensor | None:
    """The (B, T, V) logits in a model's output, if there are any."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = cast(Mapping[str, Any], output).get("logits")
    candidates: Iterable[Any] = (logits,)
    if logits is None:
        candidates = cast("Iterable[Any]", output) if isinstance(output, tuple | list) else (output,)
    for candidate in candidates:
        if isinstance(candidate, torch.Tensor) and candidate.dim() == 3 and candidate.is_floating_point():
            return candidate
    return None


def find_loss(output: Any) -> torch.Tensor | None:
    """The scalar loss in a model's output, if there is one."""
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = cast(Mapping[str, Any], output).get("loss")
    candidates: Iterable[Any] = (loss,)
    if loss is None:
        candidates = cast("Iterable[Any]", output) if isinstance(output, tuple | list) else (output,)
    for candidate in candidates:
        if isinstance(candidate, torch.Tensor) and candidate.numel() == 1 and candidate.is_floating_point():
            return candidate.reshape(())
    return None

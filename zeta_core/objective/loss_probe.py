"""Finding out how a model returns its loss or logits, by trying each `Convention` on a tiny input.

Nothing is derived from names. The same input shows whether the output for a token depends on later tokens, and whether
the model can omit the logits of some positions.

Shapes: B sequences, T tokens, K positions with logits, V entries of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from zeta_core.data.sequences import IGNORED, MicroBatch
from zeta_core.failures import InvalidModel, is_out_of_memory
from zeta_core.objective.chunked_loss import HeadLoss, LossTargets, OutputHead, find_output_head, returning_losses
from zeta_core.objective.isolation import Isolation
from zeta_core.objective.loss import Convention, LossFunction, find_loss, shifted


def find_loss_function(
    model: nn.Module,
    *,
    sample_ids: list[int],
    isolation: Isolation | None = None,
    largest_id: int = 0,
    vocab_size: int | None = None,
) -> LossFunction:
    """Find out how to call this model, which is not wrapped yet. ``sample_ids`` are four or more, not all equal.

    ``isolation`` was found by `isolation_probe.find_isolation`, perhaps on a smaller model; the result does not contain
    it if it does not keep documents apart in this model. Runs the model a few times without gradients, in evaluation
    mode, and restores its random states and buffers. Raises `InvalidModel`, also if there are no logits for some ids of
    the data, whose largest is ``largest_id``, and if several results could be the logits. ``vocab_size`` is the number
    of ids for which the model has an embedding, if known.
    """
    parameters = forward_parameters(model)
    hugging_face = hasattr(model, "config") and "input_ids" in parameters
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    auxiliary = 0.0
    if hugging_face and getattr(model.config, "output_router_logits", False):
        auxiliary = float(getattr(model.config, "router_aux_loss_coef", 0.0))
    ids = parameters.get("input_ids")
    ids_name = "input_ids" if hugging_face or (ids is not None and ids.kind is ids.KEYWORD_ONLY) else None
    mask = parameters.get("attention_mask")
    needs_mask = mask is not None and mask.default is mask.empty
    with undisturbed(model, device):
        probe = _LossProbe(model, sample_ids, device, largest_id, vocab_size)
        plain = LossFunction(Convention.LOGITS, ids_name, auxiliary_weight=auxiliary, needs_mask=needs_mask)
        loss_function = probe.convention(plain, _fixed(parameters) if hugging_face else [()], frozenset(parameters))
        probe.check_logits()
        some = probe.supports_logit_positions(loss_function, frozenset(parameters))
        loss_function = replace(
            loss_function,
            looks_ahead=probe.looks_ahead(loss_function),
            supports_logit_positions=some,
            head=probe.output_head(loss_function) if hugging_face else None,
        )
        isolated = replace(loss_function, isolation=isolation)
        return isolated if isolation is not None and probe.keeps_apart(isolated) else loss_function


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Generator[None]:
    """Use evaluation mode without gradients, and afterwards restore the mode, the buffers and the random states."""
    was_training = model.training
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in model.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
            for part, name, buffer, value in buffers:
                setattr(part, name, buffer.copy_(value))


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _fixed(parameters: Mapping[str, inspect.Parameter]) -> list[tuple[tuple[str, Any], ...]]:
    """The constant arguments for a Hugging Face model, in the order in which they are tried.

    With a cache, packed documents attend to one another. Some models (GraniteMoe) take ``use_cache`` in ``**kwargs``.
    """
    without_cache = (("use_cache", False),)
    if "use_cache" in parameters:
        return [without_cache]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [without_cache, ()] if takes_any else [()]


class _LossProbe:
    """A sequence of two segments on the model's device, and tests of the model's output for it."""

    def __init__(
        self,
        model: nn.Module,
        sample_ids: list[int],
        device: torch.device,
        largest_id: int,
        vocab_size: int | None,
    ) -> None:
        self.model = model
        self._largest_id, self._vocab_size = largest_id, vocab_size
        half = min(6, len(sample_ids) // 2)
        self.half = half
        self.ids_BT = torch.tensor([sample_ids[: 2 * half]], device=device)
        self._num_logits: int | None = None  # per token, if the model returns logits

    def check_logits(self) -> None:
        if self._num_logits is not None and self._largest_id >= self._num_logits:
            raise InvalidModel(
                f"The data contains token id {self._largest_id}, but {type(self.model).__name__} returns "
                f"{self._num_logits} logits for each token; it must return one for each id of the tokenizer."
            )

    def _logits_at(self, output: Any) -> int | None:
        """The index of the logits among several results: they have as many entries as there are ids.

        Hidden states have the shape (B, T, width), which differs from that of logits only in the last number. Raises
        `InvalidModel` if several results could be the logits.
        """
        if not isinstance(output, tuple | list) or hasattr(output, "logits"):
            return None
        sizes = {
            at: tensor.shape[-1]
            for at, tensor in enumerate(cast("Iterable[Any]", output))
            if isinstance(tensor, torch.Tensor)
            and tensor.is_floating_point()
            and tensor.shape[:-1] == self.ids_BT.shape
        }
        whole = [at for at, size in sizes.items() if size == self._vocab_size]
        likely = whole or [at for at, size in sizes.items() if size > self._largest_id] or list(sizes)[:1]
        if len(likely) > 1:
            shapes = " and ".join(f"(batch, tokens, {sizes[at]})" for at in likely)
            raise InvalidModel(
                f"{type(self.model).__name__} returns tensors of the shapes {shapes}, so it is unclear which are the "
                "logits; let its forward return only the logits, or an object with an attribute logits."
            )
        return likely[0] if likely else None

    def batch(self, ids_BT: torch.Tensor | None = None) -> MicroBatch:
        ids_BT = self.ids_BT if ids_BT is None else ids_BT
        at = torch.arange(2 * self.half, device=ids_BT.device)
        labels_BT = ids_BT.masked_fill((at % self.half == 0)[None], IGNORED)
        return MicroBatch(ids_BT, labels_BT, (at % self.half)[None], (at // self.half)[None], 2 * (self.half - 1))

    def convention(
        self, plain: LossFunction, fixed: list[tuple[tuple[str, Any], ...]], parameters: frozenset[str]
    ) -> LossFunction:
        """The first convention that works with the first possible fixed arguments. Raises `InvalidModel`."""
        for arguments in fixed[:-1]:
            try:
                return self._convention(replace(plain, fixed=arguments), parameters)
            except InvalidModel:
                continue
        return self._convention(replace(plain, fixed=fixed[-1]), parameters)

    def _convention(self, plain: LossFunction, parameters: frozenset[str]) -> LossFunction:
        problems: list[str] = []
        unclear: InvalidModel | None = None
        for convention in Convention:
            keyword = None if convention is Convention.LOGITS else convention.value
            if keyword is not None and keyword not in parameters:
                continue
            loss_function = replace(plain, convention=convention)
            try:
                if convention is Convention.LOGITS:
                    output = loss_function.call(self.model, self.batch())
                    loss_function = replace(loss_function, logits_at=self._logits_at(output))
                    logits = loss_function.logits_in(output)
                    found = logits is not None and logits.shape[:2] == self.ids_BT.shape
                    self._num_logits = logits.shape[-1] if logits is not None and found else None
                else:
                    found = find_loss(self._loss_output(loss_function)) is not None
            except InvalidModel as error:
                unclear = error  # unless the model returns its own loss
                continue
            except Exception as error:  # a forward with the wrong arguments may raise any exception
                if is_out_of_memory(error):
                    raise
                problems.append(f"{convention.value}: {type(error).__name__}: {error}")
                continue
            if found:
                return loss_function
        if unclear is not None:
            raise unclear
        tried = f" ({'; '.join(problems)[:600]})" if problems else ""
        raise InvalidModel(
            f"{type(self.model).__name__} returns neither logits of shape (batch, tokens, vocabulary) for token "
            f"ids nor a loss for labels=, targets= or return_loss=True; let its forward do one of these{tried}."
        )

    def _loss_output(self, loss_function: LossFunction) -> Any:
        batch = self.batch()
        match loss_function.convention:
            case Convention.LABELS:
                return loss_function.call(self.model, batch, labels=batch.labels_BT)
            case Convention.TARGETS:
                return loss_function.call(self.model, batch, targets=shifted(batch.labels_BT))
            case _:
                return loss_function.call(self.model, batch, return_loss=True)

    def looks_ahead(self, loss_function: LossFunction) -> bool:
        """Whether the last token changes the logits of earlier tokens. This can't be determined from a loss alone."""
        if loss_function.convention is not Convention.LOGITS:
            return False
        changed = self._changes(loss_function, self._logits(loss_function, self.ids_BT), at=2 * self.half - 1)
        return bool(changed[:-1].any())

    def supports_logit_positions(self, loss_function: LossFunction, parameters: frozenset[str]) -> bool:
        """Whether the model can compute logits for some positions only, with the same values."""
        if loss_function.convention is not Convention.LOGITS or "logits_to_keep" not in parameters:
            return False
        logit_positions_K = torch.tensor([1, self.half], device=self.ids_BT.device)
        try:
            output = replace(loss_function, supports_logit_positions=True).call(
                self.model, replace(self.batch(), logit_positions_K=logit_positions_K)
            )
        except Exception as error:  # older models only accept a number of last positions
            if is_out_of_memory(error):
                raise
            return False
        some_BKV, all_TV = loss_function.logits_in(output), self._logits(loss_function, self.ids_BT)
        if some_BKV is None or some_BKV.shape[1] != len(logit_positions_K):
            return False
        difference = (some_BKV[0].float() - all_TV[logit_positions_K]).abs().amax()
        return bool(difference <= max(1e-4, self._noise) * all_TV.abs().amax())

    def output_head(self, loss_function: LossFunction) -> OutputHead | None:
        """The part of the model that computes the logits, if it can be separated and gives the same loss."""
        if loss_function.convention is not Convention.LOGITS or loss_function.ids_name != "input_ids":
            return None
        values = {"input_ids": self.ids_BT, **dict(loss_function.fixed)}
        if loss_function.needs_mask:
            values["attention_mask"] = torch.ones_like(self.ids_BT)
        rows_T = torch.arange(2 * self.half, device=self.ids_BT.device)
        try:
            head = find_output_head(self.model, values)
            if head is None:
                return None
            with returning_losses(self.model, head):
                targets = LossTargets(rows_T, self.ids_BT[0], each=True)
                losses_T = cast("HeadLoss", self.model(**values, loss_targets=targets)).loss
            logits = loss_function.logits_in(self.model(**values))
        except Exception as error:  # a forward that does not call its backbone as expected may raise any exception
            if is_out_of_memory(error):
                raise
            return None
        if logits is None:
            return None
        whole_T = F.cross_entropy(logits[0].float(), self.ids_BT[0], reduction="none")
        same = (losses_T - whole_T).abs().amax() <= max(1e-4, self._noise) * whole_T.abs().amax()
        return head if bool(same) else None

    def keeps_apart(self, loss_function: LossFunction) -> bool:
        """Whether neither segment depends on the first or last token of the other."""
        half = self.half
        try:
            before = self._logits(loss_function, self.ids_BT)
            first = [self._changes(loss_function, before, at=at, noise=self._noise)[half:] for at in (half - 1, 0)]
            second = self._changes(loss_function, before, at=half, noise=self._noise)[:half]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
        return not any(changed.any() for changed in (*first, second))

    def _changes(
        self, loss_function: LossFunction, before_TV: torch.Tensor, *, at: int, noise: float = 1e-6
    ) -> torch.Tensor:
        """For each position, whether its logits change with the token at ``at``. ``noise`` is relative to them."""
        ids_BT = self.ids_BT.clone()
        others = self.ids_BT[self.ids_BT != ids_BT[0, at]]
        ids_BT[0, at] = others[0]
        after_TV = self._logits(loss_function, ids_BT)
        return (after_TV - before_TV).abs().amax(-1) > noise * before_TV.abs().amax().clamp(min=1e-3)

    @property
    def _noise(self) -> float:
        """Relative differences from rounding: the experts of an MoE compute on other shapes when a token changes."""
        precisions = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return max((4 * torch.finfo(dtype).eps for dtype in precisions if dtype is not torch.float32), default=4e-6)

    def _logits(self, loss_function: LossFunction, ids_BT: torch.Tensor) -> torch.Tensor:
        logits = loss_function.logits_in(loss_function.call(self.model, self.batch(ids_BT)))
        assert logits is not None
        return logits[0].float()

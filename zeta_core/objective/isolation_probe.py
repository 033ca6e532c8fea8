"""Finding a way to keep the documents of a packed sequence apart in a model, if there is one.

A way of isolating documents (`Isolation`) is accepted if, in a sequence of two documents,

- no output for one document changes with the first or the last token of the other (state-space layers and short
  convolutions leak mostly from the last tokens), and
- the first document has the same output as alone, so attention windows and chunks have kept their effect.

A way under which the second document also has the same output as alone is preferred. Otherwise, its learned positions
depend on its offset in the sequence. One document is longer than every window that the config names.

A small module is probed as a float32 copy on the CPU. A larger Hugging Face model, or one without storage, is
represented by a small model of its class with short windows (`small_model`). Any other large module is probed itself,
with `SHORT` tokens. In copies, parameters that are zero become random, because a projection that starts at zero would
hide leaks in the layers before it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import nn

from zeta_core.data.sequences import MicroBatch
from zeta_core.failures import InvalidModel, is_out_of_memory
from zeta_core.objective.attention import attention_implementation
from zeta_core.objective.isolation import Isolation, attention_spans
from zeta_core.objective.loss import Convention, LossFunction
from zeta_core.objective.loss_probe import find_loss_function, forward_parameters, undisturbed
from zeta_core.objective.small_model import MAX_VALUES, SMALL_VOCABULARY, SMALL_WINDOW, attention_windows, small_model

DOCUMENT = 24  # tokens of a probed document: more than any short convolution looks back
LONGEST = 256  # tokens of a probed sequence; models with longer windows are represented by a small model
SHORT = 12  # tokens of a probed sequence of a large module
LEAK = 4e-6  # of the largest logit; rounding causes up to 3e-7 (in an MoE, when the experts get other tokens)
DIFFERENCE = 1e-4  # of the largest logit, between a document packed and alone; rounding causes up to 1e-5


@dataclass(frozen=True)
class IsolationFinding:
    """How to isolate documents. If that is impossible, ``problem`` completes "The model ..."; both None: unknown.

    If ``learns_padding`` is true, the model computes a loss over all tokens, so it is also trained on the padding of
    sequences that contain one document each.
    """

    isolation: Isolation | None
    problem: str | None = None
    learns_padding: bool = False

    @property
    def isolates(self) -> bool | None:
        return self.isolation is not None if self.isolation is not None or self.problem is not None else None


def find_isolation(
    model: nn.Module, *, sample_ids: list[int], largest_id: int = 0, vocab_size: int | None = None
) -> IsolationFinding:
    """Find out how ``model`` keeps documents apart. It may have no storage or be memory-mapped, and is not changed.

    ``sample_ids``, ``largest_id`` and ``vocab_size`` are as in `find_loss_function`.
    """
    for subject in _subjects(model, _Tokens(sample_ids, largest_id, vocab_size)):
        with undisturbed(subject.model, subject.device):
            try:
                probe = _build_probe(subject)
            except Exception as error:  # a copy may need a GPU, and the sizes of a small model may not fit together
                if is_out_of_memory(error):
                    raise
                continue
            if probe.loss_function.convention is not Convention.LOGITS:
                learns_padding = probe.loss_function.convention is Convention.RETURN_LOSS
                return IsolationFinding(None, probe.problem(is_verified=False), learns_padding)
            finding = probe.find()
            if finding.isolation is None or not finding.isolation.spans:
                return finding
            # A small model has shorter windows than the model that it represents.
            return IsolationFinding(replace(finding.isolation, spans=attention_spans(getattr(model, "config", None))))
    return IsolationFinding(None)


def supports_documents(
    model: nn.Module, *, sample_ids: list[int], largest_id: int = 0, vocab_size: int | None = None
) -> bool:
    """Whether attention within documents (`attention`) gives the model's own output, and positions isolate them.

    The arguments are those of `find_isolation`.
    """
    for subject in _subjects(model, _Tokens(sample_ids, largest_id, vocab_size)):
        with undisturbed(subject.model, subject.device):
            try:
                probe = _build_probe(subject)
                if probe.loss_function.convention is not Convention.LOGITS:
                    return False
                isolated = replace(probe.loss_function, isolation=Isolation(positions=True))
                before_TV = probe.alone(probe.ids_BT)
                with attention_implementation(subject.model, "varlen"):
                    difference = (probe.alone(probe.ids_BT) - before_TV).abs().amax()
                    return bool(difference <= DIFFERENCE * before_TV.abs().amax()) and all(
                        probe.keeps_apart(isolated, edge) and all(probe.is_as_alone(isolated, edge))
                        for edge in probe.edges
                    )
            except Exception as error:  # a model that is built in another way may raise any exception
                if is_out_of_memory(error):
                    raise
    return False


# --- Subjects of the probe --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    sample_ids: list[int]
    largest_id: int
    vocab_size: int | None


@dataclass(frozen=True)
class _Subject:
    """A model to probe with at most ``length`` tokens."""

    model: nn.Module
    tokens: _Tokens
    length: int
    is_copy: bool = True

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def longest_window(self) -> int:
        return max(attention_windows(getattr(self.model, "config", None)).values(), default=0)


def _subjects(model: nn.Module, tokens: _Tokens) -> Iterator[_Subject]:
    """The models that can represent ``model``, the best one first; none if it has no storage and can't be shrunk."""
    has_storage = not any(parameter.is_meta for parameter in model.parameters())
    itself = _Subject(model, tokens, SHORT, is_copy=False)
    length = itself.longest_window + 2 * DOCUMENT
    is_small = sum(parameter.numel() for parameter in model.parameters()) <= MAX_VALUES
    if has_storage and is_small and length <= LONGEST and (own := _copied(model)) is not None:
        yield _Subject(own, tokens, length)
    if (small := small_model(model)) is not None:
        few = _Tokens(list(range(3, SMALL_VOCABULARY)), SMALL_VOCABULARY - 1, SMALL_VOCABULARY)
        yield _Subject(_with_random_zeros(small), few, SMALL_WINDOW + 2 * DOCUMENT)
    if has_storage:
        yield itself


def _copied(model: nn.Module) -> nn.Module | None:
    try:
        return _with_random_zeros(copy.deepcopy(model).to("cpu", torch.float32))
    except Exception as error:  # a module may contain objects that can't be copied
        if is_out_of_memory(error):
            raise
        return None


def _with_random_zeros(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    return model


# --- The probe --------------------------------------------------------------------------------------------------------


def _build_probe(subject: _Subject) -> _IsolationProbe:
    """The probe with the longest sequence that the model can process. Raises if even a short one fails."""
    length, tokens = subject.length, subject.tokens
    while True:
        ids = list(islice(cycle(tokens.sample_ids), length))
        try:
            loss_function = find_loss_function(
                subject.model,
                sample_ids=ids[:SHORT],
                largest_id=tokens.largest_id,
                vocab_size=tokens.vocab_size,
            )
            probe = _IsolationProbe(
                subject,
                replace(loss_function, supports_logit_positions=False),
                torch.tensor([ids], device=subject.device),
            )
            if loss_function.convention is Convention.LOGITS:
                probe.alone(probe.ids_BT)
            return probe
        except InvalidModel:
            raise
        except Exception:
            length //= 2
            if length < SHORT:
                raise


@dataclass(frozen=True)
class _IsolationProbe:
    subject: _Subject
    loss_function: LossFunction
    ids_BT: torch.Tensor

    @property
    def edges(self) -> list[int]:
        """The positions at which the second document begins in the tests: one document is as long as possible."""
        length = self.ids_BT.shape[1]
        short = min(DOCUMENT, length // 2)
        return sorted({short, length - short})

    def find(self) -> IsolationFinding:
        """The first way that passes every test; otherwise, the first one under which only learned positions differ."""
        second_best: Isolation | None = None
        is_changed = False
        for isolation in self._candidates():
            isolated = replace(self.loss_function, isolation=isolation)
            try:
                if not all(self.keeps_apart(isolated, edge) for edge in self.edges):
                    continue
                if self._window_is_untested(isolation) or not all(self.is_as_alone(isolated, e)[0] for e in self.edges):
                    is_changed = True
                elif all(self.is_as_alone(isolated, edge)[1] for edge in self.edges):
                    return IsolationFinding(isolation)
                else:
                    second_best = second_best or isolation
            except Exception as error:  # the model may use an argument of that name differently
                if is_out_of_memory(error):
                    raise
        if second_best is not None:
            return IsolationFinding(second_best)
        return IsolationFinding(None, self.problem(is_changed=is_changed))

    def _candidates(self) -> Iterator[Isolation]:
        """The ways to try. Positions alone come first: the model then builds its own masks, and needs no dense one."""
        accepted = forward_parameters(self.subject.model)
        positions = [True, False] if "position_ids" in accepted else [False]
        if True in positions:
            yield Isolation(positions=True)
        if "attention_mask" in accepted:
            for spans in dict.fromkeys((attention_spans(getattr(self.subject.model, "config", None)), ())):
                for with_positions in positions:
                    yield Isolation(with_positions, "boolean", spans)
                    yield Isolation(with_positions, "additive", spans)
        yield Isolation()  # a model that processes each token separately needs nothing

    def problem(self, *, is_verified: bool = True, is_changed: bool = False) -> str:
        accepted = forward_parameters(self.subject.model)
        if "attention_mask" not in accepted and "position_ids" not in accepted:
            reason = "its forward accepts neither attention_mask nor position_ids"
        elif not is_verified:
            return "may not keep packed documents apart: its forward returns no logits, so this cannot be tested"
        elif is_changed:
            reason = "every mask that separates documents also changes its output within a document"
        else:
            reason = "none of the attention masks and positions that were tried separates them"
        return f"can't keep packed documents apart: {reason}"

    def _window_is_untested(self, isolation: Isolation) -> bool:
        """Whether a mask would replace a window that is longer than the probed documents."""
        return isolation.mask is not None and self.subject.longest_window >= max(self.edges)

    def keeps_apart(self, isolated: LossFunction, edge: int) -> bool:
        before_TV = self._packed(isolated, edge, self.ids_BT)
        noise = LEAK * before_TV.abs().amax().clamp(min=1e-3)

        def changes(at: int) -> torch.Tensor:
            after_TV = self._packed(isolated, edge, self._with_another_token(at))
            return (after_TV - before_TV).abs().amax(-1) > noise

        if changes(edge - 1)[edge:].any() or changes(0)[edge:].any():
            return False
        second = changes(edge)
        responds = self.subject.is_copy or bool(second[-1])  # otherwise, an unchanged output proves nothing
        return responds and not bool(second[:edge].any())

    def is_as_alone(self, isolated: LossFunction, edge: int) -> tuple[bool, bool]:
        """For each document, whether its output is that of the document alone."""
        packed_TV = self._packed(isolated, edge, self.ids_BT)
        alone_TV = torch.cat((self.alone(self.ids_BT[:, :edge]), self.alone(self.ids_BT[:, edge:])))
        precisions = {p.dtype for p in self.subject.model.parameters() if p.is_floating_point()}
        relative = max(DIFFERENCE, *(8 * torch.finfo(dtype).eps for dtype in precisions))
        same_T = (packed_TV - alone_TV).abs().amax(-1) <= relative * alone_TV.abs().amax().clamp(min=1e-3)
        return bool(same_T[:edge].all()), bool(same_T[edge:].all())

    def _with_another_token(self, at: int) -> torch.Tensor:
        ids_BT = self.ids_BT.clone()
        ids_BT[0, at] = ids_BT[ids_BT != ids_BT[0, at]][0]
        return ids_BT

    def alone(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The (T, V) logits of a sequence that is one document."""
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        return self._logits(self.loss_function, MicroBatch(ids_BT, ids_BT, positions_BT, None, 0))

    def _packed(self, isolated: LossFunction, edge: int, ids_BT: torch.Tensor) -> torch.Tensor:
        """The (T, V) logits of a sequence whose second document begins at ``edge``."""
        at = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        second = at >= edge
        return self._logits(
            isolated, MicroBatch(ids_BT, ids_BT, torch.where(second, at - edge, at)[None], second.long()[None], 0)
        )

    def _logits(self, loss_function: LossFunction, batch: MicroBatch) -> torch.Tensor:
        logits = loss_function.logits_in(loss_function.call(self.subject.model, batch))
        if logits is None or logits.shape[1] != batch.ids_BT.shape[1]:
            raise ValueError("the model returned no logits for every token")
        return logits[0].float()

"""``certificate.json``: how closely an export answers like its checkpoint, and whether it is accepted."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.spec.export_spec import ExportFormat, WeightType
from zeta_core.export.answers import ExportAnswers
from zeta_core.export.failures import ExportRejected
from zeta_core.export.prompts import PromptSource
from zeta_core.export.reference import Reference

CERTIFICATE_FILE = "certificate.json"
MIN_AGREEMENT = 0.8  # of the tokens; ties between nearly equal tokens are broken differently after rounding
MAX_KL_DIVERGENCE = {"f16": 0.05, "bf16": 0.1, "q8_0": 0.2, None: 0.05}  # nats per token, by the type of the weights
# An adapter that changes less than this can't be told from rounding; in nats per token, too.
MIN_ADAPTER_DIVERGENCE = {"f16": 0.005, "bf16": 0.02, "q8_0": 0.05, None: 0.005}


class Certificate(BaseModel):
    """The comparison of an export with its checkpoint, over the checkpoint's greedy answers to ``prompts``.

    The prompts are the beginnings of the job's held-out documents: of its ``eval_dataset``, or of those that its
    ``eval_split`` holds out. ``prompts`` then contains their locations, and not their texts, because an export is often
    published. If ``prompt_source`` is ``fixed``, it contains the prompts, and ``prompt_reason`` is why the job's own
    documents were not used.
    ``token_agreement`` is the share of tokens that both consider the most probable. ``kl_divergence`` is the mean over
    the tokens of KL(checkpoint || export) in nats. If the checkpoint is an adapter, ``base_kl_divergence`` is the same
    for the base model without the adapter, and an export that lost its adapter would have this divergence. ``stops`` is
    whether the export ends its answers where the checkpoint does, or null if none of the checkpoint's answers ended.
    """

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    checkpoint_sha256: str  # of its manifest
    to: ExportFormat
    type: WeightType | None
    prompt_source: PromptSource
    prompt_reason: str | None
    prompts: tuple[str, ...]
    num_tokens: int
    token_agreement: float
    kl_divergence: float
    base_kl_divergence: float | None
    same_template: bool
    same_prompt_tokens: bool
    end_tokens: list[int]
    stops: bool | None


def certify(
    reference: Reference,
    answers: ExportAnswers,
    *,
    checkpoint: str,
    checkpoint_sha256: str,
    to: ExportFormat,
    weight_type: WeightType | None,
) -> Certificate:
    """The certificate of an accepted export. Raises `ExportRejected`."""
    base = None if answers.base_kl_divergences is None else _mean(answers.base_kl_divergences)
    certificate = Certificate(
        checkpoint=checkpoint,
        checkpoint_sha256=checkpoint_sha256,
        to=to,
        type=weight_type,
        prompt_source=reference.prompts.source,
        prompt_reason=reference.prompts.reason,
        prompts=reference.prompts.names,
        num_tokens=len(answers.agreeing),
        token_agreement=round(_mean(answers.agreeing), 4),
        kl_divergence=round(_mean(answers.kl_divergences), 6),
        base_kl_divergence=None if base is None else round(base, 6),
        same_template=answers.template == reference.template,
        same_prompt_tokens=answers.same_prompt_tokens,
        end_tokens=sorted(reference.ends),
        stops=answers.stops,
    )
    _check(certificate, has_end_token=answers.has_end_token)
    return certificate


def _check(certificate: Certificate, *, has_end_token: bool) -> None:
    kl, base = certificate.kl_divergence, certificate.base_kl_divergence
    if base is not None and base >= MIN_ADAPTER_DIVERGENCE[certificate.type] and kl > base / 2:
        raise ExportRejected(
            f"The export lost the adapter: its answers differ from the checkpoint's (KL divergence {kl:.4f} nats per "
            f"token) about as much as those of the base model ({base:.4f}).",
            code="adapter_lost",
        )
    if not has_end_token or certificate.stops is False:
        raise ExportRejected(
            "The export never stops: it does not end its answers at the end tokens of the checkpoint "
            f"({', '.join(map(str, certificate.end_tokens)) or 'none'}).",
            code="never_stops",
        )
    if not certificate.same_template:
        raise ExportRejected("The export has another chat template than the checkpoint.", code="template_differs")
    if not certificate.same_prompt_tokens:
        raise ExportRejected(
            "The export splits the prompts into other tokens than the checkpoint.", code="tokens_differ"
        )
    limit = MAX_KL_DIVERGENCE[certificate.type]
    if certificate.token_agreement < MIN_AGREEMENT or kl > limit:
        raise ExportRejected(
            f"The export answers differently: it agrees with the checkpoint on {certificate.token_agreement:.1%} of "
            f"{certificate.num_tokens} tokens (at least {MIN_AGREEMENT:.0%} are required), with a KL divergence of "
            f"{kl:.4f} nats per token (at most {limit}).",
            code="answers_differ",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))

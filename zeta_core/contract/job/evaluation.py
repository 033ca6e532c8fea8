"""The result of an evaluation: how well a checkpoint, and its base, predict the documents of a file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.job.comparison import Comparison

RESULT_FILE = "evaluation.json"  # in the checkpoint `final` of an evaluation: an `EvaluationResult`
DOCUMENTS_FILE = "documents.jsonl"  # ... and a `DocumentResult` per line


class _Result(BaseModel):
    """Frozen. Unknown fields of another version are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ModelScores(_Result):
    """How well one model predicts the documents.

    ``loss`` is the mean over the predicted tokens in nats, and ``perplexity`` is e to the power of it.
    ``token_accuracy`` is the share of these tokens to which the model gives the highest probability, from 0 to 1; it is
    null if the model returns no logits.
    """

    loss: float
    perplexity: float
    token_accuracy: float | None = None


class EvaluationResult(_Result):
    """The scores on ``num_documents`` documents, over ``num_tokens`` predicted tokens: those that training trains on.

    ``base`` and ``comparison`` are null unless the base model was evaluated, too. In the comparison, A is the
    checkpoint and B its base. It is null as well if there are too few documents to tell a difference from noise.
    """

    num_documents: int
    num_tokens: int
    checkpoint: ModelScores
    base: ModelScores | None = None
    comparison: Comparison | None = None


class DocumentResult(_Result):
    """One document: where it comes from, the number of its predicted tokens, and the mean losses per token in nats."""

    location: str
    num_tokens: int
    loss: float
    base_loss: float | None = None

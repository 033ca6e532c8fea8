"""The body of ``POST /openai/v1/fine_tuning/jobs``, with OpenAI's fields and one of this service: ``trainer``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from zeta_core.contract.errors import ErrorDetail, InvalidRequest
from zeta_core.contract.spec.job_spec import Metadata
from zeta_core.contract.spec.validation import ModelWithRules, StrictModel, invalid_value

MAX_SUFFIX = 64  # characters
AUTO = "auto"
Auto = Literal["auto"]
_REINFORCEMENT = (
    "method.type is 'reinforcement', which needs graders and is not supported; use 'supervised' or 'dpo', which train "
    "on your examples directly."
)


class SupervisedHyperparameters(StrictModel):
    """``None`` and ``auto`` both stand for the default."""

    batch_size: Auto | Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class DpoHyperparameters(SupervisedHyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class SupervisedMethod(StrictModel):
    hyperparameters: SupervisedHyperparameters | None = None


class DpoMethod(StrictModel):
    hyperparameters: DpoHyperparameters | None = None


class Method(StrictModel):
    type: Literal["supervised", "dpo"]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None


class WandbIntegration(StrictModel):
    project: str = Field(min_length=1, max_length=200)
    entity: str | None = Field(default=None, max_length=200)
    name: str | None = Field(default=None, max_length=200)
    tags: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default=[], max_length=100)


class Integration(StrictModel):
    type: Literal["wandb"]
    wandb: WandbIntegration


class FineTuningRequest(ModelWithRules, StrictModel):
    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    method: Method | None = None
    integrations: list[Integration] | None = Field(default=None, max_length=1)
    metadata: Metadata | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    suffix: str | None = Field(default=None, min_length=1, max_length=MAX_SUFFIX)
    trainer: dict[str, JsonValue] = Field(default={}, description="fields of a job spec")

    @property
    def chosen_hyperparameters(self) -> SupervisedHyperparameters:
        """Those of the method, or the deprecated ones beside it."""
        method = None if self.method is None else self.method.dpo if self.method.type == "dpo" else None
        if self.method is not None and self.method.type == "supervised":
            method = self.method.supervised
        given = None if method is None else method.hyperparameters
        return given or self.hyperparameters or SupervisedHyperparameters()

    @property
    def wandb(self) -> WandbIntegration | None:
        return self.integrations[0].wandb if self.integrations else None

    def faults(self) -> list[ErrorDetail]:
        return list(self._faults())

    def _faults(self) -> Iterator[ErrorDetail]:
        method = self.method
        if method is None:
            return
        other = "dpo" if method.type == "supervised" else "supervised"
        if getattr(method, other) is not None:
            yield invalid_value(f"method.{other}", {"…": "…"}, f"method.type is {method.type!r}; remove method.{other}")
        own: SupervisedMethod | DpoMethod | None = getattr(method, method.type)
        if self.hyperparameters is not None and own is not None and own.hyperparameters is not None:
            yield ErrorDetail(
                param="hyperparameters",
                message=f"hyperparameters and method.{method.type}.hyperparameters are both given; keep the latter, "
                "because the former is deprecated.",
                code="invalid_value",
            )


def reject_reinforcement(body: Any) -> None:
    """Raise `InvalidRequest` with the reason for a method that is not supported."""
    method: Any = body.get("method") if isinstance(body, dict) else None
    if isinstance(method, dict) and method.get("type") == "reinforcement":
        raise InvalidRequest(_REINFORCEMENT, code="unsupported_method", param="method.type")

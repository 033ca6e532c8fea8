"""The spec of a batch job: the requests in a file, and the model that answers them."""

from __future__ import annotations

from pydantic import Field

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.openai.batch_files import BatchEndpoint
from zeta_core.contract.spec.job_spec import Metadata
from zeta_core.contract.spec.options import Quantization
from zeta_core.contract.spec.resources import Resources, one_process_faults
from zeta_core.contract.spec.sources import ModelSource
from zeta_core.contract.spec.validation import ModelWithRules, StrictModel


class BatchInput(StrictModel):
    """An uploaded file with purpose ``batch``."""

    file: str


class BatchSpec(StrictModel, ModelWithRules):
    """The server creates it from a request for a batch, whose requests it has checked.

    ``model_name`` is the name in the requests. ``fingerprint`` identifies the weights, as in `ServedWeights`.
    """

    model: ModelSource
    model_name: str
    fingerprint: str
    has_manifest: bool
    quantize: Quantization | None = None
    endpoint: BatchEndpoint
    input: BatchInput
    num_requests: int = Field(ge=1)
    entity_name: str | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    max_retries: int = Field(default=3, ge=0, le=100)
    resources: Resources = Resources()
    metadata: Metadata = Field(default={})

    def faults(self) -> list[ErrorDetail]:
        return list(one_process_faults(self.resources))

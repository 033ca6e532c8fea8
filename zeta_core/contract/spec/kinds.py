"""The spec of every kind of job: the models that validate them, and their resolved specs."""

from __future__ import annotations

from collections.abc import Mapping

from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.batch_spec import BatchSpec
from zeta_core.contract.spec.evaluation_spec import EvaluationSpec
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

AnySpec = JobSpec | ExportSpec | BatchSpec | EvaluationSpec

SPEC_MODELS: Mapping[JobKind, type[AnySpec]] = {
    JobKind.TRAINING: JobSpec,
    JobKind.EXPORT: ExportSpec,
    JobKind.BATCH: BatchSpec,
    JobKind.EVALUATION: EvaluationSpec,
}

_OF_EVERY_JOB = ("entity_name", "priority", "max_retries", "metadata")
# The fields that a rerun may change; the server derives and checks the others. A rerun of a training may change all.
CHANGED_BY_RERUNS: Mapping[JobKind, tuple[str, ...]] = {
    JobKind.EXPORT: ("to", "type", *_OF_EVERY_JOB),
    JobKind.BATCH: ("resources", *_OF_EVERY_JOB),
    JobKind.EVALUATION: ("dataset", "resources", *_OF_EVERY_JOB),
}


def resolve(spec: AnySpec) -> ResolvedSpec:
    """The spec with every default that follows from it alone."""
    if isinstance(spec, JobSpec):
        return defaults.resolve(spec)
    decided = spec.model_dump(mode="json")
    if isinstance(spec, ExportSpec):
        decided["type"] = spec.weight_type
    return ResolvedSpec.model_validate(decided)

"""The held-out data of a job, from which the prompts for comparing an export with its checkpoint are taken."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.options import Method
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.sources import Dataset, FileSource, dataset_sources


class HeldOutData(BaseModel):
    """How to read the held-out documents of a job again.

    They are all documents of ``dataset``, or those that ``eval_split`` holds out of it with this seed.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    dataset: Dataset
    eval_split: float | None = None
    seed: int = 0
    group_by: str | None = None
    method: Method = "sft"
    train_on: Literal["assistant", "completion", "all"] | None = None
    use_pretokenized: bool = False
    template_date: date | None = None

    @property
    def file_ids(self) -> set[str]:
        """The uploaded files of the dataset."""
        sources = dataset_sources(self.dataset)
        return {file_id for source in sources if isinstance(source, FileSource) for file_id in source.file_ids}


def held_out_data(spec: JobSpec, resolved: ResolvedSpec) -> HeldOutData | None:
    """The held-out data of a job with this spec; ``None`` if nothing is held out.

    The data itself is always that of the spec, because a run reports the resolved spec, and could name other data.
    """
    eval_split = resolved.value("eval_split")
    dataset = spec.eval_dataset if spec.eval_dataset is not None else spec.dataset if eval_split else None
    if dataset is None:
        return None
    try:
        return HeldOutData(
            dataset=dataset,
            eval_split=None if spec.eval_dataset is not None else eval_split,
            seed=resolved.seed or 0,
            group_by=resolved.value("group_by"),
            method=spec.method,
            train_on=spec.train_on,
            use_pretokenized=spec.use_pretokenized,
            template_date=resolved.value("template_date"),
        )
    except ValidationError:  # the run has reported something else
        return None

"""The plan of a run: its settings, decided once at the first start and kept by later attempts."""

from zeta_core.plan.batch_split import fits_on_cpu
from zeta_core.plan.continuation import FIXED_PLAN_FIELDS
from zeta_core.plan.decision import decide_plan, resolve_seed, with_length
from zeta_core.plan.plan import Plan, PlanInputs, SequenceStats

__all__ = [
    "FIXED_PLAN_FIELDS",
    "Plan",
    "PlanInputs",
    "SequenceStats",
    "decide_plan",
    "fits_on_cpu",
    "resolve_seed",
    "with_length",
]

"""A run from its options to its outcome: `execution` shows the steps in order; the other modules implement them."""

from zeta_core.run.execution import execute as execute
from zeta_core.run.request import Outcome as Outcome
from zeta_core.run.request import RunRequest as RunRequest

"""A run from its options to its outcome: `execution` is the page that gives the order, beside it are its steps."""

from zeta_core.run.asked import Outcome as Outcome
from zeta_core.run.asked import Run as Run
from zeta_core.run.execution import execute as execute

"""The report of a run: a Markdown table of faults and recoveries, and a summary."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from tests.chaos.fault_injector import InjectedFault
from tests.chaos.faults import FAULTS
from tests.chaos.promises import Evidence
from zeta_core.contract.job.status import JobStatus

HEAD = (
    "| fault | times | jobs affected | new attempts | these jobs ended | recovery: median, longest |\n"
    "|---|---|---|---|---|---|"
)


def table(injected: Sequence[InjectedFault], evidence: Evidence) -> str:
    """One row for each fault.

    An affected job has recovered when a new step is stored (in a new attempt, if the fault ended the previous one). The
    time counts from the end of the fault, including any further fault in between.
    """
    lines = [HEAD]
    for fault in FAULTS:
        mine = [injection for injection in injected if injection.fault is fault]
        impact = [job_id for injection in mine for job_id in injection.impact.jobs]
        ends = Counter(evidence.jobs[job_id].status for job_id in set(impact))
        recoveries = [seconds for injection in mine for seconds in injection.recovered.values()]
        cells = [
            fault.name,
            str(len(mine)),
            str(len(set(impact))),
            str(sum(len(injection.attempts_lost) for injection in mine)),
            ", ".join(f"{count} {status}" for status, count in sorted(ends.items())) or "–",
            f"{median(recoveries):.1f} s, {max(recoveries):.1f} s" if recoveries else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(injected: Sequence[InjectedFault], evidence: Evidence) -> str:
    """The numbers of jobs, attempts, faults and commands, and how the jobs ended."""
    kinds = Counter(planned.kind for _, planned in evidence.accepted())
    ends = Counter(JobStatus(job.status).value for job, _ in evidence.accepted())
    attempts = sum(len(evidence.attempts[job.id]) for job, _ in evidence.accepted())
    commands = Counter(command for given in evidence.users.accepted_commands.values() for command in given)
    return (
        f"{sum(kinds.values())} jobs ({_listed(kinds)}), {attempts} attempts, {len(injected)} faults, commands: "
        f"{_listed(commands) or 'none'}; ended: {_listed(ends)}."
    )


def _listed(counts: Counter[str]) -> str:
    return "; ".join(f"{count} {name}" for name, count in sorted(counts.items()))

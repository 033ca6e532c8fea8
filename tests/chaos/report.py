"""The table of faults and outcomes, as Markdown, and the verdict on the promises."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from tests.chaos.faults import FAULTS
from tests.chaos.promises import Evidence
from tests.chaos.storm import Struck
from zeta_core.contract.job.status import JobStatus

HEAD = (
    "| fault | struck | jobs hit | new attempts | the jobs hit ended | recovery: median, longest |\n"
    "|---|---|---|---|---|---|"
)


def table(struck: Sequence[Struck], evidence: Evidence) -> str:
    """A line for each fault.

    A job that a fault hit has recovered when it has a new stored step (in a new attempt, if this one was ended by the
    fault), counted from the fault's mending, whatever struck it meanwhile.
    """
    lines = [HEAD]
    for fault in FAULTS:
        mine = [one for one in struck if one.fault is fault]
        hit = [job_id for one in mine for job_id in one.hit.jobs]
        ends = Counter(evidence.jobs[job_id].status for job_id in set(hit))
        recoveries = [seconds for one in mine for seconds in one.recovered.values()]
        cells = [
            fault.name,
            str(len(mine)),
            str(len(set(hit))),
            str(sum(len(one.attempts_lost) for one in mine)),
            ", ".join(f"{count} {status}" for status, count in sorted(ends.items())) or "–",
            f"{median(recoveries):.1f} s, {max(recoveries):.1f} s" if recoveries else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(struck: Sequence[Struck], evidence: Evidence) -> str:
    """What was ordered, what it cost, how it ended."""
    kinds = Counter(order.kind for _, order in evidence.accepted())
    ends = Counter(JobStatus(job.status).value for job, _ in evidence.accepted())
    attempts = sum(len(evidence.attempts[job.id]) for job, _ in evidence.accepted())
    commands = Counter(command for given in evidence.users.obeyed.values() for command in given)
    return (
        f"{sum(kinds.values())} jobs ({_listed(kinds)}), {attempts} attempts, {len(struck)} faults, commands: "
        f"{_listed(commands) or 'none'}; ended: {_listed(ends)}."
    )


def _listed(counts: Counter[str]) -> str:
    return "; ".join(f"{count} {name}" for name, count in sorted(counts.items()))

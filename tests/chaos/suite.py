"""One run of the fault suite: undisturbed runs, jobs under faults, recovery, and the check of every promise."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from tests.chaos import report
from tests.chaos.databases import FaultyDatabase
from tests.chaos.fault_injector import FaultInjector
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.fleet import running_fleet
from tests.chaos.planned_jobs import SHARES, TEXT, Kind, plan_jobs, reference_jobs
from tests.chaos.promises import PROMISES, Evidence, nothing_is_left_behind
from tests.chaos.users import Users, upload
from tests.harness.waiting import wait_until
from zeta_core.contract.job.status import JobStatus

AT_ONCE = 10  # unfinished jobs at a time: four run, the others wait for a slot
REFERENCE_SECONDS = 240.0
CLEANUP_SECONDS = 30.0  # for removing what an ended attempt leaves behind
RECOVERY_SECONDS = 420.0  # longer than the longest back-off


class FaultSuite:
    """Call `run` once; afterwards, ``report`` contains the result."""

    def __init__(
        self,
        folder: Path,
        database: FaultyDatabase,
        *,
        seed: int,
        num_jobs: int,
        log: Callable[[str], None],
        shares: Mapping[Kind, int] = SHARES,
    ) -> None:
        folder.mkdir(parents=True)
        self.report = ""
        self._folder = folder
        self._database = database
        self._fault_rng, self._job_rng = Random(seed), Random(seed + 1)
        self._num_jobs = num_jobs
        self._shares = shares
        self._log = log

    def run(
        self, *, faults: Sequence[Fault] = FAULTS, rounds: int | None = None, limit_seconds: float = 3600.0
    ) -> list[str]:
        """Run the suite; returns every breach of a promise as a sentence."""
        with running_fleet(self._folder, self._database) as fleet:
            users = Users(fleet.servers)
            file_id = upload(fleet.servers[0], TEXT)
            planned = plan_jobs(self._num_jobs, self._job_rng, file_id, self._shares)
            undisturbed = reference_jobs(planned, file_id)
            self._log(f"{len(undisturbed)} undisturbed run(s) ...")
            users.serve(undisturbed, at_once=len(undisturbed))
            assert users.all_ended.wait(REFERENCE_SECONDS), fleet.logs()
            for job in fleet.database.jobs().values():
                assert job.status == JobStatus.SUCCEEDED, f"an undisturbed run is {job.status}: {job.error}"
            users.serve(planned, at_once=AT_ONCE)
            injector = FaultInjector(fleet, users, faults, self._fault_rng, self._log)
            injector.inject_faults(limit_seconds=limit_seconds, rounds=rounds)
            self._log("All faults are over.")
            injector.wait_for_recovery(RECOVERY_SECONDS)
            users.stop()
            with contextlib.suppress(AssertionError):  # `Evidence` reports what is still left
                wait_until(
                    lambda: not any(nothing_is_left_behind(Evidence(fleet, users))), CLEANUP_SECONDS, "a clean fleet"
                )
            evidence = Evidence(fleet, users)
            verdict: list[str] = []
            breaches: list[str] = []
            for number, promise in enumerate(PROMISES, 1):
                found = list(promise.breaches(evidence))
                breaches += [f"promise {number}: {breach}" for breach in found]
                verdict.append(f"{number}. {promise.sentence}: {'kept' if not found else f'BROKEN {len(found)} times'}")
            self.report = "\n".join(
                [report.table(injector.injected, evidence), "", report.summary(injector.injected, evidence), *verdict]
            )
            if breaches:
                self._log(fleet.logs())
            return breaches

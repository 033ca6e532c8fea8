"""One whole game: a fleet, its undisturbed runs, the storm, the calm, and the judgement."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from tests.chaos import report
from tests.chaos.databases import DatabaseUnderFire
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.fleet import running_fleet
from tests.chaos.orders import SHARES, TEXT, Kind, orders, reference_orders
from tests.chaos.promises import PROMISES, Evidence, nothing_is_left
from tests.chaos.storm import Storm
from tests.chaos.users import Users, upload
from tests.harness.waiting import wait_until
from zeta_core.contract.job.status import JobStatus

AT_ONCE = 10  # jobs of the users that are not ended: four run, the others wait for a slot
REFERENCE_SECONDS = 240.0
CLEANING_SECONDS = 30.0  # for what an ended attempt leaves to be removed
CALM_SECONDS = 420.0  # longer than the longest pause before a retry


class Game:
    """``play`` once; ``report`` afterwards."""

    def __init__(
        self,
        folder: Path,
        database: DatabaseUnderFire,
        *,
        seed: int,
        num_jobs: int,
        say: Callable[[str], None],
        shares: Mapping[Kind, int] = SHARES,
    ) -> None:
        folder.mkdir(parents=True)
        self.report = ""
        self._folder = folder
        self._database = database
        self._weather, self._wishes = Random(seed), Random(seed + 1)
        self._num_jobs = num_jobs
        self._shares = shares
        self._say = say

    def play(
        self, *, faults: Sequence[Fault] = FAULTS, rounds: int | None = None, limit_seconds: float = 3600.0
    ) -> list[str]:
        """Every breach of a promise, as a sentence; none is what we want."""
        with running_fleet(self._folder, self._database) as fleet:
            users = Users(fleet.servers)
            file_id = upload(fleet.servers[0], TEXT)
            wanted = orders(self._num_jobs, self._wishes, file_id, self._shares)
            undisturbed = reference_orders(wanted, file_id)
            self._say(f"{len(undisturbed)} undisturbed run(s) ...")
            users.serve(undisturbed, at_once=len(undisturbed))
            assert users.all_ended.wait(REFERENCE_SECONDS), fleet.logs()
            for job in fleet.database.jobs().values():
                assert job.status == JobStatus.SUCCEEDED, f"an undisturbed run is {job.status}: {job.error}"
            users.serve(wanted, at_once=AT_ONCE)
            storm = Storm(fleet, users, faults, self._weather, self._say)
            storm.rage(limit_seconds=limit_seconds, rounds=rounds)
            self._say("The storm is over.")
            storm.settle(CALM_SECONDS)
            users.give_up()
            with contextlib.suppress(AssertionError):  # what is left after that is a breach
                wait_until(lambda: not any(nothing_is_left(Evidence(fleet, users))), CLEANING_SECONDS, "a clean fleet")
            evidence = Evidence(fleet, users)
            verdict: list[str] = []
            breaches: list[str] = []
            for number, promise in enumerate(PROMISES, 1):
                found = list(promise.breaches(evidence))
                breaches += [f"promise {number}: {breach}" for breach in found]
                verdict.append(f"{number}. {promise.sentence}: {'kept' if not found else f'BROKEN {len(found)} times'}")
            self.report = "\n".join(
                [report.table(storm.struck, evidence), "", report.summary(storm.struck, evidence), *verdict]
            )
            if breaches:
                self._say(fleet.logs())
            return breaches

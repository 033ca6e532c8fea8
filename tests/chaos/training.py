"""The program that a worker of the fault suite starts for each attempt: it records the start, then trains.

For each start, it appends a line to the job's witness file: the attempt, the node, and the living processes of the
job's other attempts. An attempt without processes gets new ones only by another start. Therefore, two attempts never
trained at once if no line lists another attempt and the attempt numbers only grow. Processes that a fault has suspended
are not listed: they can't train, and can't end by themselves if their worker takes longer than the lease to return.

``metadata.training`` selects the run: ``small`` (tests/worker/small_training.py, in this process) or real (this
process executes ``python -m zeta_core RUN_DIR``).
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.chaos.processes import training_processes
from tests.worker.small_training import SmallTraining
from worker.run.launch import TRAINER_COMMAND, own_environment
from zeta_core.contract.wire.run_directory import RUN_FILE, RunFile

WITNESS_DIRECTORY = "witness"  # beside the artifact store, one file of JSON lines for each job


def main(run_directory: Path) -> int:
    run = RunFile.model_validate_json((run_directory / RUN_FILE).read_text())
    found = [each for each in training_processes() if each.job_id == run.job_id and not each.is_suspended]
    others = [each for each in found if each.attempt != run.attempt]
    line = {
        "attempt": run.attempt,
        "node": run.node_rank,
        "pid": os.getpid(),
        "monotonic": time.monotonic(),
        "others_alive": [{"attempt": other.attempt, "pid": other.process.pid} for other in others],
    }
    witness = Path(run.artifacts_root).parent / WITNESS_DIRECTORY
    with (witness / f"{run.job_id}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    metadata: Any = run.spec.get("metadata") or {}
    if metadata.get("training") == "small":
        return SmallTraining(run_directory).run()
    os.execve(TRAINER_COMMAND[0], [*TRAINER_COMMAND, str(run_directory)], dict(own_environment()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

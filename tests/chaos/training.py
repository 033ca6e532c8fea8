"""What a worker of the fault suite starts for each attempt: a witness, then the training itself.

The witness writes one line per start: which attempt this is, and which processes of other attempts of the job are
alive. An attempt whose processes are all dead never gets new ones unless it is started again, which is another line; so
two attempts never trained at once exactly when no line of the job names another, and the attempts only grow.

``metadata.training`` says which training follows: ``small`` (tests/worker/small_training.py, in this process) or real
(``python -m zeta_core RUN_DIR``, which this process becomes).
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.chaos.processes import trainings
from tests.worker.small_training import SmallTraining
from worker.training.launch import TRAINER_COMMAND, own_environment
from zeta_core.contract.wire.run_directory import RUN_FILE, RunFile

WITNESS_DIRECTORY = "witness"  # beside the artifact store, one file of JSON lines for each job


def main(run_directory: Path) -> int:
    order = RunFile.model_validate_json((run_directory / RUN_FILE).read_text())
    others = [found for found in trainings() if found.job_id == order.job_id and found.attempt != order.attempt]
    line = {
        "attempt": order.attempt,
        "pid": os.getpid(),
        "monotonic": time.monotonic(),
        "others_alive": [{"attempt": other.attempt, "pid": other.process.pid} for other in others],
    }
    witness = Path(order.artifacts_root).parent / WITNESS_DIRECTORY
    with (witness / f"{order.job_id}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    metadata: Any = order.spec.get("metadata") or {}
    if metadata.get("training") == "small":
        return SmallTraining(run_directory).run()
    os.execve(TRAINER_COMMAND[0], [*TRAINER_COMMAND, str(run_directory)], dict(own_environment()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

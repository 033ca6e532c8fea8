"""A program that tokenizes Hub datasets: for each dataset on a line of its input, it writes the texts or the error.

`huggingface_hub` reads the address of the Hub when it is imported, so each Hub needs a separate process.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ByT5Tokenizer

from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sandbox import MEBIBYTE, ProcessLimits
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import prepare_tokens
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter


class HubReader:
    """The program, running with the given environment until `close`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", **environment},
        )

    def send(self, **dataset: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataset) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def read(self, **dataset: Any) -> dict[str, Any]:
        self.send(**dataset)
        return self.receive()

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()


def tokenize(dataset: dict[str, Any]) -> dict[str, Any]:
    """The texts and names of the dataset's sources, or the error; and the peak memory of this process in bytes."""
    options = parse(TrainerOptions, {"dataset": dataset})
    tokenizer, result = ByT5Tokenizer(), dict[str, Any]()
    try:
        sources = open_sources(dataset_sources(options.dataset), SourceLocations(), pretokenized=False)
        with tempfile.TemporaryDirectory() as cache:
            limits = ProcessLimits(memory_bytes=400 * MEBIBYTE)
            tokens = prepare_tokens(sources, tokenizer, Path(cache), Reporter(), limits=limits)
            bounds = [int(offset) for offset in tokens.offsets]
            documents = [tokens.ids[first:last] for first, last in itertools.pairwise(bounds)]
            result["texts"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents]
        result["names"] = [source.name for source in sources]
        result["fingerprints"] = [source.fingerprint for source in sources]
    except InvalidData as error:
        result["error"] = error.message
    return {**result, "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(tokenize(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""Stages 5 and 6, sequences and batches: cutting documents into sequences, ordering them, and making batches.

`packing` cuts and packs (`Sequences`), `sampler` orders the sequences of a run, and `batch` defines what the loss gets.
"""

from zeta_core.data.sequences.batch import IGNORED, MicroBatch, largest_micro_batch, micro_batches
from zeta_core.data.sequences.packing import Overlong, Sequences
from zeta_core.data.sequences.sampler import Mixture, Sampler, build_sampler

__all__ = [
    "IGNORED",
    "MicroBatch",
    "Mixture",
    "Overlong",
    "Sampler",
    "Sequences",
    "build_sampler",
    "largest_micro_batch",
    "micro_batches",
]

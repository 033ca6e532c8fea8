"""The artifact store: uploaded files, and the checkpoints, logs and curves of jobs, in a folder or in an S3 bucket.

The server and the workers use the same interface, `ArtifactStore`. Only this package knows which kind of store it is.
"""

from __future__ import annotations

from zeta_core.system.artifact_store.checkpoint_copies import BrokenCheckpoint, TransferCancelled
from zeta_core.system.artifact_store.failures import brief_reason, storage_errors, storage_unavailable
from zeta_core.system.artifact_store.interface import ArtifactStore, StoredCheckpoint, StoredObject
from zeta_core.system.artifact_store.opening import open_store

__all__ = [
    "ArtifactStore",
    "BrokenCheckpoint",
    "StoredCheckpoint",
    "StoredObject",
    "TransferCancelled",
    "brief_reason",
    "open_store",
    "storage_errors",
    "storage_unavailable",
]

"""Which adapters can share a base in the memory of one serving process."""

from __future__ import annotations

import hashlib
import json

from server.artifacts import Artifacts
from zeta_core.contract.identifiers import is_hub_id, is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.wire.run_directory import MERGED_NAME
from zeta_core.system.artifact_store import StoredCheckpoint

_REQUIRED = "generation_config.json"  # otherwise that of the base counts, which the first adapter replaces


def shared_base(artifacts: Artifacts, stored: StoredCheckpoint, quantize: str | None) -> str | None:
    """A hash that is equal for adapters with the same base; ``None`` for a checkpoint that can't share one.

    It covers the content and the precision of the base, and the tokenizer, because the base of an adapter with added
    tokens has more embeddings. Reads files.
    """
    manifest = stored.manifest
    names = {file.path for file in manifest.files}
    if manifest.format != "adapter" or _REQUIRED not in names or f"{MERGED_NAME}/config.json" in names:
        return None
    content = _content(artifacts, manifest.base_model or "")
    if content is None:
        return None
    tokenizer = sorted((file.path, file.sha256) for file in manifest.files if file.role == "tokenizer")
    return hashlib.sha256(json.dumps([content, quantize, tokenizer]).encode()).hexdigest()


def _content(artifacts: Artifacts, base: str) -> str | None:
    """Identifies the content of a base, or ``None`` if its name doesn't."""
    job, _, checkpoint = base.partition("/")
    if is_id(job, "job") and NAME_PATTERN.match(checkpoint):  # a resumed job may replace its checkpoint
        stored = artifacts.checkpoint(job, checkpoint)
        return None if stored is None else hashlib.sha256(stored.manifest_bytes).hexdigest()
    has_commit = is_hub_id(base) and "@" in base
    return base if has_commit or is_id(base, "file") else None

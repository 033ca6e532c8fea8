"""Opening the artifact store that the settings name."""

from __future__ import annotations

from importlib import import_module

from zeta_core.contract.errors import InvalidSettings
from zeta_core.system.artifact_location import BucketLocation
from zeta_core.system.artifact_store.folder import FolderStore
from zeta_core.system.artifact_store.interface import ArtifactStore
from zeta_core.system.settings import StoreSettings


def open_store(settings: StoreSettings) -> ArtifactStore:
    """The store of ``ZETA_ARTIFACTS_URL``, without accessing it. Raises `InvalidSettings` if boto3 is not installed."""
    location = settings.artifacts_location
    if not isinstance(location, BucketLocation):
        return FolderStore(settings.artifacts)
    try:
        # Imported only for a bucket: boto3 is an optional library that takes a while to import.
        bucket = import_module("zeta_core.system.artifact_store.bucket")
    except ModuleNotFoundError as error:
        raise InvalidSettings(
            f"ZETA_ARTIFACTS_URL is {str(location)!r}, which needs {error.name}; install it with "
            "`pip install 'zeta-train[s3]'`.",
            param="ZETA_ARTIFACTS_URL",
        ) from error
    store = bucket.BucketStore(settings.artifacts, location, checksums=settings.s3_checksums == "when_supported")
    assert isinstance(store, ArtifactStore)
    return store

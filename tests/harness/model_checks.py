"""Run the checks of model files on an archive in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness.model_archives import pack_tar
from zeta_core.system.model_files import ArchiveFiles, InvalidModelFiles, check_archive, clean_files, model_folder


def check_upload(tmp_path: Path, files: dict[str, object]) -> None:
    (tmp_path / "model.tar").write_bytes(pack_tar(files))
    check_archive(tmp_path / "model.tar", "model.tar")


def rejection(tmp_path: Path, files: dict[str, object]) -> str:
    with pytest.raises(InvalidModelFiles) as raised:
        check_upload(tmp_path, files)
    return raised.value.message


def cleaned_files(tmp_path: Path, files: Mapping[str, object]) -> dict[str, Any]:
    """The JSON files of an archive as libraries would read them."""
    (tmp_path / "model.tar").write_bytes(pack_tar(files))
    archive = ArchiveFiles(tmp_path / "model.tar", "model.tar")
    seen = clean_files(archive, model_folder(archive), "upload", weights=True)
    return {name: None if content is None else json.loads(content) for name, content in seen}

"""Checks the files of a model before any library opens them, using only the standard library.

The server checks uploads with `check_archive`. The training core reads an archive or a folder through `ArchiveFiles` or
`FolderFiles`, and loads only what `clean_files` returns: unchanged weights, and JSON files rewritten to contain only
plain data.

Guarantees for accepted models: libraries open only files of the model itself; weights are safetensors or GGUF; no key
refers to code, a kernel, a file outside the model or a repository of the Hub; and headers and JSON files take no more
memory than `archive` and `json_files` allow.
"""

from zeta_core.contract.model_json.config import clean_config
from zeta_core.contract.model_json.faults import InvalidModelFiles, Origin
from zeta_core.system.model_files.check import check_archive, clean_files, ignored_code, model_folder
from zeta_core.system.model_files.files import ArchiveFiles, FolderFiles, ModelFiles

__all__ = [
    "ArchiveFiles",
    "FolderFiles",
    "InvalidModelFiles",
    "ModelFiles",
    "Origin",
    "check_archive",
    "clean_config",
    "clean_files",
    "ignored_code",
    "model_folder",
]

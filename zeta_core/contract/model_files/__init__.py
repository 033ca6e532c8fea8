"""Check the files of a model before any library opens them, with nothing but the standard library.

The server checks an upload with `check_archive`; the training core reads an archive or a folder through `ArchiveFiles`
and `FolderFiles`, and loads only what `clean_files` returns: weights as they are, and JSON files rewritten so that they
hold plain data alone.

Guaranteed for what passes: every file that a library opens belongs to the model itself, weights are safetensors (or
GGUF), no key names code, a kernel, a file outside the model or a repository of the Hub, and neither a header nor a JSON
file takes more memory than `archive` and `strict_json` allow.
"""

from zeta_core.contract.model_files.check import check_archive, clean_files, model_folder
from zeta_core.contract.model_files.config import clean_config
from zeta_core.contract.model_files.faults import InvalidModelFiles, Origin
from zeta_core.contract.model_files.files import ArchiveFiles, FolderFiles, ModelFiles

__all__ = [
    "ArchiveFiles",
    "FolderFiles",
    "InvalidModelFiles",
    "ModelFiles",
    "Origin",
    "check_archive",
    "clean_config",
    "clean_files",
    "model_folder",
]

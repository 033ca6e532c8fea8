"""The modules that define the commands. `zeta --help` lists the commands in this order."""

from __future__ import annotations

MODULES = {
    "zeta.cli.submit": ("submit", "validate"),
    "zeta.cli.data": ("data",),
    "zeta.cli.jobs": ("jobs", "job", "wait", "events", "logs"),
    "zeta.cli.sweeps": ("sweep", "sweeps"),
    "zeta.cli.models": ("models",),
    "zeta.cli.imports": ("import",),
    "zeta.cli.top": ("top",),
    "zeta.cli.comparisons": ("plot", "diff", "compare"),
    "zeta.cli.evaluations": ("eval",),
    "zeta.cli.job_commands": ("cancel", "pause", "resume", "checkpoint", "rerun", "delete"),
    "zeta.cli.chat": ("chat",),
    "zeta.cli.artifacts": ("checkpoints", "download", "upload", "files"),
    "zeta.cli.provenance": ("receipt", "verify", "lineage"),
    "zeta.cli.exports": ("export",),
    "zeta.cli.service": ("up", "down", "status", "server", "migrate"),
    "zeta.cli.store_check": ("artifacts",),
    "zeta.cli.backup": ("backup", "restore"),
    "zeta.cli.workers": ("worker", "workers"),
    "zeta.cli.access": ("keys", "projects"),
    "zeta.cli.audit": ("audit",),
    "zeta.cli.webhooks": ("webhooks",),
    "zeta.cli.login": ("config", "login", "logout", "dashboard"),
}

"""Opens the exporter that the standard variables of OpenTelemetry configure.

It is not part of `tracing`, which the exporter imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from server.tracing.tracing import Tracing
from zeta_core.contract.errors import InvalidSettings

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def open_tracing(environment: Mapping[str, str]) -> Tracing | None:
    """The exporter of traces; ``None`` unless an endpoint is configured.

    The SDK reads all other ``OTEL_*`` variables itself. Raises `InvalidSettings` if it is not installed.
    """
    endpoint = next((name for name in ENDPOINTS if environment.get(name)), None)
    if endpoint is None or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        exporter = import_module("server.tracing.exporter")  # the SDK takes half a second to import
    except ModuleNotFoundError as error:
        raise InvalidSettings(
            f"{endpoint} is set, but the exporter of traces is not installed ({error.name} is missing); "
            f"install zeta-train[otel], or unset {endpoint}.",
            param=endpoint,
        ) from error
    return cast(Tracing, exporter.OpenTelemetry())

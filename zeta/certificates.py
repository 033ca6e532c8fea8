"""The certificate authorities that the client trusts: those configured by the user, or certifi's and the system's."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx

from zeta_core.contract.errors import InvalidSettings

# Each variable names a bundle file or a folder. OpenSSL uses its two variables together. The others belong to requests
# and curl; companies with their own authorities often set only those.
OPENSSL_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
OTHER_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def tls_context(variables: Mapping[str, str]) -> ssl.SSLContext:
    """The TLS context for ``https``. Raises `InvalidSettings` if a variable's certificates cannot be read."""
    named = _set_variables(variables, OPENSSL_VARIABLES) or _set_variables(variables, OTHER_VARIABLES)[:1]
    if not named:
        context = httpx.create_ssl_context(trust_env=False)
        context.load_default_certs()  # an authority that an administrator installed on this machine
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, value in named:
        _load(context, name, value)
    return context


def _set_variables(variables: Mapping[str, str], names: tuple[str, ...]) -> list[tuple[str, str]]:
    """The variables that are set, with their values; a blank one counts as unset, as for every other setting."""
    return [(name, value) for name in names if (value := variables.get(name, "").strip())]


def no_tls_context() -> ssl.SSLContext:
    """A context that trusts no authority, for connections without TLS; it avoids the time to load authorities."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _load(context: ssl.SSLContext, name: str, value: str) -> None:
    folders = [folder for folder in value.split(os.pathsep) if Path(folder).is_dir()]
    try:
        if folders:
            context.load_verify_locations(capath=os.pathsep.join(folders))
        else:
            context.load_verify_locations(cafile=value)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; a NUL in the name is a ValueError
        reason = "it is not in PEM format" if isinstance(error, ssl.SSLError) else getattr(error, "strerror", error)
        raise InvalidSettings(
            f"{name} is {value!r}, which cannot be read as certificates ({reason}); "
            "set it to a PEM file of certificate authorities, or unset it.",
            param=name,
            code="invalid_certificates",
        ) from error

"""The certificates that the client trusts.

For a server elsewhere, these are the certificate authorities configured by the user, or certifi's and the system's. For
the `zeta up` of this machine, it is only the server's own certificate, under any name: it may be for another name than
127.0.0.1, and its authority may be unknown here.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx

from zeta_core.contract.errors import InvalidSettings

# Each variable names a bundle file or a folder. OpenSSL uses its two variables together. The others belong to requests
# and curl; companies with their own authorities often set only those.
OPENSSL_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
OTHER_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


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


def first_certificate(pem_file: Path) -> str:
    """The server's own certificate, which is the first one in the file, as PEM. Raises `InvalidSettings`."""
    try:
        found = _CERTIFICATE.search(pem_file.read_text(encoding="ascii", errors="replace"))
    except OSError as error:
        raise InvalidSettings(f"{pem_file} can't be read: {error.strerror}.", param="ZETA_TLS_CERT") from error
    if found is None:
        raise InvalidSettings(f"{pem_file} contains no certificate in PEM format.", param="ZETA_TLS_CERT")
    return found.group()


def pinned_context(certificate: str) -> ssl.SSLContext:
    """A context that accepts only this certificate (PEM), for every name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # no authority is needed
    context.load_verify_locations(cadata=certificate)
    return context


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

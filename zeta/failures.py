"""Explaining why the server was not reached: connection, proxy and TLS failures, and answers that a gateway gave."""

from __future__ import annotations

import http
import ssl
from collections.abc import Callable

import httpx

from zeta.errors import GatewayRefusal, ServerFault, Unreachable
from zeta.proxies import Proxy
from zeta_core.contract.errors import TooLarge, ZetaError

# OpenSSL's verification results, https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
_NOT_YET_VALID, _EXPIRED, _HOST_MISMATCH, _IP_MISMATCH = 9, 10, 62, 64
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GATEWAY_STATUSES = frozenset({502, 503, 504, *range(520, 531)})  # 520 to 530 are Cloudflare's
_SERVER_PROGRAM = "uvicorn"  # what our own server calls itself


def connection_failure(error: Exception, base_url: str, proxy: Proxy | None) -> Unreachable:
    """The error for a connection that could not be made, or that broke."""
    tls = _cause(error, ssl.SSLError)
    if tls is not None:
        return Unreachable(_tls_failure(tls, base_url))
    text = str(error)
    host = httpx.URL(base_url).host
    if proxy is not None and isinstance(error, httpx.ProxyError):
        cure = f"put a user and password into {proxy.variable}" if "407" in text else f"correct {proxy.variable}"
        return Unreachable(
            f"The proxy {proxy} ({proxy.variable}) refused the connection to {host} ({text}); {cure}, "
            f"or add {host} to NO_PROXY to connect directly."
        )
    if proxy is not None and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(
            f"The proxy {proxy} ({proxy.variable}) cannot be reached ({_reason(error)}); correct {proxy.variable}, "
            f"or add {host} to NO_PROXY to connect directly."
        )
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(
            f"No Zeta server answers at {base_url} ({_reason(error)}); start one with `zeta up`, "
            "or set ZETA_URL to the right address."
        )
    if isinstance(error, httpx.RemoteProtocolError) and "location header" in text:
        return Unreachable(f"{base_url} redirects to an invalid address; set ZETA_URL to the server's own address.")
    through = f" through the proxy {proxy} ({proxy.variable})" if proxy is not None else ""
    if isinstance(error, httpx.TimeoutException):
        return Unreachable(f"The server at {base_url} did not answer in time{through}; try again later.")
    return Unreachable(
        f"The connection to {base_url}{through} was lost ({_reason(error)}); check the port of ZETA_URL, and http or "
        "https, or try again later."
    )


def is_permanent(error: Exception) -> bool:
    """Whether repeating the connection cannot help: a certificate stays as it is."""
    return _cause(error, ssl.SSLError) is not None


def is_web_page(response: httpx.Response) -> bool:
    """Whether an answer is HTML, which the service never sends."""
    return response.headers.get("Content-Type", "").lower().startswith(("text/html", "application/xhtml"))


def foreign_answer(
    response: httpx.Response, base_url: str, proxy: Proxy | None, server_is_reachable: Callable[[], bool]
) -> ZetaError:
    """The error for an answer that the service did not write.

    ``server_is_reachable`` tells whether the server answers other requests at this URL: then one request was refused,
    else the URL is wrong or closed.
    """
    status, url = response.status_code, response.request.url
    if status in _REDIRECTS and response.headers.get("Location"):
        return _redirected(response, base_url)
    gateway = _gateway_name(response, proxy)
    if status in _GATEWAY_STATUSES:
        return Unreachable(f"{gateway} answers at {base_url}, but not the server behind it ({_status(status)}).")
    if status == 429:
        return Unreachable(f"{gateway} limits the rate of requests ({_status(status)}); try again later.")
    if status >= 500:
        return ServerFault(f"The server at {url} failed ({_status(status)}); its log has the reason.")
    if status == 413:
        cure = "client_max_body_size" if "nginx" in gateway else "for nginx, client_max_body_size"
        return TooLarge(
            f"{gateway} refuses bodies of this size ({_status(status)}); raise its limit ({cure}).",
            code="refused_by_gateway",
        )
    if status == 407:
        variable = proxy.variable if proxy is not None else "HTTP_PROXY"
        return Unreachable(f"{gateway} requires a user and password ({_status(status)}); put them into {variable}.")
    if b"https port" in response.content[:2000].lower():  # nginx, Apache and Go word it alike
        secure = base_url.replace("http://", "https://", 1)
        return Unreachable(f"The server at {base_url} requires TLS; set ZETA_URL to {secure}.")
    if server_is_reachable():
        return GatewayRefusal(
            f"{gateway} refused {response.request.method} {url.path} ({_status(status)}), while the server answers "
            "other requests; allow this one there."
        )
    if status in (401, 403, 511):
        return Unreachable(
            f"{gateway} refuses access to {base_url} ({_status(status)}); sign in there or ask its operator, "
            "or set ZETA_URL to an address that reaches the server directly."
        )
    content_type = response.headers.get("Content-Type", "no type")
    through = f" through the proxy {proxy} ({proxy.variable})" if proxy is not None else ""
    return Unreachable(
        f"The program that answers at {base_url}{through} is not a Zeta server ({_status(status)}, {content_type}); "
        "set ZETA_URL to the right address."
    )


def _redirected(response: httpx.Response, base_url: str) -> Unreachable:
    """Redirects are never followed: the key must not reach another host."""
    request = response.request.url
    begins = f"{base_url} redirects ({_status(response.status_code)})"
    target = request.join(response.headers["Location"]).copy_with(query=None, fragment=None, userinfo=b"")
    path = request.path.removeprefix(httpx.URL(base_url).path.rstrip("/"))
    found = target.path.rstrip("/")
    if found.endswith(path):
        base = str(target.copy_with(path=found.removesuffix(path) or "/")).rstrip("/")
        if base != base_url:
            return Unreachable(f"{begins} to {base}; set ZETA_URL to {base}.")
    return Unreachable(
        f"{begins} to {target}, which looks like a sign-in or error page; set ZETA_URL to an address that reaches "
        "the server without it."
    )


def _tls_failure(error: ssl.SSLError, base_url: str) -> str:
    code = getattr(error, "verify_code", None)
    if code is None:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"):
            plain = base_url.replace("https://", "http://", 1)
            return f"The server at {base_url} does not use TLS; set ZETA_URL to {plain}."
        return (
            f"The TLS connection to {base_url} failed ({_openssl_reason(error)}); check its certificate and ZETA_URL."
        )
    begins = f"The certificate of {base_url}"
    if code == _EXPIRED:
        return f"{begins} has expired; renew it (or correct this machine's clock)."
    if code == _NOT_YET_VALID:
        return f"{begins} is not valid yet; correct the clock of this machine or of the server."
    if code in (_HOST_MISMATCH, _IP_MISMATCH):
        return f"{begins} is for another name ({_openssl_reason(error)}); set ZETA_URL to the name in the certificate."
    return (
        f"{begins} is not signed by an authority that this machine trusts ({_openssl_reason(error)}); "
        "set SSL_CERT_FILE to a PEM file with your authority's certificate (or the server's own, if it is self-signed)."
    )


def _openssl_reason(error: ssl.SSLError) -> str:
    message = getattr(error, "verify_message", None) or error.reason or str(error)
    return str(message).rstrip(".").replace("_", " ").lower() if message == error.reason else str(message).rstrip(".")


def _gateway_name(response: httpx.Response, proxy: Proxy | None) -> str:
    """Who answered instead of the server, as the beginning of a sentence."""
    if proxy is not None:
        return f"The proxy {proxy} ({proxy.variable})"
    program = response.headers.get("Server", "").split("/")[0].split(" ")[0]
    known = f" ({program})" if program.isprintable() and program.lower() not in ("", _SERVER_PROGRAM) else ""
    return f"Something between this machine and the server{known}"


def _status(status: int) -> str:
    try:
        return f"HTTP {status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status}"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _cause(error: BaseException | None, kind: type[ssl.SSLError]) -> ssl.SSLError | None:
    """The first error of this kind among an error and its causes."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None

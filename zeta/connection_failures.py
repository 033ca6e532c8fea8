"""Explaining why the server cannot be reached: connection, proxy and TLS failures, and responses from gateways."""

from __future__ import annotations

import http
import ssl
from collections.abc import Callable

import httpx

from zeta.errors import GatewayRefusal, InternalServerError, Unreachable
from zeta.http_proxy import Proxy
from zeta_core.contract.errors import TooLarge, ZetaError

# OpenSSL's verification results, https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
_NOT_YET_VALID, _EXPIRED, _HOST_MISMATCH, _IP_MISMATCH = 9, 10, 62, 64
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GATEWAY_STATUSES = frozenset({502, 503, 504, *range(520, 531)})  # 520 to 530 are Cloudflare's
_SERVER_PROGRAM = "uvicorn"  # the Server header of a Zeta server


def connection_failure(error: Exception, base_url: str, proxy: Proxy | None) -> Unreachable:
    """The error for a connection that could not be established, or was lost."""
    tls = _cause(error, ssl.SSLError)
    if tls is not None:
        return Unreachable(_tls_failure(tls, base_url))
    text = str(error)
    host = httpx.URL(base_url).host
    if proxy is not None and isinstance(error, httpx.ProxyError):
        fix = f"add a user and password to {proxy.variable}" if "407" in text else f"correct {proxy.variable}"
        return Unreachable(
            f"The proxy {proxy} ({proxy.variable}) refused the connection to {host} ({text}); {fix}, "
            f"or add {host} to NO_PROXY to connect directly."
        )
    if proxy is not None and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(
            f"The proxy {proxy} ({proxy.variable}) cannot be reached ({_reason(error)}); correct {proxy.variable}, "
            f"or add {host} to NO_PROXY to connect directly."
        )
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(
            f"No Zeta server is responding at {base_url} ({_reason(error)}); start one with `zeta up`, "
            "or correct ZETA_URL."
        )
    if isinstance(error, httpx.RemoteProtocolError) and "location header" in text:
        return Unreachable(f"{base_url} redirects to an invalid address; set ZETA_URL to the server's own address.")
    through = f" through the proxy {proxy} ({proxy.variable})" if proxy is not None else ""
    if isinstance(error, httpx.TimeoutException):
        return Unreachable(f"The server at {base_url} did not respond in time{through}; try again later.")
    return Unreachable(
        f"The connection to {base_url}{through} was lost ({_reason(error)}); try again later, or check the scheme "
        "(http or https) and port of ZETA_URL."
    )


def is_permanent(error: Exception) -> bool:
    """Whether retrying cannot help, as with an invalid certificate."""
    return _cause(error, ssl.SSLError) is not None


def is_web_page(response: httpx.Response) -> bool:
    """Whether a response is HTML, which the service never sends."""
    return response.headers.get("Content-Type", "").lower().startswith(("text/html", "application/xhtml"))


def foreign_response(
    response: httpx.Response, base_url: str, proxy: Proxy | None, server_is_reachable: Callable[[], bool]
) -> ZetaError:
    """The error for a response that did not come from the service.

    ``server_is_reachable`` checks whether the server responds to other requests at this URL. If so, a gateway refused
    only this request; otherwise the URL is wrong or access to it is blocked.
    """
    status, url = response.status_code, response.request.url
    if status in _REDIRECTS and response.headers.get("Location"):
        return _redirected(response, base_url)
    gateway = _gateway_name(response, proxy)
    if status in _GATEWAY_STATUSES:
        return Unreachable(
            f"{gateway} responds at {base_url}, but the server behind it does not ({_status(status)}); try again later."
        )
    if status == 429:
        return Unreachable(f"{gateway} limits the rate of requests ({_status(status)}); try again later.")
    if status >= 500:
        return InternalServerError(f"The server at {url} failed ({_status(status)}); see its log for the reason.")
    if status == 413:
        limit = "client_max_body_size" if "nginx" in gateway else "for nginx, client_max_body_size"
        return TooLarge(
            f"{gateway} rejects request bodies of this size ({_status(status)}); raise its limit ({limit}).",
            code="refused_by_gateway",
        )
    if status == 407:
        variable = proxy.variable if proxy is not None else "HTTP_PROXY"
        return Unreachable(f"{gateway} requires a user and password ({_status(status)}); add them to {variable}.")
    if b"https port" in response.content[:2000].lower():  # nginx, Apache and Go use similar messages
        secure = base_url.replace("http://", "https://", 1)
        return Unreachable(f"The server at {base_url} requires TLS; set ZETA_URL to {secure}.")
    if server_is_reachable():
        return GatewayRefusal(
            f"{gateway} refused {response.request.method} {url.path} ({_status(status)}), although the server responds "
            "to other requests; allow this request there."
        )
    if status in (401, 403, 511):
        return Unreachable(
            f"{gateway} denies access to {base_url} ({_status(status)}); sign in there or contact its operator, "
            "or set ZETA_URL to an address that reaches the server directly."
        )
    return other_program(response, base_url, proxy)


def other_program(response: httpx.Response, base_url: str, proxy: Proxy | None) -> Unreachable:
    """The error for a response of a program that is neither the service nor a gateway in front of it."""
    content_type = response.headers.get("Content-Type", "no type")
    through = f" through the proxy {proxy} ({proxy.variable})" if proxy is not None else ""
    return Unreachable(
        f"The program that responds at {base_url}{through} is not a Zeta server ({_status(response.status_code)}, "
        f"{content_type}); correct ZETA_URL."
    )


def wrong_path(base_url: str) -> Unreachable:
    """The error for a URL with a path, such as ``/v1``, under which the server publishes nothing."""
    url = httpx.URL(base_url)
    root = str(url.copy_with(path="/")).rstrip("/")
    return Unreachable(f"The Zeta server at {root} has nothing under the path {url.path}; set ZETA_URL to {root}.")


def _redirected(response: httpx.Response, base_url: str) -> Unreachable:
    """The error for a redirect. Redirects are never followed, because the key must not be sent to another host."""
    request = response.request.url
    begins = f"{base_url} redirects ({_status(response.status_code)})"
    target = request.join(response.headers["Location"]).copy_with(query=None, fragment=None, userinfo=b"")
    path = request.path.removeprefix(httpx.URL(base_url).path.rstrip("/"))
    target_path = target.path.rstrip("/")
    if target_path.endswith(path):
        base = str(target.copy_with(path=target_path.removesuffix(path) or "/")).rstrip("/")
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
    """What responded instead of the server, as the subject of a sentence."""
    if proxy is not None:
        return f"The proxy {proxy} ({proxy.variable})"
    program = response.headers.get("Server", "").split("/")[0].split(" ")[0]
    program_name = f" ({program})" if program.isprintable() and program.lower() not in ("", _SERVER_PROGRAM) else ""
    return f"Something between this machine and the server{program_name}"


def _status(status: int) -> str:
    try:
        return f"HTTP {status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status}"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _cause(error: BaseException | None, kind: type[ssl.SSLError]) -> ssl.SSLError | None:
    """The first error of this type among the error and its causes."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None

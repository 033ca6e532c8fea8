"""Sends one message over HTTP.

Guarantees: the connection goes to an address that `addresses` has checked, on the URL's port; TLS checks the
certificate against the URL's host name; redirects are not followed; the body of the response is not read; cookies are
not kept, because receivers of several projects may share an address; everything together takes at most
``limit_seconds``. No proxy is used.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import httpx

from server.notifications.addresses import AddressNotAllowed, allowed_addresses
from server.notifications.messages import Message, content, headers
from server.settings import Networks
from zeta_core.system.distribution import version

MAX_RETRY_AFTER_SECONDS = 24 * 3600.0
HTTP_GONE = 410


@dataclass(frozen=True)
class DeliveryOutcome:
    """The result of one attempt; ``error`` is a sentence without its full stop, ``None`` if the message arrived.

    ``retry_after_seconds`` is what the receiver asked for, and ``is_gone`` means that it wants no further messages.
    """

    error: str | None = None
    status_code: int | None = None
    retry_after_seconds: float = 0.0
    is_gone: bool = False


class HttpSender:
    def __init__(self, networks: Networks, limit_seconds: float, executor: Executor) -> None:
        self._networks = networks
        self._limit_seconds = limit_seconds
        self._executor = executor
        context = httpx.create_ssl_context(trust_env=False)
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)  # includes SSL_CERT_FILE
        self._client = httpx.AsyncClient(
            verify=context,
            trust_env=False,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=limit_seconds,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def send(self, message: Message) -> DeliveryOutcome:
        """Send the message once. Failures are outcomes, not exceptions."""
        try:
            async with asyncio.timeout(self._limit_seconds):
                return await self._send(message)
        except TimeoutError:
            return DeliveryOutcome(f"no response within {self._limit_seconds:g} s (ZETA_WEBHOOK_SECONDS)")
        except AddressNotAllowed as error:
            return DeliveryOutcome(str(error))
        except (httpx.TransportError, httpx.InvalidURL, OSError, UnicodeError) as error:
            return DeliveryOutcome(f"the request failed: {error or type(error).__name__}")

    async def close(self) -> None:
        await self._client.aclose()

    async def _send(self, message: Message) -> DeliveryOutcome:
        parts = urlsplit(message.url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await allowed_addresses(host, port, self._networks, self._executor)
        for address in addresses[:-1]:
            try:
                return await self._post(message, address)
            except httpx.ConnectError:
                continue  # the next address of the name
        return await self._post(message, addresses[-1])

    async def _post(self, message: Message, address: str) -> DeliveryOutcome:
        sent, url = content(message), httpx.URL(message.url)
        named = {
            **headers(message, sent, int(time.time())),
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": f"Zeta/{version()}",
        }
        request = self._client.build_request(
            "POST", url.copy_with(host=address), content=sent, headers=named, extensions={"sni_hostname": url.host}
        )
        request.extensions["timeout"] = httpx.Timeout(self._limit_seconds).as_dict()
        response = await self._client.send(request, stream=True)
        await response.aclose()
        return _outcome(response)


def _outcome(response: httpx.Response) -> DeliveryOutcome:
    status = response.status_code
    if response.is_success:
        return DeliveryOutcome(status_code=status)
    if response.is_redirect:
        return DeliveryOutcome(
            "the receiver redirects to another URL, which is not followed; use its final URL", status
        )
    wait = response.headers.get("Retry-After", "")
    seconds = min(float(wait), MAX_RETRY_AFTER_SECONDS) if wait.isdecimal() and len(wait) < 10 else 0.0
    return DeliveryOutcome(f"the receiver responded with status {status}", status, seconds, is_gone=status == HTTP_GONE)

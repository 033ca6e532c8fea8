"""Reverse proxies: the published path prefix, and the request information that trusted proxies forward.

``Forwarded`` (RFC 7239) and ``X-Forwarded-For``, ``-Proto``, ``-Host`` and ``-Prefix`` are used only on connections
from an address in ``ZETA_TRUSTED_PROXIES``. Otherwise they are ignored, because any client can send them.

The path prefix (``ZETA_ROOT_PATH``, or a trusted ``X-Forwarded-Prefix``) is part of every URL in a response. Requests
match with or without the prefix, so a proxy may strip it or pass it on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import Networks, parse_path_prefix

_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_PAIR = re.compile(r'\s*([A-Za-z]+)=(?:"([^"]*)"|([^;,"\s]*))\s*')
_NODE = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)")


def public_path(request: Request, path: str) -> str:
    """``path`` with the published path prefix, as clients see it."""
    return f"{request.scope.get('root_path', '')}{path}"


def route_path(request: Request) -> str:
    """The request's path without the prefix."""
    return str(request.scope["path"]).removeprefix(str(request.scope.get("root_path", "")))


@dataclass(frozen=True)
class _Origin:
    """How a request reached the first trusted proxy."""

    client: str
    scheme: str | None = None
    host: str | None = None
    prefix: str | None = None


class ProxyMiddleware:
    """Replaces client, scheme, host and path prefix by the values from trusted proxies."""

    def __init__(self, app: ASGIApp, trusted: Networks, root_path: str) -> None:
        self._app = app
        self._trusted = trusted
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = self._as_published(scope)
        await self._app(scope, receive, send)

    def _as_published(self, scope: Scope) -> Scope:
        prefix = self._root_path
        client = scope.get("client")
        if client is not None and self._trusts(client[0]):
            headers = Headers(scope=scope)
            origin = self._origin(headers, client[0])
            scope = {**scope, "client": (origin.client, 0 if origin.client != client[0] else client[1])}
            prefix = origin.prefix if origin.prefix is not None else prefix
            if origin.scheme is not None:
                scope["scheme"] = origin.scheme
            if origin.host is not None:
                others = [(name, value) for name, value in scope["headers"] if name != b"host"]
                scope["headers"] = [(b"host", origin.host.encode()), *others]
        if not prefix:
            return scope
        path: str = scope["path"]
        has_prefix = path == prefix or path.startswith(f"{prefix}/")
        return {**scope, "root_path": prefix, "path": path if has_prefix else prefix + path}

    def _trusts(self, host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._trusted)

    def _origin(self, headers: Headers, peer: str) -> _Origin:
        prefix = _last(headers, "x-forwarded-prefix")
        forwarded = list(_parse_forwarded(",".join(headers.getlist("forwarded"))))
        if forwarded:
            origin = self._forwarded_origin(forwarded, peer)
        else:
            addresses = ",".join(headers.getlist("x-forwarded-for")).split(",")
            origin = _Origin(
                self._client([{"for": address.strip()} for address in addresses], peer)[0],
                _scheme(_last(headers, "x-forwarded-proto")),
                _host(_last(headers, "x-forwarded-host")),
            )
        return replace(origin, prefix=_prefix(prefix))

    def _forwarded_origin(self, forwarded: list[dict[str, str]], peer: str) -> _Origin:
        client, reported = self._client(forwarded, peer)
        return _Origin(client, _scheme(reported.get("proto")), _host(reported.get("host")))

    def _client(self, hops: list[dict[str, str]], peer: str) -> tuple[str, dict[str, str]]:
        """The nearest address that isn't a trusted proxy, and the values that its proxy forwarded."""
        client, reported = peer, hops[-1]
        for hop in reversed(hops):
            node = _NODE.fullmatch(hop.get("for", ""))
            address = next(filter(None, node.groups()), "") if node else ""
            try:
                client = str(ip_address(address))
            except ValueError:
                break  # "unknown", or an obfuscated name
            reported = hop
            if not self._trusts(client):
                break
        return client, reported


def _parse_forwarded(header: str) -> Iterator[dict[str, str]]:
    """The elements of ``Forwarded``, the nearest proxy's last; invalid pairs are ignored."""
    for element in re.findall(r'(?:[^,"]|"[^"]*")+', header):
        pairs = (_PAIR.fullmatch(pair) for pair in re.findall(r'(?:[^;"]|"[^"]*")+', element))
        parameters = {pair.group(1).lower(): pair.group(2) or pair.group(3) or "" for pair in pairs if pair is not None}
        if parameters:
            yield parameters


def _last(headers: Headers, name: str) -> str | None:
    """The value that the nearest proxy added."""
    values = ",".join(headers.getlist(name)).split(",")
    return values[-1].strip() or None


def _scheme(text: str | None) -> str | None:
    return text.lower() if text is not None and text.lower() in ("http", "https") else None


def _host(text: str | None) -> str | None:
    return text if text is not None and _HOST.fullmatch(text) else None


def _prefix(text: str | None) -> str | None:
    """The forwarded prefix, which is empty for ``/``; ``None`` if there is none or it is invalid."""
    try:
        prefix = parse_path_prefix(text) if text is not None else None
    except ValueError:
        return None
    return prefix if prefix or text == "/" else None

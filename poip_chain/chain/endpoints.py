"""Connecting to endpoints that strangers wrote into the registry: where they may lead, and an HTTP transport that keeps
to it.

A name is looked up once for each connection and the connection goes to an address that was looked at, so a name that
answers differently the second time (DNS rebinding) leads nowhere else. Host header and TLS certificate stay those of
the name. Knows no node, gateway or watchtower.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable

import httpcore
import httpx

from poip_chain.errors import Refused

DEVELOPMENT_CHAIN = 31337
"""On this chain nodes may lie at private addresses unless a setting says otherwise."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""RFC 6052: IPv6 addresses that stand for IPv4 ones, private ones among them."""


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, each once, in the system's order; blocks.

    Raises Refused if one of them is not an address of the public internet, OSError if the host is not known.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label of the name is too long or empty
        raise OSError(f"{host!r:.100} is no host name") from error
    addresses = list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))
    for address in addresses:
        if not _is_public(address):
            raise Refused(f"{host:.100} lies in a private network ({address}).")
    return addresses


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return True
    return address.sixtofour is None and address.teredo is None and address not in NAT64


class _PublicOnly(httpcore.AsyncNetworkBackend):
    """Opens connections to public addresses alone."""

    def __init__(self) -> None:
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore. Raises its ConnectError and ConnectTimeout."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await asyncio.to_thread(public_addresses, host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"{host:.100} was not found in time") from error
        except (Refused, OSError) as error:
            raise httpcore.ConnectError(str(error)) from error
        failure: Exception = httpcore.ConnectError(f"{host:.100} has no address")
        for address in addresses:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def node_transport(
    private_allowed: bool, *, limits: httpx.Limits | None = None, verify: ssl.SSLContext | bool = True
) -> httpx.AsyncHTTPTransport:
    """The transport for an httpx client that talks to nodes. Nothing of the environment (proxies) is used.

    Unless `private_allowed`, a host with an address that is not public is not connected to: httpx.ConnectError.
    """
    limits = limits or httpx.Limits(max_connections=100, max_keepalive_connections=20)
    context = httpx.create_ssl_context(verify=verify, trust_env=False)
    transport = httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits)
    if not private_allowed:
        # httpx has no way to hand in httpcore's network backend, so its pool is replaced by one that has it.
        transport._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_PublicOnly(),
        )
    return transport

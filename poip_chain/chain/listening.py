"""The address that a program is going to listen on, taken before anything else is done. Knows no program."""

from __future__ import annotations

import socket

from poip_chain.errors import ConfigurationError


def bound_socket(host: str, port: int, program: str) -> socket.socket:
    """A TCP socket bound to an address, on which nobody can connect before `listen` is called on it.

    port 0 takes any free one. Raises ConfigurationError, which names the setting `<program>.port` or `<program>.host`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port} ({program}.host, {program}.port): {error.strerror}.",
            hint="Choose another port, or stop what listens there.",
        ) from error
    return bound

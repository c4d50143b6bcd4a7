"""Refuses every connection that leaves this machine; read by conftest.py and, through sitecustomize, by child processes."""

from __future__ import annotations

import os
import socket
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class NetworkRefused(OSError):
    """A test tried to reach another machine."""


def allowed(family: int, address: Any) -> bool:
    return family not in (socket.AF_INET, socket.AF_INET6) or str(address[0]) in LOOPBACK


def refuse_sockets(log: str | None = None) -> None:
    """Patch socket and name look-up for the rest of this process; refused attempts are also listed in the file `log`."""
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refused(address: Any) -> NetworkRefused:
        if log:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {address}\n")
        return NetworkRefused(f"tests have no network: {address} is not this machine")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if not allowed(self.family, address):
            raise refused(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if not allowed(self.family, address):
            raise refused(address)
        return connect_ex(self, address)

    def guarded_look_up(host: Any, *rest: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", *LOOPBACK):
            raise refused((name, *rest))
        return look_up(host, *rest, **more)

    socket.socket.connect = guarded_connect  # type: ignore[method-assign]
    socket.socket.connect_ex = guarded_connect_ex  # type: ignore[method-assign]
    socket.getaddrinfo = guarded_look_up  # type: ignore[assignment]

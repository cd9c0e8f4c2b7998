"""Where a rank listens: its sockets, and what it tells the others about them."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from hvdkit.errors import LauncherError
from hvdkit.transport.tcp.addresses import choose_interfaces

Address = tuple[str, int]

_BACKLOG = 1024


@dataclass(frozen=True)
class Place:
    """Where a rank listens, as it says in the store.  Nobody vouches for that but the handshake."""

    job: bytes
    network: str
    addresses: tuple[Address, ...]

    def dump(self) -> bytes:
        fields = {"job": self.job.hex(), "network": self.network, "addresses": self.addresses}
        return json.dumps(fields).encode()

    @classmethod
    def parse(cls, text: bytes, rank: int) -> Place:
        try:
            fields = json.loads(text)
            addresses = tuple(
                (str(ipaddress.ip_address(host)), int(port)) for host, port in fields["addresses"]
            )
            return cls(bytes.fromhex(fields["job"]), str(fields["network"]), addresses)
        except (ValueError, TypeError, KeyError) as exc:
            raise LauncherError(
                f"what the launcher's store has for rank {rank} is not an address: {text[:80]!r}"
            ) from exc

    def reachable_from(self, network: str) -> list[Address]:
        """Return the addresses worth trying: the loopback's only where it is the same."""
        return [a for a in self.addresses if network == self.network or not _is_loopback(a[0])]


def listen(names: Sequence[str]) -> tuple[list[socket.socket], tuple[Address, ...]]:
    """Listen on the interfaces `names`, or on all; return the sockets and the addresses."""
    chosen = [a for interface in choose_interfaces(names) for a in interface.addresses]
    if names:
        listeners = [_listener(address) for address in chosen]
        return listeners, tuple((s.getsockname()[0], s.getsockname()[1]) for s in listeners)
    try:
        listener = socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
        )
    except (OSError, ValueError):
        listener = _listener("0.0.0.0")
        chosen = [address for address in chosen if ":" not in address]
    listener.setblocking(False)
    return [listener], tuple((address, listener.getsockname()[1]) for address in chosen)


def _listener(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")

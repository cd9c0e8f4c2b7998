"""The addresses under which other ranks reach this one: of all network interfaces, or of some."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hvdkit.errors import LauncherError

_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915  # <linux/sockios.h>
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_IFREQ = struct.Struct("16s24x")
_DAD_FAILED = 0x08  # another machine has the same IPv6 address


@dataclass(frozen=True)
class Interface:
    """A network interface that is up, with its addresses: IPv4 first, none that is link-local."""

    name: str
    loopback: bool
    addresses: tuple[str, ...]


def find_interfaces(if_inet6: Path = Path("/proc/net/if_inet6")) -> list[Interface]:
    """Return the interfaces that are up, the loopback last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            flags = struct.unpack_from("<H", _ask(sock, name, _SIOCGIFFLAGS), 16)[0]
            if not flags & _IFF_UP:
                continue
            addresses = []
            with suppress(OSError):  # it has none of IPv4
                addresses.append(socket.inet_ntoa(_ask(sock, name, _SIOCGIFADDR)[20:24]))
            addresses += _ipv6_addresses(name, if_inet6)
            usable = [a for a in addresses if not ipaddress.ip_address(a).is_link_local]
            found.append(Interface(name, bool(flags & _IFF_LOOPBACK), tuple(usable)))
    return sorted(found, key=lambda interface: interface.loopback)


def choose_interfaces(names: Sequence[str]) -> list[Interface]:
    """Return the interfaces called `names`, in that order; all of them if there are no names.

    Raises:
        LauncherError: one does not exist, or is down, or has no address; lists those there are.
    """
    there = {interface.name: interface for interface in find_interfaces()}
    for name in names:
        if name not in there or not there[name].addresses:
            what = "has no address" if name in there else "does not exist or is down"
            raise LauncherError(
                f"the network interface {name!r}, chosen with HVDKIT_TCP_INTERFACES or "
                f"--network-interfaces, {what} on {socket.gethostname()}; there are: "
                + "; ".join(f"{i.name} ({', '.join(i.addresses)})" for i in there.values())
            )
    return [there[name] for name in names] if names else list(there.values())


def network_place() -> str:
    """Return what is the same for all processes that share one loopback interface."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"  # noqa: PTH116  (no path: a handle)
    except OSError:
        return socket.gethostname()


def _ask(sock: socket.socket, name: str, what: int) -> bytes:
    return fcntl.ioctl(sock.fileno(), what, _IFREQ.pack(name.encode()))


def _ipv6_addresses(name: str, if_inet6: Path) -> list[str]:
    try:
        lines = [line.split() for line in if_inet6.read_text().splitlines()]
    except OSError:  # a kernel without IPv6
        return []
    return [
        str(ipaddress.IPv6Address(bytes.fromhex(address)))
        for address, _index, _prefix, _scope, flags, device in lines
        if device == name and not int(flags, 16) & _DAD_FAILED
    ]

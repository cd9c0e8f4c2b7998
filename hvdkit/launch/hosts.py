"""Where ranks go, which host is this one, and under which addresses others reach it."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hvdkit.errors import ArgumentError
from hvdkit.launch.mpirun import Host

#: Linux's ioctl for an interface's IPv4 address, and its list of the IPv6 ones.
_SIOCGIFADDR = 0x8915
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_LINK_LOCAL = 0x20


@dataclass(frozen=True)
class Place:
    """A host and the ranks that it gets."""

    host: str
    ranks: tuple[int, ...]


def place(hosts: Sequence[Host], size: int) -> tuple[Place, ...]:
    """Return which ranks go to which host: each is filled up, in the order in which they stand.

    Hosts that get no rank are left out.

    Raises:
        ArgumentError: the hosts have fewer slots than there are ranks.
    """
    slots: dict[str, int] = {}
    for host, count in hosts:
        slots[host] = slots.get(host, 0) + count
    if sum(slots.values()) < size:
        raise ArgumentError(
            f"{size} ranks are asked for, but the hosts have {sum(slots.values())} slots in all"
        )
    places: list[Place] = []
    first = 0
    for host, count in slots.items():
        ranks = tuple(range(first, min(first + count, size)))
        first += len(ranks)
        if ranks:
            places.append(Place(host, ranks))
    return tuple(places)


def rank_environments(places: Sequence[Place]) -> dict[int, dict[str, str]]:
    """Return what tells each rank its place: its own, that on its host, and that of its host.

    The cross rank counts the hosts that have a rank of the same local rank, as Horovod does.
    """
    size = sum(len(each.ranks) for each in places)
    told: dict[int, dict[str, str]] = {}
    for each in places:
        for local_rank, rank in enumerate(each.ranks):
            across = [other for other in places if len(other.ranks) > local_rank]
            numbers = {
                "RANK": rank,
                "SIZE": size,
                "LOCAL_RANK": local_rank,
                "LOCAL_SIZE": len(each.ranks),
                "CROSS_RANK": across.index(each),
                "CROSS_SIZE": len(across),
            }
            told[rank] = {f"HVDKIT_{name}": str(number) for name, number in numbers.items()}
    return told


def is_here(host: str) -> bool:
    """Return whether `host` is this host: by one of its names, or an address of its own."""
    name = socket.gethostname()
    if host in ("localhost", name, name.partition(".")[0]):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or str(address) in own_addresses()


def own_addresses(interfaces: Iterable[str] = ()) -> list[str]:
    """Return this host's addresses, without loopback and link-local ones; IPv4 first.

    Args:
        interfaces: names of those to look at; none: all.

    Raises:
        ArgumentError: one of `interfaces` is not there, or has no address.
    """
    wanted = list(interfaces)
    found = [*_ipv4_addresses(), *_ipv6_addresses()]
    for name in wanted:
        if name not in [interface for interface, _ in found]:
            there = ", ".join(sorted({interface for interface, _ in found})) or "none"
            raise ArgumentError(
                f"this host has no network interface {name!r} with an address; it has {there}"
            )
    return [
        address
        for interface, address in found
        if (interface in wanted if wanted else not ipaddress.ip_address(address).is_loopback)
    ]


def _ipv4_addresses() -> list[tuple[str, str]]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                asked = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, asked)
                found.append((name, socket.inet_ntoa(answer[20:24])))
    return found


def _ipv6_addresses() -> list[tuple[str, str]]:
    found = []
    with suppress(OSError):  # the kernel has no IPv6
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if int(scope, 16) != _LINK_LOCAL:
                found.append((name, str(ipaddress.IPv6Address(int(digits, 16)))))
    return found

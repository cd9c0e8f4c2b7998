"""What the links between hosts are like, and what this kernel can do about it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: New namespaces of every kind but the user's; what is mounted in them stays there.
NAMESPACES = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")

#: Where a user who is not root may have root's rights in namespaces of their own.
AS_ROOT = ("--user", "--map-root-user")

RELAY = Path(__file__).with_name("relay.py")

#: Bytes a frame carries: as on most clusters, and cheaper than 1500 for the cores that ranks need.
MTU = 9000

#: Frames that wait for a slow link, at most; more get lost, as they do in a switch.
QUEUE_SECONDS = 0.05


@dataclass(frozen=True)
class Link:
    """What lies between any two hosts; each host's own cable is alike."""

    rate: float | None = None
    """Bits a second, each way; None: as fast as the machine."""
    delay: float = 0.0
    """Seconds one way."""
    loss: float = 0.0
    """Share of the frames that get lost."""

    @property
    def is_long(self) -> bool:
        return bool(self.delay or self.loss)


def first_namespaces() -> tuple[str, ...]:
    """Return the command that puts what follows it into new namespaces, with root's rights."""
    return NAMESPACES if os.geteuid() == 0 else (*NAMESPACES, *AS_ROOT)


@cache
def why_no_hosts() -> str:
    """Return why no hosts can be had on this machine; empty if they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    missing = [name for name in ("unshare", "ip", "tc", "mount") if shutil.which(name) is None]
    if missing:
        return f"there is no {' and no '.join(missing)} command"
    said = _tried("mount -t tmpfs tmpfs /mnt && ip link add v0 type veth peer name v1")
    return said and f"namespaces may not be made here: {said}"


@cache
def why_no_rate() -> str:
    """Return why links cannot be slowed down; empty if they can."""
    return _tried("ip link add v0 type veth peer name v1 && " + shlex.join(_tbf("v0", 1e9)))


@cache
def has_netem() -> bool:
    """Return whether the kernel itself can hold frames back."""
    return not _tried("ip link add v0 type veth peer name v1 && tc qdisc add dev v0 root netem")


@cache
def why_no_delay() -> str:
    """Return why links cannot be made long; empty if they can."""
    if has_netem():
        return ""
    said = _tried("ip tuntap add mode tap name v0")
    return said and f"the kernel has no netem, and there are no TAP devices: {said}"


def why_not(link: Link) -> str:
    """Return why hosts cannot have such links here; empty if they can."""
    return (
        why_no_hosts()
        or (link.rate is not None and why_no_rate())
        or (link.is_long and why_no_delay())
        or ""
    )


def shaping(device: str, link: Link) -> list[list[str]]:
    """Return the commands that make what is sent on `device` slow, and late as far as netem can."""
    commands, place = [], ["root", "handle", "1:"]
    if link.is_long and has_netem():
        netem = ["netem", "limit", "20000", "delay", f"{link.delay * 1e6:.0f}us"]
        netem += ["loss", f"{link.loss * 100:g}%"] if link.loss else []
        commands.append(["tc", "qdisc", "add", "dev", device, *place, *netem])
        place = ["parent", "1:1", "handle", "10:"]
    if link.rate is not None:
        commands.append(_tbf(device, link.rate, place))
    return commands


def _tbf(device: str, rate: float, place: list[str] | None = None) -> list[str]:
    burst = max(2 * MTU, int(rate / 8 * 1e-4))
    limit = burst + int(rate / 8 * QUEUE_SECONDS)
    amounts = ["rate", f"{rate:.0f}bit", "burst", str(burst), "limit", str(limit)]
    return ["tc", "qdisc", "add", "dev", device, *(place or ["root"]), "tbf", *amounts]


def _tried(script: str) -> str:
    """Run a shell's script in new namespaces; return what went wrong."""
    try:
        done = subprocess.run(
            [*first_namespaces(), "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it takes too long"
    return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"

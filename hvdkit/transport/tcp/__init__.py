"""Messages over TCP, where no MPI is: among ranks of any launcher that has a store to meet in.

addresses    of this host's interfaces
connecting   every rank with every other, in bounded time; `handshake`: they prove a secret first
link         one socket, and the messages on it
mesh         all links of a rank, and how a thread waits for them; `forks`: nobody else has them
transport    communicators and control data on top of that
"""

from __future__ import annotations

import socket
import time
from collections.abc import Hashable, Sequence

from hvdkit.errors import LauncherError
from hvdkit.transport.tcp.addresses import network_place
from hvdkit.transport.tcp.connecting import Membership, meet
from hvdkit.transport.tcp.mesh import Mesh
from hvdkit.transport.tcp.transport import SocketBackoff, TCPTransport

__all__ = ["Membership", "SocketBackoff", "TCPTransport", "connect"]


def connect(
    me: Membership,
    *,
    interfaces: Sequence[str] = (),
    start_timeout: float,
    peer_timeout: float,
    node: Hashable = None,
    spin: int = 0,
) -> TCPTransport:
    """Connect this rank with all others of its job.  Collective.

    Args:
        me: its place in the job.
        interfaces: the network interfaces to be reached by; none: all there are.
        start_timeout: seconds in which all ranks must be connected.
        peer_timeout: seconds after which a peer that does not answer is lost.
        node: the same on ranks that share memory; None: on ranks of one host.
        spin: how often a wait looks before it sleeps.

    Raises:
        LauncherError: there is no such interface, or not all ranks were connected in time.
    """
    deadline = time.monotonic() + start_timeout
    sockets: dict[int, socket.socket] = {}
    if me.size > 1:
        if not me.secret:
            raise LauncherError("ranks connect over TCP only with a secret, which is empty here")
        sockets = meet(me, interfaces=interfaces, deadline=deadline)
    mesh = Mesh(me.rank, sockets, peer_timeout=peer_timeout)
    transport = TCPTransport(mesh, range(me.size), b"", nodes={}, spin=spin)
    where = (socket.gethostname(), network_place()) if node is None else node
    try:
        transport.introduce(where, deadline)
    except TimeoutError as exc:
        mesh.close()
        raise LauncherError(
            f"rank {me.rank} on {socket.gethostname()} is connected with all {me.size} ranks, but "
            f"not all of these with each other within {start_timeout:g} s (HVDKIT_START_TIMEOUT)"
        ) from exc
    except BaseException:
        mesh.close()
        raise
    return transport

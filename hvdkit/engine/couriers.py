"""The couriers of a job: one for each process set whose ranks have asked for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.config import Config
from hvdkit.engine.communicator import Communicator
from hvdkit.errors import UnsupportedError
from hvdkit.transport.courier import Courier


class Couriers:
    """Makes the couriers of one job, and lets go of them.

    Args:
        config: whether there is shared memory, and how long ranks may wait.
        look: raises PeerError if a rank is lost; None: whoever started the ranks sees to that.
        threaded: whether another thread than the caller's may communicate.
    """

    def __init__(
        self, config: Config, look: Callable[[], object] | None, *, threaded: bool
    ) -> None:
        self._config = config
        self._look = look
        self._threaded = threaded
        self._open: dict[int, Courier] = {}

    def courier(self, among: Communicator) -> Courier:
        """Return what carries arrays between the ranks of `among`, one for all.  Collective.

        Raises:
            UnsupportedError: MPI was started without support for threads.
        """
        if among.number not in self._open:
            if not self._threaded:
                raise UnsupportedError(
                    "MPI was started without thread support, which a pipeline needs: start it with "
                    '"multiple", as mpi4py does if nobody else has'
                )
            self._open[among.number] = among.call(self._make, among.ranks)
        return self._open[among.number]

    def release(self, set_id: int) -> None:
        """Let go of a process set's courier, if it has one.  Local."""
        if set_id in self._open:
            self._open.pop(set_id).close()

    def close(self) -> None:
        """Let go of all."""
        for courier in self._open.values():
            courier.close()

    def _make(self, group: Group, ranks: Sequence[int]) -> Courier:
        group.agree(Call("courier", None))
        off = self._config.stall_check_disable
        transport: Any = group.transport
        return Courier(
            transport.duplicate(),
            shared=self._config.shm,
            check=0.0 if off else self._config.stall_check,
            shutdown=0.0 if off else self._config.stall_shutdown,
            ranks=ranks,
            look=self._look,
        )

"""How process groups come about: who is who, and the store that torch wants."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlparse

from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import _rendezvous_handlers, register_rendezvous_handler

from hvdkit.api import context, init
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.context import Context
from hvdkit.errors import ArgumentError, LauncherError
from hvdkit.torch.c10d.group import ProcessGroup
from hvdkit.transport.tcp.addresses import find_interfaces

_torch_env = _rendezvous_handlers["env"]

#: For each address at which rank 0's store may be.
_SECONDS_TO_CONNECT = 5.0


def register() -> None:
    """Make the backend and the ways to its store known to torch.  Once."""
    _rendezvous_handlers["env"] = env_rendezvous
    register_rendezvous_handler("hvdkit", rendezvous)
    dist.Backend.register_backend("hvdkit", create, extended_api=True, devices=["cpu"])


def create(options: Any, _: Any) -> ProcessGroup:
    """Make the group that `init_process_group` or `new_group` asks for."""
    init()
    here = context()
    rank, size = here.topology.rank, here.topology.size
    ranks = list(options.global_ranks_in_group)
    if not ranks:
        ranks = list(range(options.group_size))
        if (options.group_rank, options.group_size) != (rank, size):
            error = ArgumentError(
                f"init_process_group was told rank {options.group_rank} of {options.group_size}, "
                f"and hvdkit has rank {rank} of {size}: leave out rank and world_size, and see "
                "that RANK and WORLD_SIZE are those of the launcher, or not set"
            )
            here.world.lane.call(here.group.refuse, "init_process_group", None, error)
        here.world.call(Group.agree, Call("init_process_group", None))
        if size > 1:
            sys.excepthook = partial(_past_torch, sys.excepthook)
    elif ranks != sorted(ranks) or rank not in ranks or ranks.index(rank) != options.group_rank:
        raise ArgumentError(
            f"new_group of ranks {ranks}: this is hvdkit's rank {rank}, and place "
            f"{options.group_rank} there; give the ranks as hvdkit counts them, ascending"
        )
    return ProcessGroup(here, ranks, options.group_id, options.timeout)


def _past_torch(
    hook: Callable[..., None],
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    """Let hvdkit's hook, which ends the process, print at once; torch's prints what it collects."""
    with redirect_stderr(sys.__stderr__):
        hook(kind, error, traceback)


def rendezvous(
    url: str, timeout: timedelta = default_pg_timeout, **_: Any
) -> Iterator[tuple[Any, int, int]]:
    """Yield a store on rank 0, and this process's rank and number as hvdkit knows them."""
    init()
    topology = context().topology
    query = dict(parse_qsl(urlparse(url).query))
    rank = int(query.get("rank", topology.rank))
    yield _store(context(), timeout), rank, int(query.get("world_size", topology.size))
    raise LauncherError("hvdkit's ranks cannot meet a second time; start the job again")


def _store(here: Context, timeout: timedelta) -> Any:
    """Return a store that all ranks share.  Collective."""
    rank, size = here.topology.rank, here.topology.size
    tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    options = {"timeout": timeout, "wait_for_workers": False}
    found: tuple[list[str], int] | str = ""
    store = None
    if rank == 0:
        try:
            store = tcp_store("127.0.0.1", 0, size, True, **options)
            found = (_own_addresses(), store.port)
        except RuntimeError as exc:
            found = str(exc)
    found = here.world.broadcast_object(found, 0)
    if isinstance(found, str):
        raise LauncherError(f"rank 0 cannot open the store that torch.distributed wants: {found}")
    hosts, port = found
    if here.topology.local_size == size:
        hosts = ["127.0.0.1"]
    return store or tcp_store(_reachable(hosts, port), port, size, False, **options)


def _own_addresses() -> list[str]:
    """Return by what names this host may be known to others, its own name first."""
    interfaces = find_interfaces()
    addresses = [address for interface in interfaces for address in interface.addresses]
    return [socket.gethostname(), *addresses]


def _reachable(hosts: Sequence[str], port: int) -> str:
    """Return the first of the names under which a host can be reached: torch tries only one.

    Raises:
        LauncherError: there is none.
    """
    troubles = []
    for host in hosts:
        try:
            socket.create_connection((host, port), _SECONDS_TO_CONNECT).close()
        except OSError as exc:  # noqa: PERF203  (a wait, not a loop)
            troubles.append(f"{host}: {exc}")
        else:
            return host
    raise LauncherError(
        "rank 0's store, which torch.distributed wants, cannot be reached at port "
        f"{port} from {socket.gethostname()} ({'; '.join(troubles)})"
    )


def env_rendezvous(
    url: str, timeout: timedelta = default_pg_timeout, **how: Any
) -> Iterator[tuple[Any, int, int]]:
    """Do what torch does for ``env://`` where the environment says enough, else as ``hvdkit://``."""
    given = {name.upper() for name, _ in parse_qsl(urlparse(url).query)}
    wanted = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - given
    enough = all(os.environ.get(name) for name in wanted)
    return (_torch_env if enough else rendezvous)(url, timeout=timeout, **how)

"""The peers that several benchmarks start."""

from __future__ import annotations

import os
import socket

import hvdkit as hvd


def start_gloo() -> None:
    """Make gloo torch.distributed's default group, among hvdkit's ranks.  Collective."""
    import torch.distributed as dist

    here = hvd.local_size() == hvd.size()
    if here:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host, port = "", 0
    if hvd.rank() == 0:
        host = "127.0.0.1" if here else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    host, port = hvd.broadcast_object((host, port))
    dist.init_process_group(
        "gloo", init_method=f"tcp://{host}:{port}", rank=hvd.rank(), world_size=hvd.size()
    )


def start_horovod() -> bool:
    """Start Horovod beside hvdkit where it happens to be installed; return whether it is."""
    try:
        import horovod.torch as horovod
    except ImportError:
        return False
    horovod.init()
    return bool(horovod.size() == hvd.size())

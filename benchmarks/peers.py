"""The peers that several benchmarks start."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
from typing import TYPE_CHECKING

import hvdkit as hvd

if TYPE_CHECKING:
    import tensorflow as tf
    import torch


def start_gloo() -> bool:
    """Make gloo torch.distributed's default group, among hvdkit's ranks.  Again: does nothing.

    Collective.

    Returns:
        Whether there is one: not where PyTorch is not installed.
    """
    try:
        import torch.distributed as dist
    except ImportError:
        return False
    if dist.is_initialized():
        return True
    if hvd.local_size() == hvd.size():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address = hvd.broadcast_object(free_address())
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}", rank=hvd.rank(), world_size=hvd.size()
    )
    return True


def start_strategy() -> tf.distribute.Strategy:
    """Make a cluster of TensorFlow of hvdkit's ranks.  Collective; before it does anything else."""
    import tensorflow as tf

    cluster = {"worker": hvd.allgather_object(free_address())}
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": cluster, "task": {"type": "worker", "index": hvd.rank()}}
    )
    return tf.distribute.MultiWorkerMirroredStrategy()


def free_address() -> str:
    """Return an address of this rank that is free, and that the other ranks reach."""
    host = "127.0.0.1" if hvd.local_size() == hvd.size() else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"


def start_horovod(framework: str) -> bool:
    """Start Horovod beside hvdkit where it happens to be installed; return whether it is."""
    try:
        horovod = importlib.import_module(f"horovod.{framework}")
    except ImportError:
        return False
    horovod.init()
    return bool(horovod.size() == hvd.size())


def gpu_of_this_rank() -> torch.device | None:
    """Return this rank's GPU for NCCL, or None unless every rank has one of its own.  Collective.

    NCCL refuses two ranks on one GPU.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    import torch.distributed as dist

    mine = torch.cuda.is_available() and dist.is_nccl_available()
    enough = mine and torch.cuda.device_count() >= hvd.local_size()
    if not all(hvd.allgather_object(enough)):
        return None
    device = torch.device("cuda", hvd.local_rank())
    torch.cuda.set_device(device)
    return device

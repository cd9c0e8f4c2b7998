"""The collectives on arrays, one module each: agree, pick an algorithm, execute it."""

from hvdkit.collectives.allgather import allgather
from hvdkit.collectives.allreduce import allreduce
from hvdkit.collectives.alltoall import alltoall
from hvdkit.collectives.barrier import barrier
from hvdkit.collectives.broadcast import broadcast
from hvdkit.collectives.explaining import explain
from hvdkit.collectives.group import Group
from hvdkit.collectives.reducescatter import reducescatter

__all__ = [
    "Group",
    "allgather",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "explain",
    "reducescatter",
]

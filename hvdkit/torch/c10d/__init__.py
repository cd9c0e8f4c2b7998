"""The torch.distributed backend "hvdkit": its collectives, and plain DDP, over hvdkit's core.

    import torch.distributed as dist
    import hvdkit.torch.c10d                     # registers the backend

    dist.init_process_group("hvdkit")            # under mpirun: nothing else need be set
    model = torch.nn.parallel.DistributedDataParallel(model)

Ranks and their number are those of hvdkit, which is initialised if it was not.  Where the
environment lacks any of ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, hvdkit makes
the store that torch wants (for gloo as well, once this module is imported); ``store=`` and
``init_method=`` work as ever, and ``"hvdkit://"`` asks for hvdkit's store in any case.

Each process group has an arena, messages and a lane of its own.  Calls are matched in the order in
which they are made, and what ranks do differently is a `MismatchError` on all of them.
"""

from hvdkit.torch.c10d.group import ProcessGroup
from hvdkit.torch.c10d.rendezvous import register

__all__ = ["ProcessGroup"]

register()

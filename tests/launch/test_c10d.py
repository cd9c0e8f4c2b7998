"""torch.distributed under mpirun: how its process group finds itself, and how its job ends."""

import pytest
from launching import run

pytest.importorskip("torch")


def test_ways_to_initialise_and_an_end_with_a_traceback():
    """torch shows what an excepthook prints when that returns, and hvdkit's ends the process."""
    outcome = run(
        """
        import os, socket
        import torch, torch.distributed as dist
        import hvdkit as hvd
        import hvdkit.torch.c10d

        def works(how):
            x = torch.ones(1)
            dist.all_reduce(x)
            print(f"{how} {dist.get_rank() == hvd.rank()} {x.item()}", flush=True)
            dist.destroy_process_group()

        dist.init_process_group("hvdkit")
        works("alone")
        rank = hvd.rank()
        try:
            dist.init_process_group("hvdkit", rank=0, world_size=2)
        except hvd.HvdkitError as exc:
            print("wrong", type(exc).__name__, exc, flush=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = hvd.broadcast_object(free.getsockname()[1])
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        dist.init_process_group("hvdkit", init_method="env://")
        works("env")
        store = dist.HashStore()
        dist.init_process_group("hvdkit", store=store, rank=rank, world_size=2)
        if rank == 1:
            raise ValueError("the data are gone")
        dist.barrier()
        print("not reached")
        """,
        2,
    )
    assert outcome.status != 0
    said = outcome.stdout
    assert said.count("alone True 2.0") == said.count("env True 2.0") == 2
    assert "wrong ArgumentError init_process_group was told rank 0 of 2" in said
    assert "wrong MismatchError init_process_group: not every rank could make the call" in said
    assert "ValueError: the data are gone" in outcome.stderr
    assert "hvdkit: rank 1 of 2 raised ValueError; ending the job" in outcome.stderr
    assert "not reached" not in said


def test_without_a_launcher():
    outcome = run(
        """
        import torch, torch.distributed as dist
        import hvdkit.torch.c10d

        dist.init_process_group("hvdkit")
        layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
        layer(torch.ones(1, 2)).sum().backward()
        print(dist.get_world_size(), layer.module.weight.grad.tolist())
        """,
        1,
    )
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.split("\n")[0] == "1 [[1.0, 1.0]]"
